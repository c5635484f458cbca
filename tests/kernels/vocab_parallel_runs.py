"""
Calls over heads whose rows are spread over two processes, and the launch of two gloo processes that make them.

    torchrun --nproc-per-node 2 tests/kernels/vocab_parallel_runs.py OUTPUT_DIR

writes OUTPUT_DIR/RANK.pt with the results of all of them.
"""

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from processes import leave, run_two
from textbook import CASES, Side, fused_arguments, make_sides

from trl_opd import fused_linear_divergence

N, V, K, FIRST = 6, 23, 4, 9  # the first process holds 9 entries, the second 14
SUPPORTS = ("teacher_top_k", "student_top_k", "union_top_k", "intersection_top_k")
TAILS = ("bucket", "renormalize", "none")
STATISTICS = ("divergence", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")
STATISTICS += ("student_logprobs", "teacher_logprobs", "overlap", "overlap_advantage")
OVERLAP = 12  # more than the first process holds


@dataclass(frozen=True)
class Case:
    """A call with `options`, beside what shapes its inputs."""

    name: str = "reverse_kl"
    options: dict = field(default_factory=dict)
    teacher: str = "dense"  # or "top-k", "none"
    tokens: int = N
    first: int = FIRST
    frozen: bool = False
    grad: bool = True
    infinite: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))  # entries of logit -inf, of the student and the teacher
    per_token: bool = False
    padding: tuple[int, int] = (0, 0)  # entries of each head that the other lacks, or that `vocab_size` leaves out

    @property
    def is_finite(self) -> bool:
        return self.infinite == Case.infinite

    def has_mass(self, entry: int) -> bool:
        """Whether both models give the entry probability."""
        return not any(start <= entry < end for start, end in self.infinite)


def cases():
    yield from ((f"{name}", Case(name)) for name in CASES)
    for name in CASES:
        yield f"{name}, per token", Case(name, per_token=True)
        # Two tokens of the larger shard; of the smaller one it would be three
        yield f"{name}, in chunks", Case(name, {"chunk_bytes": 2 * (V - FIRST) * 8 * 8})
        yield f"{name}, one token", Case(name, tokens=1)
        for tail in TAILS:
            yield f"{name}, top-k teacher, {tail}", Case(name, {"tail": tail}, "top-k")
            for support in SUPPORTS:
                options = {"support": support, "support_size": K, "tail": tail}
                yield f"{name}, {support}, {tail}", Case(name, options)
        for first in (0, FIRST):  # all entries of one process, and all but the last of one
            lost = ((first, FIRST if first == 0 else V - 1),) * 2
            yield f"{name}, -inf from {first}", Case(name, infinite=lost)
    for name in ("reverse_kl", "adaptive_kl"):
        for support in SUPPORTS:
            options = {"support": support, "support_size": 2 * FIRST}
            yield f"{name}, a {support} larger than a shard", Case(name, options)
        yield f"{name}, a support of all entries", Case(name, {"support": "union_top_k", "support_size": V})
        for first in (1, V - 1):
            yield f"{name}, {first} entries on the first process", Case(name, first=first)
        yield f"{name}, vocab_size", Case(name, {"vocab_size": V}, padding=(5, 5))
        yield f"{name}, teacher padded", Case(name, padding=(0, 3))
        yield f"{name}, student padded", Case(name, padding=(3, 0))
        yield (
            f"{name}, nothing but padding on the second process",
            Case(name, {"vocab_size": V}, first=V, padding=(3, 3)),
        )
        yield f"{name}, a frozen head and a temperature", Case(name, {"temperature": 0.7}, frozen=True)
        yield f"{name}, no gradient", Case(name, grad=False)
        yield f"{name}, no tokens", Case(name, tokens=0)
        yield f"{name}, all masked", Case(name, {"mask": torch.zeros(N).bool()})
    yield "union, per token", Case("forward_kl", {"support": "union_top_k", "support_size": K}, per_token=True)
    yield "top-k teacher, per token", Case("forward_kl", {}, "top-k", per_token=True)
    yield "no teacher, per token", Case("reverse_kl", {}, "none", per_token=True)
    yield (
        "padding on the second process, per token",
        Case("todi", {"vocab_size": V}, first=V, padding=(3, 3), per_token=True),
    )
    yield (
        "padding on the second process, intersection",
        Case(
            "todi", {"vocab_size": V, "support": "intersection_top_k", "support_size": V - 2}, first=V, padding=(3, 3)
        ),
    )
    uniform = {"divergence_kwargs": {"first": "uniform", "second": "student"}}
    yield "uniform weights", Case("concrete_score", uniform)
    yield "uniform weights, per token", Case("concrete_score", uniform, per_token=True)
    yield (
        "uniform weights, nothing but padding on the second process",
        Case("concrete_score", {"vocab_size": V, **uniform}, first=V, padding=(3, 3)),
    )
    for lost in ((0, FIRST), (FIRST, V - 1), (2, 5)):
        yield f"uniform weights, -inf {lost}", Case("concrete_score", uniform, infinite=(lost, lost))
    detached = {"divergence_kwargs": {"skew": 0.3, "detached": 1}}
    yield "a detached mixture", Case("skew_reverse_kl", detached)
    for which in range(2):  # one model has no mass on the whole shard of one process
        for shard in ((0, FIRST), (FIRST, V)):
            infinite = (shard, (0, 0)) if which == 0 else ((0, 0), shard)
            for name in ("total_variation", ("reverse_kl", "forward_kl")[which]):
                yield f"{name}, {('student', 'teacher')[which]} lacks {shard}", Case(name, infinite=infinite)


