"""`fused_linear_divergence` below float64: near a matched teacher, in bf16, and over large vocabularies."""

from contextlib import nullcontext

import pytest
import torch
from textbook import CASES, F_DIVERGENCES, Side, divergence, fused_arguments, make_sides

from trl_opd import fused_linear_divergence

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def nearly_matched(N: int = 64, V: int = 8192, H: int = 16, gap: float = 3e-4) -> tuple[Side, Side]:
    """A student and a teacher in float32 whose logits float32 represents, so that their product rounds nothing."""
    generator = torch.Generator().manual_seed(0)

    def multiples(bits: int, spread: float, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread * 2**bits).round() / 2**bits

    hidden, weight = multiples(3, 1.0, N, H), multiples(10, 0.4, V, H)
    teacher = Side(hidden, weight + multiples(14, gap, V, H))
    for side in (student := Side(hidden, weight), teacher):
        assert torch.equal(side.logits().double(), side.to(FP64).logits())
    return student, teacher


def run(name, sides, dtype, autocast=False, chunk_bytes=None, scale=1.0):
    """Value, and gradients of `scale` times the mean, of the fused op from operands of `dtype`."""
    student, teacher = sides[0].to(dtype, grad=True), sides[1].to(dtype)
    with torch.autocast("cpu", BF16) if autocast else nullcontext():
        out = fused_linear_divergence(
            **fused_arguments(student, teacher),
            divergence=name,
            divergence_kwargs=CASES[name][1],
            chunk_bytes=chunk_bytes,
        )
    assert out.divergence.dtype == out.loss.dtype == FP32
    gradients = torch.autograd.grad(out.loss * (scale / len(out.divergence)), student.leaves)
    assert all(g.dtype == dtype for g in gradients)
    return out.divergence, *gradients


def dense(name, sides, dtype, autocast=False):
    """The same by autograd through full logits, their softmax in `dtype`."""
    student, teacher = sides[0].to(dtype, grad=True), sides[1].to(dtype)
    with torch.autocast("cpu", BF16) if autocast else nullcontext():
        logits, teacher_logits = student.logits(), teacher.logits()
    values = divergence(name, logits.to(dtype).softmax(-1), teacher_logits.to(dtype).softmax(-1))
    return values.detach(), *torch.autograd.grad(values.mean(), student.leaves)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_logged_kl_near_a_matched_teacher_is_exact_in_float32(name):
    student, teacher = nearly_matched()
    truth = divergence(name, student.to(FP64).probs(), teacher.to(FP64).probs())
    assert 2e-7 < truth.min() < truth.max() < 5e-6
    out = fused_linear_divergence(**fused_arguments(student, teacher), divergence="total_variation")
    value = getattr(out, name).double()
    assert abs(value.mean() / truth.mean() - 1) < 1e-5
    assert ((value - truth) / truth).abs().max() < 1e-4
    # Which the textbook form in float32 is not
    textbook = divergence(name, student.probs(), teacher.probs()).double()
    assert ((textbook - truth) / truth).abs().max() > 1e-2


def test_a_nearly_matched_row_is_exact_among_rows_that_are_far_apart():
    student, teacher = nearly_matched(N=8)
    far = torch.arange(8) % 2 == 1
    teacher.hidden = torch.where(far[:, None], -teacher.hidden, teacher.hidden)
    out = fused_linear_divergence(**fused_arguments(student, teacher))
    for name in ("forward_kl", "reverse_kl"):
        truth = divergence(name, student.to(FP64).probs(), teacher.to(FP64).probs())
        assert truth[far].min() > 0.5 and truth[~far].max() < 5e-6
        assert ((getattr(out, name) - truth) / truth).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize("support", ["teacher_top_k", "student_top_k"])
def test_a_bucketed_divergence_near_a_matched_teacher_is_exact_in_float32(support, name):
    student, teacher = nearly_matched()
    s, t = student.to(FP64).probs(), teacher.to(FP64).probs()
    ids = (s if support == "student_top_k" else t).topk(64).indices
    bucketed = [torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(-1, keepdim=True)], dim=-1) for x in (s, t)]
    truth = divergence(name, *bucketed)
    out = fused_linear_divergence(
        **fused_arguments(student, teacher),
        divergence=name,
        divergence_kwargs=CASES[name][1],
        support=support,
        support_size=64,
    )
    assert abs(out.divergence.double().mean() / truth.mean() - 1) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_every_divergence_near_a_matched_teacher_is_exact_in_float32(name):
    student, teacher = nearly_matched()
    truth = divergence(name, student.to(FP64).probs(), teacher.to(FP64).probs())
    out = fused_linear_divergence(
        **fused_arguments(student, teacher), divergence=name, divergence_kwargs=CASES[name][1]
    )
    assert ((out.divergence - truth) / truth).abs().max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_gradients_near_a_matched_teacher_are_those_of_float32_autograd(name):
    """A row's log-ratios share the rounding of its two normalisers; it must not reach the gradient."""
    sides = nearly_matched()
    truth, ours, reference = dense(name, sides, FP64), run(name, sides, FP32), dense(name, sides, FP32)
    for a, b, c in zip(truth[1:], ours[1:], reference[1:], strict=True):
        assert (b - a).norm() < 5e-3 * a.norm()
        if name in F_DIVERGENCES:
            assert (b - a).norm() <= 1.5 * (c - a).norm()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_no_kl_is_ever_negative_in_float32(name):
    for V, spread, gap in [(V, s, 10.0**-e) for V in (7, 1000) for s in (0.3, 1.0, 12.0) for e in range(2, 9)]:
        generator = torch.Generator().manual_seed(V)
        logits = spread * torch.randn(64, V, generator=generator)
        teacher_logits = logits + gap * torch.randn(64, V, generator=generator)
        out = fused_linear_divergence(logits, torch.eye(V), teacher_logits, torch.eye(V), divergence=name)
        for value in (out.divergence, out.forward_kl, out.reverse_kl):
            assert value.min() >= 0, (V, spread, gap)


