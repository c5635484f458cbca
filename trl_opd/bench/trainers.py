# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The trainers of `trl-opd bench step`: ours and TRL's on the same random models and prompts, with timers in place."""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from .. import OnPolicyDistillConfig, OnPolicyDistillTrainer
from .. import distill_head as our_head
from .phases import PhaseTimer, WatchedHead, watch


class StepClock(TrainerCallback):
    """Tells a timer where an optimizer step begins and ends, and that every other one is detailed."""

    def __init__(self, timer: PhaseTimer):
        self.timer = timer
        self.head: WatchedHead | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.head is not None:
            self.head.refresh()
        self.timer.detailed = len(self.timer.steps) % 2 == 0
        self.timer.begin_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.timer.end_step()


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word for each entry."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(hidden: int, args: argparse.Namespace, seed: int) -> Qwen3ForCausalLM:
    """A random model of Qwen3's shape."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(args.device):
        return Qwen3ForCausalLM(config).to(getattr(torch, args.weights))


def make_trainer(name: str, precision: str, args: argparse.Namespace, directory: str) -> tuple[Any, StepClock]:
    """A trainer of the benchmark, with its timers: `ours`, `trl`, or `trl_autocast`."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, args.vocab, (args.batch * 4, args.prompt), generator=g)
    prompts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    clock = StepClock(PhaseTimer(torch.device(args.device)))
    common = {
        "output_dir": directory,
        "per_device_train_batch_size": args.batch,
        "max_completion_length": args.completion,
        "generation_kwargs": {"min_new_tokens": args.completion},
        "max_steps": 2 * args.steps + 2,
        "learning_rate": 1e-4,
        "gradient_checkpointing": args.gradient_checkpointing,
        "bf16": precision == "bf16",
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**6,
    }
    teacher = make_model(args.teacher_hidden, args, 1)
    shared = {
        "model": make_model(args.student_hidden, args, 0),
        "teacher_model": teacher,
        "train_dataset": Dataset.from_dict({"prompt": prompts}),
        "processing_class": make_tokenizer(args.vocab),
        "callbacks": [clock],
    }
    trainer: Any
    if name == "ours":
        trainer = OnPolicyDistillTrainer(args=OnPolicyDistillConfig(**common), **shared)
    else:
        trainer = DistillationTrainer(args=DistillationConfig(beta=1.0, **common), **shared)
    if name == "trl_autocast":
        loss = trainer._compute_loss
        trainer._compute_loss = functools.partial(_autocast, args.device, loss)
    if args.random_rollouts:
        trainer._generate_single_turn = _random_rollouts(args, with_logprobs=name == "ours")
    watch(clock.timer, trainer, teacher)
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def _autocast(device: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        return function(*args, **kwargs)


def _random_rollouts(args: argparse.Namespace, with_logprobs: bool) -> Any:
    g = torch.Generator().manual_seed(0)

    def generate(prompt_ids: list[Any], *_: Any, **__: Any) -> Any:
        ids = torch.randint(2, args.vocab, (len(prompt_ids), args.completion), generator=g).tolist()
        return (ids, None) if with_logprobs else ids

    return generate


@contextlib.contextmanager
def watched_head(name: str, clock: StepClock) -> Iterator[None]:
    """Timers around what a trainer calls for its head."""
    if name == "ours":
        head = WatchedHead(clock.timer, our_head, "fused_linear_divergence", "trl_opd.kernels")
    else:
        head = WatchedHead(clock.timer, distillation_trainer, "_chunked_divergence_loss", "trl.kernels")
    with head:
        clock.head = head
        yield
