# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher and the models beside it of which the distribution aimed at is made."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..collators import MixedScores, Scores, TeacherBatch, TeacherScores
from ..targets import resolve_target
from .mixture import MixtureTeacher

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from ..config import OnPolicyDistillConfig


class TargetTeacher(MixtureTeacher):
    """
    The teacher and the reference models of a target (`trl_opd.targets`), asked about the same tokens.

    Of distributions, all answers are handed on and the fused divergence combines them; of sampled tokens, their
    log-probs' combination Σ a_k log p_k is, whose normaliser drops out of a policy gradient.

    Args:
        members (`Sequence[Any]`): The teacher, then the references; each one teacher.
        args ([`OnPolicyDistillConfig`]): Its `target` and `target_kwargs`, read whenever they are used.
    """

    def __init__(self, members: Sequence[Any], args: "OnPolicyDistillConfig"):
        super().__init__(members)
        if len(self.members) < len(members):
            raise ValueError(
                "reference_model must differ from teacher_model and from each other, got one of them twice. Their "
                "terms would cancel or add up. Name the models that the target is made of."
            )
        self.args = args
        self.mixture = "affine"

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Prepare the members, and follow the run's configuration, which schedules may move."""
        self.args = trainer.args
        super().prepare(trainer)

    @property
    def name(self) -> str:
        """The target's name and the teacher's."""
        return f"{self.args.target}({super().name.partition('(')[2]}"

    @property
    def _target(self) -> Any:
        kwargs: Any = self.args.target_kwargs
        return resolve_target(self.args.target, kwargs, len(self.members) - 1)

    def mix(self, answers: Sequence[Scores], batch: TeacherBatch) -> TeacherScores | MixedScores:
        """The members' answers to one question as one answer."""
        answer = super().mix(answers, batch)
        return replace(answer, normalized=False) if isinstance(answer, TeacherScores) else answer

    def _mix_sampled(self, logprobs: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack([x.double() for x in logprobs], dim=-1)
        weights = torch.tensor(self._target.weights, dtype=stacked.dtype, device=stacked.device)
        return (stacked * weights).sum(-1).to(torch.promote_types(logprobs[0].dtype, torch.float32))
