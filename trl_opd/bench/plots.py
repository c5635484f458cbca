# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Figures of the benchmarks. matplotlib is the extra `plots`; without it a line says so."""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .targets import by_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "ours": "#1b6ca8",
    "ours_torch": "#7fb5dc",
    "ours_triton": "#0b3c5d",
    "trl": "#e08e1b",
    "liger_triton": "#b23a48",
    "liger_chunked": "#d98c95",
    "full_logits": "#8a8a8a",
    "gemms": "#2e2e2e",
    "gemms_rounded": "#bdbdbd",
}
_PHASE_COLOURS = {
    "rollout": "#c9c9c9",
    "teacher": "#e08e1b",
    "student": "#5aa469",
    "head": "#1b6ca8",
    "backward": "#b23a48",
    "other": "#8a8a8a",
}


def new_figure(width: float, height: float) -> "Figure | None":
    """A figure with a canvas of its own: no pyplot, so no global state and no display."""
    if importlib.util.find_spec("matplotlib") is None:
        print("No figure was drawn: matplotlib is not installed (pip install 'trl-opd[plots]').")
        return None
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_head(result: Mapping[str, Any], path: str) -> bool:
    """
    Draw a result of `trl-opd bench head`: bars of time and memory for up to four problems, else dots of time over the
    bare GEMMs' for all of them. Returns whether it was drawn.
    """
    cells = by_cell(result["rows"])
    drawn = _bars(cells, result, path) if len(cells) <= 4 else _dots(cells, result, path)
    return drawn


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['machine']['device']}, {result['machine']['threads']} threads"


def _label(shape: tuple[Any, ...]) -> str:
    hidden, teacher_hidden, vocab, tokens, divergence, frozen, teacher, dtype = shape
    width = f"{hidden}" if hidden == teacher_hidden else f"{hidden}/{teacher_hidden}"
    head = "frozen" if frozen else "trained"
    return f"{divergence}, H {width}, V {vocab}, N {tokens}, {dtype}, {head} head, {teacher} teacher"


def _bars(cells: Mapping[tuple[Any, ...], Mapping[str, Any]], result: Mapping[str, Any], path: str) -> bool:
    figure = new_figure(11, 0.8 + 2.6 * max(1, len(cells)))
    if figure is None:
        return False
    panels = figure.subplots(max(1, len(cells)), 2, squeeze=False)
    for (left, right), (shape, named) in zip(panels, cells.items(), strict=False):
        rows = [row for name, row in named.items() if "median_s" in row and name != "liger"][::-1]
        names = [row["name"] for row in rows]
        colours = [_COLOURS.get(name, "#555555") for name in names]
        medians = [1000 * row["median_s"] for row in rows]
        below = [m - 1000 * row["min_s"] for m, row in zip(medians, rows, strict=True)]
        above = [1000 * row["max_s"] - m for m, row in zip(medians, rows, strict=True)]
        left.barh(names, medians, color=colours, xerr=[below, above], capsize=2)
        left.set(xlabel="ms, forward and backward (median, min to max)")
        left.set_title(_label(shape), fontsize=8, loc="left")
        held = [row for row in rows if "peak_mib" in row]
        right.barh(
            [row["name"] for row in held],
            [row["peak_mib"] for row in held],
            color=[_COLOURS.get(row["name"], "#555555") for row in held],
        )
        right.set(xlabel="peak MiB above inputs and gradients")
    figure.suptitle(f"Divergence head: {_title(result)}", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def _dots(cells: Mapping[tuple[Any, ...], Mapping[str, Any]], result: Mapping[str, Any], path: str) -> bool:
    shown = {shape: named for shape, named in cells.items() if "median_s" in named.get("gemms", {})}
    figure = new_figure(10, 1.6 + 0.17 * len(shown))
    if figure is None:
        return False
    axes = figure.subplots()
    order = sorted(shown, key=lambda shape: tuple(map(str, (shape[6], shape[5], shape[4]))) + shape[:4])[::-1]
    for name, colour in _COLOURS.items():
        points = [
            (shown[shape][name]["median_s"] / shown[shape]["gemms"]["median_s"], i)
            for i, shape in enumerate(order)
            if "median_s" in shown[shape].get(name, {})
        ]
        if points and name != "gemms":
            axes.scatter([x for x, _ in points], [y for _, y in points], color=colour, label=name, s=14)
    axes.axvline(1.0, color=_COLOURS["gemms"], linewidth=1, label="bare GEMMs")
    axes.set_yticks(range(len(order)), [_label(shape) for shape in order], fontsize=6)
    axes.set(xscale="log", xlabel="time, forward and backward, over the bare GEMMs'", ylim=(-1, len(order)))
    axes.grid(alpha=0.3, which="both", axis="x")
    axes.legend(fontsize=7)
    figure.suptitle(f"Divergence head: {_title(result)}", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def plot_step(result: Mapping[str, Any], path: str) -> bool:
    """Draw a result of `trl-opd bench step`: where a step's seconds go. Returns whether it was drawn."""
    rows = [row for row in result["rows"] if "phases" in row]
    figure = new_figure(10, 1.4 + 0.55 * len(rows))
    if figure is None:
        return False
    axes = figure.subplots()
    labels = [f"{row['name']}, {row['precision']}" for row in rows][::-1]
    start = [0.0] * len(rows)
    for phase, colour in _PHASE_COLOURS.items():
        width = [row["phases"].get(phase, 0.0) for row in rows][::-1]
        axes.barh(labels, width, left=start, color=colour, label=phase)
        start = [a + b for a, b in zip(start, width, strict=True)]
    axes.set(xlabel="seconds of an optimizer step (median of each phase)")
    axes.legend(fontsize=8, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f"Training step: {_title(result)}", fontsize=10)
    figure.savefig(path, dpi=120)
    return True
