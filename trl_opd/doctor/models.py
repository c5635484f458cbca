# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The doctor's checks that need weights: a trainer that is built and not yet trained, looked at through the path of the
run itself. Its own generation samples, its teacher side asks, its fused head compares.

| check | what it finds |
|---|---|
| `truncation` | completions that do not end, and why |
| `temperature` | rollouts or answers at another temperature than the loss believes |
| `determinism`, `batch_invariance` | answers that differ from themselves, or depend on padding and neighbours |
| `self_kl` | a head, mask, shift or temperature that is not the model's own |
| `student_distance`, `gap_by_position`, `teacher_perplexity` | a teacher that is too far, and where |

From where on they speak is in `thresholds`.
"""

import time
from collections.abc import Callable
from typing import Any

from ..findings import Finding
from ..teachers.answers import TeacherScoreError
from ..teachers.base import teacher_name
from .agreement import check_batch_invariance, check_determinism, check_self_kl
from .distance import check_gap_by_position, check_student_distance, check_truncation
from .exam import Exam
from .measure import Answered, Tokens, measure
from .own_text import check_teacher_perplexity
from .samples import Samples, draw, undisturbed
from .temperature import check_sampling, check_temperature

CHECKS: dict[str, tuple[Callable[[Exam], list[Finding]], ...]] = {
    "truncation": (check_truncation,),
    "determinism": (check_determinism,),
    "batch_invariance": (check_batch_invariance,),
    "self_kl": (check_self_kl,),
    "temperature": (check_temperature, check_sampling),
    "student_distance": (check_student_distance,),
    "gap_by_position": (check_gap_by_position,),
    "teacher_perplexity": (check_teacher_perplexity,),
}


def _silent(message: str) -> None:
    pass


def check_models(trainer: Any, *, num_samples: int = 8, progress: Callable[[str], None] = _silent) -> list[Finding]:
    """
    All checks that need weights. The trainer is afterwards what it was, generators and metrics included.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run, before its first step.
        num_samples (`int`, *optional*, defaults to `8`): Completions to sample.
        progress (`Callable[[str], None]`, *optional*): Told what was done, and how long it took.

    Returns:
        `list[Finding]`: Of each check one or more; what cannot be checked here is there with severity `"info"`.
    """
    if trainer.teacher is None:
        return [Finding("start", "info", "there is no teacher: the run is GRPO as it is, and nothing is compared")]
    clock = _Clock(progress)
    with undisturbed(trainer) as side:
        try:
            samples = draw(trainer, side, num_samples)
            clock.tell(f"{len(samples.completion_ids)} completions sampled")
        except Exception as error:
            return [_failed_to_sample(error)]
        if not bool(trainer.distill_mask(samples.batch.inputs).any()):
            return [*_without_tokens(trainer, side, samples), _nothing_distilled(trainer)]
        try:
            tokens, answered = measure(samples.batch)
            clock.tell(f"{len(tokens)} tokens scored by both models")
        except Exception as error:
            return [*_without_tokens(trainer, side, samples), _failed_to_answer(trainer, error)]
        return _run(Exam(trainer, side, samples, tokens, answered), clock)


def _run(exam: Exam, clock: "_Clock") -> list[Finding]:
    findings = []
    for name, checks in CHECKS.items():
        for check in checks:
            try:
                findings += check(exam)
            except Exception as error:
                findings.append(_failed(name, error))
        clock.tell(name)
    return findings


class _Clock:
    """Says what is done, and in how many seconds."""

    def __init__(self, progress: Callable[[str], None]):
        self.progress, self.last = progress, time.perf_counter()

    def tell(self, what: str) -> None:
        now = time.perf_counter()
        self.progress(f"{what} ({now - self.last:.1f} s)")
        self.last = now


def _without_tokens(trainer: Any, side: Any, samples: Samples) -> list[Finding]:
    """What the completions tell by themselves."""
    empty: Any = Tokens(
        **{name: samples.batch.completion_ids.new_zeros(0).double() for name in Tokens.__annotations__}
    )
    return check_truncation(Exam(trainer, side, samples, empty, list[Answered]()))


def _failed(check: str, error: Exception) -> Finding:
    if isinstance(error, TeacherScoreError):
        return Finding(check, "error", f"the teacher failed: {error}", "The run would stop here.", "See its log.")
    return Finding(check, "info", f"not checked, for this failed: {type(error).__name__}: {error}")


def _failed_to_sample(error: Exception) -> Finding:
    return Finding(
        "truncation",
        "error",
        f"no completion could be sampled: {type(error).__name__}: {error}",
        "The first step of the run would fail likewise.",
        "See that generation works: use_vllm and its server, max_completion_length, the prompts of the dataset.",
    )


def _failed_to_answer(trainer: Any, error: Exception) -> Finding:
    return Finding(
        "determinism",
        "error",
        f"teacher {teacher_name(trainer.teacher)!r} gave no answer to train on: {type(error).__name__}: {error}",
        "The run would stop at its first step.",
        "Mend what the message says; a teacher's answer is described at trl_opd.teachers.Teacher.",
    )


def _nothing_distilled(trainer: Any) -> Finding:
    return Finding(
        "determinism",
        "error" if not trainer.mask_truncated_completions else "warning",
        "no token of these completions is distilled",
        "The step would have nothing to learn from: all completions are cut and mask_truncated_completions=True, "
        "teacher_view returns None for all, or special_token_masking masks everything.",
        "Raise max_completion_length, unset mask_truncated_completions, or let teacher_view return a prompt.",
    )
