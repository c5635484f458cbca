# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where the seconds of a training step go, told by timers put around methods from outside: ours and TRL's the same way.

The phases exclude each other: time in a nested phase is not counted in the outer one, so they sum to the step.
- rollout: sampling the completions (`_generate_single_turn`);
- teacher: the backbone of the teacher; student: that of the student, forward;
- head: both projections and the divergence, forward and backward;
- backward: the rest of the backward pass;
- other: everything else, the optimizer and the bookkeeping included.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from .measure import synchronize

PHASES = ("rollout", "teacher", "student", "head", "backward", "other")


class PhaseTimer:
    """
    Exclusive seconds of the phases of a step.

    A device works on while Python goes ahead, so every boundary of a phase waits for it. That costs time: in a step
    that is not `detailed` only the rollout has boundaries.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.detailed = False
        self.steps: list[tuple[bool, dict[str, float]]] = []  # whether detailed, and the seconds of its phases
        self._stack: list[str] = []
        self._seconds: dict[str, float] = {}
        self._mark = 0.0

    def _account(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    def begin_step(self) -> None:
        self._stack, self._seconds = [], dict.fromkeys(PHASES, 0.0)
        self._account()
        self._stack = ["other"]

    def end_step(self) -> None:
        self._account()
        self._stack = []
        self.steps.append((self.detailed, self._seconds))

    def _is_live(self, name: str) -> bool:
        # Autograd calls a head's backward from a thread of its own while this one waits: one stack serves both
        inside = bool(self._stack) and "rollout" not in self._stack
        return inside and (self.detailed or name == "rollout")

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its time accounted to a phase."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._is_live(name):
                return function(*args, **kwargs)
            self._account()
            self._stack.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._account()
                self._stack.pop()

        timed._is_timed = True  # type: ignore[attr-defined]
        return timed


def _backwards(prefix: str) -> list[type]:
    """Every autograd function, of the modules imported so far, whose module's name begins with `prefix`."""
    return [c for c in torch.autograd.Function.__subclasses__() if c.__module__.startswith(prefix)]


def watch(timer: PhaseTimer, trainer: Any, teacher: Any) -> None:
    """Put the timers around a trainer's own objects."""
    trainer._generate_single_turn = timer.wrap("rollout", trainer._generate_single_turn)
    student = trainer.accelerator.unwrap_model(trainer.model)
    for phase, model in (("teacher", teacher), ("student", student)):
        model.base_model.forward = timer.wrap(phase, model.base_model.forward)
    trainer.accelerator.backward = timer.wrap("backward", trainer.accelerator.backward)


class WatchedHead:
    """
    Context in which a head's function, and the backward passes of its autograd functions, are timed.

    Args:
        timer ([`PhaseTimer`]): Where the time goes.
        module: The module whose global `name` is the head's forward.
        name (`str`): That name.
        prefix (`str`): Modules that hold the head's autograd functions.
    """

    def __init__(self, timer: PhaseTimer, module: Any, name: str, prefix: str):
        self.timer, self.module, self.name, self.prefix = timer, module, name, prefix
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "WatchedHead":
        self._replace(self.module, self.name, self.timer.wrap("head", getattr(self.module, self.name)))
        self.refresh()
        return self

    def refresh(self) -> None:
        """Find the autograd functions of modules that were imported since."""
        for cls in _backwards(self.prefix):
            backward: Any = cls.backward  # type: ignore[attr-defined]
            if not hasattr(backward, "_is_timed"):
                self._replace(cls, "backward", staticmethod(self.timer.wrap("head", backward)))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def __exit__(self, *exc: object) -> None:
        for owner, name, value in reversed(self._replaced):
            setattr(owner, name, value)
        self._replaced.clear()
