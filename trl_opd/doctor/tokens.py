# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether student and teacher mean the same by their tokens: ends, beginnings, padding."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..findings import Finding
from ..weighting import special_token_ids
from .known import Known, Reading, RunFacts

_SHOWN = 5  # tokens of a list


def show_token(tokenizer: PreTrainedTokenizerBase | None, i: int | None) -> str:
    """A token and its id, for a sentence."""
    if i is None:
        return "none"
    token = None if tokenizer is None else tokenizer.convert_ids_to_tokens(i)
    return f"id {i}" if token is None else f"{token!r} (id {i})"


def show_tokens(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return (", ".join(show_token(tokenizer, i) for i in ids[:_SHOWN]) or "none") + more


def others(facts: RunFacts) -> list[Known]:
    """Teachers with weights of their own."""
    return [teacher for teacher in facts.teachers if not teacher.shared]


def not_compared(facts: RunFacts, check: str) -> list[Finding]:
    """For teachers whose tokenizer is not known, where a check compares tokenizers."""
    unknown = [teacher.label for teacher in others(facts) if teacher.tokenizer is None]
    if not unknown:
        return []
    return [
        Finding(
            check,
            "info",
            f"the tokenizer of {', '.join(unknown)} is not known: not compared",
            "",
            "Pass teacher_processing_class= to compare it." if check == "retokenization" else "",
        )
    ]


def turn_end(tokenizer: PreTrainedTokenizerBase | None, kwargs: dict[str, Any] | None = None) -> int | None:
    """The token with which a chat template closes an answer, if that is one token of the vocabulary."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **(kwargs or {}))
    except Exception:  # templates raise what they like, and some want other messages
        return None
    _, found, rest = text.rpartition("answer")
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found and rest.strip() else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def main_end(facts: RunFacts, model: Known) -> int | None:
    """The token with which a model ends an answer of its own."""
    stops = model.stop_ids
    closing = turn_end(model.tokenizer, facts.args.chat_template_kwargs) if facts.conversational else None
    if closing in stops:
        return closing
    return stops[0] if stops else None


def check_eos(facts: RunFacts) -> list[Finding]:
    """Whether the student stops where its teachers do."""
    student = facts.student
    if student.tokenizer is None:
        return []
    stops = student.stop_ids
    if not stops:
        return [
            Finding(
                "eos",
                "error",
                "neither the student's tokenizer nor its generation config names an end-of-sequence token",
                "Completions would only end at max_completion_length, and GRPOTrainer cannot build its mask.",
                "Set eos_token of the tokenizer (processing_class) to the token that ends an answer.",
            )
        ]
    found = [_compare_ends(facts, teacher, stops) for teacher in others(facts) if teacher.stop_ids]
    found = found or [Finding("eos", "ok", f"the student stops at {show_tokens(student.tokenizer, stops)}")]
    return [*found, *_unused_turn_end(facts, stops), *_masked_ends(facts, stops)]


def _compare_ends(facts: RunFacts, teacher: Known, stops: list[int]) -> Finding:
    student, tokenizer = facts.student, facts.student.tokenizer
    theirs, ours, ends = main_end(facts, teacher), main_end(facts, student), teacher.stop_ids
    names = teacher.tokenizer or tokenizer
    seen = (
        f"{teacher.label} ends an answer with {show_token(names, theirs)}; the student stops at "
        f"{show_tokens(tokenizer, stops)}"
    )
    if theirs not in stops:
        return Finding(
            "eos",
            "error" if facts.conversational else "warning",
            seen,
            "The student learns to write the teacher's token, generation goes on behind it, and completions grow "
            "until max_completion_length cuts them.",
            f"Set eos_token_id to {[theirs, *stops]} in the student's generation_config.json (or on "
            "model.generation_config before the trainer is made): GRPOTrainer stops at those and at the tokenizer's "
            "eos_token.",
        )
    if ours not in ends and ours != turn_end(teacher.tokenizer, facts.args.chat_template_kwargs):
        return Finding(
            "eos",
            "warning",
            f"{seen}; it ends its own answers with {show_token(tokenizer, ours)}, which is no end to {teacher.label}",
            "The teacher gives that token little probability, so the student unlearns to stop and completions grow.",
            f"Set eos_token of the student's tokenizer to {names.convert_ids_to_tokens(theirs)!r}, or use a teacher "  # type: ignore[union-attr]
            "that was tuned on the student's chat format.",
        )
    return Finding("eos", "ok", f"the student stops where {teacher.label} ends: {show_token(names, theirs)}")


def _unused_turn_end(facts: RunFacts, stops: list[int]) -> list[Finding]:
    """A template that closes turns with a token at which nobody stops."""
    closing = turn_end(facts.student.tokenizer, facts.args.chat_template_kwargs) if facts.conversational else None
    if closing is None or closing in stops or any(closing in teacher.stop_ids for teacher in others(facts)):
        return []
    return [
        Finding(
            "eos",
            "info",
            f"the chat template closes an answer with {show_token(facts.student.tokenizer, closing)}, at which "
            f"GRPOTrainer does not stop (it stops at {show_tokens(facts.student.tokenizer, stops)})",
            "A model that was tuned on this template writes on behind its answer.",
            f"If it was, set eos_token_id to {[closing, *stops]} in the student's generation_config.json.",
        )
    ]


def _masked_ends(facts: RunFacts, stops: list[int]) -> list[Finding]:
    masking, tokenizer = facts.args.special_token_masking, facts.student.tokenizer
    masked = [i for i in stops if masking and tokenizer is not None and i in special_token_ids(masking, tokenizer)]
    if not masked:
        return []
    return [
        Finding(
            "eos",
            "info",
            f"special_token_masking={masking} leaves {show_tokens(tokenizer, masked)} out of the loss",
            "The teacher does not teach the student where to stop: watch completions/clipped_ratio.",
        )
    ]


def check_pad(facts: RunFacts) -> list[Finding]:
    """The student's padding token, with which GRPOTrainer fills prompts and completions."""
    tokenizer, config = facts.student.tokenizer, facts.student.config
    if tokenizer is None:
        return []
    missing = tokenizer.pad_token_id is None
    pad = tokenizer.eos_token_id if missing else tokenizer.pad_token_id
    size = None if config is None else config.get_text_config().vocab_size
    if pad is not None and size is not None and pad >= size:
        return [
            Finding(
                "pad",
                "error",
                f"the pad token {show_token(tokenizer, pad)} has no row in the student's embedding of {size} rows",
                "The first batch with prompts of different lengths fails with an index error (on a GPU: a device-side "
                "assert).",
                "Set pad_token to a token that the model has, such as its eos_token, or call "
                "model.resize_token_embeddings(len(tokenizer)) and save the model with it.",
            )
        ]
    if missing or pad == tokenizer.eos_token_id:
        what = (
            "there is no pad token, so GRPOTrainer takes the eos token" if missing else "the pad token is the eos one"
        )
        return [
            Finding(
                "pad",
                "info",
                f"{what}: {show_token(tokenizer, pad)}",
                "Harmless here: completions are masked behind their first end token, by position and not by id.",
            )
        ]
    return [Finding("pad", "ok", f"the student pads with {show_token(tokenizer, pad)}")]


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its beginning-of-sequence token in front of text."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def leading_bos(facts: RunFacts, teacher: Known | None, ids: list[int]) -> list[int]:
    """The beginning-of-sequence tokens in front of a prompt."""
    tokenizers = [facts.student.tokenizer, None if teacher is None else teacher.tokenizer]
    bos = {t.bos_token_id for t in tokenizers if t is not None} - {None}
    end = next((n for n, i in enumerate(ids) if i not in bos), len(ids))
    return ids[:end]


def check_bos(facts: RunFacts, readings: list[tuple[Known, list[Reading]]]) -> list[Finding]:
    """Beginning-of-sequence tokens: one too many, or of one model only."""
    found, tokenizer = list[Finding](), facts.student.tokenizer
    if tokenizer is None:
        return []
    for teacher, read in readings:
        for who, owner, ids_of in (("the student", facts.student, _ours), (teacher.label, teacher, _theirs)):
            doubled = next((r for r in read if len(leading_bos(facts, teacher, ids_of(r))) > 1), None)
            if doubled is None or (who != "the student" and _theirs(doubled) == _ours(doubled)):
                continue
            first = leading_bos(facts, teacher, ids_of(doubled))
            found.append(
                Finding(
                    "bos",
                    "warning",
                    f"prompt {doubled.index} begins with {len(first)} of them for {who}: "
                    f"{show_tokens(owner.tokenizer or tokenizer, first)}",
                    "The text holds one already and the tokenizer adds another: models have seen one.",
                    "Leave it out of the text, or set add_bos_token=False on the tokenizer (or use messages, to which "
                    "no token is added beside the template's).",
                )
            )
    if not found:
        found = [finding for teacher, read in readings for finding in _compare_bos(facts, teacher, read)]
    unique = list({str(f): f for f in found}.values()) or not_compared(facts, "bos")
    if unique:
        return unique
    bos = show_token(tokenizer, tokenizer.bos_token_id) if begins_with_bos(tokenizer) else "no token"
    return [Finding("bos", "ok", f"{bos} is put in front of text, for both alike")]


def _ours(reading: Reading) -> list[int]:
    return reading.student_ids


def _theirs(reading: Reading) -> list[int]:
    return reading.teacher_ids


def _compare_bos(facts: RunFacts, teacher: Known, read: list[Reading]) -> Iterator[Finding]:
    tokenizer, other = facts.student.tokenizer, teacher.tokenizer
    if other is None or tokenizer is None:
        return
    if any(isinstance(r.prompt, str) for r in read):
        adds, other_adds = begins_with_bos(tokenizer), begins_with_bos(other)
        same_token = tokenizer.bos_token_id == other.bos_token_id
        if adds != other_adds or (adds and not same_token):
            ours, theirs = (
                f"adds {show_token(t, t.bos_token_id)}" if a else "adds none"
                for t, a in ((tokenizer, adds), (other, other_adds))
            )
            yield Finding(
                "bos",
                "warning",
                f"the student's tokenizer {ours} in front of text, and that of {teacher.label} {theirs}",
                "The teacher reads the student's ids: it starts as it never did in its training, and its scores of "
                "every token shift.",
                "Give both tokenizers the same rule: add_bos_token of the student's tokenizer as the teacher has it.",
            )
    differing = next(
        (
            r
            for r in read
            if not isinstance(r.prompt, str)
            and not r.own_prompt
            and leading_bos(facts, teacher, r.student_ids) != leading_bos(facts, teacher, r.teacher_ids)
        ),
        None,
    )
    if differing is not None:
        ours, theirs = (
            show_tokens(t, leading_bos(facts, teacher, ids))
            for t, ids in ((tokenizer, differing.student_ids), (other, differing.teacher_ids))
        )
        yield Finding(
            "bos",
            "warning",
            f"prompt {differing.index} begins with {ours} for the student and with {theirs} for {teacher.label}: "
            "their chat templates differ in it",
            "One of them starts as it never did in its training.",
            "Give the student the teacher's chat template (processing_class with that chat_template), or set "
            "teacher_chat_template='student' if the teacher was trained without.",
        )
