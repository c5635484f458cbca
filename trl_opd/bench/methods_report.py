# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The methods' test-bed as a table, a page of Markdown and a figure."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .measure import show_table
from .methods_measure import METRICS
from .methods_plan import ENDS, MOST_ENTRIES, UNIT_OF_COST, Plan
from .methods_task import HINTED_SHARE, RAW_SHARE
from .methods_train import COUNTED
from .plots import new_figure

HEAD = ("method", *(head for _, head, _, _ in METRICS), "gain", "own %", "passes", "cost")
_STARTS = {"plain": "start", "hinted": "start_with_hints"}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and its standard error (`None` of one seed)."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def make_rows(plans: Sequence[Plan], results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    One row a method, over its seeds.

    Args:
        plans (`Sequence[Plan]`): The methods, in the order of the table.
        results (`Iterable[Mapping]`): What [`methods_train.run`] returned, in any order.

    Returns:
        `list[dict]`: `name`, `start`, `learning_rate`, `seeds`, `values` (of each seed), `mean`, `error`, `changes`,
        `failed` (messages by seed).
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {plan.name: [] for plan in plans}
    for result in results:
        by_name[result["name"]].append(result)
    unit = {r["seed"]: r["cpu_seconds"] for r in by_name.get(UNIT_OF_COST, ()) if r["status"] == "done"}
    starts = {
        kind: {r["seed"]: r["metrics"]["accuracy"] for r in by_name.get(name, ()) if r["status"] == "done"}
        for kind, name in _STARTS.items()
    }
    rows = []
    for plan in plans:
        done = sorted((r for r in by_name[plan.name] if r["status"] == "done"), key=lambda r: r["seed"])
        values = [{**r["metrics"], **_gain(r, starts[plan.start]), **_used(r, unit)} for r in done]
        keys = [key for key in (values[0] if values else ()) if all(key in v for v in values)]
        summary = {key: mean_and_error([v[key] for v in values]) for key in keys}
        rows.append(
            {
                "name": plan.name,
                "start": plan.start,
                "learning_rate": plan.learning_rate or None,
                "changes": list(plan.changes),
                "seeds": [r["seed"] for r in done],
                "values": values,
                "mean": {key: mean for key, (mean, _) in summary.items()},
                "error": {key: error for key, (_, error) in summary.items()},
                "failed": {str(r["seed"]): r["message"] for r in by_name[plan.name] if r["status"] == "failed"},
            }
        )
    return rows


def _gain(result: Mapping[str, Any], starts: Mapping[int, float]) -> dict[str, float]:
    """Accuracy above that of the same seed's start: what a method did, without how good its start was."""
    if "tokens" not in result or result["seed"] not in starts:
        return {}
    return {"gain": result["metrics"]["accuracy"] - starts[result["seed"]]}


