# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""From a configuration field to checked weight functions: names, parameters, import paths. Torch only."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..imports import load_object
from ..losses import nearest_name

Params = Mapping[str, Any]
Parameter = tuple[Any, str, Callable[[Any], bool]]  # default, rule in words, test
Spec = str | Mapping[str, Params | None] | Callable[..., Tensor] | None


def needs(*names: str) -> Callable[[Params], tuple[str, ...]]:
    """The same statistics, whatever the parameters."""
    return lambda params: names


def is_number(x: object) -> bool:
    """Whether `x` is a number other than NaN. Infinity is one: it is the identity of most thresholds."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and not math.isnan(x)


def is_count(x: Any) -> bool:
    """Whether `x` is a whole number of at least 1."""
    return is_number(x) and math.isfinite(x) and x >= 1 and x == int(x)


@dataclass(frozen=True)
class Weighting:
    """
    A weight function of a registry.

    Args:
        function (`Callable`): `(stats, **params) -> weights`.
        parameters (`Mapping[str, tuple]`): Of each parameter the default, the rule in words and its test. A parameter
            is a number (it may be scheduled), a name or `None`.
        needs (`Callable`): From the parameters to the names of the statistics that the function reads.
        statistics (`Mapping[str, str | None]`): Those of them that the fused divergence computes on request only, with
            the parameter that is their size k, if they have one.
        local (`bool`): Whether a token's weight depends on the statistics of that token only, so that it may be
            computed inside the fused divergence on any subset of tokens.
        signed (`bool`): Whether weights may be negative.
        check (`Callable`): From the parameters to what is wrong with their combination, if anything.
    """

    function: Callable[..., Tensor]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs: Callable[[Params], tuple[str, ...]] = lambda params: ()
    statistics: Mapping[str, str | None] = field(default_factory=dict)
    local: bool = False
    signed: bool = False
    check: Callable[[Params], str | None] = lambda params: None


@dataclass(frozen=True)
class ResolvedWeighting:
    """A weight function with its parameters; `needs` and `statistics` are those that these parameters ask for."""

    name: str
    function: Callable[..., Tensor]
    params: Params
    needs: tuple[str, ...]
    statistics: Mapping[str, int | None]
    local: bool
    signed: bool


def resolve_weightings(spec: Spec, registry: Mapping[str, Weighting], field_name: str) -> list[ResolvedWeighting]:
    """
    The weight functions of a configuration field, whose product is the weight.

    Args:
        spec: `None`, the name of one weighting, `{name: parameters}` of several, or a function. A name may be an
            import path `"module.function"`; its parameters are then passed unchecked.
        registry (`Mapping[str, Weighting]`): The known names.
        field_name (`str`): The field, for messages.

    Returns:
        `list[ResolvedWeighting]`, empty for `None`.

    Raises:
        ValueError: If a name, an import or a parameter is unknown, or a parameter is out of range.
    """
    if spec is None:
        return []
    if callable(spec):
        return [_wrap(getattr(spec, "__name__", type(spec).__name__), spec, {})]
    if isinstance(spec, str):
        spec = {spec: None}
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"{field_name} must be a name, {{name: parameters}}, an import path or a function, got {spec!r}. Weights "
            "are looked up by name. Set a mapping of names to parameters to multiply several."
        )
    return [_resolve(name, params, registry, field_name) for name, params in spec.items()]


def _resolve(name: str, given: Params | None, registry: Mapping[str, Weighting], field_name: str) -> ResolvedWeighting:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"{field_name}[{name!r}] must be a mapping of parameters, got {given!r}. A bare value names no parameter. "
            f"Set {{{name!r}: {{parameter: value}}}}."
        )
    if name not in registry and isinstance(name, str) and "." in name:
        function = load_object(name, f"{field_name} must be the import path of a function")
        if not callable(function):
            raise ValueError(
                f"{field_name} must be the import path of a function, got {name!r}, a {type(function).__name__}. It "
                "is called with the statistics. Set the path of a function of them."
            )
        return _wrap(name, function, dict(given or {}))
    if name not in registry:
        raise ValueError(
            f"{field_name} must be a known name or an import path 'module.function', got {name!r}."
            f"{nearest_name(name, list(registry))}"
        )
    weighting = registry[name]
    params = {key: default for key, (default, _, _) in weighting.parameters.items()}
    for key, value in (given or {}).items():
        if key not in weighting.parameters:
            known = ", ".join(weighting.parameters)
            takes = f"takes {known}" if known else "takes no parameters"
            raise ValueError(f"{field_name}[{name!r}] has {key!r}, but {name} {takes}. Remove it or rename it.")
        default, rule, valid = weighting.parameters[key]
        if not valid(value):
            raise ValueError(
                f"{field_name}[{name!r}][{key!r}] must be {rule}, got {value!r}. The weight is not defined there. Set "
                f"one that is, the default is {default!r}."
            )
        params[key] = value
    wrong = weighting.check(params)
    if wrong:
        raise ValueError(f"{field_name}[{name!r}] {wrong}")
    reads = weighting.needs(params)
    sizes = {k: None if size is None else int(params[size]) for k, size in weighting.statistics.items() if k in reads}
    return ResolvedWeighting(name, weighting.function, params, reads, sizes, weighting.local, weighting.signed)


def _wrap(name: str, function: Callable[..., Tensor], params: Params) -> ResolvedWeighting:
    """A user's function. What it needs beyond what is known anyway, it says by attributes."""
    return ResolvedWeighting(
        name=name,
        function=function,
        params=params,
        needs=tuple(getattr(function, "needs", ())),
        statistics=dict(getattr(function, "statistics", {})),
        local=False,
        signed=bool(getattr(function, "signed", False)),
    )


def check_weights(weights: Any, mask: Tensor, weighting: ResolvedWeighting, field_name: str) -> Tensor:
    """
    `weights` if they fit `mask`, are finite and, unless the weighting is signed, not negative where it holds.

    Raises:
        ValueError: If not; names the weighting and the first position.
    """
    source = f"{field_name} {weighting.name!r}"
    if not isinstance(weights, Tensor) or weights.shape != mask.shape:
        got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"{type(weights).__name__}"
        raise ValueError(
            f"{source} must return a tensor of shape {tuple(mask.shape)}, got {got}. Each entry multiplies one loss. "
            "Return one weight for each entry of stats.mask."
        )
    bad = ~torch.isfinite(weights)
    if not weighting.signed:
        bad = bad | (weights < 0)
    where = (bad & mask).nonzero()
    if where.numel():
        position = tuple(where[0].tolist())
        value = float(weights[position])
        if math.isfinite(value):
            raise ValueError(
                f"{source} must return weights of at least 0, got {value:g} at {position}. A negative weight pushes "
                "the student away from the teacher. Clamp it, or mark a function that means it with `signed = True`."
            )
        raise ValueError(
            f"{source} must return finite weights, got {value:g} at {position}. One such weight makes the whole loss "
            "NaN. Check the statistics it is made of, and clamp ratios and exponentials."
        )
    return weights
