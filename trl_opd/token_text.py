# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Completions as text whose tokens are coloured by what the teacher thinks of them."""

import math
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

# Nats of the gap: a factor of 2, 10 and 100 between the two probabilities
LEVELS = (math.log(2), math.log(10), math.log(100))
# The colours of the report, which are told apart without red or green
_LESS = ("black on #fbe6d2", "black on #f2b37c", "bold underline #ffffff on #a04a00")
_MORE = ("black on #dcecf7", "black on #8cc1e6", "bold underline #ffffff on #00518f")
_MARKS = {False: ("[-", "-]"), True: ("{+", "+}")}
_PART = "\ufffd"  # what a decoder makes of a part of a character
_MOST_PARTS = 6  # tokens that are looked at for one character, or a chain of some
_MOST_KEPT = 100_000
_SIGNS = {"\n": "⏎", "\t": "⇥", " ": "␣"}


class TokenTexts:
    """
    The text of each token of a completion, such that they join to the decoded completion.

    A character of several tokens is with the first of them; the others are empty.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The student's.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._groups: dict[tuple[int, ...], str] = {}
        ids = tokenizer.encode("a", add_special_tokens=False)
        self._anchor = ids[-1:]
        self._before = self._decode(self._anchor)

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        known = self._known
        for i in set(token_ids) - known.keys():
            known[i] = self._inside(i)
        texts = [known[i] for i in token_ids]
        if texts:  # a decoder may take off the space at the very beginning
            first = self._decode(token_ids[:1])
            texts[0] = first if texts[0].endswith(first) else texts[0]
        self._join_characters(token_ids, texts)
        return texts

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _inside(self, token_id: int) -> str:
        """A token's text behind another one."""
        text = self._decode([*self._anchor, token_id])
        return text[len(self._before) :] if text.startswith(self._before) else self._decode([token_id])

    def _join_characters(self, token_ids: Sequence[int], texts: list[str]) -> None:
        """Put together neighbours that hold parts of one character."""
        i = 0
        while i < len(texts):
            if _PART not in texts[i]:
                i += 1
                continue
            for end in range(i + 2, min(i + _MOST_PARTS, len(texts)) + 1):
                whole = self._joined(tuple(token_ids[i:end]))
                if _PART not in whole:
                    texts[i:end] = [whole] + [""] * (end - i - 1)
                    i = end
                    break
            else:
                i += 1

    def _joined(self, token_ids: tuple[int, ...]) -> str:
        """The text of several tokens behind another one."""
        if token_ids not in self._groups:
            if len(self._groups) >= _MOST_KEPT:
                self._groups.clear()
            self._groups[token_ids] = self._decode([*self._anchor, *token_ids])[len(self._before) :]
        return self._groups[token_ids]


def level_of(gap: float | None) -> int:
    """How far the two models are apart at a token: 0 (less than a factor of 2) to 3 (more than a factor of 100)."""
    return 0 if gap is None or math.isnan(gap) else sum(abs(gap) >= level for level in LEVELS)


def render_tokens(
    tokens: Sequence[str],
    gaps: Sequence[float | None] | None,
    mask: Sequence[bool] | None = None,
    *,
    marks: bool = False,
) -> "Text":
    """
    A completion with its tokens coloured: orange where the teacher finds the token less likely than the student that
    sampled it, blue where it finds it more likely, the stronger the further apart (a factor of 2, 10, 100).

    Args:
        tokens (`Sequence[str]`): Texts of the tokens, `(T,)`.
        gaps (`Sequence[float]` or `None`):
            Teacher − student log-prob of each, in nats, `(T,)`; `None` or NaN where it is not known.
        mask (`Sequence[bool]`, *optional*): Whether each is distilled, `(T,)`; the others are dim.
        marks (`bool`, *optional*, defaults to `False`):
            For places without colour: `[-less likely-]` and `{+more likely+}` from a factor of 10 on.

    Returns:
        `rich.text.Text`
    """
    from rich.text import Text

    text = Text()
    for i, token in enumerate(tokens):
        gap = None if gaps is None else gaps[i]
        level = level_of(gap)
        token = _printable(token)
        if mask is not None and not mask[i]:
            text.append(token, style="dim")
        elif level == 0 or gap is None or not token:
            text.append(token)
        else:
            _append_coloured(text, token, gap > 0, level, marks)
    return text


def _append_coloured(text: "Text", token: str, more: bool, level: int, marks: bool) -> None:
    body = token.rstrip("\n")
    if not body.strip():  # a colour needs something to be seen on
        body = "".join(_SIGNS.get(character, character) for character in token)
    opening, closing = _MARKS[more] if marks and level > 1 else ("", "")
    text.append(f"{opening}{body}{closing}", style=(_MORE if more else _LESS)[level - 1])
    text.append("\n" * (len(token) - len(token.rstrip("\n"))))


def _printable(token: str) -> str:
    """A token whose control characters do nothing to a terminal."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "␡" if c == "\x7f" or "\x80" <= c < "\xa0" else c
        for c in token
    )


def legend(*, marks: bool = False) -> "Text":
    """What the colours of [`render_tokens`] mean."""
    from rich.text import Text

    text = Text("The teacher finds a token ")
    for more, styles, word in ((False, _LESS, "less"), (True, _MORE, "more")):
        text.append(f"{word} likely than the student: ")
        for level, (factor, style) in enumerate(zip(("2×", "10×", "100×"), styles, strict=True), start=1):
            opening, closing = _MARKS[more] if marks and level > 1 else ("", "")
            text.append(f"{opening}{factor}{closing}", style=style)
            text.append(" ")
        text.append("" if more else "or ")
    text.append("· ")
    text.append("dim", style="dim")
    text.append(": not distilled")
    return text


def to_html(parts: Sequence["Text"], width: int = 120) -> str:
    """A page with the given texts, without scripts or anything to load."""
    from rich.console import Console

    console = Console(record=True, file=StringIO(), width=width, force_terminal=True, color_system="truecolor")
    for part in parts:
        console.print(part)
    return console.export_html(inline_styles=True)


def to_plain(parts: Sequence["Text"]) -> str:
    """The texts without colours; for those rendered with `marks`."""
    return "\n".join(part.plain for part in parts)
