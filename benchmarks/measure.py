"""Timing and memory of alternatives on the same inputs, in turn, in one process."""

import gc
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


class PeakMemory:
    """Peak extra memory of a block in MiB: allocator statistics on CUDA, resident set size sampled on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.mib = 0.0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
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
            torch.cuda.synchronize()
            self.mib = (torch.cuda.max_memory_allocated() - self._start) / 2**20
            return
        self._stop.set()
        self._thread.join()
        self.mib = (max(self._peak, _resident()) - self._start) / 2**20


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queue drained."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function, one warm-up each, then `repeats` rounds in which they take turns."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type} ({name})", "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Save a result where one was asked for."""
    if path:
        with open(path, "w") as f:
            json.dump(result, f, indent=2)
