# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""One micro-batch of distillation: the request that travels into the student's forward, and what comes back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .collators import TeacherScores
from .config import OnPolicyDistillConfig
from .heads import HeadCall, gather_heads
from .kernels import fused_linear_divergence
from .kernels.projection import Head
from .teachers.base import TeacherScoreError


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
    scores: TeacherScores | None = None
    output: StudentOutput | None = None


def distillation_head(
    batch: MicroBatch,
    scores: TeacherScores,
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
        scores ([`TeacherScores`]): Hidden states and head, or top-k log-probs.
        args ([`OnPolicyDistillConfig`]): The objective.
        vocab_size (`int`, *optional*): Leading head entries to compare.
        per_token_grad (`bool`): Whether log-probs and entropy must carry gradient.
        overlap_top_k (`int`): Size of the top sets to compare, 0 for none.
    """
    target_ids: Tensor = batch.inputs["completion_ids"]
    num_tokens = target_ids.shape[1]
    # GRPO's own metrics want every token of its loss; Liger knows no token weights, so it sees the trained ones only
    rows = batch.distill_mask if args.loss_backend == "liger" else batch.loss_mask
    support = "teacher_top_k" if scores.topk_ids is not None and args.support == "full" else args.support

    def call(hidden_states: Tensor, head: Head, aux_loss: Tensor | None) -> StudentOutput:
        teacher, teacher_hidden, topk = None, None, None
        if scores.hidden_states is not None:
            assert scores.head is not None
            teacher, teacher_hidden = scores.head, scores.hidden_states.flatten(0, 1)
        else:
            assert scores.topk_ids is not None and scores.topk_logprobs is not None
            topk = (scores.topk_ids.flatten(0, 1), scores.topk_logprobs.flatten(0, 1))
        sharded = [head.weight, head.bias] + ([teacher.weight, teacher.bias] if teacher is not None else [])
        result = fused_linear_divergence(
            hidden_states[:, -num_tokens - 1 : -1].flatten(0, 1),
            head.weight,
            teacher_hidden,
            None if teacher is None else teacher.weight,
            divergence=args.divergence,
            divergence_kwargs=args.divergence_kwargs,  # type: ignore[arg-type]
            token_weights=batch.weights.flatten(),
            mask=rows.flatten(),
            target_ids=target_ids.flatten(),
            student_bias=head.bias,
            teacher_bias=None if teacher is None else teacher.bias,
            temperature=args.divergence_temperature,
            student_logit_scale=head.logit_scale,
            student_softcap=head.softcap,
            teacher_logit_scale=1.0 if teacher is None else teacher.logit_scale,
            teacher_softcap=None if teacher is None else teacher.softcap,
            teacher_topk=topk,
            support=support,
            support_size=args.support_size,
            tail=args.support_tail,
            overlap_top_k=overlap_top_k,
            per_token_grad=per_token_grad,
            vocab_size=vocab_size,
            chunk_bytes=None if args.loss_chunk_mib is None else args.loss_chunk_mib << 20,
            gather=gather_heads(*sharded),
            backend=args.loss_backend,
        )

        def view(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.view(target_ids.shape)

        zeros = hidden_states.new_zeros(target_ids.shape, dtype=torch.float32)
        return StudentOutput(
            loss=result.loss,
            log_probs=zeros if result.student_logprobs is None else view(result.student_logprobs),
            entropy=zeros if result.student_entropy is None else view(result.student_entropy),
            aux_loss=aux_loss,
            divergence=view(result.divergence),
            forward_kl=view(result.forward_kl),
            reverse_kl=view(result.reverse_kl),
            teacher_entropy=view(result.teacher_entropy),
            teacher_logprobs=view(result.teacher_logprobs),
            overlap=view(result.overlap),
        )

    return HeadCall(call)


def require_scores(scores: TeacherScores, credit: str, name: str) -> None:
    """Refuse scores that the objective cannot use, naming what to set."""
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
