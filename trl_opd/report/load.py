# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a run has left on disk, read while it is written, after it ended, or after it was killed.

The files are those of [`record.RunRecorder`]. A run without them (GRPO, or an older one) is read from the log history
of its newest checkpoint. A file that is missing, torn or unreadable costs what it held, and a note that says so.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from .state import RunState, state_of_checkpoint, state_of_run

LOOKED_FOR = ("_opd/run.json", "_opd/log.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json")


class NoRunError(ValueError):
    """A folder holds no run."""


@dataclass
class LogLine:
    """Numbers of one log line; `None` where the run logged a NaN or an infinity."""

    step: int
    logs: dict[str, float | None]
    time: float | None = None  # unix seconds


@dataclass
class Run:
    """
    A run as its folder tells it.

    Args:
        path (`Path`): The output folder.
        name (`str`): Of the folder.
        state ([`RunState`]): Running, finished, stopped, failed, ...
        lines (`list[LogLine]`): In the order in which they were logged.
        info (`dict`): `_opd/run.json`; empty for a run without it.
        alarms (`list[dict]`), findings (`list[dict]`), checks (`list[dict]`): Of the alarms and of the preflight.
        completions (`list[Path]`): Parquet files by step.
        notes (`list[str]`): What could not be read, and what stands in for it.
    """

    path: Path
    name: str
    state: RunState
    lines: list[LogLine] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    completions: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Names of all numbers that it logged, in the order of their first appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line.logs))

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a number; `None` where it was no finite number."""
        points = [(line.step, line.logs[name]) for line in self.lines if name in line.logs]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def restarts(self) -> list[int]:
        """Steps at which it was resumed."""
        starts = [start.get("step") for start in _list(self.info.get("history")) if isinstance(start, dict)]
        return sorted({int(step) for step in starts if _is_number(step) and step > 0})


def load_run(path: str | os.PathLike[str]) -> Run:
    """
    Read a run's folder.

    Args:
        path (`str` or `PathLike`): The `output_dir` of a run; its `opd` folder or one of its checkpoints will do.

    Returns:
        [`Run`]

    Raises:
        [`NoRunError`]: If there is no run in it. The message names what was looked for.
    """
    folder = Path(path)
    if folder.name == "_opd" and _has_record(folder.parent):
        folder = folder.parent
    if not folder.is_dir():
        raise NoRunError(f"{str(path)!r} is not a folder. Give the output_dir of a run.")
    if _has_record(folder):
        return _load_recorded(folder)
    history = _newest_trainer_state(folder)
    if history is None:
        raise NoRunError(_no_run(folder))
    return _load_checkpoint(folder, *history)


def load_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs; those whose folders have one name are told apart by the folders above."""
    runs = [load_run(path) for path in paths]
    names = _distinct_names([run.path.resolve() for run in runs])
    for run, name in zip(runs, names, strict=True):
        run.name = name
    return runs


def _has_record(folder: Path) -> bool:
    return any((folder / "_opd" / name).is_file() for name in ("run.json", "log.jsonl"))


def _load_recorded(folder: Path) -> Run:
    notes: list[str] = []
    opd = folder / "_opd"
    info = _object(opd / "run.json", notes)
    status = _object(opd / "status.json", notes)
    findings = _object(opd / "findings.json", notes, required=False)
    lines = [line for item in _json_lines(opd / "log.jsonl", notes) if (line := _line(item)) is not None]
    alarms = [a for a in _json_lines(opd / "alarms.jsonl", notes, required=False) if _is_number(a.get("step"))]
    return Run(
        path=folder,
        name=folder.resolve().name,
        state=state_of_run(status, lines[-1].time if lines else None, _interval(lines)),
        lines=lines,
        info=info,
        alarms=alarms,
        findings=_dicts(findings.get("findings")),
        checks=_dicts(findings.get("checks")),
        completions=_completions(folder),
        notes=notes,
    )


