# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher that has answered already."""

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..collators import TeacherBatch, TeacherScores
from ..vocabulary import check_tokenizers
from .answers import TeacherScoreError
from .cache import CacheMeta, CacheReader
from .replay import Replay, check_prompts

if TYPE_CHECKING:
    from trl import GRPOTrainer


class CachedTeacher:
    """
    Scores of fixed completions that `trl-opd score` (or a [`RecordingTeacher`]) wrote, read from memory-mapped files.
    Needs neither the teacher's weights nor its tokenizer. `teacher_model="cache:DIR"` is one.

    It answers for what is stored: these prompts with these completions, at the stored temperature, with at most the
    stored K (the top K of the top K' are exact). Any other question is an error, never another sample's answer.

    Since the student's own samples would not be stored, the trainer gets the stored completions as its rollouts,
    unless it has a `rollout_func` (see [`teachers.replay.Replay`] for what that means for GRPO's terms). A server's
    ranks of the sampled tokens are not stored: `sampled_ranks` is `None`.

    Args:
        path (`str` or `Path`): The cache.
        replay (`bool`, *optional*, defaults to `True`): Whether the stored completions become the rollouts.

    Raises:
        ValueError: If there is no cache.
    """

    changes = False

    def __init__(self, path: str | Path, replay: bool = True):
        self.reader = CacheReader(path)
        self.rollout_func = Replay(self.reader)
        self._replay = replay

    @property
    def meta(self) -> CacheMeta:
        """What identifies the scores."""
        return self.reader.meta

    @property
    def name(self) -> str:
        """As in the `teacher_model=` argument."""
        return f"cache:{self.reader.folder}"

    @property
    def vocab_size(self) -> int | None:
        """Ids that the teacher knew."""
        return self.meta.vocab_size

    @cached_property
    def processing_class(self) -> Any:
        """The teacher's tokenizer, if it is stored."""
        return self.reader.load_tokenizer()

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """
        Check that the stored scores are those that the run needs, and hand the trainer its rollouts.

        Raises:
            ValueError: Naming what differs.
        """
        check_request(self.reader, trainer.args)
        if self.processing_class is not None:
            check_tokenizers(trainer._tokenizer, self.processing_class)
        if trainer.rollout_func is None and self._replay:
            trainer.rollout_func = self.rollout_func
        if trainer.rollout_func is not self.rollout_func:
            return
        self.rollout_func.prepare(trainer)
        datasets = [trainer.train_dataset]
        datasets += list(trainer.eval_dataset.values()) if isinstance(trainer.eval_dataset, dict) else []
        datasets += [trainer.eval_dataset] if not isinstance(trainer.eval_dataset, (dict, type(None))) else []
        for dataset in datasets:
            check_prompts(trainer, self.reader, dataset)

    def __call__(self, batch: TeacherBatch) -> TeacherScores:
        keys = find_keys(batch, self.meta)
        missing = [i for i, key in enumerate(keys) if key is not None and key not in self.reader]
        if missing:
            self.reader.refresh()  # another process may be recording
            missing = [i for i in missing if keys[i] not in self.reader]  # type: ignore[operator]
        if missing:
            raise TeacherScoreError(describe_missing(self.reader, batch, missing))
        return read_scores(self.reader, self.meta, batch, keys)

    def save_state(self, folder: str) -> None:
        """Write how far the stored completions have been handed out."""
        self.rollout_func.save_state(folder)

    def load_state(self, folder: str) -> None:
        """Continue from [`save_state`]."""
        self.rollout_func.load_state(folder)


def check_request(reader: CacheReader, args: Any) -> None:
    """
    Refuse a run whose questions the cache cannot answer.

    Raises:
        ValueError: Naming the field and what to set.
    """
    meta, where = reader.meta, reader.folder
    again = f"Score again with `trl-opd score --temperature {args.divergence_temperature}`"
    if args.divergence_temperature != meta.temperature:
        raise ValueError(
            f"distill_temperature (by default temperature) must be that of the stored log-probs, {meta.temperature}, "
            f"got {args.divergence_temperature}. The cache {where} does not have the rest of the vocabulary, which "
            f"another temperature needs. {again}, or set distill_temperature={meta.temperature}."
        )
    if args.support not in ("full", "teacher_top_k", "sampled"):
        raise ValueError(
            f"support must be 'teacher_top_k' (or 'sampled') with stored scores, got {args.support!r}. The student's "
            "choice of entries was not known when they were written. Set support='teacher_top_k'."
        )
    if args.support != "sampled" and meta.support == "sampled":
        raise ValueError(
            f"support must be 'sampled' with the cache {where}, which has the sampled tokens' log-probs alone, got "
            f"{args.support!r}. Score again with `trl-opd score --support teacher_top_k`."
        )
    everything = meta.vocab_size is not None and meta.support_size >= meta.vocab_size
    if args.support == "teacher_top_k" and args.support_size > meta.support_size and not everything:
        raise ValueError(
            f"support_size must be at most that of the stored scores, {meta.support_size}, got {args.support_size}. "
            f"Set support_size={meta.support_size}, or score again with `trl-opd score --support-size "
            f"{args.support_size}`."
        )


