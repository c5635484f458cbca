"""Every divergence by every backend against the textbook in float64: heads, weights, sizes, statistics."""

import itertools
from dataclasses import replace

import pytest
import torch
from backends import (
    BACKENDS,
    FP32,
    FP64,
    SINGLE,
    STATISTICS,
    TRITON,
    V,
    ask,
    assert_gradients,
    assert_values,
    pair,
    represented,
    rows_of,
    served,
    triton_backend,
    truth_of,
)
from textbook import CASES, divergence, make_sides, overlap_advantage

pytestmark = pytest.mark.usefixtures("short_blocks")
NAMES = list(CASES)
WEIGHTS = torch.tensor([-0.5, 2.0], dtype=FP64)


def settings(case: str, dtype: torch.dtype) -> tuple:
    """Student, teacher, and what else the op is told."""
    student, teacher = pair(2, 21, dtype, bias=case not in ("plain", "frozen head", "scales", "no bias but softcaps"))
    if case == "all":
        student, teacher = replace(student, scale=1.3, softcap=5.0), replace(teacher, scale=0.8, softcap=4.0)
        return student, teacher, {"token_weights": WEIGHTS, "temperature": 0.7}
    if case == "a student's softcap and bias":
        return replace(student, softcap=3.0), replace(teacher, bias=None), {}
    if case == "a teacher's softcap and bias":
        return replace(student, bias=None, scale=0.9), replace(teacher, softcap=3.0), {"temperature": 1.7}
    if case == "no bias but softcaps":
        return replace(student, softcap=3.0), replace(teacher, softcap=4.0, scale=2.0), {"token_weights": WEIGHTS}
    return student, teacher, {
        "scales": {"temperature": 0.8, "student_logit_scale": 1.5, "teacher_logit_scale": 0.6},
        "bias and weights": {"token_weights": WEIGHTS},
    }.get(case, {})  # fmt: skip


HEADS = [
    "plain",
    "frozen head",
    "bias and weights",
    "scales",
    "a student's softcap and bias",
    "a teacher's softcap and bias",
    "no bias but softcaps",
    "all",
]


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_value_and_gradients_of_every_head(backend, dtype, name, case):
    student, teacher, told = settings(case, dtype)
    scales = [told.pop(f"{model}_logit_scale", None) for model in ("student", "teacher")]
    student, teacher = (
        x if scale is None else replace(x, scale=scale) for x, scale in zip((student, teacher), scales, strict=True)
    )
    frozen = case == "frozen head"
    ours = ask(backend, dtype, student, teacher, name, frozen=frozen, **told)
    value, gradients = truth_of(
        student, teacher, name, told.get("temperature", 1.0), told.get("token_weights"), frozen=frozen
    )
    assert_values(ours.divergence, value, dtype)
    weights = told.get("token_weights", torch.ones(2, dtype=FP64))
    assert_values(ours.loss, (value * weights).sum(), dtype)
    assert_gradients(ours.gradients, gradients, dtype)


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 32, 33])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_vocabularies_around_the_size_of_a_block(backend, dtype, size):
    for i, name in enumerate(served(backend)):
        student, teacher = pair(2, size, dtype, seed=i)
        ours = ask(backend, dtype, student, teacher, name)
        value, gradients = truth_of(student, teacher, name)
        assert_values(ours.divergence, value, dtype)
        assert_gradients(ours.gradients, gradients, dtype, bound=1e-5)  # of two entries those of the rows cancel


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_one_vocabulary_entry_has_nothing_to_tell(backend, dtype):
    student, teacher = pair(2, 1, dtype)
    for name in served(backend):
        ours = ask(backend, dtype, student, teacher, name, overlap_top_k=3, target_ids=torch.zeros(2).long())
        assert (ours.divergence == 0).all() and all((g == 0).all() for g in ours.gradients)
        assert (ours.student_logprobs == 0).all() and (ours.teacher_entropy == 0).all() and (ours.overlap == 1).all()


@pytest.mark.parametrize("chunk_rows", [1, 2, 5])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_rows_find_their_own_weights_targets_and_statistics_in_every_chunk(backend, dtype, chunk_rows):
    student, teacher = pair(5)
    weights, targets = torch.tensor([0.1, -1.0, 3.0, 0.7, 2.0], dtype=FP64), torch.tensor([0, 36, 15, 16, 5])
    ours = ask(
        backend,
        dtype,
        student,
        teacher,
        token_weights=weights,
        target_ids=targets,
        chunk_bytes=chunk_rows * 2 * V * 4,
    )
    value, gradients = truth_of(student, teacher, "reverse_kl", weights=weights)
    assert_values(ours.divergence, value, dtype)
    assert_gradients(ours.gradients, gradients, dtype)
    for side, logprobs in ((student, ours.student_logprobs), (teacher, ours.teacher_logprobs)):
        assert_values(logprobs, side.probs().log()[torch.arange(5), targets].detach(), dtype)


