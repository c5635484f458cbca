# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the Triton row kernels find out where PyTorch would sort: the k-th largest logit and the top sets' advantage, a
rank, the adaptive KL's weight.

Bisection is over the bits of a float, whose order as integers is that of the numbers.
"""

import triton
import triton.language as tl

from .triton_cores import kl_terms

LOWEST = tl.constexpr(-1e30)  # of a logit; a finite number whose probability is zero
ABSENT = tl.constexpr(-1e29)  # a logit below is LOWEST


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
def _in_both(zs, zt, s_threshold, t_threshold):
    """Which entries are in both top sets, with a probability."""
    return (zs >= s_threshold) & (zt >= t_threshold) & (tl.minimum(zs, zt) > ABSENT)


@triton.jit
def overlap_advantage(student_row, teacher_row, s_threshold, t_threshold, vocab_size, width, BLOCK: tl.constexpr):
    """
    `supports.overlap_advantage` of a row, from the top sets' least logits.

    Relative to the common entries' maxima, that nothing underflows, and with x = Σ t / Σ s − 1 as
    −(Σ (s log s/t − s + t) / Σ s − (x − log(1 + x))): both terms are of second order where the models almost agree.
    """
    s_max = tl.full([BLOCK], float("-inf"), tl.float32)
    t_max = tl.full([BLOCK], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zs = load_logits(student_row, cols, vocab_size, width)
        zt = load_logits(teacher_row, cols, vocab_size, width)
        common = _in_both(zs, zt, s_threshold, t_threshold)
        s_max = tl.maximum(s_max, tl.where(common, zs, float("-inf")))
        t_max = tl.maximum(t_max, tl.where(common, zt, float("-inf")))
        count += tl.where(common, 1.0, 0.0)
    s_largest = tl.max(s_max, 0)
    t_largest = tl.max(t_max, 0)
    shift = s_largest - t_largest
    s_sum = tl.zeros([BLOCK], tl.float32)
    reverse_sum = tl.zeros([BLOCK], tl.float32)
    distance_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zs = load_logits(student_row, cols, vocab_size, width)
        zt = load_logits(teacher_row, cols, vocab_size, width)
        common = _in_both(zs, zt, s_threshold, t_threshold)
        s = tl.where(common, tl.exp(zs - s_largest), 0.0)
        t = tl.where(common, tl.exp(zt - t_largest), 0.0)
        _, reverse, distance = kl_terms(s, t, tl.where(common, (zs - zt) - shift, 0.0))
        s_sum += s
        reverse_sum += reverse
        distance_sum += distance
    number = tl.sum(count, 0)
    mass = tl.where(number > 0, tl.sum(s_sum, 0), 1.0)
    x = -tl.sum(distance_sum, 0) / mass
    tail = 1 / 5 - x * (1 / 6 - x * (1 / 7 - x * (1 / 8 - x / 9)))
    series = x * x * (0.5 - x * (1 / 3 - x * (1 / 4 - x * tail)))
    beyond = tl.where(tl.abs(x) < 0.125, series, x - tl.log(1.0 + x))
    kl = tl.sum(reverse_sum, 0) / mass - beyond
    return -tl.maximum(kl, 0.0) / tl.maximum(number, 1.0)


@triton.jit
def rank_of(row_ptr, target, log_sum, vocab_size, width, BLOCK: tl.constexpr):
    """Rank of an entry of a row, 1 is the best; entries that tie share it. NaN in a row whose normaliser is."""
    own = tl.maximum(tl.load(row_ptr + target), LOWEST)
    larger = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        larger += tl.where(load_logits(row_ptr, cols, vocab_size, width) > own, 1.0, 0.0)
    return tl.where(log_sum == log_sum, 1.0 + tl.sum(larger, 0), float("nan"))


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
