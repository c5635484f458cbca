# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergences' names and parameters as a configuration writes them: defaults, rules, and the special cases that are
another divergence. The formulas are in `trl_opd.losses`, which offers these functions too.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

WEIGHTINGS = ("student", "teacher", "uniform")  # of the vocabulary entries, in the concrete score
_SUM_TOLERANCE = 1e-6  # of the weights of a mixture, which people write with few digits

_NONZERO = "finite and not 0 (for the limit use forward_kl or reverse_kl)"
_Rule = tuple[float | str, str, Callable[[Any], bool]]
_CHOICE = f"one of {', '.join(WEIGHTINGS)}"
# name -> parameter -> (default, rule in words, test)
_PARAMETERS: Mapping[str, Mapping[str, _Rule]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": (0.5, "in [0, 1]", lambda x: 0 <= x <= 1)},
    "skew_forward_kl": {"skew": (0.1, "in [0, 1)", lambda x: 0 <= x < 1)},
    "skew_reverse_kl": {
        "skew": (0.1, "in [0, 1)", lambda x: 0 <= x < 1),
        "detached": (0.0, "0 or 1", lambda x: x in (0, 1)),
    },
    "total_variation": {},
    "alpha_divergence": {"alpha": (0.5, "a finite number", math.isfinite)},
    "alpha_beta_divergence": {
        "alpha": (0.2, _NONZERO, lambda x: math.isfinite(x) and x != 0),
        "beta": (0.7, _NONZERO, lambda x: math.isfinite(x) and x != 0),
    },
    "todi": {"scale": (1.0, "a finite number, at least 0", lambda x: math.isfinite(x) and x >= 0)},
    "adaptive_kl": {"head_mass": (0.5, "in (0, 1]", lambda x: 0 < x <= 1)},
    "concrete_score": {
        "first": ("student", _CHOICE, lambda x: x in WEIGHTINGS),
        "second": ("uniform", _CHOICE, lambda x: x in WEIGHTINGS),
    },
    "entropy_gated_kl": {
        "threshold": (0.8, "a number (infinity never adds the forward KL)", lambda x: not math.isnan(x)),
        "coef": (1.0, "a finite number, at least 0", lambda x: math.isfinite(x) and x >= 0),
    },
    "convex_mix": {},  # has the other names for parameters
}
NAMES = tuple(_PARAMETERS)


def nearest_name(name: object, valid: list[str]) -> str:
    """The end of an error message about an unknown name: the nearest valid one, then all of them."""
    close: list[str] = []
    if isinstance(name, str):
        contain = [v for v in valid if name.lower() in v]
        close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4) or contain
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Valid: {', '.join(valid)}."


def resolve_divergence(name: str, kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """
    Check a divergence's name and parameters, and fill in the defaults.

    The special cases that coincide with a KL (generalized JSD at β = 0 and 1, α-divergence at 0 and 1, skew 0, an
    entropy gate that never opens) resolve to that KL, and a mixture that comes down to one divergence resolves to it,
    so that a kernel sees one definition of each. What is returned resolves to itself.

    Args:
        name (`str`): A key of `DIVERGENCES`.
        kwargs (`Mapping[str, float or str]`, *optional*):
            Its parameters; of `convex_mix` the names of divergences, see [`convex_mix`].

    Returns:
        `tuple[str, dict]`: the name and the complete parameters, as its function takes them.

    Raises:
        ValueError: If the name or a parameter is unknown, or a parameter is out of range.
    """
    if name not in NAMES:
        raise ValueError(f"divergence must be a known name, got {name!r}.{nearest_name(name, list(NAMES))}")
    if name == "convex_mix":
        return _resolve_mixture(kwargs or {})
    rules = _PARAMETERS[name]
    params = {key: default for key, (default, _, _) in rules.items()}
    for key, value in (kwargs or {}).items():
        if key not in rules:
            takes = f"takes {', '.join(rules)}" if rules else "takes no parameters"
            raise ValueError(f"divergence_kwargs has {key!r}, but {name} {takes}. Remove it or rename it.")
        default, rule, valid = rules[key]
        of_the_kind = isinstance(value, str) if isinstance(default, str) else _is_number(value)
        if not of_the_kind or not valid(value):
            raise ValueError(f"divergence_kwargs[{key!r}] of {name} must be {rule}, got {value!r}.")
        params[key] = value if isinstance(default, str) else float(value)
    return _special_case(name, params)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _special_case(name: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The divergence that these parameters make of another, or the same."""
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
    if name == "entropy_gated_kl" and (params["coef"] == 0.0 or params["threshold"] == math.inf):
        return "reverse_kl", {}
    return name, params


def _resolve_mixture(components: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """[`resolve_divergence`] of `convex_mix`: components of weight 0 go, those that are the same are added."""
    if not components:
        raise ValueError(
            "divergence_kwargs of convex_mix must name at least one divergence, got none. It is a mixture of those. "
            "Set for example {'forward_kl': 0.3, 'reverse_kl': 0.7}."
        )
    valid = [name for name in NAMES if name != "convex_mix"]
    parts: list[tuple[str, dict[str, Any], float | None]] = []
    for name, given in components.items():
        if name not in valid:
            nested = " A mixture in a mixture is one mixture: name its divergences here."
            remedy = nested if name == "convex_mix" else nearest_name(name, valid)
            raise ValueError(f"divergence_kwargs of convex_mix must be known names, got {name!r}.{remedy}")
        own = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = own.pop("weight", "no weight")
        if weight is not None and not (_is_number(weight) and 0 <= weight <= 1):
            raise ValueError(
                f"The weight of {name!r} in divergence_kwargs of convex_mix must be in [0, 1], or None for what the "
                f"others leave, got {weight!r}. Write {{{name!r}: 0.5}}, or with parameters "
                f"{{{name!r}: {{'weight': 0.5, ...}}}}."
            )
        parts.append((*resolve_divergence(name, own), weight))
    given_sum = sum(weight for _, _, weight in parts if weight is not None)
    num_open = sum(weight is None for _, _, weight in parts)
    if num_open > 1 or given_sum > 1 + _SUM_TOLERANCE or (not num_open and given_sum < 1 - _SUM_TOLERANCE):
        raise ValueError(
            f"The weights of convex_mix must sum to 1, got {given_sum:.6g}{f' and {num_open} None' * bool(num_open)}. "
            "A convex mixture keeps the scale of a divergence (for another scale use distill_coef). Change a weight, "
            "or write None for one of them: it becomes what the others leave."
        )
    rest = max(0.0, 1.0 - given_sum)
    merged: dict[str, dict[str, Any]] = {}
    for name, params, weight in parts:
        share = rest if weight is None else float(weight)
        if share > 0:
            before = merged.get(name, {}).get("weight", 0.0)  # only a KL can come twice, as itself or a special case
            merged[name] = {"weight": before + share, **params}
    if len(merged) == 1:
        ((name, params),) = merged.items()
        return name, {key: value for key, value in params.items() if key != "weight"}
    return "convex_mix", merged


def mixture_components(params: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Name, weight and parameters of each divergence in the resolved parameters of `convex_mix`."""
    for name, own in params.items():
        yield name, own["weight"], {key: value for key, value in own.items() if key != "weight"}