@pytest.mark.parametrize("how", ["one token", "one of three", "no tokens", "all masked"])
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_few_rows_or_none(backend, dtype, per_token_grad, how):
    student, teacher = pair({"one token": 1, "no tokens": 0}.get(how, 3), 21, dtype)
    mask = {"one of three": torch.tensor([False, True, False]), "all masked": torch.zeros(3).bool()}.get(how)
    kept = torch.ones(len(student.hidden)).bool() if mask is None else mask
    for name in NAMES[1:4] if per_token_grad else served(backend):
        ours = ask(backend, dtype, student, teacher, name, mask=mask, per_token_grad=per_token_grad)
        value, gradients = truth_of(student, teacher, name, weights=kept.double())
        assert_values(ours.divergence, value * kept, dtype)
        assert_gradients(ours.gradients, gradients, dtype)
        assert (ours.gradients[0][~kept] == 0).all() and (ours.student_entropy[~kept] == 0).all()


@pytest.mark.parametrize("targets", [[0, 15, 36], [16, 32, 1]])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_statistics_equal_the_dense_ones(backend, dtype, temperature, targets):
    student, teacher = pair(dtype=dtype, seed=3)
    student, teacher = replace(student, scale=1.1), replace(teacher, softcap=4.0)
    target_ids = torch.tensor(targets)
    ours = ask(
        backend, dtype, student, teacher, "total_variation",
        temperature=temperature, target_ids=target_ids, overlap_top_k=12,
    )  # fmt: skip
    s, t = student.probs(temperature).detach(), teacher.probs(temperature)
    rows = torch.arange(3)
    common = [len({*a.tolist()} & {*b.tolist()}) / 12 for a, b in zip(s.topk(12)[1], t.topk(12)[1], strict=True)]
    assert len(set(common)) > 1
    truth = {
        "forward_kl": divergence("forward_kl", s, t),
        "reverse_kl": divergence("reverse_kl", s, t),
        "student_entropy": -(s * s.log()).sum(-1),
        "teacher_entropy": -(t * t.log()).sum(-1),
        "student_logprobs": s[rows, target_ids].log(),
        "teacher_logprobs": t[rows, target_ids].log(),
        "overlap": torch.tensor(common, dtype=FP64),
        "student_logsumexp": student.logits(temperature).detach().logsumexp(-1),
        "teacher_logsumexp": teacher.logits(temperature).logsumexp(-1),
        "overlap_advantage": overlap_advantage(s, t, 12),
    }
    assert truth.keys() == set(STATISTICS)
    for name, value in truth.items():
        assert_values(getattr(ours, name), value, dtype)


def overlap(backend, dtype, student_logits, teacher_logits, k):
    return ask(backend, dtype, *rows_of(student_logits, teacher_logits), overlap_top_k=k).overlap.tolist()


@pytest.mark.parametrize("k", [1, 2, 5, 16, 17, 36, 37, 60])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_overlap_of_top_sets_of_every_size(backend, dtype, k):
    """Rows of positive, of negative and of mixed logits: integers in an order of their own, so there are no ties."""
    generator = torch.Generator().manual_seed(k)
    offsets = torch.tensor([1.0, -100.0, -18.0])[:, None]
    logits = [torch.stack([torch.randperm(V, generator=generator) for _ in range(3)]) + offsets for _ in range(2)]
    size = min(k, V)
    tops = [[{*row.topk(size)[1].tolist()} for row in x] for x in logits]
    expected = [len(a & b) / size for a, b in zip(*tops, strict=True)]
    assert overlap(backend, dtype, *logits, k) == pytest.approx(expected)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_overlap_where_the_largest_entries_share_a_lane_of_the_blocks(backend, dtype):
    logits = torch.arange(V).double().neg().repeat(2, 1)
    logits[0, [3, 19, 35]] = torch.tensor([50.0, 51.0, 52.0], dtype=FP64)
    logits[1, [3, 19, 4]] = torch.tensor([60.0, 61.0, 62.0], dtype=FP64)
    for k, common in ((1, 0), (2, 1), (3, 2), (4, 3)):  # of four, 0 too
        assert overlap(backend, dtype, logits[:1], logits[1:], k) == pytest.approx([common / k])


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_tie_at_the_end_of_the_student_top_set_counts_as_in_it(backend, dtype):
    student, teacher = torch.zeros(2, V), torch.arange(V).repeat(2, 1)
    student[0, [1, 20, 36]] = torch.tensor([3.0, 2.0, 2.0])  # of two, the second is 20 or 36
    assert overlap(backend, dtype, student, teacher, 2) == [0.5, 1.0]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_all_equal_logits_overlap_fully_and_no_more(backend, dtype):
    assert overlap(backend, dtype, torch.zeros(1, V), torch.zeros(1, V), 5) == [1.0]


