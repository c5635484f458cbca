# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What stored scores take on disk, what they lose, and how fast they are written and read.

    trl-opd bench cache                       # K = 64 of 151,936 entries
    trl-opd bench cache --k 16 --vocab 32000

Random ids with log-probs that fall off as Zipf's law does, at entropies between 0 and 4 nats. Every combination of
`trl-opd score`'s --logprob-dtype and --compression writes the same samples. worst log-prob and worst tail: largest
error over all tokens, of an entry's log-prob (nats) and of the probability outside the stored entries.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..teachers.cache import Answer, CacheMeta, CacheWriter, Question
from ..teachers.cache.format import COMPRESSIONS, LOGPROB_DTYPES
from ..teachers.cached import CachedTeacher
from ..teachers.keeping import make_question
from .measure import machine, show_table, write_json


def samples(args: argparse.Namespace) -> tuple[list[tuple[Question, Answer]], np.ndarray]:
    """Questions with their answers, and the exact probability outside each answer's entries, `(samples, tokens)`."""
    generator = torch.Generator().manual_seed(args.seed)
    ranks = -1.3 * torch.arange(1, args.vocab + 1, dtype=torch.float32).log()
    made, tails = [], []
    for _ in range(args.samples):
        sharpness = 1.5 * (0.7 * torch.randn(args.completion, 1, generator=generator)).exp()
        noise = 0.3 * torch.randn(args.completion, args.vocab, generator=generator)
        logprobs = (ranks * sharpness + noise).double().log_softmax(-1)
        top = logprobs.topk(args.k, dim=-1)
        shift = torch.randint(args.vocab, (args.completion, 1), generator=generator)
        ids = (top.indices + shift) % args.vocab
        prompt, completion = (
            torch.randint(args.vocab, (n,), generator=generator).tolist() for n in (args.prompt, args.completion)
        )
        answer = Answer(ids.numpy(), top.values.float().numpy(), logprobs[:, 0].float().numpy())
        made.append((Question(prompt, completion), answer))
        tails.append((1 - top.values.exp().sum(-1)).numpy())
    return made, np.stack(tails)


def measure(made: list[tuple[Question, Answer]], tails: np.ndarray, meta: CacheMeta, folder: Path) -> dict[str, Any]:
    """Write and read one form of a cache."""
    tokens = sum(len(question.completion_ids) for question, _ in made)
    started = time.perf_counter()
    with CacheWriter(folder, meta) as writer:
        writer.write([question for question, _ in made], {writer.key(q): answer for q, answer in made})
    written = time.perf_counter() - started
    teacher = CachedTeacher(folder)
    groups = [[q for q, _ in made[i : i + 8]] for i in range(0, len(made), 8)]
    asked = [make_question(group, meta, torch.device("cpu")) for group in groups]
    started = time.perf_counter()
    for batch in asked:
        teacher(batch)
    read = time.perf_counter() - started
    logprob_error = tail_error = 0.0
    for (question, answer), tail in zip(made, tails, strict=True):
        stored = teacher.reader[meta.key(question.prompt_ids, question.completion_ids)].answer
        assert stored.topk_logprobs is not None and answer.topk_logprobs is not None
        logprob_error = max(logprob_error, float(np.abs(stored.topk_logprobs - answer.topk_logprobs).max()))
        rest = 1 - np.exp(stored.topk_logprobs.astype(np.float64)).sum(-1)
        tail_error = max(tail_error, float(np.abs(rest - tail).max()))
    size = sum(path.stat().st_size for path in folder.glob("shard*"))
    return {
        "logprob_dtype": meta.logprob_dtype,
        "compression": meta.compression,
        "bytes_per_token": size / tokens,
        "write_tokens_per_s": tokens / written,
        "read_tokens_per_s": tokens / read,
        "worst_logprob_error": logprob_error,
        "worst_tail_error": tail_error,
    }


def main(argv: list[str] | None = None, prog: str = "trl-opd bench cache") -> None:
    """Entry point of `trl-opd bench cache`."""
    description, _, details = (__doc__ or "").strip().partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=details, formatter_class=formatter)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=500, help="tokens of a completion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="keep the figures")
    args = parser.parse_args(argv)
    made, tails = samples(args)
    rows = []
    for dtype in LOGPROB_DTYPES:
        for compression in COMPRESSIONS:
            meta = CacheMeta(
                teacher="random",
                vocab_size=args.vocab,
                support_size=args.k,
                logprob_dtype=dtype,
                compression=compression,
            )
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(made, tails, meta, Path(folder)))
    head = ["log-probs", "compression", "bytes a token", "MiB/M tokens", "write tok/s", "read tok/s"]
    table = [
        [
            row["logprob_dtype"],
            row["compression"],
            f"{row['bytes_per_token']:.0f}",
            f"{row['bytes_per_token'] * 1e6 / 2**20:.0f}",
            f"{row['write_tokens_per_s']:.0f}",
            f"{row['read_tokens_per_s']:.0f}",
            f"{row['worst_logprob_error']:.1e}",
            f"{row['worst_tail_error']:.1e}",
        ]
        for row in rows
    ]
    print(show_table([*head, "worst log-prob", "worst tail"], table))
    write_json(args.json, {"machine": machine(torch.device("cpu")), "args": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
