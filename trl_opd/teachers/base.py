# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The protocol of a teacher, how the `teacher_model=` argument becomes one, and the check of its answers."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..collators import TeacherBatch, TeacherScores
from ..kernels.supports import repeated_id


@runtime_checkable
class Teacher(Protocol):
    """
    A teacher answers a [`TeacherBatch`] with [`TeacherScores`]. Any callable is one, so a function that returns
    log-probs is enough; a bare tensor `(B, T)` counts as sampled-token log-probs.

    Optional attributes and methods that the trainer uses if they are there:
    - `name` (`str`): how error messages call it.
    - `prepare(trainer)`: called once, when the student is on its device and wrapped by accelerate's configuration.
    - `scores_in_loss` (`bool`): score each micro-batch inside the loss instead of each generation batch once. Needed
      for hidden states, which are too large to keep.
    - `vocab_size` (`int`): number of ids it knows.
    """

    def __call__(self, batch: TeacherBatch) -> "TeacherScores | Tensor": ...


class TeacherScoreError(RuntimeError):
    """A teacher's scores cannot be trained on; no step was taken with them."""


def teacher_name(teacher: object) -> str:
    """How to call a teacher in a message."""
    return getattr(teacher, "name", None) or getattr(teacher, "__name__", None) or type(teacher).__name__


def resolve_teacher(teacher_model: Any, init_kwargs: Mapping[str, Any], trust_remote_code: bool = False) -> Any:
    """
    Turn the `teacher_model=` argument into a [`Teacher`].

    Args:
        teacher_model:
            Path or hub id; `"base"` (the student without its adapter) or `"adapter:NAME"`; a model; any callable.
        init_kwargs (`Mapping[str, Any]`): For `from_pretrained`.
        trust_remote_code (`bool`): Likewise.

    Raises:
        ValueError, TypeError: If it is none of these.
    """
    from .adapter import AdapterTeacher
    from .local import LocalTeacher

    if isinstance(teacher_model, str):
        if teacher_model == "base" or teacher_model.startswith("adapter:"):
            return AdapterTeacher.from_string(teacher_model)
        if teacher_model.startswith(("http://", "https://")):
            raise ValueError(
                f"teacher_model must be a path, a hub id, 'base', 'adapter:NAME', a model or a callable, got the URL "
                f"{teacher_model!r}. This version has no client for teacher servers. Pass a callable that asks the "
                "server and returns TeacherScores."
            )
        return LocalTeacher(teacher_model, **{"trust_remote_code": trust_remote_code, **init_kwargs})
    if isinstance(teacher_model, nn.Module) and hasattr(teacher_model, "config"):
        if init_kwargs:
            raise ValueError(
                "teacher_model_init_kwargs must be unset when teacher_model is an instantiated model. They would be "
                "ignored. Load the model with them yourself, or pass its path."
            )
        return LocalTeacher(teacher_model)
    if callable(teacher_model):
        return teacher_model
    raise TypeError(
        f"teacher_model must be a path, a hub id, 'base', 'adapter:NAME', a model or a callable, got "
        f"{type(teacher_model).__name__}."
    )


def ask(teacher: Any, batch: TeacherBatch, vocab_size: int | None = None) -> TeacherScores:
    """
    Ask a teacher, without gradient, and check the form of its answer.

    Args:
        teacher ([`Teacher`]): Who is asked.
        batch ([`TeacherBatch`]): The question.
        vocab_size (`int`, *optional*): Ids that the student knows.
    """
    with torch.no_grad():
        scores = teacher(batch)
    if isinstance(scores, Tensor):
        scores = TeacherScores(sampled_logprobs=scores)
    name = teacher_name(teacher)
    if not isinstance(scores, TeacherScores):
        raise TypeError(f"Teacher {name!r} must return TeacherScores or a tensor, got {type(scores).__name__}.")
    if scores.hidden_states is None and scores.topk_ids is None and scores.sampled_logprobs is None:
        raise TeacherScoreError(
            f"Teacher {name!r} must return scores, got none. Return hidden_states with their head, topk_ids with "
            "topk_logprobs, or sampled_logprobs."
        )
    if scores.hidden_states is not None and scores.head is None:
        raise TeacherScoreError(f"Teacher {name!r} must return hidden_states and head together.")
    shape = tuple(batch.completion_ids.shape)
    for key in ("hidden_states", "topk_ids", "topk_logprobs", "sampled_logprobs"):
        value = getattr(scores, key)
        if value is None:
            continue
        if tuple(value.shape[:2]) != shape or value.dim() != (2 if key == "sampled_logprobs" else 3):
            raise TeacherScoreError(
                f"Teacher {name!r} returned {key} of shape {tuple(value.shape)} for completions of shape {shape}. "
                "Partial scores are never trained on. Return one row per sequence and one entry per completion token."
            )
        value = value.to(batch.completion_ids.device).detach()
        if key == "topk_ids" and scores.topk_logprobs is not None and value.shape != scores.topk_logprobs.shape:
            raise TeacherScoreError(
                f"Teacher {name!r} returned topk_ids of shape {tuple(value.shape)} and topk_logprobs of shape "
                f"{tuple(scores.topk_logprobs.shape)}. Return one log-prob for each id; ids below 0 are padding."
            )
        # A score that is not asked for may be anything: with a weight of 0 a NaN would still be one
        keep = batch.completion_mask if value.dim() == 2 else batch.completion_mask[..., None]
        if key == "topk_ids":
            value = torch.where(keep, value, torch.arange(value.shape[-1], device=value.device))
        else:
            value = value.masked_fill(~keep, 0.0 if key != "topk_logprobs" else -math.log(2 * value.shape[-1]))
        if key != "hidden_states":
            _check_values(name, key, value, vocab_size)
        setattr(scores, key, value)
    if (scores.topk_ids is None) != (scores.topk_logprobs is None):
        raise TeacherScoreError(f"Teacher {name!r} must return topk_ids and topk_logprobs together.")
    return scores


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


def find_bad_score(scores: TeacherScores, mask: Tensor) -> tuple[int, int, float] | None:
    """First `(sequence, token, value)` whose score is NaN or infinite where `mask` holds; `None` if all are finite."""
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
