"""Tensors on several devices, as `device_map` leaves them, and the backward pass on a device's own thread."""

import pytest
import torch
from textbook import Side, fused_arguments, make_sides, reverse_kl

from trl_opd import fused_linear_divergence

pytestmark = pytest.mark.gpu
N, V = 40, 300
both_modes = pytest.mark.parametrize("per_token_grad", [False, True], ids=["gradient in forward", "per token"])


def leaf(x: torch.Tensor, device: str) -> torch.Tensor:
    return x.detach().float().to(device).requires_grad_(x.requires_grad)


@both_modes
@pytest.mark.parametrize("teacher_kind", ["dense", "top-k"])
@pytest.mark.parametrize("rows", ["all", "mask", "weights"])
@pytest.mark.parametrize(("here", "head"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_work_is_done_at_the_student_s_head_and_gradients_return(here, head, rows, teacher_kind, per_token_grad):
    student, teacher = make_sides(N, V)
    weights = torch.ones(N) if rows == "all" else (torch.arange(N) % 3).float()
    mask = weights != 0
    spread = Side(leaf(student.hidden, here), leaf(student.weight, head), leaf(student.bias, here))
    arguments = fused_arguments(spread, Side(*(leaf(x, here) for x in teacher.leaves)))
    arguments |= {"all": {}, "mask": {"mask": mask.to(here)}, "weights": {"token_weights": weights.to(here)}}[rows]
    if rows == "mask":
        weights = mask.float()
        arguments["token_weights"] = weights.to(head)
    if teacher_kind == "top-k":
        arguments = {key: x for key, x in arguments.items() if not key.startswith("teacher")}
        probs, ids = teacher.probs().sort(descending=True)
        arguments["teacher_topk"] = (ids.to(here), probs.log().float().to(head))
    target_ids = torch.arange(N, device=here)
    out = fused_linear_divergence(**arguments, target_ids=target_ids, per_token_grad=per_token_grad)
    for value in vars(out).values():
        assert not isinstance(value, torch.Tensor) or value.device.type == head
    truth = (reverse_kl(student.probs(), teacher.probs()) * weights).sum()
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-4)
    gradients = torch.autograd.grad(out.loss * 2, spread.leaves)
    for ours, theirs, input_ in zip(
        gradients, torch.autograd.grad(truth * 2, student.leaves), spread.leaves, strict=True
    ):
        assert ours.device == input_.device
        assert (ours.double().cpu() - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_s_thread_too_a_graph_that_is_not_kept_gives_its_gradients_away(dtype):
    student, teacher = (side.to(dtype) for side in make_sides(N, 20_000, H=(64, 64)))
    student, teacher = (
        Side(*(x.detach().cuda().requires_grad_() for x in side.leaves)) for side in (student, teacher)
    )
    loss = fused_linear_divergence(**fused_arguments(student, teacher)).loss * 3
    once = torch.autograd.grad(loss, student.leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, student.leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    del twice
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < student.weight.numel() * dtype.itemsize / 4
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(once, student.leaves, strict=True))
