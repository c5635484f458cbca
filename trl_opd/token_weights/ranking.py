# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Weights that compare the tokens of a micro-batch with one another: top fractions by entropy, distance or both.

Ranks are within the micro-batch of one process. All are detached. torch only.
"""

import math

import torch
from torch import Tensor

from .stats import TokenStats


def _top(scores: Tensor, mask: Tensor, fraction: float, mean_over: str) -> Tensor:
    """
    1 on the ⌊fraction · n⌋ (at least one) tokens of `mask` with the largest scores and on ties with the last, else 0.

    `mean_over="kept"` scales them by n / number kept, so that a mean over all n tokens is a mean over the kept.
    """
    num_tokens = int(mask.sum())
    if num_tokens == 0:
        return torch.zeros_like(scores)
    num_kept = max(1, math.floor(fraction * num_tokens + 1e-9))  # 0.29 · 100 is a hair below 29
    threshold = scores[mask].sort(descending=True).values[num_kept - 1]
    kept = (scores >= threshold) & mask
    weights = kept.to(scores.dtype)
    return weights * (num_tokens / kept.sum()) if mean_over == "kept" else weights


def entropy_top(stats: TokenStats, side: str = "student", fraction: float = 0.2, mean_over: str = "all") -> Tensor:
    """
    w = 1 on the `fraction` of tokens with the highest entropy of `side`, else 0. Fraction 1 gives ones.

    Args:
        stats ([`TokenStats`]): With the entropy of `side`.
        side (`str`, *optional*, defaults to `"student"`): `"student"` or `"teacher"`.
        fraction (`float`, *optional*, defaults to `0.2`): In (0, 1].
        mean_over (`str`, *optional*, defaults to `"all"`): `"kept"` scales the weights so that they average 1.

    Paper: the option `entropy_top_ratio` 0.2 of [Revisiting On-Policy
    Distillation](https://huggingface.co/papers/2603.25562); [REOPOLD](https://huggingface.co/papers/2603.11137) keeps
    high-entropy tokens too. Deviation: neither's ranking scope is known; here it is the micro-batch.
    """
    return _top(stats.require(f"{side}_entropy"), stats.mask, fraction, mean_over)


def adakd(stats: TokenStats, fraction: float = 1.0) -> Tensor:
    """
    Token focusing: w = n / (number kept) on the `fraction` of n tokens with the largest Hellinger distance, else 0.

    A token mean of w · D is the mean of D over the kept tokens. Fraction 1 gives ones. The schedule of type `adakd`
    moves the fraction as the paper does, [`adakd_temperatures`] is the other half of the method.

    Paper: [AdaKD](https://huggingface.co/papers/2510.11615), loss-driven adaptive token focusing, as in its code;
    there the ranking is within a micro-batch too.
    """
    return _top(stats.require("hellinger"), stats.mask, fraction, "kept")


def adakd_temperatures(hellinger: Tensor, mask: Tensor, c: float = 0.5) -> Tensor:
    """
    Inverse-difficulty temperatures τ = exp(−c · tanh(log(s / median s))), in [e^−c, e^c]: below 1 on hard tokens.

    Both models' logits are divided by τ, and the token's loss is multiplied by τ². c = 0 and constant s give ones.

    Args:
        hellinger (`torch.Tensor`): s, the Hellinger distance of each token, any shape.
        mask (`torch.Tensor`): Tokens whose median counts, boolean, of the same shape. In the paper those that
            [`adakd`] keeps. Others get 1.
        c (`float`, *optional*, defaults to `0.5`): Strength, at least 0.

    Returns:
        `torch.Tensor` of the shape of `hellinger`.

    Paper: [AdaKD](https://huggingface.co/papers/2510.11615), inverse difficulty temperature scaling, as in its code
    (the lower median; s / median at least 1e-8).
    """
    hellinger = hellinger.detach()
    if not bool(mask.any()):
        return torch.ones_like(hellinger)
    median = hellinger[mask].median()
    # A median of 0 says that most tokens agree exactly: those are no harder than one another
    relative = torch.where(hellinger == median, 1.0, hellinger / median.clamp(min=torch.finfo(hellinger.dtype).tiny))
    return torch.where(mask, (-c * relative.clamp(min=1e-8).log().tanh()).exp(), 1.0)


def tip(stats: TokenStats, fraction: float | None = 0.5, mean_over: str = "kept") -> Tensor:
    """
    Soft OR of uncertainty and disagreement, s = 1 − (1 − h)(1 − d): high on unsure tokens, and on sure ones that are
    wrong.

    h and d are the student's entropy and the divergence, each scaled to [0, 1] by its smallest and largest value of
    the micro-batch (0 if all are equal). w keeps the `fraction` of tokens with the largest s; without a fraction,
    w = s. Fraction 1 gives ones.

    Args:
        stats ([`TokenStats`]): With `student_entropy` and `divergence`.
        fraction (`float`, *optional*, defaults to `0.5`): In (0, 1], or `None` for w = s.
        mean_over (`str`, *optional*, defaults to `"kept"`): `"kept"` scales kept weights so that they average 1.

    Paper: an approximation of [TIP](https://huggingface.co/papers/2604.14084), of which the abstract was read: a soft
    OR of the two axes selects 50 % of the tokens; its scaling and divergence are not known.
    """
    entropy = _scale(stats.require("student_entropy"), stats.mask)
    divergence = _scale(stats.require("divergence"), stats.mask)
    score = 1 - (1 - entropy) * (1 - divergence)
    return score if fraction is None else _top(score, stats.mask, fraction, mean_over)


def _scale(x: Tensor, mask: Tensor) -> Tensor:
    """`x` shifted and scaled so that its values in `mask` span [0, 1]; 0 if they are all equal."""
    low = x.masked_fill(~mask, math.inf).amin()
    span = x.masked_fill(~mask, -math.inf).amax() - low
    return torch.where(span > 0, (x - low) / span, 0.0)
