# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Optimizer steps in which no token has a weight."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer


class SkipEmptySteps(TrainerCallback):
    """
    Leave the parameters alone in an optimizer step whose tokens all have weight 0.

    Its gradient is zero, but momentum and weight decay would still move the parameters. `distill/skipped_steps` is the
    share of such steps. (DeepSpeed keeps gradients of its own: there they are counted, and taken.)
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients: optimizers pass over parameters that have none."""
        objective = self.trainer.objective
        if not objective.may_be_empty:
            return
        empty = objective.is_empty()
        if empty:
            for parameter in self.trainer.model.parameters():
                parameter.grad = None
        self.trainer.mode_metrics.add_sum("distill/skipped_steps", torch.tensor(float(empty)), 1.0)
