# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""How the methods' test-bed measures a model: accuracy, both KLs to the teacher, diversity, length."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..demo.evaluation import generate
from ..demo.task import AdditionTask, is_correct
from ..losses import forward_kl, reverse_kl

# Columns of the table: the key, its head, the factor and the digits that it is shown with
METRICS: tuple[tuple[str, str, float, int], ...] = (
    ("accuracy", "accuracy %", 100.0, 1),
    ("greedy_accuracy", "greedy %", 100.0, 1),
    ("reverse_kl", "reverse KL", 1.0, 4),
    ("forward_kl", "forward KL", 1.0, 4),
    ("forward_kl_teacher", "forward KL (t)", 1.0, 4),
    ("distinct", "distinct", 1.0, 2),
    ("entropy", "entropy", 1.0, 3),
    ("length", "length", 1.0, 2),
)


@torch.no_grad()
def token_logprobs(model: Any, tokenizer: Any, prompts: Sequence[str], completion_ids: Sequence[list[int]]) -> Tensor:
    """
    Next-token log-probs of a model at each completion token, in the order of the completions.

    Args:
        model ([`~transformers.PreTrainedModel`]): Answers in evaluation mode, and is left in the mode that it was in.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Of the prompts.
        prompts (`Sequence[str]`): What this model reads before each completion.
        completion_ids (`Sequence[list[int]]`): The completions.

    Returns:
        `torch.Tensor`: `(N, V)`, N the number of all completion tokens.
    """
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    # Padding on the right: under causal attention it changes nothing before it
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    position = torch.arange(batch["input_ids"].shape[1])
    start = torch.tensor([len(ids) for ids in prompt_ids])[:, None]
    end = torch.tensor([len(ids) for ids in sequences])[:, None]
    was_training = model.training
    model.eval()
    logits = model(**batch).logits
    model.train(was_training)
    # The logits at position i answer for the token at i + 1
    return logits[(position >= start - 1) & (position < end - 1)].float().log_softmax(-1)


def entropy(logprobs: Tensor) -> float:
    """Mean entropy in nats per token, of log-probs `(N, V)`."""
    return -(logprobs.exp() * logprobs).sum(-1).mean().item()


def mean_distinct(samples: Sequence[Sequence[Hashable]]) -> float:
    """Mean number of different samples of a prompt, from the samples of each."""
    return sum(len(set(group)) for group in samples) / len(samples)


def measure(
    model: Any,
    teacher: Any,
    task: AdditionTask,
    tokenizer: Any,
    *,
    hints: Sequence[str] | None = None,
    hinted: bool = False,
    num_samples: int = 8,
    num_prompts: int = 64,
) -> dict[str, float]:
    """
    Measure a model on the task's held-out problems, always with the same random numbers, moving no others.

    Both KLs are exact over the vocabulary and means over tokens, the end-of-sequence tokens included. Where there are
    hints, the teacher reads them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The student.
        teacher ([`~transformers.PreTrainedModel`]): To compare with.
        task ([`AdditionTask`]): Its held-out problems are asked.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Of both.
        hints (`Sequence[str]`, *optional*): The held-out problems with hints.
        hinted (`bool`, *optional*, defaults to `False`): Whether the model reads those too.
        num_samples (`int`, *optional*, defaults to `8`): Samples of a prompt for `distinct`.
        num_prompts (`int`, *optional*, defaults to `64`): Prompts for `distinct`.

    Returns:
        `dict[str, float]`: By the keys of `METRICS`.
    """
    problems = task.held_out
    teachers = list(hints or problems)
    own = teachers if hinted else problems
    several = [prompt for prompt in own[:num_prompts] for _ in range(num_samples)]
    longest = task.max_completion_length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        samples = generate(model, tokenizer, own, longest)
        greedy = generate(model, tokenizer, own, longest, greedy=True)
        repeated = [tuple(ids) for ids in generate(model, tokenizer, several, longest)]
        torch.manual_seed(task.seed)
        written = generate(teacher, tokenizer, teachers, longest)
    student_logprobs = token_logprobs(model, tokenizer, own, samples)
    teacher_logprobs = token_logprobs(teacher, tokenizer, teachers, samples)
    on_text = token_logprobs(model, tokenizer, own, written), token_logprobs(teacher, tokenizer, teachers, written)
    groups = [repeated[i : i + num_samples] for i in range(0, len(repeated), num_samples)]
    return {
        "accuracy": _accuracy(problems, samples, tokenizer),
        "greedy_accuracy": _accuracy(problems, greedy, tokenizer),
        "reverse_kl": reverse_kl(student_logprobs, teacher_logprobs).mean().item(),
        "forward_kl": forward_kl(student_logprobs, teacher_logprobs).mean().item(),
        "forward_kl_teacher": forward_kl(*on_text).mean().item(),
        "distinct": mean_distinct(groups),
        "entropy": entropy(student_logprobs),
        "length": sum(map(len, samples)) / len(samples),
    }


def _accuracy(problems: Sequence[str], completion_ids: Sequence[list[int]], tokenizer: Any) -> float:
    completions = tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
    return sum(map(is_correct, problems, completions)) / len(problems)
