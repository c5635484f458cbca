# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Checks of what must be equal: two answers, alone and in a batch, a model and itself, the head and full logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..findings import Finding
from ..teachers import AdapterTeacher, SelfTeacher
from ..teachers.base import leaves
from .exam import Exam, blocked
from .samples import Piece
from .scoring import (
    Entries,
    difference,
    entries_of,
    full_logprobs,
    nearest_share,
    student_answer,
    student_logprobs,
    student_pass,
)
from .thresholds import LIMITS, severity, tolerance

_FULL_TOKENS = 256  # of a completion whose full logits are formed
_EXTRA_PADDING = (5, 3)  # where the samples have none


def check_determinism(exam: Exam) -> list[Finding]:
    """The same question twice."""
    few = exam.few
    again = entries_of(few.piece, few.piece.ask(), like=few.entries)
    found = []
    for one, other in zip(few.entries, again, strict=True):
        apart = _apart(exam, one, other)
        exam.noise = max(exam.noise, apart if apart > exam.allowed(one) else 0.0)
        what = f"asked twice about {len(few.piece.completion_ids)} samples, it differs by"
        found.append(_judge(exam, "determinism", one, apart, what))
    return found


def _apart(exam: Exam, one: Entries, other: Entries) -> float:
    """By how much two answers differ; those of a server, or in half precision, where they are likely."""
    share = exam.share(exam.allowed(one))
    return difference(one, other, exam.is_local and share == 1.0, share)


def _judge(exam: Exam, check: str, one: Entries, apart: float, what: str) -> Finding:
    allowed = exam.allowed(one)
    level = severity(apart, allowed)
    who = f"{one.name!r} of the teacher {exam.name}" if one.name else f"teacher {exam.name}"
    seen = f"{who}: {what} up to {apart:.2g} nats (allowed: {allowed:g})"
    if level == "ok":
        return Finding(check, "ok", seen)
    why, do = {
        "determinism": (
            "What differs from itself is noise, and the student follows it: dropout that is still on, sampling inside "
            "the teacher, or replicas that do not agree.",
            exam.remedy(),
        ),
        "batch_invariance": (
            "Padding, positions or neighbours reach into its answer: the student would be taught something else in "
            "every batch.",
            f"Check the attention mask and position_ids of its forward, with padding on the left. {exam.remedy()}",
        ),
    }[check]
    return Finding(check, level, seen, why, do)


def check_batch_invariance(exam: Exam) -> list[Finding]:
    """Each sample alone and in the padded batch, for the teacher and for the student."""
    few = exam.few
    piece = few.piece
    if exam.noise:
        return blocked("batch_invariance", "the teacher does not even agree with itself (see determinism).")
    if piece.has_images:
        return blocked("batch_invariance", "samples with images cannot be told apart in a batch.")
    if len(piece.completion_ids) == 1 or bool(piece.inputs["prompt_mask"].all()):
        piece = piece.padded(*_EXTRA_PADDING)
        batch = entries_of(piece, piece.ask(), like=few.entries)
    else:
        batch = few.entries
    rows = range(len(piece.completion_ids))
    alone = [piece.select([i]) for i in rows]
    apart = {entries.name: 0.0 for entries in batch}
    for i in rows:
        ours = [x for x in (entries.of_row(i) for entries in batch) if len(x.rows)]
        if not ours:
            continue
        theirs = {x.name: x for x in entries_of(alone[i], alone[i].ask(), like=ours)}
        for one in ours:
            other = theirs[one.name]
            apart[one.name] = max(apart[one.name], _apart(exam, one, other))
    what = "a sample alone and in the padded batch differ by"
    found = [_judge(exam, "batch_invariance", x, apart[x.name], what) for x in batch]
    return [*found, _student_invariance(exam, piece, alone)]


def _student_invariance(exam: Exam, piece: Piece, alone: Sequence[Piece]) -> Finding:
    in_batch, _ = student_logprobs(piece)
    mask, differences = piece.loss_mask, []
    for i, one in enumerate(alone):
        logprobs, _ = student_logprobs(one)
        width = logprobs.shape[1]
        differences.append((logprobs[0] - in_batch[i, :width])[mask[i, :width]].abs())
    allowed = tolerance(exam.dtype)
    share = 1.0 if allowed < tolerance(torch.float16) else LIMITS.half_share
    apart = nearest_share(torch.cat(differences), share)
    level = severity(apart, allowed)
    seen = f"student: a sample alone and in the padded batch differ by up to {apart:.2g} nats (allowed: {allowed:g})"
    if level == "ok":
        return Finding("batch_invariance", "ok", seen)
    return Finding(
        "batch_invariance",
        level,
        seen,
        "GRPOTrainer pads prompts on the left and passes no positions. A model whose positions are absolute, or whose "
        "attention sees padding, is trained on other probabilities than it samples with.",
        "Set per_device_train_batch_size=1, or attn_implementation='sdpa' in model_init_kwargs. Use a model with "
        "rotary positions.",
    )


