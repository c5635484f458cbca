# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergences, each over log-probabilities: the definitions that every kernel is checked against.

Each function maps `(student_logprobs, teacher_logprobs)` of shape `(..., V)` to a value of shape `(...)`, in nats per
token (`total_variation` and the α and αβ families are dimensionless, `concrete_score` is in nats²). The gradient flows
to `student_logprobs` only through the formula as written; `teacher_logprobs` should come without gradient. Entries of
probability zero (log-prob `-inf`) contribute their limit: `0 log 0 = 0`. Nothing here reduces over tokens: the one
reduction is the trainer's.

Names: s is the student's distribution, t the teacher's, KL(a‖b) = Σ a (log a − log b). What a configuration may write
is in `trl_opd.resolve`. Both files need torch only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .resolve import mixture_components
from .resolve import nearest_name as nearest_name  # offered here too
from .resolve import resolve_divergence as resolve_divergence

Divergence = Callable[..., Tensor]


def _check(student_logprobs: Tensor, teacher_logprobs: Tensor) -> None:
    if student_logprobs.shape != teacher_logprobs.shape:
        raise ValueError(
            f"student_logprobs and teacher_logprobs must have the same shape, got {tuple(student_logprobs.shape)} and "
            f"{tuple(teacher_logprobs.shape)}. A divergence compares the two over one vocabulary. Restrict both to "
            "their shared entries first."
        )


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """`weight * x` with `0 * ±inf = 0`, in the value and in both gradients."""
    zero = weight == 0
    return weight * x.masked_fill(zero, 0.0)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """`a - b` of log-probs, 0 where both are `-inf`, finite in the gradient there."""
    both = (a == -math.inf) & (b == -math.inf)
    return a.masked_fill(both, 0.0) - b.masked_fill(both, 0.0)


def _log_mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """`log(weight · exp(a) + (1 − weight) · exp(b))`, with the ends exact."""
    if weight == 1.0:
        return a
    if weight == 0.0:
        return b
    both = (a == -math.inf) & (b == -math.inf)
    a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
    mixture = torch.logaddexp(a + math.log(weight), b + math.log1p(-weight))
    return mixture.masked_fill(both, -math.inf)


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    r"""
    Forward KL divergence, KL(t‖s) = Σ t (log t − log s), in nats per token. Mode covering.

    Gradient in the student's logits: s − t.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [Distilling the Knowledge in a Neural Network](https://huggingface.co/papers/1503.02531), the soft-target
    cross-entropy of section 2 less the teacher's entropy.
    """
    _check(student_logprobs, teacher_logprobs)
    return _times(teacher_logprobs.exp(), _gap(teacher_logprobs, student_logprobs)).sum(-1)


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    r"""
    Reverse KL divergence, KL(s‖t) = Σ s (log s − log t), in nats per token. Mode seeking; the default of on-policy
    distillation.

    Gradient in the student's logits: s · (log s − log t − KL(s‖t)).

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [MiniLLM](https://huggingface.co/papers/2306.08543), equation 1, at one token with its prefix held fixed.
    """
    _check(student_logprobs, teacher_logprobs)
    return _times(student_logprobs.exp(), _gap(student_logprobs, teacher_logprobs)).sum(-1)


def generalized_jsd(student_logprobs: Tensor, teacher_logprobs: Tensor, beta: float = 0.5) -> Tensor:
    r"""
    Generalized Jensen-Shannon divergence, β KL(t‖m) + (1 − β) KL(s‖m) with m = β t + (1 − β) s, in nats per token.

    In TRL's and Liger's convention β = 0 **is** the forward KL and β = 1 the reverse KL. These two are a special case
    and not the limit: the formula tends to 0 at both ends (divided by β, or by 1 − β, it tends to the two KLs). At
    β = ½ it is bounded by log 2. The gradient flows through s inside the mixture too.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        beta (`float`, *optional*, defaults to `0.5`): Weight of the teacher in the mixture, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [On-Policy Distillation of Language Models (GKD)](https://huggingface.co/papers/2306.13649), section 2.
    """
    if beta == 0.0:
        return forward_kl(student_logprobs, teacher_logprobs)
    if beta == 1.0:
        return reverse_kl(student_logprobs, teacher_logprobs)
    _check(student_logprobs, teacher_logprobs)
    mixture = _log_mixture(teacher_logprobs, student_logprobs, beta)
    return beta * reverse_kl(teacher_logprobs, mixture) + (1 - beta) * reverse_kl(student_logprobs, mixture)


