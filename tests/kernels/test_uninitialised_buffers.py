"""
Buffers that hold NaN before they are written, with NaN around them, and the window in which gradients wait.

What leaks shows in a sum; what is written outside shows in the surroundings.
"""

import math
from typing import ClassVar

import pytest
import torch
from backends import FP32, FP64, SINGLE, STATISTICS, ask, assert_gradients, assert_values, pair, truth_of
from textbook import CASES, fused_arguments

from trl_opd import fused_linear_divergence
from trl_opd.kernels import fused
from trl_opd.kernels.projection import Projector

pytestmark = pytest.mark.usefixtures("short_blocks")
N, V, K = 5, 21, 4
GUARD = 256
WEIGHTS = torch.linspace(-0.5, 2.0, N, dtype=FP64)
TARGETS = torch.tensor([0, 15, 16, 20, 7])
TWO_ROWS = 2 * 2 * V * 4


class Poison:
    """Stands in for the functions that give uninitialised memory."""

    def __init__(self, monkeypatch):
        self.workspaces: list[torch.Tensor] = []
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self.poisoned(getattr(owner, name)))
        monkeypatch.setattr(fused, "_workspace", self.workspace)

    def poisoned(self, function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(math.nan if out.dtype.is_floating_point else 1 << 30)

        return call

    def workspace(self, shape, dtype, device):
        memory = torch.full((math.prod(shape) + 2 * GUARD,), math.nan, dtype=dtype, device=device)
        self.workspaces.append(memory)
        return memory[GUARD:-GUARD].view(shape)

    def nothing_outside(self) -> bool:
        around = [x for memory in self.workspaces for x in (memory[:GUARD], memory[-GUARD:])]
        return len(around) > 0 and all(bool(x.isnan().all()) for x in around)


class Waiting(Projector):
    """As on a GPU with bf16 operands, gradients wait in another dtype; in float64, so that it rounds nothing."""

    products: ClassVar[list[int]] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.grad_dtype = FP64

    def add_gradients(self, grad, weights, *others):
        assert grad.dtype == FP64 and weights is None
        self.products.append(grad.shape[0])
        self.grad_dtype = self.out_dtype
        super().add_gradients(grad.to(self.out_dtype), weights, *others)
        self.grad_dtype = FP64


def per_token_loss(out):
    terms = [out.student_logprobs.exp().sum(), out.student_entropy.square().sum()]
    return sum(terms if out.divergence is None else [*terms, (out.divergence * WEIGHTS.to(out.divergence)).sum()])


def call(kind: str, backend: str, dtype: torch.dtype, name: str, per_token_grad: bool):
    student, teacher = pair(N, V)
    told = {"target_ids": TARGETS, "chunk_bytes": TWO_ROWS, "temperature": 0.8}
    if kind == "sparse":
        values, ids = teacher.probs().log().topk(K)
        ids[1, 2:], ids[3] = -1, -1
        teacher, told = None, told | {"teacher_topk": (ids, values)}
    elif kind == "none":
        teacher = None
    elif kind != "full":
        told |= {"support": kind, "support_size": K}
    if not per_token_grad:
        told |= {"token_weights": WEIGHTS, "overlap_top_k": 3}
    loss = per_token_loss if per_token_grad else None
    return ask(backend, dtype, student, teacher, name, loss=loss, per_token_grad=per_token_grad, **told)


KINDS = [(kind, mode) for kind in ("full", "sparse", "union_top_k", "intersection_top_k") for mode in (False, True)]


@pytest.mark.parametrize("waits", [False, True], ids=["in place", "window"])
@pytest.mark.parametrize(("kind", "per_token_grad"), [*KINDS, ("none", True)])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_nothing_of_an_uninitialised_buffer_is_ever_read(backend, dtype, kind, per_token_grad, waits, monkeypatch):
    for name in ("reverse_kl", "generalized_jsd") if kind == "full" and not waits else ("forward_kl",):
        clean = call(kind, backend, dtype, name, per_token_grad)
        with monkeypatch.context() as patch:
            poison = Poison(patch)
            if waits:
                patch.setattr(fused, "Projector", Waiting)
            ours = call(kind, backend, dtype, name, per_token_grad)
            assert poison.nothing_outside()
        for statistic in ("loss", "divergence", *STATISTICS):
            a, b = getattr(ours, statistic), getattr(clean, statistic)
            assert (a is None) == (b is None)
            if a is not None:
                assert_values(a, b, dtype)
        assert_gradients(ours.gradients, clean.gradients, dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_every_divergence_fills_all_that_it_reads(backend, dtype, name, monkeypatch):
    student, teacher = pair(N, V)
    value, gradients = truth_of(student, teacher, name, weights=WEIGHTS)
    poison = Poison(monkeypatch)
    ours = ask(backend, dtype, student, teacher, name, token_weights=WEIGHTS, chunk_bytes=TWO_ROWS)
    assert_values(ours.divergence, value, dtype)
    assert_gradients(ours.gradients, gradients, dtype)
    assert poison.nothing_outside()


# Rows of a chunk, and the products that follow: four chunks wait for one that adds to the head's gradient
WINDOWS = [(1, False, [4, 4, 3]), (2, False, [8, 3]), (3, False, [11]), (30, False, [11]), (4, True, [4, 4, 3])]


@pytest.mark.parametrize(("rows", "frozen", "products"), WINDOWS)
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_rows_that_wait_in_a_window_are_multiplied_once(
    backend, dtype, per_token_grad, rows, frozen, products, monkeypatch
):
    student, teacher = pair(11, 21)
    weights = torch.linspace(0.5, 2.0, 11, dtype=FP64)
    value, gradients = truth_of(student, teacher, "generalized_jsd", weights=weights, frozen=frozen)
    monkeypatch.setattr(fused, "Projector", Waiting)
    monkeypatch.setattr(Waiting, "products", [])
    room = 2 * 4 + (1 if frozen else 4) * 8  # bytes of an entry: two models' logits, and the gradients that wait
    ours = ask(
        backend, dtype, student, teacher, "generalized_jsd",
        token_weights=weights, frozen=frozen, per_token_grad=per_token_grad, chunk_bytes=rows * 21 * room,
    )  # fmt: skip
    assert Waiting.products == products
    assert_values(ours.divergence, value, dtype)
    assert_gradients(ours.gradients, gradients, dtype)


@pytest.mark.parametrize("kind", ["full", "top-k teacher"])
def test_a_row_of_many_chunks_adds_to_the_head_of_a_larger_vocabulary(kind, monkeypatch):
    """The gradient of the student's rows beyond the shared vocabulary stays 0."""
    monkeypatch.setattr(fused, "Projector", Waiting)
    student, teacher = (side.to(FP32, grad=True) for side in pair(N, 37))
    arguments = fused_arguments(student, teacher) | {"vocab_size": 30}
    if kind == "top-k teacher":
        arguments = {key: x for key, x in arguments.items() if not key.startswith("teacher")}
        values, ids = teacher.probs()[:, :30].log().topk(K)
        arguments["teacher_topk"] = ids, values.detach()
    loss = fused_linear_divergence(**arguments, chunk_bytes=37 * 40).loss
    loss.backward()
    assert (student.weight.grad[30:] == 0).all() and (student.bias.grad[30:] == 0).all()
    assert (student.weight.grad[:30] != 0).any(-1).all()
