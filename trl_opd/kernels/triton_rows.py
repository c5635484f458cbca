# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels over the rows of a chunk of fp32 logits: statistics, divergence and gradient, one program a row.

`dense_kernel` reads both models' logits twice: once for the normalisers, once for value, statistics and gradient
(three times where the gradient needs the row sum of `a`, see `triton_cores`; the adaptive and the gated KL and the
concrete score look at them more often). `partial_kernel` and `softmax_kernel` are the same two passes for one model
alone, around the small problem of a top-k support. `triton_backend` launches them.

Shapes: n rows, V vocabulary. Rows have room up to a multiple of 64 columns, where anything may stand. A scalar per row
is stored at `ptr + index * stride + row`.
"""

import triton
import triton.language as tl

from .triton_cores import core, kl_terms, tanh, weight_of
from .triton_search import ABSENT, LOWEST, adaptive_weight, load_logits, overlap_advantage, rank_of, top_threshold

_INFINITE = tl.constexpr(1e20)  # a sum that met LOWEST


@triton.jit
def _shape(
    row_ptr,
    bias_ptr,
    cols,
    vocab_size,
    width,
    inner,
    outer,
    SHAPED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Raw logits to final ones: bias, scale, softcap and temperature; written back, so that later passes only read."""
    z = load_logits(row_ptr, cols, vocab_size, width)
    if SHAPED:
        if BIAS:
            z += tl.load(bias_ptr + cols, mask=cols < vocab_size, other=0.0)
        z = outer * tanh(z * inner) if SOFTCAP else z * inner
        z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        z = tl.where(cols < vocab_size, z, LOWEST)
        tl.store(row_ptr + cols, z, mask=cols < width)
    return z


@triton.jit
def _slope(z, outer, slope, SOFTCAP: tl.constexpr):
    """∂(final logit)/∂(raw logit), from the final one."""
    if SOFTCAP:
        ratio = z / outer
        result = slope * (1.0 - ratio * ratio)
    else:
        result = slope
    return result


@triton.jit
def _log_prob(row_ptr, target, maximum, log_sum):
    z = tl.load(row_ptr + target)
    return (tl.where(z < LOWEST, LOWEST, z) - maximum) - log_sum


@triton.jit
def _finite_or_inf(x):
    return tl.where(x > _INFINITE, float("inf"), x)


@triton.jit
def _entropy(logits_row, maximum, log_sum, vocab_size, width, BLOCK: tl.constexpr):
    entropy = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        logprob = (load_logits(logits_row, cols, vocab_size, width) - maximum) - log_sum
        entropy -= tl.where(cols < vocab_size, tl.exp(logprob), 0.0) * logprob
    return tl.sum(entropy, 0)


@triton.jit
def _means(
    student_row, teacher_row, s_max, s_log, t_max, t_log, shift, p0, p1, vocab_size, width, BLOCK: tl.constexpr
):
    """Means of log s − log t under the concrete score's two weights, and the uniform weight."""
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zs = load_logits(student_row, cols, vocab_size, width)
        zt = load_logits(teacher_row, cols, vocab_size, width)
        count += tl.where(tl.maximum(zs, zt) > ABSENT, 1.0, 0.0)
    share = 1.0 / tl.sum(count, 0)
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        valid = cols < vocab_size
        zs = load_logits(student_row, cols, vocab_size, width)
        zt = load_logits(teacher_row, cols, vocab_size, width)
        s = tl.where(valid, tl.exp((zs - s_max) - s_log), 0.0)
        t = tl.where(valid, tl.exp((zt - t_max) - t_log), 0.0)
        uniform = tl.where(tl.maximum(zs, zt) > ABSENT, share, 0.0)
        gap = (zs - zt) - shift
        first += weight_of(p0, s, t, uniform) * gap
        second += weight_of(p1, s, t, uniform) * gap
    return tl.sum(first, 0), tl.sum(second, 0), share


