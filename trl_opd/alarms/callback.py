# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The callback that reads the log, and what it does with an alarm: on all processes alike."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..imports import load_object
from ..resolve import nearest_name
from .alarm import Alarm
from .thresholds import check_thresholds
from .watch import Watch

ACTIONS = ("warn", "stop", "off")
Answer = Callable[[Alarm], str | None]
logger = logging.getLogger(__name__)


class AlarmCallback(TrainerCallback):
    """
    Watches the training lines of the log for what precedes a collapse.

    [`OnPolicyDistillTrainer`] has one by its fields `on_alarm` and `alarm_thresholds`. One among the trainer's
    `callbacks` stands in its place, and takes functions that need no import path. Other trainers of transformers may
    have one too: rules whose metrics are not logged are silent.

    Args:
        on_alarm (`str` or `Callable`, *optional*, defaults to `"warn"`):
            `"warn"` logs the alarm. `"stop"` does too, and ends the training after this step with a checkpoint, also
            where `save_strategy="no"`. `"off"` watches nothing. A function, or the import path of one, gets the
            [`Alarm`] on the main process; if it returns `"stop"`, the training ends as above.
        thresholds (`dict[str, float]`, *optional*):
            Those that differ from `trl_opd.alarms.THRESHOLDS`, by name. Defaults to the trainer's `alarm_thresholds`.

    Raises:
        ValueError: Of an unknown action or threshold.

    Example:

    ```python
    def page_me(alarm):
        send_message(str(alarm))
        return "stop" if alarm.severity == "error" else None

    trainer = OnPolicyDistillTrainer(..., callbacks=[AlarmCallback(page_me, {"kl_spike.factor": 5})])
    ```
    """

    def __init__(self, on_alarm: str | Answer = "warn", thresholds: Mapping[str, Any] | None = None):
        self.action = resolve_on_alarm(on_alarm)
        check_thresholds(thresholds)
        self.thresholds = thresholds
        self.stopped_by: Alarm | None = None
        self._trainer: Any = None
        self._watch: Watch | None = None

    def bind(self, trainer: Any) -> None:
        """The trainer that the callback belongs to, whose recorder keeps the alarms."""
        self._trainer = trainer
        if self.thresholds is None:
            self.thresholds = getattr(trainer.args, "alarm_thresholds", None)
            check_thresholds(self.thresholds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the lines of the checkpoint that a run resumes from: what was said is not said again."""
        self.stopped_by = None
        if self.action == "off":
            return
        self._watch = Watch(self.thresholds, getattr(args, "fp16", False))
        for logs in state.log_history:
            if "loss" in logs:
                self._read(logs.get("step", 0), logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Read a line, and stop on all processes if the main one says so."""
        if self.action == "off" or not logs or "loss" not in logs:  # evaluations, and the summary at the end
            return
        stop = self._answer(state.global_step, logs) if PartialState().is_main_process else None
        if not _main_says(stop is not None):
            return
        self.stopped_by = stop
        control.should_training_stop = control.should_save = True
        if args.save_strategy == SaveStrategy.BEST:  # an evaluation would decide on the checkpoint anew
            control.should_evaluate = False
        if stop is not None:
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            broken = " It may hold a broken student: go on from an earlier one." if stop.severity == "error" else ""
            logger.warning(f"The alarm {stop.alarm} stops the training. A checkpoint is written to {folder}.{broken}")

    def _read(self, step: int, logs: Mapping[str, Any]) -> list[Alarm]:
        if self._watch is None:
            return []
        try:
            return self._watch.read(step, logs)
        except Exception:  # what watches a run must not end it
            logger.warning(f"The alarms failed at the log line of step {step} and are off from here.", exc_info=True)
            self._watch = None
            return []

    def _answer(self, step: int, logs: Mapping[str, Any]) -> Alarm | None:
        """Say the alarms of a line; return the one that stops the run."""
        stop = None
        for alarm in self._read(step, logs):
            recorder = getattr(self._trainer, "recorder", None)
            if recorder is not None:
                recorder.add_alarm(alarm.as_dict())
            if self._stops(alarm) and stop is None:
                stop = alarm
        return stop

    def _stops(self, alarm: Alarm) -> bool:
        if not callable(self.action):
            logger.warning(str(alarm))
            return self.action == "stop"
        try:
            return self.action(alarm) == "stop"
        except Exception:
            logger.warning(f"on_alarm failed, and the run goes on. The alarm was: {alarm}", exc_info=True)
            return False


def check_on_alarm(on_alarm: Any) -> None:
    """
    Check the field `on_alarm`.

    Raises:
        ValueError: Of what is neither an action nor the import path of a function.
    """
    if callable(on_alarm):
        raise ValueError(
            f"on_alarm must be 'warn', 'stop', 'off' or the import path of a function, got {on_alarm!r}. The "
            "configuration is written to disk. Pass callbacks=[AlarmCallback(on_alarm=...)] to the trainer instead."
        )
    resolve_on_alarm(on_alarm)


def resolve_on_alarm(on_alarm: Any) -> str | Answer:
    """The action, or the function that an import path names."""
    if callable(on_alarm) or on_alarm in ACTIONS:
        return on_alarm
    rule = "on_alarm must be 'warn', 'stop', 'off' or the import path of a function"
    if not isinstance(on_alarm, str) or "." not in on_alarm:
        raise ValueError(
            f"{rule}, got {on_alarm!r}. Nobody would hear the alarms. Write a function as 'my_module.my_function'."
            f"{nearest_name(on_alarm, list(ACTIONS))}"
        )
    function = load_object(on_alarm, rule)
    if not callable(function):
        raise ValueError(f"{rule}, got {on_alarm!r}. It names {function!r}. Name a function of the alarm.")
    return function


def _main_says(stop: bool) -> bool:
    """The main process's decision, on all of them. All must call it together."""
    process = PartialState()
    if process.num_processes == 1:
        return stop
    flag = broadcast(torch.tensor([float(stop)], device=process.device), from_process=0)
    return bool(flag.item())
