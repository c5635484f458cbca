# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a call is refused for before anything is computed: names, sizes, numbers of rows.

Shapes: N rows (tokens).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..losses import nearest_name
from .members import Member
from .operands import Rows
from .supports import SUPPORTS, TAILS

BACKENDS = ("auto", "torch", "triton", "liger")


def check_names(
    support: str,
    tail: str,
    backend: str,
    support_size: int | None,
    members: Sequence[Member],
) -> None:
    if support not in SUPPORTS or support == "sampled":
        valid = [s for s in SUPPORTS if s != "sampled"]
        raise ValueError(f"support must be a vocabulary support, got {support!r}.{nearest_name(support, valid)}")
    if tail not in TAILS:
        raise ValueError(f"tail must be a known name, got {tail!r}.{nearest_name(tail, list(TAILS))}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be a known name, got {backend!r}.{nearest_name(backend, list(BACKENDS))}")
    sizes = [member.topk[0].shape[-1] for member in members if member.topk is not None]
    dense = support != "full" and (not members or len(sizes) < len(members))
    if dense and (support_size is None or support_size < 1):
        raise ValueError(f"support_size must be at least 1 for support={support!r}, got {support_size!r}.")
    if dense and support_size is not None and support != "union_top_k":
        sizes.append(support_size)
    if tail == "renormalize" and 1 in sizes:
        raise ValueError(
            "support_size must be at least 2 with tail='renormalize', got 1. One renormalised entry has probability 1 "
            "in both distributions: value and gradient are identically zero. Use a larger support or tail='bucket'."
        )


def checked_temperature(
    temperature: float | Tensor, members: Sequence[Member], rows: Rows, device: torch.device
) -> float | Tensor:
    """A number, or `(n, 1)` in float64."""
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}. It divides the logits.")
        return float(temperature)
    if temperature.dim() != 1 or any(member.topk is not None for member in members):
        raise ValueError(
            "temperature must be a number, or a tensor (N,) with teachers that give hidden states, got shape "
            f"{tuple(temperature.shape)}. A top-k list's log-probs are of one temperature, which it was made at."
        )
    taken = rows.take(temperature.detach()).to(device, torch.float64)
    if not bool(((taken > 0) & taken.isfinite()).all()):
        raise ValueError("temperature must be above 0 and finite in every row that counts. It divides the logits.")
    return taken[:, None]


def check_rows(n: int, members: Sequence[Member], per_row: Mapping[str, Tensor | None]) -> None:
    for member in members:
        if member.hidden is not None and member.hidden.shape[0] != n:
            raise ValueError(
                f"teacher_hidden must have one row per student row ({n}), got {member.hidden.shape[0]}. The two "
                "models must be compared at the same positions."
            )
    per_teacher = [item for member in members for item in member.per_row.items()]
    for what, tensor in [*per_row.items(), *per_teacher]:
        if tensor is not None and tensor.shape[0] != n:
            raise ValueError(f"{what} must have one row per token ({n}), got shape {tuple(tensor.shape)}.")
