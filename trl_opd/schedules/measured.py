# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Schedules that follow a metric. Each measurement changes their state, which checkpoints keep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Schedule, ScheduleState, check_numbers, mix, require
from .timed import check_position


class Following(Schedule):
    """What they have in common: a value that measurements move."""

    _state: dict[str, float | None]

    def _begin(self, start: float, **others: float | None) -> None:
        named = isinstance(self.follows, str) and bool(self.follows)
        require("metric", self.follows, named, "the name of a metric in the log", "There is nothing to follow.")
        self._state = {"value": start, **others}

    @property
    def current(self) -> float:
        """The value, as the last measurement left it."""
        value = self._state["value"]
        assert value is not None
        return value

    def value(self, state: ScheduleState) -> float:
        return self.current

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._state.keys() != state.keys():
            raise ValueError(
                f"the saved state must be that of this type of schedule, {sorted(self._state)}, got {sorted(state)}. "
                "The value would not go on from where it was. Resume with the schedules of the run that wrote it."
            )
        self._state = dict(state)


@dataclass
class Metric(Following):
    """
    Moves by `change` whenever a metric has risen (or fallen) by at least `by` since the last move.

    The first measurement is what the following are compared with, until a move makes its own measurement that.

    Args:
        metric (`str`): Name in the log, e.g. `"eval_loss"` (measured at each evaluation) or `"reward"`.
        start (`float`): The value until the first move.
        change (`float`): Added in a move; below 0, the value falls.
        when (`str`, *optional*, defaults to `"rises"`): `"rises"` or `"falls"`.
        by (`float`, *optional*, defaults to `0.0`): Least difference, at least 0.
        minimum (`float`, *optional*), maximum (`float`, *optional*):
            Where it stops. The one that lies in the direction of `change` is required.

    Paper: [DistiLLM](https://huggingface.co/papers/2402.03898), section 4.2: start 0, change 0.1, by 0.1, maximum 1 on
    the validation loss. As in its code, the loss is compared with that of the last move, not of the last evaluation;
    its code also evaluates before the first step, which `eval_on_start=True` does.
    """

    metric: str
    start: float
    change: float
    when: str = "rises"
    by: float = 0.0
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        require("when", self.when, self.when in ("rises", "falls"), "'rises' or 'falls'", "It would never move.")
        require("by", self.by, self.by >= 0, "at least 0", "`when` says in which direction.")
        require("change", self.change, self.change != 0, "other than 0", "It would never move.")
        goal, name = (self.maximum, "maximum") if self.change > 0 else (self.minimum, "minimum")
        require(name, goal, goal is not None, f"set with change={self.change}", "The value would have no end.")
        low, high = self.bounds
        require("start", self.start, low <= self.start <= high, f"in [{low}, {high}]", "These are the value's ends.")
        self._begin(self.start, reference=None)

    def observe(self, measured: float, state: ScheduleState) -> None:
        reference = self._state["reference"]
        if reference is None:
            self._state["reference"] = measured
            return
        moved = measured >= reference + self.by if self.when == "rises" else measured <= reference - self.by
        if moved:
            low, high = self.bounds
            self._state = {"value": min(max(self.current + self.change, low), high), "reference": measured}

    @property
    def bounds(self) -> tuple[float, float]:
        low = self.start if self.minimum is None else self.minimum
        return low, self.start if self.maximum is None else self.maximum


@dataclass
class EntropyGated(Following):
    """
    Rises by `change` after each optimizer step whose entropy was above `threshold`, up to `maximum`. It never falls.

    Args:
        threshold (`float`): In nats per token.
        start (`float`), change (`float`), maximum (`float`): The values.
        metric (`str`, *optional*, defaults to `"distill/student_entropy"`): Name of the entropy in the log.

    Paper: [Decoupling KL and Trajectories](https://huggingface.co/papers/2605.16826) lets the completion length grow
    only while the entropy stays above a threshold. How its gate counts is not known to us: the rule is our own.
    """

    threshold: float
    start: float
    change: float
    maximum: float
    metric: str = "distill/student_entropy"

    def __post_init__(self) -> None:
        check_numbers(self)
        require("change", self.change, self.change > 0, "above 0", "The value only rises.")
        require("maximum", self.maximum, self.maximum >= self.start, f"at least start ({self.start})", "It rises.")
        self._begin(self.start)

    def observe(self, measured: float, state: ScheduleState) -> None:
        if measured > self.threshold:
            self._state["value"] = min(self.current + self.change, self.maximum)

    @property
    def bounds(self) -> tuple[float, float]:
        return self.start, self.maximum


