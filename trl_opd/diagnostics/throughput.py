# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The time that optimizer steps take, without what lies between them: evaluation, saving, loading."""

import time
from typing import Any

from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """Seconds since they were last taken, of optimizer steps and of a log line's wait for the last of them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._mark: float | None = None  # None: no step, and none that may still be at work on the device

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._account()

    def take(self) -> float:
        """The seconds; the count begins anew."""
        self._account()
        seconds, self._seconds, self._mark = self._seconds, 0.0, None
        return seconds

    def _account(self) -> None:
        now = time.perf_counter()
        self._seconds += 0.0 if self._mark is None else now - self._mark
        self._mark = now
