# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The teachers of a call, as its arguments give them: one, several, or none.

An argument is one value for all teachers or a sequence of one entry for each.
Shapes: N rows (tokens), H hidden, V vocabulary, K support.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses import nearest_name
from .operands import check_head, frozen_head, teacher_dtype
from .projection import Head

MIXTURES = ("arithmetic", "geometric", "loss_sum")
TopK = tuple[Tensor, Tensor]


@dataclass
class Member:
    """One teacher: hidden states and the head that belongs to them, or what is known of its distribution."""

    hidden: Tensor | None = None  # (N, H_t)
    head: Head | None = None
    topk: TopK | None = None  # ids and log-probs, (N, K)
    dtype: torch.dtype = torch.float32  # in which hidden states and head meet

    @property
    def per_row(self) -> dict[str, Tensor | None]:
        """What must have a row per token."""
        ids, logprobs = self.topk or (None, None)
        return {"teacher_topk ids": ids, "teacher_topk log-probs": logprobs}

    @torch.no_grad()
    def taken(
        self,
        take: Callable[[Tensor], Tensor],
        device: torch.device,
        student_dtype: torch.dtype,
        vocab_group: dist.ProcessGroup | None,
    ) -> "Member":
        """The rows to project with a head that is whole, on the device of the student's head."""
        if self.topk is not None:
            return Member(topk=(take(self.topk[0]), take(self.topk[1])))
        assert self.hidden is not None and self.head is not None
        head = frozen_head(self.head.weight, self.head.bias, device, vocab_group)
        head.logit_scale, head.softcap = self.head.logit_scale, self.head.softcap
        check_head("teacher", self.hidden, head.weight, head.bias)
        dtype = teacher_dtype(student_dtype, self.hidden, head)
        return replace(self, hidden=take(self.hidden), head=head, dtype=dtype)


def list_members(
    hidden: Tensor | Sequence[Tensor | None] | None,
    weight: Tensor | Sequence[Tensor | None] | None,
    bias: Tensor | Sequence[Tensor | None] | None,
    logit_scale: float | Sequence[float],
    softcap: float | Sequence[float | None] | None,
    topk: TopK | Sequence[TopK | None] | None,
) -> list[Member]:
    """
    The teachers of a call's arguments.

    Raises:
        ValueError: If sequences differ in length, or one of several teachers is not given in one of the two ways.
    """
    is_pair = isinstance(topk, tuple) and len(topk) == 2 and all(isinstance(x, Tensor) for x in topk)
    given: dict[str, Any] = {
        "teacher_hidden": hidden,
        "teacher_weight": weight,
        "teacher_bias": bias,
        "teacher_logit_scale": logit_scale,
        "teacher_softcap": softcap,
        "teacher_topk": [topk] if is_pair else topk,
    }
    lengths = {name: len(x) for name, x in given.items() if isinstance(x, Sequence)}
    if is_pair:
        lengths.pop("teacher_topk")
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(
            f"Arguments of several teachers must have one entry for each, got {lengths} entries. Give a teacher None "
            "where it has nothing, or one value instead of a sequence where all have the same."
        )
    count = next(iter(lengths.values()), 1)
    if is_pair:
        given["teacher_topk"] = [topk] * count
    columns = [x if isinstance(x, Sequence) else [x] * count for x in given.values()]
    return [_member(i, count, *entry) for i, entry in enumerate(zip(*columns, strict=True)) if _is_given(count, entry)]


def _is_given(count: int, entry: tuple[Any, ...]) -> bool:
    """Whether there is such a teacher: a call may have none, but not a gap among several."""
    return count > 1 or any(entry[i] is not None for i in (0, 1, 5))


def _member(
    i: int,
    count: int,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    topk: TopK | None,
) -> Member:
    where = f" of teacher {i}" if count > 1 else ""
    if hidden is None and weight is None and topk is None:
        raise ValueError(
            f"A teacher must be given by teacher_hidden and teacher_weight, or by teacher_topk, got nothing{where}."
        )
    if topk is not None and (hidden is not None or weight is not None):
        raise ValueError(
            f"teacher_topk replaces teacher_hidden and teacher_weight{where}: pass the one or the others."
        )
    if topk is not None:
        return Member(topk=topk)
    if hidden is None or weight is None:
        raise ValueError(f"teacher_hidden and teacher_weight{where} go together: pass both, or teacher_topk.")
    return Member(hidden.detach(), Head(weight, bias, logit_scale, softcap))


def check_mixture(mixture: str, members: Sequence[Member]) -> None:
    """Refuse a mixture that has no meaning for the teachers."""
    if mixture not in MIXTURES:
        raise ValueError(f"mixture must be a known name, got {mixture!r}.{nearest_name(mixture, list(MIXTURES))}")
    if len(members) > 1 and mixture != "loss_sum" and any(m.topk is not None for m in members):
        raise ValueError(
            f"mixture must be 'loss_sum' with teachers of which only the top K is known, got {mixture!r}. What lists "
            "that are cut off at different entries mix to is not known. Use teachers that give hidden states, or "
            "mixture='loss_sum'."
        )


def checked_weights(
    weights: Sequence[float] | Tensor | None, count: int, take: Callable[[Tensor], Tensor], like: Tensor
) -> Tensor:
    """
    Weights of `count` teachers, above 0 and of sum 1, in float64: `(1, count)`, or `(n, count)` if they differ by row.

    Raises:
        ValueError: If they are anything else.
    """
    if weights is None:
        return torch.full((1, count), 1 / count, dtype=torch.float64, device=like.device)
    by_row = isinstance(weights, Tensor) and weights.dim() == 2
    if isinstance(weights, Tensor):
        weights = weights.detach()
        values = (take(weights) if by_row else weights.reshape(1, -1)).to(like.device, torch.float64)
    else:
        values = torch.tensor([*weights], dtype=torch.float64, device=like.device)[None]
    total = values.sum(-1, keepdim=True)
    valid = values.shape[-1] == count and bool(((values > 0) & ((total - 1).abs() < 1e-5)).all())
    if not valid:
        shown = f"a tensor of shape {tuple(values.shape)}" if by_row else values[0].tolist()
        raise ValueError(
            f"mixture_weights must be {count} numbers above 0 that sum to 1, one per teacher (or such a row for every "
            f"token), got {shown}. A teacher of weight 0 would only cost time. Leave it out, and divide the others by "
            "their sum."
        )
    return values / total
