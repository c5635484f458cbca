# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""From the rows of a dataset to the ids that are scored."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from trl.data_utils import is_conversational

from ..teachers.cache import Question
from ..views import PromptRenderer, make_renderer, renders_alike
from .arguments import ScoreArguments, ScoringRun

_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_rows(arguments: ScoreArguments) -> Dataset:
    """
    The dataset, with columns that can be scored.

    Raises:
        ValueError: If it lacks them.
    """
    name = os.path.expanduser(str(arguments.dataset))
    kind = _FILES.get(os.path.splitext(name)[1])
    if kind is not None:
        if not os.path.isfile(name):
            raise ValueError(f"dataset must be a file that exists, got {arguments.dataset!r}. Check the path.")
        dataset = load_dataset(kind, data_files=name, split="train")
    elif os.path.isdir(name):
        dataset = load_from_disk(name)
    else:
        dataset = load_dataset(name, name=arguments.dataset_config, split=arguments.dataset_split)
    if isinstance(dataset, DatasetDict):
        if arguments.dataset_split not in dataset:
            raise ValueError(
                f"dataset_split must be one of {sorted(dataset)}, got {arguments.dataset_split!r}. Name one of them."
            )
        dataset = dataset[arguments.dataset_split]
    columns = set(dataset.column_names)
    if not ({"prompt", "completion"} <= columns or {"prompt_ids", "completion_ids"} <= columns):
        raise ValueError(
            "dataset must have the columns prompt and completion (TRL's prompt-completion format) or prompt_ids and "
            f"completion_ids, got {sorted(columns)}. Rename them with dataset.rename_column."
        )
    return dataset


@dataclass
class Renderer:
    """
    Renders dataset rows as the trainer renders prompts.

    Args:
        run ([`ScoringRun`]): Tokenizers and the arguments of the templates.
        append_eos (`bool`): Whether text completions end in the end-of-sequence token.
    """

    run: ScoringRun
    append_eos: bool = True

    def __post_init__(self) -> None:
        self._teacher: PromptRenderer = make_renderer(self.run, self.run.teacher_tokenizer)
        self._alike = renders_alike(self._teacher, self.run)

    def question(self, row: Mapping[str, Any], number: int) -> Question:
        """
        The ids of a row.

        Raises:
            ValueError: If they cannot be a prompt and what a student could have written after it.
        """
        prompt, theirs = row.get("prompt"), row.get("teacher_prompt_ids")
        if row.get("prompt_ids") is not None:
            question = Question(list(row["prompt_ids"]), list(row["completion_ids"] or []))
        else:
            question = self._render(row, number)
        view = row.get("teacher_prompt")
        if theirs is not None:
            question.teacher_prompt_ids = list(theirs)
        elif view is not None or (prompt is not None and not isinstance(prompt, str) and not self._alike):
            ids = self._teacher.render(prompt if view is None else view, question.prompt_ids)
            question.teacher_prompt_ids = None if list(ids) == list(question.prompt_ids) else list(ids)
        if not question.completion_ids or not question.asked_prompt:
            what = "completion" if question.asked_prompt else "prompt"
            raise ValueError(f"Row {number} of the dataset must have a {what}, got an empty one. Remove the row.")
        return question

    def _render(self, row: Mapping[str, Any], number: int) -> Question:
        tokenizer, prompt, completion = self.run.tokenizer, row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                f"prompt and completion must both be text or both messages, but row {number} has a "
                f"{type(prompt).__name__} and a {type(completion).__name__}. Write both alike."
            )
        if isinstance(prompt, str):
            prompt_ids = tokenizer(text=[prompt])["input_ids"][0]
            eos = tokenizer.eos_token or ""
            tail = eos if self.append_eos and not completion.endswith(eos) else ""
            whole = tokenizer(text=[prompt + completion + tail])["input_ids"][0]
        else:
            if not is_conversational({"prompt": prompt}):
                raise ValueError(f"prompt must be text or a list of messages, but row {number} has {prompt!r}.")
            kwargs = {"tokenize": True, "return_dict": True, **self.run.chat_template_kwargs}
            rendered = tokenizer.apply_chat_template(conversation=[prompt], add_generation_prompt=True, **kwargs)
            prompt_ids = rendered["input_ids"][0]
            whole = tokenizer.apply_chat_template(conversation=[[*prompt, *completion]], **kwargs)["input_ids"][0]
            whole = self._until_end(whole, len(prompt_ids))
        if list(whole[: len(prompt_ids)]) != list(prompt_ids):
            raise ValueError(
                f"Prompt and completion of row {number} must begin with the prompt's tokens, but together they are "
                f"rendered otherwise: {tokenizer.decode(prompt_ids[-8:])!r} became "
                f"{tokenizer.decode(whole[: len(prompt_ids)][-8:])!r}. No student writes such tokens after this "
                "prompt. Move whitespace to the other side of the border; begin the completion with the block of "
                "thoughts that the template's generation prompt has; set chat_template_kwargs as in training; or give "
                "prompt_ids and completion_ids."
            )
        return Question(list(prompt_ids), list(whole[len(prompt_ids) :]))

    def _until_end(self, ids: list[int], start: int) -> list[int]:
        """Without the whitespace that a template puts after a message's last token: a student stops before it."""
        tokenizer = self.run.tokenizer
        ends = [i for i in range(start, len(ids)) if ids[i] == tokenizer.eos_token_id]
        if ends and not tokenizer.decode(ids[ends[-1] + 1 :], skip_special_tokens=False).strip():
            return ids[: ends[-1] + 1]
        return ids


class Questions:
    """
    The samples of a dataset in order, as far as they are not too long.

    Args:
        dataset (`Dataset`): The rows.
        renderer ([`Renderer`]): What makes ids of them.
        max_length (`int`, *optional*): Longest prompt and completion.
        overflow (`str`): What becomes of longer ones.
    """

    def __init__(self, dataset: Dataset, renderer: Renderer, max_length: int | None, overflow: str):
        self.dataset, self.renderer, self.max_length, self.overflow = dataset, renderer, max_length, overflow
        self.skipped = 0

    def __iter__(self) -> Iterator[Question]:
        for number, row in enumerate(self.dataset):
            question = self.renderer.question(row, number)
            length = max(len(question), len(question.prompt_ids) + len(question.completion_ids))
            if self.max_length is None or length <= self.max_length:
                yield question
                continue
            if self.overflow == "error":
                raise ValueError(
                    f"Prompt and completion of row {number} must have at most {self.max_length} tokens, got {length}. "
                    "Cutting them would change what is scored. Set overflow='skip' to leave such rows out, or a "
                    "larger max_length if the teacher takes it."
                )
            self.skipped += 1
