# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Metrics by the token's position in its completion, in buckets that double."""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..metrics import TokenMetrics

FIRST = 8  # tokens of the first bucket
MOST = 12  # buckets


def position_edges(max_completion_length: int) -> list[int]:
    """
    Where the buckets of token positions begin, and after them where the last one ends: 0, 8, 16, 32, ...

    At most 12 buckets: the last of many goes to the end, however far that is.
    """
    edges = [0]
    while len(edges) < MOST and FIRST << (len(edges) - 1) < max_completion_length:
        edges.append(FIRST << (len(edges) - 1))
    return [*edges, max_completion_length]


class Positions:
    """
    Sorts tokens by their position.

    Args:
        edges (`list[int]`): See [`position_edges`]. What lies behind the last belongs to the last bucket.
    """

    def __init__(self, edges: list[int]):
        self.edges = edges
        self.labels = [f"{a:05d}-{b - 1:05d}" for a, b in pairwise(edges)]
        self._buckets: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, metrics: "TokenMetrics", values: Mapping[str, Tensor | None], mask: Tensor) -> None:
        """Add `NAME/BUCKET` for each of `values`, by name, `(B, T)`, where `mask` holds."""
        known = {name: x.detach() for name, x in values.items() if x is not None}
        if not known:
            return
        stacked = torch.where(mask, torch.stack(list(known.values())), 0.0)
        dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        columns = torch.cat([stacked.sum(1, dtype=dtype), mask.sum(0, dtype=dtype)[None]])  # (M + 1, T)
        sums = columns.new_zeros(len(columns), len(self.labels))
        sums = sums.index_add_(1, self._bucket_of(mask.shape[1], mask.device), columns)
        counts = sums[-1:].expand(len(known), -1)
        names = [f"{name}/{label}" for name in known for label in self.labels]
        metrics.merge("mean", names, torch.stack([sums[:-1].flatten(), counts.flatten()]))

    def _bucket_of(self, num_tokens: int, device: torch.device) -> Tensor:
        """The bucket of each position, `(T,)`."""
        key = (num_tokens, device)
        if key not in self._buckets:
            if len(self._buckets) > 64:  # lengths differ from batch to batch
                self._buckets.clear()
            inner = torch.tensor(self.edges[1:-1], dtype=torch.long)
            self._buckets[key] = torch.bucketize(torch.arange(num_tokens), inner, right=True).to(device)
        return self._buckets[key]
