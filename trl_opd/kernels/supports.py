# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Divergences on a part of the vocabulary: which entries, what becomes of the rest, and the gradient that follows.

A support K is a set of ids a row. Its tail is one of
- `bucket`: one more entry holds each distribution's remaining mass; never above the full divergence (I8b);
- `renormalize`: both are renormalised on K; entries outside K get no gradient;
- `none`: the raw partial sum over K (reverse KL then pushes mass out of K, I8c; forward KL does not, I8d).

A row whose support holds no entry (an intersection may be empty, a teacher's list may be all padding) has value 0 and
gradient exactly 0 with every tail.

The small `(n, K + 1)` problem is solved by autograd through `trl_opd.losses` in float64; where the vocabulary is
spread over processes, by each of them alike.
Shapes: n rows, V what this process holds of the vocabulary, K support. Ids are global; those below 0 are padding.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses import DIVERGENCES, forward_kl, reverse_kl
from .rows import ABSENT, Normalized
from .vocab_parallel import VocabShard

SUPPORTS = ("full", "teacher_top_k", "student_top_k", "union_top_k", "intersection_top_k", "sampled")
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


def check_topk(ids: Tensor, logprobs: Tensor, vocab_size: int) -> None:
    """Refuse a sparse teacher that is not `(n, K)` ids and log-probs, or that names an entry twice in a row."""
    if ids.dim() != 2 or ids.shape != logprobs.shape or ids.shape[1] == 0 or ids.dtype.is_floating_point:
        raise ValueError(
            "teacher_topk must be whole-numbered ids (N, K) and log-probs (N, K), K at least 1, got "
            f"{tuple(ids.shape)} of {ids.dtype} and {tuple(logprobs.shape)}."
        )
    repeated = repeated_id(ids, vocab_size)
    if repeated is not None:
        raise ValueError(
            f"teacher_topk ids of a row must be distinct, got one with {repeated} twice. Its probability would count "
            "twice. Pad short rows with ids below 0."
        )


def repeated_id(ids: Tensor, vocab_size: int | None) -> int | None:
    """An entry of the vocabulary that a row `(..., K)` names twice, or `None`."""
    ordered = ids.sort(dim=-1).values
    ordered, before = ordered[..., 1:], ordered[..., :-1]
    twice = (ordered == before) & (ordered >= 0)
    if vocab_size is not None:
        twice &= ordered < vocab_size
    return int(ordered[twice][0]) if bool(twice.any()) else None


def select_ids(
    student_logprobs: Tensor, teacher_logprobs: Tensor, support: str, size: int, shard: VocabShard
) -> Tensor:
    """
    Ids of the support from dense log-probs, `(n, K)`: K = `size`, or twice that with padding for the union; the
    intersection is padded too.
    """
    size = min(size, shard.total)
    if support in ("student_top_k", "teacher_top_k"):
        return shard.top_k(student_logprobs if support == "student_top_k" else teacher_logprobs, k=size)[0][1]
    (_, student_ids), (_, teacher_ids) = shard.top_k(student_logprobs, teacher_logprobs, k=size)
    ordered = teacher_ids.sort(dim=-1).values
    place = torch.searchsorted(ordered, student_ids).clamp_(max=size - 1)
    common = ordered.gather(-1, place) == student_ids
    if support == "intersection_top_k":
        return student_ids.masked_fill(~common, -1)
    return torch.cat([teacher_ids, student_ids.masked_fill(common, -1)], dim=-1)


def dense_support(student: Normalized, teacher: Normalized, ids: Tensor, shard: VocabShard, complete: bool) -> Support:
    """The support `ids` of two dense distributions."""
    student_logprobs, teacher_logprobs, student_rest, teacher_rest = shard.sum(
        shard.at(student.logprobs, ids),
        shard.at(teacher.logprobs, ids),
        *rest_mass(shard.local(ids), student.probs, teacher.probs),
    )
    padding = ids < 0
    student_logprobs, teacher_logprobs = (
        x.masked_fill(padding, -math.inf) for x in (student_logprobs, teacher_logprobs)
    )
    return Support(ids, student_logprobs, teacher_logprobs, student_rest, teacher_rest, complete)


def sparse_support(student: Normalized, ids: Tensor, teacher_logprobs: Tensor, shard: VocabShard) -> Support:
    """The support `ids` of a dense student and a teacher of which it is all that is known."""
    ids = ids.masked_fill(ids >= shard.total, -1)  # an entry that the student lacks is part of the rest
    logprobs, rest = shard.sum(shard.at(student.logprobs, ids), *rest_mass(shard.local(ids), student.probs))
    return known_teacher(ids, logprobs, rest, teacher_logprobs, shard.total)


def known_teacher(
    ids: Tensor, student_logprobs: Tensor, student_rest: Tensor, teacher_logprobs: Tensor, vocab_size: int
) -> Support:
    """The support `ids` (n, K) of a teacher of which it is all that is known."""
    padding = ids < 0
    teacher_logprobs = teacher_logprobs.to(student_logprobs.dtype).masked_fill(padding, -math.inf)
    # The teacher's rest is a difference of rounded numbers: below their resolution it is unknown, but not zero
    limits = torch.finfo(student_logprobs.dtype)
    return Support(
        ids,
        student_logprobs.masked_fill(padding, -math.inf),
        teacher_logprobs,
        student_rest.clamp(min=limits.tiny),
        (1 - teacher_logprobs.exp().sum(-1)).clamp(min=limits.eps),
        complete=ids.shape[1] >= vocab_size and not bool(padding.any()),
    )


def rest_mass(columns: Tensor, *probs: Tensor) -> list[Tensor]:
    """
    Probability outside `columns` in each of `probs`, summed entry by entry: 1 − Σ would lose it to rounding. Columns
    below 0 are padding.
    """
    real = columns.amax(-1, keepdim=True)
    index = torch.where(columns < 0, real.clamp(min=0), columns)
    rests = []
    for p in probs:
        kept = p.gather(-1, index)
        rest = p.scatter_(-1, index, 0.0).sum(-1)
        p.scatter_(-1, index, kept)  # cheaper than a copy of the rows
        rests.append(rest + torch.where(real[:, 0] < 0, kept[:, 0], 0.0))  # all padding took the first column out
    return rests


def scatter_valid(target: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """
    Write `values` at `columns` of each row in place, leaving padding out.

    Padding repeats the row's largest entry; where there is none it writes back what stands in the first column.
    """
    column, place = columns.max(-1, keepdim=True)
    value = torch.where(column < 0, target[:, :1], values.gather(-1, place))
    padding = columns < 0
    index = torch.where(padding, column.clamp(min=0), columns)
    return target.scatter_(-1, index, torch.where(padding, value, values))


def _double(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


def _with_bucket(logprobs: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([logprobs, rest.log().unsqueeze(-1)], dim=-1)


def support_divergence(support: Support, divergence: str, params: dict[str, Any], tail: str) -> SupportResult:
    """
    A divergence on a support, and its gradient in the student's logits.

    Args:
        support ([`Support`]): Both distributions on the support.
        divergence (`str`): A resolved name (see `trl_opd.losses.resolve_divergence`).
        params (`dict[str, Any]`): Its parameters.
        tail (`str`): `"bucket"`, `"renormalize"` or `"none"`.

    Returns:
        [`SupportResult`] in float64 (float32 on MPS). Value and gradient of a row without entries are 0.
    """
    nothing = (support.ids < 0).all(-1)
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
        value.detach().masked_fill(nothing, 0.0),
        on_support,
        outside.masked_fill(nothing, 0.0),
        forward_kl(student_all, teacher_all),
        reverse_kl(student_all, teacher_all),
        entropy,
    )


def overlap_share(student_top: Tensor, at_teacher_ids: Tensor) -> Tensor:
    """
    Share of the teacher's top K that are in the student's, from the student's largest log-probs (n, K) and those at
    the teacher's entries (n, K), `-inf` at padding.
    """
    return (at_teacher_ids >= student_top[:, -1:]).to(student_top.dtype).mean(-1)


def overlap_advantage(student_top: Tensor, at_teacher_ids: Tensor, teacher_top: Tensor) -> Tensor:
    r"""
    Overlap-token advantage: 1/|I| Σ_{v in I} s̄(v) (log t̄(v) − log s̄(v)) in nats, which is −KL(s̄‖t̄) / |I|.

    I holds the entries in both models' top K, s̄ and t̄ are their distributions renormalised on it. Never above 0, and 0
    exactly where the two agree on I. It is the share of each common entry: times |I| = K · overlap it is −KL(s̄‖t̄).

    Args:
        student_top (`torch.Tensor`): The student's largest log-probs, `(n, K)`.
        at_teacher_ids (`torch.Tensor`): Its log-probs at the teacher's top K entries, `(n, K)`, `-inf` at padding.
        teacher_top (`torch.Tensor`): The teacher's own at those entries, `(n, K)`, likewise.

    Returns:
        `torch.Tensor`: `(n,)`, float64 (float32 on MPS).

    Paper: "Rethinking On-Policy Distillation of Large Language Models" (https://arxiv.org/abs/2604.13016), Eq. 7.
    Deviations: where I is empty, and the paper's mean over it undefined, the value is 0 (read it beside the overlap).
    Entries that a model gives no probability are not in I, or one of them would make the value infinite. Of entries
    that tie for a model's last place all belong to its top K, or, of the teacher's in PyTorch, as many as fit.

    Other codes under this name: verl (pull request 6469) weighs with the teacher's probabilities,
    −1/|I| Σ t (log t − log s), and does not renormalise, so that its value may be above 0; some take the sum over I
    instead of the mean, and some leave tokens without a common entry out of the mean over tokens.
    """
    common = (at_teacher_ids >= student_top[:, -1:]) & (at_teacher_ids > ABSENT) & (teacher_top > ABSENT)
    student, teacher = (
        _double(x).masked_fill(~common, -math.inf).log_softmax(-1) for x in (at_teacher_ids, teacher_top)
    )
    terms = torch.where(common, student.exp() * (teacher - student), 0.0)  # nothing but NaN where no entry is common
    return (terms.sum(-1) / common.sum(-1).clamp(min=1)).clamp(max=0.0)
