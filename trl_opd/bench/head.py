# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergence head alone, forward and backward: ours beside TRL's, Liger's, full logits and the bare GEMMs.

    trl-opd bench head                                           # 1024 tokens x 32k, hidden 256 and 512, on the CPU
    trl-opd bench head --student-hidden 2048 --vocab 151936 --tokens 16384 --dtype bfloat16 --device cuda
    trl-opd bench head --grid --dtype bfloat16 --device cuda --time-budget 540 --json head.json --png head.png

All take turns in one process on the same inputs. Every shape option takes several values, and every combination is
run; --grid stands for all of hidden 1024 2048 4096, vocabulary 32000 151936 256000, tokens 4096 16384 65536, trained
and frozen head, full and top-64 teacher. What does not fit, fails or is out of time is listed with the reason.

`gemms` are the products that no exact implementation can avoid, at their fastest chunk length (4 of them, 3 with a
frozen head, 3 and 2 with a top-k teacher); `gemms_rounded` the same with half-precision results. Errors are relative
to float64 on the first 64 tokens (fewer above a vocabulary of 262144): |difference| of the loss, and the norm of the
difference over the norm of the gradient in hidden states and in the head. MiB is the peak above inputs and gradients,
on a CPU measured in a process of its own. A top-k teacher's loss has one bucket for the rest of the vocabulary.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .. import losses
from ..losses import nearest_name
from .candidates import Cell, Implementation, Inputs, candidates, make_inputs, why_absent
from .exact import errors, reference
from .gemms import fastest_gemms
from .measure import (
    PeakMemory,
    in_words,
    machine,
    own_process,
    release,
    show_table,
    summary,
    take_turns,
    write_json,
)
from .targets import check_targets, ratios

# A mixture has names for parameters, and none by default
DIVERGENCES = [name for name in losses.DIVERGENCES if name != "convex_mix"]

Row = dict[str, Any]

GRID: dict[str, list[Any]] = {
    "student_hidden": [1024, 2048, 4096],
    "vocab": [32000, 151936, 256000],
    "tokens": [4096, 16384, 65536],
    "frozen_head": [False, True],
    "teacher": ["full", "top64"],
}
SINGLE: dict[str, list[Any]] = {
    "student_hidden": [256],
    "vocab": [32000],
    "tokens": [1024],
    "frozen_head": [False],
    "teacher": ["full"],
}
TARGET: dict[str, Any] = {
    "student_hidden": 2048,
    "vocab": 151936,
    "tokens": 16384,
    "frozen_head": False,
    "teacher": "full",
}
# Operations a second with which the time of a first problem is guessed
_GUESS = {"cuda": 2e14, "cpu": 3e10}


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """All combinations, those nearest to the target shape first, and of those the cheapest."""
    axes = GRID if args.grid else SINGLE
    given = {name: getattr(args, name) or values for name, values in axes.items() if name != "frozen_head"}
    given["frozen_head"] = [True] if args.frozen_head else axes["frozen_head"]
    default_width = None if args.grid or args.student_hidden else 512
    cells = []
    for values in itertools.product(*given.values(), args.teacher_hidden or [default_width], args.divergence):
        shape = dict(zip([*given, "teacher_hidden", "divergence"], values, strict=True))
        shape["teacher_hidden"] = shape["teacher_hidden"] or shape["student_hidden"]
        cells.append(Cell(**shape, dtype=args.dtype, gap=args.gap))

    def key(cell: Cell) -> tuple[float, float, int]:
        away = sum(getattr(cell, name) != value for name, value in TARGET.items())
        return away, cell.flops, args.divergence.index(cell.divergence)

    return sorted(cells, key=key)


def _step(implementation: Implementation, x: Inputs, divergence: str) -> None:
    x.forget_gradients()
    implementation(x, divergence).backward()


def _peak_mib(function: Callable[[], None], x: Inputs) -> float:
    """Peak above what was there before and the gradients that remain."""
    x.forget_gradients()
    with PeakMemory(x.device) as memory:
        function()
    return max(0.0, memory.mib - x.gradient_bytes / 2**20)


def _measure_peak(name: str, function: Callable[[], None], x: Inputs, cell: Cell) -> float:
    if x.device.type == "cuda":
        return _peak_mib(function, x)
    arguments = ["--memory-of", name, "--threads", str(torch.get_num_threads())]
    for key, value in asdict(cell).items():
        option = f"--{key.replace('_', '-')}"
        arguments += ([option] if value else []) if isinstance(value, bool) else [option, str(value)]
    return own_process("trl_opd.bench.head", arguments)


