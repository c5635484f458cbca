# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What is known about each token when its weight is decided. Torch only."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Statistics that are known before the student's forward pass: weights of these alone can enter the reduction weights
ROLLOUT_FIELDS = frozenset({"completion_ids", "step_index", "sampler_logprobs", "reward_advantages"})


@dataclass
class TokenStats:
    """
    Statistics of tokens, all detached and of one shape: `(B, T)`, or `(n,)` inside the fused divergence, where only
    local weightings run. Entries outside `mask` may hold anything; `None` is what is not known.

    Args:
        mask (`torch.Tensor`): Tokens that the distillation trains, boolean.
        completion_ids (`torch.Tensor`, *optional*): Sampled tokens.
        student_logprobs (`torch.Tensor`, *optional*), teacher_logprobs (`torch.Tensor`, *optional*):
            Their log-probs, in nats.
        student_entropy (`torch.Tensor`, *optional*), teacher_entropy (`torch.Tensor`, *optional*): In nats.
        forward_kl (`torch.Tensor`, *optional*), reverse_kl (`torch.Tensor`, *optional*),
        divergence (`torch.Tensor`, *optional*): In nats (`divergence` in the unit of the one that is trained).
        overlap (`torch.Tensor`, *optional*): Share of the teacher's top entries that are the student's, in [0, 1].
        hellinger (`torch.Tensor`, *optional*), total_variation (`torch.Tensor`, *optional*): Distances, in [0, 1].
        accepted (`torch.Tensor`, *optional*): Whether the student's likeliest entry is in the teacher's top k.
        teacher_margin (`torch.Tensor`, *optional*): Gap between the teacher's log-probs of its best and its second
            best among the student's top k, in nats.
        teacher_rank (`torch.Tensor`, *optional*), student_rank (`torch.Tensor`, *optional*): Ranks of the sampled
            token, 1 the likeliest.
        teacher_max_logprob (`torch.Tensor`, *optional*): The teacher's largest log-prob, in nats.
        step_index (`torch.Tensor`, *optional*): Assistant turn of a tool conversation, from 0; `None` without tools.
        sampler_logprobs (`torch.Tensor`, *optional*): Of the sampled tokens, under the policy that sampled them.
        reward_advantages (`torch.Tensor`, *optional*): Advantages of the task's reward, spread over the tokens.
        progress (`float`, *optional*, defaults to `0.0`): Share of the training done, in [0, 1].
        vocab_size (`int`, *optional*): Entries of the vocabulary: an entropy is at most its log.
    """

    mask: Tensor
    completion_ids: Tensor | None = None
    student_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    divergence: Tensor | None = None
    overlap: Tensor | None = None
    hellinger: Tensor | None = None
    total_variation: Tensor | None = None
    accepted: Tensor | None = None
    teacher_margin: Tensor | None = None
    teacher_rank: Tensor | None = None
    student_rank: Tensor | None = None
    teacher_max_logprob: Tensor | None = None
    step_index: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    reward_advantages: Tensor | None = None
    progress: float = 0.0
    vocab_size: int | None = None

    def require(self, name: str) -> Tensor:
        """
        The statistic `name`.

        Raises:
            ValueError: If it is not known.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(
                f"TokenStats.{name} must be known to weigh by it, got None. This objective or teacher does not tell "
                f"it. Set credit='direct' and a teacher that returns distributions, or another token_weighting."
            )
        return value

    @property
    def log_ratio(self) -> Tensor:
        """ℓ = teacher's − student's log-prob of the sampled token, in nats."""
        return self.require("teacher_logprobs") - self.require("student_logprobs")


def step_index_from_tool_mask(tool_mask: Tensor, mask: Tensor) -> Tensor:
    """
    Which assistant turn each token belongs to: contiguous runs of the model's own tokens between tool outputs.

    Args:
        tool_mask (`torch.Tensor`): 1 on tokens of the model (and on padding), 0 on tool outputs, `(B, T)`.
        mask (`torch.Tensor`): Tokens of the completion, boolean, `(B, T)`. Gaps in it do not end a turn.

    Returns:
        `torch.Tensor` of shape `(B, T)`, int64: from 0, and 0 outside `mask`.
    """
    own = tool_mask.bool()
    before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
    turn = (own & ~before).long().cumsum(1) - 1
    return turn.clamp(min=0).masked_fill(~mask.bool(), 0)
