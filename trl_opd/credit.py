# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
How the gap between the two models becomes a gradient of the student: advantages of the sampled tokens, the weights and
ratios that go with them, and the squared log-ratio. Torch only; the vocabulary divergences are in `losses.py`.

ℓ = log-prob of the teacher − log-prob of the student for the sampled token, in nats; u = exp(ℓ). A is an advantage:
the loss is −A log p_S(y). Shapes: B completions, T tokens. All but [`k2_loss`] is detached.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .resolve import nearest_name, resolve_divergence
from .returns import discounted_returns, mean_and_std, moment_sums, telescoped_returns, whitened

__all__ = [
    "POLICY_GRADIENT_DIVERGENCES",
    "anchored_logprobs",
    "f_advantages",
    "importance_weights",
    "k2_loss",
    "mean_and_std",
    "moment_sums",
    "power_advantages",
    "sampled_advantages",
    "shaping_weights",
    "telescoped_returns",
    "whitened",
]

# Bound on exponents: e^30 is above any ratio of a token that a student samples in float32, and its square is finite.
MAX_EXPONENT = 30.0


def _side(log_ratio: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """e^−|ℓ| − 1, and w where u ≤ 1, else 1 − w: formulas in these two lose no digits at u = 1 and never overflow."""
    weights = torch.full_like(log_ratio, weight).masked_fill(log_ratio > 0, 1 - weight)
    return torch.expm1(-log_ratio.abs()), weights


def _log_mixture_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """log(w·u + 1 − w)."""
    less, weights = _side(log_ratio, weight)
    return log_ratio.clamp(min=0) + torch.log1p(weights * less)


def _mixture_ratio(log_ratio: Tensor, weight: float) -> Tensor:
    """(u − 1) / (w·u + 1 − w), within [−1 / (1 − w), 1 / w]."""
    less, weights = _side(log_ratio, weight)
    return torch.where(log_ratio > 0, -less, less) / (1 + weights * less)


def _power_ratio(log_ratio: Tensor, alpha: float = 1.0) -> Tensor:
    """(u^α − 1) / α, with the exponent bounded."""
    return torch.expm1((alpha * log_ratio).clamp(max=MAX_EXPONENT)) / alpha


def _skew_reverse_kl(log_ratio: Tensor, skew: float, detached: float) -> Tensor:
    through_first = _log_mixture_ratio(log_ratio, 1 - skew)
    return through_first if detached else through_first - skew * (1 - skew) * _mixture_ratio(log_ratio, 1 - skew)


POLICY_GRADIENT_DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "reverse_kl": lambda gap: gap,
    "forward_kl": _power_ratio,
    "generalized_jsd": lambda gap, beta: (1 - beta) * _log_mixture_ratio(gap, beta),
    "skew_forward_kl": lambda gap, skew: (1 - skew) ** 2 * _mixture_ratio(gap, skew),
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": lambda gap: 0.5 * gap.sign(),
    "alpha_divergence": _power_ratio,
}


def f_advantages(log_ratio: Tensor, divergence: str, params: Mapping[str, float] | None = None) -> Tensor:
    r"""
    Policy-gradient advantages of an f-divergence D = E_{p_S}[f(u)]: A(u) = u f′(u) − f(u). Detached.

    E_{p_S}[A ∇log p_S] = −∇D over the vocabulary, at a fixed prefix. −f(u) itself has that mean for the reverse KL
    alone. f is fixed up to c (u − 1), which adds the constant c to A, a baseline: here c makes A(1) = 0, so that equal
    models have none. A grows with u.

    | divergence | A(u) |
    |---|---|
    | `reverse_kl` | log u |
    | `forward_kl` | u − 1 |
    | `generalized_jsd` | (1 − β) log(β u + 1 − β) |
    | `skew_forward_kl` | (1 − λ)² (u − 1) / (λ u + 1 − λ) |
    | `skew_reverse_kl` | log m − λ (1 − λ) (u − 1) / m, with m = (1 − λ) u + λ; `detached`: log m |
    | `total_variation` | ½ sign(u − 1) |
    | `alpha_divergence` | (u^α − 1) / α; α = 2, half of χ²(t‖s): (u² − 1) / 2 |

    Of the forward KL and the α-divergence the exponent (ℓ or α ℓ) is bounded by 30: u reaches infinity where the
    student's probability vanishes, and so does their variance. The others are finite for every finite ℓ as they stand.

    Args:
        log_ratio (`torch.Tensor`): ℓ of sampled tokens, any shape.
        divergence (`str`): A key of `POLICY_GRADIENT_DIVERGENCES`.
        params (`Mapping[str, float]`, *optional*): Its parameters, as in `trl_opd.losses`.

    Returns:
        `torch.Tensor` of `log_ratio`'s shape.

    Raises:
        ValueError: If the divergence is unknown, or no f-divergence (its advantage is no function of u alone).

    Paper: [OPD+](https://huggingface.co/papers/2606.01039) for the form; the constants are this library's choice.
    """
    name, resolved = resolve_divergence(divergence, params)
    if name not in POLICY_GRADIENT_DIVERGENCES:
        raise ValueError(
            f"divergence must be an f-divergence for sampled advantages, got {name!r}. Its gradient is no mean of a "
            "function of the sampled token's log-ratio. Set credit='direct', or a divergence that has one."
            f"{nearest_name(name, list(POLICY_GRADIENT_DIVERGENCES))}"
        )
    return POLICY_GRADIENT_DIVERGENCES[name](log_ratio.detach(), **resolved)


