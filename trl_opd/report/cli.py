# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
`trl-opd report`: what happened in a run, as a page or in the terminal.

    trl-opd report out                         # writes out/report.html
    trl-opd report out --open                  # and opens it
    trl-opd report out/a out/b -o both.html    # several runs over each other
    trl-opd report out --terminal              # a summary here, no file
"""

import argparse
import sys
import webbrowser
from pathlib import Path

from .load import NoRunError, load_runs
from .page import write_report

_DESCRIPTION = """\
Show what happened in one run or in several: curves with what is healthy, alarms,
findings, where in the completions the student strays from the teacher, and the
configuration.

Works while a run is running (repeat the command for newer numbers), after it
ended, and after it was killed. The page is one HTML file of about 5 MB; it needs
no network and no other file."""
_EXAMPLES = """\
examples:
  trl-opd report out                         write out/report.html
  trl-opd report out --open                  ... and open it in the browser
  trl-opd report out/a out/b -o both.html    several runs over each other
  trl-opd report out --terminal              a summary here, and no file"""


def parser() -> argparse.ArgumentParser:
    """Of the command."""
    result = argparse.ArgumentParser(
        prog="trl-opd report",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the output_dir of a run")
    result.add_argument(
        "-o", "--output", metavar="FILE.html", help="default: RUN_DIR/report.html; of several runs ./report.html"
    )
    result.add_argument("--terminal", action="store_true", help="print a summary; no file without -o or --open")
    result.add_argument("--open", action="store_true", help="open the page in the browser")
    return result


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 2 if a folder holds no run, or the page cannot be written."""
    args = parser().parse_args(argv)
    try:
        if args.terminal:
            from .terminal import print_summary

            for run in load_runs(args.runs):
                print_summary(run)
        if args.terminal and not (args.output or args.open):
            return 0
        file = write_report(args.runs, args.output or _default_output(args.runs))
    except NoRunError as error:
        print(f"trl-opd report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"trl-opd report: the page could not be written: {error}. Choose another file with -o.", file=sys.stderr)
        return 2
    print(f"Wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    if args.open and not webbrowser.open(file.resolve().as_uri()):
        print(f"No browser could be started: open {file.resolve().as_uri()}", file=sys.stderr)
    return 0


def _default_output(runs: list[str]) -> Path:
    return Path(runs[0]) / "report.html" if len(runs) == 1 else Path("report.html")
