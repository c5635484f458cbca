# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A run's numbers as plotly figures.

They carry no colours: the page gives them those of the reader's light or dark theme. `meta` of a trace tells the page
what it is: {"run": index, "series": index, "kind": "train" | "eval", "smooth": whether smoothing applies}.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from .catalogue import NOT_SMOOTHED, Chart
from .charts import BY_POSITION, plain_name
from .load import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_POINTS = 2000  # of one curve
MAX_COLUMNS = 300  # of a heat map
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

Values = Sequence[float | None]


@dataclass
class Curve:
    """A picture of one or several runs, and what has to be said below it."""

    figure: "Figure"
    series: list[str]  # what its lines are, in the order of `meta["series"]`
    has_eval: bool
    notes: list[str]


@dataclass
class HeatMap:
    """A number by token position (down) and step (across); `run` is the index of its run."""

    run: int
    figure: "Figure"
    title: str
    healthy: str
    notes: list[str]


def thin_out(steps: Sequence[int], values: Values, limit: int = MAX_POINTS) -> tuple[list[int], list[float | None]]:
    """
    At most `limit` points of a curve: of each stretch the smallest and the largest, so that no spike is lost.

    Args:
        steps (`Sequence[int]`), values (`Sequence[float | None]`): Of equal length; gaps (`None`) are dropped first.
        limit (`int`): Even, at least 4. A curve of no more points is left as it is. First and last are always kept.
    """
    if len(steps) <= limit:
        return list(steps), list(values)
    points = [i for i, value in enumerate(values) if value is not None]
    if len(points) > limit:
        stretches = (limit - 2) // 2
        inner = points[1:-1]
        kept = {points[0], points[-1]}
        for k in range(stretches):
            stretch = inner[k * len(inner) // stretches : (k + 1) * len(inner) // stretches]
            kept.add(min(stretch, key=lambda i: values[i] or 0.0))
            kept.add(max(stretch, key=lambda i: values[i] or 0.0))
        points = sorted(kept)
    return [steps[i] for i in points], [values[i] for i in points]


def shorten(value: float | None) -> float | None:
    """Six significant digits: what a picture can show, in a third of the bytes."""
    return None if value is None else float(f"{value:.6g}")


def curve(chart: Chart, runs: Sequence[Run]) -> Curve:
    """
    A chart as a figure.

    Args:
        chart ([`Chart`]): With the names of the numbers.
        runs (`Sequence[Run]`): Those that have a number are drawn.
    """
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    series = [_short_name(name, chart.metrics) for name in chart.metrics]
    thinned, notes = 0, []
    for r, run in enumerate(runs):
        for s, metric in enumerate(chart.metrics):
            for kind, name in (("train", metric), ("eval", f"eval_{metric}")):
                steps, values = run.series(name)
                if not steps:
                    continue
                whole = ": ".join([run.name] * (len(runs) > 1) + [series[s]] * (len(runs) == 1 or len(series) > 1))
                x, y = thin_out(steps, values)
                thinned = max(thinned, len(steps) if len(x) < len(steps) else 0)
                notes += _gap_note(f"{name} of {run.name}" if len(runs) > 1 else name, steps, values)
                figure.add_trace(
                    Scatter(
                        x=x,
                        y=[shorten(value) for value in y],
                        # plotly reads tags in its texts, and a reward function may be called <lambda>
                        name=escape(f"{whole} (evaluation)" if kind == "eval" else whole, quote=False),
                        mode="markers+lines" if kind == "eval" or len(x) < 40 else "lines",
                        line={"dash": _DASHES[s % len(_DASHES)] if len(runs) > 1 else "solid"},
                        meta={
                            "run": r,
                            "series": s,
                            "kind": kind,
                            "smooth": kind == "train" and metric not in NOT_SMOOTHED,
                        },
                    )
                )
    if thinned:
        notes.append(f"{thinned:,} points are drawn as {MAX_POINTS:,}: the extremes of each stretch are kept.")
    figure.update_layout(yaxis_title=chart.unit or None, xaxis_title="step")
    has_eval = any(trace.meta["kind"] == "eval" for trace in figure.data)
    return Curve(figure, series, has_eval, notes)


def _short_name(name: str, metrics: Sequence[str]) -> str:
    """A number's name without what all of the chart have in common, and as words."""
    if len(metrics) == 1:
        return name
    parts = [metric.split("/") for metric in metrics]
    first = next(i for i in range(min(map(len, parts)) + 1) if len({tuple(p[: i + 1]) for p in parts}) > 1)
    last = next(i for i in range(min(map(len, parts)) + 1) if len({tuple(p[len(p) - i - 1 :]) for p in parts}) > 1)
    own = name.split("/")
    short = "/".join(own[first : max(first + 1, len(own) - last)]).removeprefix("distill/")
    return "distillation" if short == "distill" else short.replace("_", " ")


def _gap_note(name: str, steps: Sequence[int], values: Values) -> list[str]:
    missing = [step for step, value in zip(steps, values, strict=True) if value is None]
    if not missing:
        return []
    shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    return [f"{name} was not a number at step {shown}."]


@dataclass
class _Table:
    """Cells of a heat map: a row for each bucket of positions, a column for each stretch of steps."""

    run: int
    labels: list[str]
    columns: list[list[int]]
    cells: list[list[float | None]]


def heat_maps(runs: Sequence[Run]) -> list[HeatMap]:
    """
    Gap and reverse KL by token position over the steps, of the runs that logged them.

    One number has one scale of colours in all runs, so that runs can be compared.
    """
    tables: dict[tuple[str, str], list[_Table]] = {}
    for r, run in enumerate(runs):
        buckets: dict[tuple[str, str], dict[int, tuple[str, str]]] = {}
        for name in run.metrics:
            match = BY_POSITION.fullmatch(name)
            if match is not None:
                first, last = int(match["first"]), int(match["last"])
                label = str(first) if first == last else f"{first:,}-{last:,}"
                buckets.setdefault((match["teacher"] or "", match["number"]), {})[first] = label, name
        for key, found in buckets.items():
            tables.setdefault(key, []).append(_table(run, r, [found[first] for first in sorted(found)]))
    maps = []
    for (teacher, number), of_runs in sorted(tables.items()):
        limit = _limit([value for table in of_runs for row in table.cells for value in row if value is not None])
        maps += [_heat_map(table, number, teacher, limit) for table in of_runs]
    return maps


def _table(run: Run, r: int, buckets: Sequence[tuple[str, str]]) -> _Table:
    by_step: dict[int, dict[str, float | None]] = {}
    for _, name in buckets:
        for step, value in zip(*run.series(name), strict=True):
            by_step.setdefault(step, {})[name] = value
    steps = sorted(by_step)
    columns = [steps] if not steps else _stretches(steps, MAX_COLUMNS)
    cells = [
        [shorten(_mean([by_step[step].get(name) for step in column])) for column in columns] for _, name in buckets
    ]
    return _Table(r, [label for label, _ in buckets], columns, cells)


def _heat_map(table: _Table, number: str, teacher: str, limit: float) -> HeatMap:
    from plotly.graph_objects import Figure, Heatmap

    diverging = number == "gap"
    figure = Figure(
        Heatmap(
            x=[column[len(column) // 2] for column in table.columns],
            y=table.labels,
            z=table.cells,
            zmin=-limit if diverging else 0.0,
            zmax=limit,
            zmid=0.0 if diverging else None,
            hoverongaps=False,
            meta={"diverging": diverging},
            colorbar={"title": {"text": "nats"}, "thickness": 12, "len": 1.0},
            hovertemplate="step %{x}, tokens %{y}<br>%{z:.4g} nats<extra></extra>",
        )
    )
    figure.update_layout(xaxis_title="step", yaxis={"title": "token position", "type": "category"})
    what = "Log-prob gap (teacher minus student)" if diverging else "Reverse KL"
    healthy = (
        "Where in the completion the teacher disagrees with what was sampled: blue it likes more than the student, "
        "orange less. It should fade everywhere; what stays orange at late positions is where the student has "
        "lost the thread."
        if diverging
        else "The same as a distance: it should fade, the first tokens first; a strong band that stays at late "
        "positions says that longer completions cannot be supervised yet."
    )
    lines = sum(map(len, table.columns))
    merged = len(table.columns) < lines
    notes = [f"{lines:,} lines are averaged into {len(table.columns)} columns."] if merged else []
    return HeatMap(table.run, figure, f"{what} by position{f', {teacher}' if teacher else ''}", healthy, notes)


def _stretches(steps: list[int], most: int) -> list[list[int]]:
    count = min(len(steps), most)
    return [steps[k * len(steps) // count : (k + 1) * len(steps) // count] for k in range(count)]


def _mean(values: Values) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _limit(values: Sequence[float]) -> float:
    """The 98th percentile of the magnitudes: one spike does not bleach the rest."""
    magnitudes = sorted(abs(value) for value in values)
    if not magnitudes:
        return 1.0
    return magnitudes[min(len(magnitudes) - 1, math.ceil(0.98 * len(magnitudes)) - 1)] or 1.0


def start_and_now(values: Values) -> tuple[float, float] | None:
    """Means of the first and of the last lines: a tenth of them, one to five; `None` if there is no number."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    count = min(5, max(1, len(present) // 10))
    return statistics.fmean(present[:count]), statistics.fmean(present[-count:])


def marks(runs: Sequence[Run], most: int = 200) -> list[dict[str, Any]]:
    """Alarms and restarts as marks on the x axis, by step; those of one step and run are one mark."""
    by_place: dict[tuple[int, int], list[str]] = {}
    for r, run in enumerate(runs):
        for alarm in run.alarms:
            by_place.setdefault((int(alarm["step"]), r), []).append(str(alarm.get("alarm", "alarm")))
    found: list[dict[str, Any]] = [
        {"step": step, "run": r, "kind": "alarm", "names": texts} for (step, r), texts in sorted(by_place.items())
    ]
    resumed = [
        {"step": step, "run": r, "kind": "restart", "names": ["resumed"]}
        for r, run in enumerate(runs)
        for step in run.restarts
    ]
    return found[:most] + resumed[:most]


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """Names of the numbers of all runs; an evaluation's number counts as the training's."""
    return list(dict.fromkeys(plain_name(name) for run in runs for name in run.metrics))
