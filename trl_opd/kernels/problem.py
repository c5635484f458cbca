# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a call of the fused divergence asks for, and what it finds out about each token.

Shapes: N rows (tokens), H hidden, V vocabulary, K support.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .projection import Head
from .vocab_parallel import VocabShard

ROOM = 64  # columns: Triton's rows have room for a multiple, so that vectors and products find aligned operands
# Statistics of a row, in the order in which all backends store them
STATS = (
    "divergence",
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprobs",
    "teacher_logprobs",
    "overlap",
    "student_logsumexp",
    "teacher_logsumexp",
)


@dataclass
class Problem:
    """Everything about a call that carries no gradient."""

    divergence: str
    params: dict[str, float]
    teacher_hidden: Tensor | None  # (N, H_t)
    teacher: Head | None
    student_logit_scale: float
    student_softcap: float | None
    temperature: float
    weights: Tensor | None  # (N,)
    target_ids: Tensor | None  # (N,)
    support: str
    support_size: int
    tail: str
    topk: tuple[Tensor, Tensor] | None  # (N, K) ids and log-probs
    overlap_top_k: int
    vocab_size: int  # entries that this process compares
    shard: VocabShard  # their place in the whole vocabulary
    compute_dtype: torch.dtype  # of the student's operands
    teacher_dtype: torch.dtype  # of the teacher's
    chunk_bytes: int
    grad_enabled: bool
    backend: str  # "torch" or "triton"
    gather: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or self.topk is not None

    def num_rows(self, num_tokens: int, device: torch.device, dtype: torch.dtype, waiting_bytes: int = 0) -> int:
        """
        Rows of a chunk, so that its logits and what is derived from them stay within `chunk_bytes`.

        `waiting_bytes` are those of an entry whose gradients wait elsewhere.
        """
        buffers = 2 if self.teacher is not None else 1
        if self.backend != "triton" and (device.type != "cpu" or self.shard.group is not None):
            buffers = 8  # every temporary is as long as the chunk
        width = max(self.shard.widths)  # processes that share a vocabulary walk in step
        rows = self.chunk_bytes // (width * (buffers * dtype.itemsize + waiting_bytes))
        return max(1, min(num_tokens, rows - rows % 64 if rows > 64 and device.type != "cpu" else rows))


@dataclass
class Upstream:
    """Gradients that reach the per-token outputs; `None` is zero."""

    divergence: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
