# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
How much each token of the distillation counts: weights from statistics of the two models, multiplied together.

Weights are detached and enter the one reduction as they are: `loss = Σ reduction_weight · weight · D`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import local, ranking, sequence
from .ranking import adakd_temperatures
from .sequence import release_point
from .specs import (
    Parameter,
    Params,
    ResolvedWeighting,
    Spec,
    Weighting,
    check_weights,
    is_count,
    is_number,
    needs,
    resolve_weightings,
)
from .stats import ROLLOUT_FIELDS, TokenStats, step_index_from_tool_mask

__all__ = [
    "ROLLOUT_FIELDS",
    "TOKEN_WEIGHTINGS",
    "ResolvedWeighting",
    "TokenStats",
    "TokenWeighting",
    "adakd_temperatures",
    "release_point",
    "resolve_token_weighting",
    "rollout_only",
    "step_index_from_tool_mask",
    "token_weights",
]

TokenWeighting = Weighting
_FIELD = "token_weighting"


def _one_of(default: str, *names: str) -> Parameter:
    return default, f"one of {', '.join(map(repr, names))}", lambda x: isinstance(x, str) and x in names


def _bound(default: float | None) -> Parameter:
    return default, "a number or None", lambda x: x is None or is_number(x)


def _at_least_0(default: float) -> Parameter:
    return default, "a finite number of at least 0", lambda x: is_number(x) and 0 <= x < math.inf


def _above_0(default: float) -> Parameter:
    return default, "a finite number above 0", lambda x: is_number(x) and 0 < x < math.inf


def _fraction(default: float) -> Parameter:
    return default, "in (0, 1]", lambda x: is_number(x) and 0 < x <= 1


def _count(default: int) -> Parameter:
    return default, "a whole number of at least 1", is_count


def _side_entropy(params: Params) -> tuple[str, ...]:
    return (f"{params['side']}_entropy",)


def _selectkd_needs(params: Params) -> tuple[str, ...]:
    return ("accepted",) if params["mode"] == "greedy" else ("student_logprobs", "teacher_logprobs")


def _exponential_ends(params: Params) -> str | None:
    if params["decay"] == "exponential" and not (params["start"] > 0 and params["end"] > 0):
        return (
            f"must have start and end above 0 for decay='exponential', got start={params['start']!r} and "
            f"end={params['end']!r}. The formula takes their ratio. Set a small end such as 0.01, or decay='linear'."
        )
    return None


_SIDE = _one_of("student", "student", "teacher")
_LOGPROBS = needs("student_logprobs", "teacher_logprobs")

