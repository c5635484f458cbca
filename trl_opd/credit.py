# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""How the gap between the two models becomes a policy gradient. Torch only."""

import torch
from torch import Tensor


def sampled_advantages(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    discount: float = 0.0,
    clip: float | None = None,
) -> Tensor:
    r"""
    Advantages A_t = Σ_{t' ≥ t} γ^(t'−t) ℓ_t' with ℓ = log-prob of the teacher − log-prob of the student, in nats.

    With γ = 0, the policy gradient of A is an unbiased estimate of the reverse KL's gradient at each visited prefix;
    γ = 1 is the gradient of the reverse KL between whole sequences. Detached.

    Args:
        student_logprobs (`torch.Tensor`): Log-probs of the sampled tokens under the sampling policy, `(B, T)`.
        teacher_logprobs (`torch.Tensor`): Under the teacher, at the same temperature, `(B, T)`.
        mask (`torch.Tensor`): Tokens that count, boolean, `(B, T)`. Others get 0 and add nothing to earlier ones.
        discount (`float`, *optional*, defaults to `0.0`): γ.
        clip (`float`, *optional*): Bound on |A|.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Paper: [On-Policy Distillation](https://doi.org/10.64434/tml.20251026) (Thinking Machines), discount 0;
    [MiniLLM](https://huggingface.co/papers/2306.08543), equation 3, discount 1.
    """
    gap = (teacher_logprobs - student_logprobs).detach().masked_fill(~mask, 0.0)
    if discount:
        running = torch.zeros_like(gap[:, 0])
        returns = torch.empty_like(gap)
        for t in range(gap.shape[1] - 1, -1, -1):
            running = gap[:, t] + discount * running
            returns[:, t] = running
        gap = returns.masked_fill(~mask, 0.0)
    return gap if clip is None else gap.clamp(-clip, clip)
