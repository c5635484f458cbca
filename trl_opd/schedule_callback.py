# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The callback that sets the scheduled fields of a run.

Values are set before the first micro-batch of an optimizer step, and with it before the completions that this
micro-batch may be made of: transformers calls `on_step_begin` between fetching the prompts and the training step in
which GRPO generates. All micro-batches of a step see the same values. A batch of completions from which several
optimizer steps are made keeps the values that it was generated with.

The trainer gets a copy of its configuration at construction, so that nobody else's moves. After training it keeps the
values of the last step, so that an evaluation sees what those during training saw. What is written to disk has the
configuration's own values: see [`ScheduleCallback.base_values`].
"""

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CellType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback

from .losses import nearest_name
from .schedules.base import Schedule, ScheduleState, is_number
from .schedules.fields import SCHEDULABLE, check_values, get_value, set_value
from .schedules.spec import Function, describe
from .teachers import SelfTeacher
from .teachers.base import leaves

if TYPE_CHECKING:
    from trl import GRPOTrainer

_FILE = "schedules.json"
# Fields that GRPOTrainer copies at construction, by the name of the copy
_COPIES = {name: name for name in ("beta", "entropy_coef", "top_entropy_quantile", "epsilon_high")}
_COPIES["epsilon"] = "epsilon_low"
# Those that also its generation has copies of, by their names in transformers
_GENERATION = {"max_completion_length": "max_new_tokens"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
}


class ScheduleCallback(TrainerCallback):
    """
    Sets the scheduled fields of a trainer before each optimizer step, and logs them as `schedule/FIELD`.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The run. Its `args` become a copy.
        schedules (`dict[str, Schedule]`): By field, or `field.key`: see [`schedules.resolve_schedules`].
    """

    def __init__(self, trainer: "GRPOTrainer", schedules: Mapping[str, Schedule]):
        self.trainer, self.schedules = trainer, dict(schedules)
        trainer.args = copy.copy(trainer.args)
        trainer.args.schedules = describe(trainer.args.schedules)
        self.values: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.loss: float | None = None
        self._base = {name: getattr(trainer.args, name) for name in {key.partition(".")[0] for key in schedules}}
        self._first = {name: get_value(trainer.args, name) for name in schedules}
        self._beginning = copy.deepcopy({name: schedule.state_dict() for name, schedule in schedules.items()})
        self._resumed = False
        self._warned = False
        self._each_step: set[str] = set()  # metrics that are measured after steps, and not only for the log
        followed = {schedule.follows for schedule in schedules.values() if schedule.follows is not None}
        self._followed = sorted(name for name in followed if not name.startswith("eval_"))
        self._wants_loss = any(isinstance(schedule, Function) for schedule in schedules.values())
        self._marks: dict[str, Any] = {}
        self._temperatures = _temperatures(trainer) if "temperature" in schedules else []

    # Values

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._resumed:
            self._start_anew()
        self._resumed = False
        if args.eval_on_start:
            self._apply(state)

    def on_step_begin(self, args, state, control, **kwargs):
        self._apply(state)
        self._mark()

    def _start_anew(self) -> None:
        self.values, self.metrics, self.loss = {}, {}, None
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(copy.deepcopy(self._beginning[name]))

    def _apply(self, state: Any) -> None:
        """Set every field to its value in the step that follows `state.global_step` others."""
        trainer, values = self.trainer, {}
        for name, schedule in self.schedules.items():
            if name in self.values and _is_held(name) and self._is_inside_batch:
                continue
            values[name] = schedule.value(self._state(state, name))
        if any(isinstance(self.schedules[name], Function) for name in values):
            check_values(trainer.args, values, state.global_step)  # the others cannot leave the course checked before
        for name, value in values.items():
            self.values[name] = self._set(name, value)
        for name, value in self.values.items():
            trainer._metrics["train"][f"schedule/{name}"] = [float(value)]

    def _state(self, state: Any, name: str) -> ScheduleState:
        value = self.values.get(name, self._first[name])
        return ScheduleState(state.global_step, max(state.max_steps, 1), value, dict(self.metrics), self.loss)

    @property
    def _is_inside_batch(self) -> bool:
        """Whether the coming step is made of completions that exist already."""
        trainer = self.trainer
        if trainer._buffered_inputs is None:
            return False
        return trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0

    def _set(self, name: str, value: float) -> float:
        """Set a field, and what GRPOTrainer and others have copied of it."""
        trainer = self.trainer
        value = set_value(trainer.args, name, value)
        if name in _COPIES:
            setattr(trainer, _COPIES[name], value)
        if name == "epsilon" and trainer.args.epsilon_high is None:
            trainer.epsilon_high = value
        if name in _GENERATION:
            setattr(trainer, name, value)
            if trainer.use_vllm:
                setattr(trainer.vllm_generation, name, value)
            else:
                setattr(trainer.generation_config, _GENERATION[name], value)
                trainer.generation_kwargs[_GENERATION[name]] = value
        for cell in self._temperatures if name == "temperature" else ():
            cell.cell_contents = value
        if name in ("teacher_sync_steps", "teacher_sync_rate"):
            for teacher in leaves(getattr(trainer, "teacher", None)):
                if isinstance(teacher, SelfTeacher):
                    setattr(teacher, name.removeprefix("teacher_sync_"), value)
        return value

    # Measurements: equal on all processes, and independent of how often is logged

    def _mark(self) -> None:
        """Where the sums of the run stand before a step."""
        trainer = self.trainer
        if not self._followed and not self._wants_loss:
            return
        self._marks = {
            "loss": trainer._tr_loss.detach().clone(),
            "sums": dict(_token_sums(trainer)),
            "lengths": {name: len(values) for name, values in trainer._metrics["train"].items()},
        }

    def on_step_end(self, args, state, control, **kwargs):
        if not self._followed and not self._wants_loss:
            return
        measured = self._measure()
        self.loss = measured.get("loss", self.loss)
        self._each_step |= measured.keys()
        self._observe(measured, state)

    def _measure(self) -> dict[str, float]:
        """The step's own values of the followed metrics."""
        trainer, names = self.trainer, [name for name in self._followed if name != "loss"]
        dtype = torch.float32 if trainer.accelerator.device.type == "mps" else torch.float64
        now, before = _token_sums(trainer), self._marks["sums"]
        nothing = torch.zeros(2)
        rows = [now.get(name, nothing) - before.get(name, nothing).to(now.get(name, nothing).device) for name in names]
        loss = trainer._tr_loss - self._marks["loss"]
        rows.append(torch.stack([loss, torch.ones_like(loss)]))
        sums = torch.stack([row.to(trainer.accelerator.device, dtype) for row in rows])
        sums = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        measured = {}
        for name, (total, count) in zip([*names, "loss"], sums, strict=True):
            if count:
                measured[name] = total / count
                continue
            # GRPO's own metrics are gathered before they are kept
            new = trainer._metrics["train"].get(name, [])[self._marks["lengths"].get(name, 0) :]
            values = [value for value in new if is_number(value)]
            if values:
                measured[name] = sum(values) / len(values)
        return {name: value for name, value in measured.items() if is_number(value)}

    def _observe(self, measured: Mapping[str, float], state: Any) -> None:
        self.metrics |= measured
        for name, schedule in self.schedules.items():
            if schedule.follows is not None and schedule.follows in measured:
                schedule.observe(measured[schedule.follows], self._state(state, name))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.trainer.is_in_train:
            self._observe({name: value for name, value in (metrics or {}).items() if is_number(value)}, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = {name: value for name, value in (logs or {}).items() if is_number(value)}
        self.metrics |= {name: value for name, value in logs.items() if name not in self._each_step}
        if "loss" not in logs:
            return
        late = [name for name in self._followed if name not in self._each_step]  # e.g. grad_norm: it is only logged
        self._observe({name: logs[name] for name in late if name in logs}, state)
        missing = [name for name in late if name not in logs]
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"schedules follow the metric {missing[0]!r}, which this run has not measured yet. Until then they "
                f"do not move.{nearest_name(missing[0], sorted(logs))}",
                stacklevel=2,
            )

    # Checkpoints

    @contextmanager
    def base_values(self) -> Iterator[None]:
        """The configuration's own values in the trainer's `args`: what files say of the run."""
        args = self.trainer.args
        moved = {name: getattr(args, name) for name in self._base}
        try:
            for name, value in self._base.items():
                setattr(args, name, value)
            yield
        finally:
            for name, value in moved.items():
                setattr(args, name, value)

    def save_state(self, folder: str) -> None:
        """Write what a resumed run needs to go on alike."""
        if not self.trainer.args.should_save:
            return
        os.makedirs(folder, exist_ok=True)
        states = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        content = {"schedules": states, "values": self.values, "metrics": self.metrics, "loss": self.loss}
        with open(os.path.join(folder, _FILE), "w") as f:
            json.dump(content, f, indent=1)

    def load_state(self, folder: str) -> None:
        """
        Continue from [`save_state`].

        Raises:
            ValueError: If the folder does not say where a schedule that follows a metric was.
        """
        saved: dict[str, Any] = {"schedules": {}, "values": {}, "metrics": {}, "loss": None}
        path = os.path.join(folder, _FILE)
        if os.path.exists(path):
            with open(path) as f:
                saved = json.load(f)
        self._start_anew()
        for name, schedule in self.schedules.items():
            state = saved["schedules"].get(name)
            if state is None and self._beginning[name]:
                raise ValueError(
                    f"The checkpoint {folder} must hold the state of schedules[{name!r}] in {_FILE} to resume, but "
                    "does not. It would start anew in the middle of the run. Resume with the schedules of the run "
                    "that wrote it."
                )
            try:
                schedule.load_state_dict(state or {})
            except ValueError as error:
                raise ValueError(f"schedules[{name!r}], resumed from {path}: {error}") from error
        self.values = {name: value for name, value in saved["values"].items() if name in self.schedules}
        self.metrics, self.loss = saved["metrics"], saved["loss"]
        self._resumed = True


