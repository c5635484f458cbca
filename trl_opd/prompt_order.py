# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The order of the prompts in an epoch, which a resumed run shares with one that never stopped."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer


class EpochSampler(RepeatSampler):
    """
    A [`~trl.trainer.utils.RepeatSampler`] that can be told the epoch.

    TRL's draws each epoch's order from one generator, which no checkpoint holds: resumed in the third epoch, a run
    would see the order of the first again. The orders are TRL's.
    """

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of `epoch`, counted from 0."""
        if not self.shuffle or self.seed is None:
            return
        self.generator.manual_seed(self.seed)
        for _ in range(epoch):
            torch.randperm(self.num_samples, generator=self.generator)


class PromptOrder(TrainerCallback):
    """
    Tells the sampler the epoch.

    transformers and accelerate do too, but do not reach it through the samplers that shard a resumed epoch between
    processes.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first prompt of an epoch is asked for."""
        sampler = self.trainer.prompt_sampler
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))
