"""Several teachers whose heads are spread over two processes: run by test_mixture_calls.py."""

import sys
from pathlib import Path

import torch
from mixture_cases import MIXTURES, TARGETS, TOKEN_WEIGHTS, WEIGHTS, T, V, arguments_of, make_teachers
from processes import leave

from trl_opd import fused_linear_divergence

FIRST = 15  # entries of the first process


def main(output_dir: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    student, teachers = make_teachers()
    results = {}
    for first in (FIRST, V):  # with V the second process holds padding only
        for mixture in MIXTURES:
            for side in (student, *teachers):
                rows = side.weight.shape[0]
                if first == V and rows == V:  # every process must hold rows
                    side.weight = torch.cat([side.weight, side.weight[:1]])
                    side.bias = None if side.bias is None else torch.cat([side.bias, side.bias[:1]])
            own = slice(0, first) if rank == 0 else slice(first, None)
            parts = []
            for side in (student, *teachers):
                part = side.to(torch.float64)
                part.weight, part.bias = part.weight[own], None if part.bias is None else part.bias[own]
                parts.append(part)
            ours = parts[0].to(torch.float64, grad=True)
            out = fused_linear_divergence(
                **arguments_of(ours, parts[1:]),
                mixture=mixture,
                mixture_weights=WEIGHTS,
                temperature=T,
                token_weights=TOKEN_WEIGHTS,
                target_ids=TARGETS,
                vocab_size=V,
                vocab_group=group,
                chunk_bytes=2 * 9 * 8 * max(first, V - first),
            )
            out.loss.backward()
            names = ("divergence", "teacher_entropy", "teacher_logprobs", "student_entropy", "forward_kl")
            results[first, mixture] = {key: getattr(out, key).detach() for key in names} | {
                "hidden": ours.hidden.grad,
                "weight": ours.weight.grad,
                "bias": ours.bias.grad,
            }
    torch.save(results, output_dir / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
