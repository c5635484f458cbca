# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
A whole training step: OnPolicyDistillTrainer beside TRL's DistillationTrainer, and where its seconds go.

    trl-opd bench step                                         # Qwen3 shapes, hidden 128 and 256, 32k, on the CPU
    trl-opd bench step --device cuda --student-hidden 1024 --teacher-hidden 2048 --layers 28 --vocab 151936 \\
        --batch 16 --prompt 128 --completion 1024 --random-rollouts --json step.json --png step.png

Same models, prompts, batch and completion length, reverse KL, in one process, taking turns: rounds of a few steps, the
first and the last of which are not counted (the last is logged). Every other step times itself and its rollout only;
these give the totals. The steps between them time every phase, and what those timers cost is printed. With
--random-rollouts both trainers get random completions: the step without generation, at lengths at which generation
would take all the time.

fp32: both trainers in float32. bf16: both with `bf16=True`, which TRL's DistillationTrainer ignores in its loss;
`trl_autocast` is TRL with autocast put back around its loss, so `trl / trl_autocast` is what that costs it, and
`trl_autocast / ours` the comparison at equal precision. With --weights bfloat16 everything is in bf16, TRL's too. Peak
memory is above what was there before the round, on a CPU in a process of its own, where it is an indication only.
"""

import argparse
import statistics
import sys
import tempfile
from typing import Any

import torch

from .measure import PeakMemory, in_words, machine, own_process, release, show_table, summary, write_json
from .phases import PHASES
from .trainers import StepClock, make_trainer, watched_head

TARGET = 1.3  # TRL's time without generation over ours, at equal precision


def run_precision(precision: str, args: argparse.Namespace, directory: str) -> list[dict[str, Any]]:
    """One row for each trainer at a precision: figures, or a `problem` in words."""
    device = torch.device(args.device)
    names = ["ours", "trl"] + (["trl_autocast"] if precision == "bf16" else [])
    rows: dict[str, dict[str, Any]] = {name: {"name": name, "precision": precision} for name in names}
    trainers: dict[str, tuple[Any, StepClock]] = {}
    steps: dict[str, list[tuple[bool, dict[str, float]]]] = {name: [] for name in names}
    for i in range(-1, args.rounds):  # before the first round they are made
        for name in [name for name in names if "problem" not in rows[name]]:
            try:
                if i < 0:
                    trainers[name] = make_trainer(name, precision, args, directory)
                else:
                    steps[name] += _round(rows[name], *trainers[name])
            except Exception as error:  # of whatever kind: the others are still to be measured
                rows[name]["problem"] = in_words(error)
            if "problem" in rows[name]:
                trainers.pop(name, None)
                release(device)
    trainers.clear()
    release(device)
    for name, row in rows.items():
        if "problem" in row:
            continue
        row |= figures(args.batch * args.completion, steps[name])
        if device.type == "cpu":
            row.pop("peak_mib")
            if args.memory:
                try:
                    row["peak_mib"] = _own_peak(name, precision, args)
                except RuntimeError as error:
                    row["remark"] = f"memory not measured: {in_words(error)}"
    return list(rows.values())


def _round(row: dict[str, Any], trainer: Any, clock: StepClock) -> list[tuple[bool, dict[str, float]]]:
    """The counted steps of a round. Of peak and loss the last round's stay: the first makes the optimizer's state."""
    clock.timer.steps = []
    with PeakMemory(clock.timer.device) as memory, watched_head(row["name"], clock):
        row["loss"] = trainer.train().training_loss
    row["peak_mib"] = memory.mib
    return clock.timer.steps[1:-1]


def figures(tokens: int, steps: list[tuple[bool, dict[str, float]]]) -> dict[str, Any]:
    """Figures of a trainer from its steps: totals from those that are not detailed, phases from those that are."""
    plain = [phases for is_detailed, phases in steps if not is_detailed]
    detailed = [phases for is_detailed, phases in steps if is_detailed]
    totals = [sum(step.values()) for step in plain]
    timed = [sum(step.values()) for step in detailed]
    return {
        **summary(totals),
        "without_generation": summary([sum(step.values()) - step["rollout"] for step in plain]),
        "tokens_per_s": tokens / statistics.median(totals),
        "phases": {phase: statistics.median(step[phase] for step in detailed) for phase in PHASES},
        "detailed_step_s": statistics.median(timed),
        "cost_of_timers": statistics.median(timed) / statistics.median(totals) - 1,
        "steps": plain,
        "detailed_steps": detailed,
    }


def _own_peak(name: str, precision: str, args: argparse.Namespace) -> float:
    arguments = ["--memory-of", name, "--precision", precision]
    for key in ("student_hidden", "teacher_hidden", "layers", "vocab", "batch", "prompt", "completion", "threads",
                "weights"):  # fmt: skip
        arguments += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    for key in ("random_rollouts", "gradient_checkpointing"):
        arguments += [f"--{key.replace('_', '-')}"] if getattr(args, key) else []
    return own_process("trl_opd.bench.step", arguments)


def print_peak(args: argparse.Namespace) -> None:
    """The other side of [`own_process`]: the peak of a few steps above the models and the trainer."""
    args.steps = 1
    with tempfile.TemporaryDirectory() as directory:
        trainer, _ = make_trainer(args.memory_of, args.precision[0], args, directory)
        with PeakMemory(torch.device(args.device)) as memory:
            trainer.train()
    print(memory.mib)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios of interest: medians over pairs of steps, with their range."""
    found = []
    by_name = {(row["precision"], row["name"]): row["steps"] for row in rows if "steps" in row}
    equal = {"fp32": "trl", "bf16": "trl_autocast"}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        pairs = [("trl", "ours", "as configured"), (equal[precision], "ours", "at equal precision")]
        if precision == "fp32":
            pairs = pairs[1:]
        else:
            pairs.append(("trl", "trl_autocast", "what TRL's ignored bf16 costs it"))
        for slow, fast, what in pairs:
            if (precision, slow) not in by_name or (precision, fast) not in by_name:
                continue
            steps = by_name[precision, slow], by_name[precision, fast]
            for scope in ("step", "step without generation"):
                drop = {"rollout"} if scope != "step" else set()
                sums = [[sum(v for k, v in step.items() if k not in drop) for step in side] for side in steps]
                ratios = [a / b for a, b in zip(*sums, strict=True)]
                target = TARGET if drop and what == "at equal precision" else None
                found.append(
                    {"precision": precision, "slow": slow, "fast": fast, "what": what, "scope": scope}
                    | {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "target": target}
                )
    return found


