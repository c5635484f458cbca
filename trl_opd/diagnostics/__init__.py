# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Diagnostics of every log line, beside the metrics of the objective.

- `tokens`: ranks, entropies, positions, weights, ratios, and how rewards go with the teacher's opinion;
- `completions`: repetition, sameness, emptiness of the text;
- `throughput`: tokens a second;
- `derived`: metrics that are made of several sums, exact over micro-batches, accumulation and processes.

Nothing here waits for the device or for another process: [`TokenMetrics`] gathers, and reduces once per log line.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..rollout_checks import is_scheduled
from .completions import add_completions
from .positions import FIRST, MOST, Positions, position_edges
from .throughput import StepTimer
from .tokens import add_token_diagnostics

if TYPE_CHECKING:
    from ..student import MicroBatch
    from ..trainer import OnPolicyDistillTrainer

__all__ = ["Diagnostics", "position_edges"]


def _watching(of_what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A method that is called only while diagnostics are on, and goes quiet, with one warning, where it fails."""

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def watch(self: "Diagnostics", *args: Any) -> None:
            if not self.active or of_what in self._failed:
                return
            try:
                method(self, *args)
            except Exception as error:  # of whatever kind: what watches may not end a run
                self._failed.add(of_what)
                self.trainer.mode_metrics.problem = (
                    f"The diagnostics of {of_what} failed with {error!r}. Training goes on, but from here on the log "
                    "lacks them, or (where other processes go on) knows of fewer samples. Set diagnostics=False to "
                    "leave them out."
                )

        return watch

    return decorate


class Diagnostics:
    """
    What a run logs beside the metrics of its objective.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer"):
        self.trainer = trainer
        self.active = trainer.args.diagnostics
        self._failed: set[str] = set()
        self._batches = 0
        self._tokens_wait = False  # whether tokens were counted since the last line
        if not self.active:
            return
        self._timer = StepTimer()
        trainer.add_callback(self._timer)
        longest = trainer.args.max_completion_length
        if is_scheduled(trainer.args, "max_completion_length"):  # then the names do not depend on it
            longest = FIRST << (MOST - 1)
        self.positions = Positions(position_edges(longest))

    def head_options(self) -> dict[str, Any]:
        """Arguments of the fused divergence on a logged step: statistics that cost a pass over the vocabulary."""
        wanted = self.active and self.trainer._is_logged and self.trainer.args.loss_backend != "liger"
        return {"statistics": {"teacher_rank": None} if wanted else {}}

    @_watching("completions")
    def note_rollouts(self, output: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """A generation batch is complete."""
        trainer, rows = self.trainer, len(inputs)
        side = trainer._teacher_side
        completions, ids = side.completions, side.completion_ids
        if len(completions) > rows:  # gathered for a `teacher_view`
            start = trainer.accelerator.process_index * rows
            completions = completions[start : start + rows]
        if "tool_mask" in output:
            own = output["tool_mask"].bool().tolist()
            # A row without any is a truncated completion that leaves the loss
            ids = [
                [i for i, m in zip(row, mask, strict=False) if m] or row for row, mask in zip(ids, own, strict=True)
            ]
        ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
        self._batches += 1
        add_completions(trainer.mode_metrics, completions, ids, ends, self._batches)

    @_watching("tokens")
    def note_tokens(self, batch: "MicroBatch", logps: Tensor, entropies: Tensor) -> None:
        """The objective of a micro-batch is formed."""
        trainer = self.trainer
        if trainer.model.training:
            tokens = batch.loss_mask.sum().to(torch.float32 if logps.device.type == "mps" else torch.float64)
            pair = torch.stack([tokens, torch.zeros_like(tokens)])[:, None]
            trainer.mode_metrics.merge("mean", ("distill/tokens_per_second",), pair)
            self._tokens_wait = True
        add_token_diagnostics(trainer.mode_metrics, batch, logps, trainer.args, self.positions)

    @_watching("throughput")
    def before_log(self, logs: dict[str, float]) -> None:
        """A line is about to be logged. All processes call it together."""
        trainer = self.trainer
        if trainer.model.training and self._tokens_wait:
            self._tokens_wait = False
            seconds = self._timer.take() if trainer.accelerator.is_main_process else 0.0
            pair = torch.tensor([[0.0], [seconds]], dtype=torch.float64)
            trainer.mode_metrics.merge("mean", ("distill/tokens_per_second",), pair)
