# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether an id is the same token to both, and the same text the same ids."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..findings import Finding
from ..vocabulary import shared_vocab_size
from .known import Known, Reading, RunFacts
from .tokens import not_compared, others, show_token, show_tokens

# Where tokenizers of one family come to differ: digits, letters beyond ASCII, combining marks, code, whitespace
PROBE = (
    "The 3rd of 12345.678 items, naïve café, 你好 🙂 e\u0301.\n\n\tdef f(x):\n        return x[0] != 'a_b'  # it's\r\n"
    "  $\\frac{1}{2}$ <b>I'LL</b>   ..."
)
_COMPONENTS = ("normalizer", "pre_tokenizer", "added_tokens", "model")


def check_special_tokens(facts: RunFacts, readings: list[tuple[Known, list[Reading]]]) -> list[Finding]:
    """Tokens with a meaning of their own: known to one only, at another id, or special to one only."""
    ours, found = facts.student.tokenizer, list[Finding]()
    for teacher, read in readings:
        theirs = teacher.tokenizer
        if ours is None or theirs is None:
            continue
        found += _unknown_tokens(facts, teacher, read)
        vocabulary = theirs.get_vocab()
        added = {str(token): (i, token.special) for i, token in ours.added_tokens_decoder.items()}
        moved = [f"{t!r} is {i} and {vocabulary[t]}" for t, (i, _) in added.items() if vocabulary.get(t, i) != i]
        if moved:
            found.append(
                Finding(
                    "special_tokens",
                    "warning",
                    f"other ids for the student and {teacher.label}: {'; '.join(moved[:4])}",
                    "Beyond the ids that both share, the teacher reads another token than the student wrote.",
                    "Use a tokenizer in which both have the same ids.",
                )
            )
        other = {str(t): t.special for t in theirs.added_tokens_decoder.values()}
        status = [t for t, (_, special) in added.items() if other.get(t, special) != special]
        if status:
            found.append(
                Finding(
                    "special_tokens",
                    "info",
                    f"special to one of the student and {teacher.label} only: {', '.join(map(repr, status[:6]))}",
                    "It matters to text that is decoded without special tokens (reward functions), not to scores.",
                )
            )
    found = found or not_compared(facts, "special_tokens")
    return found or [Finding("special_tokens", "ok", "the same special tokens at the same ids")]


def _unknown_tokens(facts: RunFacts, teacher: Known, read: list[Reading]) -> list[Finding]:
    """Tokens of the prompts that the teacher has no id for: it is given id 0 in their place."""
    ours, theirs = facts.student.tokenizer, teacher.tokenizer
    assert ours is not None and theirs is not None
    limit = max(theirs.get_vocab().values())
    unknown = sorted({i for r in read for i in r.teacher_ids if i > limit})
    if not unknown:
        return []
    return [
        Finding(
            "special_tokens",
            "warning",
            f"the prompts hold tokens that {teacher.label} does not know: {show_tokens(ours, unknown[:6])}",
            "It reads id 0 in their place, and the student is never compared on them.",
            "Use a chat template made of tokens that both know, or a teacher that was trained with them.",
        )
    ]


def check_vocabulary(facts: RunFacts) -> list[Finding]:
    """Rows of the heads, and how many of them are compared."""
    student, found = facts.student, list[Finding]()
    size = None if student.config is None else student.config.get_text_config().vocab_size
    if student.tokenizer is not None and size is not None:
        most = max(student.tokenizer.get_vocab().values())
        if most >= size:
            found.append(
                Finding(
                    "vocabulary",
                    "error",
                    f"the student's tokenizer has ids up to {most}, e.g. {show_token(student.tokenizer, most)}, and "
                    f"its embedding {size} rows",
                    "Such a token in a prompt is an index error (on a GPU: a device-side assert).",
                    "Call model.resize_token_embeddings(len(tokenizer)) and save the model, or remove the tokens.",
                )
            )
    for teacher in others(facts):
        rows = None if teacher.config is None else teacher.config.get_text_config().vocab_size
        if rows is None or size is None:
            continue
        try:
            shared = shared_vocab_size(size, rows, student.tokenizer, teacher.tokenizer)
        except ValueError as error:
            found.append(Finding("vocabulary", "error", str(error)))
            continue
        if rows != size:
            found.append(
                Finding(
                    "vocabulary",
                    "info",
                    f"the heads have {size} rows (student) and {rows} ({teacher.label}): the {shared} tokens that "
                    "both know are compared",
                    "The rest is padding; the student is kept from sampling it.",
                )
            )
    unknown = [teacher.label for teacher in others(facts) if teacher.config is None]
    if unknown and not found:
        return [Finding("vocabulary", "info", f"the rows of {', '.join(unknown)} are not known: not compared")]
    return found or [Finding("vocabulary", "ok", f"{size} entries, compared whole")]


