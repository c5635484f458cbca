"""Top-k supports and per-token gradients by the Triton backend against the textbook on the same few probabilities."""

import itertools
from dataclasses import replace

import pytest
import torch
from backends import BACKENDS, FP32, FP64, TRITON, ask, assert_gradients, assert_values, represented
from textbook import CASES, Side, divergence, divergence_on, make_sides, overlap_advantage, support_of

pytestmark = pytest.mark.usefixtures("short_blocks")
NAMES = list(CASES)
N, V, K = 3, 21, 5
SUPPORTS = ["teacher_top_k", "student_top_k", "union_top_k", "intersection_top_k"]
TAILS = ["bucket", "renormalize", "none"]
WEIGHTS = torch.tensor([-0.4, 1.0, 2.0], dtype=FP64)
TARGETS = torch.tensor([0, 15, 20])
LOGPROB_WEIGHTS, ENTROPY_WEIGHTS = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.2, 0.5, -1.0])
# A teacher's lists: without padding, with some, with nothing else; `V + 2` is an entry that the student lacks
LISTS = {
    "full lists": lambda ids: ids,
    "padding": lambda ids: torch.stack([padded(ids[0], [2, 3, 4]), padded(ids[1], [0, 2]), outside(ids[2])]),
    "nothing known": lambda ids: torch.stack([ids[0], torch.full((K,), -1), padded(ids[2], [4])]),
}


def padded(ids: torch.Tensor, places: list[int]) -> torch.Tensor:
    return ids.index_fill(0, torch.tensor(places), -7)


def outside(ids: torch.Tensor) -> torch.Tensor:
    return ids.index_fill(0, torch.tensor([1]), V + 2)


def sides(shaped: bool, dtype: torch.dtype) -> tuple[Side, Side, float]:
    student, teacher = represented(make_sides(N, V, H=(5, 7), seed=2), dtype)
    if not shaped:
        return replace(student, bias=None), replace(teacher, bias=None), 1.0
    return replace(student, scale=1.3, softcap=5.0), replace(teacher, scale=0.8, softcap=4.0), 0.7


def per_token_loss(value, logprobs, entropy):
    weights = (WEIGHTS, LOGPROB_WEIGHTS, ENTROPY_WEIGHTS)
    return sum((x * w.to(x)).sum() for x, w in zip((value, logprobs, entropy), weights, strict=True) if x is not None)


def fused_loss(out):
    return per_token_loss(out.divergence, out.student_logprobs, out.student_entropy)


def check(backend, dtype, name, values, student, teacher, temperature, per_token_grad, told) -> None:
    """The op against per-row `values` formed from dense probabilities; `None` without any teacher."""
    s = student.probs(temperature)
    logprobs, entropy = s[torch.arange(N), TARGETS].log(), -(s * s.log()).sum(-1)
    loss = per_token_loss(values, logprobs, entropy) if per_token_grad else (values * WEIGHTS).sum()
    told = told | {"temperature": temperature, "target_ids": TARGETS, "chunk_bytes": 2 * 2 * V * dtype.itemsize}
    if not per_token_grad:
        told["token_weights"] = WEIGHTS
    ours = ask(
        backend, dtype, student, teacher, name,
        loss=fused_loss if per_token_grad else None, per_token_grad=per_token_grad, **told,
    )  # fmt: skip
    if values is not None:
        assert_values(ours.divergence, values.detach(), dtype)
    assert_values(ours.student_logprobs, logprobs.detach(), dtype)
    assert_values(ours.student_entropy, entropy.detach(), dtype)
    assert_gradients(ours.gradients, torch.autograd.grad(loss, student.leaves), dtype, bound=5e-6)
    return ours


def check_dense(backend, dtype, name, support, tail, shaped, per_token_grad) -> None:
    student, teacher, temperature = sides(shaped, dtype)
    pairs = zip(student.probs(temperature), teacher.probs(temperature), strict=True)
    values = torch.stack([divergence_on(name, s, t, support_of(s, t, support, K), tail) for s, t in pairs])
    told = {"support": support, "support_size": K, "tail": tail}
    check(backend, dtype, name, values, student, teacher, temperature, per_token_grad, told)


def check_sparse(backend, dtype, name, lists, tail, shaped, per_token_grad) -> None:
    student, teacher, temperature = sides(shaped, dtype)
    logprobs, ids = teacher.probs(temperature).log().topk(K)
    logprobs = logprobs.to(dtype).double()  # what was sent, of which the values are formed
    ids = LISTS[lists](ids)
    values, rest = [], []
    for s, entries, known in zip(student.probs(temperature), ids, logprobs, strict=True):
        kept = (entries >= 0) & (entries < V)
        s_K, t_K = s[entries[kept]], known[kept].exp()
        outside = 1 - t_K.sum()  # as a dense teacher that has this mass on one entry: `divergence_on` adds up the rest
        others = torch.tensor([v for v in range(V) if v not in entries[kept]])
        s_all = torch.cat([s_K, s[others].sum()[None]])
        t_all = torch.cat([t_K, outside[None]])
        rest.append((s_all.detach(), t_all))
        if tail == "bucket":
            value = divergence(name, s_all, t_all) if len(s_K) else 0 * s.sum()
        else:
            value = divergence_on(name, s_K, t_K, list(range(len(s_K))), tail) if len(s_K) else 0 * s.sum()
        values.append(value)
    told = {"teacher_topk": (ids, logprobs), "tail": tail}
    ours = check(backend, dtype, name, torch.stack(values), student, None, temperature, per_token_grad, told)
    # The metrics are those of the bucketed distribution whatever the tail
    for name in ("forward_kl", "reverse_kl"):
        truth = torch.stack([divergence(name, s, t) if len(s) > 1 else torch.zeros(()) for s, t in rest])
        assert_values(getattr(ours, name), truth, dtype)
    assert_values(ours.teacher_entropy, torch.stack([-(t * t.log()).sum() for _, t in rest]), dtype)


FLAGS = list(itertools.product([False, True], [False, True]))  # head's shape, per-token gradients
DENSE = list(itertools.product(SUPPORTS, TAILS, FLAGS))
SPARSE = list(itertools.product(LISTS, TAILS, FLAGS))
# Each combination with one divergence, each divergence with several
DENSE_SAMPLE = [(NAMES[7 * i % len(NAMES)], *case) for i, case in enumerate(DENSE)]
SPARSE_SAMPLE = [(NAMES[7 * i % len(NAMES)], *case) for i, case in enumerate(SPARSE)]


@pytest.mark.parametrize(("name", "support", "tail", "flags"), DENSE_SAMPLE)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_dense_teacher_on_a_support(backend, dtype, name, support, tail, flags):
    check_dense(backend, dtype, name, support, tail, *flags)


@pytest.mark.parametrize(("name", "lists", "tail", "flags"), SPARSE_SAMPLE)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_top_k_teacher(backend, dtype, name, lists, tail, flags):
    check_sparse(backend, dtype, name, lists, tail, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), [TRITON])
def test_every_divergence_on_every_support(backend, dtype, name):
    for support, tail, flags in DENSE:
        check_dense(backend, dtype, name, support, tail, *flags)
    for lists, tail, flags in SPARSE:
        check_sparse(backend, dtype, name, lists, tail, *flags)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_per_token_gradients_over_the_full_vocabulary(backend, dtype, shaped, name):
    student, teacher, temperature = sides(shaped, dtype)
    values = divergence(name, student.probs(temperature), teacher.probs(temperature))
    check(backend, dtype, name, values, student, teacher, temperature, True, {})


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_per_token_gradients_without_a_teacher(backend, dtype, shaped):
    student, _, temperature = sides(shaped, dtype)
    ours = check(backend, dtype, "reverse_kl", None, student, None, temperature, True, {})
    assert ours.divergence is None and ours.teacher_entropy is None
    logsumexp = student.logits(temperature).detach().logsumexp(-1)
    assert_values(ours.student_logsumexp, logsumexp, dtype)


UPSTREAMS = {
    "divergence": lambda d, lp, h: (d * d).sum(),
    "log-probs": lambda d, lp, h: (lp * LOGPROB_WEIGHTS.to(lp)).sum(),
    "entropy": lambda d, lp, h: (h * h * ENTROPY_WEIGHTS.to(h)).sum(),
}


