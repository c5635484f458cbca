"""Divergences on a part of the vocabulary against the textbook on the same few probabilities, row by row."""

from dataclasses import replace

import pytest
import torch
from textbook import CASES, F_DIVERGENCES, Side, divergence, divergence_on, fused_arguments, make_sides, support_of

from trl_opd import fused_linear_divergence

NAMES = list(CASES)
N, V, K = 7, 19, 5
SUPPORTS = ["teacher_top_k", "student_top_k", "union_top_k", "intersection_top_k"]
TAILS = ["bucket", "renormalize", "none"]


def sides(n: int = N, V: int = V) -> tuple[Side, Side]:
    student, teacher = make_sides(n, V, bias=True)
    return replace(student, scale=1.2), teacher


def textbook(name, student, teacher, support, size, tail) -> torch.Tensor:
    return torch.stack(
        [
            divergence_on(name, s, t, support_of(s, t, support, size), tail)
            for s, t in zip(student.probs(), teacher.probs(), strict=True)
        ]
    )


def fused(student: Side, teacher: Side, name: str = "reverse_kl", **kwargs):
    return fused_linear_divergence(
        **fused_arguments(student, teacher), divergence=name, divergence_kwargs=CASES[name][1], **kwargs
    )


def from_top_k(student: Side, ids, logprobs, name: str = "reverse_kl", **kwargs):
    """The op with a teacher of which the top is known and no more."""
    arguments = {k: x for k, x in fused_arguments(student, student).items() if not k.startswith("teacher")}
    return fused_linear_divergence(
        **arguments, teacher_topk=(ids, logprobs), divergence=name, divergence_kwargs=CASES[name][1], **kwargs
    )