PARAMETERS = [
    ("generalized_jsd", {"beta": 0.9}),
    ("generalized_jsd", {"beta": 0.5}),
    ("skew_forward_kl", {"skew": 0.7}),
    ("skew_reverse_kl", {"skew": 0.9}),
    ("alpha_divergence", {"alpha": -0.5}),
    ("alpha_divergence", {"alpha": 2.0}),
    ("alpha_beta_divergence", {"alpha": 0.8, "beta": -0.3}),
    ("alpha_beta_divergence", {"alpha": -0.4, "beta": -0.3}),
    ("alpha_beta_divergence", {"alpha": 1.5, "beta": 0.5}),
    ("todi", {"scale": 0.0}),
    ("todi", {"scale": 4.0}),
    ("adaptive_kl", {"head_mass": 0.05}),
    ("adaptive_kl", {"head_mass": 0.95}),
    ("skew_reverse_kl", {"skew": 0.3, "detached": 1}),
    ("skew_reverse_kl", {"skew": 0.9, "detached": 1}),
    *(
        ("concrete_score", {"first": first, "second": second})
        for first, second in itertools.combinations_with_replacement(("student", "teacher", "uniform"), 2)
    ),
    ("concrete_score", {"first": "uniform", "second": "student"}),
    ("entropy_gated_kl", {"threshold": -1.0, "coef": 1.0}),
    ("entropy_gated_kl", {"threshold": 2.7, "coef": 0.4}),
    ("entropy_gated_kl", {"threshold": 5.0, "coef": 0.4}),
    (
        "convex_mix",
        {"total_variation": 0.5, "concrete_score": {"weight": 0.5, "first": "student", "second": "uniform"}},
    ),
]


@pytest.mark.parametrize(("name", "params"), PARAMETERS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_other_parameters(backend, dtype, name, params):
    student, teacher = pair(dtype=dtype)
    ours = ask(backend, dtype, student, teacher, name, divergence_kwargs=params)
    value = CASES[name][0](student.probs(), teacher.probs(), **params)
    assert_values(ours.divergence, value.detach(), dtype)
    bound = 1e-5 if params.get("beta", 1) < 0 or params.get("alpha", 1) < 0 else 3e-6  # powers of 1/s and of 1/t
    assert_gradients(ours.gradients, torch.autograd.grad(value.sum(), student.leaves), dtype, bound)


@pytest.mark.parametrize("head_mass", [0.1, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_an_adaptive_head_that_ends_among_equal_entries_takes_the_first_of_them(backend, dtype, head_mass):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, V, generator=generator)
    teacher = torch.randint(0, 3, (3, V), generator=generator)
    teacher[2] = 0
    sides = represented(rows_of(student, teacher), dtype)
    value = CASES["adaptive_kl"][0](sides[0].probs(), sides[1].probs(), head_mass)
    ours = ask(backend, dtype, *sides, "adaptive_kl", divergence_kwargs={"head_mass": head_mass})
    assert_values(ours.divergence, value.detach(), dtype)
    assert_gradients(ours.gradients, torch.autograd.grad(value.sum(), sides[0].leaves), dtype)


@pytest.mark.parametrize("case", ["plain", "frozen head", "bias, temperature, equal weights", "one token"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_what_liger_can_do(name, case):
    pytest.importorskip("liger_kernel.chunked_loss")
    student, teacher = pair(1 if case == "one token" else 3, bias="bias" in case)
    told = {"token_weights": torch.full((3,), 0.7), "temperature": 0.6} if "bias" in case else {}
    frozen = case == "frozen head"
    ours = ask("liger", FP32, student, teacher, name, frozen=frozen, **told)
    value, gradients = truth_of(student, teacher, name, told.get("temperature", 1.0), frozen=frozen)
    factor = 0.7 if "bias" in case else 1.0
    torch.testing.assert_close(ours.loss, factor * value.sum(), rtol=1e-5, atol=0)
    assert_gradients(ours.gradients, [factor * g for g in gradients], FP32)


@pytest.mark.parametrize(("backend", "dtype"), [TRITON])
def test_a_longer_vocabulary_in_blocks_of_the_usual_size(backend, dtype, monkeypatch):
    monkeypatch.setattr(triton_backend, "MAX_BLOCK", 2048)
    student, teacher = represented(make_sides(2, 5003, H=(4, 4)), FP32)
    for name in ("reverse_kl", "generalized_jsd", "adaptive_kl"):
        ours = ask(backend, dtype, student, teacher, name)
        value, gradients = truth_of(student, teacher, name)
        assert_values(ours.divergence, value, dtype)
        assert_gradients(ours.gradients, gradients, dtype)
