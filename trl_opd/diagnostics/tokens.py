# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Diagnostics of a micro-batch's tokens, all from what its objective has computed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..collators import RoutedScores
from ..student import sampled_answer, sampled_ranks
from ..teachers.answers import answers
from .derived import loss_by_weight, moments
from .positions import Positions

if TYPE_CHECKING:
    from ..collators import Scores
    from ..config import OnPolicyDistillConfig
    from ..metrics import TokenMetrics
    from ..student import MicroBatch, StudentOutput


@dataclass
class Piece:
    """Sequences of a micro-batch about which the same is known. Tensors are `(R, T)`."""

    prefixes: tuple[str, ...]  # of the metrics' names
    rows: Tensor | None  # their indices, `(R,)`; `None` is all
    mask: Tensor  # tokens that are distilled
    gap: Tensor | None  # teacher's − student's log-prob of the sampled tokens
    reverse_kl: Tensor | None
    output: "StudentOutput | None" = None
    list_length: int | None = None  # of the teacher's top-k list, if it gave one

    def take(self, x: Tensor) -> Tensor:
        """These sequences of all."""
        return x if self.rows is None else x[self.rows]


def add_token_diagnostics(
    metrics: "TokenMetrics",
    batch: "MicroBatch",
    student_logprobs: Tensor,
    args: "OnPolicyDistillConfig",
    positions: Positions,
) -> None:
    """
    Add what a micro-batch tells.

    Args:
        metrics ([`TokenMetrics`]): Where to.
        batch ([`MicroBatch`]): Whose objective is formed.
        student_logprobs (`torch.Tensor`): The student's log-probs of the sampled tokens, detached, `(B, T)`.
        args ([`OnPolicyDistillConfig`]): The objective.
        positions ([`Positions`]): Buckets of token positions.
    """
    pieces = list(_pieces(batch, student_logprobs, args))
    given = None if batch.scores is None else sampled_ranks(batch.scores, batch.distill_mask.shape)
    for piece in pieces:
        if piece.output is not None:
            _add_distances(metrics, piece, piece.output)
        positions.add(metrics, {"distill/gap_at": piece.gap, "distill/reverse_kl_at": piece.reverse_kl}, piece.mask)
        _add_ranks(metrics, batch, piece, given, args)
        if piece.gap is not None and "rewards" in batch.inputs:
            _add_correlation(metrics, piece.take(batch.inputs["rewards"]), piece.gap, piece.mask)
    _add_weights(metrics, batch, pieces, args)
    if batch.old_logprobs is not None:
        _add_ratio(metrics, batch, student_logprobs, batch.old_logprobs)


def _pieces(batch: "MicroBatch", student_logprobs: Tensor, args: "OnPolicyDistillConfig") -> Iterator[Piece]:
    """The whole micro-batch, or the sequences of each kind if several teachers or divergences share it."""
    mask, output = batch.distill_mask, batch.output
    if output is None:
        assert batch.scores is not None
        gap = (sampled_answer(batch.scores, mask.shape) - student_logprobs).masked_fill(~mask, 0.0)
        # Of an affine combination the log-ratio lacks the normaliser
        estimate = torch.expm1(gap) - gap if args.target in ("teacher", "reward_tilt") else None
        yield Piece(("distill",), None, mask, gap, estimate)
    elif not batch.parts:
        yield _piece(("distill",), None, mask, output, _list_length(batch.scores))
    for name, rows, part in batch.parts:
        scores = batch.scores.parts[name][1] if isinstance(batch.scores, RoutedScores) else batch.scores
        yield _piece(("distill", f"distill/{name}"), rows, mask[rows], part, _list_length(scores))


def _piece(
    prefixes: tuple[str, ...], rows: Tensor | None, mask: Tensor, output: "StudentOutput", list_length: int | None
) -> Piece:
    gap = None
    if output.divergence is not None and output.teacher_logprobs is not None and output.log_probs is not None:
        gap = (output.teacher_logprobs - output.log_probs).detach()
    return Piece(prefixes, rows, mask, gap, output.reverse_kl, output, list_length)


def _list_length(scores: "Scores | None") -> int | None:
    """Entries of the teacher's list, the shortest of several; `None` if none gave one."""
    lists = [] if scores is None else [a.topk_ids for _, a in answers(scores) if a.hidden_states is None]
    return min((ids.shape[-1] for ids in lists if ids is not None), default=None)


def _add_distances(metrics: "TokenMetrics", piece: Piece, output: "StudentOutput") -> None:
    """`entropy_gap`, and on logged steps `overlap_advantage`."""
    named = {"overlap_advantage": output.overlap_advantage}
    if output.teacher_entropy is not None and output.entropy is not None:
        named["entropy_gap"] = (output.teacher_entropy - output.entropy).abs()
    for prefix in piece.prefixes:
        metrics.add_all({f"{prefix}/{name}": x for name, x in named.items() if x is not None}, piece.mask)