@triton.jit(do_not_specialize=["stats_stride", "norms_stride", "top_k", "rank_index"])
def dense_kernel(
    student_ptr,  # (n, V) fp32 logits; with SHAPED they become the final ones
    teacher_ptr,  # (n, V) fp32 logits; scratch where the gradient takes a third pass
    grad_ptr,  # (n, V), the gradient in the raw logits; may be student_ptr
    student_bias_ptr,  # (V,) fp32
    teacher_bias_ptr,
    target_ptr,  # (n,) int64
    weight_ptr,  # (n,) fp32, of the divergence's gradient
    logprob_weight_ptr,  # (n,) fp32, of the target log-prob's gradient
    entropy_weight_ptr,  # (n,) fp32, of the student entropy's gradient
    stats_ptr,  # (.., n) fp32, in the order of `problem.STATS`; with RANK there is a row for it
    norms_ptr,  # (4, n) fp32: maximum and log Σ exp(z − maximum) of the student, then of the teacher
    vocab_size,
    width,  # room of a row, a multiple of 64
    student_stride,
    teacher_stride,
    grad_stride,
    stats_stride,
    norms_stride,
    student_inner,
    student_outer,
    student_slope,
    teacher_inner,
    teacher_outer,
    p0,
    p1,
    top_k,
    rank_index,  # of the target's rank under the teacher among the statistics
    DIVERGENCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    SUM_OF_A: tl.constexpr,  # whether Σ a is not 0, or must be known before the gradient for another reason
    STUDENT_SHAPED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SHAPED: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TARGET: tl.constexpr,
    WEIGHT: tl.constexpr,
    UPSTREAM: tl.constexpr,
    OVERLAP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride
    grad_row = grad_ptr + row * grad_stride
    stats_row = stats_ptr + row

    # First pass: normalisers, and the mean of the logits' difference under the student
    s_max = tl.full((), float("-inf"), tl.float32)
    t_max = tl.full((), float("-inf"), tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    s_top = tl.full([BLOCK], float("-inf"), tl.float32)
    t_top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        valid = cols < vocab_size
        zs = _shape(
            student_row, student_bias_ptr, cols, vocab_size, width, student_inner, student_outer,
            STUDENT_SHAPED, STUDENT_BIAS, STUDENT_SOFTCAP,
        )  # fmt: skip
        zt = _shape(
            teacher_row, teacher_bias_ptr, cols, vocab_size, width, teacher_inner, teacher_outer,
            TEACHER_SHAPED, TEACHER_BIAS, TEACHER_SOFTCAP,
        )  # fmt: skip
        new_max = tl.maximum(s_max, tl.max(zs, 0))
        old = tl.exp(s_max - new_max)
        e = tl.where(valid, tl.exp(zs - new_max), 0.0)
        s_sum = s_sum * old + e
        x_sum = x_sum * old + e * (zs - zt)
        s_max = new_max
        new_max = tl.maximum(t_max, tl.max(zt, 0))
        t_sum = t_sum * tl.exp(t_max - new_max) + tl.where(valid, tl.exp(zt - new_max), 0.0)
        t_max = new_max
        if OVERLAP:
            s_top = tl.maximum(s_top, tl.where(valid, zs, float("-inf")))
            t_top = tl.maximum(t_top, tl.where(valid, zt, float("-inf")))
    total = tl.sum(s_sum, 0)
    s_log = tl.log(total)
    t_log = tl.log(tl.sum(t_sum, 0))
    # Differences of logits are exact where the models agree; the normalisers enter as one number a row
    shift = (s_max - t_max) + (s_log - t_log)
    mean = tl.sum(x_sum, 0) / total
    if STUDENT_SHAPED or TEACHER_SHAPED:
        tl.debug_barrier()  # what one thread wrote, another may read

    tl.store(norms_ptr + row, s_max)
    tl.store(norms_ptr + norms_stride + row, s_log)
    tl.store(norms_ptr + 2 * norms_stride + row, t_max)
    tl.store(norms_ptr + 3 * norms_stride + row, t_log)
    if TARGET:
        target = tl.load(target_ptr + row)
        tl.store(stats_row + 5 * stats_stride, _log_prob(student_row, target, s_max, s_log))
        tl.store(stats_row + 6 * stats_stride, _log_prob(teacher_row, target, t_max, t_log))
        if RANK:
            rank = rank_of(teacher_row, target, t_log, vocab_size, width, BLOCK)
            tl.store(stats_row + rank_index * stats_stride, rank)
        tl.debug_barrier()  # before the gradient overwrites them
    s_threshold = s_max
    t_threshold = t_max
    if OVERLAP:
        s_threshold = top_threshold(student_row, s_top, top_k, vocab_size, width, BLOCK)
        t_threshold = top_threshold(teacher_row, t_top, top_k, vocab_size, width, BLOCK)
        advantage = overlap_advantage(student_row, teacher_row, s_threshold, t_threshold, vocab_size, width, BLOCK)
        tl.store(stats_row + 10 * stats_stride, advantage)
    row0 = 0.0
    row1 = 0.0
    share = 0.0  # of each entry that either model has, in uniform weights
    if DIVERGENCE == "adaptive_kl":
        row0 = adaptive_weight(
            student_row, teacher_row, s_max, s_log, t_max, t_log, shift, p0, vocab_size, width, BLOCK
        )
    elif DIVERGENCE == "entropy_gated_kl":
        row0 = tl.where(_entropy(teacher_row, t_max, t_log, vocab_size, width, BLOCK) > p0, p1, 0.0)
    elif DIVERGENCE == "concrete_score":
        row0, row1, share = _means(
            student_row, teacher_row, s_max, s_log, t_max, t_log, shift, p0, p1, vocab_size, width, BLOCK
        )
    weight = tl.load(weight_ptr + row) if WEIGHT else 1.0

    # Second pass: value, statistics, and the gradient where Σ a is known
    value_sum = tl.zeros([BLOCK], tl.float32)
    a_sum = tl.zeros([BLOCK], tl.float32)
    forward_sum = tl.zeros([BLOCK], tl.float32)
    reverse_sum = tl.zeros([BLOCK], tl.float32)
    s_entropy = tl.zeros([BLOCK], tl.float32)
    t_entropy = tl.zeros([BLOCK], tl.float32)
    num_common = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        valid = cols < vocab_size
        zs = load_logits(student_row, cols, vocab_size, width)
        zt = load_logits(teacher_row, cols, vocab_size, width)
        log_s = (zs - s_max) - s_log
        log_t = (zt - t_max) - t_log
        s = tl.where(valid, tl.exp(log_s), 0.0)
        t = tl.where(valid, tl.exp(log_t), 0.0)
        x = zs - zt
        gap = x - shift
        forward, reverse, distance = kl_terms(s, t, gap)
        uniform = 0.0
        if DIVERGENCE == "concrete_score":
            uniform = tl.where(tl.maximum(zs, zt) > ABSENT, share, 0.0)
        value, a = core(
            DIVERGENCE, s, t, log_s, log_t, gap, distance, x - mean, forward, reverse, uniform, row0, row1, p0, p1
        )
        if DIVERGENCE == "alpha_beta_divergence":  # a negative power of zero is not finite
            value = tl.where(valid, value, 0.0)
            a = tl.where(valid, a, 0.0)
        value_sum += value
        forward_sum += forward
        reverse_sum += reverse
        s_entropy -= s * log_s
        t_entropy -= t * log_t
        if OVERLAP:
            num_common += tl.where(valid & (zs >= s_threshold) & (zt >= t_threshold), 1.0, 0.0)
        if SUM_OF_A:
            a_sum += a
            if GRADIENT:
                tl.store(teacher_row + cols, a, mask=cols < width)
        elif GRADIENT:
            slope = _slope(zs, student_outer, student_slope, STUDENT_SOFTCAP)
            tl.store(grad_row + cols, (weight * slope * a).to(grad_ptr.dtype.element_ty), mask=cols < width)
    entropy = tl.sum(s_entropy, 0)
    tl.store(stats_row, _finite_or_inf(tl.sum(value_sum, 0)))
    tl.store(stats_row + stats_stride, _finite_or_inf(tl.sum(forward_sum, 0)))
    tl.store(stats_row + 2 * stats_stride, _finite_or_inf(tl.sum(reverse_sum, 0)))
    tl.store(stats_row + 3 * stats_stride, entropy)
    tl.store(stats_row + 4 * stats_stride, tl.sum(t_entropy, 0))
    tl.store(stats_row + 8 * stats_stride, s_max + s_log)
    tl.store(stats_row + 9 * stats_stride, t_max + t_log)
    if OVERLAP:
        tl.store(stats_row + 7 * stats_stride, tl.minimum(tl.sum(num_common, 0) / top_k, 1.0))

    # Third pass, where the gradient had to wait for Σ a
    if GRADIENT and SUM_OF_A:
        tl.debug_barrier()
        a_total = tl.sum(a_sum, 0)
        logprob_weight = tl.load(logprob_weight_ptr + row) if UPSTREAM else 0.0
        entropy_weight = tl.load(entropy_weight_ptr + row) if UPSTREAM else 0.0
        target = tl.load(target_ptr + row) if UPSTREAM and TARGET else -1
        for start in range(0, vocab_size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            valid = cols < vocab_size
            zs = load_logits(student_row, cols, vocab_size, width)
            a = tl.load(teacher_row + cols, mask=cols < width, other=0.0)
            log_s = (zs - s_max) - s_log
            s = tl.where(valid, tl.exp(log_s), 0.0)
            g = weight * (a - s * a_total)
            if UPSTREAM:
                g += logprob_weight * (tl.where(cols == target, 1.0, 0.0) - s)
                g -= entropy_weight * s * (log_s + entropy)
            g *= _slope(zs, student_outer, student_slope, STUDENT_SOFTCAP)
            tl.store(grad_row + cols, g.to(grad_ptr.dtype.element_ty), mask=cols < width)


@triton.jit(do_not_specialize=["sums_stride"])
def partial_kernel(
    logits_ptr,  # (n, V) fp32; with SHAPED they become the final ones
    bias_ptr,  # (V,) fp32
    sums_ptr,  # (3, n) fp32: maximum, Σ e and Σ e z with e = exp(z − maximum)
    vocab_size,
    width,
    stride,
    sums_stride,
    inner,
    outer,
    SHAPED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride
    maximum = tl.full((), float("-inf"), tl.float32)
    e_sum = tl.zeros([BLOCK], tl.float32)
    z_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        valid = cols < vocab_size
        z = _shape(logits_row, bias_ptr, cols, vocab_size, width, inner, outer, SHAPED, BIAS, SOFTCAP)
        new_max = tl.maximum(maximum, tl.max(z, 0))
        old = tl.exp(maximum - new_max)
        e = tl.where(valid, tl.exp(z - new_max), 0.0)
        e_sum = e_sum * old + e
        z_sum = z_sum * old + e * z
        maximum = new_max
    tl.store(sums_ptr + row, maximum)
    tl.store(sums_ptr + sums_stride + row, tl.sum(e_sum, 0))
    tl.store(sums_ptr + 2 * sums_stride + row, tl.sum(z_sum, 0))


@triton.jit(do_not_specialize=["logsumexp_stride"])
def softmax_kernel(
    logits_ptr,  # (n, V) fp32, final
    grad_ptr,  # (n, V), gradient in the raw logits; may be logits_ptr
    factor_ptr,  # (n,) fp32: g = slope · (factor · s − entropy_weight · s · (log s + entropy))
    entropy_weight_ptr,  # (n,) fp32
    entropy_ptr,  # (n,) fp32
    logsumexp_ptr,  # (2, n) fp32: maximum and the logarithm of the sum
    vocab_size,
    width,
    stride,
    grad_stride,
    logsumexp_stride,
    outer,
    slope,
    SOFTCAP: tl.constexpr,
    UPSTREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.load(logsumexp_ptr + row)
    log_sum = tl.load(logsumexp_ptr + logsumexp_stride + row)
    factor = tl.load(factor_ptr + row)
    entropy_weight = tl.load(entropy_weight_ptr + row) if UPSTREAM else 0.0
    entropy = tl.load(entropy_ptr + row) if UPSTREAM else 0.0
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = load_logits(logits_ptr + row * stride, cols, vocab_size, width)
        log_s = (z - maximum) - log_sum
        s = tl.exp(log_s)
        g = factor * s
        if UPSTREAM:
            g -= entropy_weight * s * (log_s + entropy)
        g *= _slope(z, outer, slope, SOFTCAP)
        tl.store(grad_ptr + row * grad_stride + cols, g.to(grad_ptr.dtype.element_ty), mask=cols < width)
