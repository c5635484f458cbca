# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Sampled completions token by token: what both models thought of each."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .student import MicroBatch
    from .trainer import OnPolicyDistillTrainer


class TokenView:
    """
    Keeps the tokens of some completions of each logged step, and writes them beside the completions log.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer

    def note_rollouts(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """A generation batch is complete."""

    def note_tokens(self, batch: "MicroBatch", logps: Tensor, entropies: Tensor) -> None:
        """The objective of a micro-batch is formed."""

    def before_log(self) -> None:
        """GRPOTrainer is about to log and to write its completions log."""

    def after_log(self) -> None:
        """It has."""
