# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the checks with weights look at, and words that they share."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..findings import Finding
from ..teachers import LocalTeacher, RemoteTeacher
from ..teachers.base import leaves, teacher_name
from .measure import Answered, Tokens
from .samples import MAX_REPEATED, Samples
from .scoring import Entries, entries_of
from .thresholds import LIMITS, tolerance


@dataclass
class Exam:
    """
    One look at a run.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run, inside `samples.undisturbed`.
        side (`TeacherSide`): Its questions.
        samples ([`Samples`]): Completions of its student.
        tokens ([`Tokens`]): Every token of them.
        answered (`list[Answered]`): The teacher's first answers, piece by piece.
        noise (`float`): By how much the teacher differs from itself beyond what is allowed, nats.
    """

    trainer: Any
    side: Any
    samples: Samples
    tokens: Tokens
    answered: list[Answered]
    noise: float = 0.0

    @property
    def teacher(self) -> Any:
        """Who is asked."""
        return self.side.teacher

    @property
    def name(self) -> str:
        """How to call it."""
        return repr(teacher_name(self.teacher))

    @cached_property
    def few(self) -> Answered:
        """Some sequences, that the models may be asked about again."""
        first = self.answered[0]
        if first.piece.has_images or len(first.piece.completion_ids) <= MAX_REPEATED:
            return first
        piece = first.piece.select(range(MAX_REPEATED))
        return Answered(piece, entries_of(piece, piece.ask()))

    @property
    def is_local(self) -> bool:
        """Whether all answers come from models in this process, whose arithmetic is known."""
        return all(getattr(leaf, "scores_in_loss", False) for leaf in leaves(self.teacher))

    @property
    def dtype(self) -> torch.dtype:
        """What the student computes in, and under autocast the teacher too."""
        args = self.trainer.args
        if args.bf16 or args.fp16:
            return torch.bfloat16 if args.bf16 else torch.float16
        return next(self.trainer.model.parameters()).dtype

    def allowed(self, entries: Entries) -> float:
        """Nats by which two answers of a teacher to one question may differ."""
        if self.is_local:
            return max(tolerance(entries.dtype), tolerance(self.dtype))
        named = [getattr(leaf, "tolerance", None) for leaf in leaves(self.teacher)]
        return max([float(x) for x in named if x is not None], default=LIMITS.served)

    def share(self, allowed: float) -> float:
        """Of entries, those that must agree: in half precision single ones are far off now and then."""
        return 1.0 if allowed < tolerance(torch.float16) or not self.is_local else LIMITS.half_share

    def remedy(self) -> str:
        """What makes a teacher answer alike."""
        parts = []
        if any(isinstance(leaf, RemoteTeacher) for leaf in leaves(self.teacher)):
            parts.append(
                "Start vLLM with VLLM_BATCH_INVARIANT=1 in its environment, SGLang with "
                "--enable-deterministic-inference, with unquantized weights and a float32 head."
            )
        if any(isinstance(leaf, LocalTeacher) for leaf in leaves(self.teacher)):
            parts.append("Unset teacher_quantization, or load the teacher with attn_implementation='sdpa'.")
        return " ".join(parts) or "Call model.eval() on the teacher's model, and score each sequence by itself."

    def shown(self, token: int) -> str:
        """A token, for a message."""
        return f"{self.written(token)!r} (id {token})" if token >= 0 else "another token"

    def written(self, token: int) -> str:
        """As text."""
        return self.trainer._tokenizer.decode([token])


@dataclass
class Means:
    """Mean of some numbers, their standard error, and how many they are."""

    mean: float
    error: float
    num: int

    @classmethod
    def of(cls, values: Tensor) -> "Means":
        """Of `(n,)`, NaN left out."""
        values = values[~values.isnan()].double().clamp(-100, 100)
        num = len(values)
        error = float(values.std() / math.sqrt(num)) if num > 1 else math.inf
        return cls(float(values.mean()) if num else math.nan, error, num)

    def below(self, other: "Means", margin: float) -> bool:
        """Whether it is lower by `margin`, and by more than chance."""
        if not self.num or not other.num:
            return False
        error = math.hypot(self.error, other.error)
        return other.mean - self.mean > max(margin, LIMITS.errors * error)


def blocked(check: str, reason: str) -> list[Finding]:
    """A check that has nothing to look at."""
    return [Finding(check, "info", f"not checked: {reason}")]


def mean_of(values: Tensor) -> float:
    """Without NaN."""
    return float(values[~values.isnan()].mean()) if bool((~values.isnan()).any()) else math.nan


def is_known(values: Tensor) -> bool:
    """Whether any is not NaN."""
    return bool((~torch.isnan(values)).any())
