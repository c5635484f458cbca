# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""How what the tokens of a completion earn adds up along it, and the scale of the sums. Torch only."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def discounted_returns(
    values: Tensor,
    mask: Tensor,
    discount: float,
    *,
    horizon: int | None = None,
    normalize_length: bool = False,
    from_next: bool = False,
) -> Tensor:
    r"""
    R_t = Σ_{t' ≥ t} γ^(t'−t) v_t', in the unit of the values. Detached where they are.

    Tokens outside the mask (a tool's, in the middle) count neither in the horizon nor in the length; the discount's
    exponent is the distance in positions, with them. O(log T) operations on `(B, T)`.

    Args:
        values (`torch.Tensor`): 0 outside the mask, `(B, T)`.
        mask (`torch.Tensor`): Tokens that count, boolean, `(B, T)`. Others get 0.
        discount (`float`): γ, in [0, 1].
        horizon (`int`, *optional*): K, the number of tokens in the sum. Defaults to all.
        normalize_length (`bool`, *optional*, defaults to `False`): Divide by the number of tokens in the sum.
        from_next (`bool`, *optional*, defaults to `False`): R_{t+1}, from the position after t: 0 at the last token.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Raises:
        ValueError: If `horizon` is below 1.

    Paper: [MiniLLM](https://huggingface.co/papers/2306.08543), R_{t+1} over the number of tokens left.
    """
    steps = _steps(horizon, mask)
    if not (discount or normalize_length or from_next):
        return values
    places, positions = _places(mask), torch.arange(mask.shape[1], device=mask.device)
    first = torch.zeros_like(values).scatter(1, places, values)
    where = torch.zeros_like(places).scatter(1, places, positions.expand_as(places))
    left = mask.sum(1, keepdim=True) - positions  # tokens of the mask from this one on
    # Positions between a token and the next one of the mask; behind the last one there are zeros to add
    between = (_shifted(where, 1) - where - 1).clamp(min=0).to(values.dtype)
    sums = _windowed_sums(first, discount * discount**between, steps)
    if from_next:
        sums, left = discount**between * _shifted(sums, 1), left - 1
    if normalize_length:
        sums = sums / left.clamp(1, steps)
    return sums.gather(1, places).masked_fill(~mask, 0.0)


def telescoped_returns(teacher_q: Tensor, teacher_q_max: Tensor, mask: Tensor, horizon: int) -> Tensor:
    r"""
    Returns of the reward that a teacher's logits q induce when they are read as a soft Q-function, in nats. Detached.

    r_t = q(s_t, y_t) − max_a q(s_{t+1}, a), without the maximum after the last token. K rewards in a row are replaced
    by the block q(s_t, y_t) − max_a q(s_{t+K}, a), and G_t = Σ_j block_{t + jK}. K = 1 is LLMR: all rewards from t on.
    K of the completion's length or more leaves q(s_t, y_t).

    A step is a token of the mask. Adding c(s) to all logits of a state adds c(s_t) to G_t whatever K is: a baseline.
    Log-probs do as well as raw logits up to the variance.

    Args:
        teacher_q (`torch.Tensor`): The teacher's logits of the sampled tokens, `(B, T)`.
        teacher_q_max (`torch.Tensor`): Its highest logit at the same positions, `(B, T)`.
        mask (`torch.Tensor`): Tokens that count, boolean, `(B, T)`. Others get 0 and are never read.
        horizon (`int`): K.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Raises:
        ValueError: If `horizon` is below 1.

    Paper: [KETCHUP](https://huggingface.co/papers/2504.19024). A sketch: how the paper joins its blocks and ends the
    last one was not read.
    """
    steps, places = _steps(horizon, mask), _places(mask)
    q, best = (x.detach().masked_fill(~mask, 0.0) for x in (teacher_q, teacher_q_max))
    q, best = (torch.zeros_like(x).scatter(1, places, x) for x in (q, best))
    blocks = q - _shifted(best, steps)
    blocks = pad(blocks, (0, -mask.shape[1] % steps)).unflatten(1, (-1, steps))
    returns = blocks.flip(1).cumsum(1).flip(1).flatten(1)
    return returns.gather(1, places).masked_fill(~mask, 0.0)


def moment_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares over the mask, `(3,)`: add them over processes, then [`mean_and_std`]."""
    kept = torch.where(mask, values.detach(), 0.0)
    kept = kept if kept.device.type == "mps" else kept.double()
    return torch.stack([mask.sum().to(kept.dtype), kept.sum(), kept.square().sum()])


def mean_and_std(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation from [`moment_sums`]; 0 and 0 of nothing."""
    count, total, squares = sums.unbind()
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()


def whitened(values: Tensor, mask: Tensor, moments: tuple[Tensor, Tensor] | None = None, eps: float = 1e-4) -> Tensor:
    r"""
    (values − mean) / (standard deviation + ε) over the mask: mean 0, deviation 1. Detached.

    Args:
        values (`torch.Tensor`): Advantages, `(B, T)`.
        mask (`torch.Tensor`): Tokens that count, boolean, `(B, T)`. Others get 0 and are never read.
        moments (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Mean and deviation of all processes, from
            [`mean_and_std`]. Defaults to those of `values`.
        eps (`float`, *optional*, defaults to `1e-4`): ε, GRPO's own. Gaps far below it are noise and stay small.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    mean, std = mean_and_std(moment_sums(values, mask)) if moments is None else moments
    centred = values.detach().masked_fill(~mask, 0.0) - mean.to(values.dtype)
    return (centred / (std.to(values.dtype) + eps)).masked_fill(~mask, 0.0)


def _steps(horizon: int | None, mask: Tensor) -> int:
    if horizon is not None and horizon < 1:
        raise ValueError(
            f"horizon must be at least 1, got {horizon!r}. It counts the tokens of a return, which would be empty. "
            "Leave it unset for all later tokens."
        )
    return max(mask.shape[1] if horizon is None else min(horizon, mask.shape[1]), 1)


def _places(mask: Tensor) -> Tensor:
    """Index of each token when those of the mask come first, `(B, T)`."""
    return torch.where(mask, mask.cumsum(1), mask.sum(1, keepdim=True) + (~mask).cumsum(1)) - 1


def _shifted(x: Tensor, steps: int) -> Tensor:
    """`x[:, t + steps]`, 0 beyond the end."""
    return pad(x[:, steps:], (0, min(steps, x.shape[1])))


def _windowed_sums(values: Tensor, decay: Tensor, steps: int) -> Tensor:
    """
    Sums of the `steps` values from each place on, each step multiplying by the `decay` of the place it leaves.

    From windows of 1, 2, 4, ... values: no difference of long sums enters, so what lies outside a window is not seen.
    """
    total, window, width = torch.zeros_like(values), values, 1
    while steps:
        if steps & 1:
            total = window + decay * _shifted(total, width)
        steps >>= 1
        if steps:
            window = window + decay * _shifted(window, width)
            decay, width = decay * _shifted(decay, width), 2 * width
    return total
