# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the completions of one prompt tell about each of them: rewards, pass rates, agreement."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .imports import load_object
from .rewards import consensus_share, resolve_reward_mix
from .sample_weights import PassRates

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer

STATE_FILE = "pass_rates.json"
PASS = 0.5  # reward from which a completion passes
FRONTIER = 0.5  # pass rate of a prompt of which nothing is known


class Groups:
    """
    Notes about a generation batch that its micro-batches need.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer
        self.pass_rates = PassRates()
        self._rewards: Tensor | None = None

    def begin(self) -> None:
        """A generation batch begins."""
        self._rewards = None

    def note_rewards(self, rewards_per_func: Tensor) -> None:
        """Its rewards, of all processes, `(all B, functions)`; a completion without any has NaN."""
        weights = self.trainer.reward_weights.to(rewards_per_func.device)
        rewards = (rewards_per_func * weights).nansum(1)
        self._rewards = rewards.masked_fill(torch.isnan(rewards_per_func).all(1), torch.nan)

    def finish(
        self, output: dict[str, Any], examples: Sequence[Mapping[str, Any]], completions: Sequence[Any]
    ) -> None:
        """
        Put `rewards` (B,), `group_rewards` (B, G), `pass_rate` (B,) and `consensus` (B,) into the batch, as far as
        they are known and used.
        """
        trainer, args = self.trainer, self.trainer.args
        training = trainer.model.training
        size = trainer.num_generations if training else trainer.num_generations_eval
        device = output["completion_ids"].device
        rows = len(examples)
        local = slice(trainer.accelerator.process_index * rows, (trainer.accelerator.process_index + 1) * rows)
        if "pass_rate" in examples[0]:
            output["pass_rate"] = torch.tensor([float(x["pass_rate"]) for x in examples], device=device)
        if self._rewards is not None and trainer.has_rewards:
            rewards = self._rewards.to(device)
            output["rewards"] = rewards[local]
            output["group_rewards"] = rewards.view(-1, size).repeat_interleave(size, dim=0)[local]
            if "pass_rate" not in output and args.sample_weighting:
                output["pass_rate"] = self._running_rates(rewards, output, examples, training)[local].to(device)
        if args.reward_mix == "gate":
            _, mix = resolve_reward_mix("gate", args.reward_mix_kwargs)  # type: ignore[arg-type]
            if mix["on"] == "consensus":
                output["consensus"] = self._consensus(mix, completions, size)[local].to(device)

    def _running_rates(
        self, rewards: Tensor, output: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], training: bool
    ) -> Tensor:
        """
        Each prompt's running pass rate, this batch included, of all processes: the share of the student's own
        completions that pass. A prompt that it has not completed yet is at the frontier, at one half.
        """
        prompts = [x.get("prompt") for x in examples]
        own = output["on_policy"].tolist() if "on_policy" in output else [True] * len(prompts)
        if self.trainer.accelerator.num_processes > 1:
            prompts, own = gather_object(prompts), gather_object(own)
        rates = self.pass_rates
        if not training:  # counted, but not kept
            rates = PassRates()
            rates.load_state_dict(self.pass_rates.state_dict())
        rows = zip(prompts, rewards.tolist(), own, strict=True)
        scored = [(prompt, float(reward >= PASS)) for prompt, reward, ours in rows if ours and reward == reward]
        rates.update([prompt for prompt, _ in scored], [passed for _, passed in scored])
        known = [rates.rate(prompt) for prompt in prompts]
        return torch.tensor([FRONTIER if rate is None else rate for rate in known])

    def _consensus(self, mix: Mapping[str, Any], completions: Sequence[Any], size: int) -> Tensor:
        """Share of each group that gives its most frequent answer, of all processes."""
        name = mix.get("answer")
        extract = load_object(name, "reward_mix_kwargs['answer'] must be an import path") if name else _text
        answers = [extract(completion) for completion in completions]
        if self.trainer.accelerator.num_processes > 1:
            answers = gather_object(answers)
        return torch.tensor(consensus_share(answers, size), dtype=torch.float32)

    def save_state(self, folder: str) -> None:
        """Write the running pass rates into a checkpoint."""
        if self.trainer.args.sample_weighting and self.trainer.accelerator.is_main_process:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, STATE_FILE), "w") as file:
                json.dump(self.pass_rates.state_dict(), file)

    def load_state(self, folder: str) -> None:
        """Read them from it, if they are there."""
        path = os.path.join(folder, STATE_FILE)
        if os.path.exists(path):
            with open(path) as file:
                self.pass_rates.load_state_dict(json.load(file))


def _text(completion: Any) -> str:
    """The text of a completion, which is its answer where nothing extracts one."""
    text = completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)
    return text.strip()
