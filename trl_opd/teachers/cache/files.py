# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Files that are whole or absent: a process may be killed at any byte.

A shard is `shard-PPPP-NNNNN.arrow`, the rows, and `shard-PPPP-NNNNN.json`, which names them with a checksum of the
first. It exists once the second does. PPPP is the writer's part, NNNNN counts from 0.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .format import digest

META = "meta.json"
TOKENIZER = "tokenizer"
TEMPORARY = ".tmp"


class CorruptCacheError(RuntimeError):
    """Files of a cache are not as they were written."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole, on the disk, or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def lock_part(folder: Path, part: int, wait: float = 0) -> FileLock:
    """
    The right to write one part of a cache. The system takes it back from a process that ends, however it ends.

    Args:
        folder (`Path`): The cache.
        part (`int`): Which part.
        wait (`float`): Seconds to wait for a writer that holds it.

    Raises:
        RuntimeError: If another writer holds it for longer.
    """
    lock = FileLock(folder / f".lock-{part:04d}", timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"The cache {folder} is being written by another run. Two writers would overwrite each other. Wait for "
            "it, or give another output folder."
        ) from None
    return lock


@dataclass
class ShardEntry:
    """
    The names in a shard.

    Args:
        part (`int`), number (`int`): Which shard.
        size (`int`): Bytes of its rows.
        checksum (`str`): BLAKE2b of them.
        keys (`list[str]`): Key of each row.
        samples (`list[list[str]]`):
            Student's prompt and key of each sample, in order; a sample that was met before has no row of its own.
        tokens (`int`): Completion tokens of its rows.
        longest (`int`): Tokens of the longest of its completions.
    """

    part: int
    number: int
    size: int
    checksum: str
    keys: list[str] = field(default_factory=list)
    samples: list[list[str]] = field(default_factory=list)
    tokens: int = 0
    longest: int = 0

    @staticmethod
    def stem(part: int, number: int) -> str:
        return f"shard-{part:04d}-{number:05d}"

    @property
    def data_name(self) -> str:
        return f"{self.stem(self.part, self.number)}.arrow"

    @property
    def name(self) -> str:
        return f"{self.stem(self.part, self.number)}.json"

    def to_bytes(self) -> bytes:
        text = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"entry": text, "checksum": digest(text.encode())}).encode()

    @classmethod
    def read(cls, path: Path) -> "ShardEntry":
        try:
            outer: dict[str, Any] = json.loads(path.read_bytes())
            if digest(outer["entry"].encode()) == outer["checksum"]:
                return cls(**json.loads(outer["entry"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise CorruptCacheError(f"{path} is not as it was written (its checksum differs). {remedy(path)}")

    def verify(self, folder: Path) -> bytes | None:
        """
        The rows' bytes, if they are those that were written.

        Raises:
            CorruptCacheError: If they are not.
        """
        path = folder / self.data_name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise CorruptCacheError(f"{path} is missing. {remedy(path)}") from None
        if len(data) != self.size:
            raise CorruptCacheError(f"{path} has {len(data)} bytes of {self.size}. {remedy(path)}")
        if digest(data) != self.checksum:
            raise CorruptCacheError(f"{path} is not as it was written (its checksum differs). {remedy(path)}")
        return data


def remedy(path: Path) -> str:
    return (
        f"Nothing was read from it. Delete {path.with_suffix('.json').name} and run the same `trl-opd score` command "
        "again: it scores this shard alone."
    )


def read_entries(folder: Path, known: set[str] | None = None, part: int | None = None) -> list[ShardEntry]:
    """The shards of a cache (or of one part) in order, without those whose names are `known`."""
    pattern = "shard-*.json" if part is None else f"shard-{part:04d}-*.json"
    paths = sorted(path for path in folder.glob(pattern) if known is None or path.name not in known)
    return [ShardEntry.read(path) for path in paths]