ALL = dict(cases())


def make_inputs(case: Case) -> tuple[Side, Side, dict]:
    """Whole heads, and the other arguments."""
    sides = make_sides(case.tokens, V + max(case.padding), seed=3)
    for i, side in enumerate(sides):
        side = replace(side.to(torch.float64), scale=1.3 + i, softcap=9.0 - i if case.is_finite else None)
        side.weight, side.bias = side.weight[: V + case.padding[i]], side.bias[: V + case.padding[i]]
        side.bias[slice(*case.infinite[i])] = -torch.inf
        side.weight[V:], side.bias[V:] = torch.nan, torch.nan  # never read
        sides[i] = side
    student, teacher = sides[0].to(torch.float64, grad=True), sides[1]
    if case.frozen:
        student.weight.requires_grad_(False)
    options = {
        "divergence": case.name,
        "divergence_kwargs": CASES[case.name][1],
        "token_weights": torch.linspace(0, 2, case.tokens).double(),  # the first row is left out
        # On both processes; where one has no mass, on the other
        "target_ids": torch.arange(case.tokens) * (4 if case.is_finite else 0)
        + (V - 1) * (not case.is_finite and case.has_mass(V - 1)),
        "overlap_top_k": OVERLAP,
        "per_token_grad": case.per_token,
        **case.options,
    }
    if case.tokens == 1:
        options["token_weights"] += 1
    if case.teacher == "top-k":
        probs, ids = shared(teacher).probs(options.get("temperature", 1.0)).topk(K)
        ids[1, 1:] = -1  # padding
        ids[2] = torch.arange(V, V + K)  # nothing that the student knows
        options["teacher_topk"] = (ids, probs.log())
    return student, teacher, options


def shared(side: Side) -> Side:
    return replace(side, weight=side.weight[:V], bias=side.bias[:V])


def objective(out, case: Case) -> torch.Tensor:
    """What is differentiated: the loss, or a mix of the per-token values."""
    if not case.per_token:
        return out["loss"]
    mix = [out["student_logprobs"] * torch.linspace(1, 2, case.tokens), out["student_entropy"].square()]
    return sum(x.sum() for x in mix) + (out["divergence"].square().sum() if case.teacher != "none" else 0.0)


def own_rows(side: Side, case: Case, rank: int) -> Side:
    """A process's part of a head. The one that holds the end holds its padding."""
    rows = slice(0, case.first) if rank == 0 else slice(case.first, None)
    parts = {
        key: getattr(side, key)[rows].detach().clone() for key in ("weight", "bias") if getattr(side, key) is not None
    }
    parts = {key: x.requires_grad_(getattr(side, key).requires_grad) for key, x in parts.items()}
    return replace(side, hidden=side.hidden.detach().clone().requires_grad_(side.hidden.requires_grad), **parts)


