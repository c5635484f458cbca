# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A teacher's batch in pieces of its own size, and answers that wait in CPU memory.

Shapes: B sequences, T completion tokens, H hidden, R sequences of a piece or micro-batch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..collators import TeacherBatch, TeacherScores


def trimmed_pieces(batch: TeacherBatch, size: int, positions: bool) -> Iterator[tuple[Tensor, TeacherBatch]]:
    """
    A batch in pieces of at most `size` sequences of similar length, without the padding that a piece has in common.

    Args:
        batch ([`TeacherBatch`]): The whole.
        size (`int`): Sequences of a piece.
        positions (`bool`):
            Whether the model takes positions. Then each token keeps the one that it has in the whole batch, where the
            padding on its left is counted unless the prompt is the teacher's own.

    Yields:
        `tuple[Tensor, TeacherBatch]`: indices of the sequences, `(R,)`, and the sequences.
    """
    if not batch.own_prompt:
        width = batch.input_ids.shape[1]
        counted = torch.arange(width, device=batch.input_ids.device).expand(batch.input_ids.shape)
        batch = replace(batch, position_ids=counted, own_prompt=positions)
    for rows in batch.attention_mask.sum(1).argsort(stable=True).split(size):
        piece = batch.select(rows)
        used = piece.attention_mask.bool().any(0).nonzero().squeeze(-1)
        prompt = piece.input_ids.shape[1] - piece.num_completion_tokens
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        first = min(first, prompt - 1) if positions else 0
        end = max(last + 1, prompt + 1)
        whole, tail = slice(first, end), slice(None, end - prompt)
        yield (
            rows,
            replace(
                piece,
                input_ids=piece.input_ids[:, whole],
                attention_mask=piece.attention_mask[:, whole],
                position_ids=piece.position_ids[:, whole],
                completion_ids=piece.completion_ids[:, tail],
                completion_mask=piece.completion_mask[:, tail],
                requested_ids=None if piece.requested_ids is None else piece.requested_ids[:, tail],
            ),
        )


def assemble(
    pieces: Iterable[tuple[Tensor, TeacherScores]], shape: tuple[int, int], device: torch.device | None = None
) -> TeacherScores:
    """
    The answer about a batch from those about its pieces; 0 where a piece was trimmed.

    Args:
        pieces (`Iterable[tuple[Tensor, TeacherScores]]`): Indices of sequences, and their answer.
        shape (`tuple[int, int]`): B and T of the batch.
        device (`torch.device`, *optional*): Where to keep it, by default where the pieces are.
    """
    whole = TeacherScores()
    for rows, scores in pieces:
        whole.head = scores.head
        for key in ("hidden_states", "sampled_logprobs"):
            value: Tensor | None = getattr(scores, key)
            if value is None:
                continue
            kept: Tensor | None = getattr(whole, key)
            if kept is None:
                pinned = device is not None and device.type == "cpu" and value.device.type == "cuda"
                kept = torch.zeros(
                    (*shape, *value.shape[2:]), dtype=value.dtype, device=device or value.device, pin_memory=pinned
                )
                setattr(whole, key, kept)
            for row, answer in zip(rows.tolist(), value, strict=True):
                kept[row, : len(answer)].copy_(answer)
    return whole


class KeptScores:
    """
    [`PendingScores`] of a generation batch: in CPU memory until the loss needs those of a micro-batch.

    Args:
        scores ([`TeacherScores`]): On the CPU.
    """

    def __init__(self, scores: TeacherScores):
        self._kept = scores

    def collect(self, rows: Tensor, batch: TeacherBatch) -> TeacherScores:
        device, picked = batch.completion_ids.device, TeacherScores(head=self._kept.head)
        for key in ("hidden_states", "sampled_logprobs"):
            kept: Tensor | None = getattr(self._kept, key)
            if kept is None:
                continue
            value = torch.empty((len(rows), *kept.shape[1:]), dtype=kept.dtype, device=device)
            for i, row in enumerate(rows.tolist()):
                value[i].copy_(kept[row], non_blocking=True)
            setattr(picked, key, value)
        return picked
