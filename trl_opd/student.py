# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""One micro-batch of distillation: the request that travels into the student's forward, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .collators import MixedScores, RoutedScores, Scores, TeacherScores
from .config import OnPolicyDistillConfig
from .heads import HeadCall, gather_heads
from .kernels import fused_linear_divergence
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


@dataclass
class MicroBatch:
    """State of one `_compute_loss` call."""

    inputs: dict[str, Any]
    loss_mask: Tensor  # (B, T), tokens of GRPO's loss
    distill_mask: Tensor  # (B, T), those of them that the distillation trains
    weights: Tensor  # (B, T), of the one reduction
    scores: Scores | None = None
    output: StudentOutput | None = None
    teachers: Sequence[str] = ()  # names of a routed teacher's members
    parts: Sequence[tuple[str, Tensor, StudentOutput]] = ()  # of those, with the indices of their sequences

    @property
    def rows_by_teacher(self) -> dict[str, Tensor]:
        """Which sequences go to each of several teachers, boolean `(B,)`."""
        return {name: self.inputs["teacher_index"] == i for i, name in enumerate(self.teachers)}


def distillation_head(
    batch: MicroBatch,
    scores: Scores,
    args: OnPolicyDistillConfig,
    *,
    vocab_size: int | None,
    per_token_grad: bool,
    overlap_top_k: int,
) -> HeadCall:
    """
    The call that the student's forward makes with its hidden states.

    Args:
        batch ([`MicroBatch`]): Masks, weights and sampled tokens.
        scores ([`TeacherScores`], [`MixedScores`] or [`RoutedScores`]): Hidden states and heads, or top-k log-probs.
        args ([`OnPolicyDistillConfig`]): The objective.
        vocab_size (`int`, *optional*): Leading head entries to compare.
        per_token_grad (`bool`): Whether log-probs and entropy must carry gradient.
        overlap_top_k (`int`): Size of the top sets to compare, 0 for none.
    """
    target_ids: Tensor = batch.inputs["completion_ids"]
    num_tokens = target_ids.shape[1]
    # GRPO's own metrics want every token of its loss; Liger knows no token weights, so it sees the trained ones only
    tokens = batch.distill_mask if args.loss_backend == "liger" else batch.loss_mask
    common: dict[str, Any] = {
        "divergence": args.divergence,
        "divergence_kwargs": args.divergence_kwargs,
        "temperature": args.divergence_temperature,
        "support_size": args.support_size,
        "tail": args.support_tail,
        "overlap_top_k": overlap_top_k,
        "per_token_grad": per_token_grad,
        "vocab_size": vocab_size,
        "chunk_bytes": None if args.loss_chunk_mib is None else args.loss_chunk_mib << 20,
        "backend": args.loss_backend,
    }

    def part(
        hidden_states: Tensor, head: Head, rows: Tensor | None, answer: TeacherScores | MixedScores
    ) -> StudentOutput:
        def take(x: Tensor) -> Tensor:
            return (x if rows is None else x[rows]).flatten(0, 1)

        teacher = _teacher_operands(answer)
        sparse = isinstance(answer, TeacherScores) and answer.hidden_states is None
        result = fused_linear_divergence(
            take(hidden_states),
            head.weight,
            token_weights=take(batch.weights),
            mask=take(tokens),
            target_ids=take(target_ids),
            student_bias=head.bias,
            student_logit_scale=head.logit_scale,
            student_softcap=head.softcap,
            support="teacher_top_k" if sparse and args.support == "full" else args.support,
            gather=gather_heads(head.weight, head.bias, *_parameters(answer)),
            **teacher,
            **common,
        )

        def view(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.view(-1, num_tokens)

        output = StudentOutput(loss=result.loss, log_probs=view(result.student_logprobs))
        output.entropy = view(result.student_entropy)
        for name in ("divergence", "forward_kl", "reverse_kl", "teacher_entropy", "teacher_logprobs", "overlap"):
            setattr(output, name, view(getattr(result, name)))
        if output.teacher_logprobs is None and output.divergence is not None and isinstance(answer, TeacherScores):
            output.teacher_logprobs = answer.sampled_logprobs
        return output

    def call(hidden_states: Tensor, head: Head, aux_loss: Tensor | None) -> StudentOutput:
        hidden_states = hidden_states[:, -num_tokens - 1 : -1]
        if isinstance(scores, RoutedScores):
            batch.parts = [
                (name, rows, part(hidden_states, head, rows, answer)) for name, (rows, answer) in scores.parts.items()
            ]
            output = _assemble(batch.parts, target_ids.shape, hidden_states)
        else:
            output = part(hidden_states, head, None, scores)
        zeros = hidden_states.new_zeros(target_ids.shape, dtype=torch.float32)
        output.log_probs = zeros if output.log_probs is None else output.log_probs
        output.entropy = zeros if output.entropy is None else output.entropy
        output.aux_loss = aux_loss
        return output

    return HeadCall(call)


def _teacher_operands(answer: TeacherScores | MixedScores) -> dict[str, Any]:
    """The fused divergence's arguments about one or several teachers."""
    members = answer.members if isinstance(answer, MixedScores) else [answer]
    dense = [m.head if m.hidden_states is not None else None for m in members]
    operands: dict[str, list[Any]] = {
        "teacher_hidden": [None if m.hidden_states is None else m.hidden_states.flatten(0, 1) for m in members],
        "teacher_weight": [None if head is None else head.weight for head in dense],
        "teacher_bias": [None if head is None else head.bias for head in dense],
        "teacher_logit_scale": [1.0 if head is None else head.logit_scale for head in dense],
        "teacher_softcap": [None if head is None else head.softcap for head in dense],
        "teacher_topk": [None if m.hidden_states is not None else _topk(m) for m in members],
    }
    if not isinstance(answer, MixedScores):
        return {name: values[0] for name, values in operands.items()}
    return {**operands, "mixture": answer.mixture, "mixture_weights": answer.weights}


def _topk(answer: TeacherScores) -> tuple[Tensor, Tensor]:
    assert answer.topk_ids is not None and answer.topk_logprobs is not None
    return answer.topk_ids.flatten(0, 1), answer.topk_logprobs.flatten(0, 1)


def _parameters(answer: TeacherScores | MixedScores) -> list[Tensor | None]:
    members = answer.members if isinstance(answer, MixedScores) else [answer]
    return [x for m in members if m.head is not None for x in (m.head.weight, m.head.bias)]


def _assemble(
    parts: Sequence[tuple[str, Tensor, StudentOutput]], shape: torch.Size, hidden_states: Tensor
) -> StudentOutput:
    """One output of several whose sequences are the given rows. What some part does not know is left out."""
    output = StudentOutput(loss=hidden_states[:0].sum())  # in the graph of a batch without any part, too
    for _, _, part in parts:
        output.loss = output.loss + part.loss  # type: ignore[operator]
    for f in fields(StudentOutput):
        values = [getattr(part, f.name) for _, _, part in parts]
        if f.name in ("loss", "aux_loss") or not parts or any(value is None for value in values):
            continue
        whole = torch.zeros(shape, dtype=values[0].dtype, device=values[0].device)
        for (_, rows, _), value in zip(parts, values, strict=True):
            whole = whole.index_copy(0, rows, value.to(whole.dtype))
        setattr(output, f.name, whole)
    return output


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


def require_scores(scores: Scores, credit: str, name: str) -> None:
    """Refuse scores that the objective cannot use, naming what to set."""
    for _, answer in answers(scores):
        _require(answer, credit, name)


def _require(scores: TeacherScores, credit: str, name: str) -> None:
    if credit == "policy_gradient":
        if scores.sampled_logprobs is None:
            raise TeacherScoreError(
                f"Teacher {name!r} must return sampled_logprobs for credit='policy_gradient'. The advantage is made "
                "of them. Return them, or set credit='direct'."
            )
    elif scores.hidden_states is None and scores.topk_ids is None:
        raise TeacherScoreError(
            f"Teacher {name!r} returned sampled-token log-probs only, which credit='direct' cannot use: a divergence "
            "needs a distribution. Set credit='policy_gradient', support='sampled', or return topk_ids and "
            "topk_logprobs."
        )


def find_bad_token(output: StudentOutput, mask: Tensor) -> tuple[int, int, float] | None:
    """First `(sequence, token, value)` of the loss at which a dense teacher's distribution is NaN or infinite."""
    bad = torch.zeros_like(mask)
    value = None
    for tensor in (output.teacher_entropy, output.teacher_logprobs):
        if tensor is not None:
            broken = ~torch.isfinite(tensor) | (tensor < -1e20)
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
