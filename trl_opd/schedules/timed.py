# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Schedules that go by the step alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .base import Schedule, ScheduleState, check_numbers, is_number, mix, require


def check_position(name: str, position: object, unit: str) -> None:
    """A position must be one in its unit: shares and steps are never guessed apart."""
    require("unit", unit, unit in ("fraction", "steps"), "'fraction' or 'steps'", "Positions would have no meaning.")
    if unit == "steps":
        whole = isinstance(position, int) and not isinstance(position, bool) and position >= 0
        require(name, position, whole, "a whole number of steps", "Set unit='fraction' for shares of the run.")
        return
    inside = is_number(position) and 0 <= position <= 1  # type: ignore[operator]
    require(name, position, inside, "a share of the run in [0, 1]", "Set unit='steps' for optimizer steps.")


def _position(state: ScheduleState, unit: str) -> float:
    return state.step / state.max_steps if unit == "fraction" else state.step


def _step_at(position: float, unit: str, max_steps: int) -> int:
    return math.ceil(position * max_steps) if unit == "fraction" else int(position)


class Constant(Schedule):
    """Always `value`."""

    def __init__(self, value: float):
        require("value", value, is_number(value), "a finite number", "The field would have none.")
        self.constant = value

    def value(self, state: ScheduleState) -> float:
        return self.constant

    @property
    def bounds(self) -> tuple[float, float]:
        return self.constant, self.constant


@dataclass
class Linear(Schedule):
    """
    From `start` to `end` on a straight line, between the positions `begin` and `finish`; constant outside them.

    Args:
        start (`float`), end (`float`): The two values.
        begin (`float` or `int`, *optional*, defaults to `0`), finish (`float` or `int`, *optional*):
            The two positions. `finish` defaults to the end of the run.
        unit (`str`, *optional*, defaults to `"fraction"`): That of the positions: `"fraction"` or `"steps"`.
    """

    start: float
    end: float
    begin: Any = 0
    finish: Any = None
    unit: str = "fraction"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_position("begin", self.begin, self.unit)
        last = self.finish
        if last is not None:
            check_position("finish", last, self.unit)
            require("finish", last, last > self.begin, f"after begin ({self.begin})", "Use 'piecewise' for a jump.")
        elif self.unit == "fraction":
            require("begin", self.begin, self.begin < 1, "before the end of the run", "Nothing would change.")

    def value(self, state: ScheduleState) -> float:
        finish = self.finish
        if finish is None:
            finish = 1.0 if self.unit == "fraction" else state.max_steps
        if _position(state, self.unit) >= finish:
            return self.end
        progress = (_position(state, self.unit) - self.begin) / (finish - self.begin)
        return self.at(max(progress, 0.0))

    def at(self, progress: float) -> float:
        """The value at a share of the way, in [0, 1]."""
        return mix(self.start, self.end, progress)

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    def breakpoints(self, max_steps: int) -> list[int]:
        positions = [self.begin] if self.finish is None else [self.begin, self.finish]
        return [_step_at(p, self.unit, max_steps) for p in positions]


@dataclass
class Cosine(Linear):
    """From `start` to `end` on half a cosine, flat at both: weight of `end` (1 − cos πx) / 2. Args as [`Linear`]."""

    def at(self, progress: float) -> float:
        return mix(self.start, self.end, (1.0 - math.cos(math.pi * progress)) / 2.0)


@dataclass
class Exponential(Linear):
    """From `start` to `end` by a constant factor per step, start¹⁻ˣ · endˣ; both above 0. Args as [`Linear`]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "end"):
            value = getattr(self, name)
            require(name, value, value > 0, "above 0", "No factor leads to it. Set a small value, or use 'linear'.")

    def at(self, progress: float) -> float:
        return self.start ** (1.0 - progress) * self.end**progress


@dataclass
class Piecewise(Schedule):
    """
    Through given points: the first value before them, the last after them.

    Args:
        points (`list[tuple[float or int, float]]`): Position and value of each, in increasing order of position.
        interpolate (`bool`, *optional*, defaults to `True`):
            Whether the values between two points lie on a line. Else each value holds until the next point.
        unit (`str`, *optional*, defaults to `"fraction"`): That of the positions: `"fraction"` or `"steps"`.
    """

    points: Sequence[Sequence[float]]
    interpolate: bool = True
    unit: str = "fraction"

    def __post_init__(self) -> None:
        pairs = isinstance(self.points, (list, tuple)) and all(
            isinstance(p, (list, tuple)) and len(p) == 2 for p in self.points
        )
        require(
            "points", self.points, pairs and bool(self.points), "a list of [position, value]", "There is no course."
        )
        require("interpolate", self.interpolate, isinstance(self.interpolate, bool), "true or false", "")
        for position, value in self.points:
            check_position("points", position, self.unit)
            require("points", value, is_number(value), "a list of finite values", "The field would have no value.")
        ordered = all(a[0] < b[0] for a, b in zip(self.points, self.points[1:], strict=False))
        require("points", self.points, ordered, "in increasing order of position", "A point would never be reached.")

    def value(self, state: ScheduleState) -> float:
        position = _position(state, self.unit)
        if position < self.points[0][0]:
            return self.points[0][1]
        i = max(i for i, point in enumerate(self.points) if point[0] <= position)
        here, value = self.points[i]
        if not self.interpolate or i + 1 == len(self.points):
            return value
        there, following = self.points[i + 1]
        return mix(value, following, (position - here) / (there - here))

    @property
    def bounds(self) -> tuple[float, float]:
        return min(v for _, v in self.points), max(v for _, v in self.points)

    def breakpoints(self, max_steps: int) -> list[int]:
        return [_step_at(p, self.unit, max_steps) for p, _ in self.points]


@dataclass
class Anneal(Schedule):
    """
    From `start` towards `end` by `change_per_step` (above 0) in every optimizer step, and then constant.

    Paper: [KDRL](https://huggingface.co/papers/2506.02208) takes its coefficient from 5e-3 to 1e-3 by 5e-5 a step.
    """

    start: float
    end: float
    change_per_step: float

    def __post_init__(self) -> None:
        check_numbers(self)
        change = self.change_per_step
        require("change_per_step", change, change > 0, "above 0", "Its direction is that from start to end.")

    def value(self, state: ScheduleState) -> float:
        change = self.change_per_step * state.step
        return max(self.end, self.start - change) if self.end < self.start else min(self.end, self.start + change)

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    def breakpoints(self, max_steps: int) -> list[int]:
        return [math.ceil(abs(self.end - self.start) / self.change_per_step)]
