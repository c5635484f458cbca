# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Weights that follow a token's place in its completion: position, what came before it, the turn it is in.

Statistics are `(B, T)`. A token's position t is its column, from 0, and so counts tool outputs and masked tokens: it
is the length of the context that the student wrote or read since the prompt. ℓ is the teacher's minus the student's
log-prob of the sampled token. All are detached. torch only.
"""

import math

import torch
from torch import Tensor

from .stats import TokenStats


def _positions(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[-1], device=mask.device, dtype=torch.float32).expand(mask.shape)


def position(
    stats: TokenStats, decay: str = "linear", start: float = 1.0, end: float = 0.0, length: float | None = None
) -> Tensor:
    """
    A weight that moves from `start` at the first token to `end`: w = start + (end − start) u (linear) or
    w = start · (end / start)^u (exponential).

    u = t / (n − 1), with t = n − 1 the completion's last trained token, or u = min(t / length, 1) if `length` is set.
    start = end = 1 gives ones.

    Args:
        stats ([`TokenStats`]): Only `mask` is read.
        decay (`str`, *optional*, defaults to `"linear"`): `"linear"` or `"exponential"` (start and end above 0).
        start (`float`, *optional*, defaults to `1.0`), end (`float`, *optional*, defaults to `0.0`): At least 0.
        length (`float`, *optional*): Position at which `end` is reached, for all completions.

    Paper: none; [On the Position Bias of On-Policy Distillation](https://huggingface.co/papers/2606.22600) motivates
    it, [`importance`] is its method.
    """
    t = _positions(stats.mask)
    if length is None:
        last = torch.where(stats.mask, t, 0.0).amax(-1, keepdim=True)
        u = (t / last.clamp(min=1.0)).clamp(max=1.0)
    else:
        u = (t / length).clamp(max=1.0)
    return start + (end - start) * u if decay == "linear" else start * (end / start) ** u


def prefix(stats: TokenStats, length: float = math.inf) -> Tensor:
    """
    w = 1 on the first `length` tokens of each completion, else 0. A length of at least T gives ones.

    Paper: [Fast On-Policy Distillation](https://huggingface.co/papers/2602.15260), the side of the loss; its speed
    comes from sampling no further (`max_completion_length`).
    """
    return (_positions(stats.mask) < length).float()


def importance(stats: TokenStats, gamma: float = 0.5, epsilon: float = 1e-8) -> Tensor:
    """
    w_t = 1 + γ (1 − Σ_{u<t} |ℓ_u| / max(Σ_u |ℓ_u|, ε)): 1 + γ on the first token, falling to 1 as the student's prefix
    drifts from the teacher. γ = 0 gives ones.

    ℓ is taken under the policy that sampled, if its log-probs are known.

    Args:
        stats ([`TokenStats`]): With the log-probs of the sampled tokens.
        gamma (`float`, *optional*, defaults to `0.5`): γ, at least 0.
        epsilon (`float`, *optional*, defaults to `1e-8`): ε, above 0.

    Paper: IW-OPD, [On the Position Bias of On-Policy Distillation](https://huggingface.co/papers/2606.22600), as TRL's
    experimental `iw_opd` trainer has it.
    """
    sampler = stats.require("student_logprobs") if stats.sampler_logprobs is None else stats.sampler_logprobs
    size = (stats.require("teacher_logprobs") - sampler).abs().masked_fill(~stats.mask, 0.0)
    before = size.cumsum(-1) - size
    return 1 + gamma * (1 - before / size.sum(-1, keepdim=True).clamp(min=epsilon))


def step(stats: TokenStats, delta: float = 0.2, epsilon: float = 1e-6) -> Tensor:
    """
    Weights of the turns of a tool conversation by how far each has drifted from the teacher since the first:
    w_k = min((d_1 + ε) / (d_k + ε), 1 + δ) with d_k the mean of |ℓ| over turn k, and w_1 = 1.

    This is the product Π_{u<k} (d_u + ε) / (d_{u+1} + ε), clipped at its end. Without tools, or with one turn, ones.
    The first turn is the first that has a token in `mask`.

    Args:
        stats ([`TokenStats`]): With the log-probs of the sampled tokens, and `step_index` if there are tools.
        delta (`float`, *optional*, defaults to `0.2`): δ, at least 0.
        epsilon (`float`, *optional*, defaults to `1e-6`): ε, above 0.

    Paper: [SOD](https://huggingface.co/papers/2605.07725), as in its code.
    """
    size = stats.log_ratio.abs().masked_fill(~stats.mask, 0.0)
    if stats.step_index is None:
        return torch.ones_like(size)
    index = stats.step_index.masked_fill(~stats.mask, 0)
    member = stats.mask[..., None] & (index[..., None] == torch.arange(int(index.max()) + 1, device=index.device))
    counts = member.sum(1)
    drift = (size[..., None] * member).sum(1) / counts.clamp(min=1) + epsilon
    first = drift.gather(1, (counts > 0).int().argmax(1, keepdim=True))
    return (first / drift).clamp(max=1 + delta).gather(1, index)


def prefix_release(stats: TokenStats, block: int = 16, k: int = 16, min_blocks: int = 3) -> Tensor:
    """
    w = 1 up to the point at which the teacher's margin drops for good, 0 after it; ones where it does not.

    Each completion's margins are averaged over blocks of `block` trained tokens; [`release_point`] finds the drop.

    Args:
        stats ([`TokenStats`]): With `teacher_margin` over the student's top k.
        block (`int`, *optional*, defaults to `16`): Tokens of a block.
        k (`int`, *optional*, defaults to `16`): Candidates of the margin.
        min_blocks (`int`, *optional*, defaults to `3`): Blocks on either side of the drop.

    Paper: an approximation of [Prefix Teach, Suffix Fade](https://huggingface.co/papers/2605.13643) (abstract and
    third parties' notes): it averages over sentences, which takes the text; blocks of tokens stand for them. Its K
    and its exact criterion are not known; block and k are this library's choice.
    """
    margins, mask = stats.require("teacher_margin").detach().cpu().double(), stats.mask.cpu()
    weights = torch.ones(mask.shape)
    for row in range(len(mask)):
        where = mask[row].nonzero().squeeze(-1)
        values, size = margins[row, where], int(block)
        blocks = [values[i : i + size].mean() for i in range(0, len(values), size)]
        released = release_point(torch.stack(blocks), int(min_blocks)) if blocks else None
        if released is not None:
            weights[row, where[released * size :]] = 0.0
    return weights.to(stats.mask.device)


def release_point(series: Tensor, min_size: int = 3) -> int | None:
    """
    Where a series drops to a lower level for good, by the Bayesian information criterion.

    The series is winsorised at its 5 and 95 % quantiles and smoothed by a running median of 3. A mean on either side
    of the best split must beat one mean: n log(RSS / n) falls by more than 2 log n (a level and a location more).

    Args:
        series (`torch.Tensor`): Shape `(n,)`.
        min_size (`int`, *optional*, defaults to `3`): Fewest entries on either side.

    Returns:
        `int` or `None`: index of the first entry of the lower level, `None` if there is no such drop.
    """
    n = len(series)
    if n < 2 * min_size:
        return None
    ends = series.quantile(series.new_tensor([0.05, 0.95]))
    x = series.clamp(ends[0], ends[1])
    x = torch.cat([x[:1], x, x[-1:]]).unfold(0, 3, 1).median(-1).values
    scale = x.abs().max()
    x = x - x.mean()
    # Rounding of a constant series must not look like a perfect fit
    floor = n * (1e-6 * scale).square().clamp(min=torch.finfo(x.dtype).tiny)
    left = torch.arange(min_size, n - min_size + 1)
    sums = x.cumsum(0)[left - 1]
    # Of two means, n_l m_l² + n_r m_r² of the sum of squares is explained; the overall mean is 0
    explained = sums.square() * (1 / left + 1 / (n - left))
    best = int(torch.where(sums > 0, explained, -1.0).argmax())  # a level above the mean comes first: a drop
    if sums[best] <= 0:
        return None
    total = x.square().sum()
    gain = n * (total.clamp(min=floor) / (total - explained[best]).clamp(min=floor)).log()
    return int(left[best]) if gain > 2 * math.log(n) else None
