# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the fused divergence returns."""

from dataclasses import dataclass

from torch import Tensor

from .operands import Rows
from .problem import STATS, Problem


@dataclass
class FusedDivergence:
    """
    Result of [`fused_linear_divergence`]. Per-token tensors have shape `(N,)`, dtype float32 (float64 for float64
    inputs), are in nats, and are 0 on rows that were left out. Of several teachers they are those of the mixture; with
    `mixture="loss_sum"` the weighted means of each teacher's own (that of log-probs is the geometric mixture's up to
    its normaliser).

    Args:
        loss (`torch.Tensor`):
            Scalar Σ weight · divergence, differentiable in the student's hidden states, weight and bias.
        divergence (`torch.Tensor` or `None`):
            Value per token, on the support asked for. With `backend="liger"` this and all that follow except `rows`
            are `None`: Liger returns the scalar only, and projecting again for metrics would cost what it saves.
        forward_kl (`torch.Tensor`), reverse_kl (`torch.Tensor`):
            KL(teacher‖student) and KL(student‖teacher) per token, whatever the divergence. Over the whole vocabulary
            with a dense teacher; with a top-k teacher over its support and one bucket for the rest (a lower bound).
        student_entropy (`torch.Tensor`), teacher_entropy (`torch.Tensor`):
            Entropies. A top-k teacher's is that of the bucketed distribution (a lower bound).
        student_logprobs (`torch.Tensor` or `None`), teacher_logprobs (`torch.Tensor` or `None`):
            Log-probs of `target_ids`; `None` without them (the teacher's also with a top-k teacher).
        overlap (`torch.Tensor` or `None`):
            Share of the teacher's top `overlap_top_k` entries that are in the student's; `None` if not asked for.
        student_logsumexp (`torch.Tensor`), teacher_logsumexp (`torch.Tensor` or `None`):
            Log-normalisers of the final logits (after softcap and temperature); the teacher's if it is dense. An
            arithmetic mixture has the normaliser of its first teacher, a geometric one that of the mean logits.
        rows (`torch.Tensor`):
            Boolean mask of the rows that were projected. Like all of these, where the student's head is.
    """

    loss: Tensor
    divergence: Tensor | None
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    student_entropy: Tensor | None
    teacher_entropy: Tensor | None
    student_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    overlap: Tensor | None
    student_logsumexp: Tensor | None
    teacher_logsumexp: Tensor | None
    rows: Tensor


def make_result(
    loss: Tensor, stats: Tensor | None, per_token: dict[str, Tensor], rows: Rows, problem: Problem
) -> FusedDivergence:
    missing = set(STATS) if stats is None else set()
    if problem.target_ids is None:
        missing |= {"student_logprobs", "teacher_logprobs"}
    if not problem.all_dense:
        missing |= {"teacher_logprobs", "teacher_logsumexp"}
    if not problem.overlap_top_k:
        missing.add("overlap")
    if not problem.has_teacher:
        missing |= {"forward_kl", "reverse_kl", "teacher_entropy"}

    def spread(name: str, value: Tensor) -> Tensor | None:
        return None if name in missing else rows.spread(value)

    if not problem.has_teacher:
        missing.add("divergence")

    values: dict[str, Tensor | None] = dict.fromkeys(STATS)
    if stats is not None:
        values = {name: spread(name, per_token.get(name, stats[i])) for i, name in enumerate(STATS)}
    return FusedDivergence(loss=loss, rows=rows.mask, **values)
