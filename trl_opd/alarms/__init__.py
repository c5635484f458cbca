# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Alarms: what precedes a collapse, found in the log."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from ..trainer import OnPolicyDistillTrainer


class AlarmCallback(TrainerCallback):
    """
    Watches the log lines of a run.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer
