# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The check of a teacher's perplexity: on the student's samples, on its own, on the dataset's completions."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from ..completions import dataset_completion
from ..findings import Finding
from ..teachers.base import leaves
from ..teachers.cached import CachedTeacher
from ..teachers.generation import generate_from_teacher, teacher_prompts, why_no_generation
from .exam import Exam, Means, blocked
from .measure import measure
from .samples import MAX_REPEATED, Piece
from .thresholds import LIMITS

MAX_OWN_TOKENS = 256  # of a completion that the teacher writes here


@dataclass
class _Text:
    """Completions that the student did not write, scored by both; `written` by the teacher, here."""

    what: str
    written: bool
    teacher: Means
    student: Means


def check_teacher_perplexity(exam: Exam) -> list[Finding]:
    """The teacher on the student's samples, and on its own or the dataset's completions."""
    if exam.trainer.objective.num_references:
        return blocked("teacher_perplexity", "of a target with reference models the normaliser is not known.")
    tokens = exam.tokens.pick(exam.tokens.distilled & ~exam.tokens.teacher.isnan())
    if not len(tokens):
        return blocked("teacher_perplexity", "the teacher's log-probs of sampled tokens are not known.")
    theirs = Means.of(-tokens.teacher)
    seen = f"teacher {exam.name}: perplexity {_perplexity(theirs)} on the student's samples"
    text = _own_text(exam)
    if isinstance(text, str):
        reason, text = text, _reference_text(exam)
        if isinstance(text, str):
            seen = f"{seen}; on other text it is not known: {reason} {text}"
            return [Finding("teacher_perplexity", "info", seen.strip())]
    return [_judge(seen, text, theirs)]


def _judge(seen: str, own: _Text, theirs: Means) -> Finding:
    seen += f", {_perplexity(own.teacher)} on {own.what} (the student: {_perplexity(own.student)})"
    if own.student.below(own.teacher, LIMITS.own_text if own.written else LIMITS.reference_text):
        return _surprised(seen, own)
    if own.teacher.below(theirs, LIMITS.surprise):
        return Finding(
            "teacher_perplexity",
            "warning",
            seen,
            f"The student's text surprises it by {theirs.mean - own.teacher.mean:.1f} nats a token more than "
            f"{own.what}: to this teacher the student's completions are no answers.",
            "Compare the templates (chat_template, think_boundary); for a teacher that is too far, an SFT on its "
            "completions first (see student_distance).",
        )
    return Finding("teacher_perplexity", "ok", seen)


def _perplexity(nll: Means) -> str:
    return f"{math.exp(min(nll.mean, 99.0)):.3g}"


def _surprised(seen: str, own: _Text) -> Finding:
    return Finding(
        "teacher_perplexity",
        "error" if own.written else "warning",
        seen,
        f"The student predicts {own.what} better than the teacher does. Nobody knows a model's text better than the "
        "model: it is scored behind another prompt, with another template or at another temperature than it writes."
        if own.written
        else f"The student predicts {own.what} better than the teacher does: it is the nearer of the two to what the "
        "data shows, or the teacher reads another template.",
        "Compare the rendered prompts (chat_template, think_boundary); set teacher_chat_template, or teacher_prompt "
        "in the dataset, to what this teacher was trained with.",
    )


def _own_text(exam: Exam) -> _Text | str:
    """The teacher's completions of the same prompts, or why there are none."""
    trainer, batch = exam.trainer, exam.samples.batch
    reason = why_no_generation(exam.teacher)
    if reason is not None:
        return reason
    if exam.side.view is not None:
        return "Its prompts depend on the student's completions."
    if batch.has_images or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "It cannot write here, with images or sharded weights."
    num = min(MAX_REPEATED, len(batch.completion_ids))
    trainer.max_completion_length = min(trainer.max_completion_length, MAX_OWN_TOKENS)
    prompts, members = teacher_prompts(trainer, batch.examples[:num], exam.samples.prompt_ids[:num])
    completions = generate_from_teacher(exam.teacher, trainer, prompts, members)
    return _scored(exam, batch.select(range(num)), completions, written=True)


def _reference_text(exam: Exam) -> _Text | str:
    """The dataset's completions, or why there are none."""
    trainer, batch = exam.trainer, exam.samples.batch
    if batch.has_images or any(isinstance(leaf, CachedTeacher) for leaf in leaves(exam.teacher)):
        return ""
    rows = [i for i, row in enumerate(batch.examples) if row.get("completion") or row.get("completion_ids")]
    rows = rows[:MAX_REPEATED]
    if not rows:
        return "The dataset has no column 'completion'."
    completions = [dataset_completion(trainer, batch.examples[i], exam.samples.prompt_ids[i], 0) for i in rows]
    limit = min(trainer.max_completion_length, MAX_OWN_TOKENS)
    return _scored(exam, batch.select(rows), [ids[:limit] for ids in completions], written=False)


def _scored(exam: Exam, piece: Piece, completions: list[list[int]], written: bool) -> _Text:
    tokens, _ = measure(with_completions(piece, completions))
    tokens = tokens.pick(tokens.distilled & ~tokens.teacher.isnan())
    what = "its own samples" if written else "the dataset's completions"
    return _Text(what, written, Means.of(-tokens.teacher), Means.of(-tokens.student))


def with_completions(piece: Piece, completions: list[list[int]]) -> Piece:
    """The same prompts with other completions."""
    device, inputs = piece.completion_ids.device, dict(piece.inputs)
    width = piece.completion_ids.shape[1]
    for key, value in piece.inputs.items():  # what was known of the student's
        per_token = isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width
        if per_token and "prompt" not in key:
            del inputs[key]

    def stack(rows: list[Any], filler: int) -> Tensor:
        return pad([torch.tensor(row) for row in rows], padding_value=filler, padding_side="right").to(device)

    inputs["completion_ids"] = stack(completions, piece.trainer._tokenizer.pad_token_id)
    inputs["completion_mask"] = stack([[1] * len(ids) for ids in completions], 0)
    inputs.pop("teacher_skipped", None)
    return Piece(piece.trainer, piece.side, inputs, piece.examples)
