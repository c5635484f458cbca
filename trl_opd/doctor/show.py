# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the doctor prints: a line a check, then every problem with its reason and its remedy."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import IO, Any

from ..findings import SEVERITIES, Finding

# In the order in which a run meets them
ORDER = (
    "start",
    "reachable",
    "eos",
    "pad",
    "bos",
    "special_tokens",
    "vocabulary",
    "retokenization",
    "chat_template",
    "think_boundary",
    "dataset",
    "prompt_length",
    "generation_config",
    "temperature",
    "learning_rate",
    "loss_type",
    "memory",
    "determinism",
    "batch_invariance",
    "self_kl",
    "teacher_perplexity",
    "student_distance",
    "gap_by_position",
    "truncation",
)
_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "bold red"}
_MARKS = {"ok": "✓", "info": "·", "warning": "!", "error": "✗"}
_ASCII = {"ok": "+", "info": ".", "warning": "!", "error": "x"}
_EXCERPT = 220  # characters of a prompt on each side of the first difference
_WIDTH = 80
_LINE_END = "\n"


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """By check, as a run meets them."""
    place = {name: n for n, name in enumerate(ORDER)}
    return sorted(findings, key=lambda f: place.get(f.check, len(place)))


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many findings have each severity."""
    return {severity: sum(f.severity == severity for f in findings) for severity in SEVERITIES}


def as_json(findings: Sequence[Finding], facts: Mapping[str, Any]) -> str:
    """
    Everything, for a program.

    Args:
        findings (`Sequence[Finding]`): What was found.
        facts (`Mapping[str, Any]`): What else there is to say: names, prompts side by side, exit code.
    """
    ordered = in_order(findings)
    document = {
        "findings": [f.as_dict() for f in ordered if f.is_problem],
        "checks": [f.as_dict() for f in ordered],
        "counts": counts(ordered),
        **facts,
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def show(findings: Sequence[Finding], facts: Mapping[str, Any], file: IO[str], *, width: int | None = None) -> None:
    """
    Print a report for a person: 80 columns where it is not a terminal, colours only where it is one.

    Args:
        findings (`Sequence[Finding]`): What was found.
        facts (`Mapping[str, Any]`): As in [`as_json`].
        file (`IO[str]`): Where to.
        width (`int`, *optional*): In characters. Defaults to the terminal's, between 60 and 119.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False, width=width or _WIDTH)
    if console.is_terminal and width is None:
        console = Console(file=file, highlight=False, width=min(max(Console(file=file).width, 60), 119))
    marks = _ASCII if console.options.ascii_only else _MARKS
    ordered = in_order(findings)
    _show_title(console, facts)
    for finding in ordered:
        _show_line(console, finding, marks)
    for finding in [f for f in ordered if f.is_problem]:
        _show_problem(console, finding, marks)
    _show_prompts(console, facts.get("prompts") or [])
    _show_notes(console, [f for f in ordered if f.severity == "info" and (f.why or f.do)], marks)
    console.print()
    for line in textwrap.wrap(closing(ordered, facts), console.width):
        console.print(line, style="bold")


def closing(findings: Sequence[Finding], facts: Mapping[str, Any]) -> str:
    """The last sentence."""
    number = counts(findings)
    looked = f"{len(findings)} checks" + ("" if facts.get("weights", True) else ", none with weights")
    errors, warnings = number["error"], number["warning"]
    if not errors and not warnings:
        return f"Nothing is wrong with this run, as far as was looked ({looked})."
    parts = [f"{n} {name}{'s' * (n > 1)}" for n, name in ((errors, "error"), (warnings, "warning")) if n]
    what = "mend the errors before you train" if errors else "it can start; read the warnings first"
    return f"{' and '.join(parts)} ({looked}): {what}."


def _show_title(console: Any, facts: Mapping[str, Any]) -> None:
    from rich.text import Text

    console.print("trl-opd doctor", style="bold")
    for name in ("student", "teacher", "dataset"):
        if facts.get(name):
            line = Text(f"{name:<8} {facts[name]}")
            line.truncate(console.width, overflow="ellipsis")
            console.print(line)
    console.print()


def _line(finding: Finding, marks: Mapping[str, str]) -> Any:
    from rich.text import Text

    style = _STYLES[finding.severity]
    return Text.assemble(
        (f"{marks[finding.severity]} {finding.severity:<7} ", style), (f"{finding.check:<18} ", "bold")
    )


def _show_line(console: Any, finding: Finding, marks: Mapping[str, str]) -> None:
    line = _line(finding, marks).append(" ".join(finding.seen.split()))
    line.truncate(console.width, overflow="ellipsis")
    console.print(line, no_wrap=True)


def _show_problem(console: Any, finding: Finding, marks: Mapping[str, str]) -> None:
    from rich.text import Text

    console.print()
    console.print(
        Text(f"{marks[finding.severity]} {finding.severity}: {finding.check}", style=_STYLES[finding.severity])
    )
    for name, text in (("seen", finding.seen), ("why", finding.why), ("do", finding.do)):
        if text:
            _show_part(console, name, text)


def _show_part(console: Any, name: str, text: str) -> None:
    from rich.text import Text

    lines = textwrap.wrap(text, console.width - 8, break_on_hyphens=False) or [""]
    for n, line in enumerate(lines):
        console.print(Text.assemble((f"{name if n == 0 else '':>6} ", "bold"), line))


def _show_notes(console: Any, notes: Sequence[Finding], marks: Mapping[str, str]) -> None:
    if not notes:
        return
    console.print()
    console.print("Worth knowing", style="bold")
    for finding in notes:
        _show_part(console, marks["info"], f"{finding}")


def _show_prompts(console: Any, prompts: Sequence[Mapping[str, Any]]) -> None:
    """The first prompt that student and teacher read otherwise, side by side; else the first, once."""
    from rich.table import Table
    from rich.text import Text

    if not prompts:
        return
    differing = next((p for p in prompts if p["differs_at"] is not None), None)
    chosen = differing or prompts[0]
    console.print()
    if differing is None:
        teachers = "all" if len({p["teacher"] for p in prompts}) > 1 else "both"
        console.print(f"Prompt {chosen['prompt']}, as {teachers} read it", style="bold")
        console.print(Text(_visible(chosen["student_text"][-2 * _EXCERPT :])))
        return
    console.print(f"Prompt {chosen['prompt']}, side by side (» marks the first token that differs)", style="bold")
    table = Table(width=console.width, show_lines=False)
    half = (console.width - 7) // 2
    table.add_column("the student", width=half, overflow="fold")
    table.add_column(chosen["teacher"], width=half, overflow="fold")
    texts = chosen["student_text"], chosen["teacher_text"]
    start = _common(*texts)
    table.add_row(*(Text(_excerpt(text, start)) for text in texts))
    console.print(table)


def _common(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _excerpt(text: str, start: int) -> str:
    """The text around a position, which is marked; spaces behind it can be seen."""
    first = max(start - _EXCERPT, 0)
    before, after = text[first:start], text[start : start + _EXCERPT]
    shown = _visible(after).replace(" ", "␣") if not after.strip() else _visible(after)
    end = "…" if len(text) > start + _EXCERPT else ""
    return f"{'…' * (first > 0)}{_visible(before)}{_LINE_END * before.endswith(_LINE_END)}»{shown or '(its end)'}{end}"


def _visible(text: str) -> str:
    """Line ends that can be seen."""
    return text.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "→\t").rstrip("\n")