def _load_checkpoint(folder: Path, file: Path, trainer_state: Mapping[str, Any]) -> Run:
    lines = []
    for entry in trainer_state.get("log_history", []):
        line = _line({"step": entry.get("step"), "logs": {k: v for k, v in entry.items() if k != "step"}})
        if line is not None:
            lines.append(line)
    return Run(
        path=folder,
        name=folder.resolve().name,
        state=state_of_checkpoint(trainer_state, file.stat().st_mtime),
        lines=lines,
        completions=_completions(folder),
        notes=[
            f"No opd folder: the curves are from {file.relative_to(folder)}. Alarms, findings and the configuration "
            "are recorded by runs of OnPolicyDistillTrainer with a teacher."
        ],
    )


def _newest_trainer_state(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    newest: tuple[Path, Mapping[str, Any]] | None = None
    for file in [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]:
        state = _object(file, [], required=False)
        if not isinstance(state.get("log_history"), list):
            continue
        if newest is None or state.get("global_step", 0) > newest[1].get("global_step", 0):
            newest = file, state
    return newest


def _no_run(folder: Path) -> str:
    message = f"No run in {str(folder)!r}: none of {', '.join(LOOKED_FOR)} is there. Give the output_dir of a run"
    children = sorted(child for child in folder.iterdir() if child.is_dir())
    inside = [child for child in children[:200] if _has_record(child) or _newest_trainer_state(child)]
    if inside:
        shown = " ".join(str(child) for child in inside[:3])
        return f"{message}, for example {shown}{' ...' if len(inside) > 3 else ''}"
    return f"{message}; a run's first file is written when training begins."


def _completions(folder: Path) -> list[Path]:
    found: dict[str, Path] = {}
    for place in ("_opd/completions", "completions"):  # our own, and TRL's completions log with our columns
        found |= {file.name: file for file in folder.glob(f"{place}/completions_*.parquet")}
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


def _object(file: Path, notes: list[str], required: bool = True) -> dict[str, Any]:
    """A JSON object; empty, with a note, where it cannot be had."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            notes.append(f"{file.name} is missing.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{file.name} could not be read ({type(error).__name__}).")
        return {}
    return content if isinstance(content, dict) else {}


def _json_lines(file: Path, notes: list[str], required: bool = True) -> list[dict[str, Any]]:
    """Objects of a JSONL file. A last line without its end is one that is being written, or that a kill has torn."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if required or not isinstance(error, FileNotFoundError):
            notes.append(f"{file.name} is missing." if isinstance(error, FileNotFoundError) else str(error))
        return []
    items, unreadable = [], 0
    *whole, rest = text.split("\n")
    for number, line in enumerate([*whole, rest]):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            unreadable += number < len(whole)
            continue
        if isinstance(item, dict):
            items.append(item)
    if unreadable:
        notes.append(f"{file.name}: {unreadable} unreadable line{'s' * (unreadable > 1)} left out.")
    return items


def _line(item: Mapping[str, Any]) -> LogLine | None:
    step, logs, time = item.get("step"), item.get("logs"), item.get("time")
    if not _is_number(step) or not isinstance(logs, dict):
        return None
    numbers = {}
    for name, value in logs.items():
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            numbers[name] = value if _is_number(value) else None
    return LogLine(int(step), numbers, time if _is_number(time) else None)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _interval(lines: list[LogLine]) -> float:
    """The longest time between two of its lines, in seconds."""
    times = [line.time for line in lines if line.time is not None]
    return max((after - before for before, after in pairwise(times)), default=0.0)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in _list(value) if isinstance(item, dict)]


def _distinct_names(paths: list[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart; a run that is given twice is numbered."""
    names = ["/".join(path.parts[-1:]) for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        clashes = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path.parts[-depth:]) if name in clashes else name for path, name in zip(paths, names, strict=True)
        ]
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct
