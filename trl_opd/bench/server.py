# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a teacher's server delivers: scored tokens a second, bytes on the wire, and the time it takes to read them.

    trl-opd bench server --url http://localhost:8000 --vocab 151936 --k 0 16 64 --prompt 512 --completion 2048

Random texts, so that no cache helps. K = 0 asks for the sampled tokens' log-probs alone (`support="sampled"`). Each K
takes its turn after one text that is not counted. tokens/s: completion tokens scored a second with all requests under
way (`--max-in-flight`). bytes: what the server sends for each token of prompt and completion. read: microseconds for
each of those tokens to parse a whole answer and take the log-probs out, one answer at a time.
"""

import argparse
import json
import time
from typing import Any

import torch

from ..teachers.cache import CacheMeta, Question
from ..teachers.keeping import make_question
from ..teachers.remote import RemoteTeacher, protocols
from .measure import machine, show_table, write_json


def questions(number: int, args: argparse.Namespace, generator: torch.Generator) -> list[Question]:
    """Random prompts and completions."""
    ids = torch.randint(args.lowest_id, args.vocab, (number, args.prompt + args.completion), generator=generator)
    return [Question(row[: args.prompt], row[args.prompt :]) for row in ids.tolist()]


def ask(teacher: RemoteTeacher, texts: list[Question], k: int) -> float:
    """Seconds until all are answered."""
    batch = make_question(texts, CacheMeta(teacher="server", support_size=max(k, 1)), torch.device("cpu"))
    batch.support = "teacher_top_k" if k else "sampled"
    started = time.perf_counter()
    teacher.submit(batch).collect(torch.arange(len(texts)), batch)
    return time.perf_counter() - started


def reading_seconds(teacher: RemoteTeacher, text: Question, k: int) -> float:
    """Seconds to parse one answer and to take its log-probs out."""
    (server,) = teacher.client.servers
    assert server.identity is not None
    protocol = protocols.PROTOCOLS[server.identity.kind]
    question = protocols.Question(list(text.prompt_ids), list(text.completion_ids), k, 1.0)
    body = json.dumps(teacher.client.call(server, "POST", *protocol.ask(question, server.identity.model)))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        protocol.read(json.loads(body), question, server.identity.model)
        times.append(time.perf_counter() - started)
    return min(times)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Figures for each K."""
    generator = torch.Generator().manual_seed(args.seed)
    teacher = RemoteTeacher(args.url, model=args.model, api_key_env=args.api_key_env, max_in_flight=args.max_in_flight)
    rows = []
    try:
        for k in args.k:
            ask(teacher, questions(1, args, generator), k)
            before = teacher.client.counts["bytes"]
            texts = questions(args.sequences, args, generator)
            seconds = ask(teacher, texts, k)
            tokens = args.sequences * (args.prompt + args.completion)
            rows.append(
                {
                    "k": k,
                    "tokens_per_s": args.sequences * args.completion / seconds,
                    "bytes_per_token": (teacher.client.counts["bytes"] - before) / tokens,
                    "read_us_per_token": reading_seconds(teacher, texts[0], k) / (args.prompt + args.completion) * 1e6,
                }
            )
        (server,) = teacher.client.servers
        kind = None if server.identity is None else server.identity.kind
    finally:
        teacher.close()
    kept = {name: value for name, value in vars(args).items() if name not in ("url", "json", "api_key_env", "model")}
    return {"machine": machine(torch.device("cpu")), "server": kind, "args": kept, "rows": rows}


def main(argv: list[str] | None = None, prog: str = "trl-opd bench server") -> None:
    """Entry point of `trl-opd bench server`."""
    description, _, details = (__doc__ or "").strip().partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=details, formatter_class=formatter)
    parser.add_argument("--url", required=True, help="address of a vLLM or SGLang server")
    parser.add_argument("--model", help="name as served, if there are several")
    parser.add_argument("--vocab", type=int, required=True, help="ids to draw from: the tokenizer's size")
    parser.add_argument("--lowest-id", type=int, default=0, help="first of them (to leave special tokens out)")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--max-in-flight", type=int, default=64)
    parser.add_argument("--api-key-env", help="environment variable that holds the key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="keep the figures")
    args = parser.parse_args(argv)
    result = run(args)
    head = ["K", "tokens/s", "bytes a token", "read µs a token"]
    keys = ("tokens_per_s", "bytes_per_token", "read_us_per_token")
    print(show_table(head, [[str(row["k"]), *(f"{row[key]:.0f}" for key in keys)] for row in result["rows"]]))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
