# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher whose answers are kept, so that it is asked everything once."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..collators import TeacherBatch, TeacherScores
from .base import PendingScores, submit, teacher_name
from .cache import Answer, CacheMeta, CacheReader, CacheWriter, Question
from .cached import check_request, find_keys, read_scores
from .fingerprints import model_name, tokenizer_fingerprint, weights_fingerprint
from .keeping import answers_of, whole_question

if TYPE_CHECKING:
    from trl import GRPOTrainer


class RecordingTeacher:
    """
    A teacher in front of a cache: it is asked what the cache lacks, and what it answers is stored before it is used.

    A run over the same rollouts again (more epochs of a [`CachedTeacher`] that replays them, another objective on
    them, a run that was killed and repeats its steps) costs the teacher nothing. The cache is whole whenever the
    process is killed. Stored are the top `support_size` log-probs (the sampled token's alone with
    `support="sampled"`), so a teacher that answers with hidden states is asked at generation time and reduced to them:
    the objective is the one on the teacher's top k. A server's ranks of the sampled tokens are not stored, nor are
    they handed on: an answer is the same whether it is new or stored.

    Each process writes a part of the cache of its own, one shard for each generation batch with new samples.

    Args:
        teacher (*a* [`Teacher`]): Who is asked. Its weights must not move.
        path (`str` or `Path`): The cache, new or begun with the same teacher and arguments.
        batch_size (`int`, *optional*, defaults to `8`): Sequences of one question to a teacher of hidden states.
        logprob_dtype, compression (`str`): As in [`teachers.cache.CacheMeta`].
    """

    def __init__(
        self,
        teacher: Any,
        path: str | Path,
        batch_size: int = 8,
        logprob_dtype: str = "float32",
        compression: str = "none",
    ):
        if getattr(teacher, "changes", False):
            raise ValueError(
                f"A recorded teacher must not change during the run, got {teacher_name(teacher)!r}. Its answers of "
                "one step are not those of the next. Use it without recording, or freeze it."
            )
        self.teacher, self.path, self.batch_size = teacher, Path(path), batch_size
        self.members = [teacher]
        self.logprob_dtype, self.compression = logprob_dtype, compression
        self.writer: CacheWriter | None = None
        self.reader: Any = None
        self._trainer: Any = None

    @property
    def name(self) -> str:
        """The inner teacher's."""
        return teacher_name(self.teacher)

    @property
    def vocab_size(self) -> int | None:
        """The inner teacher's."""
        return getattr(self.teacher, "vocab_size", None)

    @property
    def max_length(self) -> int | None:
        """The inner teacher's."""
        return getattr(self.teacher, "max_length", None)

    @property
    def asynchronous(self) -> bool:
        """Whether the inner teacher answers while the student works."""
        return getattr(self.teacher, "asynchronous", False)

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Prepare the inner teacher and open the cache."""
        if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and getattr(
            self.teacher, "scores_in_loss", False
        ):
            raise ValueError(
                "A recorded teacher must be whole on each process, but FSDP or DeepSpeed shard it: processes would "
                "wait for each other where only some have something to ask. Serve it and pass its URL, or score with "
                "`trl-opd score` first."
            )
        if hasattr(self.teacher, "prepare"):
            self.teacher.prepare(trainer)
        self._trainer, args = trainer, trainer.args
        tokenizer = trainer._tokenizer
        meta = CacheMeta(
            teacher=model_name(self.teacher),
            weights=weights_fingerprint(self.teacher),
            vocab_size=self.vocab_size,
            vocabulary=tokenizer_fingerprint(tokenizer),
            temperature=args.divergence_temperature,
            support="sampled" if args.support == "sampled" else "teacher_top_k",
            support_size=args.support_size,
            logprob_dtype=self.logprob_dtype,
            compression=self.compression,
        )
        rank = trainer.accelerator.process_index
        with trainer.accelerator.main_process_first():  # which writes what is common to the parts
            self.writer = CacheWriter(self.path, meta, part=rank, tokenizer=None if rank else tokenizer, hold=False)
        self.reader = CacheReader(self.path)
        check_request(self.reader, args)

    def __call__(self, batch: TeacherBatch) -> TeacherScores:
        keys, missing = self._find(batch)
        answers: list[Answer] = []
        for start in range(0, len(missing), self.batch_size):
            rows = torch.tensor(missing[start : start + self.batch_size])
            answers += self._answers(None, rows, self._question(batch, rows))
        return self.keep(batch, keys, missing, answers)

    def submit(self, batch: TeacherBatch) -> "RecordedPending | None":
        """Ask an asynchronous teacher about what is not stored."""
        if not self.asynchronous:
            return None
        keys, missing = self._find(batch)
        return RecordedPending(self, batch, keys, missing)

    def _find(self, batch: TeacherBatch) -> tuple[list[bytes | None], list[int]]:
        """The key of each sequence, and the first row of each key that is not stored."""
        keys = find_keys(batch, self.reader.meta)
        if any(key is not None and key not in self.reader for key in keys):
            self.reader.refresh()  # another process may have been given the same sample before
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key is not None and key not in self.reader}
        return keys, sorted(first.values())

    def _question(self, batch: TeacherBatch, rows: Tensor) -> TeacherBatch:
        return whole_question(batch.select(rows), self.reader.meta)

    def _answers(self, pending: Any, rows: Tensor, question: TeacherBatch) -> list[Answer]:
        vocab_size = getattr(self._trainer, "student_vocab_size", None)
        return answers_of(self.teacher, pending, rows, question, self.reader.meta, vocab_size)

    def keep(
        self, batch: TeacherBatch, keys: list[bytes | None], missing: list[int], answers: list[Answer]
    ) -> TeacherScores:
        """
        Store what is new and answer from the store.

        Args:
            batch ([`TeacherBatch`]): The question.
            keys (`list[bytes | None]`): Of its sequences.
            missing (`list[int]`): The rows that were not stored.
            answers (`list[Answer]`): Their scores.
        """
        assert self.writer is not None
        if missing:
            sequences = batch.sequences()
            questions = [
                Question(self._student_prompt(batch, i, sequences[i][0]), sequences[i][1], sequences[i][0])
                if batch.own_prompt
                else Question(*sequences[i])
                for i in missing
            ]
            new = {key: answers[missing.index(i)] for i, key in enumerate(keys) if i in missing and key is not None}
            self.writer.write(questions, new)
            self.reader.refresh()
        return read_scores(self.reader, self.reader.meta, batch, keys)

    def _student_prompt(self, batch: TeacherBatch, row: int, asked: list[int]) -> list[int]:
        """The prompt by which a replay finds the sample, where the teacher reads another."""
        if batch.examples is None or "prompt" not in batch.examples[row]:
            return asked
        return list(self._trainer._tokenize_prompts([batch.examples[row]["prompt"]])[0][0])


class RecordedPending:
    """Answers of an asynchronous teacher, stored when the first of them is collected."""

    def __init__(self, teacher: RecordingTeacher, batch: TeacherBatch, keys: list[bytes | None], missing: list[int]):
        self.teacher, self.batch, self.keys, self.missing = teacher, batch, keys, missing
        self._question: TeacherBatch | None = None
        self._pending: PendingScores | None = None
        self._scores: TeacherScores | None = None
        if missing:
            self._question = teacher._question(batch, torch.tensor(missing))
            self._pending = submit(teacher.teacher, self._question)

    def collect(self, rows: Tensor, batch: TeacherBatch) -> TeacherScores:
        """See [`PendingScores`]."""
        if self._scores is None:
            answers: list[Answer] = []
            if self._question is not None:
                answers = self.teacher._answers(self._pending, torch.arange(len(self.missing)), self._question)
            self._scores = self.teacher.keep(self.batch, self.keys, self.missing, answers)
        return self._scores.select(rows)
