"""Infinite, far-apart, huge and undefined logits by every backend against the textbook."""

import math
from dataclasses import replace

import pytest
import torch
from backends import (
    BACKENDS,
    FP32,
    FP64,
    SINGLE,
    V,
    ask,
    assert_gradients,
    assert_values,
    one_row,
    pair,
    represented,
    rows_of,
    served,
    truth_of,
)
from textbook import CASES, INFINITE, Side

pytestmark = pytest.mark.usefixtures("short_blocks")
NAMES = list(CASES)
GONE = [0, 15, 20, 36]  # of the first block, its last, of the second, of the last
BLOCK_GONE = [*range(16), 20]  # all of the first block


def logits(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(1.5 * torch.randn(V, generator=generator, dtype=FP64)).to(dtype).double() for _ in range(2)]


def without(lacking: str, value: float, dtype: torch.dtype, gone=GONE) -> list[Side]:
    """One row in which `lacking` ("student", "teacher", "both") has logits of `value` at the entries `gone`."""
    student, teacher = logits(dtype)
    if lacking != "teacher":
        student[gone] = value
    if lacking != "student":
        teacher[gone] = value
    return one_row(student, teacher)


def of_logits(gradients) -> list[torch.Tensor]:
    """The head's gradient of one row with hidden state 1; that of the hidden state holds 0 · ∞."""
    return [gradients[1]]


