# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Tables and pictures for the trackers that transformers reports to."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer


class TrackerCallback(TrainerCallback):
    """
    Hands trackers what numbers do not show.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer
