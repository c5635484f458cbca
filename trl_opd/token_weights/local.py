# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Weights that are a function of the token's own statistics: they run on any subset of tokens, inside the fused
divergence too. Each maps [`TokenStats`] of any shape to weights of that shape; all are detached.

Symbols: H_S and H_T are the entropies of student and teacher, ℓ the teacher's minus the student's log-prob of the
sampled token. torch only.
"""

import torch
from torch import Tensor

from .stats import TokenStats


def entropy_gate(
    stats: TokenStats, side: str = "student", above: float | None = None, below: float | None = None
) -> Tensor:
    """
    Keep the tokens whose entropy is in (`above`, `below`], in nats: w = 1[above < H ≤ below].

    Two gates at one threshold, one `above` and one `below` it, part the tokens between them. Without bounds, ones.

    Args:
        stats ([`TokenStats`]): With the entropy of `side`.
        side (`str`, *optional*, defaults to `"student"`): Whose entropy, `"student"` or `"teacher"`.
        above (`float`, *optional*): Lower bound, exclusive.
        below (`float`, *optional*): Upper bound, inclusive.

    Paper: [Entropy-Aware On-Policy Distillation](https://huggingface.co/papers/2603.07079), the gate H_T > 0.8 (from a
    third party's notes; the paper was not read).
    """
    entropy = stats.require(f"{side}_entropy")
    keep = torch.ones_like(entropy, dtype=torch.bool)
    if above is not None:
        keep = keep & (entropy > above)
    if below is not None:
        keep = keep & (entropy <= below)
    return keep.to(entropy.dtype)


def selectkd(stats: TokenStats, k: int = 5, beta: float = 0.01, mode: str = "greedy") -> Tensor:
    """
    Full weight where the teacher accepts the student's proposal, β where it does not.

    `greedy`: w = 1 if the student's likeliest entry is among the teacher's top k, else β. `speculative`: the sampled
    token is accepted with probability a = min(1, exp ℓ), and w = β + (1 − β) a is the weight's expectation; over the
    student's samples E[a] = 1 − total variation distance. β = 1, or k the vocabulary's size, gives ones.

    Args:
        stats ([`TokenStats`]): With `accepted` at k (greedy), or both log-probs of the sampled tokens (speculative).
        k (`int`, *optional*, defaults to `5`): Size of the teacher's top set; greedy only.
        beta (`float`, *optional*, defaults to `0.01`): β, in [0, 1].
        mode (`str`, *optional*, defaults to `"greedy"`): `"greedy"` or `"speculative"`.

    Paper: [SelecTKD](https://huggingface.co/papers/2510.24021), greedy top-k and Spec-k (from third parties' notes).
    Deviation: its Spec-k draws k proposals and accepts or rejects each; here there is one, the sampled token, and the
    expected weight stands for the draw.
    """
    if mode == "greedy":
        return torch.where(stats.require("accepted").bool(), 1.0, float(beta))
    return beta + (1 - beta) * stats.log_ratio.clamp(max=0.0).exp()


def tsd_kd(stats: TokenStats) -> Tensor:
    """
    w = σ(H_S − H_T): more weight where the student is less sure than the teacher, ½ where they agree.

    Paper: [TSD-KD](https://huggingface.co/papers/2603.13260), the weight of its divergence as in its code, where it
    applies to every token. Left out: the entropy penalty on the tokens of high entropy, and the ranking loss.
    """
    return torch.sigmoid(stats.require("student_entropy") - stats.require("teacher_entropy"))


def direction_adaptive(stats: TokenStats, threshold: float = float("inf"), push: float = 1.0) -> Tensor:
    """
    w = 1 where H_S ≤ threshold (pull towards the teacher), −push where H_S is above (push away). Signed.

    A divergence that is pushed has no upper bound: clip it or keep `push` small. An infinite threshold gives ones.

    Args:
        stats ([`TokenStats`]): With `student_entropy`.
        threshold (`float`, *optional*, defaults to infinity): In nats.
        push (`float`, *optional*, defaults to `1.0`): Magnitude of the negative weight, at least 0.

    Paper: a sketch after [Direction-Adaptive Self-Distillation](https://huggingface.co/papers/2605.22263), of which
    the abstract was read: its thresholds and magnitudes are not known.
    """
    entropy = stats.require("student_entropy")
    return torch.where(entropy <= threshold, 1.0, -float(push)).to(entropy.dtype)


def idft(
    stats: TokenStats, low: float = 0.1, high: float = 1.0, threshold: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """
    w = low + (high − low) · σ(−(φ − threshold) / temperature), with φ = log-prob of the student + H_S, in nats.

    φ is 0 on average over the student's own samples. **A token that is more likely than usual gets a smaller
    weight**; `low` above `high` turns that around. low = high gives that constant.

    Args:
        stats ([`TokenStats`]): With `student_logprobs` and `student_entropy`.
        low (`float`, *optional*, defaults to `0.1`), high (`float`, *optional*, defaults to `1.0`): At least 0.
        threshold (`float`, *optional*, defaults to `0.0`): In nats.
        temperature (`float`, *optional*, defaults to `1.0`): Above 0, in nats.

    Paper: [Towards On-Policy SFT](https://huggingface.co/papers/2602.12222), in-domain fine-tuning as its code has it.
    The sign the paper intends is uncertain: it speaks of weighing unlikely samples down.
    """
    phi = stats.require("student_logprobs") + stats.require("student_entropy")
    return low + (high - low) * torch.sigmoid(-(phi - threshold) / temperature)


def log_ratio_sign(stats: TokenStats, side: str = "positive") -> Tensor:
    """
    w = 1[ℓ > 0] (`"positive"`, the teacher likes the token more) or 1[ℓ ≤ 0] (`"negative"`); `"both"` gives ones.

    Paper: one branch of [AOPD](https://huggingface.co/papers/2605.06387), a policy gradient where the advantage is
    positive and a match of the teacher elsewhere (from a third party's notes).
    """
    ratio = stats.log_ratio
    if side == "both":
        return torch.ones_like(ratio)
    positive = ratio > 0
    return (positive if side == "positive" else ~positive).to(ratio.dtype)
