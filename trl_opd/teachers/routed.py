# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Several experts: each sample goes to its own teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..collators import MixedScores, RoutedScores, TeacherBatch, TeacherScores
from ..losses import nearest_name
from .answers import TeacherScoreError
from .base import PendingScores, collect, submit, teacher_name
from .group import TeacherGroup
from .local import LocalTeacher

if TYPE_CHECKING:
    from trl import GRPOTrainer


class RoutedTeacher(TeacherGroup):
    """
    A teacher for each kind of sample, named in a column of the dataset.

    A teacher that is loaded from a path is loaded when its first sample comes; others are prepared at the start.
    Metrics of each are logged as `distill/NAME/...`.

    Args:
        teachers (`Mapping[str, Any]`): Teachers by name. One object under two names exists once.
        column (`str`, *optional*, defaults to `"teacher"`): The column that names a sample's teacher.
    """

    scores_in_loss = True

    def __init__(self, teachers: Mapping[str, Any], column: str = "teacher"):
        if not teachers or not all(isinstance(name, str) and name for name in teachers):
            raise ValueError(
                f"teacher_model as a dict must have a teacher for each name, got the names {list(teachers)!r}. The "
                f"column {column!r} of the dataset names a sample's teacher."
            )
        for name, member in teachers.items():
            if isinstance(member, RoutedTeacher):
                raise ValueError(
                    f"teacher_model[{name!r}] must not be a dict itself: a sample names one teacher. Put its "
                    "teachers beside the others."
                )
        self.names = list(teachers)
        self.members: Sequence[Any] = list(teachers.values())
        self.column = column
        self._trainer: Any = None
        self._prepared: set[int] = set()

    @property
    def name(self) -> str:
        """Its teachers' names."""
        return "{" + ", ".join(f"{n}: {teacher_name(m)}" for n, m in zip(self.names, self.members, strict=True)) + "}"

    def route(self, examples: Sequence[Mapping[str, Any]]) -> Tensor:
        """
        Which member each sample goes to, `(B,)`.

        Raises:
            TeacherScoreError: If a sample names none of them.
        """
        index = []
        for example in examples:
            name = example.get(self.column)
            if name not in self.names:
                raise TeacherScoreError(
                    f"The column {self.column!r} must name one of the teachers {self.names}, got {name!r}. The sample "
                    f"would have no teacher.{nearest_name(str(name), self.names)}"
                )
            index.append(self.names.index(name))
        return torch.tensor(index)

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Prepare the members that are not loaded from a path."""
        self._trainer = trainer
        for name, member in zip(self.names, self.members, strict=True):
            if self._in_step(member) and getattr(member, "batch_size", None) is not None:
                raise ValueError(
                    f"teacher_batch_size must be unset for teacher {name!r} under FSDP or DeepSpeed, got "
                    f"{member.batch_size!r}. Processes with different numbers of its samples would wait for each "
                    "other for ever. Unset it."
                )
            if not (isinstance(member, LocalTeacher) and isinstance(member.model, str)):
                self._prepare(member)

    def _prepare(self, member: Any) -> None:
        if id(member) not in self._prepared and hasattr(member, "prepare"):
            member.prepare(self._trainer)
        self._prepared.add(id(member))

    def _sequences(self, batch: TeacherBatch) -> list[Tensor]:
        """Indices of each member's sequences."""
        assert batch.teacher_index is not None
        return [(batch.teacher_index == i).nonzero().squeeze(-1) for i in range(len(self.members))]

    def _counts(self, rows: list[Tensor], device: torch.device) -> list[int]:
        """Sequences of each member on all processes."""
        counts = torch.tensor([len(r) for r in rows], device=device)
        if self._trainer is not None and self._trainer.accelerator.num_processes > 1:
            counts = self._trainer.accelerator.reduce(counts, reduction="sum")
        return counts.tolist()

    def submit(self, batch: TeacherBatch) -> "RoutedPending | None":
        """Ask those members that answer at generation time."""
        rows = self._sequences(batch)
        pending: dict[int, PendingScores] = {}
        for i, (member, count) in enumerate(
            zip(self.members, self._counts(rows, batch.input_ids.device), strict=True)
        ):
            if not count or (getattr(member, "scores_in_loss", False) and not hasattr(member, "submit")):
                continue
            self._prepare(member)
            if len(rows[i]) and (answer := submit(member, batch.select(rows[i]))) is not None:
                pending[i] = answer
        if not pending and self._trainer is not None and self._trainer.accelerator.num_processes == 1:
            return None
        return RoutedPending(self, pending, rows)

    def __call__(self, batch: TeacherBatch) -> RoutedScores:
        return self.collect({}, None, batch)

    def collect(
        self, pending: Mapping[int, PendingScores], positions: Sequence[Tensor] | None, batch: TeacherBatch
    ) -> RoutedScores:
        """
        The members' answers about a micro-batch.

        Args:
            pending (`Mapping[int, PendingScores]`): Of the members that were asked before, by index.
            positions (`Sequence[Tensor]`, *optional*):
                For each member, where in the question that it was asked each of its sequences here stands.
            batch ([`TeacherBatch`]): The micro-batch.
        """
        rows = self._sequences(batch)
        parts: dict[str, tuple[Tensor, TeacherScores | MixedScores]] = {}
        for i, count in enumerate(self._counts(rows, batch.input_ids.device)):
            if not count:
                continue
            member, mine = self.members[i], rows[i]
            self._prepare(member)
            if len(mine) == 0 and not self._in_step(member):
                continue
            # Sharded weights are gathered by all processes together: one without such a sample takes part with another
            asked = mine if len(mine) else torch.zeros(1, dtype=torch.long, device=mine.device)
            question = batch if len(mine) == len(batch.completion_ids) else batch.select(asked)
            if len(mine) == 0:
                question = replace(question, completion_mask=torch.zeros_like(question.completion_mask))
            where = asked if positions is None or not len(mine) else positions[i]
            answer = collect(member, pending.get(i), where, question)
            assert isinstance(answer, (TeacherScores, MixedScores))
            parts[self.names[i]] = (mine, answer if len(mine) else answer.select(mine))
        return RoutedScores(parts)

    def _in_step(self, member: Any) -> bool:
        """Whether a member's forward pass needs all processes."""
        trainer = self._trainer
        sharded = trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        return sharded and getattr(member, "scores_in_loss", False)


class RoutedPending:
    """Answers of those members that were asked at generation time; the others are asked when it is collected."""

    def __init__(self, teacher: RoutedTeacher, pending: Mapping[int, PendingScores], rows: Sequence[Tensor]):
        self.teacher, self.pending = teacher, pending
        self._place = torch.zeros(sum(len(r) for r in rows), dtype=torch.long)  # of each sequence among its teacher's
        for mine in rows:
            self._place[mine.cpu()] = torch.arange(len(mine))

    def collect(self, rows: Tensor, batch: TeacherBatch) -> RoutedScores:
        """See [`PendingScores`]."""
        assert batch.teacher_index is not None
        place = self._place[rows.cpu()].to(rows.device)
        positions = [place[(batch.teacher_index == i)] for i in range(len(self.teacher.members))]
        return self.teacher.collect(self.pending, positions, batch)
