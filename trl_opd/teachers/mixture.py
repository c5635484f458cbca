# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Several teachers of every sample, in one of three mixtures."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..collators import MixedScores, Scores, TeacherBatch, TeacherScores
from ..kernels.members import MIXTURES
from ..losses import nearest_name
from .answers import TeacherScoreError
from .base import PendingScores, collect, submit, teacher_name
from .group import TeacherGroup

if TYPE_CHECKING:
    from trl import GRPOTrainer


class MixtureTeacher(TeacherGroup):
    r"""
    Several teachers, of whose distributions p_k with weights w_k one of three objectives is made:

    - `"arithmetic"`: one teacher Σ_k w_k p_k. An entry is likely if any of them finds it likely.
    - `"geometric"`: one teacher ∝ Π_k p_k^w_k, the mean of the logits. An entry is likely if all of them do.
    - `"loss_sum"`: the loss is Σ_k w_k times the divergence from teacher k.

    Forward KL to the arithmetic mixture and the sum of forward KLs have one gradient, and so have reverse KL to the
    geometric mixture and the sum of reverse KLs; the others differ. Teachers that give hidden states can be mixed in
    all three ways, those that give top-k lists as `"loss_sum"` only (each is compared on its own list). Of sampled
    tokens alone (`credit="policy_gradient"`) the advantage is made of log Σ_k w_k p_k(y) for the first and of
    Σ_k w_k log p_k(y) for the others.

    Args:
        teachers (`Sequence[Any]`):
            What `teacher_model=` accepts, other than several teachers. One that is given twice (the same object, or
            the same string) exists once and has both weights.
        weights (`Sequence[float]`, *optional*): The w_k, above 0 and of sum 1. Equal by default.
        mixture (`str`, *optional*, defaults to `"arithmetic"`): Which of the three.
        init_kwargs (`Mapping[str, Any]`, *optional*): For `from_pretrained` of the teachers that are named by strings.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Likewise.
    """

    def __init__(
        self,
        teachers: Sequence[Any],
        weights: Sequence[float] | None = None,
        mixture: str = "arithmetic",
        init_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ):
        if mixture not in MIXTURES:
            raise ValueError(f"mixture must be a known name, got {mixture!r}.{nearest_name(mixture, list(MIXTURES))}")
        if isinstance(teachers, str) or not isinstance(teachers, Sequence) or not teachers:
            raise ValueError(f"teachers must be a sequence of at least one teacher, got {teachers!r}.")
        weights = [1 / len(teachers)] * len(teachers) if weights is None else [float(w) for w in weights]
        if len(weights) != len(teachers) or not all(w > 0 for w in weights) or abs(math.fsum(weights) - 1) > 1e-5:
            raise ValueError(
                f"weights must be {len(teachers)} numbers above 0 that sum to 1, one per teacher, got {weights!r}. A "
                "teacher of weight 0 would only cost time. Leave it out, and divide the others by their sum."
            )
        self.mixture = mixture
        self.members: list[Any] = []
        self.weights: list[float] = []
        places: dict[Any, int] = {}
        for teacher, weight in zip(teachers, weights, strict=True):
            key = teacher if isinstance(teacher, str) else id(teacher)
            if key in places:
                self.weights[places[key]] += weight
                continue
            places[key] = len(self.members)
            self.members.append(_resolve(teacher, init_kwargs, trust_remote_code))
            self.weights.append(weight)
        self._sampled = False

    @property
    def name(self) -> str:
        """Its teachers' names and weights."""
        parts = (f"{weight:g} {teacher_name(m)}" for m, weight in zip(self.members, self.weights, strict=True))
        return f"{self.mixture}({', '.join(parts)})"

    @property
    def scores_in_loss(self) -> bool:
        """Whether a member scores inside the loss."""
        return any(getattr(member, "scores_in_loss", False) for member in self.members)

    @property
    def vocab_size(self) -> int | None:
        """Ids that all members know, as far as that is known."""
        return self._smallest("vocab_size")

    @property
    def max_length(self) -> int | None:
        """Longest prompt and completion that all members take, as far as that is known."""
        return self._smallest("max_length")

    def _smallest(self, attribute: str) -> int | None:
        values = [getattr(member, attribute, None) for member in self.members]
        return min((x for x in values if x is not None), default=None)

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Prepare the members."""
        self._sampled = getattr(trainer.args, "credit", None) == "policy_gradient"
        if self._sampled and self.mixture == "geometric" and trainer.args.discount > 0:
            raise ValueError(
                f"discount must be 0 for a MixtureTeacher of mixture='geometric', got {trainer.args.discount!r}. Of "
                "the sampled tokens the mixture is known up to its normaliser, which is the same for all tokens of a "
                "state and drops out of the mean gradient; in a sum over later tokens it does not. Set discount=0, "
                "mixture='loss_sum' or 'arithmetic'."
            )
        # A member may also be one of another mixture, or stand alone, in a RoutedTeacher that knows who is prepared
        prepared: set[int] = getattr(getattr(trainer, "teacher", None), "_prepared", set())
        for member in self.members:
            if id(member) not in prepared and hasattr(member, "prepare"):
                prepared.add(id(member))
                member.prepare(trainer)

    def submit(self, batch: TeacherBatch) -> "MixturePending | None":
        """Ask those members that answer at generation time."""
        pending = [submit(member, batch) for member in self.members]
        return None if all(p is None for p in pending) else MixturePending(self, pending)

    def __call__(self, batch: TeacherBatch) -> Scores:
        rows = torch.arange(len(batch.completion_ids))
        return self.mix([collect(member, None, rows, batch) for member in self.members], batch)

    def mix(self, answers: Sequence[Scores], batch: TeacherBatch) -> TeacherScores | MixedScores:
        """
        The members' answers to one question as one answer.

        Raises:
            TeacherScoreError: If they do not fit each other or the mixture.
        """
        members = []
        for member, answer in zip(self.members, answers, strict=True):
            if not isinstance(answer, TeacherScores):
                raise TeacherScoreError(
                    f"Teacher {teacher_name(member)!r} must be one teacher to be part of a MixtureTeacher, but it "
                    f"answered with {type(answer).__name__}. Put its teachers into the mixture."
                )
            members.append(answer)
        if len(members) == 1:
            return members[0]
        sampled = [answer.sampled_logprobs for answer in members]
        if self._sampled or batch.support == "sampled" or not any(map(_is_distribution, members)):
            self._require("sampled_logprobs", [x is not None for x in sampled])
            return TeacherScores(sampled_logprobs=self._mix_sampled([x for x in sampled if x is not None]))
        self._require("hidden_states or topk_ids", [_is_distribution(answer) for answer in members])
        if self.mixture != "loss_sum":
            self._require("hidden_states", [answer.hidden_states is not None for answer in members])
        return MixedScores(members, self.weights, self.mixture)

    def _require(self, what: str, given: Sequence[bool]) -> None:
        lacking = [teacher_name(member) for member, has in zip(self.members, given, strict=True) if not has]
        if not lacking:
            return
        reason = "All members must answer in the same way."
        if what == "sampled_logprobs":
            reason = "The advantage of credit='policy_gradient' is made of them."
        if what == "hidden_states":
            reason = (
                f"What lists that are cut off at different entries mix to is not known, so mixture={self.mixture!r} "
                "needs teachers in this process. Set mixture='loss_sum', or use local teachers."
            )
        raise TeacherScoreError(f"The members {lacking} of a MixtureTeacher must return {what}. {reason}")

    def _mix_sampled(self, logprobs: Sequence[Tensor]) -> Tensor:
        """Log-probs of the sampled tokens, `(B, T)`, in float64 until they are mixed."""
        stacked = torch.stack([x.double() for x in logprobs], dim=-1)
        weights = torch.tensor(self.weights, dtype=stacked.dtype, device=stacked.device)
        weights = weights / weights.sum()
        if self.mixture == "arithmetic":
            mixed = (stacked + weights.log()).logsumexp(-1)
        else:
            mixed = (stacked * weights).sum(-1)
        return mixed.to(torch.promote_types(logprobs[0].dtype, torch.float32))


class MixturePending:
    """Answers of those members that were asked at generation time; the others are asked when it is collected."""

    def __init__(self, teacher: MixtureTeacher, pending: Sequence[PendingScores | None]):
        self.teacher, self.pending = teacher, pending

    def collect(self, rows: Tensor, batch: TeacherBatch) -> TeacherScores | MixedScores:
        """See [`PendingScores`]."""
        members = zip(self.teacher.members, self.pending, strict=True)
        return self.teacher.mix([collect(member, pending, rows, batch) for member, pending in members], batch)


def _is_distribution(answer: TeacherScores) -> bool:
    return answer.hidden_states is not None or answer.topk_ids is not None


def _resolve(teacher: Any, init_kwargs: Mapping[str, Any] | None, trust_remote_code: bool) -> Any:
    from .resolve import resolve_teacher

    kwargs = init_kwargs if isinstance(teacher, str) else None
    resolved = resolve_teacher(teacher, kwargs, trust_remote_code)
    if getattr(resolved, "members", None) is not None:
        raise ValueError(
            f"A member of a MixtureTeacher must be one teacher, got {type(resolved).__name__} "
            f"{teacher_name(resolved)}. Put its teachers into the mixture, or a MixtureTeacher into the dict."
        )
    return resolved