def _add_ranks(
    metrics: "TokenMetrics", batch: "MicroBatch", piece: Piece, given: Tensor | None, args: "OnPolicyDistillConfig"
) -> None:
    """
    `teacher_rank` and `rejected_share`, of the tokens whose rank is known: given by the teacher, or found out by the
    fused divergence. A token that is not in a teacher's list has the rank behind its last entry, and is rejected.
    """
    rank = None if piece.output is None else piece.output.teacher_rank
    if piece.list_length is not None and args.support == "student_top_k":
        rank = None  # the entries were the student's choice
    top = args.overlap_top_k
    rejected = None if rank is None else rank > min(top, piece.list_length or top)
    if given is not None:
        given = piece.take(given)
        has = given >= 1
        rank = given if rank is None else torch.where(has, given, rank.to(given.dtype))
        rejected = given > top if rejected is None else torch.where(has, given > top, rejected)
    if rank is None or rejected is None:
        return
    known = piece.mask & (rank >= 1)
    masks = dict.fromkeys(piece.prefixes, known)
    if piece.output is None:
        masks |= {f"distill/{name}": known & rows[:, None] for name, rows in batch.rows_by_teacher.items()}
    for prefix, mask in masks.items():
        metrics.add_all({f"{prefix}/teacher_rank": rank.clamp(min=1).log()}, mask, kind="geometric_mean")
        if top:
            metrics.add(f"{prefix}/rejected_share", rejected.to(rank.dtype), mask)


def _add_correlation(metrics: "TokenMetrics", rewards: Tensor, gap: Tensor, mask: Tensor) -> None:
    """`distill/reward_correlation`, of the completions that have a reward and a distilled token."""
    dtype = torch.float32 if gap.device.type == "mps" else torch.float64
    tokens = mask.sum(1)
    means = torch.where(mask, gap, 0.0).sum(1, dtype=dtype) / tokens.clamp(min=1)
    rewards = rewards.to(means)
    metrics.merge(
        "correlation", ("distill/reward_correlation",), moments(rewards, means, (tokens > 0) & rewards.isfinite())
    )


def _add_weights(
    metrics: "TokenMetrics", batch: "MicroBatch", pieces: list[Piece], args: "OnPolicyDistillConfig"
) -> None:
    """`distill/effective_sample_size` and `distill/loss_share/...`, where tokens have weights."""
    mask = batch.distill_mask
    importance = batch.importance
    if importance is None:
        importance = batch.inputs.get("importance_sampling_ratio")
    weights = _product(batch.token_weights, batch.factors, importance)
    if weights is None:
        return
    weights = weights.detach().expand(mask.shape)
    kept = torch.where(mask, weights, 0.0).to(torch.float32 if weights.device.type == "mps" else torch.float64)
    sums = torch.stack([mask.sum().to(kept.dtype), kept.sum(), kept.square().sum()])[:, None]
    metrics.merge("effective_sample_size", ("distill/effective_sample_size",), sums)
    loss = None
    if batch.advantages is not None and args.credit == "policy_gradient":  # they hold the other weights
        loss = _product(batch.advantages, None, importance)
    elif args.credit == "k2":
        gap = pieces[0].gap if len(pieces) == 1 and args.target == "teacher" else None
        loss = None if gap is None else gap.square() * weights / 2
    elif batch.output is not None and batch.output.divergence is not None:
        loss = batch.output.divergence.detach() * weights
    if loss is not None:
        metrics.merge("loss_by_weight", ("distill/loss_share",), loss_by_weight(loss.detach(), weights, mask))


def _product(tokens: Tensor | None, sequences: Tensor | None, importance: Tensor | None) -> Tensor | None:
    """The product of the weights `(B, T)`, `(B,)` and `(B, T)` or `(B, 1)` that there are."""
    product = tokens
    for factor in (None if sequences is None else sequences[:, None], importance):
        if factor is not None:
            product = factor if product is None else product * factor
    return product


def _add_ratio(metrics: "TokenMetrics", batch: "MicroBatch", logprobs: Tensor, old: Tensor) -> None:
    """`distill/importance_ratio` and its maximum: exp(log-prob now − then), of the tokens that the student sampled."""
    mask = batch.loss_mask
    if "on_policy" in batch.inputs:
        mask = mask & batch.inputs["on_policy"].bool()[:, None]
    difference = logprobs - old
    difference = difference if difference.device.type == "mps" else difference.double()
    ratio = difference.masked_fill(~mask, 0.0).exp()
    metrics.add("distill/importance_ratio", ratio, mask)
    largest = ratio.masked_fill(~mask, -torch.inf).amax()
    metrics.merge("max", ("distill/importance_ratio_max",), largest.view(1, 1))