def print_peak(args: argparse.Namespace) -> None:
    """The other side of [`own_process`]. A call on two tokens first, so that nothing but the call's buffers is new."""
    (cell,) = make_cells(args)
    device = torch.device(args.device)
    x, implementation = make_inputs(cell, device), candidates(device)[args.memory_of]
    _step(implementation, x.first(2), cell.divergence)
    print(_peak_mib(functools.partial(_step, implementation, x, cell.divergence), x))


def run_cell(cell: Cell, args: argparse.Namespace) -> list[Row]:
    """One row for every implementation: figures, or a `problem` in words."""
    device = torch.device(args.device)
    known = candidates(device)
    skip = {"gemms_rounded"} if cell.dtype == "float32" else set()
    names = [name for name in (*known, "gemms", "gemms_rounded") if name not in (*args.skip, *skip)]
    rows: dict[str, Row] = {name: {"name": name} | asdict(cell) for name in names}
    if device.type == "cuda":  # after a few shapes torch.compile would give up on Liger's function and say nothing
        torch.compiler.reset()
    try:
        x = make_inputs(cell, device)
    except Exception as error:  # most likely of memory
        problem = f"no inputs: {in_words(error)}"
        return [row | {"problem": problem} for row in rows.values()]
    functions: dict[str, Callable[[], None]] = {}
    for name in names:
        problem = why_absent(name, cell, device) or ""
        try:
            if problem:
                pass
            elif name in known:
                functions[name] = functools.partial(_step, known[name], x, cell.divergence)
            else:
                functions[name], rows[name]["chunk_rows"] = fastest_gemms(x, cell, rounded=name == "gemms_rounded")
        except Exception as error:  # of whatever kind: the others are still to be measured
            problem = in_words(error)
        if problem:
            rows[name]["problem"] = problem
    times, problems = take_turns(functions, args.repeats, device)
    for name, problem in problems.items():
        rows[name]["problem"] = problem
    for name in ("gemms", "gemms_rounded"):  # their buffers would be in the way
        functions.pop(name, None)
    for name, seconds in times.items():
        rows[name] |= summary(seconds)
    _add_memory_and_errors(rows, {name: functions[name] for name in times if name in functions}, x, cell, args.memory)
    del functions, x
    release(device)
    return list(rows.values())


def _add_memory_and_errors(
    rows: dict[str, Row], functions: dict[str, Callable[[], None]], x: Inputs, cell: Cell, memory: bool
) -> None:
    known = candidates(x.device)
    if memory:
        for name, function in functions.items():
            try:
                rows[name]["peak_mib"] = _measure_peak(name, function, x, cell)
            except Exception as error:
                rows[name]["remark"] = f"memory not measured: {in_words(error)}"
    x.forget_gradients()
    release(x.device)
    try:
        truth = reference(x, cell.divergence)
    except Exception as error:
        for name in functions:
            rows[name]["remark"] = f"no float64 reference: {in_words(error)}"
        return
    for name in functions:
        try:
            rows[name] |= errors(known[name], truth, cell.divergence)
        except Exception as error:
            rows[name]["remark"] = f"errors not measured: {in_words(error)}"


_COLUMNS = ("", "median s", "min", "max", "/ gemms", "/ ours", "MiB", "loss", "error", "∂hidden", "∂head")