@pytest.mark.parametrize("name", CASES)
def test_extreme_logits_give_finite_values_and_gradients(name):
    """In float32, where e^-104 is 0."""
    student, teacher = (Side(30 * side.hidden.detach(), side.weight.detach()) for side in make_sides(bias=False))
    truth = divergence(name, student.probs(), teacher.probs())
    assert torch.isfinite(truth).all() and (student.to(FP32).probs() == 0).any()
    single = student.to(FP32, grad=True)
    out = fused_linear_divergence(
        **fused_arguments(single, teacher.to(FP32)), divergence=name, divergence_kwargs=CASES[name][1]
    )
    torch.testing.assert_close(out.divergence.double(), truth, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.loss, single.leaves))


def bf16_sides(matched: bool) -> list[Side]:
    """Both models in float64, every number one that bf16 represents."""
    student, teacher = make_sides(N=48, V=1500, H=(24, 24), bias=False)
    if matched:
        generator = torch.Generator().manual_seed(1)
        noise = 0.03 * torch.randn(teacher.weight.shape, generator=generator, dtype=FP64)
        teacher = Side(student.hidden.detach(), student.weight.detach() + noise)
    return [Side(*(x.detach().to(BF16).double() for x in side.leaves)) for side in (student, teacher)]


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_under_bf16_autocast_the_divergence_keeps_float32_accuracy(name, matched):
    """The logits and all sums are float32; the products of bf16 operands are exact in it."""
    sides = bf16_sides(matched)
    truth, ours = dense(name, sides, FP64), run(name, sides, FP32, autocast=True)
    reference = dense(name, sides, FP32, autocast=True)
    for a, b, c in zip(truth, ours, reference, strict=True):
        assert (b - a).norm() < 2e-5 * a.norm()
        assert (b - a).norm() <= 1.5 * (c - a).norm()


@pytest.mark.parametrize("name", CASES)
def test_a_bf16_model_loses_no_more_than_the_rounding_of_its_gradient(name):
    sides = bf16_sides(matched=True)
    truth = dense(name, sides, FP64)
    for chunk_bytes in (None, 1500 * 4 * 2 * 5):  # one chunk, and chunks of 5 rows
        ours = run(name, sides, BF16, chunk_bytes=chunk_bytes, scale=0.7)
        for a, b in zip(truth[1:], ours[1:], strict=True):
            assert (b.double() - 0.7 * a).norm() <= 1.5 * ((0.7 * a).to(BF16).double() - 0.7 * a).norm()


def test_autocast_rounds_the_operands_as_the_model_own_head_would():
    student, teacher = (side.to(FP32) for side in make_sides(V=40, bias=False))
    with torch.autocast("cpu", BF16):
        ours = fused_linear_divergence(**fused_arguments(student, teacher))
    rounded = [Side(*(x.to(BF16).double() for x in side.leaves)) for side in (student, teacher)]
    truth = divergence("reverse_kl", rounded[0].probs(), rounded[1].probs())
    torch.testing.assert_close(ours.divergence.double(), truth, rtol=1e-5, atol=1e-6)
    unrounded = divergence("reverse_kl", student.to(FP64).probs(), teacher.to(FP64).probs())
    assert ((unrounded - truth).abs() > 1e-3).any()


@pytest.mark.parametrize("student_dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("teacher_dtype", [FP64, FP32, BF16])
def test_student_and_teacher_may_differ_in_dtype(student_dtype, teacher_dtype):
    student, teacher = make_sides(V=40)
    student, teacher = student.to(student_dtype, grad=True), teacher.to(teacher_dtype)
    truth = divergence("reverse_kl", student.to(FP64).probs(), teacher.to(FP64).probs())
    out = fused_linear_divergence(**fused_arguments(student, teacher))
    torch.testing.assert_close(out.divergence.double(), truth, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert student.weight.grad.dtype == student_dtype


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_the_chunk_size_changes_nothing_over_a_large_vocabulary(dtype):
    """So large that a chunk is worked through by several blocks of rows."""
    results, (N, V) = [], (9, 70_000)
    for rows in (1, 4, N):
        student, teacher = (side.to(dtype, grad=True) for side in make_sides(N=N, V=V, H=(3, 3)))
        out = fused_linear_divergence(**fused_arguments(student, teacher), chunk_bytes=rows * 2 * V * dtype.itemsize)
        results.append([out.divergence, *torch.autograd.grad(out.loss / N, student.leaves)])
    truth = divergence("reverse_kl", student.to(FP64).probs(), teacher.to(FP64).probs())
    torch.testing.assert_close(results[0][0].double(), truth, rtol=1e-5 if dtype == FP32 else 1e-10, atol=0)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() <= (1e-6 if dtype == FP32 else 1e-12)
