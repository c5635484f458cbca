# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether the prompts are what a run can start from: enough of them, not too long, rendered once."""

from typing import Any

from ..findings import Finding
from .known import Known, Reading, RunFacts

_SCANNED = 64  # rows from which a share of duplicates says something
_DUPLICATES = 0.2
_NEAR = 0.9


def check_dataset(facts: RunFacts) -> list[Finding]:
    """Number, kinds and contents of the prompts."""
    if facts.run.environment_factory is not None and not any("prompt" in row for row in facts.rows):
        return []
    found = [*_too_few(facts), *_empty(facts), *_kinds(facts), *_rendered_twice(facts), *_duplicates(facts)]
    number = "a stream of" if facts.num_rows is None else facts.num_rows
    return found or [Finding("dataset", "ok", f"{number} prompts, {len(facts.rows)} of them looked at")]


def _too_few(facts: RunFacts) -> list[Finding]:
    args = facts.args
    if facts.num_rows is None:
        return []
    needed = args.generation_batch_size // args.num_generations
    if facts.num_rows >= needed:
        return []
    return [
        Finding(
            "dataset",
            "error",
            f"{facts.num_rows} prompts, and a generation batch takes {needed} different ones (generation_batch_size "
            f"{args.generation_batch_size} / num_generations {args.num_generations})",
            "Incomplete batches are dropped: there is none to train on.",
            "Add prompts, or lower per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation.",
        )
    ]


def _empty(facts: RunFacts) -> list[Finding]:
    empty = [i for i, row in enumerate(facts.rows) if "prompt" in row and _is_empty(row["prompt"])]
    if not empty:
        return []
    return [
        Finding(
            "dataset",
            "warning",
            f"{len(empty)} of {len(facts.rows)} prompts are empty (rows {', '.join(map(str, empty[:5]))})",
            "The student writes what it likes behind nothing; without a beginning-of-sequence token there is no "
            "position to predict the first token from, and the batch fails.",
            "Remove them: dataset.filter(lambda row: row['prompt']).",
        )
    ]


def _is_empty(prompt: Any) -> bool:
    if isinstance(prompt, str) or not prompt:
        return not (prompt or "").strip()
    last = prompt[-1]
    return isinstance(last, dict) and isinstance(last.get("content"), str) and not last["content"].strip()


def _kinds(facts: RunFacts) -> list[Finding]:
    prompts = [row["prompt"] for row in facts.rows if row.get("prompt")]
    texts = sum(isinstance(prompt, str) for prompt in prompts)
    found = []
    if 0 < texts < len(prompts):
        found.append(
            Finding(
                "dataset",
                "error",
                f"{texts} of {len(prompts)} prompts are text and the others messages",
                "GRPOTrainer takes a batch for what its first prompt is, and fails on the others.",
                "Make all of them messages.",
            )
        )
    closed = [i for i, p in enumerate(prompts) if not isinstance(p, str) and _role(p[-1]) == "assistant"]
    if closed:
        found.append(
            Finding(
                "dataset",
                "warning",
                f"{len(closed)} of {len(prompts)} prompts end with a message of the assistant (row {closed[0]})",
                "The template closes it and opens another answer behind it.",
                "Move that message to a column of its own ('completion' for off_policy_source='dataset').",
            )
        )
    return found


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _rendered_twice(facts: RunFacts) -> list[Finding]:
    """Messages whose text holds the template's own tokens."""
    tokenizer = facts.student.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return []
    tokens = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    marks = {t for t in tokens if len(t) > 2 and t in str(tokenizer.chat_template)}
    for i, row in enumerate(facts.rows):
        messages = row.get("prompt")
        for message in [] if isinstance(messages, str) or not messages else messages:
            content = message.get("content") if isinstance(message, dict) else None
            inside = sorted(t for t in marks if isinstance(content, str) and t in content)
            if inside:
                return [
                    Finding(
                        "dataset",
                        "warning",
                        f"the message of role {_role(message)!r} in row {i} holds {inside[0]!r}, a token of the chat "
                        "template",
                        "It was rendered before and is rendered again: the student reads a conversation within a "
                        "message.",
                        "Store the messages themselves, or the rendered text as a prompt that is a string.",
                    )
                ]
    return []


def _duplicates(facts: RunFacts) -> list[Finding]:
    prompts = [repr(row["prompt"]) for row in facts.rows if "prompt" in row]
    share = 1 - len(set(prompts)) / len(prompts) if prompts else 0.0
    if len(prompts) < _SCANNED or share <= _DUPLICATES:
        return []
    return [
        Finding(
            "dataset",
            "warning",
            f"{share:.0%} of the first {len(prompts)} prompts are repetitions of others",
            "An epoch trains on them as often; distillation on few prompts overfits to them.",
            "Keep each once (num_generations samples several completions), or say how often with num_train_epochs.",
        )
    ]


def check_prompt_length(facts: RunFacts, readings: list[tuple[Known, list[Reading]]]) -> list[Finding]:
    """The longest prompts and the completion beside what the models take."""
    student = facts.student
    if student.tokenizer is None or not facts.prompts:
        return []
    longest = _longest(facts)
    found = _over(facts, "the student", longest, _student_limit(facts), "warning", _SHORTER)
    for teacher, read in readings:
        limit = facts.args.teacher_max_length or teacher.max_length
        length = max((len(r.teacher_ids) for r in read), default=0)
        if not any(r.own_prompt for r in read):
            length = max(length, longest)
        skips = facts.args.teacher_overflow == "skip"
        do = f"{_SHORTER} With teacher_overflow='skip' they leave the loss instead of stopping the run."
        found += _over(facts, teacher.label, length, limit, "warning" if skips else "error", _SHORTER if skips else do)
    seen = (
        f"the longest of the first prompts has {longest} tokens, completions up to {facts.args.max_completion_length}"
    )
    return found or [Finding("prompt_length", "ok", seen)]


_SHORTER = "Lower max_completion_length, or remove the longest prompts (they are never truncated here)."


def _student_limit(facts: RunFacts) -> int | None:
    limits = [facts.student.max_length, facts.args.vllm_max_model_length if facts.args.use_vllm else None]
    return min((limit for limit in limits if limit), default=None)


def _longest(facts: RunFacts) -> int:
    """Tokens of the longest of the rendered prompts, and of the longest text among all rows that were read."""
    rendered = {index for index, _ in facts.prompts}
    lengths = [len(facts.student_ids(prompt)) for _, prompt in facts.prompts]
    rest = [row for i, row in enumerate(facts.rows) if i not in rendered and row.get("prompt")]
    if rest:
        longest = max(rest, key=lambda row: len(str(row["prompt"])))["prompt"]
        if isinstance(longest, str) == isinstance(facts.prompts[0][1], str):
            lengths.append(len(facts.student_ids(longest)))
    return max(lengths)


def _over(facts: RunFacts, who: str, length: int, limit: int | None, severity: str, do: str) -> list[Finding]:
    most = facts.args.max_completion_length or 0
    if not limit or length + most <= _NEAR * limit:
        return []
    over = length + most > limit
    seen = f"a prompt of {length} tokens and a completion of up to {most} are {length + most}; {who} takes {limit}"
    if not over:
        return [Finding("prompt_length", "info", f"{seen}: near the limit")]
    why = "Positions behind it were never trained, or do not exist: text there is noise, or the run fails."
    if who != "the student":
        why = "Such a sample stops the run, or leaves the loss with teacher_overflow='skip'."
    return [Finding("prompt_length", severity, seen, why, do)]
