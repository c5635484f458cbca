# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The four ways the demo continues from the same student, each until it has sampled the same number of tokens."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerState
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ..config import OnPolicyDistillConfig
from ..trainer import OnPolicyDistillTrainer
from .evaluation import BudgetCallback, Curve, Evaluator, generate
from .stages import Settings, shared_arguments, train
from .task import AdditionTask, accuracy_reward, prompt_dataset, solve, supervised_dataset


@dataclass
class Workbench:
    """What all methods share: the start, the teacher, the task, and where to measure and write."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    task: AdditionTask
    tokenizer: PreTrainedTokenizerFast
    evaluator: Evaluator
    settings: Settings
    seed: int
    output_dir: Path

    def start(self) -> PreTrainedModel:
        """A copy of the warmed-up student. Not a deep copy: trainers leave patches that are bound to the original."""
        model = type(self.student)(self.student.config)
        model.load_state_dict(self.student.state_dict())
        return model

    @property
    def max_steps(self) -> int:
        """
        Steps of the learning-rate schedule: what the budget takes if completions are as long as right answers, and a
        tenth more, so that it is the budget that stops a run.
        """
        mean_length = sum(len(solve(problem)) + 1 for problem in self.task.held_out) / len(self.task.held_out)
        return math.ceil(1.1 * self.settings.budget / (self.settings.batch_size * mean_length))

    def arguments(self, config_class: type, method: str, **overrides: Any):
        """Arguments of a method: the same batch, schedule and seed for all of them, the learning rate its own."""
        return shared_arguments(
            config_class,
            self.output_dir / method,
            seed=self.seed,
            per_device_train_batch_size=self.settings.batch_size,
            learning_rate=self.settings.learning_rates[method],
            max_steps=self.max_steps,
            lr_scheduler_type="linear",
            warmup_steps=min(20, self.max_steps // 10),
            **overrides,
        )

    def on_policy_arguments(self, config_class: type, method: str, num_generations: int, **overrides: Any):
        """Arguments of the methods that sample from the student."""
        return self.arguments(
            config_class,
            method,
            num_generations=num_generations,
            max_completion_length=self.task.max_completion_length,
            temperature=1.0,
            **overrides,
        )

    def problems(self) -> list[str]:
        """The same training problems for every method, more than any of them can use up."""
        return self.task.sample(self.settings.budget, self.seed + 5)

    def count_sampled(self, state: TrainerState) -> int:
        """Completion tokens of a GRPO-like run: it counts prompts too, and all prompts here have the same length."""
        prompt_length = len(self.tokenizer(self.task.held_out[0])["input_ids"])
        return int(state.num_input_tokens_seen) - state.global_step * self.settings.batch_size * prompt_length

    def callback(self, curve: Curve, count_tokens: Callable[[TrainerState], int]) -> BudgetCallback:
        """The callback that measures and stops a run."""
        return BudgetCallback(curve, self.evaluator, self.settings.budget, self.settings.num_points, count_tokens)

    def finish(self, curve: Curve, model: PreTrainedModel) -> Curve:
        """Add the greedy accuracy of the trained model."""
        curve.greedy_accuracy = self.evaluator.accuracy(model, greedy=True)[0]
        return curve


def distill(bench: Workbench, lora: bool = False) -> Curve:
    """
    On-policy distillation: the student samples, the teacher answers on every token.

    Args:
        bench ([`Workbench`]):
            Start, teacher and settings.
        lora (`bool`, *optional*, defaults to `False`):
            Train a LoRA adapter on every linear layer in place of all weights.

    Returns:
        [`Curve`]: What happened.
    """
    method = "opd_lora" if lora else "opd"
    curve = Curve("OPD (LoRA)" if lora else "OPD (full)")
    rank = bench.settings.lora_rank
    trainer = OnPolicyDistillTrainer(
        model=bench.start(),
        teacher_model=bench.teacher,
        args=bench.on_policy_arguments(
            OnPolicyDistillConfig, method, num_generations=1, logging_strategy="steps", logging_steps=5
        ),
        train_dataset=prompt_dataset(bench.problems()),
        processing_class=bench.tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear") if lora else None,
        callbacks=[bench.callback(curve, bench.count_sampled)],
    )
    train(trainer)
    return bench.finish(curve, trainer.model)


def reinforce(bench: Workbench) -> Curve:
    """
    GRPO on the task's reward: 1 for a right answer, 0 for a wrong one.

    Args:
        bench ([`Workbench`]):
            Start and settings; the teacher only measures.

    Returns:
        [`Curve`]: What happened.
    """
    curve = Curve("GRPO")
    trainer = GRPOTrainer(
        model=bench.start(),
        reward_funcs=accuracy_reward,
        args=bench.on_policy_arguments(GRPOConfig, "grpo", num_generations=bench.settings.num_generations),
        train_dataset=prompt_dataset(bench.problems()),
        processing_class=bench.tokenizer,
        callbacks=[bench.callback(curve, bench.count_sampled)],
    )
    train(trainer)
    return bench.finish(curve, trainer.model)


def sample_from_teacher(bench: Workbench) -> tuple[list[str], list[list[int]]]:
    """Problems and the teacher's completions at temperature 1, in whole batches, until they hold the budget."""
    problems, batch_size = bench.problems(), bench.settings.batch_size
    completion_ids: list[list[int]] = []
    tokens = 0
    with tqdm(total=bench.settings.budget, desc="teacher samples", unit="tok", unit_scale=True) as bar:
        while tokens < bench.settings.budget:
            prompts = problems[len(completion_ids) : len(completion_ids) + batch_size]
            drawn = generate(bench.teacher, bench.tokenizer, prompts, bench.task.max_completion_length)
            completion_ids += drawn
            tokens += sum(map(len, drawn))
            bar.update(min(tokens, bench.settings.budget) - bar.n)
    return problems[: len(completion_ids)], completion_ids


def imitate(bench: Workbench) -> Curve:
    """
    SFT on the teacher's samples, each used once, so that it also takes about as many optimizer steps as the others.

    Args:
        bench ([`Workbench`]):
            Start, teacher and settings.

    Returns:
        [`Curve`]: What happened. Its seconds include the teacher's sampling.
    """
    curve = Curve("SFT (teacher)")
    start = time.perf_counter()
    torch.manual_seed(bench.seed)
    problems, completion_ids = sample_from_teacher(bench)
    curve.seconds = time.perf_counter() - start
    batch_size = bench.settings.batch_size
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    used = lengths.view(-1, batch_size).sum(1).cumsum(0).tolist()
    trainer = SFTTrainer(
        model=bench.start(),
        args=bench.arguments(
            SFTConfig,
            "sft",
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=supervised_dataset(problems, completion_ids, bench.tokenizer),
        processing_class=bench.tokenizer,
        callbacks=[bench.callback(curve, lambda state: used[state.global_step - 1])],
    )
    train(trainer)
    return bench.finish(curve, trainer.model)
