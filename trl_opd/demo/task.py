# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The demo's task: reversed multi-digit addition, its verifier and its tokenizer."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
CHARACTERS = "0123456789+="


def build_tokenizer() -> PreTrainedTokenizerFast:
    """
    Build the character-level tokenizer of the task: twelve characters, a pad and an end-of-sequence token.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: Left-padding tokenizer over 14 tokens. Nothing is downloaded.
    """
    vocab = {token: index for index, token in enumerate([*CHARACTERS, PAD_TOKEN, EOS_TOKEN])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, padding_side="left"
    )


def solve(prompt: str) -> str:
    """
    Right completion of a prompt. All numbers are written last digit first, so that carries run with the text and each
    digit of the answer stands at the same distance from the two digits that it adds.

    Args:
        prompt (`str`):
            Problem such as `"713+294="`, which asks for 317 + 492.

    Returns:
        `str`: Digits of the sum, last digit first (`"908"`), without the end-of-sequence token.
    """
    left, right = prompt.removesuffix("=").split("+")
    return str(int(left[::-1]) + int(right[::-1]))[::-1]


def is_correct(prompt: str, completion: str) -> bool:
    """
    Verify an answer against the problem stated in its own prompt.

    Args:
        prompt (`str`):
            Problem.
        completion (`str`):
            Answer without special tokens.

    Returns:
        `bool`: Whether it is exactly the right one.
    """
    return completion == solve(prompt)


def accuracy_reward(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """
    Reward function for [`~trl.GRPOTrainer`]: 1 for a right answer, 0 for a wrong one.

    Args:
        prompts (`list[str]`):
            One problem a completion.
        completions (`list[str]`):
            Answers without special tokens.
        **kwargs:
            Other columns and fields that TRL passes; unused.

    Returns:
        `list[float]`: One reward a completion.
    """
    return [float(is_correct(*pair)) for pair in zip(prompts, completions, strict=True)]


@dataclass
class AdditionTask:
    """
    Sums of two numbers of `num_digits` digits, with a held-out set that training never draws from.

    Args:
        num_digits (`int`, *optional*, defaults to `5`):
            Digits of each operand; neither has a leading zero.
        num_held_out (`int`, *optional*, defaults to `512`):
            Problems kept for evaluation.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the held-out draw. Training draws take their own seeds.
    """

    num_digits: int = 5
    num_held_out: int = 512
    seed: int = 0
    held_out: list[str] = field(init=False)

    def __post_init__(self):
        self.held_out = []
        # dict.fromkeys removes duplicates and keeps the order, so that a seed always gives the same problems.
        draw = dict.fromkeys(self._draw(2 * self.num_held_out, torch.Generator().manual_seed(self.seed)))
        if len(draw) < self.num_held_out:
            raise ValueError(
                f"num_held_out must be far below the number of {self.num_digits}-digit problems, got "
                f"{self.num_held_out}. The draw repeats itself. Set it lower or num_digits higher."
            )
        self.held_out = list(draw)[: self.num_held_out]

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest right answer: one digit more than an operand, and the end-of-sequence token."""
        return self.num_digits + 2

    def _draw(self, num_problems: int, generator: torch.Generator) -> list[str]:
        low, high = 10 ** (self.num_digits - 1), 10**self.num_digits
        operands = torch.randint(low, high, (num_problems, 2), generator=generator).tolist()
        return [f"{left}+{right}"[::-1] + "=" for left, right in operands]

    def sample(self, num_problems: int, seed: int) -> list[str]:
        """
        Draw training problems, uniformly over everything that is not held out.

        Args:
            num_problems (`int`):
                How many, duplicates included.
            seed (`int`):
                Seed of this draw.

        Returns:
            `list[str]`: Prompts.
        """
        generator = torch.Generator().manual_seed(seed)
        held_out = set(self.held_out)
        problems: list[str] = []
        while len(problems) < num_problems:
            drawn = self._draw(num_problems - len(problems), generator)
            problems += [problem for problem in drawn if problem not in held_out]
        return problems


def prompt_dataset(prompts: list[str]) -> Dataset:
    """Dataset with the single `"prompt"` column that the on-policy trainers take."""
    return Dataset.from_dict({"prompt": prompts})


def supervised_dataset(
    prompts: list[str], completion_ids: list[list[int]], tokenizer: PreTrainedTokenizerFast
) -> Dataset:
    """
    Pre-tokenised dataset for [`~trl.SFTTrainer`], with the loss on the completion tokens only.

    Args:
        prompts (`list[str]`):
            Problems.
        completion_ids (`list[list[int]]`):
            Token ids of each completion, the end-of-sequence token included where it was sampled.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer of the prompts.

    Returns:
        [`~datasets.Dataset`]: Columns `"input_ids"` and `"labels"` (−100 on the prompt).
    """
    prompt_ids = tokenizer(prompts)["input_ids"]
    pairs = list(zip(prompt_ids, completion_ids, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "labels": [[-100] * len(prompt) + completion for prompt, completion in pairs],
        }
    )
