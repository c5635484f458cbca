# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Reading a cache from memory-mapped files."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa

from .files import META, TOKENIZER, ShardEntry, read_entries
from .format import CacheMeta, Row

_OPEN_SHARDS = 64  # each is an open file, of which a process may have about a thousand


class CacheReader:
    """
    Rows of a cache by key, and keys by prompt. A shard's checksum is compared when it is first read.

    Args:
        folder (`str` or `Path`): The cache.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not (self.folder / META).is_file():
            state = "has no meta.json" if self.folder.is_dir() else "does not exist"
            raise ValueError(
                f"A cache of teacher scores must be a folder that `trl-opd score` wrote, got {str(folder)!r}, which "
                f"{state}. Check the path, or run `trl-opd score --output {folder} ...`."
            )
        self.meta = CacheMeta.from_json((self.folder / META).read_text())
        self.longest = 0
        self.prompts: dict[bytes, list[bytes]] = {}  # keys of each prompt's samples, prompts in order
        self._entries: list[ShardEntry] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        self._read: set[str] = set()
        self._verified: set[int] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that were written since."""
        for entry in read_entries(self.folder, self._read):
            index = len(self._entries)
            self._entries.append(entry)
            self._read.add(entry.name)
            self._place.update({bytes.fromhex(key): (index, row) for row, key in enumerate(entry.keys)})
            for prompt, key in entry.samples:
                self.prompts.setdefault(bytes.fromhex(prompt), []).append(bytes.fromhex(key))
            self.longest = max(self.longest, entry.longest)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __getitem__(self, key: bytes) -> Row:
        """
        The row of a key.

        Raises:
            KeyError: If it is not there.
            CorruptCacheError: If its shard is not as it was written.
        """
        index, row = self._place[key]
        return Row.decode(self._shard(index).get_batch(row))

    def _shard(self, index: int) -> Any:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        entry = self._entries[index]
        if index not in self._verified:
            entry.verify(self.folder)
            self._verified.add(index)
        shard = pa.ipc.open_file(pa.memory_map(str(self.folder / entry.data_name)))
        self._open[index] = shard
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def load_tokenizer(self) -> Any:
        """The teacher's tokenizer, if it was saved."""
        path = self.folder / TOKENIZER
        if not path.is_dir():
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(path))
