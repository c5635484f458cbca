# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a metric is made of while it is gathered, and what becomes of it when it is logged.

A kind keeps S numbers for each metric, as a matrix `(S, M)` for M metrics that are measured together. Two matrices
merge to that of both halves, in any order and any grouping: so micro-batches, gradient accumulation and processes
change nothing. Torch only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Weights are sorted into bins of 1/32 octave, from 2^-20 to 2^12
_BINS_PER_OCTAVE = 32
_LOWEST, _HIGHEST = -20, 12
NUM_BINS = (_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE + 1


class Kind(NamedTuple):
    """How a metric merges, and its value(s) by the suffix of its name (none if nothing was measured)."""

    merge: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Sequence[float]], dict[str, float]]


def _mean(kept: Sequence[float]) -> dict[str, float]:
    total, count = kept
    return {"": total / count} if count else {}


def _geometric_mean(kept: Sequence[float]) -> dict[str, float]:
    return {suffix: math.exp(value) for suffix, value in _mean(kept).items()}


def _largest(kept: Sequence[float]) -> dict[str, float]:
    return {"": kept[0]} if kept[0] > -math.inf else {}


def _effective_sample_size(kept: Sequence[float]) -> dict[str, float]:
    """(Σ w)² / (n Σ w²); nothing where all weights are equal, for then it is 1 (or, of weights of 0, undefined)."""
    count, total, squares = kept
    if not squares:
        return {}
    share = total * total / (count * squares)
    return {"": share} if 1 - share > 1e-12 else {}


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """
    Count, means and centred second moments of two samples together: rows n, x̄, ȳ, Σ(x−x̄)², Σ(y−ȳ)², Σ(x−x̄)(y−ȳ).

    Paper: Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance" (1983): nothing cancels, as it would
    in sums of squares of values that are large beside their spread.
    """
    count = a[0] + b[0]
    share = b[0] / count.clamp(min=1)
    x, y = b[1] - a[1], b[2] - a[2]
    both = a[0] * share  # n_a n_b / n
    return torch.stack(
        [
            count,
            a[1] + x * share,
            a[2] + y * share,
            a[3] + b[3] + x * x * both,
            a[4] + b[4] + y * y * both,
            a[5] + b[5] + x * y * both,
        ]
    )


def moments(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """The rows of [`merge_moments`], of the pairs where `mask` holds, `(6, 1)`. Entries elsewhere may be NaN."""
    count = mask.sum().to(x.dtype)
    x, y = (torch.where(mask, v, 0.0) for v in (x, y))
    mean_x, mean_y = (v.sum() / count.clamp(min=1) for v in (x, y))
    x, y = (torch.where(mask, v - mean, 0.0) for v, mean in ((x, mean_x), (y, mean_y)))
    return torch.stack([count, mean_x, mean_y, (x * x).sum(), (y * y).sum(), (x * y).sum()])[:, None]


def _correlation(kept: Sequence[float]) -> dict[str, float]:
    """Pearson's; nothing where one of the two does not vary (beyond rounding)."""
    count, x, y, xx, yy, xy = kept
    noise = 1e-14 * count
    if not (xx > noise * x * x and yy > noise * y * y):  # NaN, too
        return {}
    return {"": max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))}


def loss_by_weight(loss: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Count, Σ weight, and Σ |loss| by the weight's bin, of the tokens in `mask`, `(2 + NUM_BINS, 1)`."""
    loss, weights = (torch.where(mask, x, 0.0).flatten().to(_double(x)) for x in (loss.abs(), weights))
    bins = weights.abs().log2().mul(_BINS_PER_OCTAVE).round().clamp(_LOWEST * _BINS_PER_OCTAVE, None)
    bins = (bins - _LOWEST * _BINS_PER_OCTAVE).clamp(max=NUM_BINS - 1).nan_to_num().long()
    histogram = loss.new_zeros(NUM_BINS).index_add_(0, bins, loss)
    return torch.cat([torch.stack([mask.sum().to(loss.dtype), weights.sum()]), histogram])[:, None]


def _loss_shares(kept: Sequence[float]) -> dict[str, float]:
    """
    Shares of the loss of the tokens that weigh less than half, about, and more than twice the mean. A weight within
    2.2 % of a threshold may be taken for one in the middle: the mean is known only when all weights have gone by.
    """
    count, total, *histogram = kept
    loss = math.fsum(histogram)
    if not count or not loss > 0 or not total > 0:
        return {}
    low, high = (_bin(factor * total / count) for factor in (0.5, 2.0))
    light, heavy = math.fsum(histogram[:low]), math.fsum(histogram[high + 1 :])
    return {"/light": light / loss, "/even": math.fsum(histogram[low : high + 1]) / loss, "/heavy": heavy / loss}


def _bin(weight: float) -> int:
    place = round(math.log2(weight) * _BINS_PER_OCTAVE) - _LOWEST * _BINS_PER_OCTAVE
    return max(0, min(place, NUM_BINS - 1))


def _double(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


KINDS: Mapping[str, Kind] = {
    "mean": Kind(torch.add, _mean),  # total, count
    "geometric_mean": Kind(torch.add, _geometric_mean),  # of logs
    "max": Kind(torch.maximum, _largest),
    "effective_sample_size": Kind(torch.add, _effective_sample_size),  # n, Σ w, Σ w²
    "correlation": Kind(merge_moments, _correlation),
    "loss_by_weight": Kind(torch.add, _loss_shares),
}
