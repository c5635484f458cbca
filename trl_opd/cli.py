# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The `trl-opd` command.

    trl-opd demo                       # on-policy distillation from scratch on this machine
    trl-opd recipes [NAME]             # the methods of the literature: a table, or one with a YAML to run
    trl-opd doctor --config run.yaml   # what is wrong with a run, before it is started
    trl-opd train --config run.yaml    # any field also as --field value
    trl-opd report RUN [RUN ...]       # one HTML file about runs
    trl-opd score --teacher T --dataset D --output DIR    # a teacher's log-probs, for training without it
    trl-opd bench head                 # speed and memory beside TRL and Liger; also step, teacher, topk ...
"""

import argparse
import difflib
import importlib
import io
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from . import __version__, cli_help

COMMANDS = {
    "demo": "trl_opd.cli",
    "recipes": "trl_opd.recipes_cli",
    "doctor": "trl_opd.doctor.cli",
    "train": "trl_opd.train",
    "report": "trl_opd.report.cli",
    "score": "trl_opd.score",
    "bench": "trl_opd.bench",
}
# What libraries say of parts of theirs that are not used here, at every start
_CHATTERS = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu", "bitsandbytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(cli_help.MAIN, end="")
        return 0
    name, rest = argv[0], argv[1:]
    if name == "--version":
        print(f"trl-opd {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join(COMMANDS)
        print(
            f"trl-opd: error: there is no command {name!r}.{hint}\nCommands: {known}. See trl-opd --help.",
            file=sys.stderr,
        )
        return 2
    if name == "train" and set(rest) & {"-h", "--help"}:
        print(cli_help.TRAIN, end="")
        return 0
    if name == "score" and set(rest) & {"-h", "--help"}:
        print(cli_help.SCORE, end="")
        return 0
    with hushed():
        command = demo if name == "demo" else importlib.import_module(COMMANDS[name]).main
        if set(rest) & {"-h", "--help"}:
            return show_help(command, rest)
        return int(command(rest) or 0)


def show_help(command: Callable[[list[str]], Any], argv: list[str]) -> int:
    """Run a command that prints its help, and print that as wide as the terminal is."""
    written = io.StringIO()
    code: Any = 0
    try:
        with redirect_stdout(written):
            code = command(argv)
    except SystemExit as end:
        code = end.code
    print(fit(written.getvalue(), min(shutil.get_terminal_size((80, 24)).columns, 119)), end="")
    return code if isinstance(code, int) else 0


def fit(text: str, width: int) -> str:
    """
    Plain text in lines of at most `width` characters: paragraphs are filled anew, indented lines are broken.

    Args:
        text (`str`): Of a help.
        width (`int`): In characters.
    """
    lines: list[str] = []
    for paragraph in re.split(r"\n(?=\n|\s)|(?<=:)\n", text):
        start = paragraph.lstrip("\n")
        lines += [""] * (len(paragraph) - len(start))
        indent = " " * (len(start) - len(start.lstrip()))
        prose = not indent and not start.startswith("usage:")
        pieces = [" ".join(start.split("\n"))] if prose else start.split("\n")
        for piece in pieces:
            short = len(piece) <= width
            more = {"subsequent_indent": f"{indent}    " if indent else "", "drop_whitespace": True}
            lines += [piece] if short else textwrap.wrap(piece, width, break_on_hyphens=False, **more)  # type: ignore[arg-type]
    return "\n".join(lines) + "\n"


@contextmanager
def hushed() -> Iterator[None]:
    """Inside, libraries do not speak of optional parts that they did not find."""
    names = () if os.environ.get("TRL_OPD_VERBOSE") else _CHATTERS
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def demo(argv: Sequence[str]) -> int:
    """`trl-opd demo`."""
    parser = argparse.ArgumentParser(
        prog="trl-opd demo",
        description="Trains a small teacher on this machine, then distils it into a smaller student by each of a few "
        "methods, and writes a report. Nothing is downloaded; it takes some minutes on a CPU.",
    )
    parser.add_argument("--output-dir", default="opd_demo", help="where report.md, the plot and results.json go")
    parser.add_argument("--seed", type=int, default=0, help="of models and data (default 0)")
    parser.add_argument("--fast", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args(argv)
    from .demo import run_demo

    run_demo(output_dir=args.output_dir, seed=args.seed, fast=args.fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
