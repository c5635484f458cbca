# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Numbers of a run in words: the overview of one run, and the tables that compare several."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .catalogue import KEY_NUMBERS, KeyNumber
from .figures import start_and_now, thin_out
from .load import Run

_FLAT = 0.05  # a change below this share of the start counts as none
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Shown:
    """A key number of a run, ready to be shown; `verdict` is `"good"`, `"bad"` or empty."""

    title: str
    unit: str
    start: str
    now: str
    change: str
    verdict: str
    values: list[float] = field(repr=False, default_factory=list)

    @property
    def points(self) -> str:
        """The curve as the points of an SVG polyline in a box of 100 x 28."""
        return polyline(self.values)

    @property
    def blocks(self) -> str:
        """The curve as characters of rising height."""
        return blocks(self.values)


def number(value: float | None, percent: bool = False, digits: int = 4) -> str:
    """A number as a person would write it."""
    if value is None:
        return "–"
    if percent:
        return f"{100 * value:.1f}%"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.2e}".replace("-", "−", 1) if value < 0 else f"{value:.2e}"
    if float(value).is_integer() or size >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def count(value: Any) -> str:
    """A number of parameters."""
    if not isinstance(value, int | float):
        return "?"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def key_numbers(run: Run) -> list[Shown]:
    """The key numbers that a run has logged."""
    return [shown for key in KEY_NUMBERS if (shown := _shown(run, key)) is not None]


def _shown(run: Run, key: KeyNumber) -> Shown | None:
    steps, values = run.series(key.metric)
    ends = start_and_now(values)
    if ends is None:
        return None
    start, now = ends
    change, verdict = _change(start, now, key)
    _, thin = thin_out(steps, values, 120)
    curve = [value for value in thin if value is not None]
    before, after = (number(value, key.percent, 3) for value in (start, now))
    return Shown(key.title, key.unit, before, after, change, verdict, curve)


def _change(start: float, now: float, key: KeyNumber) -> tuple[str, str]:
    before, after = (abs(start), abs(now)) if key.better == "zero" else (start, now)
    if math.isclose(before, after, abs_tol=1e-12) or abs(after - before) <= _FLAT * max(abs(before), abs(after)):
        return "steady", ""
    up = after > before
    if key.better == "zero":
        return ("leaves 0, unhealthy", "bad") if up else ("nears 0, healthy", "good")
    word = "rises" if up else "falls"
    if not key.better:
        return word, ""
    return (f"{word}, healthy", "good") if up == (key.better == "up") else (f"{word}, unhealthy", "bad")


def polyline(values: Sequence[float], width: float = 100, height: float = 28) -> str:
    """Points of an SVG polyline; a single value is a flat line."""
    if not values:
        return ""
    if len(values) == 1:
        values = [values[0], values[0]]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step, rise = width / (len(values) - 1), (height - 4) / span
    return " ".join(f"{i * step:.1f},{height - 2 - rise * (v - low):.1f}" for i, v in enumerate(values))


def blocks(values: Sequence[float], width: int = 12) -> str:
    """A curve as characters of rising height: each is the mean of a stretch."""
    if not values:
        return ""
    width = min(width, len(values))
    parts = [values[k * len(values) // width : (k + 1) * len(values) // width] for k in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[min(7, int(8 * (value - low) / span))] for value in means)


def as_text(value: Any) -> str:
    """A value of a configuration."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def short(value: Any) -> str:
    """A value that an alarm gives: of a number, four significant digits."""
    return number(value) if isinstance(value, float) else as_text(value)


@dataclass
class Raised:
    """The alarms of one name: the last one, the steps of all, and what was seen before."""

    last: dict[str, Any]
    steps: list[int]
    before: list[tuple[int, str]]


def raised(run: Run) -> list[Raised]:
    """Alarms by name, in the order in which they were first raised."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for alarm in run.alarms:
        by_name.setdefault(str(alarm.get("alarm", "alarm")), []).append(alarm)
    groups = []
    for name, alarms in by_name.items():
        values = alarms[-1].get("values")
        last = {**alarms[-1], "alarm": name, "values": values if isinstance(values, dict) else {}}
        before = [(int(alarm["step"]), str(alarm.get("seen", ""))) for alarm in alarms[:-1]]
        groups.append(Raised(last, [int(alarm["step"]) for alarm in alarms], before))
    return groups


@dataclass
class Row:
    """A line of a table that compares runs: one cell a run."""

    name: str
    cells: list[str]


def config_differences(runs: Sequence[Run]) -> list[Row]:
    """Fields of the configuration (and student, teacher, recipe) in which runs differ; "–" where a run has none."""
    rows: list[Row] = []
    for name in ("student", "teacher", "recipe"):
        rows.append(Row(name, [_name_of(run.info.get(name)) for run in runs]))
        if name == "student":
            rows.append(Row("trained", [_trained(run.info.get(name)) for run in runs]))
    configs = [run.info.get("config") or {} for run in runs]
    for name in dict.fromkeys(name for config in configs for name in config):
        rows.append(Row(name, [as_text(config[name]) if name in config else "–" for config in configs]))
    return [row for row in rows if len(set(row.cells)) > 1]


def _name_of(value: Any) -> str:
    return str(value.get("name") or "–") if isinstance(value, dict) else "–"


def _trained(student: Any) -> str:
    """What of the student is trained: an adapter's shape, or all weights."""
    if not isinstance(student, dict):
        return "–"
    return str(student["adapter"]) if student.get("adapter") else "all weights"


def final_numbers(runs: Sequence[Run]) -> list[Row]:
    """The key numbers of runs side by side: start and now, with the last step of each."""
    rows = [Row("State", [run.state.name.replace("silent", "no sign of life") for run in runs])]
    rows.append(Row("Last step", [str(run.lines[-1].step) if run.lines else "–" for run in runs]))
    for key in KEY_NUMBERS:
        shown = [_shown(run, key) for run in runs]
        if any(shown):
            title = f"{key.title} ({key.unit})" if key.unit else key.title
            rows.append(Row(title, [f"{item.start} → {item.now}" if item else "–" for item in shown]))
    rows.append(Row("Alarms", [str(len(run.alarms)) if run.info else "–" for run in runs]))
    return rows


def logged_once(runs: Sequence[Run], metrics: Sequence[str]) -> list[Row]:
    """Numbers of which no run has more than one value, such as the totals of a finished run."""
    rows = []
    for metric in metrics:
        found = [run.series(metric)[1] or run.series(f"eval_{metric}")[1] for run in runs]
        rows.append(Row(metric, [number(values[-1]) if values else "–" for values in found]))
    return rows