def check_self_kl(exam: Exam) -> list[Finding]:
    """The student as its own teacher through the run's head, and that head against the model's full logits."""
    piece = exam.few.piece
    return [*_self_divergence(exam, piece), *_own_teacher(exam), _head_and_logits(exam, piece)]


def _self_divergence(exam: Exam, piece: Piece) -> list[Finding]:
    if not exam.trainer.objective.uses_distributions:
        return []
    kl = student_pass(piece, student_answer(piece)).reverse_kl
    assert kl is not None
    allowed = tolerance(exam.dtype)
    apart = nearest_share(kl[piece.mask].abs(), 1.0)
    return [_kl_finding(exam, apart, allowed, "with itself as teacher, the student's reverse KL is")]


def _kl_finding(exam: Exam, apart: float, allowed: float, what: str) -> Finding:
    seen = f"{what} {apart:.2g} nats at most (allowed: {allowed:g})"
    if apart <= allowed:
        return Finding("self_kl", "ok", seen)
    return Finding(
        "self_kl",
        "error",
        seen,
        "It must be 0. Teacher and student are compared at different tokens, temperatures or heads, and the student "
        "would be trained away from where it is.",
        f"Set loss_backend='torch' (it is {exam.trainer.args.loss_backend!r}) and support='full', and see whether it "
        "goes away; undo patches of the model's forward or head. If it stays, report it with this line.",
    )


def _own_teacher(exam: Exam) -> list[Finding]:
    """Of a teacher that is the student at the start of the run."""
    trainer, tokens = exam.trainer, exam.tokens
    model = trainer.accelerator.unwrap_model(trainer.model)
    of_student = all(
        isinstance(leaf, SelfTeacher) or (isinstance(leaf, AdapterTeacher) and leaf.adapter_name is None)
        for leaf in leaves(exam.teacher)
    )
    if not of_student or trainer.state.global_step > 0:
        return []
    if not all(isinstance(leaf, SelfTeacher) for leaf in leaves(exam.teacher)) and not _is_fresh(model):
        return []
    if any("teacher_prompt_ids" in answered.piece.inputs for answered in exam.answered):
        return blocked("self_kl", f"teacher {exam.name} reads another prompt than the student, and is to differ.")
    gap = tokens.gap[tokens.distilled] if tokens.reverse_kl.isnan().all() else tokens.reverse_kl[tokens.distilled]
    gap = gap[~gap.isnan()].abs()
    apart = float(gap.max()) if len(gap) else 0.0
    what = f"teacher {exam.name} is the student before the first step, and they differ by"
    return [_kl_finding(exam, apart, tolerance(exam.dtype), what)]


def _is_fresh(model: Any) -> bool:
    """Whether an adapter changes nothing yet."""
    ups = [p for name, p in model.named_parameters() if "lora_B" in name]
    return bool(ups) and all(not bool(p.any()) for p in ups)


def _head_and_logits(exam: Exam, piece: Piece) -> Finding:
    """Sampled tokens' log-probs by the run's function and by the model's plain forward."""
    trainer, size = exam.trainer, exam.trainer.shared_vocab_size
    differences: list[Tensor] = []
    rows = range(len(piece.completion_ids)) if not piece.has_images else [0]
    for i in list(rows)[:2]:
        one = piece if piece.has_images else piece.select([i]).first_tokens(_FULL_TOKENS)
        ours, _ = student_logprobs(one)
        with trainer.accelerator.autocast():
            plain = full_logprobs(trainer.model, one.student_question(), trainer.args.divergence_temperature, size)
        differences.append((ours.double() - plain.double())[one.loss_mask].abs())
    apart = torch.cat(differences)
    allowed = tolerance(exam.dtype) / 3  # of the mean
    mean = float(apart.mean()) if len(apart) else 0.0
    seen = f"log-probs of the distillation head and of the model's own logits differ by {mean:.2g} nats on average"
    if mean <= allowed:
        return Finding("self_kl", "ok", f"{seen} (allowed: {allowed:.2g})")
    return Finding(
        "self_kl",
        "error",
        f"{seen}, {float(apart.max()):.2g} at most (allowed: {allowed:.2g})",
        "The student samples from other probabilities than the loss computes: its forward does something to its "
        "logits that the head does not (a scale, a softcap, an adapter), or reads another token.",
        "Use the model's own forward, without patches of it or of its lm_head. If config.json names a logit scale "
        "that transformers applies and trl_opd does not, report the architecture.",
    )
