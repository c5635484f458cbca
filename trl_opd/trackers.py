# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tables, texts and pictures for the trackers of `report_to`.

The numbers reach them through transformers. What numbers do not show (findings of the checks before the start, alarms,
the token view, the gap by position over the run) is handed to the runs and writers that transformers has opened; none
is opened here, and with `report_to="none"` there is none.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .quietly import Quietly
from .token_text import to_html, to_plain

if TYPE_CHECKING:
    from .findings import Finding
    from .trainer import OnPolicyDistillTrainer

_GAP = "distill/gap_at/"
_VIEWS = 40  # token views of a run that are handed over
_MAPS = 8  # heat maps
_COLUMNS = 60  # steps of a heat map
_ALARM_COLUMNS = ("step", "alarm", "severity", "seen", "why", "do")
Grid = tuple[list[str], list[int], list[list[float | None]]]  # buckets of positions, steps, values (by bucket)


class TrackerCallback(TrainerCallback):
    """
    Hands trackers what numbers do not show.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer
        self._sinks: dict[int, tuple[Sink, Quietly]] = {}
        self._num_alarms = self._num_logs = 0
        self._handed: dict[str, int] = {}  # the step of the last picture of a kind

    def on_train_begin(self, args, state, control, **kwargs):
        self._sinks, self._num_logs, self._handed = {}, 0, {}
        self._num_alarms = len(self.trainer.recorder.alarms)  # those of before a resumed run were handed over then
        self._find_sinks(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._find_sinks(state)
        if not self._sinks:
            return
        alarms = self.trainer.recorder.alarms
        for number in range(self._num_alarms, len(alarms)):
            self._hand("alarm", alarms[: number + 1], state.global_step)
        self._num_alarms = len(alarms)
        last = "train_runtime" in (logs or {})
        if last or self.trainer.model.training:
            self._hand_pictures(state, last)

    def _hand_pictures(self, state: Any, last: bool) -> None:
        """Some of them, spread over the run: the trackers keep every one."""
        total, step = max(1, state.max_steps // max(1, state.logging_steps)), state.global_step
        view, number = self.trainer._token_view, self._num_logs
        self._num_logs += 1
        if view.shown_step == step != self._handed.get("tokens") and (last or number % math.ceil(total / _VIEWS) == 0):
            self._hand("tokens", view, step)
            self._handed["tokens"] = step
        if step != self._handed.get("gap") and (last or (number + 1) % math.ceil(total / _MAPS) == 0):
            grid = gap_by_position(state.log_history)
            if len(grid[1]) > 1:
                self._hand("gap", grid, step)
                self._handed["gap"] = step

    def _find_sinks(self, state: Any) -> None:
        """Trackers that transformers has opened; a new one is told what the checks have found."""
        if not state.is_world_process_zero:
            return
        for callback in self.trainer.callback_handler.callbacks:
            if id(callback) in self._sinks:
                continue
            for kind, sink in SINKS.items():
                if isinstance(callback, kind) and sink.is_open(callback):
                    quietly = Quietly(f"Handing texts and tables to {sink.name}", "It still gets the numbers")
                    self._sinks[id(callback)] = sink(callback), quietly
                    problems = [finding for finding in self.trainer.findings if finding.is_problem]
                    if problems:
                        self._give(id(callback), "findings", problems)

    def _hand(self, what: str, *values: Any) -> None:
        for key in self._sinks:
            self._give(key, what, *values)

    def _give(self, key: int, what: str, *values: Any) -> None:
        sink, quietly = self._sinks[key]
        if not quietly.failed:
            with quietly:
                getattr(sink, what)(*values)


class Sink(Protocol):
    """An open tracker."""

    name: str

    def __init__(self, callback: Any): ...

    @staticmethod
    def is_open(callback: Any) -> bool:
        """Whether transformers' callback has opened its run."""
        ...

    def findings(self, findings: Sequence["Finding"]) -> None:
        """What the checks before the start have found."""
        ...

    def alarm(self, alarms: Sequence[Mapping[str, Any]], step: int) -> None:
        """The last of these alarms is new."""
        ...

    def tokens(self, view: Any, step: int) -> None:
        """Completions are in the [`TokenView`]."""
        ...

    def gap(self, grid: Grid, step: int) -> None:
        """The gap by position up to now."""
        ...


class TensorBoardSink:
    """TensorBoard: texts, and a figure where matplotlib is installed."""

    name = "TensorBoard"

    def __init__(self, callback: Any):
        self.callback = callback

    @staticmethod
    def is_open(callback: Any) -> bool:
        return callback.tb_writer is not None

    @property
    def _writer(self) -> Any:
        return self.callback.tb_writer

    def findings(self, findings: Sequence["Finding"]) -> None:
        rows = [(finding.check, finding.severity, finding.seen, finding.why, finding.do) for finding in findings]
        self._writer.add_text("opd/findings", _markdown(("check", "severity", "seen", "why", "do"), rows))

    def alarm(self, alarms: Sequence[Mapping[str, Any]], step: int) -> None:
        rows = [[alarms[-1].get(name, "") for name in _ALARM_COLUMNS]]
        self._writer.add_text("opd/alarms", _markdown(_ALARM_COLUMNS, rows), step)

    def tokens(self, view: Any, step: int) -> None:
        text = to_plain(view.rendered(view.shown, marks=True))
        self._writer.add_text("opd/tokens", "\n".join(f"    {line}" for line in text.split("\n")), step)

    def gap(self, grid: Grid, step: int) -> None:
        figure = _figure(grid)
        if figure is not None:
            self._writer.add_figure("opd/gap_by_position", figure, step)
            return
        buckets, steps, values = grid
        rows = [
            [name, *("" if x is None else f"{x:+.3f}" for x in row)] for name, row in zip(buckets, values, strict=True)
        ]
        self._writer.add_text("opd/gap_by_position", _markdown(("tokens", *steps), rows), step)


