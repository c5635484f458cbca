# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a run leaves on disk for `trl-opd report`, from its first second on and also when it is killed.

Files of `output_dir/_opd/`: `run.json` (what runs), `log.jsonl` (one line a log, `null` for a number that is not
finite), `alarms.jsonl`, `findings.json` (of the checks before the start) and `status.json` (how it stands; a killed
run leaves `"running"`). Lines are appended whole, the other files are replaced whole.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from . import diagnostics, run_facts
from .alarms import AlarmCallback
from .quietly import Quietly

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer

_FORMAT = 1
_SUMMARY = "train_runtime"  # is only in the line that ends a run


class RunRecorder(TrainerCallback):
    """
    Writes `output_dir/_opd/`, on the main process.

    A resumed run goes on in the files of the run before, without its lines after the checkpoint. A run that begins
    anew moves them to `_opd.1`, `_opd.2`, ... A disk that is full costs the lines that did not fit, and a folder that
    cannot be written all of them; neither ends the run.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run, when its models are built and not yet sharded.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer
        self.alarms: list[dict[str, Any]] = []
        self._quietly = Quietly("Writing the record of the run", "The report will lack what could not be written")
        self._writes = False
        self._state = "running"
        self._error: str | None = None
        self._student: dict[str, Any] | None = None
        if trainer.is_world_process_zero():
            with self._quietly:
                self._student = run_facts.student_facts(trainer)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self.trainer.args.output_dir) / run_facts.FOLDER

    # The course of a run

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around `train()`: what ends it is on record."""
        self._writes = False
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._end("interrupted")
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._writes, self._state, self._error = True, "running", None
        with self._quietly:
            history = self._take_over(state.global_step)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace("run.json", self._run_facts(history))
            checks = [finding.as_dict() for finding in self.trainer.findings]
            problems = [finding.as_dict() for finding in self.trainer.findings if finding.is_problem]
            self._replace("findings.json", {"findings": problems, "checks": checks})
            for name in ("log.jsonl", "alarms.jsonl"):
                (self.folder / name).touch()
            self._write_status()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self._writes:
            return
        with self._quietly:
            self._append("log.jsonl", {"time": time.time(), "step": state.global_step, "logs": logs or {}})
            self._write_status()

    def add_alarm(self, alarm: Mapping[str, Any]) -> None:
        """
        Keep an alarm.

        Args:
            alarm (`Mapping[str, Any]`): `step`, `alarm`, `severity`, `seen`, `why`, `do` and `values`.
        """
        line = {"time": time.time(), **alarm}
        self.alarms.append(line)
        if self._writes:
            with self._quietly:
                self._append("alarms.jsonl", line)

    def on_train_end(self, args, state, control, **kwargs):
        early = state.global_step < state.max_steps
        named = [c.stopped_by for c in self.trainer.callback_handler.callbacks if isinstance(c, AlarmCallback)]
        alarm = next((alarm for alarm in named if early and alarm is not None), None)
        self._end("stopped" if early else "finished", None if alarm is None else f"{alarm.alarm}: {alarm.seen}")

    def _end(self, state: str, error: str | None = None) -> None:
        if self._writes:
            self._state, self._error = state, error
            with self._quietly:
                self._write_status()

    # What is in the files

    def _run_facts(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        trainer = self.trainer
        with trainer._base_values():
            config, changed = run_facts.config_facts(trainer.args)
        edges: Callable[[int], Any] = getattr(diagnostics, "position_edges", lambda length: [])
        return {
            "format": _FORMAT,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": run_facts.command(),
            "pid": os.getpid(),
            "host": platform.node(),
            "config": config,
            "changed": changed,
            "recipe": run_facts.recipe_facts(trainer.args),
            "student": self._student,
            "teacher": run_facts.teacher_facts(trainer),
            "versions": run_facts.versions(),
            "device": run_facts.device_name(trainer.accelerator.device),
            "num_processes": trainer.accelerator.num_processes,
            "position_edges": list(edges(trainer.args.max_completion_length)),
            "history": history,
        }

    def _write_status(self) -> None:
        state = self.trainer.state
        self._replace(
            "status.json",
            {
                "state": self._state,
                "step": state.global_step,
                "max_steps": state.max_steps,
                "updated": time.time(),
                "pid": os.getpid(),
                "host": platform.node(),
                "error": self._error,
            },
        )

    # The files of the run before

    def _take_over(self, step: int) -> list[dict[str, Any]]:
        """
        Make room for a run that begins at `step`.

        Returns:
            `list[dict[str, Any]]`: Its earlier starts, each with the step up to which it counts.
        """
        self.alarms = []
        if not self.folder.exists():
            return []
        if step == 0:
            self._move_away()
            return []
        self._cut("log.jsonl", step)
        self.alarms = self._cut("alarms.jsonl", step)
        before = _read(self.folder / "run.json")
        last = {"started": before.get("started"), "command": before.get("command"), "step": step}
        return [*before.get("history", []), last] if before else []

    def _move_away(self) -> None:
        """Keep the record of another run, unless nothing was logged in it."""
        log = self.folder / "log.jsonl"
        if not log.exists() or log.stat().st_size == 0:
            return
        number = 1
        while (target := self.folder.with_name(f"{run_facts.FOLDER}.{number}")).exists():
            number += 1
        self.folder.rename(target)

    def _cut(self, name: str, step: int) -> list[dict[str, Any]]:
        """Keep the lines of a file up to a step, without those that a kill has torn or that ended the run."""
        path, lines = self.folder / name, []
        if path.exists():
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                line = _parse(text)
                at, ends_run = line.get("step"), _SUMMARY in (line.get("logs") or {})
                if isinstance(at, int) and at <= step and not ends_run:
                    lines.append(line)
        self._write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return lines

    # Writing

    def _replace(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(run_facts.plain(content), ensure_ascii=False, indent=1, allow_nan=False)
        self._write_whole(self.folder / name, text + "\n")

    @staticmethod
    def _write_whole(path: Path, text: str) -> None:
        """Write a file so that a reader sees the old one or the new one."""
        other = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            other.write_text(text, encoding="utf-8")
            os.replace(other, path)
        except OSError:
            other.unlink(missing_ok=True)
            raise

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line, in one piece and at once; one that a full disk has cut is taken away."""
        data = json.dumps(run_facts.plain(line), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with open(self.folder / name, "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(f"{written} of {len(data)} bytes were written")
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    return _parse(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else {}
