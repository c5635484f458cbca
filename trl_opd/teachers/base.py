# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The protocol of a teacher, and how the trainer asks one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..collators import MixedScores, RoutedScores, Scores, TeacherBatch, TeacherScores
from .answers import check_answer


class PendingScores(Protocol):
    """Answers to a generation batch that are on their way."""

    def collect(self, rows: Tensor, batch: TeacherBatch) -> Scores:
        """
        Wait for the answers about some sequences of that batch. May be called again with the same rows.

        Args:
            rows (`torch.Tensor`): Their indices in the generation batch, `(R,)`, on any device.
            batch ([`TeacherBatch`]): The same R sequences as a batch of their own.

        Returns:
            [`TeacherScores`] of R rows and the generation batch's T tokens, on any device.

        Raises:
            TeacherScoreError: If the teacher failed; the message names it.
        """
        ...


@runtime_checkable
class Teacher(Protocol):
    """
    A teacher answers a [`TeacherBatch`] with [`TeacherScores`]. Any callable is one, so a function that returns
    log-probs is enough; a bare tensor `(B, T)` counts as sampled-token log-probs.

    Optional attributes and methods that the trainer uses if they are there:
    - `name` (`str`): how error messages call it.
    - `prepare(trainer)`: called once, when the student is on its device and wrapped by accelerate's configuration.
    - `submit(batch)`: called once with each generation batch, returns [`PendingScores`] or `None`. The answers are
      collected micro-batch by micro-batch, when the loss needs them. With `None`, or without this method, the teacher
      is called: with each generation batch, or inside the loss if `scores_in_loss`.
    - `asynchronous` (`bool`): `submit` returns at once, so it is called as soon as the completions exist.
    - `scores_in_loss` (`bool`): score each micro-batch inside the loss instead of each generation batch once. Needed
      for hidden states, which are too large to keep.
    - `changes` (`bool`): its weights move during the run, so answers are not kept over GRPO's `num_iterations`.
    - `vocab_size` (`int`): number of ids it knows.
    - `max_length` (`int`): longest prompt and completion that it takes.
    - `members` (`Sequence[Teacher]`): the teachers that it is made of.
    - `generate(prompt_ids, sampling)`: its completions, for `off_policy_source="teacher"` (see
      [`teachers.generation`]).
    """

    def __call__(self, batch: TeacherBatch) -> "Scores | Tensor": ...


def teacher_name(teacher: object) -> str:
    """How to call a teacher in a message."""
    return getattr(teacher, "name", None) or getattr(teacher, "__name__", None) or type(teacher).__name__


def leaves(teacher: Any) -> Iterator[Any]:
    """The teachers that `teacher` is made of, itself if it is one."""
    members = getattr(teacher, "members", None)
    if members is None:
        yield teacher
        return
    for member in members:
        yield from leaves(member)


@dataclass
class AnsweredScores:
    """[`PendingScores`] of a teacher that has answered."""

    scores: TeacherScores | MixedScores

    def collect(self, rows: Tensor, batch: TeacherBatch) -> Scores:
        return self.scores.select(rows)


def submit(teacher: Any, batch: TeacherBatch, vocab_size: int | None = None) -> PendingScores | None:
    """
    Ask a teacher about a generation batch; `None` if it wants to be asked inside the loss.

    Args:
        teacher ([`Teacher`]): Who is asked.
        batch ([`TeacherBatch`]): The question.
        vocab_size (`int`, *optional*): Ids that the student knows.
    """
    if hasattr(teacher, "submit"):
        with torch.no_grad():
            pending = teacher.submit(batch)
        if pending is not None:
            return pending
    if getattr(teacher, "scores_in_loss", False):
        return None
    scores = ask(teacher, batch, vocab_size)
    if isinstance(scores, RoutedScores):
        raise TypeError(f"Teacher {teacher_name(teacher)!r} must route by submit(), or set scores_in_loss = True.")
    members = scores.members if isinstance(scores, MixedScores) else [scores]
    if any(member.hidden_states is not None for member in members):
        raise TypeError("hidden states are too large to keep: set scores_in_loss = True on the teacher")
    return AnsweredScores(scores)


def collect(
    teacher: Any, pending: PendingScores | None, rows: Tensor, batch: TeacherBatch, vocab_size: int | None = None
) -> Scores:
    """
    The answer about a micro-batch: waited for if it was asked for, else asked for now.

    Args:
        teacher ([`Teacher`]): Who is asked.
        pending ([`PendingScores`], *optional*): What [`submit`] returned.
        rows (`torch.Tensor`): Indices of the sequences in the generation batch, `(R,)`.
        batch ([`TeacherBatch`]): The question about these R sequences.
        vocab_size (`int`, *optional*): Ids that the student knows.
    """
    if pending is None:
        return ask(teacher, batch, vocab_size)
    with torch.no_grad():
        scores = pending.collect(rows, batch)
    return scores if isinstance(pending, AnsweredScores) else check_scores(scores, batch, teacher, vocab_size)


def ask(teacher: Any, batch: TeacherBatch, vocab_size: int | None = None) -> Scores:
    """Ask a teacher now, without gradient, and check the form of its answer."""
    with torch.no_grad():
        scores = teacher(batch)
    return check_scores(scores, batch, teacher, vocab_size)


def check_scores(scores: Any, batch: TeacherBatch, teacher: Any, vocab_size: int | None) -> Scores:
    """
    The answer with its tensors on the batch's device and nothing but padding where nothing was asked.

    Raises:
        TypeError, TeacherScoreError: If its form or its values cannot be those of log-probs.
    """
    name = teacher_name(teacher)
    if isinstance(scores, RoutedScores):
        for part, (rows, answer) in scores.parts.items():
            _check(answer, batch.completion_ids[rows], batch.completion_mask[rows], part, vocab_size)
        return scores
    if isinstance(scores, Tensor):
        scores = TeacherScores(sampled_logprobs=scores)
    if not isinstance(scores, (TeacherScores, MixedScores)):
        raise TypeError(f"Teacher {name!r} must return TeacherScores or a tensor, got {type(scores).__name__}.")
    _check(scores, batch.completion_ids, batch.completion_mask, name, vocab_size)
    return scores


def _check(
    scores: TeacherScores | MixedScores, completion_ids: Tensor, mask: Tensor, name: str, vocab_size: int | None
) -> None:
    for member in scores.members if isinstance(scores, MixedScores) else [scores]:
        check_answer(member, completion_ids, mask, name, vocab_size)
