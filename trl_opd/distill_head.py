# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The call that the student's forward makes with its hidden states: the fused divergence of a micro-batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .collators import MixedScores, RoutedScores, Scores, TeacherScores
from .config import OnPolicyDistillConfig
from .heads import HeadCall, gather_heads
from .kernels import fused_linear_divergence
from .kernels.projection import Head
from .student import MicroBatch, StudentOutput
from .targets import Target
from .token_weights import adakd_temperatures

_PER_TOKEN = (
    "divergence",
    "forward_kl",
    "reverse_kl",
    "teacher_entropy",
    "teacher_logprobs",
    "overlap",
    "overlap_advantage",
    "teacher_logsumexp",
    "target_coef",
)


@dataclass
class _Job:
    """Sequences that are compared in one call."""

    name: str
    rows: Tensor | None  # their indices; `None` is all
    answer: TeacherScores | MixedScores
    off_policy: bool = False


def distillation_head(
    batch: MicroBatch,
    scores: Scores,
    args: OnPolicyDistillConfig,
    *,
    vocab_size: int | None,
    per_token_grad: bool,
    overlap_top_k: int,
    target: Target,
    statistics: Mapping[str, int | None],
    token_weighting: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
) -> HeadCall:
    """
    The call that the student's forward makes with its hidden states.

    Args:
        batch ([`MicroBatch`]): Masks, weights and sampled tokens.
        scores ([`TeacherScores`], [`MixedScores`] or [`RoutedScores`]): Hidden states and heads, or top-k log-probs.
        args ([`OnPolicyDistillConfig`]): The objective.
        vocab_size (`int`, *optional*): Leading head entries to compare.
        per_token_grad (`bool`): Whether divergence, log-probs and entropy must carry gradient per token.
        overlap_top_k (`int`): Size of the top sets to compare, 0 for none.
        target ([`Target`]): What is made of the teacher's answer.
        statistics (`Mapping[str, int | None]`): Further statistics to report.
        token_weighting (`Callable`, *optional*): Weights of tokens from their own statistics.
    """
    target_ids: Tensor = batch.inputs["completion_ids"]
    num_tokens = target_ids.shape[1]
    # GRPO's own metrics want every token of its loss; Liger knows no token weights, so it sees the trained ones only
    tokens = batch.distill_mask if args.loss_backend == "liger" else batch.loss_mask
    common: dict[str, Any] = {
        "support_size": args.support_size,
        "tail": args.support_tail,
        "vocab_size": vocab_size,
        "chunk_bytes": None if args.loss_chunk_mib is None else args.loss_chunk_mib << 20,
        "backend": args.loss_backend,
    }
    last: dict[str, Any] = {
        "overlap_top_k": overlap_top_k,
        "per_token_grad": per_token_grad,
        "token_weighting": token_weighting,
    }

    def run(
        hidden_states: Tensor, head: Head, job: _Job, temperature: float | Tensor, **options: Any
    ) -> StudentOutput:
        def take(x: Tensor) -> Tensor:
            return (x if job.rows is None else x[job.rows]).flatten(0, 1)

        answer = aim(job.answer, target)
        sparse = isinstance(answer, TeacherScores) and answer.hidden_states is None
        differs = job.off_policy and args.off_policy_divergence is not None
        result = fused_linear_divergence(
            take(hidden_states),
            head.weight,
            divergence=args.off_policy_divergence if differs else args.divergence,  # type: ignore[arg-type]
            divergence_kwargs=args.off_policy_divergence_kwargs if differs else args.divergence_kwargs,  # type: ignore[arg-type]
            temperature=temperature if isinstance(temperature, float) else take(temperature),
            token_weights=take(batch.weights),
            mask=take(tokens),
            target_ids=take(target_ids),
            student_bias=head.bias,
            student_logit_scale=head.logit_scale,
            student_softcap=head.softcap,
            support="teacher_top_k" if sparse and args.support == "full" else args.support,
            gather=gather_heads(head.weight, head.bias, *_parameters(answer)),
            **_teacher_operands(answer),
            **common,
            **options,
        )

        def view(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.view(-1, num_tokens)

        output = StudentOutput(loss=result.loss, log_probs=view(result.student_logprobs))
        output.entropy = view(result.student_entropy)
        output.token_weights = view(result.weights)
        for name in _PER_TOKEN:
            setattr(output, name, view(getattr(result, name)))
        for name, value in result.further.items():
            setattr(output, name, view(value))
        if output.teacher_logprobs is None and output.divergence is not None and isinstance(answer, TeacherScores):
            output.teacher_logprobs = answer.sampled_logprobs
        return output

    def run_all(hidden_states: Tensor, head: Head, temperature: float | Tensor, **options: Any) -> StudentOutput:
        jobs = _jobs(scores, batch, args)
        if jobs[0].rows is None:
            return run(hidden_states, head, jobs[0], temperature, **options)
        batch.parts = [
            (job.name, job.rows, run(hidden_states, head, job, temperature, **options))
            for job in jobs
            if job.rows is not None
        ]
        return _assemble(batch.parts, target_ids.shape, hidden_states)

    def call(hidden_states: Tensor, head: Head, aux_loss: Tensor | None) -> StudentOutput:
        hidden_states = hidden_states[:, -num_tokens - 1 : -1]
        temperature: float | Tensor = float(args.divergence_temperature)
        if args.temperature_adaptation:
            with torch.no_grad():
                first = run_all(hidden_states, head, temperature, statistics={"hellinger": None}, per_token_grad=True)
            assert first.hellinger is not None
            factor = adakd_temperatures(first.hellinger, batch.distill_mask, args.temperature_adaptation)
            temperature = temperature * factor
            batch.weights = batch.weights * factor.square()  # the gradient has one over it
        output = run_all(hidden_states, head, temperature, statistics=statistics, **last)
        zeros = hidden_states.new_zeros(target_ids.shape, dtype=torch.float32)
        output.log_probs = zeros if output.log_probs is None else output.log_probs
        output.entropy = zeros if output.entropy is None else output.entropy
        output.aux_loss = aux_loss
        return output

    return HeadCall(call)


def aim(answer: TeacherScores | MixedScores, target: Target) -> TeacherScores | MixedScores:
    """The scores of the distribution aimed at."""
    if target.is_teacher:
        return answer
    members = answer.members if isinstance(answer, MixedScores) else [answer]
    return MixedScores(
        members,
        target.weights,
        target.mixture,
        student_coef=target.student_coef,
        contrast_scale=target.contrast_scale,
        contrast_floor=target.contrast_floor,
    )


def _jobs(scores: Scores, batch: MicroBatch, args: OnPolicyDistillConfig) -> list[_Job]:
    """
    What is compared in one call each: the sequences of every teacher, and of those that the student did not sample
    where they have a divergence of their own. All processes have the same jobs, some without a sequence.
    """
    if isinstance(scores, RoutedScores):
        jobs = [_Job(name, rows, answer) for name, (rows, answer) in scores.parts.items()]
    else:
        jobs = [_Job("", None, scores)]
    if args.off_policy_divergence is None or "on_policy" not in batch.inputs:
        return jobs
    split = []
    for job in jobs:
        on_policy: Tensor = batch.inputs["on_policy"].bool()
        among = torch.arange(len(on_policy), device=on_policy.device) if job.rows is None else job.rows
        for own in (True, False):
            kept = (on_policy[among] == own).nonzero().squeeze(-1)
            name = job.name or ("on_policy" if own else "off_policy")
            split.append(_Job(name, among[kept], job.answer.select(kept), off_policy=not own))
    return split


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
    return {
        **operands,
        "mixture": answer.mixture,
        "mixture_weights": answer.weights or None,
        "student_coef": answer.student_coef,
        "contrast_scale": answer.contrast_scale,
        "contrast_floor": answer.contrast_floor,
    }


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