def show(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> str:
    """Tables of the steps, and the ratios in lines."""
    head = ["", "median s", "min", "max", "no gen. s", "tokens/s", "MiB", "loss", *PHASES, "timers"]
    lines: list[list[str]] = []
    for row in rows:
        if "problem" in row:
            lines.append([f"{row['name']} {row['precision']}", row["problem"]])
            continue
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        seconds = [row["median_s"], row["min_s"], row["max_s"], row["without_generation"]["median_s"]]
        phases = [f"{row['phases'][phase]:.3f}" for phase in PHASES]
        line = [f"{row['name']} {row['precision']}", *(f"{s:.3f}" for s in seconds)]
        line += [f"{row['tokens_per_s']:.0f}", peak, f"{row['loss']:.5f}", *phases]
        lines.append([*line, f"{100 * row['cost_of_timers']:+.1f}%"])
    text = [show_table(head, lines), *(f"  {row['name']}: {row['remark']}" for row in rows if "remark" in row), ""]
    for r in ratios:
        sentence = f"{r['precision']}: {r['slow']} / {r['fast']}, {r['scope']}, {r['what']}: "
        sentence += f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"
        if r["target"]:
            sentence += f" – target {'met' if r['median'] >= r['target'] else 'MISSED'}: at least {r['target']:g}"
        text.append(sentence)
    return "\n".join(text)


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student-hidden", type=int, default=128)
    parser.add_argument("--teacher-hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2, help="of both models")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--random-rollouts", action="store_true", help="random completions instead of sampled ones")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"), help="dtype of both models")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), help="default: fp32, on CUDA both")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a round, of each kind")
    parser.add_argument("--rounds", type=int, default=4, help="in which the trainers take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="on a CPU, do not measure peak memory"
    )
    parser.add_argument("--json", metavar="PATH", help="where to keep the figures")
    parser.add_argument("--png", metavar="PATH", help="where to draw them (needs trl-opd[plots])")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every precision in turn; the JSON file is up to date after each."""
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "png", "memory_of", "argv")}
    result: dict[str, Any] = {
        "command": " ".join(["trl-opd bench step", *args.argv]),
        "arguments": settings,
        "machine": machine(torch.device(args.device)),
        "tokens_per_step": args.batch * args.completion,
        "rows": [],
    }
    print(result["machine"], flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for precision in args.precision:
            result["rows"] += run_precision(precision, args, directory)
            result["ratios"] = compare(result["rows"])
            write_json(args.json, result)
    print(show(result["rows"], result["ratios"]))
    return result


def main(argv: list[str] | None = None, prog: str = "trl-opd bench step") -> None:
    """Entry point of `trl-opd bench step`."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.weights == "bfloat16":
        if args.precision and "fp32" in args.precision:
            parser.error("--precision fp32 needs --weights float32: without autocast, bf16 weights compute in bf16")
        args.precision = ["bf16"]
    args.precision = args.precision or (["fp32", "bf16"] if torch.device(args.device).type == "cuda" else ["fp32"])
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak(args)
        return
    result = run(args)
    if args.png:
        from .plots import plot_step

        plot_step(result, args.png)


if __name__ == "__main__":
    main()
