# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Writing a cache: resumable, and whole whenever it is killed."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from filelock import FileLock

from .files import META, TEMPORARY, TOKENIZER, ShardEntry, lock_part, read_entries, sync_folder, write_atomically
from .format import Answer, CacheMeta, Question, digest, encode_row, prompt_hash, schema_of

_WAIT = 600.0  # seconds for a shard that another run is writing


class CacheWriter:
    """
    Writes shards into a folder.

    Args:
        folder (`str` or `Path`): The cache; made if it is not there.
        meta ([`CacheMeta`]): What identifies the scores.
        part (`int`, *optional*, defaults to `0`): Number of this writer; several may write at once into their parts.
        tokenizer (*optional*): Saved beside the scores, so that they can be checked when the teacher is gone.
        hold (`bool`, *optional*, defaults to `True`):
            Whether the part is this writer's until it is closed, or while it writes a shard only.

    Raises:
        ValueError: If the folder holds other scores, naming how they differ.
        RuntimeError: If another run writes there.
    """

    def __init__(
        self, folder: str | Path, meta: CacheMeta, *, part: int = 0, tokenizer: Any = None, hold: bool = True
    ):
        self.folder, self.meta, self.part = Path(folder), meta, part
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries: dict[int, ShardEntry] = {}
        # The first shard of each key: an earlier one that is written again must not count on a later one
        self._first: dict[str, int] = {}
        self._lock: FileLock | None = lock_part(self.folder, part, wait=0 if hold else _WAIT)
        try:
            self._check_meta()
            for path in self.folder.glob(f"shard-{part:04d}-*{TEMPORARY}"):  # of a writer that was killed
                path.unlink()
            self._refresh()
            if tokenizer is not None:
                self._save_tokenizer(tokenizer)
        except BaseException:
            self.close()
            raise
        if not hold:
            self.close()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The right to write a shard."""
        if self._lock is not None:
            yield
            return
        lock = lock_part(self.folder, self.part, wait=_WAIT)
        try:
            self._refresh()
            yield
        finally:
            lock.release()

    def _refresh(self) -> None:
        """Take in the shards of this part that are new."""
        names = {entry.name for entry in self.entries.values()}
        for entry in read_entries(self.folder, names, part=self.part):
            self.entries[entry.number] = entry
            self._note(entry.number, entry)

    def _note(self, number: int, entry: ShardEntry) -> None:
        for key in entry.keys:
            self._first[key] = min(number, self._first.get(key, number))

    def _check_meta(self) -> None:
        path = self.folder / META
        if not path.exists():
            strangers = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            strangers = [name for name in strangers if not name.endswith(TEMPORARY)]
            if strangers:
                raise ValueError(
                    f"The output folder must be empty or a cache of scores, got {str(self.folder)!r} with "
                    f"{strangers[:3]}. Give another folder."
                )
            write_atomically(path, self.meta.to_json().encode())
            return
        there = CacheMeta.from_json(path.read_text())
        different = self.meta.difference(there)
        if different:
            shown = ", ".join(f"{n}={getattr(there, n)!r} there, {getattr(self.meta, n)!r} now" for n in different)
            raise ValueError(
                f"The cache {self.folder} holds other scores ({shown}). One cache answers one kind of question. Give "
                "another output folder, or the same arguments as then."
            )

    def _save_tokenizer(self, tokenizer: Any) -> None:
        final, temporary = self.folder / TOKENIZER, self.folder / (TOKENIZER + TEMPORARY)
        if final.exists():
            return
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer.save_pretrained(temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        os.replace(temporary, final)
        sync_folder(self.folder)

    @property
    def next_number(self) -> int:
        """Number of the first shard that is not there."""
        number = 0
        while number in self.entries:
            number += 1
        return number

    def key(self, question: Question) -> bytes:
        return self.meta.key(question.asked_prompt, question.completion_ids)

    def samples(self, questions: Sequence[Question]) -> list[list[str]]:
        """How a shard lists these samples."""
        return [[prompt_hash(q.prompt_ids).hex(), self.key(q).hex()] for q in questions]

    def unanswered(self, questions: Sequence[Question], number: int | None = None) -> dict[bytes, Question]:
        """Those of a shard's samples whose scores no earlier shard of this part has, by key, each once, in order."""
        number = self.next_number if number is None else number
        new: dict[bytes, Question] = {}
        for question in questions:
            key = self.key(question)
            if self._first.get(key.hex(), number) >= number:
                new.setdefault(key, question)
        return new

    def write(self, questions: Sequence[Question], answers: Mapping[bytes, Answer], number: int | None = None) -> None:
        """
        Write a shard.

        Args:
            questions (`Sequence[Question]`): Its samples in order.
            answers (`Mapping[bytes, Answer]`): By key, the scores of those that are [`unanswered`].
            number (`int`, *optional*): Which shard; the first that is not there by default.
        """
        with self._writing():
            self._write(questions, answers, self.next_number if number is None else number)

    def _write(self, questions: Sequence[Question], answers: Mapping[bytes, Answer], number: int) -> None:
        rows = self.unanswered(questions, number)
        data = self._encode({key: (question, answers[key]) for key, question in rows.items()})
        lengths = [len(question.completion_ids) for question in rows.values()]
        entry = ShardEntry(
            part=self.part,
            number=number,
            size=len(data),
            checksum=digest(data),
            keys=[key.hex() for key in rows],
            samples=self.samples(questions),
            tokens=sum(lengths),
            longest=max(lengths, default=0),
        )
        write_atomically(self.folder / entry.data_name, data)
        write_atomically(self.folder / entry.name, entry.to_bytes())
        self.entries[number] = entry
        self._note(number, entry)

    def _encode(self, rows: Mapping[bytes, tuple[Question, Answer]]) -> bytes:
        schema = schema_of(self.meta)
        compression = None if self.meta.compression == "none" else self.meta.compression
        sink = pa.BufferOutputStream()
        # A record batch a row: compressed or not, a row is read without its neighbours
        with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as stream:
            for key, (question, answer) in rows.items():
                stream.write_batch(encode_row(self.meta, schema, key, question, answer))
        return sink.getvalue().to_pybytes()
