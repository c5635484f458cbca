# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a call of the fused divergence asks for, and what it finds out about each token.

Shapes: N rows (tokens), H hidden, V vocabulary, K support.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .members import AffineTarget, ContrastTarget, Member, TopK
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
    "overlap_advantage",
)
# From the statistics of n rows, by name, `(n,)` each, to a weight each
TokenWeighting = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Problem:
    """Everything about a call that carries no gradient."""

    divergence: str
    params: dict[str, Any]
    members: tuple[Member, ...]  # the teachers
    mixture: str  # of them
    mixture_weights: Tensor | None  # (1, M) or (N, M), float64; of several that are mixed
    student_logit_scale: float
    student_softcap: float | None
    temperature: float | Tensor  # (N, 1) float64, if it differs by row
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
    target: AffineTarget | ContrastTarget | None = None  # what is aimed at, if it is not the teacher itself
    further: Mapping[str, int | None] = field(default_factory=dict)  # names of `statistics`, with their sizes
    token_weighting: TokenWeighting | None = None
    teacher_is_final: bool = False  # whether the teacher's logits need no scale, softcap or temperature any more

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
        return len(self.members) > 1 and self.mixture in ("arithmetic", "geometric")

    @property
    def parts(self) -> "list[Problem]":
        """The problems of one teacher each, or of none, whose weighted mean this is."""
        if self.mixes_logits:
            return [replace(self, members=(Member(head=Head(torch.empty(0))),), teacher_is_final=True)]
        if len(self.members) < 2 or self.target is not None:
            return [self]
        return [replace(self, members=(member,)) for member in self.members]

    @property
    def stat_names(self) -> tuple[str, ...]:
        """What is stored of a row: `STATS`, then what only this call asks for."""
        names = [*STATS]
        if isinstance(self.target, ContrastTarget):
            names.append("target_coef")
        names += self.further
        if self.token_weighting is not None:
            names.append("weights")
        return tuple(names)

    @property
    def known(self) -> tuple[str, ...]:
        """Those of them that this call finds out."""
        missing: set[str] = set()
        if self.target_ids is None:
            missing |= {"student_logprobs", "teacher_logprobs"}
        if not self.all_dense:
            missing |= {"teacher_logprobs", "teacher_logsumexp"}
        if not self.overlap_top_k:
            missing |= {"overlap", "overlap_advantage"}
        if not self.has_teacher:
            missing |= {"divergence", "forward_kl", "reverse_kl", "teacher_entropy"}
        return tuple(name for name in self.stat_names if name not in missing)

    def temperature_at(self, sl: slice) -> float | Tensor:
        """Of the rows `sl`: a number, or `(n, 1)`."""
        return self.temperature[sl] if isinstance(self.temperature, Tensor) else self.temperature

    @property
    def num_buffers(self) -> int:
        """Logits `(n, V)` of a chunk that exist at a time."""
        if self.mixes_logits:
            return 3  # the student's, the mixture's and the next teacher's
        if self.target is not None:
            return 1 + len(self.members)
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
            buffers += 0 if self.target is None else 4
        width = max(self.shard.widths)  # processes that share a vocabulary walk in step
        rows = self.chunk_bytes // (width * (buffers * dtype.itemsize + waiting_bytes))
        return max(1, min(num_tokens, rows - rows % 64 if rows > 64 and device.type != "cpu" else rows))


@dataclass
class Upstream:
    """Gradients that reach the per-token outputs; `None` is zero."""

    divergence: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
