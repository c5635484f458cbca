"""Heads sharded by FSDP2, given to the op as the `DTensor`s they are: two processes, each with tokens of its own."""

import sys
from pathlib import Path

import pytest
import torch
from processes import leave, run_two
from textbook import Side, fused_arguments, make_sides, reverse_kl
from tiny import VOCAB_SIZE, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trl_opd import fused_linear_divergence
from trl_opd.heads import HeadCall, add_head_branch

N, V = 7, 19
SHARD = Shard(0)
CASES = {
    "weight and bias": {},
    "per token": {"per_token_grad": True},
    "sharded over features": {"placements": [Shard(1)], "bias": False},
    "two mesh dimensions": {"mesh": (2, 1), "placements": [Replicate(), SHARD]},
    "replicated": {"placements": [Replicate()]},
    "frozen": {"frozen": True},
    "whole teacher": {"whole_teacher": True},
    "bf16": {"dtype": torch.bfloat16},
}


def sharded_case(rank, mesh=(2,), placements=(SHARD,), bias=True, frozen=False, whole_teacher=False, **options):
    """Each process's mean over half of the rows, whose gradients FSDP would average. V is odd: uneven shards."""
    dtype, per_token_grad = options.get("dtype", torch.float64), options.get("per_token_grad", False)
    mesh = init_device_mesh("cpu", mesh)
    student, teacher = (side.to(dtype) for side in make_sides(2 * N, V, bias=bias))
    rows = slice(rank * N, (rank + 1) * N)

    def shard(tensor):
        return torch.nn.Parameter(distribute_tensor(tensor, mesh, placements), requires_grad=not frozen)

    def cut(side, sharded):
        heads = [None if x is None else shard(x) if sharded else x for x in (side.weight, side.bias)]
        return Side(side.hidden[rows].clone(), *heads)

    student, teacher = cut(student, True), cut(teacher, not whole_teacher)
    student.hidden.requires_grad_()
    loss = fused_linear_divergence(**fused_arguments(student, teacher), per_token_grad=per_token_grad).loss / N
    loss.backward()
    assert teacher.weight.grad is None
    gradients = [leaf.grad for leaf in student.leaves[1:]]
    if not frozen:
        assert all(isinstance(g, DTensor) and g.placements == tuple(placements) for g in gradients)
    gradients = [None if g is None else g.full_tensor() for g in gradients]
    return {"loss": loss.detach(), "hidden": student.hidden.grad, "head": gradients}


def vocabulary_parallel_case():
    """The same tokens on both processes, which do not gather the shards."""
    mesh = init_device_mesh("cpu", (2,))
    student, teacher = make_sides(N, V)
    for side in (student, teacher):
        side.weight, side.bias = (torch.nn.Parameter(distribute_tensor(x, mesh, [SHARD])) for x in side.leaves[1:])
    gathered = []
    DTensor.full_tensor, full_tensor = lambda self, **kwargs: gathered.append(self), DTensor.full_tensor
    fused_linear_divergence(**fused_arguments(student, teacher), vocab_group=mesh.get_group()).loss.backward()
    DTensor.full_tensor = full_tensor
    assert not gathered and all(leaf.grad.placements == (SHARD,) for leaf in student.leaves[1:])
    try:
        weight = distribute_tensor(student.weight.detach().full_tensor(), mesh, [Shard(1)])
        fused_linear_divergence(student.hidden, weight, student.hidden, weight, vocab_group=mesh.get_group())
        refused = ""
    except ValueError as error:
        refused = str(error)
    head = [leaf.grad.full_tensor() for leaf in student.leaves[1:]]
    return {"gradients": [student.hidden.grad, *head], "refused": refused}


def head_module_case(rank):
    """FSDP2 around the head itself: inside the model's forward it is a shard, whose gradient nobody else reduces."""
    model = make_model().double()
    add_head_branch(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    teacher = make_sides(6, VOCAB_SIZE, bias=False)[1]
    ids = torch.arange(6, 18).view(2, 6)[rank : rank + 1]

    def call(hidden, head, aux_loss):
        return fused_linear_divergence(hidden[0], head.weight, teacher.hidden, teacher.weight).loss

    model(input_ids=ids, head_call=HeadCall(call)).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def run_two_processes(output_dir):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, case in CASES.items():
        torch.save(sharded_case(rank, **case), output_dir / f"{name}.{rank}.pt")
    torch.save(vocabulary_parallel_case(), output_dir / f"vocabulary parallel.{rank}.pt")
    torch.save(head_module_case(rank), output_dir / f"head module.{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("heads")
    run_two(__file__, output_dir)
    return {path.stem: torch.load(path) for path in output_dir.glob("*.pt")}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_a_sharded_head_gets_the_mean_gradient_as_a_shard(results, name):
    case = CASES[name]
    bf16 = case.get("dtype") == torch.bfloat16
    student, teacher = make_sides(2 * N, V, bias=case.get("bias", True))
    if bf16:
        student, teacher = (side.to(torch.bfloat16).to(torch.float64, grad=True) for side in (student, teacher))
    halves = reverse_kl(student.probs(), teacher.probs().detach()).view(2, N).mean(1)
    expected = torch.autograd.grad(halves.mean(), student.leaves)
    rtol, atol = (2e-2, 1e-3) if bf16 else (1e-9, 1e-11)
    for rank in (0, 1):
        result = results[f"{name}.{rank}"]
        torch.testing.assert_close(result["loss"].double(), halves[rank].detach(), rtol=rtol, atol=atol)
        own = expected[0][rank * N : (rank + 1) * N] * 2  # of its own mean
        torch.testing.assert_close(result["hidden"].double(), own, rtol=rtol, atol=atol)
        if case.get("frozen"):
            assert all(gradient is None for gradient in result["head"])
            continue
        for ours, theirs in zip(result["head"], expected[1:], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.distributed
def test_a_head_that_is_an_fsdp_module_of_its_own_is_trained_like_the_rest(results):
    model = make_model().double()
    logits = model(input_ids=torch.arange(6, 18).view(2, 6)).logits
    teacher = make_sides(6, VOCAB_SIZE, bias=False)[1]
    reverse_kl(logits.softmax(-1), teacher.probs()).sum().div(2).backward()
    for rank in (0, 1):
        for name, parameter in model.named_parameters():
            ours = results[f"head module.{rank}"][name]
            assert (ours - parameter.grad).norm() < 1e-6 * parameter.grad.norm(), name


@pytest.mark.distributed
def test_with_a_vocabulary_group_the_shards_are_each_process_s_rows(results):
    student, teacher = make_sides(N, V)
    expected = torch.autograd.grad(reverse_kl(student.probs(), teacher.probs()).sum(), student.leaves)
    for rank in (0, 1):
        result = results[f"vocabulary parallel.{rank}"]
        for ours, theirs in zip(result["gradients"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert result["refused"].startswith(
            "With vocab_group a DTensor must be sharded over its rows alone, got (Shard"
        )


if __name__ == "__main__":
    run_two_processes(Path(sys.argv[1]))
