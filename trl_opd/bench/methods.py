# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The methods side by side: each trains a copy of one start on the demo's task, for equally many tokens.

    trl-opd bench methods                             # every recipe that the task can feed, three seeds
    trl-opd bench methods gkd opsd --seeds 5          # these beside the baselines
    trl-opd bench methods --list                      # what runs, with what, and what does not and why

For each seed a teacher and a student are trained once (a second student learns to read hints, for the methods of
self-distillation; they have a table of their own). Baselines: the start, the teacher, `opd`, the library's defaults
(`reverse_kl`), GRPO, and fine-tuning on the teacher's samples. Recipes that set the same fields here run once.

Everything is kept in --output-dir as it arrives: interrupted, the command goes on where it was, with the same
settings. What failed is tried again. The table, its columns and what was changed for the task are explained in the
Markdown file. It compares the methods at one learning rate and one budget, untuned: it is not a ranking of papers.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers

from ..demo import FAST
from ..demo.stages import Settings
from ..recipes import RECIPES, get_recipe
from .measure import in_words, machine, write_json
from .methods_plan import BASELINES, ENDS, UNIT_OF_COST, Plan, make_plan
from .methods_report import footnotes, make_rows, markdown, notes, plot, text_table
from .methods_task import Start
from .methods_train import run

# At twice as many, half of the methods answer everything; at half, few have learned much
BUDGET = 16_000
FAST_BUDGET = 200
# Counted up when the runs themselves change, so that a folder's older results are not taken for new ones
VERSION = 1


def make_plans(names: Sequence[str], settings: Settings) -> tuple[list[Plan], dict[str, str], dict[str, str]]:
    """
    What is to be run.

    Args:
        names (`Sequence[str]`): Recipes and baselines; empty for all. The baselines come in any case.
        settings ([`Settings`]): With the budget.

    Returns:
        The plans in the order of the table; why others are refused, by name; which plan others are the same as here.

    Raises:
        ValueError: If there is no such method.
    """
    names = [name if name in BASELINES else get_recipe(name).name for name in names] or list(RECIPES)
    wanted = dict.fromkeys([UNIT_OF_COST, *BASELINES, *names])
    made = {name: make_plan(name, settings) for name in wanted}
    refused = {name: plan for name, plan in made.items() if isinstance(plan, str)}
    plans: dict[str, Plan] = {}
    same: dict[str, str] = {}
    for plan in made.values():
        if isinstance(plan, str):
            continue
        first = plans.setdefault(plan.signature, plan)
        if first is not plan:
            same[plan.name] = first.name
    starts = {plan.start for plan in plans.values()}
    ends = [make_plan(name, settings) for name, start in ENDS.items() if start in starts]
    return [*(end for end in ends if isinstance(end, Plan)), *plans.values()], refused, same


def fingerprint(*parts: Any) -> str:
    """A short name of settings."""
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _start(seed: int, settings: Settings, folder: Path) -> Start:
    # What is trained before the methods does not depend on these, and takes minutes
    same = {k: v for k, v in asdict(settings).items() if k not in ("budget", "learning_rates", "num_generations")}
    return Start(seed, settings, folder / "starts" / fingerprint(same) / f"seed{seed}")


def _path(plan: Plan, seed: int, settings: Settings, folder: Path) -> Path:
    return folder / "runs" / f"{plan.name}-{seed}-{fingerprint(asdict(settings), plan.signature)}.json"


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, no progress bars, no deprecations of TRL and Transformers."""
    verbosity, bars = transformers.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    loading, threads = transformers.utils.logging.is_progress_bar_enabled(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        if loading:
            transformers.utils.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()


def make_parts(parts: Sequence[str], seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Make parts of a start, in a process of its own."""
    started = time.perf_counter()
    try:
        with quiet():
            _start(seed, settings, folder).make(parts)
    except Exception as error:  # of whatever kind: the runs that need it will say so
        return {"name": "/".join(parts), "seed": seed, "status": "failed", "message": in_words(error)}
    took = f"made in {time.perf_counter() - started:.0f} s"
    return {"name": "/".join(parts), "seed": seed, "status": "made", "message": took}


