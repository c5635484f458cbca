# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Stopping a run, on all processes together and with a checkpoint, before a step is trained on bad scores."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from .teachers.answers import TeacherScoreError

if TYPE_CHECKING:
    from trl import GRPOTrainer

BadScore = tuple[int, int, float]  # row of the batch, completion token, value


def describe(bad: BadScore, inputs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Which token of which sample has the bad score."""
    row, token, value = bad
    prompt = tokenizer.decode(inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()][-60:])
    return f"{value} at completion token {token} of batch row {row}, whose prompt ends in {prompt!r}"


def stop_together(trainer: "GRPOTrainer", teacher: str, problem: str | Exception | None) -> None:
    """
    If any process has a problem, save a checkpoint on all of them and stop. All must call it together.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The run.
        teacher (`str`): How to call the teacher.
        problem (`str`, `Exception` or `None`): What is wrong on this process: a bad score, or the teacher's failure.

    Raises:
        TeacherScoreError: If there is a problem on any process.
    """
    flag = torch.tensor(float(problem is not None), device=trainer.accelerator.device)
    if trainer.accelerator.reduce(flag, reduction="sum").item() == 0:
        return
    saved = ""
    if trainer.is_in_train:
        trainer._save_checkpoint(trainer.model, trial=None)
        # The first process to leave has the launcher end the others, which may still be writing
        trainer.accelerator.wait_for_everyone()
        saved = f" A checkpoint of step {trainer.state.global_step} is in {trainer.args.output_dir}."
    if isinstance(problem, Exception):
        ours = isinstance(problem, TeacherScoreError)
        what = str(problem) if ours else f"Teacher {teacher!r} failed: {problem!r}."
        raise TeacherScoreError(f"{what} No step was taken.{saved}") from problem
    if problem is None:
        raise TeacherScoreError(
            f"Teacher {teacher!r} failed or returned bad scores on another process, whose message says more. No step "
            f"was taken.{saved}"
        )
    raise TeacherScoreError(
        f"Teacher {teacher!r} returned a score that is not finite: {problem}. Training on it would destroy the "
        f"student, so no step was taken.{saved} Check the teacher's dtype (float16 overflows in many models) and that "
        "it gives every token of the vocabulary a probability."
    )
