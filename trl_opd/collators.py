# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The teacher's side of a batch, built from the student's, and what a teacher answers.

Shapes: B sequences, P prompt tokens (left-padded), T completion tokens (right-padded), K support, H hidden. Position t
of every answer is about completion token t, given the prompt and the completion tokens before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .kernels.projection import Head


@dataclass
class TeacherBatch:
    """
    What a teacher is asked.

    Args:
        input_ids (`torch.Tensor`): Prompt and completion, `(B, P + T)`; ids the teacher does not know are replaced.
        attention_mask (`torch.Tensor`): 1 on real tokens, `(B, P + T)`.
        position_ids (`torch.Tensor`): Positions that skip the padding, `(B, P + T)`.
        completion_ids (`torch.Tensor`): The sampled tokens, `(B, T)`.
        completion_mask (`torch.Tensor`): Boolean, the tokens to score, `(B, T)`; answers elsewhere are ignored.
        temperature (`float`): Temperature of the log-probs to return.
        support (`str`): Support asked for (see [`OnPolicyDistillConfig`]).
        support_size (`int`): K of a top-k support.
        requested_ids (`torch.Tensor`, *optional*):
            Entries `(B, T, K)` that the student chose (`support="student_top_k"` with a teacher that answers at
            generation time): their log-probs are asked for; below 0 is padding.
        own_prompt (`bool`): Whether the prompt differs from the one that the student saw.
        teacher_index (`torch.Tensor`, *optional*): Which member of a [`RoutedTeacher`] each sequence goes to, `(B,)`.
        model_inputs (`Mapping[str, Any]`): Further model inputs, e.g. pixel values of a vision-language model.
        examples (`Sequence[Mapping[str, Any]]` or `None`):
            Dataset rows of the B sequences; `None` for teachers that score inside the loss.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    temperature: float = 1.0
    support: str = "full"
    support_size: int = 64
    requested_ids: Tensor | None = None
    own_prompt: bool = False
    teacher_index: Tensor | None = None
    model_inputs: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] | None = None

    @property
    def num_completion_tokens(self) -> int:
        """T."""
        return self.completion_ids.shape[1]

    def select(self, rows: Tensor) -> "TeacherBatch":
        """
        The sequences `rows` (indices, `(R,)`) alone.

        Raises:
            ValueError: With `model_inputs`, whose rows cannot be told apart (images of several samples are one list).
        """
        if self.model_inputs:
            raise ValueError(
                f"A batch with {sorted(self.model_inputs)} cannot be split between teachers. Which image belongs to "
                "which sample is known to the processor alone. Use one teacher, without teacher_batch_size."
            )
        picked: dict[str, Any] = _pick(self, rows)
        examples = None if self.examples is None else [self.examples[i] for i in rows.tolist()]
        return replace(self, **picked, examples=examples)

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and completion ids of each sequence without padding."""
        width = self.input_ids.shape[1] - self.num_completion_tokens
        ids, mask = self.input_ids.tolist(), self.attention_mask.bool().tolist()
        rows = [[(i, m) for i, m in zip(*row, strict=True)] for row in zip(ids, mask, strict=True)]
        return [([i for i, m in row[:width] if m], [i for i, m in row[width:] if m]) for row in rows]


@dataclass
class TeacherScores:
    """
    What a teacher answers: one of hidden states with their head, top-k log-probs, or sampled-token log-probs (the last
    may come beside the top-k). Log-probs are natural logarithms at the batch's temperature.

    Args:
        hidden_states (`torch.Tensor`, *optional*): Last hidden states that predict the completion, `(B, T, H)`.
        head ([`Head`], *optional*): The head that belongs to them.
        topk_ids (`torch.Tensor`, *optional*): Entries of the support, `(B, T, K)`; below 0 is padding.
        topk_logprobs (`torch.Tensor`, *optional*): Their log-probs, `(B, T, K)`.
        sampled_logprobs (`torch.Tensor`, *optional*): Log-probs of the completion tokens, `(B, T)`.
        normalized (`bool`): Whether those are log-probs, and not a combination of some (which may be above 0).
        sampled_ranks (`torch.Tensor`, *optional*):
            Ranks of the completion tokens in the teacher's whole vocabulary, `(B, T)`: 1 is its likeliest, 0 is
            unknown. For diagnostics; nothing is trained on them.
    """

    hidden_states: Tensor | None = None
    head: Head | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    sampled_logprobs: Tensor | None = None
    normalized: bool = True
    sampled_ranks: Tensor | None = None

    def select(self, rows: Tensor) -> "TeacherScores":
        """Those of the sequences `rows` (indices, `(R,)`)."""
        picked: dict[str, Any] = _pick(self, rows)
        return replace(self, **picked)