def top(teacher: Side, size: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    probs, ids = teacher.probs().topk(size)
    return ids, probs.log()


def assert_same(out, truth: torch.Tensor, student: Side) -> None:
    torch.testing.assert_close(out.divergence, truth.detach(), rtol=1e-9, atol=1e-12)
    weights = torch.linspace(1, 2, len(truth)).double()
    expected = torch.autograd.grad((truth * weights).sum(), student.leaves, retain_graph=True)
    assert torch.allclose(out.loss, (truth * weights).sum(), rtol=1e-9)
    for ours, theirs in zip(torch.autograd.grad(out.loss, student.leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


WEIGHTS = {"token_weights": torch.linspace(1, 2, N).double()}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_dense_teacher_on_a_support(name, support, tail):
    student, teacher = sides()
    out = fused(student, teacher, name, support=support, support_size=K, tail=tail, **WEIGHTS)
    assert_same(out, textbook(name, student, teacher, support, K, tail), student)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_a_top_k_teacher_equals_a_dense_one_on_its_top_k(name, tail):
    student, teacher = sides()
    ids, logprobs = top(teacher)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))  # a server may send them in any order
    out = from_top_k(student, ids[:, order], logprobs[:, order], name, tail=tail, **WEIGHTS)
    assert_same(out, textbook(name, student, teacher, "teacher_top_k", K, tail), student)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_supports_at_another_temperature(temperature):
    student, teacher = sides()
    pairs = list(zip(student.probs(temperature), teacher.probs(temperature), strict=True))
    truth = [divergence_on("reverse_kl", s, t, support_of(s, t, "union_top_k", K), "bucket") for s, t in pairs]
    out = fused(student, teacher, support="union_top_k", support_size=K, temperature=temperature, **WEIGHTS)
    assert_same(out, torch.stack(truth), student)


@pytest.mark.parametrize("size", [V, V + 4])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_vocabulary_is_the_full_divergence(name, support, tail, size):
    """I8a."""
    student, teacher = sides()
    out = fused(student, teacher, name, support=support, support_size=size, tail=tail, **WEIGHTS)
    assert_same(out, divergence(name, student.probs(), teacher.probs()), student)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_that_sends_every_entry_is_the_full_divergence(name, tail):
    """I8a."""
    student, teacher = sides()
    out = from_top_k(student, *top(teacher, V), name, tail=tail, **WEIGHTS)
    assert_same(out, divergence(name, student.probs(), teacher.probs()), student)


@pytest.mark.parametrize("size", [V // 2, V // 2 + 1, V - 2])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "total_variation"])
def test_a_union_that_overlaps_is_not_mistaken_for_the_whole_vocabulary(name, size):
    student, teacher = sides()
    out = fused(student, teacher, name, support="union_top_k", support_size=size, **WEIGHTS)
    assert_same(out, textbook(name, student, teacher, "union_top_k", size, "bucket"), student)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_a_bucket_only_lowers_the_divergence_and_less_so_the_larger_the_support(name, support):
    """I8b."""
    student, teacher = sides()
    values = [divergence(name, student.probs(), teacher.probs()).detach()]
    for size in (V - 1, 12, 6, 3, 1):
        values.append(fused(student, teacher, name, support=support, support_size=size).divergence)
        assert (values[-1] <= values[-2] + 1e-12).all()
    assert (values[-1] < values[0] - 1e-3).all()


def closed_form(student: Side, teacher: Side, entries_only) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ over the support of `entries_only(s, t) · ∇log s`, in the student's logits and so in its bias."""
    total = torch.zeros(V).double()
    for s, t in zip(student.probs().detach(), teacher.probs(), strict=True):
        entries = support_of(s, t, "teacher_top_k", K)
        a = torch.zeros(V).double()
        a[entries] = entries_only(s[entries], t[entries])
        total += student.scale * (a - s * a.sum())
    return total


def test_the_raw_reverse_kl_has_a_plus_one_that_pushes_mass_out_of_the_support():
    """I8c."""
    student, teacher = sides()
    out = fused(student, teacher, support="teacher_top_k", support_size=K, tail="none")
    (gradient,) = torch.autograd.grad(out.loss, student.bias)
    torch.testing.assert_close(gradient, closed_form(student, teacher, lambda s, t: s * ((s / t).log() + 1)))


def test_the_raw_forward_kl_is_safe_without_a_tail():
    """I8d: Σ_K t (log t − log s) has the gradient T(K)·s − t on K."""
    student, teacher = sides()
    out = fused(student, teacher, "forward_kl", support="teacher_top_k", support_size=K, tail="none")
    (gradient,) = torch.autograd.grad(out.loss, student.bias)
    expected = torch.zeros(V).double()
    for s, t in zip(student.probs().detach(), teacher.probs(), strict=True):
        inside = torch.zeros(V).double()
        entries = support_of(s, t, "teacher_top_k", K)
        inside[entries] = t[entries]
        expected += student.scale * (inside.sum() * s - inside)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_renormalised_support_has_exactly_no_gradient_outside(name):
    """I8e, at one token: the head's rows and bias outside the support."""
    student, teacher = sides(1)
    inside = torch.zeros(V, dtype=torch.bool)
    inside[support_of(student.probs()[0], teacher.probs()[0], "union_top_k", K)] = True
    out = fused(student, teacher, name, support="union_top_k", support_size=K, tail="renormalize")
    weight, bias = torch.autograd.grad(out.loss, [student.weight, student.bias])
    assert (weight[~inside] == 0).all() and (bias[~inside] == 0).all()
    assert (bias[inside] != 0).any()


@pytest.mark.parametrize("kind", ["teacher_top_k", "student_top_k", "intersection_top_k", "top-k teacher"])
def test_a_renormalised_support_of_one_entry_is_refused(kind):
    """I8e: it is identically zero."""
    student, teacher = sides()
    with pytest.raises(ValueError, match=r"support_size must be at least 2 .* got 1.*identically zero"):
        if kind == "top-k teacher":
            from_top_k(student, *top(teacher, 1), tail="renormalize")
        else:
            fused(student, teacher, support=kind, support_size=1, tail="renormalize")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])  # raw sums have no minimum there: I8c, I8d
def test_a_matched_teacher_gives_zero_on_every_support(name, tail):
    """I16."""
    student, _ = sides()
    out = fused(student, student.to(torch.float64), name, support="student_top_k", support_size=K, tail=tail)
    assert out.divergence.abs().max() < 1e-14
    assert max(g.abs().max() for g in torch.autograd.grad(out.loss, student.leaves)) < 1e-14


def sides_with_common_entries(counts: list[int]) -> tuple[Side, Side]:
    """One row for each of `counts`, with that many entries in both models' top K."""
    logits = torch.randn(2, len(counts), V, generator=torch.Generator().manual_seed(0)).double()
    for row, count in enumerate(counts):
        logits[0, row, :K] += 6
        logits[1, row, K - count : 2 * K - count] += 6
    eye = torch.eye(len(counts)).double()
    student, teacher = (Side(eye, x.T.contiguous()) for x in logits)
    return student.to(torch.float64, grad=True), teacher


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_intersection_has_value_and_gradient_zero(name, tail):
    student, teacher = sides_with_common_entries([2, 0, K, 1])
    out = fused(student, teacher, name, support="intersection_top_k", support_size=K, tail=tail)
    truth = textbook(name, student, teacher, "intersection_top_k", K, tail)
    torch.testing.assert_close(out.divergence, truth.detach(), rtol=1e-9, atol=1e-12)
    assert out.divergence[1] == 0 and (out.divergence[[0, 2]] > 0).all()
    hidden, weight = torch.autograd.grad(out.loss, student.leaves)
    expected = torch.autograd.grad(truth.sum(), student.leaves)
    torch.testing.assert_close((hidden, weight), expected, rtol=1e-8, atol=1e-10)
    assert (hidden[1] == 0).all() and (weight[:, 1] == 0).all()
    if tail == "renormalize":  # one entry alone has probability 1 in both
        assert out.divergence[3] == 0 and (weight[:, 3] == 0).all()


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_that_says_nothing_about_a_token_teaches_nothing_there(name, tail, per_token_grad):
    student, teacher = sides()
    ids, logprobs = top(teacher)
    ids[[1, 4]], logprobs[[1, 4]] = -1, float("nan")
    ids[4] = V + torch.arange(K)  # entries that the student lacks are nothing to it
    out = from_top_k(student, ids, logprobs, name, tail=tail, overlap_top_k=3, per_token_grad=per_token_grad)
    silent = torch.isin(torch.arange(N), torch.tensor([1, 4]))
    for statistic in (out.divergence, out.forward_kl, out.reverse_kl, out.teacher_entropy, out.overlap):
        assert (statistic[silent] == 0).all() and torch.isfinite(statistic).all()
    gradients = torch.autograd.grad(out.loss, student.leaves)
    assert (gradients[0][silent] == 0).all()
    heard = replace(student, hidden=student.hidden[~silent])
    truth = textbook(name, heard, replace(teacher, hidden=teacher.hidden[~silent]), "teacher_top_k", K, tail)
    torch.testing.assert_close(out.divergence[~silent], truth, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(truth.sum(), student.leaves)
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


PADDINGS = {
    "at the end": [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1], [0, -1, -1, -1, -1]],
    "at the start": [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2], [-1, -1, -1, -1, 0]],
    "between": [[0, 1, 2, 3, 4], [0, -1, 1, -1, 2], [-1, 0, -1, -1, -1]],
}


