# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Searches of the Triton row kernels that PyTorch would sort for: the k-th largest logit, and the adaptive KL's weight.

Both bisect over the bits of a float, whose order as integers is that of the numbers.
"""

import triton
import triton.language as tl

from .triton_cores import kl_terms

LOWEST = tl.constexpr(-1e30)  # of a logit; a finite number whose probability is zero


@triton.jit
def load_logits(row_ptr, cols, vocab_size, width):
    """
    A block of a row of `vocab_size` logits; LOWEST beyond them.

    `width`, the room that the row has in memory, is a multiple of 64: a mask by it is one for whole vectors.
    """
    z = tl.load(row_ptr + cols, mask=cols < width, other=LOWEST)
    z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(cols < vocab_size, z, LOWEST)


@triton.jit
def _ordered(bits):
    """Bits of a float to an integer of the same order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _kth_largest(values, k):
    """The k-th largest entry of a block, by bisection."""
    keys = _ordered(values.to(tl.int32, bitcast=True))
    low = tl.full((), -(1 << 31), tl.int64)
    high = tl.full((), (1 << 31) - 1, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return _ordered(low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def top_threshold(row_ptr, lane_maxima, k, vocab_size, width, BLOCK: tl.constexpr):
    """
    The k-th largest logit of a row.

    The k-th largest of the lanes' maxima is it, unless two of the row's k largest share a lane. So it is a lower
    bound, raised from one entry to the next until fewer than k entries lie above it.
    """
    candidate = _kth_largest(lane_maxima, k)
    threshold = candidate
    above = k
    while above >= k:
        threshold = candidate
        above = above * 0
        candidate = tl.full((), float("inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = load_logits(row_ptr, cols, vocab_size, width)
            higher = z > threshold
            above += tl.sum(higher.to(tl.int32), 0)
            candidate = tl.minimum(candidate, tl.min(tl.where(higher, z, float("inf")), 0))
    return threshold


@triton.jit
def _teacher_bits(z, valid, maximum, log_sum):
    t = tl.where(valid, tl.exp((z - maximum) - log_sum), 0.0)
    return t, t.to(tl.int32, bitcast=True)  # probabilities are not negative: their bits have their order


@triton.jit
def adaptive_weight(
    student_row, teacher_row, s_max, s_log, t_max, t_log, shift, head_mass, vocab_size, width, BLOCK: tl.constexpr
):
    """
    `losses.adaptive_kl_weight` of a row, without sorting it.

    The entry that carries the head over its mass is the smallest x with Σ t over t > x below `head_mass`: found by
    bisection over the bits of x. Of the entries that equal it the first ones are in the head.
    """
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0x3F800010, tl.int32)  # just above 1
    while low < high:
        middle = (low + high) // 2
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            valid = cols < vocab_size
            t, bits = _teacher_bits(load_logits(teacher_row, cols, vocab_size, width), valid, t_max, t_log)
            mass += tl.where(bits > middle, t, 0.0)
        below = tl.sum(mass, 0) < head_mass
        high = tl.where(below, middle, high)
        low = tl.where(below, low, middle + 1)
    crossing = low.to(tl.float32, bitcast=True)

    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        valid = cols < vocab_size
        t, bits = _teacher_bits(load_logits(teacher_row, cols, vocab_size, width), valid, t_max, t_log)
        mass += tl.where(bits > low, t, 0.0)
    mass_above = tl.sum(mass, 0)

    head_gap = tl.zeros([BLOCK], tl.float32)
    all_gap = tl.zeros([BLOCK], tl.float32)
    num_equal = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        valid = cols < vocab_size
        zs = load_logits(student_row, cols, vocab_size, width)
        zt = load_logits(teacher_row, cols, vocab_size, width)
        s = tl.where(valid, tl.exp((zs - s_max) - s_log), 0.0)
        t, bits = _teacher_bits(zt, valid, t_max, t_log)
        _, _, distance = kl_terms(s, t, tl.where(valid, (zs - zt) - shift, 0.0))
        equal = ((bits == low) & valid).to(tl.int32)
        before = num_equal + tl.cumsum(equal, 0) - equal
        in_head = (bits > low) | ((equal > 0) & (mass_above + before * crossing < head_mass))
        head_gap += tl.where(in_head, tl.abs(distance), 0.0)
        all_gap += tl.abs(distance)
        num_equal += tl.sum(equal, 0)
    total = tl.sum(all_gap, 0)
    return tl.where(total > 0, tl.sum(head_gap, 0) / total, 0.5)
