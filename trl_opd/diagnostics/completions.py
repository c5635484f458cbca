# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the completions of a generation batch look like as text: repetition, sameness, emptiness."""

import hashlib
import zlib
from array import array
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..metrics import TokenMetrics

LAST_CHARACTERS = 10_000
REPETITIVE = 10.0  # ratio above which a text repeats itself; plain prose has about 2 to 3
_NAMES = ("completions/repetition", "completions/repetitive_share", "completions/empty_share")


def repetition(text: str) -> float:
    """Bytes of the last 10,000 characters over what zlib makes of them: how much the text repeats itself."""
    data = text[-LAST_CHARACTERS:].encode("utf-8", errors="replace")
    return len(data) / len(zlib.compress(data))


def text_of(completion: Any) -> str:
    """
    What the model wrote, of a completion as reward functions get it: text, or messages, of which those of other roles
    (tools) are not its own.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(_strings(message) for message in completion if message.get("role", "assistant") == "assistant")


def _strings(value: Any) -> str:
    """All text in a message: its content, its reasoning, its tool calls."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(filter(None, (_strings(v) for k, v in value.items() if k not in ("role", "type"))))
    return "\n".join(filter(None, map(_strings, value))) if isinstance(value, (list, tuple)) else ""


def is_empty(ids: Sequence[int], end_ids: Collection[int | None]) -> bool:
    """Whether nothing but tokens that end a completion is there."""
    return all(token in end_ids for token in ids)


def digest(ids: Sequence[int]) -> bytes:
    """8 bytes that differ between completions that differ."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=8).digest()


def add_completions(
    metrics: "TokenMetrics",
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    end_ids: Collection[int | None],
    index: int,
) -> None:
    """
    Add the completions of a generation batch. No collective: a process whose text cannot be read holds up no other.

    Args:
        metrics ([`TokenMetrics`]): Where to.
        completions (`Sequence`): This process's, as reward functions get them.
        completion_ids (`Sequence[Sequence[int]]`): The tokens of each that the model wrote.
        end_ids (`Collection[int]`): Tokens that end a completion.
        index (`int`): Number of the generation batch, the same on all processes.
    """
    texts = [text_of(completion) for completion in completions]
    ratios = [repetition(text) for text in texts if text]
    empty = sum(is_empty(ids, end_ids) for ids in completion_ids)
    totals = [sum(ratios), sum(ratio > REPETITIVE for ratio in ratios), empty]
    counts = [len(ratios), len(ratios), len(completion_ids)]
    metrics.merge("mean", _NAMES, torch.tensor([totals, counts], dtype=torch.float64))
    metrics.add_members("completions/distinct_share", index, map(digest, completion_ids))