@pytest.mark.parametrize("kind", ["full", "teacher_top_k", "top-k teacher"])
@pytest.mark.parametrize("which", UPSTREAMS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_one_of_the_values_alone_may_carry_the_gradient(backend, dtype, which, kind):
    student, teacher, temperature = sides(True, dtype)
    s, t = student.probs(temperature), teacher.probs(temperature)
    if kind == "full":
        value, told = divergence("generalized_jsd", s, t), {}
    else:
        ids, told = t.topk(K).indices, {"support": kind, "support_size": K}
        value = torch.stack(
            [divergence_on("generalized_jsd", a, b, i.tolist(), "bucket") for a, b, i in zip(s, t, ids, strict=True)]
        )
        if kind == "top-k teacher":
            told = {"teacher_topk": (ids, t.gather(-1, ids).log())}
    truth = UPSTREAMS[which](value, s[torch.arange(N), TARGETS].log(), -(s * s.log()).sum(-1))

    def loss(out):
        return UPSTREAMS[which](out.divergence, out.student_logprobs, out.student_entropy)

    ours = ask(
        backend, dtype, student, None if kind == "top-k teacher" else teacher, "generalized_jsd", loss=loss,
        per_token_grad=True, target_ids=TARGETS, temperature=temperature, **told,
    )  # fmt: skip
    assert_values(ours.loss, truth, dtype)
    assert_gradients(ours.gradients, torch.autograd.grad(truth, student.leaves), dtype, bound=5e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_overlap_with_a_top_k_teacher(backend, dtype, k):
    student, teacher, temperature = sides(True, dtype)
    logprobs, ids = teacher.probs(temperature).log().topk(K)
    order = torch.tensor([3, 0, 4, 1, 2])
    ours = ask(
        backend, dtype, student, None, teacher_topk=(ids[:, order], logprobs[:, order]),
        overlap_top_k=k, temperature=temperature,
    )  # fmt: skip
    tops = student.probs(temperature).topk(k).indices
    expected = [len({*a.tolist()} & {*b[:k].tolist()}) / k for a, b in zip(tops, ids, strict=True)]
    assert ours.overlap.tolist() == pytest.approx(expected)
    s, t = student.probs(temperature), teacher.probs(temperature)
    assert_values(ours.overlap_advantage, overlap_advantage(s, t, k), dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_dense_teacher_on_a_support_keeps_the_statistics_of_the_whole_vocabulary(backend, dtype):
    student, teacher, temperature = sides(True, dtype)
    ours = ask(
        backend, dtype, student, teacher, "todi", support="union_top_k", support_size=K,
        temperature=temperature, target_ids=TARGETS, overlap_top_k=4,
    )  # fmt: skip
    s, t = student.probs(temperature).detach(), teacher.probs(temperature)
    assert_values(ours.forward_kl, divergence("forward_kl", s, t), dtype)
    assert_values(ours.reverse_kl, divergence("reverse_kl", s, t), dtype)
    assert_values(ours.teacher_entropy, -(t * t.log()).sum(-1), dtype)
    assert_values(ours.teacher_logprobs, t[torch.arange(N), TARGETS].log(), dtype)
    assert_values(ours.teacher_logsumexp, teacher.logits(temperature).logsumexp(-1), dtype)
    common = [len({*a.topk(4)[1].tolist()} & {*b.topk(4)[1].tolist()}) / 4 for a, b in zip(s, t, strict=True)]
    assert ours.overlap.tolist() == pytest.approx(common)
    assert_values(ours.overlap_advantage, overlap_advantage(s, t, 4), dtype)


@pytest.mark.parametrize("size", [V, V + 4])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(("backend", "dtype"), [TRITON])
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence(backend, dtype, support, size):
    student, teacher, temperature = sides(False, FP32)
    for tail in TAILS:
        values = divergence("skew_reverse_kl", student.probs(), teacher.probs())
        told = {"support": support, "support_size": size, "tail": tail}
        check(backend, dtype, "skew_reverse_kl", values, student, teacher, temperature, False, told)