def show_cell(rows: list[Row]) -> str:
    """The table of one problem."""
    base = {row["name"]: row["median_s"] for row in rows if "median_s" in row}

    def number(row: Row, key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    lines: list[tuple[str, ...]] = []
    for row in (row for row in rows if "problem" not in row):
        relative = [f"{row['median_s'] / base[name]:.2f}" if base.get(name) else "" for name in ("gemms", "ours")]
        lines.append(
            (
                row["name"],
                *(f"{row[key]:.4f}" for key in ("median_s", "min_s", "max_s")),
                *relative,
                number(row, "peak_mib", ".0f"),
                number(row, "loss", ".6f"),
                *(number(row, key, ".1e") for key in ("loss_error", "hidden_error", "head_error")),
            )
        )
    for problem in dict.fromkeys(row["problem"] for row in rows if "problem" in row):
        lines.append((", ".join(row["name"] for row in rows if row.get("problem") == problem), problem))
    text = show_table(_COLUMNS, lines)
    remarks = [f"  {row['name']}: {row['remark']}" for row in rows if "remark" in row]
    return "\n".join([text, *remarks])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every combination in its order; the JSON file is up to date after each."""
    device = torch.device(args.device)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "png", "memory_of")}
    result: dict[str, Any] = {
        "command": " ".join(["trl-opd bench head", *args.argv]),
        "arguments": {k: v for k, v in settings.items() if k != "argv"},
        "machine": machine(device),
        "rows": [],
        "not_run": [],
    }
    print(result["machine"])
    start = time.perf_counter()
    spent: list[tuple[float, float]] = []  # operations and seconds of the problems so far
    cells = make_cells(args)
    for i, cell in enumerate(cells):
        elapsed = time.perf_counter() - start
        expected = _expected_seconds(cell, spent, args.repeats, device)
        if args.time_budget and elapsed + expected > args.time_budget:
            reason = f"time budget: {elapsed:.0f} of {args.time_budget:.0f} s used, about {expected:.0f} s needed"
            result["not_run"].append(asdict(cell) | {"problem": reason})
            print(f"\nnot run: {cell} – {reason}", flush=True)
            continue
        print(f"\n[{i + 1}/{len(cells)}] {cell}", flush=True)
        rows = run_cell(cell, args)
        spent.append((cell.flops, time.perf_counter() - start - elapsed))
        result["rows"] += rows
        print(show_cell(rows), flush=True)
        write_json(args.json, result)
    result["targets"] = check_targets(result["rows"], device.type)
    write_json(args.json, result)
    return result


def _expected_seconds(cell: Cell, spent: list[tuple[float, float]], repeats: int, device: torch.device) -> float:
    """From the problem so far that was most like it; at first a guess: ten implementations, each twice its GEMMs."""
    if not spent:
        return cell.flops / _GUESS[device.type] * (repeats + 2) * 20
    flops, seconds = min(spent, key=lambda pair: max(pair[0] / cell.flops, cell.flops / pair[0]))
    return seconds * max(1.0, cell.flops / flops)


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = parser.add_argument_group("shape (each takes several values)")
    shape.add_argument("--student-hidden", type=int, nargs="+", metavar="H")
    shape.add_argument("--teacher-hidden", type=int, nargs="+", metavar="H", help="default: as wide as the student")
    shape.add_argument("--vocab", type=int, nargs="+", metavar="V")
    shape.add_argument("--tokens", type=int, nargs="+", metavar="N")
    shape.add_argument("--teacher", nargs="+", metavar="full|topK", help="a teacher known whole, or by its top K")
    shape.add_argument("--divergence", nargs="+", metavar="NAME", default=["reverse_kl", "jsd"],
                       help=f"jsd (β = ½), or any of {', '.join(DIVERGENCES)}; default: reverse_kl jsd")  # fmt: skip
    shape.add_argument("--frozen-head", action="store_true", help="only the frozen head")
    shape.add_argument("--grid", action="store_true", help="all of the shapes above that are not given")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds after one that is not counted")
    parser.add_argument("--skip", nargs="*", default=[], metavar="NAME", help="implementations to leave out")
    parser.add_argument("--gap", type=float, default=0.5, help="noise of the teacher's logits over the student's")
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="leave out what would end after this")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--json", metavar="PATH", help="where to keep the figures")
    parser.add_argument("--png", metavar="PATH", help="where to draw them (needs trl-opd[plots])")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: list[str] | None, prog: str) -> argparse.Namespace:
    """Parse and check, before anything is measured."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    names = ["jsd", *DIVERGENCES]
    for name in args.divergence:
        if name not in names:
            parser.error(f"--divergence must be a known name, got {name!r}.{nearest_name(name, names)}")
    for teacher in args.teacher or []:
        if teacher != "full" and not (teacher.startswith("top") and teacher[3:].isdigit() and int(teacher[3:]) > 0):
            parser.error(f"--teacher must be full or top and a number such as top64, got {teacher!r}")
    implementations = [*candidates(torch.device("cuda")), "gemms", "gemms_rounded"]
    for name in args.skip:
        if name not in implementations:
            parser.error(f"--skip must name an implementation, got {name!r}.{nearest_name(name, implementations)}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    return args


def main(argv: list[str] | None = None, prog: str = "trl-opd bench head") -> None:
    """Entry point of `trl-opd bench head`."""
    args = parse_arguments(argv, prog)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak(args)
        return
    result = run(args)
    print(f"\n{ratios(result['rows'])}")
    for target in result["targets"]:
        print(target["text"])
    if args.png:
        from .plots import plot_head

        plot_head(result, args.png)


if __name__ == "__main__":
    main()