@dataclass
class Taid(Following):
    r"""
    TAID's interpolation parameter: linear over the run, and ahead of the line while the loss J falls fast.

    After each step: δ = (J_prev − J) / J_prev, m ← β m + (1 − β) δ, t ← min(end, max(t_linear, t + α σ(m) (1 − t))).
    α = 0 is the line. It never falls. The first J is only remembered.

    Args:
        start (`float`, *optional*, defaults to `0.4`), end (`float`, *optional*, defaults to `1.0`): Of the line.
        alpha (`float`, *optional*, defaults to `5e-4`): α.
        momentum (`float`, *optional*, defaults to `0.99`): β.
        metric (`str`, *optional*, defaults to `"distill/loss"`): Name of J in the log. J should be positive.

    Paper: [TAID](https://huggingface.co/papers/2501.16937), algorithm 1. Deviations from its code: one update per
    optimizer step and not per micro-batch, and the line is that of the step that uses it, not of the one before.
    """

    start: float = 0.4
    end: float = 1.0
    alpha: float = 5e-4
    momentum: float = 0.99
    metric: str = "distill/loss"

    def __post_init__(self) -> None:
        check_numbers(self)
        require("end", self.end, self.start <= self.end <= 1, f"in [start ({self.start}), 1]", "The value only rises.")
        require("alpha", self.alpha, self.alpha >= 0, "at least 0", "The value only rises.")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)", "It is the weight of the past.")
        self._begin(self.start, previous=None, momentum=0.0)

    def observe(self, measured: float, state: ScheduleState) -> None:
        used = self.value(ScheduleState(max(state.step - 1, 0), state.max_steps))
        previous, momentum = self._state["previous"], self._state["momentum"]
        assert momentum is not None
        if previous is not None:
            momentum = self.momentum * momentum + (1 - self.momentum) * (previous - measured) / (previous + 1e-15)
            sigmoid = (1.0 + math.tanh(momentum / 2.0)) / 2.0  # which does not overflow
            used += self.alpha * sigmoid * (1.0 - used)
        self._state = {"value": used, "previous": measured, "momentum": momentum}

    def value(self, state: ScheduleState) -> float:
        line = mix(self.start, self.end, state.step / state.max_steps)
        return min(self.end, max(line, self.current))

    @property
    def bounds(self) -> tuple[float, float]:
        return self.start, self.end


@dataclass
class AdaKD(Following):
    r"""
    AdaKD's share of tokens: fewer of them as the loss falls, more when it rises.

    With the moving average J of the loss, and J' what it was at the last move (first: after the warm-up): where
    J < (1 − ε) J', r ← max(minimum, r (1 − σ)); where J > (1 + ε) J', r ← min(start, r (1 + σ)).

    Args:
        start (`float`, *optional*, defaults to `1.0`), minimum (`float`, *optional*, defaults to `0.1`): Ends of r.
        epsilon (`float`, *optional*, defaults to `0.05`): ε.
        sigma (`float`, *optional*, defaults to `0.05`): σ.
        momentum (`float`, *optional*, defaults to `0.99`): Weight of the past in the moving average.
        warmup (`float`, *optional*, defaults to `0.05`): Share of the run before the first J'.
        metric (`str`, *optional*, defaults to `"distill/loss"`): Name of the loss in the log. It should be positive.

    Paper: [AdaKD](https://huggingface.co/papers/2510.11615), loss-driven adaptive token focusing. Deviation from its
    code: one update per optimizer step and not per micro-batch.
    """

    start: float = 1.0
    minimum: float = 0.1
    epsilon: float = 0.05
    sigma: float = 0.05
    momentum: float = 0.99
    warmup: float = 0.05
    metric: str = "distill/loss"

    def __post_init__(self) -> None:
        check_numbers(self)
        require("minimum", self.minimum, 0 < self.minimum <= self.start, "in (0, start]", "r moves between the two.")
        for name in ("epsilon", "sigma", "momentum"):
            value = getattr(self, name)
            require(name, value, 0 <= value < 1, "in [0, 1)", "It is a share.")
        check_position("warmup", self.warmup, "fraction")
        self._begin(self.start, average=None, reference=None)

    def observe(self, measured: float, state: ScheduleState) -> None:
        old, reference, value = self._state["average"], self._state["reference"], self.current
        average = measured if old is None else self.momentum * old + (1 - self.momentum) * measured
        if reference is None:
            reference = average if state.step > self.warmup * state.max_steps else None
        elif average - reference > self.epsilon * reference:
            value, reference = min(self.start, value * (1 + self.sigma)), average
        elif reference - average > self.epsilon * reference:
            value, reference = max(self.minimum, value * (1 - self.sigma)), average
        self._state = {"value": value, "average": average, "reference": reference}

    @property
    def bounds(self) -> tuple[float, float]:
        return self.minimum, self.start
