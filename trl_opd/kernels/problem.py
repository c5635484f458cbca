# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a call of the fused divergence asks for, and what it finds out about each token.

Shapes: N rows (tokens), H hidden, V vocabulary, K support.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .members import Member, TopK
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
    members: tuple[Member, ...]  # the teachers
    mixture: str  # of them
    mixture_weights: Tensor | None  # (1, M) or (N, M), float64; of several
    student_logit_scale: float
    student_softcap: float | None
    temperature: float
    weights: Tensor | None  # (N,)
    target_ids: Tensor | None  # (N,)
    support: str
    support_size: int
    tail: str
    overlap_top_k: int
    vocab_size: int  # entries that this process compares
    shard: VocabShard  # their place in the whole vocabulary
    compute_dtype: torch.dtype  # of the student's operands
    chunk_bytes: int
    grad_enabled: bool
    backend: str  # "torch" or "triton"
    gather: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    @property
    def has_teacher(self) -> bool:
        return bool(self.members)

    @property
    def teacher(self) -> Head | None:
        """The head of a dense teacher, where there is one teacher."""
        return self.members[0].head if self.members else None

    @property
    def topk(self) -> TopK | None:
        """What is known of a sparse teacher, where there is one teacher."""
        return self.members[0].topk if self.members else None

    @property
    def all_dense(self) -> bool:
        return self.has_teacher and all(member.head is not None for member in self.members)

    @property
    def mixes_logits(self) -> bool:
        """Whether several teachers make one distribution, to be compared with the student's once."""
        return len(self.members) > 1 and self.mixture != "loss_sum"

    @property
    def parts(self) -> "list[Problem]":
        """The problems of one teacher each, or of none, whose weighted mean this is."""
        if self.mixes_logits:  # of logits that are final when they are formed
            final = Head(torch.empty(0), logit_scale=self.temperature)
            return [replace(self, members=(Member(head=final),))]
        return [self] if len(self.members) < 2 else [replace(self, members=(member,)) for member in self.members]

    @property
    def num_buffers(self) -> int:
        """Logits `(n, V)` of a chunk that exist at a time."""
        if self.mixes_logits:
            return 3  # the student's, the mixture's and the next teacher's
        copies = min(len(self.members) - 1, 2)  # of the student's: a gradient takes their place
        return 1 + max(copies, 0) + any(member.head is not None for member in self.members)

    def num_rows(self, num_tokens: int, device: torch.device, dtype: torch.dtype, waiting_bytes: int = 0) -> int:
        """
        Rows of a chunk, so that its logits and what is derived from them stay within `chunk_bytes`.

        `waiting_bytes` are those of an entry whose gradients wait elsewhere.
        """
        buffers = self.num_buffers
        if self.backend != "triton" and (device.type != "cpu" or self.shard.group is not None):
            buffers = 6 + max(2, buffers)  # every temporary is as long as the chunk
        width = max(self.shard.widths)  # processes that share a vocabulary walk in step
        rows = self.chunk_bytes // (width * (buffers * dtype.itemsize + waiting_bytes))
        return max(1, min(num_tokens, rows - rows % 64 if rows > 64 and device.type != "cpu" else rows))


@dataclass
class Upstream:
    """Gradients that reach the per-token outputs; `None` is zero."""

    divergence: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