def skew_forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, skew: float = 0.1) -> Tensor:
    r"""
    Skew forward KL divergence, KL(t‖m) with m = λ t + (1 − λ) s, in nats per token.

    λ = 0 gives the forward KL, λ = 1 gives 0; the value is at most −log λ. The gradient flows through s inside m.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        skew (`float`, *optional*, defaults to `0.1`): λ, the weight of the teacher in the mixture, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [DistiLLM](https://huggingface.co/papers/2402.03898), equation 3 (default 0.1 from its code).
    """
    _check(student_logprobs, teacher_logprobs)
    return reverse_kl(teacher_logprobs, _log_mixture(teacher_logprobs, student_logprobs, skew))


def skew_reverse_kl(
    student_logprobs: Tensor, teacher_logprobs: Tensor, skew: float = 0.1, detached: float = 0
) -> Tensor:
    r"""
    Skew reverse KL divergence, KL(s‖m) with m = λ s + (1 − λ) t, in nats per token.

    λ = 0 gives the reverse KL, λ = 1 gives 0; the value is at most −log λ. The gradient flows through both s's, with
    `detached` through the first alone; then it is s · (log s − log m − KL(s‖m)) in the student's logits.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        skew (`float`, *optional*, defaults to `0.1`): λ, the weight of the student in the mixture, in [0, 1].
        detached (`float`, *optional*, defaults to `0`): Whether the student inside m is held fixed, 0 or 1.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [DistiLLM](https://huggingface.co/papers/2402.03898), section 3.1 (default 0.1 from its code);
    [DistiLLM-2](https://huggingface.co/papers/2503.07067), whose code detaches the student inside the mixture.
    """
    _check(student_logprobs, teacher_logprobs)
    in_mixture = student_logprobs.detach() if detached else student_logprobs
    return reverse_kl(student_logprobs, _log_mixture(in_mixture, teacher_logprobs, skew))


def total_variation(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    r"""
    Total variation distance, ½ Σ |s − t|, in [0, 1].

    The subgradient at s = t is 0.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [f-Divergence Minimization for Sequence-Level Knowledge
    Distillation](https://huggingface.co/papers/2307.15190), section 3.
    """
    _check(student_logprobs, teacher_logprobs)
    return 0.5 * (student_logprobs.exp() - teacher_logprobs.exp()).abs().sum(-1)


def alpha_divergence(student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float = 0.5) -> Tensor:
    r"""
    Amari's α-divergence, (1 − Σ tᵅ s¹⁻ᵅ) / (α (1 − α)), dimensionless.

    Its limits are KL(t‖s) as α → 1 and KL(s‖t) as α → 0, and α = 0 and α = 1 return them. α = ½ is four times the
    squared Hellinger distance (½ Σ (√s − √t)²); α = 2 is half of χ²(t‖s).

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        alpha (`float`, *optional*, defaults to `0.5`): α, any real number.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: Amari, [Differential-Geometrical Methods in Statistics](https://doi.org/10.1007/978-1-4612-5056-2); used for
    distillation in [AlphaNet](https://huggingface.co/papers/2102.07954).
    """
    if alpha == 1.0:
        return forward_kl(student_logprobs, teacher_logprobs)
    if alpha == 0.0:
        return reverse_kl(student_logprobs, teacher_logprobs)
    _check(student_logprobs, teacher_logprobs)
    return (1 - _power(teacher_logprobs, alpha, student_logprobs, 1 - alpha).sum(-1)) / (alpha * (1 - alpha))


def _power(a: Tensor, alpha: float, b: Tensor, beta: float) -> Tensor:
    """`exp(alpha · a + beta · b)`, 0 where both are `-inf` or where a positive power of zero meets a finite factor."""
    exponent = alpha * a + beta * b
    undefined = torch.isnan(exponent) | ((a == -math.inf) & (b == -math.inf))
    a, b = a.masked_fill(undefined, 0.0), b.masked_fill(undefined, 0.0)
    return (alpha * a + beta * b).exp().masked_fill(undefined, 0.0)


def alpha_beta_divergence(
    student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float = 0.2, beta: float = 0.7
) -> Tensor:
    r"""
    αβ-divergence, −1/(αβ) · Σ [tᵅ sᵝ − α/(α+β) · tᵅ⁺ᵝ − β/(α+β) · sᵅ⁺ᵝ], dimensionless.

    α + β = 1 is the α-divergence. (1, 0) is the forward and (0, 1) the reverse KL in the limit; zero parameters are
    refused by `resolve_divergence`, which names the function to use.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        alpha (`float`, *optional*, defaults to `0.2`): Power of the teacher; not 0.
        beta (`float`, *optional*, defaults to `0.7`): Power of the student; not 0, and not −α.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [ABKD](https://huggingface.co/papers/2505.04560). The defaults are this library's choice, inside the range
    that the paper studies.
    """
    _check(student_logprobs, teacher_logprobs)
    total = alpha + beta
    cross = _power(teacher_logprobs, alpha, student_logprobs, beta)
    teacher_power = _power(teacher_logprobs, total, teacher_logprobs, 0.0)
    student_power = _power(student_logprobs, total, student_logprobs, 0.0)
    inner = cross - (alpha / total) * teacher_power - (beta / total) * student_power
    return -inner.sum(-1) / (alpha * beta)


def todi(student_logprobs: Tensor, teacher_logprobs: Tensor, scale: float = 1.0) -> Tensor:
    r"""
    Token-wise distillation: Σ_v w t (log t − log s) + (1 − w) s (log s − log t), in nats per token, with the detached
    weight of each vocabulary entry w = σ(k (log t − log s)).

    Entries that the student under-estimates are pulled by the forward KL, those it over-estimates by the reverse KL.
    At scale 1, w = t / (t + s). The weight carries no gradient.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        scale (`float`, *optional*, defaults to `1.0`): k, the sharpness of the weight; 0 gives ½ everywhere.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [ToDi](https://huggingface.co/papers/2505.16297), equation 7.
    """
    _check(student_logprobs, teacher_logprobs)
    gap = _gap(teacher_logprobs, student_logprobs)
    weight = torch.sigmoid(scale * gap.detach())
    return (_times(weight * teacher_logprobs.exp(), gap) - _times((1 - weight) * student_logprobs.exp(), gap)).sum(-1)


def adaptive_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, head_mass: float = 0.5) -> Tensor:
    r"""
    Adaptive KL: g_h/(g_h + g_t) · KL(t‖s) + g_t/(g_h + g_t) · KL(s‖t), in nats per token, with detached weights.

    The head is the smallest set of the teacher's top entries whose preceding mass is below `head_mass` (the first is
    always in it), the tail the rest; g_h and g_t are Σ |t − s| over the two. Equal distributions weigh ½ each.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        head_mass (`float`, *optional*, defaults to `0.5`): Teacher mass that the head holds, in (0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
    Models](https://huggingface.co/papers/2404.02657), section 4. Deviation: its code ends the head before the entry
    that crosses `head_mass`; here the crossing entry is in the head.
    """
    _check(student_logprobs, teacher_logprobs)
    forward_weight = adaptive_kl_weight(student_logprobs.detach().exp(), teacher_logprobs.exp(), head_mass)
    forward = forward_kl(student_logprobs, teacher_logprobs)
    reverse = reverse_kl(student_logprobs, teacher_logprobs)
    return forward_weight * forward + (1 - forward_weight) * reverse


def adaptive_kl_weight(student_probs: Tensor, teacher_probs: Tensor, head_mass: float) -> Tensor:
    """The weight g_h/(g_h + g_t) of the forward KL in [`adaptive_kl`]; probabilities `(..., V)` to `(...)`."""
    sorted_probs, order = teacher_probs.sort(dim=-1, descending=True, stable=True)
    preceding = sorted_probs.cumsum(-1) - sorted_probs
    # The first entry has nothing before it. Rounding may leave its difference a hair off zero, never above a mass.
    gaps = (teacher_probs - student_probs).abs().gather(-1, order)
    in_head = preceding < head_mass
    head_gap = gaps.masked_fill(~in_head, 0.0).sum(-1)
    total_gap = gaps.sum(-1)
    return torch.where(total_gap > 0, head_gap / total_gap.clamp_min(torch.finfo(gaps.dtype).tiny), 0.5)


def concrete_score(
    student_logprobs: Tensor, teacher_logprobs: Tensor, first: str = "student", second: str = "uniform"
) -> Tensor:
    r"""
    Concrete score: ½ Σ_xy w(y) w'(x) (Δ_x − Δ_y)², Δ = log s − log t, in nats². It matches the differences between the
    logits of every two entries, with detached weights w and w' over the vocabulary.

    The weights are the student's probabilities, the teacher's, or uniform; which of the two is first makes no
    difference. Of sum 1, the double sum is ½ Σ (w + w') (Δ − Σ w' Δ)². Equal weights give the variance of Δ under them
    (uniform: the mean squared difference of the centred logits), and near the teacher `"student"` twice is twice the
    reverse KL. The weights carry no gradient. Uniform weights leave out entries that neither model has, and are
    infinite where one model alone lacks an entry.

    Gradient in the student's logits: w' · (Δ − Σ w Δ) + w · (Δ − Σ w' Δ).

    On a part of the vocabulary the double sum runs over its entries, a bucket being one. A raw partial sum takes the
    probabilities as they are (uniform: of sum 1 over the support); its gradient moves no mass out of the support.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        first (`str`, *optional*, defaults to `"student"`): w, one of `"student"`, `"teacher"`, `"uniform"`.
        second (`str`, *optional*, defaults to `"uniform"`): w', likewise.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [Distillation of Large Language Models via Concrete Score
    Matching](https://huggingface.co/papers/2509.25837), whose weights are chosen from the same three. The defaults are
    this library's choice.
    """
    _check(student_logprobs, teacher_logprobs)
    gap = _gap(student_logprobs, teacher_logprobs)
    weights = {
        "student": student_logprobs.detach().exp(),
        "teacher": teacher_logprobs.detach().exp(),
        "uniform": _uniform(student_logprobs, teacher_logprobs),
    }
    w, w2 = weights[first], weights[second]
    total, total2 = w.sum(-1, keepdim=True), w2.sum(-1, keepdim=True)
    infinite = gap.isinf()
    gap = gap.masked_fill(infinite, 0.0)
    centred = gap - (w2 * gap).sum(-1, keepdim=True) / total2.clamp_min(torch.finfo(gap.dtype).tiny)
    value = 0.5 * ((total2 * w + total * w2) * centred.square()).sum(-1)
    return value.masked_fill((infinite & (w + w2 > 0)).any(-1), math.inf)


def _uniform(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Equal weights of the entries that either model has."""
    present = (student_logprobs != -math.inf) | (teacher_logprobs != -math.inf)
    return present / present.sum(-1, keepdim=True).clamp_min(1).to(student_logprobs.dtype)


def entropy_gated_kl(
    student_logprobs: Tensor, teacher_logprobs: Tensor, threshold: float = 0.8, coef: float = 1.0
) -> Tensor:
    r"""
    Entropy-gated KL: KL(s‖t) + c · 1[H(t) > τ] · KL(t‖s), in nats per token. Mode seeking where the teacher is sure,
    and mode covering besides where it is not.

    τ = ∞ is the reverse KL, τ < 0 the sum of both, and a teacher that is certain never opens the gate. The gate
    depends on the teacher alone and carries no gradient. On a part of the vocabulary H is the entropy of the teacher
    as it is compared there; with a bucket that is at most the entropy of all.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        threshold (`float`, *optional*, defaults to `0.8`): τ, in nats.
        coef (`float`, *optional*, defaults to `1.0`): c, weight of the forward KL, at least 0.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [Entropy-Aware On-Policy Distillation of Language Models](https://huggingface.co/papers/2603.07079)
    (threshold 0.8). Deviations: the reverse KL is exact rather than a clipped policy gradient of the sampled token,
    which has the same gradient in expectation on fresh samples; the forward KL is over the vocabulary rather than the
    raw sum over the teacher's top 16 entries; both are means over the same tokens.
    """
    _check(student_logprobs, teacher_logprobs)
    certainty = _times(teacher_logprobs.exp(), teacher_logprobs).sum(-1).detach()
    forward = coef * forward_kl(student_logprobs, teacher_logprobs)
    return reverse_kl(student_logprobs, teacher_logprobs) + torch.where(-certainty > threshold, forward, 0.0)


def convex_mix(student_logprobs: Tensor, teacher_logprobs: Tensor, **components: Any) -> Tensor:
    r"""
    A convex mixture of divergences, Σ_i w_i D_i with w_i ≥ 0 and Σ w_i = 1.

    As a configuration writes it: `divergence_kwargs={"forward_kl": 0.3, "reverse_kl": 0.7}`, or with parameters
    `{"generalized_jsd": {"weight": 0.5, "beta": 0.9}, "reverse_kl": 0.5}`. One weight may be `None`: it is what the
    others leave of 1, so that `{"forward_kl": 0.3, "reverse_kl": None}` has one number to schedule. Each divergence
    comes once; a mixture in a mixture is refused. The gradient is the mixture of the gradients.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        components (`float`, `None` or `dict`):
            By name of a divergence its weight in [0, 1], `None` for the rest, or both `"weight"` and its parameters.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Raises:
        ValueError: As [`resolve_divergence`].

    Paper: [Decoupling KL and Trajectories](https://huggingface.co/papers/2605.16826), whose mixture is one of forward
    and reverse KL.
    """
    _check(student_logprobs, teacher_logprobs)
    name, params = resolve_divergence("convex_mix", components)
    if name != "convex_mix":
        return DIVERGENCES[name](student_logprobs, teacher_logprobs, **params)
    values = [
        weight * DIVERGENCES[name](student_logprobs, teacher_logprobs, **own)
        for name, weight, own in mixture_components(params)
    ]
    return torch.stack(values).sum(0)


DIVERGENCES: Mapping[str, Divergence] = {
    f.__name__: f
    for f in (
        forward_kl,
        reverse_kl,
        generalized_jsd,
        skew_forward_kl,
        skew_reverse_kl,
        total_variation,
        alpha_divergence,
        alpha_beta_divergence,
        todi,
        adaptive_kl,
        concrete_score,
        entropy_gated_kl,
        convex_mix,
    )
}
