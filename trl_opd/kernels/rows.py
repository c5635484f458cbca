# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Row arithmetic over the full vocabulary: value and logit gradient of every divergence in a few passes.

A divergence is D = Σ_v φ(log s, log t). With a = ∂φ/∂log s its gradient in the student's logits is a − s·A, A = Σ_v a.
Over a full vocabulary (Σ s = 1) a multiple of s added to `a` changes nothing, so each core picks the member that
cancels best. Values are written with `expm1`, so that they stay accurate, and never negative, when the two
distributions almost agree. The definitions these are tested against are in `trl_opd.losses`.

V is what this process holds of the vocabulary: every row sum goes through `shard.sum`, which makes it whole (and on
one process returns it). Row sums that belong together go through it together.

Shapes: n rows, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses import adaptive_kl_weight
from ..resolve import mixture_components
from .vocab_parallel import VocabShard

# Beyond this log-ratio one of the two probabilities is zero to working precision
_MAX_LOG_RATIO = 50.0
# Below this value (nats) the textbook KL has lost digits to cancellation and is computed again by `expm1`
_SMALL_KL = 0.05
# Log-probs below this are those of logits of -inf, which `normalize` makes finite
ABSENT = -1e29


class Rows(NamedTuple):
    """The two distributions of n positions, and what every divergence and metric needs of them."""

    student_logprobs: Tensor  # (n, V)
    teacher_logprobs: Tensor  # (n, V)
    student_probs: Tensor  # (n, V)
    teacher_probs: Tensor  # (n, V)
    gap: Tensor  # (n, V), log s - log t
    mean_gap: Tensor  # (n,), Σ s·gap: the reverse KL with the rounding of `gap`, so that it centres its gradient
    forward_kl: Tensor  # (n,)
    reverse_kl: Tensor  # (n,)
    shard: VocabShard


class Gradient(NamedTuple):
    """`a` and its row sum `total`; a total of `None` says that `a` is the logit gradient already."""

    a: Tensor  # (n, V)
    total: Tensor | None  # (n,)


Core = Callable[..., tuple[Tensor, Gradient]]


class Normalized(NamedTuple):
    """Logits and the distribution they give."""

    logits: Tensor  # (n, V)
    maximum: Tensor  # (n, 1), the largest logit
    max_logprob: Tensor  # (n, 1), its log-prob
    logprobs: Tensor  # (n, V)
    probs: Tensor  # (n, V)

    @property
    def logsumexp(self) -> Tensor:
        """`(n,)`"""
        return (self.maximum - self.max_logprob).squeeze(-1)


def normalize(shard: VocabShard, *logits: Tensor) -> list[Normalized]:
    """
    Normalise `(n, V)` logits of one or more models; in place, a logit of `-inf` becomes a finite one whose probability
    is zero.
    """
    if shard.group is None:
        return [_normalize(x) for x in logits]
    for x in logits:
        x.fill_(-1e30) if shard.empty else x.clamp_(min=-1e30)
    maxima = shard.max(*(x.amax(dim=-1, keepdim=True) for x in logits))
    weights = [torch.exp(x - maximum) for x, maximum in zip(logits, maxima, strict=True)]
    totals = shard.sum(*(weight.sum(dim=-1, keepdim=True) for weight in weights))
    return [
        Normalized(x, maximum, -total.log(), (x - maximum).sub_(total.log()), weight.div_(total))
        for x, maximum, weight, total in zip(logits, maxima, weights, totals, strict=True)
    ]


def _normalize(logits: Tensor) -> Normalized:
    logits.clamp_(min=-1e30)
    probs = torch.softmax(logits, dim=-1)
    maximum = logits.amax(dim=-1, keepdim=True)
    # The largest probability is exp(max − log Z): its logarithm spares a second pass of exponentials
    max_logprob = probs.amax(dim=-1, keepdim=True).log_()
    return Normalized(logits, maximum, max_logprob, (logits - maximum).add_(max_logprob), probs)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_v a·b for `(n, V)` inputs."""
    return torch.linalg.vecdot(a, b)


def kl_terms(p: Tensor, q: Tensor, log_q_over_p: Tensor) -> Tensor:
    """Terms of KL(p‖q) as p·(expm1(e) − e), e = log q − log p: each is ≥ 0, and Σ is exact because Σ p = Σ q = 1."""
    e = log_q_over_p
    return torch.where(e > _MAX_LOG_RATIO, q, p * (torch.expm1(e.clamp(max=_MAX_LOG_RATIO)) - e))


def _small_kls(s: Tensor, t: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL without cancellation, sharing one `expm1`. Near 1e-13 the first may round below 0."""
    if gap.is_cuda or bool(gap.amin() < -_MAX_LOG_RATIO):
        return kl_terms(t, s, gap).sum(-1), kl_terms(s, t, -gap).sum(-1)
    x = torch.expm1(-gap)  # t/s - 1
    forward = torch.addcmul(s * x, t, gap).sum(-1).neg_()
    return forward, row_dot(s, x.add_(gap))


