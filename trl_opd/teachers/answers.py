# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The check of a teacher's answers: nothing that is not a whole set of log-probs is trained on."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..collators import MixedScores, RoutedScores, Scores, TeacherScores
from ..kernels.supports import repeated_id


class TeacherScoreError(RuntimeError):
    """A teacher's scores cannot be trained on; no step was taken with them."""


def answers(scores: Scores) -> Iterator[tuple[Tensor | None, TeacherScores]]:
    """Every teacher's answer, with the sequences it is about (`None`: all)."""
    if isinstance(scores, RoutedScores):
        for rows, part in scores.parts.values():
            for _, answer in answers(part):
                yield rows, answer
    elif isinstance(scores, MixedScores):
        for member in scores.members:
            yield None, member
    else:
        yield None, scores


def is_dense(scores: Scores) -> bool:
    """Whether hidden states are among the answers."""
    return any(answer.hidden_states is not None for _, answer in answers(scores))


def check_answer(
    scores: TeacherScores, completion_ids: Tensor, mask: Tensor, name: str, vocab_size: int | None = None
) -> None:
    """
    Check an answer's form and values, and move it to where the completions are.

    Args:
        scores ([`TeacherScores`]): The answer; changed in place.
        completion_ids (`torch.Tensor`): The completions that it is about, `(R, T)`.
        mask (`torch.Tensor`): The tokens to score, boolean, `(R, T)`. Scores elsewhere become harmless.
        name (`str`): How to call the teacher.
        vocab_size (`int`, *optional*): Ids that the student knows.

    Raises:
        TeacherScoreError: If it is not a whole answer of log-probs.
    """
    if scores.hidden_states is None and scores.topk_ids is None and scores.sampled_logprobs is None:
        raise TeacherScoreError(
            f"Teacher {name!r} must return scores, got none. Return hidden_states with their head, topk_ids with "
            "topk_logprobs, or sampled_logprobs."
        )
    if scores.hidden_states is not None and scores.head is None:
        raise TeacherScoreError(f"Teacher {name!r} must return hidden_states and head together.")
    shape = tuple(completion_ids.shape)
    for key in ("hidden_states", "topk_ids", "topk_logprobs", "sampled_logprobs", "sampled_ranks"):
        value = getattr(scores, key)
        if value is None:
            continue
        if tuple(value.shape[:2]) != shape or value.dim() != (2 if key.startswith("sampled") else 3):
            raise TeacherScoreError(
                f"Teacher {name!r} returned {key} of shape {tuple(value.shape)} for completions of shape {shape}. "
                "Partial scores are never trained on. Return one row per sequence and one entry per completion token."
            )
        value = value.to(completion_ids.device).detach()
        if key == "topk_ids" and scores.topk_logprobs is not None and value.shape != scores.topk_logprobs.shape:
            raise TeacherScoreError(
                f"Teacher {name!r} returned topk_ids of shape {tuple(value.shape)} and topk_logprobs of shape "
                f"{tuple(scores.topk_logprobs.shape)}. Return one log-prob for each id; ids below 0 are padding."
            )
        # A score that is not asked for may be anything: with a weight of 0 a NaN would still be one
        keep = mask if value.dim() == 2 else mask[..., None]
        if key == "topk_ids":
            value = torch.where(keep, value, torch.arange(value.shape[-1], device=value.device))
        else:
            value = value.masked_fill(~keep, 0.0 if key != "topk_logprobs" else -math.log(2 * value.shape[-1]))
        if key == "sampled_ranks":  # only looked at: what cannot be a rank is none
            value = torch.where(value >= 1, value, 0).float()
        elif key != "hidden_states" and (scores.normalized or key != "sampled_logprobs"):
            _check_values(name, key, value, vocab_size)
        setattr(scores, key, value)
    if (scores.topk_ids is None) != (scores.topk_logprobs is None):
        raise TeacherScoreError(f"Teacher {name!r} must return topk_ids and topk_logprobs together.")


def _check_values(name: str, key: str, value: Tensor, vocab_size: int | None) -> None:
    """Refuse what cannot be log-probs, and a support that the student does not know."""
    if key == "topk_ids":
        known = (value >= 0) if vocab_size is None else (value >= 0) & (value < vocab_size)
        if not known.any(-1).all():
            raise TeacherScoreError(
                f"Teacher {name!r} returned topk_ids (up to {int(value.max())}) of which some token has none in the "
                f"student's vocabulary of {vocab_size}. There is nothing to compare. Use a teacher of the same "
                "tokenizer, and pad with ids below 0 beside at least one real id."
            )
        repeated = repeated_id(value, vocab_size)
        if repeated is not None:
            raise TeacherScoreError(
                f"Teacher {name!r} returned topk_ids with {repeated} twice for one token. Its probability would count "
                "twice. Return each id once, and pad with ids below 0."
            )
    elif bool(((value > 1e-2) & torch.isfinite(value)).any()):  # `find_bad_score` names the sample of an infinity
        raise TeacherScoreError(
            f"Teacher {name!r} returned {key} of up to {float(value.max()):.3g}, but the logarithm of a probability "
            "is at most 0. The student would be trained away from it. Return natural log-probs, not probabilities or "
            "losses."
        )


def find_bad_score(scores: Scores, mask: Tensor) -> tuple[int, int, float] | None:
    """First `(sequence, token, value)` whose score is NaN or infinite where `mask` holds; `None` if all are finite."""
    for rows, answer in answers(scores):
        bad = _find_bad(answer, mask if rows is None else mask[rows])
        if bad is not None:
            row, token, value = bad
            return (row if rows is None else int(rows[row])), token, value
    return None


def _find_bad(scores: TeacherScores, mask: Tensor) -> tuple[int, int, float] | None:
    checks = []
    if scores.sampled_logprobs is not None:
        checks.append((scores.sampled_logprobs, ~torch.isfinite(scores.sampled_logprobs)))
    if scores.topk_logprobs is not None:
        assert scores.topk_ids is not None
        real = scores.topk_ids >= 0
        value = scores.topk_logprobs.float().masked_fill(~real, 0.0).sum(-1)
        checks.append((value, ~torch.isfinite(value) | ~real.any(-1)))
    for value, bad in checks:
        where = (bad & mask).nonzero()
        if where.numel():
            row, token = where[0].tolist()
            return row, token, float(value[row, token])
    return None
