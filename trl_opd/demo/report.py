# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The demo's results as a table, a plot, `results.json` and `report.md`."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

COLUMNS = ("method", "accuracy", "greedy", "reverse KL", "tokens", "steps", "seconds")


def _row(name: str, sampled: float, greedy: float, gap: float, tokens: str, steps: str, seconds: str) -> list[str]:
    shown_gap = "—" if math.isnan(gap) else f"{gap:.4f}"
    return [name, f"{sampled:.1%}", f"{greedy:.1%}", shown_gap, tokens, steps, seconds]


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """
    Rows of the results table as text.

    Args:
        results (`dict[str, Any]`):
            What [`run_demo`] returns.

    Returns:
        `list[list[str]]`: The teacher, the start, then one row a method; cells in the order of `COLUMNS`.
    """
    rows = []
    for name in ("teacher", "start"):
        model = results[name]
        gap = float("nan") if name == "teacher" else model["reverse_kl"]
        rows.append(_row(name, model["accuracy"], model["greedy_accuracy"], gap, "—", "—", f"{model['seconds']:.0f}"))
    for method in results["methods"]:
        last = method["points"][-1]
        counts = f"{method['tokens']:,}", str(last["step"]), f"{method['seconds']:.0f}"
        rows.append(_row(method["name"], last["accuracy"], method["greedy_accuracy"], last["reverse_kl"], *counts))
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """The rows under `COLUMNS` as an aligned Markdown table, which reads as well on a terminal."""
    widths = [max(len(row[i]) for row in [list(COLUMNS), *rows]) for i in range(len(COLUMNS))]

    def line(cells: list[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *numbers]) + " |"

    ruler = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(list(COLUMNS)), ruler, *map(line, rows)])


def print_table(results: dict[str, Any]) -> None:
    """Print the results table, with rich where it is installed."""
    rows = table_rows(results)
    if importlib.util.find_spec("rich") is None:
        print(markdown_table(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['task']}, seed {results['seed']}: accuracy at temperature 1 and greedy")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_plot(results: dict[str, Any], path: Path) -> bool:
    """
    Draw accuracy and reverse KL against sampled tokens.

    Args:
        results (`dict[str, Any]`):
            What [`run_demo`] returns.
        path (`Path`):
            PNG file to write.

    Returns:
        `bool`: Whether it was written; `False` where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    # The figure's own canvas: no pyplot, so no global state and no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in results["methods"]:
        tokens = [point["tokens"] for point in method["points"]]
        left.plot(tokens, [100 * point["accuracy"] for point in method["points"]], marker="o", label=method["name"])
        right.plot(tokens, [point["reverse_kl"] for point in method["points"]], marker="o", label=method["name"])
    left.axhline(100 * results["teacher"]["accuracy"], color="grey", linestyle="--", label="teacher")
    left.set(xlabel="sampled tokens", ylabel="held-out accuracy, temperature 1 (%)", ylim=(0, 102))
    right.set(xlabel="sampled tokens", ylabel="reverse KL to the teacher (nats/token)", yscale="log")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def _summary(results: dict[str, Any]) -> str:
    methods = sorted(results["methods"], key=lambda method: -method["points"][-1]["accuracy"])
    ranking = ", ".join(f"{method['name']} {method['points'][-1]['accuracy']:.1%}" for method in methods)
    error = math.sqrt(0.25 / results["num_held_out"])
    return (
        f"Accuracy at temperature 1: {ranking}. On {results['num_held_out']} problems the standard error of an "
        f"accuracy is at most {100 * error:.1f} points (the problems and the random numbers are the same for all), "
        "and this is one seed: do not read a difference of a few points as an order."
    )


def report_text(results: dict[str, Any], plot: str | None) -> str:
    """
    Compose `report.md`.

    Args:
        results (`dict[str, Any]`):
            What [`run_demo`] returns.
        plot (`str` or `None`):
            File name of the plot; `None` says how to get one.

    Returns:
        `str`: The report in Markdown.
    """
    sizes = f"teacher {results['teacher']['parameters']:,} parameters, student {results['start']['parameters']:,}"
    picture = (
        f"![accuracy and reverse KL against sampled tokens]({plot})"
        if plot
        else "No plot: matplotlib is not installed. `pip install 'trl-opd[plots]'` and run again."
    )
    settings = json.dumps(results["settings"])
    return f"""# On-policy distillation from scratch

{results["task"]}; {sizes}; seed {results["seed"]}; {results["seconds"]:.0f} s in all.

{markdown_table(table_rows(results))}

{_summary(results)}

{picture}

## How to read it

- All methods continue from the same weights and stop after the step that spends {results["settings"]["budget"]:,}
  sampled completion tokens, the end-of-sequence tokens included. For OPD and GRPO the student samples them; for SFT
  the teacher does, and each sample is used once, so every method takes about the same number of optimizer steps. SFT
  could go over its samples again without sampling more; that is not done here.
- OPD sees no reward and no right answer, GRPO no teacher, SFT no sample of the student's own.
- Accuracy is the share of {results["num_held_out"]} held-out problems, never trained on, that are answered exactly:
  *accuracy* by sampling at temperature 1 (the curves too), *greedy* by the most probable token.
- Reverse KL is KL(student‖teacher) in nats per token, exact over the vocabulary and averaged over the tokens of those
  samples.
- Seconds are of training and sampling, without the measurements; for SFT they include the teacher's sampling. They are
  of tiny models on a CPU and say little about large ones.
- The learning rates were chosen by a small sweep for each method, on seeds 0 and 3. Nothing is scripted: another seed
  gives another teacher, another student and other problems.

Settings: `{settings}`
"""


def write_report(results: dict[str, Any], output_dir: Path) -> None:
    """Write `results.json`, `report.md` and, with matplotlib, `curves.png`."""
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    has_plot = write_plot(results, output_dir / "curves.png")
    if not has_plot:
        print("No plot was drawn: matplotlib is not installed (pip install 'trl-opd[plots]').")
    text = report_text(results, "curves.png" if has_plot else None)
    (output_dir / "report.md").write_text(text, encoding="utf-8")