@pytest.mark.parametrize("padding_id", [-1, -100])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("tail", ["bucket", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_negative_ids_are_padding_wherever_they_stand(name, tail, padding, padding_id):
    student, teacher = sides(3)
    ids, logprobs = top(teacher)
    places = torch.tensor(PADDINGS[padding])
    padded_ids = ids.gather(1, places.clamp(min=0)).masked_fill(places < 0, padding_id)
    padded_logprobs = logprobs.gather(1, places.clamp(min=0)).masked_fill(places < 0, float("nan"))
    truth = [
        divergence_on(name, s, t, [int(v) for v in entries if v >= 0], tail)
        for s, t, entries in zip(student.probs(), teacher.probs(), padded_ids, strict=True)
    ]
    out = from_top_k(student, padded_ids, padded_logprobs, name, tail=tail, token_weights=torch.linspace(1, 2, 3))
    assert_same(out, torch.stack(truth), student)


@pytest.mark.parametrize(("extra", "refused"), [(3, True), (-1, False), (V, False)])
def test_an_entry_that_a_teacher_sends_twice_is_refused(extra, refused):
    student, teacher = sides()
    ids, logprobs = top(teacher)
    alone = from_top_k(student, ids, logprobs).divergence
    ids, logprobs = torch.cat([ids, torch.full((N, 2), -1)], 1), torch.cat([logprobs, torch.zeros(N, 2)], 1)
    ids[2, -2:] = ids[2, extra] if refused else extra
    if refused:
        with pytest.raises(ValueError, match=rf"ids of a row must be distinct, got one with {ids[2, extra]} twice"):
            from_top_k(student, ids, logprobs)
        assert from_top_k(student, ids, logprobs, mask=torch.arange(N) != 2).rows.sum() == N - 1
    else:  # padding, and what the student lacks
        torch.testing.assert_close(from_top_k(student, ids, logprobs).divergence, alone)


@pytest.mark.parametrize("logprobs", [torch.zeros(N, K + 1), torch.zeros(N)])
def test_a_top_k_teacher_whose_ids_and_log_probs_differ_in_shape_is_refused(logprobs):
    with pytest.raises(ValueError, match=r"teacher_topk must be whole-numbered ids \(N, K\) and log-probs \(N, K\)"):
        from_top_k(sides()[0], torch.arange(K).expand(N, K), logprobs)


@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_a_teacher_entry_that_the_student_lacks_is_part_of_the_rest(tail):
    student, teacher = sides()
    ids, logprobs = top(teacher)
    truth = [
        divergence_on("reverse_kl", s, t, entries.tolist(), tail)
        for s, t, entries in zip(student.probs(), teacher.probs(), ids[:, 1:], strict=True)
    ]
    ids[:, 0] = torch.arange(V, V + N)
    assert_same(from_top_k(student, ids, logprobs, tail=tail, **WEIGHTS), torch.stack(truth), student)


def test_padding_up_to_the_vocabulary_is_not_mistaken_for_all_of_it():
    student, teacher = sides()
    ids, logprobs = top(teacher)
    wide_ids = torch.cat([ids, torch.full((N, V - K), -1)], dim=1)
    wide_logprobs = torch.cat([logprobs, torch.zeros(N, V - K)], dim=1)
    out = from_top_k(student, wide_ids, wide_logprobs, **WEIGHTS)
    assert_same(out, textbook("reverse_kl", student, teacher, "teacher_top_k", K, "bucket"), student)


def test_statistics_of_a_dense_teacher_are_over_the_whole_vocabulary():
    student, teacher = sides()
    full, part = fused(student, teacher), fused(student, teacher, support="teacher_top_k", support_size=K)
    for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(getattr(part, name), getattr(full, name))
    assert (part.divergence < full.divergence).all()


def test_statistics_of_a_top_k_teacher_are_those_of_its_bucketed_distribution():
    student, teacher = sides()
    ids, logprobs = top(teacher)
    target_ids = torch.arange(N)
    out = from_top_k(
        student, ids, logprobs, "total_variation", tail="renormalize", target_ids=target_ids, overlap_top_k=3
    )
    s, t = student.probs().detach(), teacher.probs()
    for name in ("forward_kl", "reverse_kl"):
        truth = textbook(name, student, teacher, "teacher_top_k", K, "bucket").detach()
        torch.testing.assert_close(getattr(out, name), truth)
    bucketed = torch.cat([t.topk(K)[0], 1 - t.topk(K)[0].sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(out.teacher_entropy, -(bucketed * bucketed.log()).sum(-1))
    torch.testing.assert_close(out.student_entropy, -(s * s.log()).sum(-1))
    torch.testing.assert_close(out.student_logprobs, s[target_ids, target_ids].log())
    assert out.teacher_logprobs is None
    overlap = [len({*a.tolist()} & {*b.tolist()}) / 3 for a, b in zip(s.topk(3)[1], t.topk(3)[1], strict=True)]
    torch.testing.assert_close(out.overlap, torch.tensor(overlap).double())