def check_retokenization(facts: RunFacts) -> list[Finding]:
    """Whether the same text is the same ids to both, and whether ids become the text that they came from."""
    ours, found = facts.student.tokenizer, list[Finding]()
    if ours is None:
        return []
    texts = [*_texts(facts), PROBE]
    for teacher in others(facts):
        if teacher.tokenizer is not None and teacher.tokenizer is not ours:
            found += _compare_tokenization(ours, teacher, texts)
    found = found or _lost_text(ours, texts[:-1]) or not_compared(facts, "retokenization")
    return found or [Finding("retokenization", "ok", f"{len(texts)} texts have the same ids for both")]


def _lost_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Finding]:
    """Prompts that come back from the tokenizer as another text."""
    pairs = [(_letters(text), _letters(_again(tokenizer, text))) for text in texts]
    lost = [(before, after) for before, after in pairs if before != after]
    if not lost:
        return []
    before, after = lost[0]
    at = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(map(len, lost[0])))
    shown = slice(max(at - 10, 0), at + 10)
    return [
        Finding(
            "retokenization",
            "warning",
            f"{len(lost)} of {len(texts)} prompts do not survive encoding and decoding: {before[shown]!r} becomes "
            f"{after[shown]!r}",
            "The student does not read what the data says, and reward functions do not read what it wrote.",
            "Use the tokenizer that belongs to the model (an unknown token or a normalizer swallows characters).",
        )
    ]


def _texts(facts: RunFacts) -> list[str]:
    contents = [
        prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)
        for _, prompt in facts.prompts
    ]
    return [text[:4000] for text in contents if text]


def _again(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _letters(text: str) -> str:
    """Text without whitespace, which some decoders add."""
    return "".join(text.split())


def _compare_tokenization(ours: PreTrainedTokenizerBase, teacher: Known, texts: list[str]) -> list[Finding]:
    theirs = teacher.tokenizer
    assert theirs is not None
    for text in texts:
        a, b = (t(text, add_special_tokens=False)["input_ids"] for t in (ours, theirs))
        if a == b:
            continue
        start = next(n for n, (x, y) in enumerate(zip([*a, -1], [*b, -2], strict=False)) if x != y)
        tokens = [t.convert_ids_to_tokens(ids[start : start + 4]) for t, ids in ((ours, a), (theirs, b))]
        parts = _differing_parts(ours, theirs)
        because = f" (their {' and '.join(parts)} differ)" if parts else ""
        return [
            Finding(
                "retokenization",
                "warning",
                f"one text, other tokens{because}: after {ours.decode(a[max(start - 8, 0) : start])!r} the student "
                f"has {tokens[0]} and {teacher.label} {tokens[1]}",
                "The student writes words in pieces that the teacher was not trained on, and prompts that the teacher "
                "renders itself read otherwise than the student's.",
                "Use one tokenizer for both: pass the teacher's as processing_class, or save it beside the student.",
            )
        ]
    return []


def _differing_parts(ours: Any, theirs: Any) -> list[str]:
    """Names of the parts in which two fast tokenizers differ."""
    try:
        a, b = (json.loads(t.backend_tokenizer.to_str()) for t in (ours, theirs))
    except (AttributeError, ValueError):
        return []
    names = {"pre_tokenizer": "pre-tokenizers", "added_tokens": "added tokens", "model": "models or merges"}
    return [names.get(part, f"{part}s") for part in _COMPONENTS if a.get(part) != b.get(part)]
