# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether student and teacher read the same prompt, through the renderer that training uses."""

from typing import Any

from ..findings import Finding
from ..recipes import explicit_fields
from ..views import _kind
from .known import Known, Reading, RunFacts
from .tokens import leading_bos

_BEFORE, _AFTER = 10, 8  # tokens of context around the first one that differs


def first_difference(student_ids: list[int], teacher_ids: list[int]) -> int | None:
    """Position of the first token that differs (the end of the shorter one, if it begins the other), or `None`."""
    for n, (ours, theirs) in enumerate(zip(student_ids, teacher_ids, strict=False)):
        if ours != theirs:
            return n
    return None if len(student_ids) == len(teacher_ids) else min(len(student_ids), len(teacher_ids))


def check_chat_template(facts: RunFacts, readings: list[tuple[Known, list[Reading]]]) -> list[Finding]:
    """Messages need a template, and both should read the same prompt unless it was meant otherwise."""
    tokenizer = facts.student.tokenizer
    if tokenizer is None or not facts.prompts:
        return []
    if not facts.conversational:
        return [_text_prompts(facts)]
    missing = _missing_template(facts)
    found = [f for teacher, read in readings for f in _compare(facts, teacher, read)]
    if facts.run.teacher_view is not None:
        found.append(Finding("chat_template", "info", "teacher_view writes the teacher's prompts: not compared"))
    return [*missing, *found] or [Finding("chat_template", "ok", f"{len(facts.prompts)} prompts read alike by both")]


def missing_student_template(facts: RunFacts) -> Finding | None:
    """Without a template GRPOTrainer fails at the first batch of messages."""
    tokenizer = facts.student.tokenizer
    if tokenizer is None or not facts.conversational or tokenizer.chat_template or facts.side.chat_template:
        return None
    return Finding(
        "chat_template",
        "error",
        "the prompts are messages and the student's tokenizer has no chat template",
        "GRPOTrainer cannot render them: the first batch fails.",
        "Set chat_template on the student's tokenizer (the teacher's is a good choice) and pass it as "
        "processing_class, or write the prompts as text.",
    )


def _missing_template(facts: RunFacts) -> list[Finding]:
    if facts.args.teacher_chat_template != "own":
        return []
    bare = [t for t in facts.teachers if not t.shared and t.tokenizer is not None and not t.tokenizer.chat_template]
    return [
        Finding(
            "chat_template",
            "warning",
            f"the prompts are messages and the tokenizer of {teacher.label} has no chat template: it reads the "
            "student's",
            "A base model never saw these tokens, and its scores behind them are close to noise.",
            "Use a teacher that was tuned on the student's template; if this one was, say so with "
            "teacher_chat_template='student'.",
        )
        for teacher in bare
    ]


def _text_prompts(facts: RunFacts) -> Finding:
    tokenizer = facts.student.tokenizer
    assert tokenizer is not None
    special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
    rendered = any(token in prompt for _, prompt in facts.prompts for token in special if len(token) > 2)
    if not tokenizer.chat_template or rendered:
        return Finding("chat_template", "ok", "the prompts are text: both read it as it stands")
    return Finding(
        "chat_template",
        "info",
        "the prompts are text, so no chat template is applied, and the student's tokenizer has one",
        "A model that was tuned on chats reads such a prompt as something else than a question.",
        "If it was, make the prompts messages: [{'role': 'user', 'content': ...}].",
    )


def _compare(facts: RunFacts, teacher: Known, read: list[Reading]) -> list[Finding]:
    """The first prompt that the two read otherwise, beside a beginning-of-sequence token and prompts of its own."""
    for reading in read:
        ours, theirs = (
            ids[len(leading_bos(facts, teacher, ids)) :] for ids in (reading.student_ids, reading.teacher_ids)
        )
        at = first_difference(ours, theirs)
        if at is None or reading.own_prompt or isinstance(reading.prompt, str):
            continue
        before, student_end, teacher_end = _around(facts, teacher, ours, theirs, at)
        meant = {"teacher_chat_template", "teacher_chat_template_kwargs"} & explicit_fields(facts.args)
        seen = (
            f"prompt {reading.index} differs at token {at}: after {before!r} the student reads "
            f"{_or_nothing(student_end)} and {teacher.label} {_or_nothing(teacher_end)}"
        )
        if meant:
            return [Finding("chat_template", "info", f"{seen}, as {' and '.join(sorted(meant))} says")]
        return [
            Finding(
                "chat_template",
                "warning",
                seen,
                "The teacher scores the student's answer to another prompt. That is right where each model knows its "
                "own template, and ruins the scores where the teacher was trained on the student's.",
                "Set teacher_chat_template='student' to show the teacher what the student sees, or "
                "teacher_chat_template='own' if the difference is meant.",
            )
        ]
    return []


def _around(facts: RunFacts, teacher: Known, ours: list[int], theirs: list[int], at: int) -> tuple[str, str, str]:
    """The text before the first difference, and how each goes on."""
    tokenizer = facts.student.tokenizer
    assert tokenizer is not None
    decode = (teacher.tokenizer or tokenizer).decode
    before = tokenizer.decode(ours[max(at - _BEFORE, 0) : at], skip_special_tokens=False)
    student_end = tokenizer.decode(ours[at : at + _AFTER], skip_special_tokens=False)
    teacher_end = decode(theirs[at : at + _AFTER], skip_special_tokens=False)
    return before, student_end, teacher_end


def _or_nothing(text: str) -> str:
    return repr(text) if text else "nothing more"