@pytest.mark.parametrize("gone", [GONE, BLOCK_GONE], ids=["here and there", "a block"])
@pytest.mark.parametrize("lacking", ["teacher", "student", "both"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_logits_of_minus_infinity(backend, dtype, name, lacking, gone):
    """Value and gradient are the limits of small probabilities; where the value's is infinite it is and not NaN."""
    sides = without(lacking, -math.inf, dtype, gone)
    ours = ask(backend, dtype, *sides, name, target_ids=torch.tensor([17]), overlap_top_k=3)
    student, teacher = without(lacking, -300.0, dtype, gone)  # e^-600 is a normal number in float64
    student = student.to(FP64, grad=True)
    value, gradients = truth_of(student, teacher, name)
    if name in INFINITE.get(lacking, ()):
        assert ours.divergence.item() == ours.loss.item() == math.inf
        assert not of_logits(ours.gradients)[0].isnan().any()
    else:
        assert_values(ours.divergence, value, dtype)
        assert_gradients(of_logits(ours.gradients), of_logits(gradients), dtype)
    s, t = student.probs().detach(), teacher.probs()
    assert_values(ours.student_entropy, -(s * s.log()).sum(-1), dtype)
    assert_values(ours.teacher_entropy, -(t * t.log()).sum(-1), dtype)
    assert_values(ours.student_logprobs, s[:, 17].log(), dtype)
    assert (ours.reverse_kl.item() == math.inf) == (lacking == "teacher")
    assert (ours.forward_kl.item() == math.inf) == (lacking == "student")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", ["reverse_kl", "generalized_jsd", "adaptive_kl"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_bias_of_minus_infinity_before_temperature_and_softcap(backend, dtype, name, softcap):
    """As models mask entries that they must not say; under a softcap those are just very unlikely."""
    answers = []
    for value in (-math.inf, -150.0):
        sides = [replace(side, softcap=softcap) for side in pair(2, dtype=dtype)]
        for side in sides:
            side.bias = side.bias.detach().index_fill(0, torch.tensor(GONE), value).requires_grad_()
        if value == -math.inf:
            answers.append(ask(backend, dtype, *sides, name, temperature=0.5))
    value, gradients = truth_of(*sides, name, temperature=0.5)
    assert_values(answers[0].divergence, value, dtype)
    assert_gradients(answers[0].gradients, gradients, dtype, bound=5e-6)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_sampled_token_without_probability_has_a_log_prob_of_minus_infinity_or_very_low(backend, dtype):
    ours = ask(backend, dtype, *without("both", -math.inf, dtype), target_ids=torch.tensor([GONE[0]]))
    assert ours.student_logprobs.item() < -1e29 and ours.teacher_logprobs.item() < -1e29


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_probabilities_that_underflow(backend, dtype, name):
    """Log-probs of -95, -200 and -300 in one model and not in the other: 0 in float32, or less than `tiny`."""
    student, teacher = (x.repeat(3, 1) for x in logits(dtype))
    for row, depth in enumerate((95.0, 200.0, 300.0)):
        student[row, [1, 17, 30]] = -depth
        teacher[row, [2, 17, 36]] = -depth
    sides = rows_of(student, teacher)
    sides[0] = sides[0].to(FP64, grad=True)
    value, gradients = truth_of(*sides, name)
    ours = ask(backend, dtype, *sides, name)
    assert_values(ours.divergence, value, dtype)
    assert_gradients(ours.gradients, gradients, dtype, bound=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_distributions_that_have_nothing_in_common(backend, dtype, name):
    """Each model is sure of a token that the other gives e^-200."""
    student, teacher = torch.full((2, 1, V), -100.0, dtype=FP64)
    student[0, 3], teacher[0, 35] = 100.0, 100.0
    sides = [x.to(FP64, grad=True) for x in rows_of(student, teacher)]
    value, gradients = truth_of(*sides, name)
    ours = ask(backend, dtype, *sides, name)
    assert_values(ours.divergence, value, dtype)
    for a, b in zip(ours.gradients, gradients, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, b.abs().max())


@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_todi_weights_by_log_ratios_of_any_size(backend, dtype, scale):
    """σ of ±200 times a small scale is neither 0 nor 1."""
    student, teacher = torch.zeros(2, 1, V, dtype=FP64)
    student[0, 3], teacher[0, 3], teacher[0, 35] = 200.0, 5.0, 205.0
    sides = [x.to(FP64, grad=True) for x in rows_of(student, teacher)]
    value = CASES["todi"][0](sides[0].probs(), sides[1].probs(), scale)
    ours = ask(backend, dtype, *sides, "todi", divergence_kwargs={"scale": scale})
    assert_values(ours.divergence, value.detach(), dtype)
    assert_gradients(ours.gradients, torch.autograd.grad(value.sum(), sides[0].leaves), dtype, bound=1e-5)


@pytest.mark.parametrize("offsets", [(4096, 4096), (-4096, -4096), (16, -16)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_what_a_row_s_logits_have_in_common_costs_no_precision(backend, dtype, offsets):
    """Multiples of 1/256, so that float32 represents them with the offset too."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, V, generator=generator, dtype=FP64) * 256).round() / 256
    target_ids = torch.tensor([0, 5, 36])
    plain = ask(backend, dtype, *rows_of(student, teacher), target_ids=target_ids)
    sides = rows_of(student + offsets[0], teacher + offsets[1])
    shifted = ask(backend, dtype, *sides, target_ids=target_ids)
    bounds = {"rtol": 1e-6, "atol": 3e-6 if offsets[0] != offsets[1] else 1e-6}
    for name in ("divergence", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "student_logprobs"):
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name), **bounds)
    torch.testing.assert_close(shifted.student_logsumexp, plain.student_logsumexp + offsets[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(shifted.gradients[1], plain.gradients[1], **bounds)


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("place", [0, 20, 36])
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_an_undefined_logit_is_not_hidden(backend, dtype, whose, place, per_token_grad):
    for name in served(backend) if place == 20 and not per_token_grad else NAMES[:6]:
        student, teacher = logits(dtype)
        (student if whose == "student" else teacher)[place] = math.nan
        ours = ask(backend, dtype, *one_row(student, teacher), name, per_token_grad=per_token_grad)
        for value in (ours.loss, ours.divergence, ours.forward_kl, ours.reverse_kl):
            assert value.isnan().all(), name
        assert (ours.student_entropy if whose == "student" else ours.teacher_entropy).isnan().all()
        assert all(g.isnan().all() for g in ours.gradients), name


@pytest.mark.parametrize("kind", ["teacher_top_k", "student_top_k", "union_top_k", "top-k teacher"])
@pytest.mark.parametrize("tail", ["bucket", "none"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_an_undefined_logit_is_not_hidden_by_a_support(backend, dtype, tail, kind):
    student, teacher = logits(dtype)
    values, ids = teacher.log_softmax(-1).topk(4)
    student[20] = math.nan
    sides, told = one_row(student, teacher), {"support": kind, "support_size": 4}
    if kind == "top-k teacher":
        sides, told = [sides[0], None], {"teacher_topk": (ids[None], values[None])}
    ours = ask(backend, dtype, *sides, tail=tail, **told)
    assert ours.loss.isnan() and ours.divergence.isnan().all()
    assert all(g.isnan().all() for g in ours.gradients)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy, which interprets the maximum of a block
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_an_undefined_row_leaves_the_others_alone(backend, dtype):
    student, teacher = represented([Side(torch.randn(3, 4), torch.randn(V, 4)) for _ in range(2)], FP32)
    value, gradients = truth_of(student, teacher, "generalized_jsd")
    broken = student.to(FP64)
    broken.hidden[1] = math.nan
    ours = ask(backend, dtype, broken, teacher, "generalized_jsd", frozen=True)
    assert_values(ours.divergence[[0, 2]], value[[0, 2]], dtype)
    assert_gradients([ours.gradients[0][[0, 2]]], [gradients[0][[0, 2]]], dtype)
    assert ours.divergence[1].isnan() and ours.gradients[0][1].isnan().all()


@pytest.mark.parametrize("kind", ["teacher_top_k", "union_top_k", "top-k teacher"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_logits_of_minus_infinity_outside_and_on_a_support(backend, dtype, kind):
    """The student lacks an entry of the support (a large one of the teacher's) and one outside it."""
    student, teacher = logits(dtype)
    order = teacher.argsort(descending=True)
    told, results = {"support": kind, "support_size": 4}, []
    for value in (-math.inf, -600.0):
        student[order[[1, 30]]] = value
        sides = one_row(student, teacher)
        if kind == "top-k teacher":
            told = {"teacher_topk": (order[None, :4], teacher.log_softmax(-1)[order[:4]][None])}
        where = (backend, dtype) if value == -math.inf else ("torch", FP64)
        results.append(ask(*where, sides[0], None if kind == "top-k teacher" else sides[1], "generalized_jsd", **told))
    ours, truth = results
    assert_values(ours.divergence, truth.divergence, dtype)
    assert_gradients(of_logits(ours.gradients), of_logits(truth.gradients), dtype)