class _PageSink:
    """Trackers that show pages: W&B, and trackio, which has the same names."""

    name = ""
    library: Any

    def findings(self, findings: Sequence["Finding"]) -> None:
        columns = ["check", "severity", "seen", "why", "do"]
        rows = [[getattr(finding, name) for name in columns] for finding in findings]
        self._log("findings", self.library.Table(columns=columns, data=rows), 0)

    def alarm(self, alarms: Sequence[Mapping[str, Any]], step: int) -> None:
        alarm = alarms[-1]
        text = "\n\n".join(str(alarm[name]) for name in ("seen", "why", "do") if alarm.get(name))
        level = self.library.AlertLevel.ERROR if alarm.get("severity") == "error" else self.library.AlertLevel.WARN
        self.library.alert(title=str(alarm.get("alarm", "alarm"))[:63], text=text, level=level)
        rows = [[str(a.get(name, "")) for name in _ALARM_COLUMNS] for a in alarms]
        self._log("alarms", self.library.Table(columns=list(_ALARM_COLUMNS), data=rows), step)

    def tokens(self, view: Any, step: int) -> None:
        self._log("tokens", self.library.Html(to_html(view.rendered(view.shown)), inject=False), step)

    def gap(self, grid: Grid, step: int) -> None:
        self._log("gap_by_position", self.library.Html(heat_map(grid)), step)

    def _log(self, name: str, value: Any, step: int) -> None:
        self.library.log({f"opd/{name}": value, "train/global_step": step})


class WandbSink(_PageSink):
    """Weights & Biases."""

    name = "W&B"

    def __init__(self, callback: Any):
        self.library = callback._wandb

    @staticmethod
    def is_open(callback: Any) -> bool:
        return callback._wandb is not None and callback._wandb.run is not None


class TrackioSink(_PageSink):
    """trackio."""

    name = "trackio"

    def __init__(self, callback: Any):
        self.library = callback._trackio

    @staticmethod
    def is_open(callback: Any) -> bool:
        return bool(callback._initialized) and callback._trackio.context_vars.current_run.get() is not None


SINKS: Mapping[type, type[Sink]] = {
    TensorBoardCallback: TensorBoardSink,
    WandbCallback: WandbSink,
    TrackioCallback: TrackioSink,
}


# The gap by position


def gap_by_position(history: Sequence[Mapping[str, Any]]) -> Grid:
    """
    Teacher − student log-prob by token position (rows) and step (columns), from the lines of a run's log.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `TrainerState.log_history`. Of many lines, some are taken, evenly spread.
    """
    lines = [line for line in history if any(name.startswith(_GAP) for name in line)]
    if len(lines) > _COLUMNS:
        lines = [lines[round(i * (len(lines) - 1) / (_COLUMNS - 1))] for i in range(_COLUMNS)]
    names = sorted({name for line in lines for name in line if name.startswith(_GAP)})
    values = [[_finite(line.get(name)) for line in lines] for name in names]
    return [name.removeprefix(_GAP) for name in names], [int(line["step"]) for line in lines], values


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _scale(values: Sequence[Sequence[float | None]]) -> float:
    """Symmetric about 0, so that the two colours mean the two directions."""
    return max((abs(x) for row in values for x in row if x is not None), default=0.0) or 1.0


def heat_map(grid: Grid) -> str:
    """The gap by position as a table in HTML, without scripts: red where the teacher finds the tokens less likely."""
    buckets, steps, values = grid
    scale = _scale(values)

    def cell(x: float | None) -> str:
        if x is None:
            return "<td></td>"
        light = round(255 * (1 - min(abs(x) / scale, 1.0)))
        colour = f"rgb({light},255,{light})" if x > 0 else f"rgb(255,{light},{light})"
        return f'<td style="background:{colour};min-width:8px;height:18px" title="{x:+.4f}"></td>'

    rows = "".join(
        f'<tr><th style="text-align:right;font-weight:normal">{html.escape(name)}</th>{"".join(map(cell, row))}</tr>'
        for name, row in zip(buckets, values, strict=True)
    )
    return (
        "<p>Mean gap (teacher − student log-prob of the sampled token, in nats) by token position, steps "
        f"{steps[0]} to {steps[-1]}. Red: below 0; green: above; full colour at ±{scale:.3g}.</p>"
        f'<table style="border-spacing:0;font-size:12px"><tbody>{rows}</tbody></table>'
    )


def _figure(grid: Grid) -> Any:
    """The same as a figure of matplotlib; `None` where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    import numpy as np

    buckets, steps, values = grid
    scale = _scale(values)
    figure = Figure(figsize=(8, 0.4 * len(buckets) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    matrix = np.array([[math.nan if x is None else x for x in row] for row in values])
    image = axes.imshow(matrix, cmap="RdYlGn", vmin=-scale, vmax=scale, aspect="auto")
    axes.set_yticks(range(len(buckets)), buckets)
    shown = range(0, len(steps), max(1, len(steps) // 8))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes.set_xlabel("step")
    axes.set_ylabel("token position")
    figure.colorbar(image, label="teacher − student log-prob [nats]")
    return figure


def _markdown(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