def make_run(plan: Plan, seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Run one method with one seed in a process of its own, and write the result at once."""
    with quiet():
        result = run(plan, _start(seed, settings, folder))
    path = _path(plan, seed, settings, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(result))
    os.replace(partial, path)
    return result


def known(plan: Plan, seed: int, settings: Settings, folder: Path) -> dict[str, Any] | None:
    """An earlier result of the same settings, unless it failed."""
    path = _path(plan, seed, settings, folder)
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result is not None and result["status"] == "done" else None


class Call(NamedTuple):
    """A function with its arguments, for the method (or the parts of a start) of that name and seed."""

    name: str
    seed: int
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


def work(calls: Sequence[Call], jobs: int) -> Iterator[dict[str, Any]]:
    """
    Results of calls as they arrive, from `jobs` processes, or from this one where that is 1.

    A process that dies takes the others of its pool with it. What was not done then is called once more, each in a
    process of its own, so that it is known which one died.
    """
    if jobs == 1:
        yield from (call.function(*call.arguments) for call in calls)
        return
    died: list[Call] = []
    with _pool(jobs) as pool:
        futures = {pool.submit(call.function, *call.arguments): call for call in calls}
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenExecutor):
                died.append(futures[future])
            else:
                yield future.result()
    for call in died:
        with _pool(1) as pool:
            future = pool.submit(call.function, *call.arguments)
            error = future.exception()
        if isinstance(error, BrokenExecutor):
            yield {"name": call.name, "seed": call.seed, "status": "failed", "message": in_words(error)}
        else:
            yield future.result()


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    # Read when the processes import these libraries
    given = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        pool.shutdown()


def bench(
    plans: Sequence[Plan], seeds: Sequence[int], settings: Settings, folder: Path, jobs: int = 1
) -> list[dict[str, Any]]:
    """
    Make what is missing of the starts and of the runs.

    Args:
        plans (`Sequence[Plan]`): The methods.
        seeds (`Sequence[int]`): Each runs with all of these.
        settings ([`Settings`]): The demo's, with the budget.
        folder (`Path`): Where everything is kept.
        jobs (`int`, *optional*, defaults to 1): Processes.

    Returns:
        `list[dict]`: A result for each method and seed.
    """
    pairs = [(plan, seed) for seed in seeds for plan in plans]
    results = [found for pair in pairs if (found := known(*pair, settings, folder)) is not None]
    have = {(result["name"], result["seed"]) for result in results}
    todo = [(plan, seed) for plan, seed in pairs if (plan.name, seed) not in have]
    if have:
        print(f"{len(have)} of {len(pairs)} runs are there already: {folder}")
    needed = {(seed, part) for plan, seed in todo for part in plan.parts}
    calls = []
    # The teacher first: its samples wait for it
    for group in (
        ("teacher", "demonstrations"),
        ("second_teacher",),
        ("hinted_student",),
        ("student",),
        ("raw_teacher",),
    ):
        for seed in seeds:
            missing = [part for part in group if (seed, part) in needed]
            if any(not _start(seed, settings, folder).path(part).exists() for part in missing):
                calls.append(Call("/".join(missing), seed, make_parts, (missing, seed, settings, folder)))
    for made in work(calls, jobs):
        print(f"{made['name']}, seed {made['seed']}: {made['message']}", flush=True)
    runs = [Call(plan.name, seed, make_run, (plan, seed, settings, folder)) for plan, seed in todo]
    for result in work(runs, jobs):
        results.append(result)
        print(f"[{len(results)}/{len(pairs)}] {_line(result)}", flush=True)
    return results


def _line(result: dict[str, Any]) -> str:
    name = f"{result['name']}, seed {result['seed']}"
    if result["status"] == "failed":
        return f"{name}: failed, {result['message']}"
    metrics, seconds = result["metrics"], result.get("cpu_seconds")
    took = "" if seconds is None else f", {seconds:.0f} CPU s"
    return f"{name}: accuracy {metrics['accuracy']:.1%}, reverse KL {metrics['reverse_kl']:.4f}{took}"


def _list(plans: Sequence[Plan], refused: dict[str, str], same: dict[str, str]) -> None:
    for plan in plans:
        given = [f"from the {plan.start} start" if plan.learning_rate else "not trained"]
        given += [f"learning rate {plan.learning_rate:g}"] if plan.learning_rate else []
        given += [name for name in ("rewards", "demonstrations") if getattr(plan, name)]
        given += [f"teacher {plan.teacher}"] if plan.teacher not in (None, "teacher") else []
        given += [f"reference {', '.join(plan.references)}"] if plan.references else []
        print(f"{plan.name:<20}  {'; '.join([*given, *plan.changes])}")
    for name, other in same.items():
        print(f"{name:<20}  the same as {other} here")
    for name, reason in refused.items():
        print(f"{name:<20}  not run: {reason}")


def main(argv: list[str] | None = None, prog: str = "trl-opd bench methods") -> None:
    """Entry point."""
    description, _, details = (__doc__ or "").strip().partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=details, formatter_class=formatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="methods to run (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 (default 3)")
    parser.add_argument("--budget", type=int, help=f"tokens of each run (default {BUDGET})")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default 1)")
    parser.add_argument("--output-dir", default="opd_methods", help="where starts and results are kept")
    parser.add_argument("--list", action="store_true", help="say what would run, with what, and run nothing")
    parser.add_argument("--fast", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="keep the figures")
    parser.add_argument("--png", metavar="FILE", help="draw them")
    parser.add_argument("--markdown", metavar="FILE", help="write the table with its explanation")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs", "budget"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    settings = replace(FAST if args.fast else Settings(), budget=args.budget or (FAST_BUDGET if args.fast else BUDGET))
    try:
        plans, refused, same = make_plans(args.recipes, settings)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        _list(plans, refused, same)
        return
    started, seeds = time.perf_counter(), list(range(args.seeds))
    results = bench(plans, seeds, settings, Path(args.output_dir), args.jobs)
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu")) | {"threads": 1},
        "command": _command(args, prog),
        "seconds": time.perf_counter() - started,
        "seeds": seeds,
        "settings": asdict(settings),
        "rows": make_rows(plans, results),
        "same": same,
        "refused": refused,
    }
    print("\n" + text_table(result["rows"]) + "\n")
    print("\n".join(f"- {note}" for note in [*footnotes(result), *notes(result)]))
    write_json(args.json, result)
    drawn = bool(args.png) and plot(result, args.png)
    if args.markdown:
        figure = os.path.relpath(args.png, Path(args.markdown).parent) if drawn else None
        Path(args.markdown).write_text(markdown(result, figure), encoding="utf-8")


def _command(args: argparse.Namespace, prog: str) -> str:
    """The command that the table is of, without where it was written to."""
    options = [f"--seeds {args.seeds}", f"--jobs {args.jobs}"]
    options += [f"--budget {args.budget}"] if args.budget else []
    return " ".join([prog, *args.recipes, *options, *(["--fast"] if args.fast else [])])


if __name__ == "__main__":
    main()
