"""Caches of a tiny teacher's scores, and the samples in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import make_model, make_tokenizer

from trl_opd.teachers.cache import Answer, CacheMeta, Question

TEACHER = {"hidden_size": 24, "seed": 1}
WORDS = ["abc", "hello world", "x", "the quick brown fox", "12 34", "what is it", "no", "yes or no"]


def save_teacher(folder: Path, **kwargs: Any) -> str:
    """A teacher and its tokenizer on disk."""
    make_model(**{**TEACHER, **kwargs}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_rows(num: int = 12) -> list[dict[str, str]]:
    """Prompts with completions of different lengths; with more than eight rows a prompt has several."""
    return [{"prompt": WORDS[i % 8], "completion": WORDS[(3 * i + 1 + i // 8) % 8][: 1 + i % 7]} for i in range(num)]


def save_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def score_arguments(folder: Path, **fields: Any) -> dict[str, Any]:
    """Arguments of `trl-opd score` for a teacher and rows made in `folder`."""
    if not (folder / "teacher").exists():
        save_teacher(folder / "teacher")
    rows = fields.pop("rows", None) or make_rows()
    return {
        "teacher": str(folder / "teacher"),
        "dataset": save_rows(folder / "rows.jsonl", rows),
        "output": str(folder / "scores"),
        "support_size": 5,
        "batch_size": 3,
        "shard_tokens": 12,
        **fields,
    }


def make_samples(num: int, seed: int = 0, vocab_size: int = 51, k: int = 4) -> list[tuple[Question, Answer]]:
    """Samples with random scores that are those of distributions."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(num):
        prompt = torch.randint(vocab_size, (2 + i % 3,), generator=generator).tolist()
        completion = torch.randint(vocab_size, (1 + i % 5,), generator=generator).tolist()
        logprobs = (3 * torch.randn(len(completion), vocab_size, generator=generator)).log_softmax(-1)
        top = logprobs.topk(k, -1)
        sampled = logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        answer = Answer(top.indices.numpy(), top.values.numpy(), sampled.numpy())
        samples.append((Question(prompt, completion), answer))
    return samples


def meta(**fields: Any) -> CacheMeta:
    return CacheMeta(**{"teacher": "tiny", "vocab_size": 51, "support_size": 4, **fields})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache but the locks."""
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith(".lock")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def full_logprobs(model: Any, question: Question, temperature: float = 1.0) -> np.ndarray:
    """Log-probs `(T, V)` of a completion, by the model alone on this sample, from float64 logits."""
    ids = [*question.asked_prompt, *question.completion_ids]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return (logits[len(question.asked_prompt) - 1 : -1] / temperature).log_softmax(-1).numpy()
