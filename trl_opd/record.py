# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves on disk for `trl-opd report`, from its first second on and also when it is killed."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer


class RunRecorder(TrainerCallback):
    """
    Writes `output_dir/opd/`.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer

    def add_alarm(self, alarm: dict[str, Any]) -> None:
        """Keep an alarm."""
