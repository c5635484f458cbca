# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What it costs to make a teacher fit: time, memory and accuracy of each way, beside the teacher as it is.

    trl-opd bench teacher                                      # a random Qwen3, hidden 512, 8 layers, on the CPU
    trl-opd bench teacher --model Qwen/Qwen3-8B --device cuda --weights bfloat16 --micro-batch 8 --generation 64 \\
        --prompt 256 --completion 2048 --json teacher.json --png teacher.png

One turn scores a generation batch as training does: in micro-batches, or all of it when its answers are collected
from CPU memory. Completions have random lengths between half and all of --completion. Each way takes turns with the
plain teacher in one process; `time` is the median of the ratios of their turns, with its range.

weights: MiB of all weights as they are stored. resident: those on the device while nothing is scored. moved: what
travels to the device in a turn. peak: what scoring takes above resident; on a CPU that of the process's resident set,
in a process of its own, an indication only. KL: mean KL(plain ‖ this) in nats over the scored tokens. With random
weights it tells the order of magnitude; give --model for that of a real teacher.

A CPU has no other memory to wait in: there, copies within its memory stand in for those to a device (marked *), so
that `moved` is what it would be, while `time` and `resident` must be measured on a GPU.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM

from ..collators import TeacherBatch, collate_teacher_batch
from ..kernels import fused_linear_divergence
from ..teachers.local import LocalTeacher
from ..teachers.memory import WaitingWeights, weight_bytes
from .measure import PeakMemory, in_words, machine, own_process, release, show_table, summary, take_turns, write_json

NEEDS_GPU = "left out: there is no other device"


def ways(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of [`LocalTeacher`] by name; the first is the plain teacher."""
    half = max(1, args.micro_batch // 2)
    found: dict[str, dict[str, Any]] = {
        "plain": {},
        "int8": {"quantization": "int8"},
        "bnb_8bit": {"quantization": "bnb_8bit"},
        "bnb_4bit": {"quantization": "bnb_4bit"},
        f"batch size {half}": {"batch_size": half},
        "batch size 1": {"batch_size": 1},
        "offload model": {"offload": "model"},
        "offload layers": {"offload": "layers"},
        f"offload layers, batch size {args.generation}": {"offload": "layers", "batch_size": args.generation},
        "int8, offload model": {"quantization": "int8", "offload": "model"},
        "device cpu": {"device": "cpu"},
    }
    if torch.cuda.device_count() > 1:
        found["device cuda:1"] = {"device": "cuda:1"}
    return found


def make_path(args: argparse.Namespace, directory: str) -> str:
    """Where the teacher is: `--model`, or a random one saved in `directory`."""
    if args.model:
        return args.model
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    path = Path(directory) / "teacher"
    if not path.exists():
        Qwen3ForCausalLM(config).to(getattr(torch, args.weights)).save_pretrained(path)
    return str(path)


def make_teacher(path: str, kwargs: dict[str, Any], args: argparse.Namespace) -> LocalTeacher:
    """A teacher in the way of `kwargs`, prepared as a trainer would."""
    teacher = LocalTeacher(path, dtype=getattr(torch, args.weights), **kwargs)
    state = SimpleNamespace(distributed_type="NO")
    settings = {"per_device_train_batch_size": args.micro_batch, "cast_lm_head_to_fp32": False}
    trainer: Any = SimpleNamespace(
        accelerator=Accelerator(cpu=torch.device(args.device).type == "cpu"),
        args=SimpleNamespace(**settings, distributed_state=state),
        is_deepspeed_enabled=False,
        is_fsdp_enabled=False,
        tools=[],
        environments=None,
    )
    teacher.prepare(trainer)
    return teacher


def make_batch(vocab: int, args: argparse.Namespace) -> TeacherBatch:
    """Random prompts, and completions of random lengths."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.completion // 2, args.completion + 1, (args.generation, 1), generator=g)
    inputs = {
        "prompt_ids": torch.randint(2, vocab, (args.generation, args.prompt), generator=g),
        "prompt_mask": torch.ones(args.generation, args.prompt, dtype=torch.long),
        "completion_ids": torch.randint(2, vocab, (args.generation, args.completion), generator=g),
        "completion_mask": (torch.arange(args.completion) < lengths).long(),
    }
    inputs = {key: value.to(args.device) for key, value in inputs.items()}
    return collate_teacher_batch(inputs, inputs["completion_mask"].bool())


def micro_batches(batch: TeacherBatch, size: int) -> list[tuple[torch.Tensor, TeacherBatch]]:
    """The generation batch as the loss sees it: indices and sequences."""
    rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device).split(size)
    return [(part, batch.select(part)) for part in rows]


@torch.no_grad()
def score(teacher: Any, batch: TeacherBatch, size: int, keep: bool = False) -> list[Any]:
    """Answers to a generation batch, micro-batch by micro-batch; dropped when used, as in training, unless `keep`."""
    pending = teacher.submit(batch) if hasattr(teacher, "submit") else None
    kept = []
    for rows, part in micro_batches(batch, size):
        scores = teacher(part) if pending is None else pending.collect(rows, part)
        if keep:
            kept.append(scores)
    return kept


def divergence(base: LocalTeacher, other: LocalTeacher, batch: TeacherBatch, size: int) -> float:
    """Mean KL(base ‖ other) over the scored tokens."""
    total = 0.0
    for rows, part in micro_batches(batch, size):
        theirs, ours = (score(teacher, part, len(rows), keep=True)[0] for teacher in (base, other))
        device = batch.input_ids.device
        total += float(
            fused_linear_divergence(
                ours.hidden_states.flatten(0, 1).to(device),
                ours.head.weight,
                theirs.hidden_states.flatten(0, 1).to(device),
                theirs.head.weight,
                divergence="forward_kl",
                token_weights=part.completion_mask.flatten().float(),
            ).loss
        )
    return total / float(batch.completion_mask.sum())


def measure(name: str, kwargs: dict[str, Any], base: Any, path: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of a way, taking turns with the plain teacher."""
    device = torch.device(args.device)
    before = _allocated(device)
    teacher = make_teacher(path, kwargs, args)
    batch = make_batch(base.vocab_size, args)
    waiting = sum(weights.nbytes for weights in teacher.waiting)
    row: dict[str, Any] = {
        "name": name,
        "arguments": kwargs,
        "weights_mib": weight_bytes(teacher.model) / 2**20,
        "resident_mib": (weight_bytes(teacher.model) - waiting) / 2**20,
        "kl": divergence(base, teacher, batch, args.micro_batch),
    }
    turns = {
        key: functools.partial(score, t, batch, args.micro_batch) for key, t in (("base", base), ("way", teacher))
    }
    with moves(device):
        times, problems = take_turns(turns, args.repeats, device)
    if problems:
        raise RuntimeError(next(iter(problems.values())))
    ratios = [a / b for a, b in zip(times["way"], times["base"], strict=True)]
    with moves(device) as moved:
        score(teacher, batch, args.micro_batch)
    row["moved_mib"] = sum(moved) / 2**20
    row["stand_in"] = device.type == "cpu" and waiting > 0
    row |= summary(times["way"])
    row["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    row["tokens_per_s"] = float(batch.completion_mask.sum()) / row["median_s"]
    if device.type == "cuda":
        row["resident_mib"] = (_allocated(device) - before) / 2**20
        with PeakMemory(device) as memory:
            score(teacher, batch, args.micro_batch)
        row["peak_mib"] = memory.mib
    return row


@contextlib.contextmanager
def moves(device: torch.device) -> Iterator[list[int]]:
    """Bytes of each weight that is brought to the device inside. On a CPU they are copied in its place."""
    to_device, moved = WaitingWeights._to_device, []

    def move(weights: WaitingWeights, part: torch.Tensor) -> torch.Tensor:
        moved.append(part.nbytes)
        return part.clone() if device.type == "cpu" else to_device(weights, part)

    WaitingWeights._to_device = move  # type: ignore[assignment, method-assign]
    try:
        yield moved
    finally:
        WaitingWeights._to_device = to_device  # type: ignore[method-assign]


def _allocated(device: torch.device) -> int:
    release(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _own_peak(name: str, path: str, args: argparse.Namespace) -> float:
    arguments = ["--memory-of", name, "--model", path]
    for key in ("weights", "micro_batch", "generation", "prompt", "completion", "threads"):
        arguments += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    return own_process("trl_opd.bench.teacher", arguments)


def print_peak(args: argparse.Namespace) -> None:
    """The other side of [`own_process`]: the peak of a turn above the loaded weights."""
    teacher = make_teacher(args.model, ways(args)[args.memory_of], args)
    batch = make_batch(teacher.vocab_size, args)
    device = torch.device(args.device)
    with moves(device), PeakMemory(device) as memory:
        score(teacher, batch, args.micro_batch)
    print(memory.mib)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn; the JSON file is up to date after each."""
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "command": " ".join(["trl-opd bench teacher", *args.argv]),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("json", "png", "memory_of", "argv")},
        "machine": machine(device),
        "rows": [],
    }
    for package in ("torchao", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result["machine"]["versions"][package] = importlib.metadata.version(package)
    print(result["machine"], flush=True)
    with tempfile.TemporaryDirectory() as directory:
        path = make_path(args, directory)
        base = make_teacher(path, {}, args)
        result["tokens"] = int(make_batch(base.vocab_size, args).completion_mask.sum())
        for name, kwargs in ways(args).items():
            if device.type == "cpu" and "device" in kwargs:
                result["rows"].append({"name": name, "problem": NEEDS_GPU})
                continue
            try:
                row = measure(name, kwargs, base, path, args)
                if device.type == "cpu" and args.memory:
                    row["peak_mib"] = _own_peak(name, path, args)
            except Exception as error:  # of whatever kind: the others are still to be measured
                row = {"name": name, "problem": in_words(error)}
            result["rows"].append(row)
            write_json(args.json, result)
    write_json(args.json, result)
    print(show(result["rows"]))
    return result


def show(rows: list[dict[str, Any]]) -> str:
    """A table."""
    lines = []
    for row in rows:
        if "problem" in row:
            lines.append([row["name"], row["problem"]])
            continue
        r = row["ratio"]
        cells = [f"{r['median']:.2f}", f"{r['min']:.2f}", f"{r['max']:.2f}", f"{row['tokens_per_s']:.0f}"]
        cells += [f"{row[key]:.1f}" for key in ("weights_mib", "resident_mib", "moved_mib")]
        cells += [f"{row['peak_mib']:.0f}" if "peak_mib" in row else "", f"{row['kl']:.1e}"]
        lines.append([row["name"] + "*" * row["stand_in"], *cells])
    return show_table(["", "time", "min", "max", "tokens/s", "weights MiB", "resident", "moved", "peak", "KL"], lines)


def plot(result: dict[str, Any], path: str) -> bool:
    """Bars of time, bytes of weights, and KL. Returns whether they were drawn."""
    from .plots import new_figure

    rows = [row for row in result["rows"] if "ratio" in row][::-1]
    figure = new_figure(11, 1.2 + 0.4 * len(rows))
    if figure is None:
        return False
    panels = figure.subplots(1, 3, sharey=True)
    names = [row["name"] + "*" * row["stand_in"] for row in rows]
    below = [row["ratio"]["median"] - row["ratio"]["min"] for row in rows]
    above = [row["ratio"]["max"] - row["ratio"]["median"] for row in rows]
    medians = [row["ratio"]["median"] for row in rows]
    panels[0].barh(names, medians, xerr=[below, above], capsize=2, color="#1b6ca8")
    panels[0].axvline(1.0, color="#2e2e2e", linewidth=1)
    panels[0].set(xlabel="time beside the plain teacher (median, min to max)")
    panels[1].barh(names, [row["weights_mib"] for row in rows], color="#bdbdbd", label="all")
    panels[1].barh(names, [row["resident_mib"] for row in rows], color="#e08e1b", height=0.4, label="on the device")
    panels[1].set(xlabel="MiB of weights")
    panels[1].legend(fontsize=7)
    panels[2].barh(names, [max(row["kl"], 1e-9) for row in rows], color="#b23a48")
    panels[2].set(xscale="log", xlabel="KL to the plain teacher, nats a token")
    figure.suptitle(f"Teacher: {result['machine']['device']}, {result['machine']['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="path or hub id of a teacher, instead of a random one")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"), help="dtype of the teacher")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of the student's micro-batch")
    parser.add_argument("--generation", type=int, default=16, help="sequences of a generation batch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=128, help="most tokens of a completion")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="on a CPU, do not measure peak memory"
    )
    parser.add_argument("--json", metavar="PATH", help="where to keep the figures")
    parser.add_argument("--png", metavar="PATH", help="where to draw them (needs trl-opd[plots])")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None, prog: str = "trl-opd bench teacher") -> None:
    """Entry point of `trl-opd bench teacher`."""
    args = make_parser(prog).parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak(args)
        return
    result = run(args)
    if args.png:
        plot(result, args.png)


if __name__ == "__main__":
    main()
