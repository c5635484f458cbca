# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the fused divergence returns."""

from dataclasses import dataclass, field

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

    With `mixture="affine"` or `"contrast"` what is said of the teacher (both KLs, `teacher_entropy`,
    `teacher_logprobs`, `teacher_logsumexp`, `overlap`, `overlap_advantage`, `further`) is that of the first teacher,
    whose units users know and on whose entropy gates depend; `divergence` alone is from the target.

    Args:
        loss (`torch.Tensor`):
            Scalar Σ token_weights · weights · divergence, differentiable in the student's hidden states, weight and
            bias.
        divergence (`torch.Tensor` or `None`):
            Value per token, on the support asked for; with `mixture="contrast"` divided by `target_coef`. With
            `backend="liger"` this and all that follow except `rows` are `None`: Liger returns the scalar only, and
            projecting again for metrics would cost what it saves.
        forward_kl (`torch.Tensor`), reverse_kl (`torch.Tensor`):
            KL(teacher‖student) and KL(student‖teacher) per token, whatever the divergence. Over the whole vocabulary
            with a dense teacher; with a top-k teacher over its support and one bucket for the rest (a lower bound).
        student_entropy (`torch.Tensor`), teacher_entropy (`torch.Tensor`):
            Entropies. A top-k teacher's is that of the bucketed distribution (a lower bound).
        student_logprobs (`torch.Tensor` or `None`), teacher_logprobs (`torch.Tensor` or `None`):
            Log-probs of `target_ids`; `None` without them (the teacher's also with a top-k teacher).
        overlap (`torch.Tensor` or `None`):
            Share of the teacher's top `overlap_top_k` entries that are in the student's; `None` if not asked for.
        overlap_advantage (`torch.Tensor` or `None`):
            How far the two agree on the entries in both top sets, at most 0; 0 where they agree, and where no entry is
            in both. See `supports.overlap_advantage`; `None` as `overlap`.
        student_logsumexp (`torch.Tensor`), teacher_logsumexp (`torch.Tensor` or `None`):
            Log-normalisers of the final logits (after softcap and temperature); the teacher's if it is dense. An
            arithmetic mixture has the normaliser of its first teacher, a geometric one that of the mean logits.
        rows (`torch.Tensor`):
            Boolean mask of the rows that were projected. Like all of these, where the student's head is.
        target_coef (`torch.Tensor` or `None`):
            The coefficient w of `mixture="contrast"`, by which the divergence from its target has been divided.
        further (`dict[str, torch.Tensor]`): The `statistics` asked for, by name.
        weights (`torch.Tensor` or `None`): What `token_weighting` returned.
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
    overlap_advantage: Tensor | None
    student_logsumexp: Tensor | None
    teacher_logsumexp: Tensor | None
    rows: Tensor
    target_coef: Tensor | None = None
    further: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None


def make_result(
    loss: Tensor, stats: Tensor | None, per_token: dict[str, Tensor], rows: Rows, problem: Problem
) -> FusedDivergence:
    values: dict[str, Tensor] = {}
    if stats is not None:
        found = dict(zip(problem.stat_names, stats, strict=True)) | per_token
        values = {name: rows.spread(found[name]) for name in problem.known}
    further = {name: values.pop(name) for name in problem.further if name in values}
    return FusedDivergence(loss=loss, rows=rows.mask, further=further, **(dict.fromkeys(STATS) | values))
