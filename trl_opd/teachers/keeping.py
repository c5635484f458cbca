# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""From a teacher's answer about a batch to scores of single samples that can be stored."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..collators import TeacherBatch, TeacherScores
from .answers import TeacherScoreError, find_bad_score
from .base import PendingScores, collect, teacher_name
from .cache import Answer, CacheMeta, Question
from .topk import reduce_scores


def whole_question(batch: TeacherBatch, meta: CacheMeta) -> TeacherBatch:
    """A batch's question about all of its completion tokens, whichever the loss leaves out, in the cache's support."""
    mask = batch.attention_mask[:, -batch.num_completion_tokens :].bool()
    size = meta.support_size or batch.support_size
    return replace(batch, completion_mask=mask, support=meta.support, support_size=size)


def make_question(questions: Sequence[Question], meta: CacheMeta, device: torch.device) -> TeacherBatch:
    """Samples as a batch: prompts padded on the left, completions on the right."""
    prompt_width = max(len(q.asked_prompt) for q in questions)
    width = prompt_width + max(len(q.completion_ids) for q in questions)
    ids = torch.zeros(len(questions), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, question in enumerate(questions):
        start, stop = prompt_width - len(question.asked_prompt), prompt_width + len(question.completion_ids)
        ids[i, start:stop] = torch.tensor([*question.asked_prompt, *question.completion_ids])
        mask[i, start:stop] = 1
    batch = TeacherBatch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
        completion_ids=ids[:, prompt_width:].to(device),
        completion_mask=mask[:, prompt_width:].bool().to(device),
        temperature=meta.temperature,
        own_prompt=any(q.teacher_prompt_ids is not None for q in questions),
    )
    return whole_question(batch, meta)


def answers_of(
    teacher: Any,
    pending: PendingScores | None,
    rows: torch.Tensor,
    question: TeacherBatch,
    meta: CacheMeta,
    vocab_size: int | None = None,
) -> list[Answer]:
    """
    Whole, finite scores of each sample of a question.

    Args:
        teacher ([`Teacher`]): Who is asked.
        pending ([`PendingScores`], *optional*): If it was asked before.
        rows (`torch.Tensor`): Where the samples stand in what it was asked, `(R,)`.
        question ([`TeacherBatch`]): Of [`whole_question`], these R samples.
        meta ([`CacheMeta`]): What is to be stored.
        vocab_size (`int`, *optional*): Ids that the student knows.

    Raises:
        TeacherScoreError: If they are not.
    """
    name = teacher_name(teacher)
    scores = collect(teacher, pending, rows, question, vocab_size)
    if not isinstance(scores, TeacherScores):
        raise TeacherScoreError(
            f"Teacher {name!r} answers for several teachers at once, which a cache does not hold. Score with each of "
            "them into a cache of its own."
        )
    scores = reduce_scores(scores, question)
    bad = find_bad_score(scores, question.completion_mask)
    if bad is not None:
        row, token, value = bad
        raise TeacherScoreError(
            f"Teacher {name!r} returned a score that is not finite: {value} at completion token {token} of a sample "
            f"of {len(question.sequences()[row][1])}. Nothing of this batch was stored. Check the teacher's dtype "
            "(float16 overflows in many models)."
        )
    wanted = min(meta.support_size, meta.vocab_size or meta.support_size)
    if meta.support == "teacher_top_k":
        got = 0 if scores.topk_ids is None else scores.topk_ids.shape[-1]
        if got < wanted:
            raise TeacherScoreError(
                f"Teacher {name!r} returned {got} log-probs a token of {wanted}. A cache of {wanted} would promise "
                "what it does not hold. Set support_size to what the teacher gives, or let its server give more."
            )
    elif scores.sampled_logprobs is None:
        raise TeacherScoreError(
            f"Teacher {name!r} did not return sampled_logprobs, which a cache with support='sampled' holds."
        )
    return _split(scores, question, meta)


def _split(scores: TeacherScores, question: TeacherBatch, meta: CacheMeta) -> list[Answer]:
    sampled = None if scores.sampled_logprobs is None else scores.sampled_logprobs.float().cpu().numpy()
    topk_ids = topk_logprobs = None
    if meta.support == "teacher_top_k":
        assert scores.topk_ids is not None and scores.topk_logprobs is not None
        ids, logprobs = scores.topk_ids, scores.topk_logprobs.float().masked_fill(scores.topk_ids < 0, -torch.inf)
        if bool((logprobs[..., 1:] > logprobs[..., :-1]).any()):  # the top k of the top k' must be its first
            logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
            ids = ids.gather(-1, order)
        topk_ids = ids[..., : meta.support_size].cpu().numpy()
        topk_logprobs = logprobs[..., : meta.support_size].cpu().numpy()
    answers = []
    for i, tokens in enumerate(question.completion_mask.sum(-1).tolist()):
        answers.append(
            Answer(
                topk_ids=None if topk_ids is None else topk_ids[i, :tokens],
                topk_logprobs=None if topk_logprobs is None else topk_logprobs[i, :tokens],
                sampled_logprobs=None if sampled is None else sampled[i, :tokens],
            )
        )
    return answers
