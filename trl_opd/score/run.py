# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Scoring a dataset shard by shard."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm
from trl import TrlParser

from ..teachers.base import submit
from ..teachers.cache import Answer, CacheMeta, CacheWriter, Question
from ..teachers.cache.files import CorruptCacheError
from ..teachers.fingerprints import model_name, tokenizer_fingerprint, weights_fingerprint
from ..teachers.keeping import answers_of, make_question
from .arguments import ScoreArguments, ScoringRun
from .data import Questions, Renderer, load_rows

logger = logging.getLogger(__name__)

_SHARD_ROWS = 4096


@dataclass
class Summary:
    """What a run did: samples, those scored now, their tokens and seconds; rows left out; bytes and tokens stored."""

    samples: int = 0
    scored: int = 0
    scored_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    size: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        mib, per_million = self.size / 2**20, self.size / 2**20 / max(1, self.tokens) * 1e6
        speed = self.scored_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.samples} samples ({self.scored} scored now, {self.skipped} too long), {self.tokens} tokens, "
            f"{mib:.1f} MiB ({per_million:.0f} MiB per million tokens), {speed:.0f} tokens/s"
        )


class Scorer:
    """
    Asks a teacher about the samples of a shard.

    The samples of a forward pass are chosen within the shard, so that a shard's bytes do not depend on the others.

    Args:
        teacher ([`Teacher`]): Who is asked.
        meta ([`CacheMeta`]): What is asked for.
        batch_size (`int`): Samples of a forward pass.
        device (`torch.device`): Where the questions go.
    """

    def __init__(self, teacher: Any, meta: CacheMeta, batch_size: int, device: torch.device):
        self.teacher, self.meta, self.batch_size, self.device = teacher, meta, batch_size, device

    def __call__(self, questions: dict[bytes, Question]) -> dict[bytes, Answer]:
        if getattr(self.teacher, "asynchronous", False):  # it makes batches of its own
            return self._ask(questions) if questions else {}
        answers: dict[bytes, Answer] = {}
        by_length = sorted(questions, key=lambda key: (-len(questions[key]), key))
        for start in range(0, len(by_length), self.batch_size):
            answers |= self._ask({key: questions[key] for key in by_length[start : start + self.batch_size]})
        return answers

    def _ask(self, questions: dict[bytes, Question]) -> dict[bytes, Answer]:
        question = make_question(list(questions.values()), self.meta, self.device)
        pending = submit(self.teacher, question) if getattr(self.teacher, "asynchronous", False) else None
        rows = torch.arange(len(questions), device=self.device)
        return dict(zip(questions, answers_of(self.teacher, pending, rows, question, self.meta), strict=True))


def make_shards(questions: Iterator[Question], writer: CacheWriter, shard_tokens: int) -> Iterator[list[Question]]:
    """
    The samples of each shard: as many as it holds if it is there, else `shard_tokens` completion tokens of them.

    Where a shard begins thus depends on the dataset alone, and a resumed run makes the same ones.
    """
    number, samples = 0, 0
    while True:
        entry = writer.entries.get(number)
        shard = list(islice(questions, len(entry.samples))) if entry is not None else []
        if entry is None:
            tokens = 0
            for question in questions:
                shard.append(question)
                tokens += len(question.completion_ids)
                if tokens >= shard_tokens or len(shard) >= _SHARD_ROWS:
                    break
        if not shard:
            if entry is not None:
                raise _not_its_rows(writer, samples)
            return
        yield shard
        number, samples = number + 1, samples + len(shard)


def check_shard(writer: CacheWriter, number: int, shard: Sequence[Question]) -> bool:
    """
    Whether a shard is there, holds these samples, and is as it was written.

    Raises:
        ValueError: If it holds others.
    """
    entry = writer.entries.get(number)
    if entry is None:
        return False
    different = [i for i, pair in enumerate(writer.samples(shard)) if entry.samples[i] != pair]
    if different or len(shard) != len(entry.samples):
        row = sum(len(writer.entries[n].samples) for n in range(number)) + (different[0] if different else len(shard))
        raise _not_its_rows(writer, row)
    try:
        entry.verify(writer.folder)
    except CorruptCacheError as error:
        logger.warning(f"{error} It is scored again now.")
        return False
    return True


def _not_its_rows(writer: CacheWriter, sample: int) -> ValueError:
    return ValueError(
        f"The cache {writer.folder} must hold the first rows of this dataset, but sample {sample} is another one "
        "there (or none here). Give another output folder, or the dataset, tokenizer, chat template and max_length "
        "that it was begun with (rows may be added at the end)."
    )


def score_dataset(arguments: ScoreArguments, run: ScoringRun | None = None, progress: bool = True) -> Summary:
    """
    Write the scores of a dataset's completions, or what is left of them.

    Args:
        arguments ([`ScoreArguments`]): Teacher, dataset and output.
        run ([`ScoringRun`], *optional*): A teacher that is loaded already.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
    """
    dataset = load_rows(arguments)
    run = ScoringRun(arguments) if run is None else run
    run.prepare()
    teacher, tokenizer = run.teacher, run.teacher_tokenizer or run.tokenizer
    max_length = arguments.max_length or getattr(teacher, "max_length", None)
    meta = CacheMeta(
        teacher=model_name(teacher),
        weights=weights_fingerprint(teacher),
        vocab_size=getattr(teacher, "vocab_size", None),
        vocabulary=tokenizer_fingerprint(tokenizer),
        temperature=arguments.temperature,
        support=arguments.support,
        support_size=arguments.support_size,
        logprob_dtype=arguments.logprob_dtype,
        compression=arguments.compression,
    )
    questions = Questions(dataset, Renderer(run, arguments.append_eos), max_length, arguments.overflow)
    scorer = Scorer(teacher, meta, arguments.batch_size, run.accelerator.device)
    summary = Summary()
    with (
        CacheWriter(str(arguments.output), meta, tokenizer=tokenizer) as writer,
        tqdm(total=len(dataset), unit=" samples", desc="score", disable=not progress) as bar,
    ):
        for number, shard in enumerate(make_shards(iter(questions), writer, arguments.shard_tokens)):
            if not check_shard(writer, number, shard):
                started = time.perf_counter()
                new = writer.unanswered(shard, number)
                writer.write(shard, scorer(new), number)
                summary.scored += len(new)
                summary.scored_tokens += writer.entries[number].tokens
                summary.seconds += time.perf_counter() - started
            summary.samples += len(shard)
            bar.update(len(shard))
        for entry in writer.entries.values():
            names = (writer.folder / entry.name, writer.folder / entry.data_name)
            summary.size += sum(path.stat().st_size for path in names)
            summary.tokens += entry.tokens
    summary.skipped = questions.skipped
    return summary


def main(argv: list[str] | None = None) -> int:
    """Parse, score, print the summary."""
    parser = TrlParser((ScoreArguments,), prog="trl-opd score")
    (arguments,) = parser.parse_args_and_config(argv)
    summary = score_dataset(arguments)
    print(f"{arguments.output}: {summary}")
    return 0
