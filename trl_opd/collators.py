# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The teacher's side of a batch, built from the student's, and what a teacher answers.

Shapes: B sequences, P prompt tokens (left-padded), T completion tokens (right-padded), K support, H hidden. Position t
of every answer is about completion token t, given the prompt and the completion tokens before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    model_inputs: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] | None = None

    @property
    def num_completion_tokens(self) -> int:
        """T."""
        return self.completion_ids.shape[1]


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
    """

    hidden_states: Tensor | None = None
    head: Head | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    sampled_logprobs: Tensor | None = None

    # The buffered batch is shuffled and split by rows, so every answer that waits there is batch-first
    _KEYS = ("topk_ids", "topk_logprobs", "sampled_logprobs")

    def to_inputs(self) -> dict[str, Tensor]:
        """The batch-first tensors to keep in GRPO's buffered batch, under `teacher_` names."""
        return {f"teacher_{key}": getattr(self, key) for key in self._KEYS if getattr(self, key) is not None}

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> "TeacherScores | None":
        """The inverse of [`to_inputs`], or scores kept whole from an earlier pass; `None` if there are none."""
        if inputs.get("teacher_scores") is not None:
            return inputs["teacher_scores"]
        values = {key: inputs[f"teacher_{key}"] for key in cls._KEYS if f"teacher_{key}" in inputs}
        return cls(**values) if values else None


def collate_teacher_batch(
    inputs: Mapping[str, Any], mask: Tensor, vocab_size: int | None = None, **request: Any
) -> TeacherBatch:
    """
    Build the teacher's side from the student's `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`.

    Args:
        inputs (`Mapping[str, Any]`): GRPO's batch.
        mask (`torch.Tensor`): Tokens to score, boolean, `(B, T)`.
        vocab_size (`int`, *optional*):
            Ids that the teacher knows; others (vocabulary padding that an untrained student sampled) become 0 on its
            side. The caller has taken them out of `mask`.
        request: Further fields of [`TeacherBatch`].
    """
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    completion_ids = inputs["completion_ids"]
    if vocab_size is not None:
        input_ids = input_ids.masked_fill(input_ids >= vocab_size, 0)
        completion_ids = completion_ids.masked_fill(completion_ids >= vocab_size, 0)
    return TeacherBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
        completion_ids=completion_ids,
        completion_mask=mask,
        **request,
    )