def _is_held(name: str) -> bool:
    return name in SCHEDULABLE and SCHEDULABLE[name].held


def _token_sums(trainer: Any) -> Mapping[str, Any]:
    """Sums and counts of the distillation's metrics since the last log, of this process."""
    metrics = getattr(trainer, "_token_metrics", None)
    return {} if metrics is None else metrics["train"]._sums


def _temperatures(trainer: Any) -> list[CellType]:
    """Where TRL's fused heads keep the temperature that they were built with."""
    cells = _cells(trainer.model)
    if not cells:
        raise ValueError(
            "schedules must not have temperature with this version of TRL, whose language-model head cannot change "
            "it. Log-probs would keep the first one. Remove the schedule of temperature."
        )
    return cells if trainer.ref_model is None else cells + _cells(trainer.accelerator.unwrap_model(trainer.ref_model))


def _cells(model: Any) -> list[CellType]:
    model = model.get_base_model() if is_peft_model(model) else model
    functions = [vars(model).get("forward"), vars(model).get("_original_forward")]  # the second is accelerate's
    cells = []
    while functions:
        function = functions.pop()
        function = getattr(function, "__func__", function)
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        found = dict(zip(names, getattr(function, "__closure__", None) or (), strict=True))
        if "temperature" in found:
            cells.append(found["temperature"])
        if "original_forward" in found:
            functions.append(found["original_forward"].cell_contents)
    return cells