def power_advantages(teacher_logprobs: Tensor, student_logprobs: Tensor, power: float) -> Tensor:
    r"""
    A = p_T^α − p_S^α of the sampled token, within [−1, 1]. Detached.

    It has the sign of ℓ, and A / α → ℓ as α → 0: a small power has a small advantage, about α ℓ (raise `distill_coef`
    to compare powers). A / α is the policy gradient of `alpha_beta_divergence` with alpha=α, beta=1; at α = 1 that is
    half of the squared distance between the two distributions.

    Args:
        teacher_logprobs (`torch.Tensor`): Any shape.
        student_logprobs (`torch.Tensor`): The same shape.
        power (`float`): α, above 0.

    Returns:
        `torch.Tensor` of the same shape, dimensionless.

    Paper: [PowerOPD](https://huggingface.co/papers/2606.17199).
    """
    return (power * teacher_logprobs.detach()).exp() - (power * student_logprobs.detach()).exp()


def sampled_advantages(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    discount: float = 0.0,
    clip: float | None = None,
    *,
    divergence: str = "reverse_kl",
    divergence_params: Mapping[str, float] | None = None,
    power: float = 0.0,
    floor: float | None = None,
    baseline: Tensor | None = None,
    horizon: int | None = None,
    normalize_length: bool = False,
    from_next: bool = False,
) -> Tensor:
    r"""
    Advantages of the sampled tokens: A_t = Σ_{t' ≥ t} γ^(t'−t) ℓ_t', in nats, where nothing else is set. Detached.

    With γ = 0, the policy gradient of A is an unbiased estimate of the reverse KL's gradient at each visited prefix;
    γ = 1 is the gradient of the reverse KL between whole sequences. In this order:

    1. ℓ, not below `floor`;
    2. the token's own advantage: of the f-divergence ([`f_advantages`]; ℓ for the reverse KL), or of a `power`;
    3. the return: discounted, over `horizon` tokens, from t or from the token after it, divided by the length;
    4. minus `baseline`. A baseline inside the sum of 3 would remove the later tokens' credit with its variance: the
       later gaps have the mean −KL, which depends on this token;
    5. `clip`.

    Tokens outside the mask (a tool's, in the middle) have no advantage and count neither in the horizon nor in the
    length; the discount's exponent is the distance in positions, with them.

    Args:
        student_logprobs (`torch.Tensor`): Log-probs of the sampled tokens under the sampling policy, `(B, T)`.
        teacher_logprobs (`torch.Tensor`): Under the teacher, at the same temperature, `(B, T)`.
        mask (`torch.Tensor`): Tokens that count, boolean, `(B, T)`. Others get 0 and are never read.
        discount (`float`, *optional*, defaults to `0.0`): γ, in [0, 1].
        clip (`float`, *optional*): Bound on |A|.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`): A key of `POLICY_GRADIENT_DIVERGENCES`.
        divergence_params (`Mapping[str, float]`, *optional*): Its parameters.
        power (`float`, *optional*, defaults to `0.0`): α of [`power_advantages`]; 0 stands for ℓ itself.
        floor (`float`, *optional*): Lower bound of ℓ in nats, `log(λ / (1 − λ))` in REOPOLD's λ.
        baseline (`torch.Tensor`, *optional*): A value of each state s_t, `(B, T)`, e.g. −KL(s‖t) at t. It changes no
            mean gradient.
        horizon (`int`, *optional*): K, the number of tokens in the sum. Defaults to all.
        normalize_length (`bool`, *optional*, defaults to `False`): Divide by the number of tokens in the sum.
        from_next (`bool`, *optional*, defaults to `False`): Leave the token's own term out: R_{t+1}, what MiniLLM adds
            to the divergence that is backpropagated at t. 0 at the last token.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Raises:
        ValueError: If the divergence has no sampled advantage, `power` comes with one, or `horizon` is below 1.

    Paper: [On-Policy Distillation](https://doi.org/10.64434/tml.20251026) (Thinking Machines), discount 0;
    [MiniLLM](https://huggingface.co/papers/2306.08543), equation 3, discount 1, and its length-normalised R_{t+1};
    [REOPOLD](https://huggingface.co/papers/2603.11137), the floor as a clip (a smooth form is possible);
    [vOPD](https://huggingface.co/papers/2605.07865), the baseline −KL.
    """
    if power and divergence != "reverse_kl":
        raise ValueError(
            f"power must be 0 with divergence={divergence!r}, got {power!r}. A power is the advantage of a divergence "
            "of its own. Set divergence='reverse_kl', or power=0."
        )
    gap = teacher_logprobs - student_logprobs
    if floor is not None:
        gap = gap.clamp(min=floor)
    if power:
        values = power_advantages(student_logprobs + gap, student_logprobs, power)
    else:
        values = f_advantages(gap, divergence, divergence_params)
    values = values.masked_fill(~mask, 0.0)
    values = discounted_returns(
        values, mask, discount, horizon=horizon, normalize_length=normalize_length, from_next=from_next
    )
    if baseline is not None:
        values = values - baseline.detach().masked_fill(~mask, 0.0)
    return values if clip is None else values.clamp(-clip, clip)