def _pick(batch: TeacherBatch | TeacherScores, rows: Tensor) -> dict[str, Tensor]:
    """The rows of those fields that are tensors."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: x[rows.to(x.device)] for name, x in values.items() if isinstance(x, Tensor)}


@dataclass
class MixedScores:
    """
    Answers of several teachers to the same tokens, of one kind: all hidden states, or all top-k log-probs.

    Args:
        members (`Sequence[TeacherScores]`): One answer a teacher; of a target, the teacher's, then the references'.
        weights (`Sequence[float]`):
            Above 0, sum 1; with `"affine"` any finite numbers, with `"contrast"` none.
        mixture (`str`):
            `"arithmetic"`, `"geometric"` or `"loss_sum"` (see [`MixtureTeacher`]); or a target's (`trl_opd.targets`),
            `"affine"` (one member is enough) or `"contrast"` (two), of members that give hidden states.
        student_coef (`float`, *optional*, defaults to `0.0`):
            Coefficient of the student's own logits in an `"affine"` target.
        contrast_scale (`float`, *optional*, defaults to `15.0`): Of a `"contrast"` target.
        contrast_floor (`float`, *optional*, defaults to `1e-3`): Of a `"contrast"` target.
    """

    members: Sequence[TeacherScores]
    weights: Sequence[float]
    mixture: str
    student_coef: float = 0.0
    contrast_scale: float = 15.0
    contrast_floor: float = 1e-3

    def select(self, rows: Tensor) -> "MixedScores":
        """Those of the sequences `rows` (indices, `(R,)`)."""
        return replace(self, members=[member.select(rows) for member in self.members])


@dataclass
class RoutedScores:
    """
    Answers of several teachers to different sequences of a batch.

    Args:
        parts (`Mapping[str, tuple[Tensor, TeacherScores | MixedScores]]`):
            By the teacher's name: the indices `(R,)` of its sequences, and its answer about those. Every sequence is
            in one part. Teachers whose weights are sharded are in the same order on all processes, with no sequence
            on some.
    """

    parts: Mapping[str, "tuple[Tensor, TeacherScores | MixedScores]"]


Scores = TeacherScores | MixedScores | RoutedScores


def collate_teacher_batch(
    inputs: Mapping[str, Any], mask: Tensor, vocab_size: int | None = None, **request: Any
) -> TeacherBatch:
    """
    Build the teacher's side from the student's `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`.

    Where the teacher has its own prompts, `teacher_prompt_ids` and `teacher_prompt_mask` `(B, P')` stand in the place
    of the student's, and a sample that `teacher_skipped` `(B,)` leaves out (not 0) has no completion; `teacher_index`
    `(B,)` tells whose they are.

    Args:
        inputs (`Mapping[str, Any]`): GRPO's batch.
        mask (`torch.Tensor`): Tokens to score, boolean, `(B, T)`.
        vocab_size (`int`, *optional*):
            Ids that the teacher knows; others (vocabulary padding that an untrained student sampled) become 0 on its
            side. The caller has taken them out of `mask`.
        request: Further fields of [`TeacherBatch`].
    """
    own = "teacher_prompt_ids" in inputs
    prompt_ids, completion_ids = inputs["teacher_prompt_ids" if own else "prompt_ids"], inputs["completion_ids"]
    prompt_mask = inputs["teacher_prompt_mask" if own else "prompt_mask"]
    if vocab_size is not None:
        completion_ids = completion_ids.masked_fill(completion_ids >= vocab_size, 0)
        if not own:  # the teacher's own hold what it knows
            prompt_ids = prompt_ids.masked_fill(prompt_ids >= vocab_size, 0)
    completion_mask = inputs["completion_mask"]
    if own and "teacher_skipped" in inputs:  # such a completion may be too long for the teacher
        completion_mask = completion_mask * (inputs["teacher_skipped"] == 0)[:, None]
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
    return TeacherBatch(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
        completion_ids=completion_ids,
        completion_mask=mask,
        own_prompt=own,
        teacher_index=inputs.get("teacher_index"),
        **request,
    )
