# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Sampled completions with what both models thought of each token, as the page and the terminal show them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .figures import shorten
from .load import Run

MAX_COMPLETIONS = 200  # on a page
MAX_TOKENS = 200_000  # on a page: about 10 MB
MAX_STEPS = 24  # with completions: the last ones, and as many spread over those before
MAX_CHARACTERS = 20_000  # of a prompt, or of a completion without tokens
MAX_LENGTH = 3000  # tokens of one completion: the first two thirds and the last third of these
# Columns of numbers, by their names on the page
NUMBERS = {
    "gap": "token_gap",
    "student": "token_student_logprob",
    "teacher": "token_teacher_logprob",
    "kl": "token_reverse_kl",
    "rank": "token_teacher_rank",
    "weight": "token_weight",
}
_NOT_SCORES = {"step", "prompt", "completion", "advantage", "token_ids", "tokens", "token_mask", *NUMBERS.values()}


@dataclass
class Completion:
    """
    One sampled completion.

    Args:
        step (`int`), prompt (`str`): Where it comes from.
        text (`str`): The completion, if its tokens were not seen.
        tokens (`list[str]`): Empty if they were not seen.
        numbers (`dict[str, list[float | None]]`): One for each token, by the keys of `NUMBERS`; `None` where unknown.
        mask (`list[bool]`): Tokens that were distilled.
        scores (`dict[str, float]`): Rewards, advantage, and other numbers of the completions log.
        left_out (`int`), cut_at (`int`): Tokens in its middle that are not shown, and the index where they would be.
    """

    step: int
    prompt: str
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    numbers: dict[str, list[float | None]] = field(default_factory=dict)
    mask: list[bool] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    left_out: int = 0
    cut_at: int = 0

    def gaps(self) -> list[float]:
        """Gaps of the distilled tokens."""
        gaps = self.numbers.get("gap", [])
        return [gap for gap, keep in zip(gaps, self.mask, strict=False) if keep and gap is not None]

    @property
    def mean_gap(self) -> float | None:
        """Mean gap, in nats: minus an estimate of its reverse KL a token, so the lowest has strayed farthest."""
        gaps = self.gaps()
        return sum(gaps) / len(gaps) if gaps else None


def load_completions(run: Run) -> tuple[list[Completion], list[str]]:
    """
    Completions of a run: of its last steps and of some before, those with tokens first, the worst of each step.

    Args:
        run ([`Run`])

    Returns:
        `tuple[list[Completion], list[str]]`: By step, in a step the lowest mean gap first; and what was left out.
    """
    files = _spread(run.completions, MAX_STEPS)
    notes = []
    if len(files) < len(run.completions):
        notes.append(
            f"Of {len(run.completions)} steps with completions, the last {MAX_STEPS // 2} and {MAX_STEPS // 2} "
            "spread over those before are shown."
        )
    by_step: list[list[Completion]] = []
    for file in files:
        try:
            by_step.append(_of_file(file))
        except Exception as error:  # a file that is being written, or that a kill has torn
            notes.append(f"{file.name} could not be read ({type(error).__name__}).")
    total = sum(map(len, by_step))
    chosen = _within_budget(by_step)
    if len(chosen) < total:
        notes.append(f"{len(chosen)} of these steps' {total:,} completions are shown: the worst of each step.")
    if any(completion.left_out for completion in chosen):
        notes.append(f"Completions of more than {MAX_LENGTH:,} tokens are shown without their middle.")
    if chosen and not any(completion.tokens for completion in chosen):
        notes.append("These completions have no token columns (token_view=0, or a run without them): text alone.")
    return chosen, notes


def _spread(files: Sequence[Path], most: int) -> list[Path]:
    """The last half of `most`, and the other half spread evenly over those before, the first one included."""
    if len(files) <= most:
        return list(files)
    recent, before = list(files[-(most // 2) :]), list(files[: -(most // 2)])
    count = most - most // 2
    places = sorted({round(k * (len(before) - 1) / max(1, count - 1)) for k in range(count)})
    return [*(before[i] for i in places), *recent]


def _within_budget(by_step: Sequence[Sequence[Completion]]) -> list[Completion]:
    """The worst of each step, then the second worst of each, ..., until a page is full; by step again."""
    kept: dict[int, list[Completion]] = {i: [] for i in range(len(by_step))}
    count = tokens = 0
    for place in range(max(map(len, by_step), default=0)):
        for i in reversed(range(len(by_step))):
            if place >= len(by_step[i]):
                continue
            completion = by_step[i][place]
            if count >= MAX_COMPLETIONS or (count and tokens + len(completion.tokens) > MAX_TOKENS):
                continue
            kept[i].append(completion)
            count += 1
            tokens += len(completion.tokens) or len(completion.text) // 4
    return [completion for i in sorted(kept) for completion in kept[i]]


def _of_file(file: Path) -> list[Completion]:
    import pyarrow.parquet

    rows = [_completion(row) for row in pyarrow.parquet.read_table(file).to_pylist()]
    rows = [row for row in rows if row.tokens] or rows
    return sorted(rows, key=lambda row: row.mean_gap if row.mean_gap is not None else math.inf)


def _completion(row: Mapping[str, Any]) -> Completion:
    scores = {
        name: float(value)
        for name, value in row.items()
        if (name == "advantage" or name not in _NOT_SCORES)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
    found = Completion(int(row.get("step") or 0), _clipped(text_of(row.get("prompt"))), scores=scores)
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        found.text = _clipped(text_of(row.get("completion")))
        return found
    length = len(tokens)
    keep = list(range(length))
    if length > MAX_LENGTH:
        found.cut_at = 2 * MAX_LENGTH // 3
        found.left_out = length - MAX_LENGTH
        keep = [*range(found.cut_at), *range(length - (MAX_LENGTH - found.cut_at), length)]
    found.tokens = [str(tokens[i]) for i in keep]
    mask = row.get("token_mask")
    mask = mask if isinstance(mask, list) and len(mask) == length else [True] * length
    found.mask = [bool(mask[i]) for i in keep]
    for name, column in NUMBERS.items():
        values = row.get(column)
        if isinstance(values, list) and len(values) == length:
            found.numbers[name] = [_number(values[i]) for i in keep]
    return found


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return shorten(round(value, 4))


def text_of(value: Any) -> str:
    """A prompt or a completion as text: it is one already, or messages."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return "\n".join(_message(message) for message in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _clipped(text: str) -> str:
    half = MAX_CHARACTERS // 2
    if len(text) <= 2 * half:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters are left out ...]\n{text[-half:]}"


def _message(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or f"<{part.get('type', '?')}>") for part in content)
    parts = [str(content)] if content else []
    calls = message.get("tool_calls")
    if calls:
        parts.append(json.dumps(calls, ensure_ascii=False, default=str))
    return f"{message.get('role', 'message')}: {' '.join(parts)}"


def packed(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Completions as the page's script reads them, with short keys and nothing that is empty."""
    items = []
    for c in completions:
        item = {
            "step": c.step,
            "prompt": c.prompt,
            "text": c.text,
            "tokens": c.tokens,
            **{name: values for name, values in c.numbers.items() if any(v is not None for v in values)},
            "mask": [] if all(c.mask) else [int(keep) for keep in c.mask],
            "scores": {name: shorten(value) for name, value in c.scores.items()},
            "mean": shorten(c.mean_gap),
            "left_out": c.left_out,
            "cut_at": c.cut_at,
        }
        items.append({key: value for key, value in item.items() if value or key in ("step", "mean")})
    return items
