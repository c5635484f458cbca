# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Completions that the student wrote some steps ago, with the dataset rows that they belong to."""

import os
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Replayed:
    """
    A completion of a former student.

    Args:
        row (`Mapping[str, Any]`): Its dataset row, with all columns.
        completion_ids (`torch.Tensor`): Its ids, int32, `(T,)`.
        step (`int`): Optimizer steps that the student had taken.
        logprobs (`torch.Tensor`, *optional*): Its log-probs of the tokens, float32, `(T,)`.
    """

    row: Mapping[str, Any]
    completion_ids: Tensor
    step: int
    logprobs: Tensor | None = None


Unit = tuple[Replayed, ...]


class ReplayBuffer:
    """
    The latest completions of a process, the oldest of which make room for new ones.

    What is stored and drawn together is a unit: the members of a group, or a process's whole batch where groups are
    spread over processes. Every process pushes and draws as many at a time, so that its buffer is as long as the
    others' and one draw, seeded alike, keeps groups whole.

    Memory: four bytes a token, eight with log-probs, and the dataset rows. Checkpoints hold all of it, a file a
    process.

    Args:
        capacity (`int`): Most completions.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._units: deque[tuple[int, Unit]] = deque()  # with the number of their push
        self._evicted: list[tuple[int, int, Unit]] = []  # since the last commit: by which push, of which push
        self._pushes = 0
        self._committed = 0

    def __len__(self) -> int:
        """Completions."""
        return sum(len(unit) for _, unit in self._units)

    @property
    def entries(self) -> list[Replayed]:
        """The completions, oldest first."""
        return [entry for _, unit in self._units for entry in unit]

    def push(
        self,
        rows: Sequence[Mapping[str, Any]],
        completion_ids: Sequence[Sequence[int]],
        step: int,
        unit: int,
        logprobs: Tensor | None = None,
    ) -> None:
        """
        Add a batch.

        Args:
            rows (`Sequence[Mapping[str, Any]]`): B dataset rows.
            completion_ids (`Sequence[Sequence[int]]`): Their completions.
            step (`int`): Optimizer steps that the student has taken.
            unit (`int`): Neighbours that stay together, a divisor of B.
            logprobs (`torch.Tensor`, *optional*): The student's log-probs of them, `(B, T)`, padded on the right.

        Raises:
            ValueError: If a row holds what a checkpoint cannot.
        """
        self._pushes += 1
        entries = []
        for i, (row, ids) in enumerate(zip(rows, completion_ids, strict=True)):
            _check_row(row)
            kept = None if logprobs is None else logprobs[i, : len(ids)].detach().float().cpu().clone()
            entries.append(Replayed(dict(row), torch.tensor(ids, dtype=torch.int32), step, kept))
        for i in range(0, len(entries), unit):
            self._units.append((self._pushes, tuple(entries[i : i + unit])))
        length = len(self)
        while length > self.capacity:
            push, oldest = self._units.popleft()
            length -= len(oldest)
            self._evicted.append((self._pushes, push, oldest))

    def draw(self, generator: random.Random, num: int) -> list[Replayed]:
        """
        `num` completions, drawn uniformly by units, none twice.

        Raises:
            ValueError: If there are fewer.
        """
        size = len(self._units[0][1]) if self._units else 1
        if num % size or num > len(self):
            raise ValueError(f"{num} completions were asked of a buffer of {len(self)} in units of {size}")
        picked = generator.sample(range(len(self._units)), num // size)
        return [entry for i in picked for entry in self._units[i][1]]

    # With checkpoints

    def commit(self) -> None:
        """What was pushed so far belongs to finished batches: a run resumed from now on does not make it again."""
        self._committed, self._evicted = self._pushes, []

    def save(self, path: str) -> None:
        """Write what had been pushed at the last commit; a resumed run makes the later batches again."""
        back = [unit for _, push, unit in self._evicted if push <= self._committed]
        units = [*back, *(unit for push, unit in self._units if push <= self._committed)]
        entries = [entry for unit in units for entry in unit]
        ids = [entry.completion_ids for entry in entries]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(
            {
                "units": [len(unit) for unit in units],
                "rows": [dict(entry.row) for entry in entries],
                "steps": [entry.step for entry in entries],
                "lengths": [len(row) for row in ids],
                "completion_ids": torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32),
                "logprobs": [entry.logprobs for entry in entries],
            },
            path,
        )

    def load(self, path: str) -> None:
        """Continue from [`save`]."""
        state = torch.load(path, weights_only=True)
        ids = state["completion_ids"].split(state["lengths"])
        columns = (state["rows"], ids, state["steps"], state["logprobs"])
        entries = [Replayed(*entry) for entry in zip(*columns, strict=True)]
        self._units.clear()
        for size in state["units"]:
            unit, entries = entries[:size], entries[size:]
            self._units.append((self._pushes, tuple(unit)))
        self.commit()


def _check_row(row: Mapping[str, Any]) -> None:
    for column, value in row.items():
        if not _is_plain(value):
            raise ValueError(
                f"replay_fraction must be 0 with the column {column!r}, which holds a {type(value).__name__}, or one "
                "inside. Checkpoints hold the replayed rows, of text, numbers, lists, dicts and tensors only. Remove "
                "the column, or convert it."
            )


def _is_plain(value: Any) -> bool:
    """Whether torch loads a value without running code."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool, bytes, Tensor)