TOKEN_WEIGHTINGS: Mapping[str, Weighting] = {
    "entropy_gate": Weighting(
        local.entropy_gate, {"side": _SIDE, "above": _bound(None), "below": _bound(None)}, _side_entropy, local=True
    ),
    "entropy_top": Weighting(
        ranking.entropy_top,
        {"side": _SIDE, "fraction": _fraction(0.2), "mean_over": _one_of("all", "all", "kept")},
        _side_entropy,
    ),
    "adakd": Weighting(
        ranking.adakd, {"fraction": _fraction(1.0)}, needs("hellinger"), statistics={"hellinger": None}
    ),
    "selectkd": Weighting(
        local.selectkd,
        {
            "k": _count(5),
            "beta": (0.01, "in [0, 1]", lambda x: is_number(x) and 0 <= x <= 1),
            "mode": _one_of("greedy", "greedy", "speculative"),
        },
        _selectkd_needs,
        statistics={"accepted": "k"},
        local=True,
    ),
    "tsd_kd": Weighting(local.tsd_kd, {}, needs("student_entropy", "teacher_entropy"), local=True),
    "tip": Weighting(
        ranking.tip,
        {
            "fraction": (0.5, "in (0, 1] or None", lambda x: x is None or (is_number(x) and 0 < x <= 1)),
            "mean_over": _one_of("kept", "all", "kept"),
        },
        needs("student_entropy", "divergence"),
    ),
    "position": Weighting(
        sequence.position,
        {
            "decay": _one_of("linear", "linear", "exponential"),
            "start": _at_least_0(1.0),
            "end": _at_least_0(0.0),
            "length": (None, "above 0 or None", lambda x: x is None or (is_number(x) and x > 0)),
        },
        check=_exponential_ends,
    ),
    "prefix": Weighting(sequence.prefix, {"length": (math.inf, "at least 1", lambda x: is_number(x) and x >= 1)}),
    "importance": Weighting(sequence.importance, {"gamma": _at_least_0(0.5), "epsilon": _above_0(1e-8)}, _LOGPROBS),
    "step": Weighting(sequence.step, {"delta": _at_least_0(0.2), "epsilon": _above_0(1e-6)}, _LOGPROBS),
    "prefix_release": Weighting(
        sequence.prefix_release,
        {
            "block": _count(16),
            "k": (16, "a whole number of at least 2", lambda x: is_count(x) and x >= 2),
            "min_blocks": _count(3),
        },
        needs("teacher_margin"),
        statistics={"teacher_margin": "k"},
    ),
    "direction_adaptive": Weighting(
        local.direction_adaptive,
        {"threshold": (math.inf, "a number", is_number), "push": _at_least_0(1.0)},
        needs("student_entropy"),
        local=True,
        signed=True,
    ),
    "idft": Weighting(
        local.idft,
        {
            "low": _at_least_0(0.1),
            "high": _at_least_0(1.0),
            "threshold": (0.0, "a finite number", lambda x: is_number(x) and math.isfinite(x)),
            "temperature": _above_0(1.0),
        },
        needs("student_logprobs", "student_entropy"),
        local=True,
    ),
    "log_ratio_sign": Weighting(
        local.log_ratio_sign, {"side": _one_of("positive", "positive", "negative", "both")}, _LOGPROBS, local=True
    ),
}


def resolve_token_weighting(spec: Spec) -> list[ResolvedWeighting]:
    """
    The weightings that `token_weighting` names; see [`~token_weights.specs.resolve_weightings`].

    A function `(TokenStats) -> weights` of the user's own sees whole micro-batches, `(B, T)`. It may say by attributes
    what it needs: `signed = True`, `needs = ("hellinger", "accepted")`, `statistics = {"hellinger": None,
    "accepted": 5}`.
    """
    return resolve_weightings(spec, TOKEN_WEIGHTINGS, _FIELD)


def rollout_only(weightings: Sequence[ResolvedWeighting]) -> bool:
    """Whether all weights are known before the student's forward pass: they can enter its reduction weights."""
    return all(w.name in TOKEN_WEIGHTINGS and ROLLOUT_FIELDS.issuperset(w.needs) for w in weightings)


def token_weights(weightings: Sequence[ResolvedWeighting], stats: TokenStats, *, check: bool = True) -> Tensor:
    """
    Product of the weights, detached; 0 outside `stats.mask`, and 1 inside it without any weighting.

    Args:
        weightings (`Sequence[ResolvedWeighting]`): What [`resolve_token_weighting`] returned.
        stats ([`TokenStats`]): Of shape `(B, T)`; any shape if all weightings are local.
        check (`bool`, *optional*, defaults to `True`): Whether to look at the values. It waits for the device, so
            inside the fused divergence it is left out.

    Returns:
        `torch.Tensor` of the shape of `stats.mask`, float32 or the statistics' own dtype.

    Raises:
        ValueError: If a statistic is missing, or weights have another shape, are not finite, or are negative where
            the weighting is not signed.
    """
    product = stats.mask.float()
    with torch.no_grad():
        for weighting in weightings:
            assert weighting.local or stats.mask.dim() == 2, f"{weighting.name} compares tokens"
            for name in weighting.needs:
                stats.require(name)
            weights = weighting.function(stats, **weighting.params)
            if check:
                weights = check_weights(weights, stats.mask, weighting, _FIELD)
            product = product * torch.where(stats.mask, weights, 0.0)
    return product
