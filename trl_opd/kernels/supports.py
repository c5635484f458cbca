# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Divergences on a part of the vocabulary: which entries, what becomes of the rest, and the gradient that follows.

A support K is a set of ids a row. Its tail is one of
- `bucket`: one more entry holds each distribution's remaining mass; never above the full divergence (I8b);
- `renormalize`: both are renormalised on K; entries outside K get no gradient;
- `none`: the raw partial sum over K (reverse KL then pushes mass out of K, I8c; forward KL does not, I8d).

The small `(n, K + 1)` problem is solved by autograd through `trl_opd.losses` in float64.
Shapes: n rows, V vocabulary, K support. Ids below 0 are padding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import DIVERGENCES, forward_kl, reverse_kl

SUPPORTS = ("full", "teacher_top_k", "student_top_k", "union_top_k", "sampled")
TAILS = ("bucket", "renormalize", "none")


class Support(NamedTuple):
    """Log-probs of both distributions on the support, and the mass each leaves outside."""

    ids: Tensor  # (n, K), below 0 is padding
    student_logprobs: Tensor  # (n, K)
    teacher_logprobs: Tensor  # (n, K)
    student_rest: Tensor  # (n,), probability outside the support
    teacher_rest: Tensor  # (n,)
    complete: bool  # whether the support is the whole vocabulary


class SupportResult(NamedTuple):
    value: Tensor  # (n,)
    support_gradient: Tensor  # (n, K), in the student's logits on the support
    outside: Tensor  # (n,), the gradient outside the support is this times the student's probability
    forward_kl: Tensor  # (n,), with a bucket for the rest
    reverse_kl: Tensor  # (n,)
    teacher_entropy: Tensor  # (n,)


def select_ids(student_logprobs: Tensor, teacher_logprobs: Tensor, support: str, size: int) -> Tensor:
    """Ids of the support, `(n, K)` (K = `size`, or twice that with padding for the union), from dense log-probs."""
    size = min(size, student_logprobs.shape[-1])
    if support == "student_top_k":
        return student_logprobs.topk(size, dim=-1).indices
    teacher_ids = teacher_logprobs.topk(size, dim=-1).indices
    if support == "teacher_top_k":
        return teacher_ids
    student_ids = student_logprobs.topk(size, dim=-1).indices
    known = (student_ids.unsqueeze(2) == teacher_ids.unsqueeze(1)).any(-1)
    return torch.cat([teacher_ids, student_ids.masked_fill(known, -1)], dim=-1)


def gather_logprobs(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probs `(n, K)` at `ids`, `-inf` at padding."""
    return logprobs.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)


def rest_mass(probs: Tensor, ids: Tensor) -> Tensor:
    """Probability outside `ids`, summed entry by entry: 1 − Σ would lose it to rounding."""
    return scatter_valid(probs.clone(), ids, torch.zeros_like(ids, dtype=probs.dtype)).sum(-1)


def scatter_valid(target: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Write `values` at `ids` of each row in place, leaving padding out (it repeats the row's first real entry)."""
    padding = ids < 0
    first = padding.long().argmin(-1, keepdim=True)
    ids = torch.where(padding, ids.gather(-1, first), ids)
    values = torch.where(padding, values.gather(-1, first), values)
    return target.scatter_(-1, ids, values)


def _double(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


def _with_bucket(logprobs: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([logprobs, rest.log().unsqueeze(-1)], dim=-1)


def support_divergence(support: Support, divergence: str, params: dict[str, float], tail: str) -> SupportResult:
    """
    A divergence on a support, and its gradient in the student's logits.

    Args:
        support ([`Support`]): Both distributions on the support.
        divergence (`str`): A resolved name (see `trl_opd.losses.resolve_divergence`).
        params (`dict[str, float]`): Its parameters.
        tail (`str`): `"bucket"`, `"renormalize"` or `"none"`.

    Returns:
        [`SupportResult`] in float64 (float32 on MPS).
    """
    student, teacher = _double(support.student_logprobs), _double(support.teacher_logprobs)
    student_rest, teacher_rest = _double(support.student_rest), _double(support.teacher_rest)
    if support.complete:
        student_all, teacher_all = student, teacher
    else:
        student_all, teacher_all = _with_bucket(student, student_rest), _with_bucket(teacher, teacher_rest)
    # The bucketed masses come from rounded numbers: make them sum to one, or a KL of 1e-7 drowns in the difference
    student_all = student_all - student_all.logsumexp(-1, keepdim=True)
    teacher_all = teacher_all - teacher_all.logsumexp(-1, keepdim=True)

    with torch.enable_grad():
        if tail == "bucket":
            s, t = student_all, teacher_all
        elif tail == "renormalize":
            s = student - student.logsumexp(-1, keepdim=True)
            t = teacher - teacher.logsumexp(-1, keepdim=True)
        else:
            s, t = student, teacher
        s = s.detach().requires_grad_()
        value = DIVERGENCES[divergence](s, t.detach(), **params)
        (a,) = torch.autograd.grad(value.sum(), s)
    total = a.sum(-1)

    on_support = a[:, : student.shape[-1]] - s.detach()[:, : student.shape[-1]].exp() * total[:, None]
    if tail == "renormalize":
        outside = torch.zeros_like(total)
    elif tail == "bucket" and not support.complete:
        outside = torch.where(student_rest > 0, a[:, -1] / student_rest, 0.0) - total
    else:
        outside = -total
    teacher_probs = teacher_all.exp()
    entropy = -(teacher_probs * teacher_all.clamp(min=-1e30)).sum(-1)
    return SupportResult(
        value.detach(),
        on_support,
        outside,
        forward_kl(student_all, teacher_all),
        reverse_kl(student_all, teacher_all),
        entropy,
    )
