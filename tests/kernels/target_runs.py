"""Targets, statistics, weightings and row temperatures over two processes: run by test_target_logits.py."""

import sys
from pathlib import Path

import torch
from mixture_cases import TARGETS, TOKEN_WEIGHTS, N, T, V, arguments_of, make_teachers
from processes import leave

from trl_opd import fused_linear_divergence

FIRST = 15  # entries of the first process
TOLD = {"token_weights": TOKEN_WEIGHTS, "target_ids": TARGETS, "temperature": T}
STATISTICS = {
    "hellinger": None,
    "total_variation": None,
    "accepted": 2,
    "teacher_margin": 4,
    "teacher_rank": None,
    "student_rank": None,
    "teacher_max_logprob": None,
}


def weigh(stats):
    """Of the entropies and log-probs, which each process knows a part of until the end of a pass."""
    return stats["teacher_entropy"] + stats["student_entropy"] - stats["student_logprobs"] + stats["divergence"]


AFFINE = {"mixture": "affine", "mixture_weights": [0.4, 0.8, -0.3], "student_coef": 0.1}
# name -> number of teachers, arguments
CALLS = {
    "affine": (3, {**AFFINE, "overlap_top_k": 5}),
    "contrast": (2, {"mixture": "contrast", "contrast_scale": 2.0}),
    "statistics": (1, {"mixture": "arithmetic", "statistics": STATISTICS}),
    "weighting": (2, {"mixture": "loss_sum", "token_weighting": weigh}),
    "weighted target": (3, {**AFFINE, "token_weighting": weigh, "divergence": "forward_kl"}),
    "row temperature": (2, {"mixture": "arithmetic", "temperature": torch.linspace(0.5, 2, N)}),
}


def main(output_dir: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    student, teachers = make_teachers()
    results = {}
    for first in (FIRST, V):  # with V the second process holds padding only
        for side in (student, *teachers):
            if first == V and side.weight.shape[0] == V:  # every process must hold rows
                side.weight = torch.cat([side.weight, side.weight[:1]])
                side.bias = None if side.bias is None else torch.cat([side.bias, side.bias[:1]])
        own = slice(0, first) if rank == 0 else slice(first, None)
        parts = []
        for side in (student, *teachers):
            part = side.to(torch.float64)
            part.weight, part.bias = part.weight[own], None if part.bias is None else part.bias[own]
            parts.append(part)
        for name, (count, told) in CALLS.items():
            ours = parts[0].to(torch.float64, grad=True)
            out = fused_linear_divergence(
                **arguments_of(ours, parts[1 : count + 1]) | TOLD | told,
                vocab_size=V,
                vocab_group=group,
                chunk_bytes=2 * 9 * 8 * max(first, V - first),
            )
            out.loss.backward()
            keys = ["divergence", "teacher_entropy", "teacher_logprobs", "student_entropy", "forward_kl", "loss"]
            keys += [key for key in ("overlap", "target_coef", "weights") if getattr(out, key) is not None]
            stats = {key: getattr(out, key).detach() for key in keys} | out.further
            results[first, name] = {
                "stats": stats,
                "hidden": ours.hidden.grad,
                "weight": ours.weight.grad,
                "bias": ours.bias.grad,
            }
    torch.save(results, output_dir / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
