"""Which rows and which vocabulary entries `fused_linear_divergence` touches, and what it multiplies."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from textbook import CASES, CountGemms, Side, divergence, fused_arguments, make_sides
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_opd import fused_linear_divergence

NAMES = list(CASES)
N, V, K = 11, 23, 4
MASK = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)


def top_k(teacher: Side, size: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    probs, ids = teacher.probs().topk(size)
    return ids, probs.log()


def without_dense_teacher(student: Side) -> dict:
    arguments = fused_arguments(student, student)
    return {key: value for key, value in arguments.items() if not key.startswith("teacher")}


@pytest.mark.parametrize("how", ["mask", "zero weights", "both"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_masked_rows_are_never_projected(name, poison, how):
    """They are poisoned: one of them in a product or a sum would show everywhere."""
    student, teacher = make_sides(N, V)
    hidden, teacher_hidden = student.hidden.detach().clone(), teacher.hidden.clone()
    hidden[~MASK], teacher_hidden[~MASK] = poison, poison
    poisoned = replace(student, hidden=hidden.requires_grad_())
    target_ids = torch.arange(N).masked_fill(~MASK, -100)
    choice = {"mask": MASK} if how != "zero weights" else {}
    weights = torch.linspace(0.5, 2, N).double()
    out = fused_linear_divergence(
        **fused_arguments(poisoned, replace(teacher, hidden=teacher_hidden)),
        **choice,
        divergence=name,
        divergence_kwargs=CASES[name][1],
        token_weights=None if how == "mask" else weights * MASK,
        target_ids=target_ids,
        overlap_top_k=3,
    )
    truth = divergence(name, student.probs()[MASK], teacher.probs()[MASK])
    loss = truth.sum() if how == "mask" else (truth * weights[MASK]).sum()
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    assert torch.equal(out.rows, MASK)
    for value in vars(out).values():
        if isinstance(value, torch.Tensor) and value.shape == (N,) and value.dtype.is_floating_point:
            assert (value[~MASK] == 0).all() and torch.isfinite(value[MASK]).all()

    expected = torch.autograd.grad(loss, student.leaves)
    actual = torch.autograd.grad(out.loss, poisoned.leaves)
    assert (actual[0][~MASK] == 0).all()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_masked_row_of_a_top_k_teacher_is_never_read():
    student, teacher = make_sides(N, V)
    ids, logprobs = top_k(teacher)
    clean = fused_linear_divergence(**without_dense_teacher(student), teacher_topk=(ids, logprobs), mask=MASK)
    ids[~MASK], logprobs[~MASK] = 10**9, float("nan")
    out = fused_linear_divergence(**without_dense_teacher(student), teacher_topk=(ids, logprobs), mask=MASK)
    assert torch.equal(out.loss, clean.loss) and torch.isfinite(out.loss)


def test_a_row_of_weight_zero_inside_the_mask_is_measured_but_not_trained():
    student, teacher = make_sides(N, V)
    weights = torch.ones(N, dtype=torch.float64)
    weights[2] = 0.0
    out = fused_linear_divergence(**fused_arguments(student, teacher), mask=MASK, token_weights=weights)
    assert out.divergence[2] > 0 and out.divergence[1] == 0
    (gradient,) = torch.autograd.grad(out.loss, student.hidden)
    assert (gradient[2] == 0).all() and (gradient[3] != 0).any()


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("rows", ["no tokens", "all masked"])
@pytest.mark.parametrize("teacher_kind", ["dense", "top-k"])
def test_nothing_to_train_on_is_a_differentiable_zero(teacher_kind, rows, per_token_grad):
    student, teacher = make_sides(0 if rows == "no tokens" else N, V)
    arguments = fused_arguments(student, teacher)
    if teacher_kind == "top-k":
        arguments = without_dense_teacher(student) | {"teacher_topk": top_k(teacher)}
    if rows == "all masked":
        arguments["mask"] = torch.zeros(N, dtype=torch.bool)
    out = fused_linear_divergence(**arguments, per_token_grad=per_token_grad)
    assert out.loss == 0 and out.loss.shape == ()
    for leaf, gradient in zip(student.leaves, torch.autograd.grad(out.loss, student.leaves), strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()


@pytest.mark.parametrize("sizes", [(23, 31), (31, 23), (29, 29)], ids=["teacher padded", "student padded", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_only_shared_entries_are_compared_and_the_others_are_never_read(name, sizes):
    student, teacher = (side.to(torch.float64) for side in make_sides(N, 31))
    for side, size in zip((student, teacher), sizes, strict=True):
        side.weight, side.bias = side.weight[:size].clone(), side.bias[:size].clone()
        side.weight[23:], side.bias[23:] = float("nan"), float("nan")
    student = student.to(torch.float64, grad=True)
    out = fused_linear_divergence(
        **fused_arguments(student, teacher),
        divergence=name,
        divergence_kwargs=CASES[name][1],
        vocab_size=23 if sizes[0] == sizes[1] else None,
        overlap_top_k=3,
    )
    shared = [replace(side, weight=side.weight[:23], bias=side.bias[:23]) for side in (student, teacher)]
    truth = divergence(name, shared[0].probs(), shared[1].probs())
    torch.testing.assert_close(out.divergence, truth.detach(), rtol=1e-10, atol=1e-12)
    actual = torch.autograd.grad(out.loss, student.leaves)
    for ours, theirs in zip(actual, torch.autograd.grad(truth.sum(), student.leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert (actual[1][23:] == 0).all() and (actual[2][23:] == 0).all()


def count(teacher_kind, frozen=False, grad=True, rows=None, per_token_grad=False, name="reverse_kl"):
    """Products of the forward and of the backward pass; both models have H hidden units."""
    student, teacher = make_sides(N, V, H=(8, 8))
    student.weight.requires_grad_(not frozen)
    student.bias.requires_grad_(not frozen)
    arguments = fused_arguments(student, teacher)
    if teacher_kind == "top-k":
        arguments = without_dense_teacher(student) | {"teacher_topk": top_k(teacher)}
    arguments |= {"divergence": name, "divergence_kwargs": CASES[name][1], "target_ids": torch.zeros(N).long()}
    num_rows = N if rows is None else int(rows.sum())
    with CountGemms(max(num_rows, 1), 8, V) as forward, nullcontext() if grad else torch.no_grad():
        out = fused_linear_divergence(
            **arguments, mask=rows, overlap_top_k=3, per_token_grad=per_token_grad, chunk_bytes=4 * 2 * V * 8
        )
    with CountGemms(max(num_rows, 1), 8, V) as backward:
        if grad:
            out.loss.backward()
    assert not grad or (student.weight.grad is None) == frozen
    assert not grad or (student.bias.grad is None) == frozen
    return forward.total, backward.total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("teacher_kind", "frozen", "expected"), [("dense", False, 4), ("dense", True, 3)])
def test_every_divergence_costs_four_products_or_three_with_a_frozen_head(name, teacher_kind, frozen, expected):
    assert count(teacher_kind, frozen, name=name) == pytest.approx((expected, 0))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"teacher_kind": "top-k"}, (3, 0)),
        ({"teacher_kind": "top-k", "frozen": True}, (2, 0)),
        ({"teacher_kind": "dense", "grad": False}, (2, 0)),
        ({"teacher_kind": "top-k", "grad": False}, (1, 0)),
        ({"teacher_kind": "dense", "rows": MASK}, (4, 0)),
        ({"teacher_kind": "dense", "rows": torch.zeros(N).bool()}, (0, 0)),
        ({"teacher_kind": "dense", "per_token_grad": True}, (2, 4)),
        ({"teacher_kind": "dense", "per_token_grad": True, "frozen": True}, (2, 3)),
    ],
)
def test_number_of_matrix_products(arguments, expected):
    assert count(**arguments) == pytest.approx(expected)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("kind", ["full", "union_top_k", "top-k teacher"])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_of_tokens_times_vocabulary_exists(name, kind, per_token_grad):
    tokens, vocabulary, rows = 60, 300, 3
    student, teacher = make_sides(tokens, vocabulary, H=(2, 2))
    arguments = fused_arguments(student, teacher) | {"divergence": name, "divergence_kwargs": CASES[name][1]}
    if kind == "top-k teacher":
        topk = top_k(teacher)
        arguments = {k: x for k, x in arguments.items() if not k.startswith("teacher")} | {"teacher_topk": topk}
    elif kind != "full":
        arguments |= {"support": kind, "support_size": K}
    with LargestTensor() as largest:
        out = fused_linear_divergence(
            **arguments, overlap_top_k=3, per_token_grad=per_token_grad, chunk_bytes=rows * 2 * vocabulary * 8
        )
        out.loss.backward()
    assert largest.size <= 4 * rows * vocabulary