def call(student: Side, teacher: Side, case: Case, options: dict, group) -> dict:
    """The op's values and gradients."""
    arguments = fused_arguments(student, teacher) | options
    if case.teacher != "dense":
        arguments = {k: x for k, x in arguments.items() if k == "teacher_topk" or not k.startswith("teacher")}
    with torch.set_grad_enabled(case.grad):
        out = vars(fused_linear_divergence(**arguments, vocab_group=group))
    if case.grad:
        objective(out, case).backward()
    values = {key: out[key] for key in ("loss", *STATISTICS) if out[key] is not None}
    return {key: x.detach() for key, x in values.items()} | {
        f"grad of {key}": getattr(student, key).grad
        for key in ("hidden", "weight", "bias")
        if getattr(student, key) is not None
    }


REFUSABLE = ("shards that differ", "an empty shard", "rows that differ", "chunks that differ", "a gradient on one")
REFUSABLE += ("liger", "triton")


def refused_call(what: str, rank: int, group) -> str:
    """The message of the error that this process gets."""
    student, teacher = (own_rows(side, Case(first=0 if "empty" in what else FIRST), rank) for side in make_sides(N, V))
    if what == "an empty shard":
        student.bias = teacher.bias = None
    if what == "shards that differ":
        teacher = own_rows(make_sides(N, V)[1], Case(first=FIRST + 1), rank)
    if what == "a gradient on one":
        student = student.to(torch.float64, grad=rank == 1)
    if what in ("liger", "triton"):
        student, teacher = student.to(torch.float32), teacher.to(torch.float32)
    options = {"backend": what} if what in ("liger", "triton") else {}
    if what == "rows that differ":
        options["mask"] = torch.arange(N) < N - rank
    if what == "chunks that differ":
        options["chunk_bytes"] = (1000, 2000)[rank]
    try:
        fused_linear_divergence(**fused_arguments(student, teacher), **options, vocab_group=group)
    except ValueError as error:
        return str(error)
    return "no error"


def call_with_nan(where: str, rank: int, group) -> dict:
    """A NaN in a hidden state of both processes, or in the first one's head."""
    student, teacher = (own_rows(side, Case(), rank) for side in make_sides(N, V))
    with torch.no_grad():
        if where == "hidden":
            student.hidden[2, 1] = torch.nan
        elif rank == 0:
            student.weight[3, 1] = torch.nan
    options = {"target_ids": torch.arange(N), "support": "union_top_k", "support_size": K}
    return call(student, teacher, Case(), options, group)


def near_sides(near: int) -> list[Side]:
    """
    Two models whose logits are exact in float32 and, in the first `near` rows, differ by about 3e-3; enough entries to
    even out rounding.
    """
    generator = torch.Generator().manual_seed(0)
    weight, noise = (torch.randn(3000, N, generator=generator).mul(x).round() / 4096 for x in (8192, 12))
    noise[:, near:] *= 1024
    return [Side(torch.eye(N), x) for x in (weight, weight + noise)]


def count_exchanges(rank: int, group) -> dict[str, int]:
    counts: dict[str, int] = {}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce", "all_to_all_single"):
            patch.setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))
        student, teacher = (own_rows(side, Case(), rank) for side in make_sides(20_000, V))
        call(student, teacher, Case(), {"target_ids": torch.zeros(20_000).long()}, group)
    return counts


def run_two_processes() -> list[dict]:
    """The results of each process."""
    with tempfile.TemporaryDirectory() as output_dir:
        run_two(__file__, output_dir)
        return [torch.load(Path(output_dir, f"{rank}.pt")) for rank in (0, 1)]


def main(output_dir: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    results = {}
    for name, case in ALL.items():
        student, teacher, options = make_inputs(case)
        results[name] = call(own_rows(student, case, rank), own_rows(teacher, case, rank), case, options, group)
    results["refused"] = {what: refused_call(what, rank, group) for what in REFUSABLE}
    results["nan"] = {where: call_with_nan(where, rank, group) for where in ("hidden", "weight")}
    results["near"] = {
        near: call(*(own_rows(side, Case(), rank) for side in near_sides(near)), Case(grad=False), {}, group)
        for near in (N - 2, N)
    }
    results["exchanges"] = count_exchanges(rank, group)
    student, teacher, options = make_inputs(Case())
    groups = [torch.distributed.new_group([r]) for r in range(2)]
    results["group of one"] = call(student, teacher, Case(), options, groups[rank])
    torch.save(results, output_dir / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
