# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What a schedule is, and what it may depend on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class ScheduleState:
    """
    What a schedule may depend on. The same on all processes.

    Args:
        step (`int`): Optimizer steps already taken, 0 at the first.
        max_steps (`int`): Optimizer steps of the run.
        value (`float`, *optional*): The field's value now; before the first step, the configuration's.
        metrics (`Mapping[str, float]`): The latest values of the logged metrics, by the names of the log.
        loss (`float`, *optional*): The loss of the last optimizer step, a mean over the processes.
    """

    step: int
    max_steps: int
    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None


class Schedule:
    """
    A number as a function of how far a run is.

    `value` changes nothing: asked again in the same step, it says the same. What a schedule learns during the run it
    learns from `observe`, and checkpoints keep it.
    """

    @property
    def follows(self) -> str | None:
        """Name of the metric that it is told of, as in the log."""
        return getattr(self, "metric", None)

    def value(self, state: ScheduleState) -> float:
        """The field's value in the step that comes after `state.step` others."""
        raise NotImplementedError

    def observe(self, measured: float, state: ScheduleState) -> None:
        """Take note of a new measurement of the metric, after `state.step` steps."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and greatest value; `None` if they are not known."""
        return None

    def extremes(self, state: ScheduleState) -> tuple[float, float]:
        """Least and greatest value that it may have in this step."""
        if self.follows is not None and self.bounds is not None:
            return self.bounds
        value = self.value(state)
        return value, value

    def breakpoints(self, max_steps: int) -> list[int]:
        """Steps at which its course changes."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it; empty where the step says everything."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Continue from [`state_dict`].

        Raises:
            ValueError: If it is that of another type.
        """


def require(name: str, value: object, valid: bool, rule: str, breaks: str) -> None:
    """Raise in the house's form unless `valid`."""
    if not valid:
        raise ValueError(f"{name} must be {rule}, got {value!r}. {breaks}")


def is_number(value: object) -> bool:
    """Whether it is a finite number (a boolean is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_numbers(schedule: Any) -> None:
    """Parameters annotated as numbers must be finite ones."""
    for f in fields(schedule):
        value = getattr(schedule, f.name)
        if f.init and (f.type is float or (f.type == float | None and value is not None)):
            require(f.name, value, is_number(value), "a finite number", "The field would have no value.")


def mix(start: float, end: float, weight: float) -> float:
    """`start` at weight 0 and `end` at 1, both exactly."""
    return (1.0 - weight) * start + weight * end