def _kls(s: Tensor, t: Tensor, gap: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """The mean gap, forward and reverse KL, `(n,)` each."""
    reverse, forward = shard.sum(row_dot(s, gap), -row_dot(t, gap))
    mean_gap = reverse
    small = torch.minimum(forward, reverse) < _SMALL_KL
    if not gap.is_cuda:  # where looking costs nothing, take the second look at the rows that need it only
        rows = small.nonzero().squeeze(-1)
        if rows.numel() == 0:
            return mean_gap, forward, reverse
        if rows.numel() < small.numel():
            few = shard.sum(*_small_kls(s[rows], t[rows], gap[rows]))
            forward, reverse = forward.index_copy(0, rows, few[0].clamp_(min=0)), reverse.index_copy(0, rows, few[1])
            return mean_gap, forward, reverse
    precise = shard.sum(*_small_kls(s, t, gap))
    return mean_gap, torch.where(small, precise[0].clamp_(min=0), forward), torch.where(small, precise[1], reverse)


def make_rows(student: Normalized, teacher: Normalized, shard: VocabShard) -> Rows:
    """All that the cores share."""
    # Differences of logits are exact where the models agree, differences of rounded log-probs are not. What is left is
    # the rounding of one number a row, which cancels from values and gradients.
    shift = (student.maximum - teacher.maximum) - (student.max_logprob - teacher.max_logprob)
    gap = (student.logits - teacher.logits).sub_(shift)
    kls = _kls(student.probs, teacher.probs, gap, shard)
    return Rows(student.logprobs, teacher.logprobs, student.probs, teacher.probs, gap, *kls, shard)


def _forward_kl(r: Rows) -> tuple[Tensor, Gradient]:
    return r.forward_kl, Gradient(r.student_probs - r.teacher_probs, None)


def _reverse_kl(r: Rows) -> tuple[Tensor, Gradient]:
    return r.reverse_kl, Gradient(r.student_probs * r.gap, r.mean_gap)


def _log_mixture_ratio(r: Rows, teacher_weight: float) -> tuple[Tensor, Tensor]:
    """`(d, u)`: log t − log s within ±80, and log m − log s for m = w·t + (1 − w)·s."""
    d = r.gap.neg().clamp_(-80.0, 80.0)
    return d, torch.expm1(d).mul_(teacher_weight).log1p_()


def _generalized_jsd(r: Rows, beta: float) -> tuple[Tensor, Gradient]:
    d, u = _log_mixture_ratio(r, beta)
    a = (r.student_probs * u).mul_(beta - 1)
    # β t (log t − log m) + (1 − β) s (log s − log m), whose terms are each ≥ 0
    terms = torch.addcmul(a, r.teacher_probs, d.sub_(u), value=beta)
    value, total = r.shard.sum(terms.sum(-1), a.sum(-1))
    return value.clamp_(min=0), Gradient(a, total)


def _skew_forward_kl(r: Rows, skew: float) -> tuple[Tensor, Gradient]:
    d, u = _log_mixture_ratio(r, skew)
    mixture = torch.lerp(r.student_probs, r.teacher_probs, skew)
    terms = kl_terms(r.teacher_probs, mixture, u - d)
    a = r.student_probs * d.sub_(u).expm1_().mul_(skew - 1)
    value, total = r.shard.sum(terms.sum(-1), a.sum(-1))
    return value, Gradient(a, total)


def _skew_reverse_kl(r: Rows, skew: float, detached: float) -> tuple[Tensor, Gradient]:
    d, u = _log_mixture_ratio(r, 1 - skew)
    mixture = torch.lerp(r.teacher_probs, r.student_probs, skew)
    terms = kl_terms(r.student_probs, mixture, u)
    a = r.student_probs * (u.neg_() if detached else d.sub_(u).expm1_().mul_(1 - skew).sub_(u))
    value, total = r.shard.sum(terms.sum(-1), a.sum(-1))
    return value, Gradient(a, total)


def _total_variation(r: Rows) -> tuple[Tensor, Gradient]:
    difference = r.student_probs - r.teacher_probs
    a = r.student_probs * difference.sign().mul_(0.5)
    value, total = r.shard.sum(difference.abs_().sum(-1).mul_(0.5), a.sum(-1))
    return value, Gradient(a, total + 0 * value)  # the sign of a NaN is 0: the value brings it in


def _alpha_divergence(r: Rows, alpha: float) -> tuple[Tensor, Gradient]:
    s, t, d = r.student_probs, r.teacher_probs, -r.gap
    cross = (alpha * r.teacher_logprobs + (1 - alpha) * r.student_logprobs).exp_()
    near, is_near = d.clamp(-1.0, 1.0), d.abs() <= 1.0
    x = torch.expm1(alpha * near)
    terms = torch.where(is_near, s * (alpha * torch.expm1(near) - x), alpha * t + (1 - alpha) * s - cross)
    a = torch.where(is_near, -s * x, s - cross).div_(alpha)
    value, total = r.shard.sum(terms.sum(-1), a.sum(-1))
    return value.div_(alpha * (1 - alpha)), Gradient(a, total)


def _alpha_beta_divergence(r: Rows, alpha: float, beta: float) -> tuple[Tensor, Gradient]:
    total, d = alpha + beta, -r.gap
    cross = (alpha * r.teacher_logprobs + beta * r.student_logprobs).exp_()
    student_power = (total * r.student_logprobs).exp_()
    near, is_near = d.clamp(-1.0, 1.0), d.abs() <= 1.0
    x = torch.expm1(alpha * near)
    terms = torch.where(
        is_near,
        student_power * (x - (alpha / total) * torch.expm1(total * near)),
        cross - (alpha / total) * (total * r.teacher_logprobs).exp() - (beta / total) * student_power,
    )
    a = torch.where(is_near, -student_power * x, student_power - cross).div_(alpha)
    value, sum_a = r.shard.sum(terms.sum(-1), a.sum(-1))
    return value.div_(-alpha * beta), Gradient(a, sum_a)


def _todi(r: Rows, scale: float) -> tuple[Tensor, Gradient]:
    weight = torch.sigmoid(-scale * r.gap)
    forward, reverse = weight * r.teacher_probs, (1 - weight) * r.student_probs
    difference = reverse - forward
    part = row_dot(difference, r.gap)
    # -w t + (1 - w) s (log s - log t + 1)
    a = difference.addcmul_(reverse, r.gap)
    value, total = r.shard.sum(part, a.sum(-1))
    return value, Gradient(a, total)


def _adaptive_kl(r: Rows, head_mass: float) -> tuple[Tensor, Gradient]:
    weight = r.shard.by_rows(partial(adaptive_kl_weight, head_mass=head_mass), r.student_probs, r.teacher_probs)
    rest = 1 - weight
    forward = (r.student_probs - r.teacher_probs).mul_(weight[:, None])
    reverse = r.student_probs * (r.gap - r.mean_gap[:, None]).mul_(rest[:, None])
    return weight * r.forward_kl + rest * r.reverse_kl, Gradient(forward.add_(reverse), None)


def _concrete_score(r: Rows, first: str, second: str) -> tuple[Tensor, Gradient]:
    w, w2 = _entry_weights(r, first), _entry_weights(r, second)
    mean, mean2 = r.shard.sum(row_dot(w, r.gap), row_dot(w2, r.gap))
    centred = r.gap - mean2[:, None]
    # ½ Σ (w + w') (Δ − Σ w' Δ)²; an absent entry's Δ is 1e30, whose square must not meet a weight of 0
    (value,) = r.shard.sum(row_dot((w + w2).mul_(centred), centred).mul_(0.5))
    a = w2 * (r.gap - mean[:, None])
    return value, Gradient(a.addcmul_(w, centred), None)


def _entry_weights(r: Rows, weighting: str) -> Tensor:
    """`(n, V)`, of sum 1 over the whole vocabulary."""
    if weighting == "uniform":  # over the entries that either model has
        present = torch.maximum(r.student_logprobs, r.teacher_logprobs) > ABSENT
        (count,) = r.shard.sum(present.sum(-1).to(r.gap.dtype))
        return present / count[:, None]
    return r.student_probs if weighting == "student" else r.teacher_probs


def _entropy_gated_kl(r: Rows, threshold: float, coef: float) -> tuple[Tensor, Gradient]:
    (certainty,) = r.shard.sum(row_dot(r.teacher_probs, r.teacher_logprobs))
    weight = (-certainty > threshold).to(r.gap.dtype).mul_(coef)
    a = (r.student_probs - r.teacher_probs).mul_(weight[:, None]).addcmul_(r.student_probs, r.gap)
    return r.reverse_kl + weight * r.forward_kl, Gradient(a, r.mean_gap)


def _convex_mix(r: Rows, **components: dict[str, Any]) -> tuple[Tensor, Gradient]:
    value, total = torch.zeros_like(r.reverse_kl), torch.zeros_like(r.reverse_kl)
    a = torch.zeros_like(r.gap)
    for name, weight, params in mixture_components(components):
        part, gradient = CORES[name](r, **params)
        value.add_(part, alpha=weight)
        a.add_(gradient.a, alpha=weight)
        if gradient.total is not None:
            total.add_(gradient.total, alpha=weight)
    return value, Gradient(a, total)


CORES: Mapping[str, Core] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "generalized_jsd": _generalized_jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "alpha_divergence": _alpha_divergence,
    "alpha_beta_divergence": _alpha_beta_divergence,
    "todi": _todi,
    "adaptive_kl": _adaptive_kl,
    "concrete_score": _concrete_score,
    "entropy_gated_kl": _entropy_gated_kl,
    "convex_mix": _convex_mix,
}


# Divergences of which the Triton kernels have no core: over the full vocabulary PyTorch computes them everywhere
TORCH_ONLY = ("convex_mix",)


def logit_gradient(rows: Rows, gradient: Gradient, out: Tensor) -> Tensor:
    """∂D/∂(student logits), shape `(n, V)`, written to `out`."""
    if gradient.total is None:
        return out.copy_(gradient.a)
    return torch.addcmul(gradient.a, rows.student_probs, gradient.total[:, None], value=-1, out=out)
