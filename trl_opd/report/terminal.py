# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A run in the terminal: its state, key numbers, alarms, findings, and the completions that strayed farthest."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .load import Run
from .numbers import Raised, key_numbers, raised
from .tokens import Completion, load_completions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"good": "green", "bad": "bold red", "warn": "yellow", "busy": "cyan", "plain": ""}
_SEVERITIES = {"error": "bold red", "warning": "yellow", "info": "cyan", "ok": "green"}
_MOST_TOKENS = 300
_MOST_COMPLETIONS = 3


def print_summary(run: Run, console: "Console | None" = None) -> None:
    """
    Print a summary of a run that reads well in 80 columns.

    Args:
        run ([`Run`]): See [`load_run`].
        console (`rich.console.Console`, *optional*): Where to. Defaults to the terminal, at most 100 columns of it.
    """
    if console is None:
        from rich.console import Console

        console = Console(highlight=False)
        console.width = min(console.width, 100)
    _print_head(run, console)
    numbers = _numbers(run)
    console.print(numbers if numbers.rows else "No line is logged yet.")
    for note in run.notes:
        console.print(_text(note, "dim"))
    _print_items(console, "Alarms", [_with_steps(group) for group in raised(run)])
    _print_items(console, "Preflight", run.findings)
    _print_tokens(run, console)


def _text(text: Any, style: str = "") -> Any:
    """Text of a run: what looks like rich's markup in it is text, and control characters do nothing."""
    from rich.text import Text

    printable = "".join(c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "�" for c in str(text))
    return Text(printable, style=style)


def _print_head(run: Run, console: "Console") -> None:
    from rich.rule import Rule

    console.print(Rule(_text(run.name, "bold"), align="left"))
    step = run.state.step if run.state.step is not None else 0
    of = f", step {step:,} of {run.state.max_steps:,}" if run.state.max_steps and run.state.max_steps > 0 else ""
    console.print(_text(f"{run.state.text}{of}", _STYLES[run.state.tone]))
    if run.state.error:
        console.print(_text(run.state.error[-1500:], "red"))
    names = [(role, run.info.get(role)) for role in ("student", "teacher", "recipe")]
    known = [f"{role} {value['name']}" for role, value in names if isinstance(value, Mapping) and value.get("name")]
    if known:
        console.print(_text(" · ".join(known)))
    console.print()


def _numbers(run: Run) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("start", "now"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("course", no_wrap=True)
    table.add_column("", overflow="fold")
    for item in key_numbers(run):
        style = {"good": "green", "bad": "bold red"}.get(item.verdict, "")
        title = f"{item.title}, {item.unit}" if item.unit else item.title
        table.add_row(title, item.start, item.now, item.blocks, _text(item.change, style))
    return table


def _with_steps(group: Raised) -> dict[str, Any]:
    steps = f"step {group.steps[-1]}"
    return {**group.last, "when": f"{len(group.steps)} times, last at {steps}" if group.before else steps}


def _print_items(console: "Console", title: str, items: Sequence[Mapping[str, Any]]) -> None:
    from rich.padding import Padding

    if not items:
        return
    console.print()
    console.print(_text(title, "bold"))
    for item in items:
        severity = str(item.get("severity", "info"))
        when = f", {item['when']}" if "when" in item else ""
        head = _text(f"{item.get('alarm') or item.get('check')} ({severity}{when})", _SEVERITIES.get(severity, ""))
        console.print(head)
        for name, style in (("seen", ""), ("why", "dim"), ("do", "")):
            if item.get(name):
                lead = "Try: " if name == "do" else ""
                console.print(Padding(_text(f"{lead}{item[name]}", style), (0, 0, 0, 2)))


def _print_tokens(run: Run, console: "Console") -> None:
    completions, _ = load_completions(run)
    seen = [completion for completion in completions if completion.tokens]
    if not seen:
        return
    from ..token_text import legend

    marks = console.color_system is None or console.no_color
    last = max(completion.step for completion in seen)
    worst = [completion for completion in seen if completion.step == last][:_MOST_COMPLETIONS]
    console.print()
    console.print(_text(f"Tokens of step {last}, where the student strays farthest", "bold"))
    console.print(legend(marks=marks))
    for completion in worst:
        _print_completion(completion, console, marks)


def _print_completion(completion: Completion, console: "Console", marks: bool) -> None:
    from ..token_text import render_tokens

    prompt = " ".join(completion.prompt.split())
    mean = f"mean gap {completion.mean_gap:+.3f} nats" if completion.mean_gap is not None else "no gaps"
    scores = "".join(f", {name} {value:.3g}" for name, value in completion.scores.items())
    console.print()
    console.print(_text(f"… {prompt[-90:]}" if len(prompt) > 92 else prompt, "italic"))
    console.print(_text(f"{mean}{scores}", "dim"))
    gaps = completion.numbers.get("gap") or [None] * len(completion.tokens)
    tokens = completion.tokens[:_MOST_TOKENS]
    console.print(render_tokens(tokens, gaps[:_MOST_TOKENS], completion.mask[:_MOST_TOKENS], marks=marks))
    left = len(completion.tokens) + completion.left_out - len(tokens)
    if left:
        console.print(_text(f"... and {left:,} more tokens", "dim"))
