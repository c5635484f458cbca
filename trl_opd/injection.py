# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Which members of which groups are replaced by off-policy completions."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from .completions import decode_completions


def injected_rows(trainer: Any, num: int, failed: set[int] | None = None) -> list[int]:
    """
    Rows of this process that are the last `injected_completions` of their group, which may be spread over processes.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The run.
        num (`int`): Rows of a process.
        failed (`set[int]`, *optional*): Take those of these groups only.
    """
    size, start = trainer.num_generations, trainer.accelerator.process_index * num
    kept = size - trainer.args.injected_completions
    last = [i for i in range(num) if (start + i) % size >= kept]
    return last if failed is None else [i for i in last if (start + i) // size in failed]


def failed_groups(rewards: Tensor, weights: Tensor, size: int) -> set[int]:
    """
    Groups in which a completion has a reward and none has a weighted sum of rewards above 0.

    Args:
        rewards (`torch.Tensor`): Of each function, NaN where it gave none, `(G · size, functions)`.
        weights (`torch.Tensor`): Of the functions, `(functions,)`.
        size (`int`): Completions of a group.
    """
    scored = ~rewards.isnan().all(dim=1)
    positive = (rewards * weights).nansum(dim=1) > 0
    failed = scored.view(-1, size).any(dim=1) & ~positive.view(-1, size).any(dim=1)
    return set(failed.nonzero().squeeze(-1).tolist())


def find_failures(
    trainer: Any,
    rows: Sequence[Mapping[str, Any]],
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
) -> tuple[set[int], Tensor | None]:
    """
    The failed groups of all processes, before GRPOTrainer computes rewards.

    Returns:
        `set[int]`: See [`failed_groups`].
        `torch.Tensor` or `None`:
            The rewards `(all B, functions)` if none failed, which are then those of the batch. Else they are computed
            a second time with the new members, and what the functions logged here is forgotten.
    """
    prompts = [row["prompt"] for row in rows]
    completions = decode_completions(trainer, prompts, prompt_ids, completion_ids)
    rewards = GRPOTrainer._calculate_rewards(trainer, list(rows), prompts, completions, completion_ids)
    failed = failed_groups(rewards, trainer.reward_weights.to(rewards.device), trainer.num_generations)
    if not failed:
        return failed, rewards
    for logs in (trainer._pending_extra_logs, trainer._pending_metrics):  # empty when a batch begins
        logs.clear()
    return failed, None
