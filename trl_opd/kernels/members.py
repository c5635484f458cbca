# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The teachers of a call, as its arguments give them: one, several, or none; and what is aimed at instead of them.

An argument is one value for all teachers or a sequence of one entry for each.
Shapes: N rows (tokens), H hidden, V vocabulary, K support.
"""

import math
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
TARGET_MIXTURES = ("affine", "contrast")
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


@dataclass
class AffineTarget:
    """Logits Σ_k a_k z_k + c · z_s of the teachers' final logits and the student's, whose term has no gradient."""

    coefs: Tensor  # (1, M + 1) or (N, M + 1) float64: the a_k, then c
    total: Tensor  # (1, 1) or (N, 1): their sum
    pivot: int  # the column that the others are compared with, see `mixtures.affine_logits`
    present: tuple[int, ...]  # the other columns that are not all 0

    @property
    def is_teacher(self) -> bool:
        """Whether this is the first teacher itself."""
        return self.pivot == 0 and not self.present and bool((self.coefs[:, 0] == 1).all())


@dataclass
class ContrastTarget:
    """Logits z_1 + w (z_1 − z_2) with w = scale · Σ_v |p_1 − p_2| + floor of each row, which is also divided by w."""

    scale: float
    floor: float


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
    names = [*MIXTURES, *TARGET_MIXTURES]
    if mixture not in names:
        raise ValueError(f"mixture must be a known name, got {mixture!r}.{nearest_name(mixture, names)}")
    if mixture in TARGET_MIXTURES and (not members or any(m.topk is not None for m in members)):
        raise ValueError(
            f"mixture={mixture!r} needs teachers that give hidden states, all of them. Of a top-k list the logits "
            "outside the list are not known, so there is nothing to combine. Use local teachers, or another mixture."
        )
    if mixture == "contrast" and len(members) != 2:
        raise ValueError(
            f"mixture='contrast' needs two teachers, the chosen and the reversed one, got {len(members)}."
        )
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
    values = _columns(weights, take, like)
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


def make_target(
    mixture: str,
    weights: Sequence[float] | Tensor | None,
    student_coef: float | Tensor,
    contrast: tuple[float, float],
    count: int,
    take: Callable[[Tensor], Tensor],
    like: Tensor,
) -> AffineTarget | ContrastTarget | None:
    """
    What `count` teachers and the student make to aim at; `None` where that is the teacher or a mixture of teachers.

    Raises:
        ValueError: If the numbers are not finite, are not one per teacher, or belong to another mixture.
    """
    if mixture != "affine" and (isinstance(student_coef, Tensor) or student_coef != 0):
        raise ValueError(f"student_coef needs mixture='affine', got {student_coef!r} with {mixture!r}.")
    if mixture == "contrast":
        return _contrast_target(weights, *contrast)
    if mixture != "affine":
        return None
    if weights is None and count > 1:
        raise ValueError(
            f"mixture='affine' needs mixture_weights, one number for each of the {count} teachers, got None."
        )
    teachers = _columns([1.0] if weights is None else weights, take, like)
    student = student_coef[:, None] if isinstance(student_coef, Tensor) and student_coef.dim() == 1 else student_coef
    own = _columns(student if isinstance(student, Tensor) else [student], take, like)
    if teachers.shape[-1] != count or not bool(teachers.isfinite().all()):
        shown = teachers[0].tolist() if teachers.shape[0] == 1 else f"a tensor of shape {tuple(teachers.shape)}"
        raise ValueError(
            f"mixture_weights must be {count} finite numbers, one per teacher (or such a row for every token), got "
            f"{shown}. They are the coefficients of the teachers' logits."
        )
    if own.shape[-1] != 1 or not bool(own.isfinite().all()):
        raise ValueError(
            f"student_coef must be a finite number or a tensor (N,) of them, got {student_coef!r}. It is the "
            "coefficient of the student's own logits."
        )
    rows = max(teachers.shape[0], own.shape[0])
    coefs = torch.cat([teachers.expand(rows, -1), own.expand(rows, -1)], dim=-1)
    total = coefs.sum(-1, keepdim=True)
    pivot = int(coefs.abs().sum(0).argmax())
    present = tuple(k for k in range(count + 1) if k != pivot and bool((coefs[:, k] != 0).any()))
    # Rounding must not keep equal models from being one to the bit
    return AffineTarget(coefs, torch.where((total - 1).abs() < 1e-12, 1.0, total), pivot, present)


def _contrast_target(weights: Sequence[float] | Tensor | None, scale: float, floor: float) -> ContrastTarget:
    if weights is not None and len(weights):
        raise ValueError(
            f"mixture_weights must be left out with mixture='contrast', got {weights!r}. The coefficient comes from "
            "how far the two teachers differ. Set contrast_scale and contrast_floor."
        )
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"contrast_scale must be a finite number, at least 0, got {scale!r}.")
    if not (math.isfinite(floor) and floor > 0):
        raise ValueError(
            f"contrast_floor must be a finite number above 0, got {floor!r}. The loss is divided by the coefficient, "
            "which is the floor where the two teachers agree."
        )
    return ContrastTarget(float(scale), float(floor))


def _columns(values: Sequence[float] | Tensor, take: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """`(1, M)`, or `(n, M)` of a tensor that has a row for each token; float64."""
    if not isinstance(values, Tensor):
        return torch.tensor([*values], dtype=torch.float64, device=like.device)[None]
    values = values.detach()
    values = take(values) if values.dim() == 2 else values.reshape(1, -1)
    return values.to(like.device, torch.float64)
