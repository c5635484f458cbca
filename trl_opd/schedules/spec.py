# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Schedules as a configuration writes them."""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..imports import load_object
from ..losses import nearest_name
from .base import Schedule, ScheduleState, require
from .measured import AdaKD, EntropyGated, Metric, Taid
from .timed import Anneal, Constant, Cosine, Exponential, Linear, Piecewise


class Function(Schedule):
    """
    A function of [`ScheduleState`]. An object that has `state_dict` and `load_state_dict` is kept in checkpoints.

    It must go by its argument: it may be asked twice in a step, and a copy of it is asked before the run.
    """

    def __init__(self, function: Callable[[ScheduleState], float]):
        self.function = function

    def value(self, state: ScheduleState) -> float:
        return self.function(state)

    def state_dict(self) -> dict[str, Any]:
        save: Callable[[], dict[str, Any]] = getattr(self.function, "state_dict", dict)
        return save()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load = getattr(self.function, "load_state_dict", None)
        if load is not None:
            load(copy.deepcopy(dict(state)))


class Product(Schedule):
    """
    The product of several schedules, which may follow one metric between them.

    Args:
        factors (`list`): Their specifications; no functions.

    Paper: [DistiLLM](https://huggingface.co/papers/2402.03898) samples fresh text with probability φ (1 − step/total),
    with φ a schedule of type `"metric"`.
    """

    def __init__(self, factors: Sequence[Any]):
        several = isinstance(factors, (list, tuple)) and len(factors) > 1
        require("factors", factors, several, "a list of at least two schedules", "There is nothing to multiply.")
        self.factors = [make_schedule(spec, f"factors[{i}]") for i, spec in enumerate(factors)]
        plain = not any(isinstance(factor, Function) for factor in self.factors)
        require("factors", factors, plain, "without functions", "A function can multiply by itself.")
        metrics = {factor.follows for factor in self.factors} - {None}
        require("factors", factors, len(metrics) <= 1, "of one metric", "A product follows one.")
        self.metric = next(iter(metrics), None)

    def value(self, state: ScheduleState) -> float:
        return math.prod(factor.value(state) for factor in self.factors)

    def observe(self, measured: float, state: ScheduleState) -> None:
        for factor in self.factors:
            factor.observe(measured, state)

    @property
    def bounds(self) -> tuple[float, float]:
        return _products([factor.bounds for factor in self.factors])

    def extremes(self, state: ScheduleState) -> tuple[float, float]:
        return _products([factor.extremes(state) for factor in self.factors])

    def breakpoints(self, max_steps: int) -> list[int]:
        return [step for factor in self.factors for step in factor.breakpoints(max_steps)]

    def state_dict(self) -> dict[str, Any]:
        states = {str(i): factor.state_dict() for i, factor in enumerate(self.factors)}
        return {i: state for i, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, factor in enumerate(self.factors):
            factor.load_state_dict(state.get(str(i), {}))


def _products(ends: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """Least and greatest product of one number out of each interval."""
    products = [math.prod(numbers) for numbers in itertools.product(*(pair for pair in ends if pair is not None))]
    return min(products), max(products)


TYPES: Mapping[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "piecewise": Piecewise,
    "anneal": Anneal,
    "metric": Metric,
    "entropy_gated": EntropyGated,
    "taid": Taid,
    "adakd": AdaKD,
    "product": Product,
}


def make_schedule(spec: Any, where: str) -> Schedule:
    """
    The schedule that a specification describes.

    Args:
        spec (`float`, `dict`, `str` or `Callable`): A number, `{"type": ..., ...}`, an import path or a function.
        where (`str`): How messages call it.

    Raises:
        ValueError: If it is none of these, or a parameter is unknown, missing or out of range.
    """
    spec = _as_number(spec)
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        spec = {"type": "constant", "value": spec}
    if isinstance(spec, str):
        spec = load_object(spec, f"{where} must be a schedule or the import path of a function")
    if callable(spec):
        return Function(spec)
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise ValueError(
            f"{where} must be a number, a dict with a type, a function or its import path, got {spec!r}. It says "
            "nothing about the value's course. Set e.g. {'type': 'linear', 'start': 0.0, 'end': 1.0}."
        )
    parameters = dict(spec)
    name = parameters.pop("type")
    if name not in TYPES:
        raise ValueError(f"{where}.type must be a known name, got {name!r}.{nearest_name(name, list(TYPES))}")
    known = inspect.signature(TYPES[name]).parameters
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"{where} must have parameters of {name!r} only, got {parameter!r}. It would be ignored."
                f"{nearest_name(parameter, list(known))}"
            )
    missing = [n for n, p in known.items() if p.default is p.empty and n not in parameters]
    if missing:
        raise ValueError(
            f"{where}.{missing[0]} must be set for type {name!r}, got {dict(spec)!r}. It has no default. Set it."
        )
    try:
        return TYPES[name](**{n: _as_number(value) for n, value in parameters.items()})
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def _as_number(value: Any) -> Any:
    """Numbers that YAML takes for text (`5e-4`), inside lists too."""
    if isinstance(value, (list, tuple)):
        return [_as_number(v) for v in value]
    if isinstance(value, str):
        for convert in (int, float):
            try:
                return convert(value)
            except ValueError:
                continue
    return value


def describe(spec: Any) -> Any:
    """A specification with its functions by name, as files can hold it."""
    if isinstance(spec, Mapping):
        return {name: describe(value) for name, value in spec.items()}
    if callable(spec):
        named = spec if hasattr(spec, "__qualname__") else type(spec)
        return f"{named.__module__}.{named.__qualname__}"
    return spec