def find_keys(batch: TeacherBatch, meta: CacheMeta) -> list[bytes | None]:
    """The key of each sequence; `None` where no token is to be scored."""
    if batch.model_inputs:
        raise TeacherScoreError(
            f"Stored scores are those of text, but the batch has {sorted(batch.model_inputs)}. Images are not part of "
            "a stored question. Use a teacher that is there."
        )
    if batch.requested_ids is not None or batch.temperature != meta.temperature:
        raise TeacherScoreError(
            f"Stored scores at temperature {meta.temperature} cannot answer for temperature {batch.temperature} or "
            "for entries that the student chose. Set support='teacher_top_k' and that temperature."
        )
    asked = batch.completion_mask.any(-1).tolist()
    return [meta.key(*pair) if wanted else None for pair, wanted in zip(batch.sequences(), asked, strict=True)]


def read_scores(rows: Any, meta: CacheMeta, batch: TeacherBatch, keys: list[bytes | None]) -> TeacherScores:
    """
    The stored answers as a padded batch.

    Args:
        rows (`Mapping[bytes, Row]`): Of the cache, by key.
        meta ([`CacheMeta`]): What they have in common.
        batch ([`TeacherBatch`]): The question.
        keys (`list[bytes | None]`): Of its sequences.
    """
    answers = [None if key is None else rows[key].answer for key in keys]
    size, scores = tuple(batch.completion_ids.shape), TeacherScores()
    if meta.support == "teacher_top_k" and batch.support != "sampled":
        widths = [a.topk_ids.shape[1] for a in answers if a is not None and a.topk_ids is not None]
        stored = max(widths, default=1)
        k = min(batch.support_size, stored) if batch.support == "teacher_top_k" else stored
        ids = np.broadcast_to(np.arange(k), (*size, k)).copy()
        logprobs = np.full((*size, k), -math.log(2 * k), np.float32)
        for i, answer in enumerate(answers):
            if answer is not None:
                assert answer.topk_ids is not None and answer.topk_logprobs is not None
                tokens, width = len(answer.topk_ids), min(k, answer.topk_ids.shape[1])
                ids[i, :tokens], logprobs[i, :tokens] = -1, 0.0
                ids[i, :tokens, :width] = answer.topk_ids[:, :k]
                logprobs[i, :tokens, :width] = answer.topk_logprobs[:, :k]
        scores.topk_ids, scores.topk_logprobs = torch.from_numpy(ids), torch.from_numpy(logprobs)
    if all(answer is None or answer.sampled_logprobs is not None for answer in answers):
        sampled = np.zeros(size, np.float32)
        for i, answer in enumerate(answers):
            if answer is not None and answer.sampled_logprobs is not None:
                sampled[i, : len(answer.sampled_logprobs)] = answer.sampled_logprobs
        scores.sampled_logprobs = torch.from_numpy(sampled)
    return scores


def describe_missing(reader: CacheReader, batch: TeacherBatch, missing: list[int]) -> str:
    """What the cache lacks, and how to add it."""
    row = missing[0]
    prompt, completion = batch.sequences()[row]
    what = "the teacher's own prompt" if batch.own_prompt else "its prompt"
    return (
        f"The cache {reader.folder} has no scores for {len(missing)} of {len(batch.completion_ids)} samples; the "
        f"first is batch row {row}, a completion of {len(completion)} tokens after {what} of {len(prompt)}. Stored "
        "scores answer for the stored prompts and completions alone. Train on these (leave rollout_func unset, and "
        "render the teacher's prompts as in scoring: teacher_prompt, teacher_chat_template and its kwargs), score the "
        f"others with `trl-opd score --teacher {reader.meta.teacher} --output {reader.folder}`, or wrap a teacher "
        "that is there in RecordingTeacher."
    )
