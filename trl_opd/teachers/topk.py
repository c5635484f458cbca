# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Hidden states reduced to log-probs that can be kept: the teacher's top k and the sampled token's.

Shapes: B sequences, T completion tokens, N rows, H hidden, V vocabulary, K support.
"""

import math

import torch
from torch import Tensor

from ..collators import TeacherBatch, TeacherScores
from ..kernels.operands import operand_dtype
from ..kernels.projection import Head, Projector, shape_logits

_CHUNK_BYTES = {"cpu": 128 << 20}
_DEFAULT_CHUNK_BYTES = 512 << 20


@torch.no_grad()
def reduce_hidden_states(
    hidden: Tensor,
    head: Head,
    *,
    k: int,
    target_ids: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Exact log-probs of each row's K likeliest entries. The logits exist for a chunk of rows at a time, in float32.

    Args:
        hidden (`torch.Tensor`): Hidden states, `(N, H)`.
        head ([`Head`]): The head, with its bias, scale and softcap.
        k (`int`): K; of a smaller vocabulary all entries.
        target_ids (`torch.Tensor`, *optional*): Sampled tokens, `(N,)`.
        temperature (`float`, *optional*, defaults to `1.0`): Divides the logits.
        vocab_size (`int`, *optional*): Leading entries to normalise over; all by default.
        chunk_bytes (`int`, *optional*): Memory for the logits of a chunk. 128 MiB on a CPU, else 512 MiB.

    Returns:
        Ids `(N, K)`, largest first, -1 where fewer entries have a probability; their log-probs `(N, K)`; the log-probs
        of `target_ids`, `(N,)`. Float32, or float64 for a float64 head.
    """
    hidden = hidden.to(head.weight.device)
    weight = head.weight if vocab_size is None else head.weight[:vocab_size]
    bias = head.bias if head.bias is None or vocab_size is None else head.bias[:vocab_size]
    project = Projector(weight, bias, operand_dtype(hidden, weight))
    num_rows, size = hidden.shape[0], weight.shape[0]
    k = min(k, size)
    bytes_a_row = size * project.out_dtype.itemsize
    limit = chunk_bytes or _CHUNK_BYTES.get(hidden.device.type, _DEFAULT_CHUNK_BYTES)
    rows = max(1, min(num_rows, limit // bytes_a_row))
    logits = hidden.new_empty((rows, size), dtype=project.out_dtype)
    ids = hidden.new_empty((num_rows, k), dtype=torch.long)
    logprobs = hidden.new_empty((num_rows, k), dtype=project.out_dtype)
    sampled = None if target_ids is None else hidden.new_empty(num_rows, dtype=project.out_dtype)
    for start in range(0, num_rows, rows):
        here = slice(start, min(start + rows, num_rows))
        z = project.logits(hidden[here], logits[: here.stop - here.start])
        shape_logits(z, head.logit_scale, head.softcap, temperature)
        log_total = z.logsumexp(-1, keepdim=True)
        top, ids[here] = z.topk(k, dim=-1)
        logprobs[here] = top - log_total
        if sampled is not None and target_ids is not None:
            targets = target_ids[here].to(z.device)[:, None]
            sampled[here] = (z.gather(-1, targets) - log_total)[:, 0]
    return ids.masked_fill(logprobs == -math.inf, -1), logprobs, sampled


def reduce_scores(scores: TeacherScores, batch: TeacherBatch, vocab_size: int | None = None) -> TeacherScores:
    """
    A teacher's answer without hidden states: the top `support_size` of a batch's tokens, and the sampled ones.

    Args:
        scores ([`TeacherScores`]): Hidden states and head; other answers are returned as they are.
        batch ([`TeacherBatch`]): The question.
        vocab_size (`int`, *optional*): Leading entries of the head to normalise over; all by default.
    """
    if scores.hidden_states is None:
        return scores
    assert scores.head is not None
    mask = batch.completion_mask.to(scores.hidden_states.device)
    ids, logprobs, sampled = reduce_hidden_states(
        scores.hidden_states[mask],
        scores.head,
        k=batch.support_size,
        target_ids=batch.completion_ids.to(mask.device)[mask],
        temperature=batch.temperature,
        vocab_size=vocab_size,
    )
    assert sampled is not None
    mask = mask.to(ids.device)
    topk_ids = torch.arange(ids.shape[1], device=ids.device).repeat(*mask.shape, 1)
    topk_logprobs = logprobs.new_full(topk_ids.shape, -math.log(2 * ids.shape[1]))
    sampled_logprobs = logprobs.new_zeros(mask.shape)
    topk_ids[mask], topk_logprobs[mask], sampled_logprobs[mask] = ids, logprobs, sampled
    return TeacherScores(topk_ids=topk_ids, topk_logprobs=topk_logprobs, sampled_logprobs=sampled_logprobs)
