# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Which tokens count, and by how much: masks and the weights of the one reduction."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .losses import nearest_name

TOKEN_GROUPS = ("special", "added")
OCCURRENCES = ("all", "first")


def special_token_ids(tokens: Sequence[str | int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Ids of the tokens that leave the loss.

    Args:
        tokens (`Sequence[str | int]`): Tokens, ids, or the groups `"special"` and `"added"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The student's tokenizer.

    Raises:
        ValueError: If a string is not one token of the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    ids: set[int] = set()
    for token in tokens:
        if token == "special":
            ids.update(tokenizer.all_special_ids)
        elif token == "added":
            ids.update(tokenizer.get_added_vocab().values())
        elif str(token).isdigit() and token not in vocabulary and int(token) <= max(vocabulary.values()):
            ids.add(int(token))
        elif token in vocabulary:
            ids.add(vocabulary[token])
        else:
            valid = [*TOKEN_GROUPS, *tokenizer.get_added_vocab()]
            raise ValueError(
                f"special_token_masking must hold single tokens of the student's vocabulary, got {token!r}. The mask "
                f"would leave the loss unchanged.{nearest_name(token, valid)}"
            )
    return sorted(ids)


def reduction_weights(
    mask: Tensor,
    loss_type: str,
    *,
    num_items: Tensor,
    num_processes: int,
    max_completion_length: int,
    accumulation: float,
    steps_per_generation: float,
) -> Tensor:
    """
    Weight of each token in the loss, so that Σ weight · D follows GRPO's rule for `loss_type`.

    `dapo`, `cispo`, `vespo`: mean over all tokens of the generation batch, over all processes. `bnpo`: over the
    micro-batch. `grpo`, `sapo`: mean over each sequence, then over sequences. `dr_grpo`: over a constant number of
    tokens. `luspo`: sum over each sequence, mean over sequences.

    Args:
        mask (`torch.Tensor`): Tokens of the loss, boolean, `(B, T)`.
        loss_type (`str`): GRPO's loss type.
        num_items (`torch.Tensor`): Number of loss tokens of the generation batch, over all processes.
        num_processes (`int`): Their number; gradients are averaged over them.
        max_completion_length (`int`): Divisor of `dr_grpo`.
        accumulation (`float`): Micro-batches of an optimizer step (1 in evaluation).
        steps_per_generation (`float`): Micro-batches of a generation batch (1 in evaluation).

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32.
    """
    mask = mask.float()
    if loss_type in ("dapo", "cispo", "vespo"):
        return mask / (num_items.clamp(min=1.0) / num_processes * accumulation / steps_per_generation)
    num_sequences = mask.shape[0]
    if loss_type == "bnpo":
        normalizer = mask.sum().clamp(min=1.0)
    elif loss_type in ("grpo", "sapo"):
        normalizer = mask.sum(-1, keepdim=True).clamp(min=1.0) * num_sequences
    elif loss_type == "dr_grpo":
        normalizer = mask.new_tensor(num_sequences * max_completion_length)
    elif loss_type == "luspo":
        normalizer = mask.new_tensor(num_sequences)
    else:
        raise ValueError(f"loss_type must be one of GRPO's, got {loss_type!r}. There is no rule to reduce it by.")
    return mask / (normalizer * accumulation)


def mask_token_ids(mask: Tensor, completion_ids: Tensor, ids: Sequence[int], occurrence: str = "all") -> Tensor:
    """
    `mask` without the positions whose token is in `ids`.

    Args:
        mask (`torch.Tensor`): Tokens of the loss, boolean, `(B, T)`.
        completion_ids (`torch.Tensor`): Their ids, `(B, T)`.
        ids (`Sequence[int]`): Tokens that leave the loss.
        occurrence (`str`, *optional*, defaults to `"all"`):
            `"first"`: only the first time that each of them occurs in `mask`, in each completion.

    Returns:
        `torch.Tensor` of shape `(B, T)`, boolean.

    Paper: `"first"` is the special-token mask of [Revisiting On-Policy
    Distillation](https://huggingface.co/papers/2603.25562), as in its code.
    """
    if not ids:
        return mask
    masked = torch.isin(completion_ids, torch.tensor(ids, device=completion_ids.device))
    if occurrence == "first":
        masked = torch.zeros_like(mask)
        for token in ids:
            here = mask & (completion_ids == token)
            masked = masked | (here & (here.cumsum(-1) == 1))
    return mask & ~masked
