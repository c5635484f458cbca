# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The `trl-opd` command.

    trl-opd demo                       # on-policy distillation from scratch on this machine
    trl-opd train --config run.yaml    # any field also as --field value
    trl-opd bench head                 # speed and memory beside TRL and Liger; also step, teacher, topk
    trl-opd score --teacher T --dataset D --output DIR    # a teacher's log-probs, for training without it
    trl-opd recipes [NAME]             # the methods of the literature: a table, or one with a YAML to run
"""

import argparse
import sys

from . import __version__


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="trl-opd", description="On-policy distillation for TRL.")
    parser.add_argument("--version", action="version", version=f"trl-opd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distil a small model from scratch on this machine, no downloads")
    demo.add_argument("--output-dir", default="opd_demo", help="where report.md, the plot and results.json go")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--fast", action="store_true", help="a few steps of everything, to see that it runs")
    commands.add_parser("train", help="train from a YAML file or command-line fields (see --help)", add_help=False)
    commands.add_parser(
        "bench", help="measure: bench head, step, teacher, topk, server, cache, methods", add_help=False
    )
    commands.add_parser("score", help="write a teacher's scores of fixed completions (see --help)", add_help=False)
    commands.add_parser("recipes", help="the methods of the literature, by name (see --help)", add_help=False)
    args, rest = parser.parse_known_args(argv)
    if args.command == "train":
        from .train import main as train

        train(rest)
        return 0
    if args.command == "bench":
        from .bench import main as bench

        return bench(argv[argv.index("bench") + 1 :])
    if args.command == "score":
        from .score import main as score

        return score(argv[argv.index("score") + 1 :])
    if args.command == "recipes":
        from .recipes_cli import main as recipes

        return recipes(argv[argv.index("recipes") + 1 :])
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from .demo import run_demo

    run_demo(output_dir=args.output_dir, seed=args.seed, fast=args.fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
