# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the teacher sees in front of the student's completion: its own prompt, its own chat template."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import is_conversational

from .vocabulary import as_tokenizer

logger = logging.get_logger(__name__)

TeacherView = Callable[[Mapping[str, Any], Any, float | None, list[dict[str, Any]]], Any]

# A generation prompt may open a block of thoughts, or open and close it ("no think")
_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_TAIL = 32  # tokens of a prompt in which such a block is looked for


def _kind(text: str) -> str:
    """The block of thoughts that a prompt ends in: `"<think>"`, `"<think></think>"`, or `""`."""
    thought = _THOUGHT.search(text)
    return "" if thought is None else "".join(thought.group().split())


@dataclass
class PromptRenderer:
    """
    Turns a prompt into the ids that a teacher reads before the completion.

    Conversations go through the teacher's chat template. Whatever block of thoughts that opens, the teacher's prompt
    ends in the one that the student's prompt ends in (none, `<think>`, or an empty one): the completion continues
    from there.

    Args:
        processing_class: The tokenizer whose vocabulary and template the teacher has.
        chat_template (`str`, *optional*): A template in the place of the tokenizer's.
        template_kwargs (`Mapping[str, Any]`): Arguments of the rendering.
        student: The student's tokenizer.
    """

    processing_class: PreTrainedTokenizerBase
    chat_template: str | None
    template_kwargs: Mapping[str, Any]
    student: Any
    _warned: bool = field(default=False, repr=False)

    def render(self, prompt: Any, student_ids: Sequence[int], tools: list | None = None) -> list[int]:
        """
        Ids of a prompt.

        Args:
            prompt (`str` or `list[dict]`): Text, or messages.
            student_ids (`Sequence[int]`): The student's prompt.
            tools (`list`, *optional*): The tools that the student's prompt names.

        Raises:
            ValueError: If it is neither text nor messages, is empty, or has images.
        """
        ids = self._render(prompt, list(student_ids)[-_TAIL:], tools)
        if not ids:
            raise ValueError(
                f"teacher_prompt must have a token, got {prompt!r}. The first token of the completion would be scored "
                "after nothing. Start it with the tokenizer's begin-of-sequence token, or leave it out (None)."
            )
        return ids

    def _render(self, prompt: Any, student_ids: list[int], tools: list | None) -> list[int]:
        tokenizer = self.processing_class
        tail = self.student.decode(student_ids, skip_special_tokens=False)
        if isinstance(prompt, str):
            if _kind(prompt) != _kind(tail) and not self._warned:
                self._warned = True
                logger.warning(
                    f"The teacher's prompt ends in {prompt[-30:]!r} and the student's in {tail[-30:]!r}: one of them "
                    "opens a block of thoughts. The teacher reads the completion as it stands, so it may expect "
                    "another text. End teacher_prompt like prompt."
                )
            return tokenizer(text=prompt)["input_ids"]
        if not prompt or not is_conversational({"prompt": prompt}):
            raise ValueError(
                f"teacher_prompt must be text or a list of messages with role and content, got {prompt!r}. It is "
                "rendered like prompt."
            )
        contents = [message.get("content") for message in prompt]
        kinds = {part["type"] for content in contents if isinstance(content, list) for part in content} - {"text"}
        if kinds:
            raise ValueError(
                f"teacher_prompt must hold text, got content of type {sorted(kinds)}. Images of a teacher's own "
                "prompt are not supported. Leave the column out to show the teacher the student's prompt."
            )
        text = tokenizer.apply_chat_template(
            prompt,
            tools=tools or None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **self.template_kwargs,
        )
        ids = tokenizer(_THOUGHT.sub("", text), add_special_tokens=False)["input_ids"]
        return [*ids, *self._thought_ids(student_ids, tail)]

    def _thought_ids(self, student_ids: list[int], tail: str) -> list[int]:
        """The block of thoughts that the student's prompt ends in, with the ids that it has there."""
        thought = _THOUGHT.search(tail)
        if thought is None:
            return []
        for start in reversed(range(len(student_ids))):
            if _THOUGHT.match(self.student.decode(student_ids[start:], skip_special_tokens=False)):
                return student_ids[start:]
        return self.student(thought.group(), add_special_tokens=False)["input_ids"]  # it begins within a token


def make_renderer(trainer: Any, teacher_processing_class: Any) -> PromptRenderer:
    """The renderer of a teacher whose tokenizer is `teacher_processing_class` (`None`: the student's)."""
    args = trainer.args
    kwargs = trainer.chat_template_kwargs if args.teacher_chat_template_kwargs is None else {}
    kwargs = {**kwargs, **(args.teacher_chat_template_kwargs or {})}
    teacher = as_tokenizer(teacher_processing_class)
    if args.teacher_chat_template == "own" and teacher is not None and teacher.chat_template:
        return PromptRenderer(teacher, None, kwargs, trainer._tokenizer)
    return PromptRenderer(trainer._tokenizer, trainer.chat_template, kwargs, trainer._tokenizer)


def renders_alike(renderer: PromptRenderer, trainer: Any) -> bool:
    """Whether a renderer surely gives the student's own prompts."""
    student = trainer._tokenizer
    template = renderer.chat_template or renderer.processing_class.chat_template
    same_kwargs = dict(renderer.template_kwargs) == dict(trainer.chat_template_kwargs)
    return same_kwargs and template == (trainer.chat_template or student.chat_template)


def make_groups(completions: Sequence[Any], rewards: Sequence[float | None], size: int) -> list[list[dict[str, Any]]]:
    """For each completion the other ones of its prompt, which stand together in groups of `size`."""
    groups = []
    for i in range(len(completions)):
        start = i - i % size
        others = [j for j in range(start, min(start + size, len(completions))) if j != i]
        groups.append([{"completion": completions[j], "reward": rewards[j]} for j in others])
    return groups
