# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether a run is running, has ended, and how, from what it wrote and from its process."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

_PATIENCE = 600.0  # seconds without a line after which a process that cannot be asked counts as gone
_TONES = {"running": "busy", "finished": "good", "stopped": "warn", "interrupted": "warn", "failed": "bad"}


@dataclass
class RunState:
    """
    State of a run.

    Args:
        name (`str`):
            `"running"`, `"finished"`, `"stopped"` (by an alarm or a callback), `"interrupted"` (by a person),
            `"failed"`, `"silent"` (it says that it runs, and does not) or `"unknown"`.
        text (`str`): For people.
        step (`int`, *optional*), max_steps (`int`, *optional*): Where it stands.
        error (`str`, *optional*): What it failed with.
    """

    name: str
    text: str
    step: int | None = None
    max_steps: int | None = None
    error: str | None = None

    @property
    def tone(self) -> str:
        """`"good"`, `"busy"`, `"warn"`, `"bad"` or `"plain"`: how it is coloured."""
        return _TONES.get(self.name, "bad" if self.name == "silent" else "plain")

    @property
    def progress(self) -> float | None:
        """Share of its steps that are done."""
        if self.step is None or not self.max_steps or self.max_steps < 0:
            return None
        return min(1.0, self.step / self.max_steps)


def state_of_run(status: Mapping[str, Any], last_line: float | None, interval: float) -> RunState:
    """
    State of a recorded run.

    Args:
        status (`Mapping`): `_opd/status.json`.
        last_line (`float`, *optional*): When its last line was logged, in unix seconds.
        interval (`float`): The longest time between two of its lines, in seconds.
    """
    name = status.get("state")
    step, max_steps = (_int(status.get(key)) for key in ("step", "max_steps"))
    updated = max([t for t in (status.get("updated"), last_line) if isinstance(t, int | float)], default=None)
    error = status.get("error")
    if name == "running":
        name, text = _running(status, updated, interval)
        return RunState(name, text, step, max_steps)
    at = f" at step {step}" if step is not None else ""
    when = f", {moment(updated)}" if updated is not None else ""
    if name in ("failed", "finished", "stopped", "interrupted"):
        return RunState(str(name), f"{name}{at}{when}", step, max_steps, str(error) if error else None)
    return RunState("unknown", f"in an unknown state{at}{when}: it wrote no status", step, max_steps)


def _running(status: Mapping[str, Any], updated: float | None, interval: float) -> tuple[str, str]:
    """What a run that says that it runs is doing: a name and a text."""
    silent_for = max(0.0, time.time() - updated) if updated is not None else 0.0
    is_late = silent_for > max(_PATIENCE, 5 * interval)
    ago = duration(silent_for)
    since = f" since {moment(updated)} ({ago} ago)" if updated is not None else ""
    alive = _is_alive(status, updated)
    if alive is False:
        return "silent", f"no sign of life{since}: its process is gone, it was probably killed"
    if alive is None and is_late:
        host = status.get("host") or "another machine"
        return "silent", f"no sign of life{since}; whether it still runs on {host} is not known"
    if is_late:
        return "running", f"running, but without a new line for {ago}"
    return "running", f"running, last line {ago} ago"


def _is_alive(status: Mapping[str, Any], updated: float | None) -> bool | None:
    """Whether its process runs; `None` if that cannot be told here, because it ran on another machine."""
    pid = _int(status.get("pid"))
    if pid is None or status.get("host") != platform.node():
        return None
    import psutil  # type: ignore[import-untyped]

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # A process that began after the run's last word has only its number in common with it.
        return updated is None or process.create_time() <= updated + 1.0
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return None


def state_of_checkpoint(trainer_state: Mapping[str, Any], changed: float) -> RunState:
    """State of a run of which only a checkpoint is left, written at `changed` (unix seconds)."""
    step, max_steps = (_int(trainer_state.get(key)) for key in ("global_step", "max_steps"))
    done = step is not None and bool(max_steps) and step >= (max_steps or 0)
    text = f"at step {step} of {max_steps} in its last checkpoint, {moment(changed)}"
    return RunState("finished" if done else "unknown", f"finished, {text}" if done else text, step, max_steps)


def duration(seconds: float) -> str:
    """A time span in its largest two units."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def moment(unix: float) -> str:
    """A point in time, of this machine's clock."""
    try:
        return datetime.fromtimestamp(unix).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    except (OverflowError, OSError, ValueError):
        return "at an unreadable time"


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and value == value and abs(value) < 2**62 else None
