# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergences, each over log-probabilities: the definitions that every kernel is checked against.

Each function maps `(student_logprobs, teacher_logprobs)` of shape `(..., V)` to a value of shape `(...)`, in nats per
token (`total_variation` and the α and αβ families are dimensionless). The gradient flows to `student_logprobs` only
through the formula as written; `teacher_logprobs` should come without gradient. Entries of probability zero (log-prob
`-inf`) contribute their limit: `0 log 0 = 0`. Nothing here reduces over tokens: the one reduction is the trainer's.

Names: s is the student's distribution, t the teacher's, KL(a‖b) = Σ a (log a − log b). This file needs torch only.
"""

import difflib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

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


def skew_reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, skew: float = 0.1) -> Tensor:
    r"""
    Skew reverse KL divergence, KL(s‖m) with m = λ s + (1 − λ) t, in nats per token.

    λ = 0 gives the reverse KL, λ = 1 gives 0; the value is at most −log λ. The gradient flows through both s's.

    Args:
        student_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        teacher_logprobs (`torch.Tensor`): Log-probabilities, shape `(..., V)`.
        skew (`float`, *optional*, defaults to `0.1`): λ, the weight of the student in the mixture, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`.

    Paper: [DistiLLM](https://huggingface.co/papers/2402.03898), section 3.1 (default 0.1 from its code).
    """
    _check(student_logprobs, teacher_logprobs)
    return reverse_kl(student_logprobs, _log_mixture(student_logprobs, teacher_logprobs, skew))


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
    )
}

_NONZERO = "finite and not 0 (for the limit use forward_kl or reverse_kl)"
# name -> parameter -> (default, rule in words, test)
_PARAMETERS: Mapping[str, Mapping[str, tuple[float, str, Callable[[float], bool]]]] = {
    "generalized_jsd": {"beta": (0.5, "in [0, 1]", lambda x: 0 <= x <= 1)},
    "skew_forward_kl": {"skew": (0.1, "in [0, 1)", lambda x: 0 <= x < 1)},
    "skew_reverse_kl": {"skew": (0.1, "in [0, 1)", lambda x: 0 <= x < 1)},
    "alpha_divergence": {"alpha": (0.5, "a finite number", math.isfinite)},
    "alpha_beta_divergence": {
        "alpha": (0.2, _NONZERO, lambda x: math.isfinite(x) and x != 0),
        "beta": (0.7, _NONZERO, lambda x: math.isfinite(x) and x != 0),
    },
    "todi": {"scale": (1.0, "a finite number, at least 0", lambda x: math.isfinite(x) and x >= 0)},
    "adaptive_kl": {"head_mass": (0.5, "in (0, 1]", lambda x: 0 < x <= 1)},
}


def nearest_name(name: object, valid: list[str]) -> str:
    """The end of an error message about an unknown name: the nearest valid one, then all of them."""
    contain = [v for v in valid if str(name).lower() in v]
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4) or contain
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Valid: {', '.join(valid)}."


def resolve_divergence(name: str, kwargs: Mapping[str, float] | None = None) -> tuple[str, dict[str, float]]:
    """
    Check a divergence's name and parameters, and fill in the defaults.

    The special cases that coincide with a KL (generalized JSD at β = 0 and 1, α-divergence at 0 and 1, skew 0) resolve
    to that KL, so that a kernel sees one definition of each.

    Args:
        name (`str`): A key of `DIVERGENCES`.
        kwargs (`Mapping[str, float]`, *optional*): Its parameters.

    Returns:
        `tuple[str, dict[str, float]]`: the name and the complete parameters.

    Raises:
        ValueError: If the name or a parameter is unknown, or a parameter is out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence must be a known name, got {name!r}.{nearest_name(name, list(DIVERGENCES))}")
    rules = _PARAMETERS.get(name, {})
    params = {key: default for key, (default, _, _) in rules.items()}
    for key, value in (kwargs or {}).items():
        if key not in rules:
            takes = f"takes {', '.join(rules)}" if rules else "takes no parameters"
            raise ValueError(f"divergence_kwargs has {key!r}, but {name} {takes}. Remove it or rename it.")
        _, rule, valid = rules[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not valid(value):
            raise ValueError(f"divergence_kwargs[{key!r}] of {name} must be {rule}, got {value!r}.")
        params[key] = float(value)
    if name == "alpha_beta_divergence" and params["alpha"] + params["beta"] == 0:
        raise ValueError(
            f"divergence_kwargs of {name} must not sum to 0, got alpha={params['alpha']}, beta={params['beta']}. "
            "The formula divides by the sum. Change one of them."
        )
    if name == "generalized_jsd" and params["beta"] in (0.0, 1.0):
        return ("forward_kl" if params["beta"] == 0.0 else "reverse_kl"), {}
    if name == "alpha_divergence" and params["alpha"] in (0.0, 1.0):
        return ("reverse_kl" if params["alpha"] == 0.0 else "forward_kl"), {}
    if name in ("skew_forward_kl", "skew_reverse_kl") and params["skew"] == 0.0:
        return name.removeprefix("skew_"), {}
    return name, params
