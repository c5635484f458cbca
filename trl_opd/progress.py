# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The log lines of `trl-opd train` on the screen: the few numbers to watch, in one line of 80 columns.

All of them are in `output_dir/__opd/log.jsonl`, in the trackers and in the report.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback

_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", "{:.4g}".format),
    ("distill/reverse_kl", "KL", "{:.4g}".format),
    ("distill/overlap", "overlap", "{:.2f}".format),
    ("reward", "reward", "{:.3g}".format),
    ("completions/mean_length", "length", "{:.0f}".format),
    ("completions/clipped_ratio", "cut", "{:.0%}".format),
    ("grad_norm", "grad", "{:.3g}".format),
)


def one_line(logs: Mapping[str, Any], state: Any) -> str:
    """
    A log line in at most 80 characters.

    Args:
        logs (`Mapping[str, Any]`): Its numbers by name.
        state ([`~transformers.TrainerState`]): Of the run.
    """
    if "train_runtime" in logs:
        return f"{state.global_step} steps in {_duration(logs['train_runtime'])}"
    prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
    text = f"step {state.global_step}/{state.max_steps}" + (" evaluation" if prefix else "")
    for name, label, form in _SHOWN:
        value = logs.get(prefix + name)
        if isinstance(value, (int, float)):
            part = f"  {label} {form(value)}"
            text += part if len(text) + len(part) <= 80 else ""
    return text


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


class ShortProgressCallback(ProgressCallback):
    """transformers' progress bar, with short log lines above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(one_line(logs or {}, state))


class ShortPrinterCallback(PrinterCallback):
    """Short log lines without a progress bar (`disable_tqdm`)."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero:
            print(one_line(logs or {}, state), flush=True)


def shorten(trainer: Any) -> None:
    """Let a trainer write short log lines in the place of whole ones."""
    for long, short in ((ProgressCallback, ShortProgressCallback), (PrinterCallback, ShortPrinterCallback)):
        if trainer.pop_callback(long) is not None:
            trainer.add_callback(short)