def importance_weights(log_ratio: Tensor, mode: str, low: float | None = None, high: float | None = None) -> Tensor:
    r"""
    Weights ρ = p_S(y) / p_sampler(y) of tokens that another policy sampled, bounded. Detached; 1 on policy.

    `"truncate"`: min(ρ, high). `"band"`: ρ if low ≤ ρ ≤ high, else 0: such a token is left out. They multiply the
    advantages of a surrogate whose own ratio is 1, and stand in the place of its clip.

    Args:
        log_ratio (`torch.Tensor`): log p_S(y) − log p_sampler(y), any shape.
        mode (`str`): `"truncate"` or `"band"`.
        low (`float`, *optional*): Lower end of the band, in [0, 1].
        high (`float`, *optional*): Upper bound, at least 1.

    Returns:
        `torch.Tensor` of `log_ratio`'s shape.

    Raises:
        ValueError: If the mode is unknown, or a bound is missing or would shut out a token that is on policy.

    Paper: [Nemotron-Cascade 2](https://huggingface.co/papers/2603.19220), truncate;
    [MiMo-V2-Flash](https://huggingface.co/papers/2601.02780), band.
    """
    if mode not in ("truncate", "band"):
        raise ValueError(f"mode must be a known name, got {mode!r}.{nearest_name(mode, ['truncate', 'band'])}")
    if high is None or not high >= 1:
        raise ValueError(
            f"high must be at least 1, got {high!r}. It bounds the ratio, which is 1 for a token that the student "
            "itself sampled. Set 2 to 5."
        )
    ratio = log_ratio.detach().exp()
    if mode == "truncate":
        return ratio.clamp(max=high)
    if low is None or not 0 <= low <= 1:
        raise ValueError(
            f"low must be in [0, 1], got {low!r}. Ratios below it are left out, and 1 is that of a token that the "
            "student itself sampled. Set 0.5, or 0 for no lower end."
        )
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def anchored_logprobs(old_logprobs: Tensor, teacher_logprobs: Tensor, anchor: float) -> Tensor:
    r"""
    Denominator of RLAD's ratio p_S / (p_old^α p_T^(1−α)), as a log-prob: α log p_old + (1 − α) log p_T. Detached.

    α = 1 is PPO's ratio and returns `old_logprobs` as it is. Below, the ratio of a step's first micro-batch is
    e^(−(1−α) ℓ) and no longer 1: it scales the gradient, and the clip stops the pull towards a rewarded token once the
    student is past the teacher.

    Args:
        old_logprobs (`torch.Tensor`): Log-probs of the sampled tokens under the old policy, `(B, T)`.
        teacher_logprobs (`torch.Tensor`): Under the teacher, `(B, T)`.
        anchor (`float`): α, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Paper: [RLAD](https://huggingface.co/papers/2602.22495).
    """
    if anchor == 1.0:
        return old_logprobs.detach()
    return anchor * old_logprobs.detach() + (1 - anchor) * teacher_logprobs.detach()


def k2_loss(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    r"""
    Half the squared log-ratio of the sampled token, ½ ℓ², in nats². Gradient in the student's log-prob: −ℓ.

    Its mean gradient over tokens that the student sampled is that of the reverse KL (its mean value is not). The plain
    log-ratio −ℓ has a mean gradient of 0, and e^ℓ − ℓ − 1 that of the forward KL.

    Args:
        student_logprobs (`torch.Tensor`): Log-probs of the sampled tokens, with gradient, any shape.
        teacher_logprobs (`torch.Tensor`): The same shape.

    Returns:
        `torch.Tensor` of the same shape.

    Paper: [KDRL](https://huggingface.co/papers/2506.02208).
    """
    return 0.5 * (teacher_logprobs.detach() - student_logprobs).square()


def shaping_weights(student_logprobs: Tensor, gamma: float) -> Tensor:
    r"""
    Weights γ p / (p + γ)² on the ∇log p of tokens that the student did not sample: the gradient of f(p) = p / (p + γ).

    Against p itself (a ratio to the old probability 1) it lifts rare tokens, by 1/γ at most. At most ¼. Detached.

    Args:
        student_logprobs (`torch.Tensor`): Log-probs of the tokens, any shape.
        gamma (`float`): γ, above 0.

    Returns:
        `torch.Tensor` of the same shape.

    Paper: [LUFFY](https://huggingface.co/papers/2504.14945), γ = 0.1.
    """
    probs = student_logprobs.detach().exp()
    return gamma * probs / (probs + gamma).square()
