# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
On-policy distillation end to end on a CPU, from random weights, without downloads.

    trl-opd demo
"""

import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ..report import write_report as write_page
from .evaluation import Evaluator
from .methods import Workbench, distill, imitate, reinforce
from .report import print_table, write_report
from .stages import Settings, Shape, train_teacher, warm_up_student
from .task import AdditionTask, build_tokenizer, solve

__all__ = ["FAST", "Settings", "run_demo"]

FAST = Settings(
    num_digits=1,
    budget=400,
    batch_size=16,
    num_points=2,
    num_held_out=16,
    teacher_shape=Shape(32, 1, 64, 0.08),
    teacher_steps=4,
    student_shape=Shape(16, 1, 32, 0.08),
    warm_up_problems=64,
    warm_up_steps=2,
    lora_rank=4,
    num_generations=4,
)


def _describe(evaluator: Evaluator, model: Any, start: float) -> dict[str, Any]:
    seconds = time.perf_counter() - start
    point = evaluator.measure(model)
    return {
        "accuracy": point.accuracy,
        "greedy_accuracy": evaluator.accuracy(model, greedy=True)[0],
        "reverse_kl": point.reverse_kl,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
    }


def run_demo(
    output_dir: str | Path = "opd_demo", seed: int = 0, fast: bool = False, settings: Settings | None = None
) -> dict[str, Any]:
    """
    Train a teacher, warm a student up, continue copies of it by OPD, GRPO and SFT, and report how they compare.

    Args:
        output_dir (`str` or `Path`, *optional*, defaults to `"opd_demo"`):
            Folder for `report.md`, `curves.png`, `results.json`, and `runs.html` (as `trl-opd report` writes it).
        seed (`int`, *optional*, defaults to `0`):
            Seed of everything: the problems, the models and the sampling.
        fast (`bool`, *optional*, defaults to `False`):
            A few steps of everything, to see that it runs. Nothing is learned.
        settings ([`Settings`], *optional*):
            Sizes, budget and learning rates. Defaults to those of the demo, or of the fast one.

    Returns:
        `dict[str, Any]`: The results, as in `results.json`.
    """
    started = time.perf_counter()
    settings = settings or (FAST if fast else Settings())
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    datasets_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    # Models this small gain little from a second thread, and lose much to it on a machine that is busy.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Deprecations inside TRL and Transformers are not the business of someone who watches a demo.
            warnings.simplefilter("ignore", FutureWarning)
            # The trainers want folders of their own; of what they leave there the report is kept.
            with tempfile.TemporaryDirectory() as scratch:
                results = _run(Path(scratch), seed, settings)
                write_page([Path(scratch) / name for name in ("opd", "opd_lora")], output_dir / "runs.html")
    finally:
        torch.set_num_threads(num_threads)
        transformers.logging.set_verbosity(verbosity)
        if not datasets_bars:
            datasets.enable_progress_bars()
    results["seconds"] = time.perf_counter() - started
    print_table(results)
    write_report(results, output_dir)
    print(f"The two distillations, step by step and token by token: {output_dir / 'runs.html'}")
    print(f"Report: {output_dir / 'report.md'} ({results['seconds']:.0f} s in all)")
    return results


def _run(scratch: Path, seed: int, settings: Settings) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    task = AdditionTask(settings.num_digits, settings.num_held_out, seed)
    # Each use draws from its own seed; the factor keeps the seeds of two runs apart.
    seed_base = 1000 * seed
    print(f"Task: {task.held_out[0]}{solve(task.held_out[0])} (all numbers last digit first)")
    start = time.perf_counter()
    teacher = train_teacher(task, tokenizer, settings, seed_base, scratch)
    evaluator = Evaluator(task, tokenizer, teacher)
    about_teacher = _describe(evaluator, teacher, start)
    start = time.perf_counter()
    student = warm_up_student(task, tokenizer, settings, seed_base, scratch)
    about_start = _describe(evaluator, student, start)
    print(
        f"Teacher: {about_teacher['accuracy']:.1%} of the held-out problems. Student's start: "
        f"{about_start['accuracy']:.1%}. Now four methods, {settings.budget:,} sampled tokens each."
    )
    bench = Workbench(student, teacher, task, tokenizer, evaluator, settings, seed_base, scratch)
    curves = [distill(bench), distill(bench, lora=True), reinforce(bench), imitate(bench)]
    return {
        "task": f"Reversed {settings.num_digits}-digit addition",
        "seed": seed,
        "num_held_out": settings.num_held_out,
        "teacher": about_teacher,
        "start": about_start,
        "methods": [curve.as_dict() for curve in curves],
        "settings": asdict(settings),
    }
