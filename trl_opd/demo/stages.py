# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The demo's first stages: train a teacher from scratch and warm a weaker student up."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from .evaluation import Evaluator
from .task import AdditionTask, solve, supervised_dataset


@dataclass(frozen=True)
class Shape:
    """Size of a tiny Qwen3: hidden size, layers, and hidden size of the MLP."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    initializer_range: float


@dataclass(frozen=True)
class Settings:
    """
    Everything the demo's outcome depends on, besides the seed.

    Args:
        num_digits (`int`, *optional*, defaults to `5`):
            Digits of each operand.
        budget (`int`, *optional*, defaults to `60000`):
            Tokens that each method samples, from the student or, for SFT, from the teacher.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions in each optimizer step of a method.
        num_points (`int`, *optional*, defaults to `10`):
            Measurements along a curve, after the one at the start.
        num_held_out (`int`, *optional*, defaults to `512`):
            Problems in a measurement.
        teacher_shape ([`Shape`], *optional*):
            Size of the teacher.
        teacher_steps (`int`, *optional*, defaults to `600`):
            Optimizer steps of the teacher, each on 128 fresh problems.
        student_shape ([`Shape`], *optional*):
            Size of the student.
        warm_up_problems (`int`, *optional*, defaults to `2000`):
            Solved problems that the student sees before it meets the teacher.
        warm_up_accuracy (`float`, *optional*, defaults to `0.2`):
            Validation accuracy (sampled) at which the warm-up stops.
        warm_up_steps (`int`, *optional*, defaults to `800`):
            Steps after which it stops anyway.
        lora_rank (`int`, *optional*, defaults to `16`):
            Rank of the LoRA adapters, on every linear layer.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions a prompt for GRPO; the distillation takes one.
        learning_rates (`dict[str, float]`, *optional*):
            Learning rate of each method, chosen by a small sweep on seeds 0 and 3.
    """

    num_digits: int = 5
    budget: int = 60_000
    batch_size: int = 32
    num_points: int = 10
    num_held_out: int = 512
    teacher_shape: Shape = Shape(128, 2, 256, 0.06)
    teacher_steps: int = 600
    student_shape: Shape = Shape(64, 2, 128, 0.06)
    warm_up_problems: int = 2000
    warm_up_accuracy: float = 0.2
    warm_up_steps: int = 800
    lora_rank: int = 16
    num_generations: int = 8
    learning_rates: dict[str, float] = field(
        default_factory=lambda: {"opd": 2e-3, "opd_lora": 5e-3, "grpo": 6e-4, "sft": 2e-3}
    )


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of that shape. At these widths the default initialisation (0.02) learns slowly."""
    num_heads = 4
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=shape.hidden_size // num_heads,
        max_position_embeddings=64,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def shared_arguments(config_class: type, output_dir: Path, **overrides: Any):
    """Arguments that every stage shares: CPU, full precision, no logging, no checkpoints, no recomputation."""
    names = {f.name for f in fields(config_class)}
    # The newer name of `gradient_checkpointing`, where this version of Transformers has it.
    recompute = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        recompute: False,
        "adam_beta2": 0.98,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "num_train_epochs": 1,
    }
    return config_class(**arguments | overrides)


def train(trainer: Any) -> None:
    # With the trainer's own bar off, Transformers prints every log instead; the demo draws its own bars.
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _solved(task: AdditionTask, tokenizer: PreTrainedTokenizerFast, num_problems: int, seed: int):
    problems = task.sample(num_problems, seed)
    answers = tokenizer([solve(problem) + tokenizer.eos_token for problem in problems])["input_ids"]
    return supervised_dataset(problems, answers, tokenizer)


class StepsCallback(TrainerCallback):
    """Progress bar of a supervised stage, which may end it early by `is_done(model)`, asked every `check_every`."""

    def __init__(self, name: str, is_done: Callable[[PreTrainedModel], bool] | None = None, check_every: int = 5):
        self.name = name
        self.is_done = is_done
        self.check_every = check_every

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(total=state.max_steps, desc=self.name, unit="step")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._bar.update()
        if self.is_done is not None and state.global_step % self.check_every == 0 and self.is_done(model):
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


def train_teacher(
    task: AdditionTask, tokenizer: PreTrainedTokenizerFast, settings: Settings, seed: int, output_dir: Path
) -> PreTrainedModel:
    """Train the teacher from scratch on solved problems, each seen once."""
    batch_size = 128
    arguments = shared_arguments(
        SFTConfig,
        output_dir / "teacher",
        seed=seed,
        per_device_train_batch_size=batch_size,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=50,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    teacher = build_model(settings.teacher_shape, tokenizer, seed)
    dataset = _solved(task, tokenizer, batch_size * settings.teacher_steps, seed + 1)
    train(
        SFTTrainer(
            model=teacher,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[StepsCallback("teacher")],
        )
    )
    return teacher.eval()


def warm_up_student(
    task: AdditionTask, tokenizer: PreTrainedTokenizerFast, settings: Settings, seed: int, output_dir: Path
) -> PreTrainedModel:
    """Fine-tune a fresh student on few solved problems until it answers some of the validation problems."""
    # Neither the held-out problems nor (but by chance) those it trains on decide when it stops.
    validator = Evaluator(task, tokenizer, problems=task.sample(256, seed + 2))
    arguments = shared_arguments(
        SFTConfig,
        output_dir / "warm_up",
        seed=seed,
        per_device_train_batch_size=64,
        max_steps=settings.warm_up_steps,
        learning_rate=4e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=50,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    student = build_model(settings.student_shape, tokenizer, seed + 3)

    def is_done(model: PreTrainedModel) -> bool:
        return validator.accuracy(model, greedy=False)[0] >= settings.warm_up_accuracy

    train(
        SFTTrainer(
            model=student,
            args=arguments,
            train_dataset=_solved(task, tokenizer, settings.warm_up_problems, seed + 4),
            processing_class=tokenizer,
            callbacks=[StepsCallback("student warm-up", is_done)],
        )
    )
    return student
