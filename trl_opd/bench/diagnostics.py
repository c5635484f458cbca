# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the diagnostics cost: training steps with them and without, in turn, of one trainer.

    trl-opd bench diagnostics                                  # Qwen3 shapes, hidden 128 and 256, 32k, on the CPU
    trl-opd bench diagnostics --device cuda --student-hidden 1024 --teacher-hidden 2048 --layers 28 --vocab 151936 \\
        --batch 16 --prompt 128 --completion 1024 --random-rollouts --json diagnostics.json

A window is `logging_steps` steps and their log line. One has diagnostics, its neighbour has none; which of the two
comes first changes from pair to pair. With `logging_steps=1` every step is logged, and has the statistics that cost a
pass over the vocabulary (the sampled tokens' ranks); with 10 one in ten. Token view and alarms are off. A cost is that
of one pair: the median of all is shown, with the quartiles, for the step and for the step without the time that
sampling took. On a CPU seconds are those of the process, which neighbours slow down less than the wall clock's. There,
`own` is what the diagnostics' methods and the ranks took themselves, timed from outside: it is known far better than
the difference of two steps, and the target is for it. On CUDA, where such a timer would have to wait for the device,
the target is for the pairs, and `own` is the host's time in the methods.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from .. import OnPolicyDistillConfig, OnPolicyDistillTrainer
from ..kernels import torch_backend
from .measure import machine, show_table, summary, synchronize, write_json
from .trainers import _random_rollouts, make_model, make_tokenizer

TARGET = 0.01  # of the step
HOOKS = ("note_rollouts", "note_tokens", "before_log")


class Turns(TrainerCallback):
    """
    Turns the diagnostics of a trainer on and off from window to window, and keeps the seconds of each.

    Args:
        device (`torch.device`): Where it trains.
        size (`int`): Steps of a window.
        pairs (`int`): Number of pairs of windows. A window before the first one, and a step after the last, are not
            counted.
    """

    def __init__(self, device: torch.device, size: int, pairs: int):
        self.device, self.size = device, size
        self.order = [False, *(on for i in range(pairs) for on in ((True, False) if i % 2 else (False, True)))]
        self.windows: list[dict[str, float]] = []
        self._seconds = {"sampling": 0.0, "own": 0.0}
        self._mark = 0.0
        self._step = 0

    @property
    def max_steps(self) -> int:
        return len(self.order) * self.size + 1

    def watch(self, trainer: Any) -> None:
        """Put the timers in place."""
        self.trainer = trainer
        trainer._generate_single_turn = self._timed("sampling", trainer._generate_single_turn)
        for name in HOOKS:
            setattr(trainer._diagnostics, name, self._timed("own", getattr(trainer._diagnostics, name)))

    @contextlib.contextmanager
    def watch_ranks(self) -> Iterator[None]:
        """Inside, the ranks are timed too, if they are found on a CPU."""
        module: Any = torch_backend
        find = module.further_statistics
        if self.device.type == "cpu":
            module.further_statistics = self._timed("own", find)
        try:
            yield
        finally:
            module.further_statistics = find

    def _now(self) -> float:
        synchronize(self.device)
        return self._clock()

    def _clock(self) -> float:
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        now = self._now if name == "sampling" else self._clock  # the methods do not wait for the device

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[name] += now() - start

        return timed

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        window, place = divmod(self._step, self.size)
        self._step += 1
        if place:
            return
        now = self._now()
        if window:
            known = {"step": now - self._mark, **self._seconds}
            self.windows.append({name: seconds / self.size for name, seconds in known.items()})
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        if window < len(self.order):
            self.trainer._diagnostics.active = self.order[window]
        self._mark = self._now()

    def pairs(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Seconds a step of each pair of windows, with diagnostics and without."""
        own = list(zip(self.order[1:], self.windows[1:], strict=True))
        return [(a, b) if on else (b, a) for (on, a), (_, b) in zip(own[::2], own[1::2], strict=True)]


def make_trainer(turns: Turns, args: argparse.Namespace, directory: str) -> Any:
    """The trainer, with its timers."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, args.vocab, (args.batch * 4, args.prompt), generator=g)
    config = OnPolicyDistillConfig(
        output_dir=directory,
        token_view=0,
        on_alarm="off",
        preflight="off",
        per_device_train_batch_size=args.batch,
        max_completion_length=args.completion,
        generation_kwargs={"min_new_tokens": args.completion},
        max_steps=turns.max_steps,
        learning_rate=1e-4,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.precision == "bf16",
        use_cpu=args.device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=turns.size,
    )
    trainer: Any = OnPolicyDistillTrainer(
        args=config,
        model=make_model(args.student_hidden, args, 0),
        teacher_model=make_model(args.teacher_hidden, args, 1),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids.tolist()]}),
        processing_class=make_tokenizer(args.vocab),
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    if args.random_rollouts:
        trainer._generate_single_turn = _random_rollouts(args, with_logprobs=True)
    turns.watch(trainer)
    return trainer


def measure(logging_steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Figures for one `logging_steps`."""
    turns = Turns(torch.device(args.device), logging_steps, args.steps // logging_steps)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(turns, args, directory)
        with turns.watch_ranks():
            trainer.train()
    return {"logging_steps": logging_steps, **figures(turns.pairs())}


def figures(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """From the seconds a step of each pair of windows, with diagnostics and without."""
    own = statistics.median(on["own"] - off["own"] for on, off in pairs)  # the timers are in both
    off_s = statistics.median(off["step"] for _, off in pairs)
    return {
        "on": summary([on["step"] for on, _ in pairs]),
        "off": summary([off["step"] for _, off in pairs]),
        "sampling_s": statistics.median(off["sampling"] for _, off in pairs),
        "own_s": own,
        "own_share": own / off_s,
        "cost": _quartiles([on["step"] / off["step"] - 1 for on, off in pairs]),
        "cost_without_sampling": _quartiles(
            [(on["step"] - on["sampling"]) / (off["step"] - off["sampling"]) - 1 for on, off in pairs]
        ),
        "pairs": pairs,
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def show(rows: list[dict[str, Any]], device: str) -> str:
    """A table, and whether the target is met."""
    head = ["logging_steps", "off s", "on s", "cost", "no sampling", "own ms", "own"]
    lines, text = [], []
    for row in rows:
        costs = [_percent(row[name]) for name in ("cost", "cost_without_sampling")]
        own = [f"{1000 * row['own_s']:.2f}", f"{100 * row['own_share']:.2f}%"]
        seconds = [f"{row[side]['median_s']:.4f}" for side in ("off", "on")]
        lines.append([str(row["logging_steps"]), *seconds, *costs, *own])
        share = row["own_share"] if device == "cpu" else row["cost"]["median"]
        met = "met" if share < TARGET else "MISSED"
        text.append(f"logging_steps={row['logging_steps']}: target {met}: below {100 * TARGET:g}% of the step")
    return "\n".join([show_table(head, lines), *text])


def _percent(cost: dict[str, float]) -> str:
    return f"{100 * cost['median']:+.2f}% ({100 * cost['low']:+.2f} to {100 * cost['high']:+.2f})"


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
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32, on CUDA bf16")
    parser.add_argument("--logging-steps", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--steps", type=int, default=80, help="counted steps with diagnostics, and as many without")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="PATH", help="where to keep the figures")
    return parser


def main(argv: list[str] | None = None, prog: str = "trl-opd bench diagnostics") -> None:
    """Entry point of `trl-opd bench diagnostics`."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if any(steps < 1 or args.steps < steps or args.steps % steps for steps in args.logging_steps):
        parser.error(f"--steps must be a multiple of each of --logging-steps {args.logging_steps}, got {args.steps}")
    args.precision = args.precision or ("bf16" if torch.device(args.device).type == "cuda" else "fp32")
    torch.set_num_threads(args.threads)
    arguments = list(sys.argv[1:] if argv is None else argv)
    result: dict[str, Any] = {
        "command": " ".join(["trl-opd bench diagnostics", *arguments]),
        "arguments": {k: v for k, v in vars(args).items() if k != "json"},
        "machine": machine(torch.device(args.device)),
        "target": TARGET,
        "rows": [],
    }
    print(result["machine"], flush=True)
    for logging_steps in args.logging_steps:
        result["rows"].append(measure(logging_steps, args))
        write_json(args.json, result)
    print(show(result["rows"], torch.device(args.device).type))


if __name__ == "__main__":
    main()
