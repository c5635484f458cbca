# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Seconds and peak memory of alternatives that take turns in one process, and how results are kept and shown."""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak extra memory of a block in MiB: allocator statistics on CUDA, resident set size sampled on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.mib = 0.0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        self._start = self._peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, _resident())
            time.sleep(0.002)

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.mib = (torch.cuda.max_memory_allocated(self.device) - self._start) / 2**20
            return
        self._stop.set()
        self._thread.join()
        self.mib = (max(self._peak, _resident()) - self._start) / 2**20


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Main memory that a process can still take; `None` where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)


def release(device: torch.device) -> None:
    """Give back what nothing refers to, after a failure above all."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queue drained before and after."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit: out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' if len(text) > 160 else ''}"


def take_turns(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warm_up: bool = True
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """
    Seconds of each function: one warm-up each, then `repeats` rounds in which they take turns.

    Returns:
        `tuple[dict, dict]`: the seconds of those that ran, and what happened to the others, in words.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    problems: dict[str, str] = {}
    for i in range(-1 if warm_up else 0, repeats):
        for name, function in functions.items():
            if name in problems:
                continue
            try:
                elapsed = seconds(function, device)
            except Exception as error:  # of whatever kind: the others are still to be measured
                problems[name] = in_words(error)
            else:
                if i >= 0:
                    times[name].append(elapsed)
            if name in problems:  # out here the exception no longer holds the frames and their tensors
                release(device)
    return {name: t for name, t in times.items() if name not in problems}, problems


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    median = statistics.median(times)
    return {
        "median_s": median,
        "min_s": min(times),
        "max_s": max(times),
        "spread": (max(times) - min(times)) / median if median else 0.0,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    import importlib.metadata

    versions = {}
    for name in ("torch", "triton", "trl", "liger-kernel", "transformers", "trl-opd"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": f"{device.type} ({name})", "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def own_process(module: str, arguments: Iterable[str]) -> float:
    """
    The last number that a fresh process prints. A CPU's allocator keeps what was freed, so peaks are measured there.

    Raises:
        RuntimeError: With the last line of its complaint.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise RuntimeError(lines[-1])
    return float(result.stdout.split()[-1])


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """Save a result where one was asked for."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first on the left and the others on the right. A row of two cells is a name and a remark."""
    full = [row for row in rows if len(row) == len(head)] or [head]
    widths = [max(len(row[i]) for row in [head, *full]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        if len(row) != len(head):
            lines.append(f"{row[0]:<{widths[0]}}  – {row[1]}".rstrip())
            continue
        cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