def side_by_side(facts: RunFacts, readings: list[tuple[Known, list[Reading]]]) -> list[dict[str, Any]]:
    """
    The first prompts as both read them, for a page.

    Returns:
        `list[dict]`: `prompt` (its row), `teacher` (who), `student_text`, `teacher_text`, `differs_at` (a token's
        position, or `None`), `student_token` and `teacher_token` there.
    """
    pairs = []
    tokenizer = facts.student.tokenizer
    for teacher, read in readings:
        other = teacher.tokenizer or tokenizer
        for reading in read:
            if tokenizer is None or other is None:
                continue
            ours, theirs = reading.student_ids, reading.teacher_ids
            at = first_difference(ours, theirs)
            pairs.append(
                {
                    "prompt": reading.index,
                    "teacher": teacher.label,
                    "student_text": tokenizer.decode(ours, skip_special_tokens=False),
                    "teacher_text": other.decode(theirs, skip_special_tokens=False),
                    "differs_at": at,
                    "student_token": _token_at(tokenizer, ours, at),
                    "teacher_token": _token_at(other, theirs, at),
                }
            )
    return pairs


def _token_at(tokenizer: Any, ids: list[int], at: int | None) -> str | None:
    return None if at is None or at >= len(ids) else tokenizer.convert_ids_to_tokens(ids[at])


# Thoughts


def knows_thoughts(known: Known) -> bool:
    """Whether a model's template has blocks of thoughts."""
    template = getattr(known.tokenizer, "chat_template", None)
    text = str(template or "")
    return "<think>" in text or "enable_thinking" in text


def check_think_boundary(facts: RunFacts, readings: list[tuple[Known, list[Reading]]]) -> list[Finding]:
    """Whether the completion begins inside a block of thoughts for one and outside for the other."""
    tokenizer = facts.student.tokenizer
    if tokenizer is None or not facts.prompts:
        return []
    found = list[Finding]()
    for teacher, read in readings:
        found += _text_boundary(facts, teacher, read)
    if facts.conversational and not found:
        found = [f for teacher, read in readings for f in _template_boundary(facts, teacher, read)]
        found += _thinking_kwargs(facts)
    if found:
        return found
    kind = _kind(tokenizer.decode(facts.student_ids(facts.prompts[0][1])[-32:], skip_special_tokens=False))
    return [Finding("think_boundary", "ok", f"completions begin behind {kind or 'no block of thoughts'} for both")]


def _text_boundary(facts: RunFacts, teacher: Known, read: list[Reading]) -> list[Finding]:
    """Prompts of text end as they were written."""
    tokenizer = facts.student.tokenizer
    assert tokenizer is not None
    for reading in read:
        ours = tokenizer.decode(reading.student_ids[-32:], skip_special_tokens=False)
        theirs = (teacher.tokenizer or tokenizer).decode(reading.teacher_ids[-32:], skip_special_tokens=False)
        if _kind(ours) != _kind(theirs):
            return [
                Finding(
                    "think_boundary",
                    "warning",
                    f"prompt {reading.index} ends in {ours[-24:]!r} for the student and in {theirs[-24:]!r} for "
                    f"{teacher.label}",
                    "One of them reads the completion as thoughts and the other as the answer, so the teacher expects "
                    "another text.",
                    "End teacher_prompt like prompt, with the same block of thoughts or none.",
                )
            ]
    return []


def _template_boundary(facts: RunFacts, teacher: Known, read: list[Reading]) -> list[Finding]:
    """The renderer gives both the student's block of thoughts; whether the teacher's template knows such a block."""
    tokenizer = facts.student.tokenizer
    if tokenizer is None or teacher.shared or teacher.tokenizer is None or not teacher.tokenizer.chat_template:
        return []
    for reading in read:
        kind = _kind(tokenizer.decode(reading.student_ids[-32:], skip_special_tokens=False))
        if kind and not knows_thoughts(teacher):
            return [
                Finding(
                    "think_boundary",
                    "warning",
                    f"the student's prompt ends in {kind!r}, and the chat template of {teacher.label} has no thoughts",
                    "The teacher is shown the same block, which it was not trained on: its first scores say little.",
                    "Use a teacher that thinks, or chat_template_kwargs={'enable_thinking': False} where the "
                    "student's template has that switch and renders no block with it.",
                )
            ]
        ours, theirs = knows_thoughts(facts.student), knows_thoughts(teacher)
        if not kind and ours != theirs:
            who, other = (teacher.label, "the student's") if theirs else ("the student", f"that of {teacher.label}")
            return [
                Finding(
                    "think_boundary",
                    "warning",
                    f"the chat template of {who} has thoughts (<think>), {other} has none, and the prompts open none",
                    f"{who[0].upper()}{who[1:]} begins an answer with <think> by itself where the other begins with "
                    "the answer: the first tokens' divergence teaches that and little else.",
                    "Use two models that think, or two that do not. Where a template has the switch, "
                    "chat_template_kwargs={'enable_thinking': False} asks for answers without thoughts.",
                )
            ]
    return []


def _thinking_kwargs(facts: RunFacts) -> list[Finding]:
    """`enable_thinking` for one of them only: the end of the prompt is the student's all the same."""
    args = facts.args
    ours, theirs = args.chat_template_kwargs or {}, args.teacher_chat_template_kwargs
    if theirs is None or ours.get("enable_thinking") == theirs.get("enable_thinking"):
        return []
    return [
        Finding(
            "think_boundary",
            "warning",
            f"enable_thinking is {ours.get('enable_thinking', 'unset')} in chat_template_kwargs and "
            f"{theirs.get('enable_thinking', 'unset')} in teacher_chat_template_kwargs",
            "The completion continues the student's prompt, so the teacher is shown the student's block of thoughts "
            "whatever its own setting says; a model asked to think scores answers without thoughts, or the reverse.",
            "Set enable_thinking in chat_template_kwargs alone (the teacher's rendering inherits it).",
        )
    ]