def _used(result: Mapping[str, Any], unit: Mapping[int, float]) -> dict[str, float]:
    """The columns of what a run took."""
    if "tokens" not in result:
        return {}
    total = sum(result["tokens"].values())
    used = {
        "own": result["tokens"].get("student", 0) / total,
        "passes": result["passes"],
        "tokens": total,
        "steps": result["steps"],
        "cpu_seconds": result["cpu_seconds"],
    }
    if unit.get(result["seed"]):
        used["cost"] = result["cpu_seconds"] / unit[result["seed"]]
    return used


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text, under `HEAD`; of a method without a result its name and what happened."""
    if not row["mean"]:
        message = next(iter(row["failed"].values()), "not run yet")
        return [row["name"], f"failed: {message}" if row["failed"] else message]
    columns = [(key, factor, digits) for key, _, factor, digits in METRICS]
    columns += [("gain", 100.0, 1), ("own", 100.0, 0), ("passes", 1.0, 2), ("cost", 1.0, 2)]
    return [row["name"] + ("*" if row["failed"] else ""), *(_cell(row, *column) for column in columns)]


def _cell(row: Mapping[str, Any], key: str, factor: float, digits: int) -> str:
    if key not in row["mean"]:
        return ""
    mean, error = row["mean"][key], row["error"][key]
    if error is None or key in ("own", "passes"):
        return f"{factor * mean:.{digits}f}"
    return f"{factor * mean:.{digits}f} ± {factor * error:.{digits}f}"


def split(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows of each start, the ends first, then as they came."""
    groups = []
    for start in ("plain", "hinted"):
        mine = [row for row in rows if row["start"] == start]
        mine.sort(key=lambda row: row["name"] not in ENDS)
        if mine:
            groups.append((start, mine))
    return groups


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal, one part a start."""
    parts = []
    for start, mine in split(rows):
        title = "" if start == "plain" else "\nFrom the start that reads hints (compare these among themselves):\n"
        parts.append(title + show_table(HEAD, [cells(row) for row in mine]))
    return "\n".join(parts)


def footnotes(result: Mapping[str, Any]) -> list[str]:
    """What one must know to read the table."""
    settings, rates = result["settings"], result["settings"]["learning_rates"]
    digits = settings["num_digits"]
    return [
        "Not a ranking of papers: all methods at one learning rate and one budget, untuned, with tiny models on one "
        f"task (reversed {digits}-digit addition, {settings['num_held_out']} held-out problems). Learning rate "
        f"{rates['opd']:g}; {rates['grpo']:g} where rewards are trained on. It falls linearly to 0 in tokens.",
        f"{settings['budget']:,} tokens a run, seeds {', '.join(map(str, result['seeds']))}; ± is the standard "
        f"error over them. {COUNTED}",
        "accuracy: sampled at temperature 1; greedy: the likeliest token. reverse KL, KL(s‖t), and forward KL, "
        "KL(t‖s): exact, nats per token, on the student's own samples; forward KL (t): on the teacher's samples. "
        "distinct: different completions among 8 samples of a problem. entropy: nats per token. length: tokens of a "
        "completion.",
        "gain: points of accuracy above the start of the same seed, so that its error is not that of the starts. "
        "own: the share of tokens that the student of that moment wrote. passes: sequences through teachers and "
        "references, to be scored or to be written, for each completion. cost: CPU seconds of the training without "
        f"the measurements, over those of {UNIT_OF_COST} with the same seed; the sampling of the data set is made "
        "once and charged to those who use it.",
        "Column completion: samples of the teacher. reference_model: the student's start (extrapolate), else the "
        f"teacher after {RAW_SHARE:.0%} of its training; of two, that one and the student's start. Two teachers: a "
        "second one of another seed; each has the problems of one kind (the first digit even or odd), or both have "
        "all. The KLs are to the first one.",
        f"Rows from the start that reads hints: its warm-up had {HINTED_SHARE:.0%} problems with the answer in front "
        "of them. teacher_prompt is the problem with its answer, the teacher the student itself as the method says "
        "(or its start), and the KLs are to the start with the hint. start_with_hints reads none there, "
        "teacher_with_hints does.",
        f"The vocabulary has 14 entries: top-k supports have at most {MOST_ENTRIES}. Lengths are scaled to the "
        "task's.",
    ]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What concerns single methods: what was changed, what failed, what was not run."""
    lines = [f"{row['name']}: here with {', '.join(row['changes'])}." for row in result["rows"] if row["changes"]]
    for row in result["rows"]:
        lines += [f"{row['name']}, seed {seed}: failed, {message}" for seed, message in row["failed"].items()]
    lines += [f"{name}: here the same as {other}." for name, other in result["same"].items()]
    return lines + [f"{name}: not run, {reason}" for name, reason in result["refused"].items()]


def markdown(result: Mapping[str, Any], figure: str | None) -> str:
    """The page: figure, table, how to read it, and what concerns single methods."""
    lines = [f"# Methods, {result['settings']['budget']:,} tokens each", "", f"`{result['command']}`", ""]
    lines += [f"{result['machine']['device']}.", ""]
    lines += [f"![accuracy and reverse KL of each method]({figure})", ""] if figure else []
    for start, mine in split(result["rows"]):
        if start == "hinted":
            lines += ["## From the start that reads hints", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
        for row in mine:
            shown = cells(row)
            padded = shown + [""] * (len(HEAD) - len(shown))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in padded) + " |")
        lines.append("")
    lines += ["## How to read it", "", *(f"- {note}" for note in footnotes(result)), ""]
    lines += ["## Single methods", "", *(f"- {note}" for note in notes(result)), ""]
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: str) -> bool:
    """Draw accuracy and reverse KL of each method with their standard errors. Returns whether it was drawn."""
    rows = [row for _, mine in split(result["rows"]) for row in mine if row["mean"] and row["name"] != "teacher"]
    rows = rows[::-1]
    figure = new_figure(11, 1.4 + 0.19 * len(rows))
    if figure is None:
        return False
    panels = figure.subplots(1, 2, sharey=True)
    colours = ["#e08e1b" if r["name"] in ENDS else "#5aa469" if r["start"] == "hinted" else "#1b6ca8" for r in rows]
    for axes, key, factor in zip(panels, ("accuracy", "reverse_kl"), (100.0, 1.0), strict=True):
        for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
            error = factor * (row["error"][key] or 0.0)
            axes.errorbar(factor * row["mean"][key], y, xerr=error, fmt="o", color=colour, markersize=4, capsize=2)
        unit = next((row["mean"][key] for row in rows if row["name"] == UNIT_OF_COST), None)
        if unit is not None:
            axes.axvline(factor * unit, color="#8a8a8a", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    panels[0].set(xlabel="held-out accuracy at temperature 1 (%)", ylim=(-1, len(rows)))
    panels[1].set(xlabel="reverse KL to the teacher (nats per token)", xscale="log")
    seeds = ", ".join(map(str, result["seeds"]))
    figure.suptitle(
        f"{result['settings']['budget']:,} tokens each, seeds {seeds}, untuned; orange: not trained; "
        f"green: from the start that reads hints, to itself with hints; dashed: {UNIT_OF_COST}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    return True
