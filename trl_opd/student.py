# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""One micro-batch of distillation: the request that travels into the student's forward, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .collators import RoutedScores, Scores, TeacherScores
from .heads import HeadCall
from .kernels.projection import Head
from .teachers.answers import TeacherScoreError, answers

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer


@dataclass
class StudentOutput(ModelOutput):
    """
    Output of the student's forward with a distillation head. Per-token tensors are `(B, T)`, 0 outside the loss mask.

    `log_probs` and `entropy` are what GRPO's loss reads; with gradient only if it was asked for.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    divergence: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    overlap: Tensor | None = None
    overlap_advantage: Tensor | None = None
    teacher_logsumexp: Tensor | None = None
    token_weights: Tensor | None = None
    target_coef: Tensor | None = None
    # Further statistics, where they are asked for
    hellinger: Tensor | None = None
    total_variation: Tensor | None = None
    accepted: Tensor | None = None
    teacher_margin: Tensor | None = None
    teacher_rank: Tensor | None = None
    student_rank: Tensor | None = None
    teacher_max_logprob: Tensor | None = None


@dataclass
class MicroBatch:
    """State of one `_compute_loss` call."""

    inputs: dict[str, Any]
    loss_mask: Tensor  # (B, T), tokens of GRPO's loss
    distill_mask: Tensor  # (B, T), those of them that the distillation trains
    reduction: Tensor  # (B, T), weights of the one reduction
    weights: Tensor  # (B, T), those times the factors
    factors: Tensor | None = None  # (B,), of whole completions; `None` if all are 1
    old_logprobs: Tensor | None = None  # (B, T), of the sampled tokens when they were sampled, as GRPO found them
    scores: Scores | None = None
    teachers: Sequence[str] = ()  # names of a routed teacher's members
    # What the student's forward gives
    output: StudentOutput | None = None
    parts: Sequence[tuple[str, Tensor, StudentOutput]] = ()  # of each kind of sequences, with their indices
    # What the objective makes of it
    direct: Tensor | None = None  # the loss beside GRPO's surrogate, before its coefficient
    token_weights: Tensor | None = None  # (B, T)
    advantages: Tensor | None = None  # (B, T), the distillation's
    importance: Tensor | None = None  # (B, T), weights of the ratio to the sampling policy

    @property
    def rows_by_teacher(self) -> dict[str, Tensor]:
        """Which sequences go to each of several teachers, boolean `(B,)`."""
        return {name: self.inputs["teacher_index"] == i for i, name in enumerate(self.teachers)}


@torch.no_grad()
def student_top_ids(trainer: "OnPolicyDistillTrainer", inputs: dict[str, Tensor]) -> Tensor:
    """The student's `support_size` likeliest entries at every completion token of a generation batch, `(B, T, K)`."""
    size, rows = trainer.args.support_size, trainer.args.per_device_train_batch_size
    num_tokens = inputs["completion_ids"].shape[1]
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

    def call(hidden_states: Tensor, head: Head, aux_loss: Tensor | None) -> StudentOutput:
        weight = head.weight[: trainer.shared_vocab_size]
        bias = None if head.bias is None else head.bias[: trainer.shared_vocab_size]
        top = [
            torch.nn.functional.linear(x.to(weight.dtype), weight, bias).topk(min(size, len(weight)), dim=-1).indices
            for sequence in hidden_states[:, -num_tokens - 1 : -1]
            for x in sequence.split(256)
        ]
        return StudentOutput(overlap=torch.cat(top).view(len(hidden_states), num_tokens, -1))

    ids = [
        trainer.model(input_ids=ids, attention_mask=mask, head_call=HeadCall(call)).overlap
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
    ]
    return torch.cat(ids)


def sampled_answer(scores: Scores, shape: torch.Size) -> Tensor:
    """The sampled tokens' log-probs under the teacher(s), `(B, T)`."""
    if isinstance(scores, RoutedScores):
        parts = [(rows, sampled_answer(answer, shape)) for rows, answer in scores.parts.values()]
        whole = torch.zeros(shape, dtype=parts[0][1].dtype, device=parts[0][1].device)
        for rows, logprobs in parts:
            whole[rows] = logprobs.to(whole.dtype)
        return whole
    assert isinstance(scores, TeacherScores) and scores.sampled_logprobs is not None
    return scores.sampled_logprobs


def sampled_ranks(scores: Scores, shape: torch.Size) -> Tensor | None:
    """
    The sampled tokens' ranks under the teacher(s) as the teachers gave them, `(B, T)` float32: 1 is the best, 0 where
    none is known. `None` where no teacher gave any; a mixture has none.
    """
    if isinstance(scores, RoutedScores):
        parts = [(rows, sampled_ranks(answer, shape)) for rows, answer in scores.parts.values()]
        whole: Tensor | None = None
        for rows, ranks in parts:
            if ranks is not None:
                whole = ranks.new_zeros(shape) if whole is None else whole
                whole[rows] = ranks
        return whole
    return scores.sampled_ranks if isinstance(scores, TeacherScores) else None


def require_scores(scores: Scores, credit: str, name: str) -> None:
    """Refuse scores that the objective cannot use, naming what to set."""
    for _, answer in answers(scores):
        _require(answer, credit, name)


def _require(scores: TeacherScores, credit: str, name: str) -> None:
    distribution = scores.hidden_states is not None or scores.topk_ids is not None
    if credit != "direct" and scores.hidden_states is None and scores.sampled_logprobs is None:
        raise TeacherScoreError(
            f"Teacher {name!r} must return sampled_logprobs for credit={credit!r}. The advantage is made of them. "
            "Return them, or set credit='direct'."
        )
    if credit in ("direct", "combined") and not distribution:
        raise TeacherScoreError(
            f"Teacher {name!r} returned sampled-token log-probs only, which credit={credit!r} cannot use: a "
            "divergence needs a distribution. Set credit='policy_gradient', support='sampled', or return topk_ids and "
            "topk_logprobs."
        )


def find_bad_token(output: StudentOutput, mask: Tensor) -> tuple[int, int, float] | None:
    """
    First `(sequence, token, value)` of the loss at which a dense teacher's distribution is NaN or infinite, or the
    divergence is NaN though the student is not: then it is a reference model of the target.
    """
    bad = torch.zeros_like(mask)
    value = None
    divergence = None
    if output.divergence is not None and output.entropy is not None:
        divergence = output.divergence.detach().masked_fill(output.entropy.isnan(), 0.0)
    for tensor in (output.teacher_entropy, output.teacher_logprobs, divergence):
        if tensor is not None:
            broken = torch.isnan(tensor) if tensor is divergence else ~torch.isfinite(tensor) | (tensor < -1e20)
            value = tensor if value is None else torch.where(bad, value, tensor)
            bad = bad | broken
    where = (bad & mask).nonzero()
    if value is None or not where.numel():
        return None
    row, token = where[0].tolist()
    return row, token, float(value[row, token])


def find_bad_loss(output: StudentOutput) -> str | None:
    """What is wrong with the loss where it is all that is known (Liger); `None` if nothing is."""
    assert output.loss is not None
    loss = output.loss.detach()
    if output.teacher_entropy is not None or bool(torch.isfinite(loss)):
        return None
    return f"the loss is {float(loss)} (loss_backend='liger' does not tell at which token, 'torch' does)"
