# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Diagnostics of every log line, beside the metrics of the objective."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ..student import MicroBatch
    from ..trainer import OnPolicyDistillTrainer


class Diagnostics:
    """
    What a run logs beside the metrics of its objective.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer

    def head_options(self) -> dict[str, Any]:
        """Arguments of the fused divergence on a logged step."""
        return {}

    def note_rollouts(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """A generation batch is complete."""

    def note_tokens(self, batch: "MicroBatch", logps: Tensor, entropies: Tensor) -> None:
        """The objective of a micro-batch is formed."""

    def before_log(self, logs: dict[str, float]) -> None:
        """A line is about to be logged. All processes call it together."""
