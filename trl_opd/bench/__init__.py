# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Benchmarks beside TRL and Liger: `trl-opd bench head` (the divergence alone), `trl-opd bench step` (a training step).

Both let the alternatives take turns on the same inputs in one process and print a table; `--json` and `--png` keep it.
"""

import argparse


def main(argv: list[str], prog: str = "trl-opd bench") -> int:
    """Entry point of `trl-opd bench`; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description="Time and memory beside TRL, Liger and full logits.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    commands.add_parser("head", help="the divergence alone, forward and backward (see head --help)", add_help=False)
    commands.add_parser("step", help="a whole training step beside TRL's DistillationTrainer", add_help=False)
    args, _ = parser.parse_known_args(argv[:1])
    if args.benchmark == "head":
        from .head import main as benchmark
    else:
        from .step import main as benchmark
    benchmark(argv[1:], prog=f"{prog} {args.benchmark}")
    return 0
