# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""How the demo measures: held-out accuracy, reverse KL on the student's own samples, and tokens sampled so far."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerState,
)

from ..losses import reverse_kl
from .task import AdditionTask, is_correct


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    max_new_tokens: int,
    greedy: bool = False,
) -> list[list[int]]:
    """
    Sample one completion a prompt, at temperature 1 from the full vocabulary or greedily.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to sample from.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Its tokenizer, padding on the left.
        prompts (`list[str]`):
            Problems.
        max_new_tokens (`int`):
            Length at which a completion is cut.
        greedy (`bool`, *optional*, defaults to `False`):
            Take the most probable token instead of sampling.

    Returns:
        `list[list[int]]`: Completion token ids, up to the end-of-sequence token and including it.
    """
    eos_token_id = tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else 1.0,
        top_k=None if greedy else 0,
        top_p=None if greedy else 1.0,
        eos_token_id=eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        disable_compile=True,
    )
    was_training = model.training
    model.eval()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    output = model.generate(**inputs, generation_config=config)
    model.train(was_training)
    completions = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids for ids in completions]


@torch.no_grad()
def mean_reverse_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    completion_ids: list[list[int]],
) -> float:
    """
    Reverse KL of student to teacher, exact over the vocabulary at each completion token, in nats per token.

    Args:
        student ([`~transformers.PreTrainedModel`]):
            Model that sampled the completions.
        teacher ([`~transformers.PreTrainedModel`]):
            Model to compare with.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer of both.
        prompts (`list[str]`):
            Problems.
        completion_ids (`list[list[int]]`):
            The student's samples.

    Returns:
        `float`: Mean over all completion tokens, the end-of-sequence tokens included.
    """
    prompt_ids = tokenizer(prompts)["input_ids"]
    sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    # Padding on the right: under causal attention it changes nothing before it.
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt").to(student.device)
    position = torch.arange(batch["input_ids"].shape[1], device=student.device)
    prompt_length = torch.tensor([len(ids) for ids in prompt_ids], device=student.device).unsqueeze(1)
    length = torch.tensor([len(ids) for ids in sequences], device=student.device).unsqueeze(1)
    # The logits at position i answer for the token at i + 1.
    predicts_completion = (position >= prompt_length - 1) & (position < length - 1)
    student_logprobs, teacher_logprobs = (
        model(**batch).logits[predicts_completion].float().log_softmax(-1) for model in (student, teacher)
    )
    return reverse_kl(student_logprobs, teacher_logprobs).mean().item()


@dataclass
class Point:
    """One measurement, after `tokens` were sampled: `accuracy` of samples at temperature 1, `reverse_kl` on them."""

    tokens: int
    step: int
    accuracy: float
    reverse_kl: float


@dataclass
class Evaluator:
    """
    Measures a model on fixed problems, always with the same random numbers and without moving anyone else's.

    Args:
        task ([`AdditionTask`]):
            Task that the problems come from.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer of the models.
        teacher ([`~transformers.PreTrainedModel`] or `None`):
            Teacher of the reverse KL; `None` skips it (NaN).
        problems (`list[str]`, *optional*):
            Problems to measure on. Defaults to the task's held-out ones.
    """

    task: AdditionTask
    tokenizer: PreTrainedTokenizerFast
    teacher: PreTrainedModel | None = None
    problems: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.problems = self.problems or self.task.held_out

    def accuracy(self, model: PreTrainedModel, greedy: bool) -> tuple[float, list[list[int]]]:
        """Share of problems answered right by greedy decoding or at temperature 1, and the completions."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.task.seed)
            prompts = self.problems
            completion_ids = generate(model, self.tokenizer, prompts, self.task.max_completion_length, greedy=greedy)
        completions = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return sum(map(is_correct, prompts, completions)) / len(prompts), completion_ids

    def measure(self, model: PreTrainedModel, tokens: int = 0, step: int = 0) -> Point:
        """Take one [`Point`] of a curve."""
        was_training = model.training
        model.eval()
        accuracy, completion_ids = self.accuracy(model, greedy=False)
        gap = float("nan")
        if self.teacher is not None:
            gap = mean_reverse_kl(model, self.teacher, self.tokenizer, self.problems, completion_ids)
        model.train(was_training)
        return Point(tokens=tokens, step=step, accuracy=accuracy, reverse_kl=gap)


@dataclass
class Curve:
    """What one method did: its points, the tokens it sampled, and its seconds without the measurements."""

    name: str
    points: list[Point] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    greedy_accuracy: float = float("nan")

    def as_dict(self) -> dict:
        """The curve as plain data for JSON."""
        return asdict(self)


class BudgetCallback(TrainerCallback):
    """
    Counts sampled tokens, draws the progress bar, takes points along the way and stops when the budget is spent.

    Args:
        curve ([`Curve`]):
            Where points, tokens and seconds are written.
        evaluator ([`Evaluator`]):
            Takes the measurements.
        budget (`int`):
            Tokens after which training stops. The step that crosses it is finished, so the count ends just above.
        num_points (`int`):
            Measurements spread over the budget, after the one at the start.
        count_tokens (`Callable[[TrainerState], int]`):
            Tokens sampled so far, from the trainer's state.
    """

    def __init__(
        self,
        curve: Curve,
        evaluator: Evaluator,
        budget: int,
        num_points: int,
        count_tokens: Callable[[TrainerState], int],
    ):
        self.curve = curve
        self.evaluator = evaluator
        self.budget = budget
        self.num_points = num_points
        self.count_tokens = count_tokens
        self._since = 0.0
        self._bar: Any = None

    def _measure(self, model, step: int) -> None:
        self.curve.seconds += time.perf_counter() - self._since
        point = self.evaluator.measure(model, tokens=self.curve.tokens, step=step)
        self.curve.points.append(point)
        self._bar.set_postfix(accuracy=f"{point.accuracy:.1%}", reverse_kl=f"{point.reverse_kl:.4f}")
        self._since = time.perf_counter()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._bar = tqdm(total=self.budget, desc=self.curve.name, unit="tok", unit_scale=True)
        self._since = time.perf_counter()
        self._measure(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        tokens = self.count_tokens(state)
        self._bar.update(min(tokens, self.budget) - self._bar.n)
        self.curve.tokens = tokens
        done = tokens >= self.budget or state.global_step >= state.max_steps
        if done or tokens >= len(self.curve.points) * self.budget / self.num_points:
            self._measure(model, state.global_step)
        control.should_training_stop = control.should_training_stop or done

    def on_train_end(self, args, state, control, **kwargs):
        self.curve.seconds += time.perf_counter() - self._since
        self._bar.close()
