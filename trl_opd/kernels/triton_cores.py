# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergences per vocabulary entry, inlined into the Triton row kernel.

A divergence is D = Σ_v φ(log s, log t); a = ∂φ/∂log s up to a multiple of s, which the gradient a − s · Σ a does not
see. Each core returns (φ, a), written so that entries on which the two models almost agree keep their digits. To add a
divergence: a branch in [`core`], its parameters in `trl_opd.losses`, and for CPUs a core in `rows.py`.

fp32 throughout. `gap` is log s − log t, `distance` s − t. Where a probability is zero its logarithm is −1e30.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..resolve import WEIGHTINGS

# Divergences whose `a` sums to zero as returned, so that value and gradient leave in one pass
CENTRED = ("forward_kl", "reverse_kl", "adaptive_kl", "concrete_score", "entropy_gated_kl")


@triton.jit
def _excess_series(x):
    tail = 1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))))
    return x * x * (0.5 + x * tail)


@triton.jit
def excess(x):
    """expm1(x) − x, by its series where the difference would cancel."""
    return tl.where(tl.abs(x) < 0.5, _excess_series(x), tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + excess(x), tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    size = -e / (e + 2.0)
    return tl.where(x < 0, -size, size)


@triton.jit
def clamp(x, low, high):
    """As `torch.clamp`: a NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def kl_terms(s, t, gap):
    """
    The terms of KL(t‖s) and KL(s‖t), each at least 0, and s − t.

    t (expm1(gap) − gap) and s (expm1(−gap) + gap): the sums are exact because Σ s = Σ t = 1. One series serves both.
    """
    y = gap * gap
    even = y * (0.5 + y * (1 / 24 + y * (1 / 720 + y * (1 / 40320))))  # cosh(gap) − 1
    odd = gap * y * (1 / 6 + y * (1 / 120 + y * (1 / 5040)))  # sinh(gap) − gap
    near = tl.abs(gap) < 0.5
    distance = tl.where(near, s * (gap - (even - odd)), s - t)
    forward = tl.where(near, t * (even + odd), distance - t * gap)
    reverse = tl.where(near, s * (even - odd), s * gap - distance)
    return forward, reverse, distance


@triton.jit
def log_mixture(r, weight):
    """
    u = log m/s of m = weight · t + (1 − weight) · s, from r = log t/s, and what it has beyond its linear part.

    u is the cumulant generating function of a Bernoulli variable: near 0 a series in its cumulants over k!, which
    leaves u − weight · r with all its digits.
    """
    v = weight * (1.0 - weight)
    odd = v * (1.0 - 2.0 * weight)
    tail = odd * (1.0 - v * (252.0 - v * (5040.0 - 20160.0 * v))) / 362880.0
    tail = tail * r + v * (1.0 - v * (126.0 - v * (1680.0 - 5040.0 * v))) / 40320.0
    tail = tail * r + odd * (1.0 - v * (60.0 - 360.0 * v)) / 5040.0
    tail = tail * r + v * (1.0 - v * (30.0 - 120.0 * v)) / 720.0
    tail = tail * r + odd * (1.0 - 12.0 * v) / 120.0
    tail = tail * r + v * (1.0 - 6.0 * v) / 24.0
    tail = tail * r + odd / 6.0
    tail = tail * r + v / 2.0
    near = tl.abs(r) < 0.5
    beyond = r * r * tail
    u = tl.where(near, weight * r + beyond, tl.log((1.0 - weight) + weight * tl.exp(r)))
    return u, beyond


@triton.jit
def weight_of(weighting, s, t, uniform):
    """The weights of entries that the number of one of `WEIGHTINGS` stands for."""
    return tl.where(weighting == 0, s, tl.where(weighting == 1, t, uniform))


@triton.jit
def core(
    DIVERGENCE: tl.constexpr,
    s,
    t,
    log_s,
    log_t,
    gap,
    distance,
    centred_gap,
    forward,
    reverse,
    uniform,
    row0,
    row1,
    p0,
    p1,
):
    """
    (φ, a) of each entry.

    `centred_gap` is gap − E_s[gap]; `forward` and `reverse` are the KL terms; `uniform` are uniform weights. `row0`
    and `row1` are known of the row before: the weight of the forward KL in the adaptive and the entropy-gated KL, the
    means of `gap` under the two weights of the concrete score. `p0` and `p1` are [`parameters`].
    """
    r = clamp(-gap, -80.0, 80.0)  # log t/s, beyond which one of the two is zero to working precision
    near = tl.abs(r) < 0.5
    if DIVERGENCE == "forward_kl":
        value = forward
        a = distance
    elif DIVERGENCE == "reverse_kl":
        value = reverse
        a = s * centred_gap
    elif DIVERGENCE == "adaptive_kl":
        value = row0 * forward + (1.0 - row0) * reverse
        a = row0 * distance + (1.0 - row0) * s * centred_gap
    elif DIVERGENCE == "entropy_gated_kl":
        value = row0 * forward + reverse
        a = row0 * distance + s * centred_gap
    elif DIVERGENCE == "concrete_score":
        # `gap` is 1e30 where the teacher lacks an entry: its square must not meet a weight of 0, nor E_s[gap] the rest
        first = weight_of(p0, s, t, uniform)
        second = weight_of(p1, s, t, uniform)
        away = gap - row1
        value = 0.5 * ((first + second) * away) * away
        a = first * away + second * (gap - row0)
    elif DIVERGENCE == "generalized_jsd":
        # β t (r − u) − (1 − β) s u; near 0 with β r taken out of u, and s (t/s − 1) known as −distance
        u, beyond = log_mixture(r, p0)
        value = tl.where(near, -p0 * distance * (r - u) - s * beyond, p0 * t * (r - u) - (1.0 - p0) * s * u)
        a = (p0 - 1.0) * s * u
    elif DIVERGENCE == "skew_forward_kl":
        # t (expm1(u − r) − (u − r)); a = (1 − λ) (s − s t/m)
        u, beyond = log_mixture(r, p0)
        rest = 1.0 - p0
        value = tl.where(near, -rest * (distance * r + reverse) - t * beyond, rest * distance - t * (u - r))
        a = rest * rest * distance * tl.exp(-u)
    elif DIVERGENCE == "skew_reverse_kl":
        # s (expm1(u) − u); a = −s u + (1 − λ) (s t/m − s), of which a frozen mixture leaves the first
        u, beyond = log_mixture(r, 1.0 - p0)
        rest = 1.0 - p0
        value = tl.where(near, rest * reverse - s * beyond, -rest * distance - s * u)
        a = tl.where(p1 == 0, -s * u - rest * p0 * distance * tl.exp(-u), -s * u)
    elif DIVERGENCE == "total_variation":
        value = 0.5 * tl.abs(distance)
        a = s * tl.where(distance > 0, 0.5, tl.where(distance < 0, -0.5, distance))  # a NaN stays one
    elif DIVERGENCE == "alpha_divergence":
        cross = tl.exp(p0 * log_t + (1.0 - p0) * log_s)
        inner = tl.where(near, s * (p0 * excess(r) - excess(p0 * r)), p0 * t + (1.0 - p0) * s - cross)
        value = inner / (p0 * (1.0 - p0))
        a = tl.where(near, -s * expm1(p0 * r), s - cross) / p0
    elif DIVERGENCE == "alpha_beta_divergence":
        total = p0 + p1
        cross = tl.exp(p0 * log_t + p1 * log_s)
        power = tl.exp(total * log_s)
        far = cross - (p0 / total) * tl.exp(total * log_t) - (p1 / total) * power
        inner = tl.where(near, power * (excess(p0 * r) - (p0 / total) * excess(total * r)), far)
        value = inner / (-p0 * p1)
        a = tl.where(near, -power * expm1(p0 * r), power - cross) / p0
    else:
        tl.static_assert(DIVERGENCE == "todi", "unknown divergence")
        towards_student = 1.0 / (1.0 + tl.exp(p0 * gap))
        towards_teacher = 1.0 / (1.0 + tl.exp(-p0 * gap))
        difference = towards_teacher * s - towards_student * t
        value = difference * gap
        a = difference + towards_teacher * s * gap
    return value, a


PARAMETERS = {
    "generalized_jsd": ("beta",),
    "skew_forward_kl": ("skew",),
    "skew_reverse_kl": ("skew", "detached"),
    "alpha_divergence": ("alpha",),
    "alpha_beta_divergence": ("alpha", "beta"),
    "todi": ("scale",),
    "adaptive_kl": ("head_mass",),
    "concrete_score": ("first", "second"),
    "entropy_gated_kl": ("threshold", "coef"),
}


def parameters(divergence: str, params: Mapping[str, Any]) -> tuple[float, float]:
    """`p0` and `p1` of [`core`]: the divergence's parameters in the order of `PARAMETERS`, a name by its number."""
    values = [params[name] for name in PARAMETERS.get(divergence, ())]
    numbers = [WEIGHTINGS.index(x) if isinstance(x, str) else x for x in values]
    p0, p1 = (*numbers, 0.0, 0.0)[:2]
    return float(p0), float(p1)
