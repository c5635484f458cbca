# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Completions between text and ids: those of a dataset as the student would have written them, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational

from .teachers.answers import TeacherScoreError

COLUMNS = ("completion_ids", "completion")


def dataset_completion(trainer: Any, row: Mapping[str, Any], prompt_ids: Sequence[int], member: int = 0) -> list[int]:
    """
    The completion in a dataset row, as ids.

    Column `completion_ids` is taken as it stands. Column `completion` is text, or messages with one of the assistant
    (beside a conversational `prompt`, text is its content): it is tokenized as the continuation of the prompt, by the
    chat template where there is one, and ends in the first end-of-sequence id, which is added where there is none. A
    column of lists gives several completions; a group takes one after the other, and begins again.

    Both are cut at `max_completion_length`, as sampling is: then no end-of-sequence id is there.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The run: its tokenizer, chat template and `max_completion_length`.
        row (`Mapping[str, Any]`): A dataset row.
        prompt_ids (`Sequence[int]`): Its prompt.
        member (`int`): Which of several completions, counted around.

    Returns:
        `list[int]`: At least one id.

    Raises:
        TeacherScoreError: If the row has no completion, or one that is none.
    """
    ids = _one(row.get("completion_ids"), member, int)
    if ids is None:
        completion = _one(row.get("completion"), member, Mapping)
        if completion is None:
            raise TeacherScoreError(
                f"off_policy_source='dataset' takes the column 'completion' (or 'completion_ids'), but the row with "
                f"the prompt {str(row.get('prompt'))[-60:]!r} has none there. There is nothing to train on. Fill it, "
                "or remove the row."
            )
        ids = _tokenize(trainer, row["prompt"], completion, list(prompt_ids))
    ids = [int(i) for i in ids][: trainer.max_completion_length]
    if not ids:
        raise TeacherScoreError(
            f"completion_ids must hold at least one id, got none beside the prompt {str(row.get('prompt'))[-60:]!r}. "
            "There is nothing to train on. Remove the row."
        )
    return ids


def _one(value: Any, member: int, element: type) -> Any:
    """A value whose elements are of a kind, or one of a list of such values."""
    if value is None or isinstance(value, str) or len(value) == 0 or isinstance(value[0], element):
        return value if value is None or isinstance(value, str) or len(value) else None
    return value[member % len(value)]


def _tokenize(trainer: Any, prompt: Any, completion: Any, prompt_ids: list[int]) -> list[int]:
    tokenizer = trainer._tokenizer
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise _unfit(completion, "text beside a prompt that is text")
        whole = tokenizer(text=prompt + completion)["input_ids"]
        if whole[: len(prompt_ids)] == prompt_ids:
            ids = whole[len(prompt_ids) :]
        else:  # a token of the text would span both
            ids = tokenizer(text=completion, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text=_rendered(trainer, prompt, completion), add_special_tokens=False)["input_ids"]
    end = next((i for i, token in enumerate(ids) if token in trainer.eos_token_ids), None)
    return [*ids, tokenizer.eos_token_id] if end is None else ids[: end + 1]


def _rendered(trainer: Any, prompt: list, completion: Any) -> str:
    """What the chat template has after the generation prompt."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    roles = [message.get("role") for message in completion]
    if roles != ["assistant"]:
        raise _unfit(completion, f"one message of the assistant, not of {roles}")
    template = {
        "tools": trainer.tools or None,
        "chat_template": trainer.chat_template,
        "tokenize": False,
        **trainer.chat_template_kwargs,
    }
    head = trainer._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **template)
    whole = trainer._tokenizer.apply_chat_template([*prompt, *completion], **template)
    if whole.startswith(head):
        return whole[len(head) :]
    content = completion[0].get("content")
    if not isinstance(content, str) or completion[0].get("tool_calls"):
        raise _unfit(completion, "a message with text that the chat template continues the prompt with")
    return content  # e.g. a template that shows thoughts to the model that thinks, and hides them afterwards


def _unfit(completion: Any, rule: str) -> TeacherScoreError:
    return TeacherScoreError(
        f"The column 'completion' must hold {rule}, got {str(completion)[:80]!r}. Its tokens would not be those that "
        "the student writes. Convert it, or give the column 'completion_ids'."
    )


def decode_completions(trainer: Any, prompts: list, prompt_ids: list, completion_ids: list) -> list[Any]:
    """Completions as reward functions get them: text, or messages where the prompts are messages."""
    texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    if not is_conversational({"prompt": prompts[0]}):
        return texts
    tokenizer = trainer._tokenizer
    if any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
        pairs = zip(prompt_ids, completion_ids, strict=True)
        return [[parse_response(tokenizer, ids, prefix=prefix, tools=trainer.tools)] for prefix, ids in pairs]
    return [[{"role": "assistant", "content": text}] for text in texts]
