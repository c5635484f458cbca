# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Benchmarks: `trl-opd bench head` (the divergence alone) and `trl-opd bench step` (a training step) beside TRL and
Liger; `trl-opd bench teacher` (quantized, offloaded and split teachers beside a plain one); `trl-opd bench topk` (what
a top-k teacher costs in accuracy); `trl-opd bench server` (what a teacher's server delivers); `trl-opd bench cache`
(what stored scores take); `trl-opd bench methods` (the recipes on one task, for equally many tokens); `trl-opd bench
diagnostics` (what the diagnostics of a log line cost).

Alternatives take turns on the same inputs in one process. All print a table; `--json` keeps it.
"""

import argparse
import importlib

BENCHMARKS = {
    "head": "the divergence alone, forward and backward (see head --help)",
    "step": "a whole training step beside TRL's DistillationTrainer",
    "teacher": "ways to make a teacher fit, and what they cost",
    "topk": "the gradient from a top-k teacher beside that from all entries",
    "server": "tokens a second, bytes and reading time of a teacher's server",
    "cache": "size, accuracy and speed of stored scores",
    "diagnostics": "training steps with and without the diagnostics of every log line",
    "methods": "the recipes side by side: accuracy, divergence, diversity and cost",
}


def main(argv: list[str], prog: str = "trl-opd bench") -> int:
    """Entry point of `trl-opd bench`; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description="Time, memory and accuracy beside the alternatives.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, text in BENCHMARKS.items():
        commands.add_parser(name, help=text, add_help=False)
    args, _ = parser.parse_known_args(argv[:1])
    benchmark = importlib.import_module(f".{args.benchmark}", __name__)
    benchmark.main(argv[1:], prog=f"{prog} {args.benchmark}")
    return 0
