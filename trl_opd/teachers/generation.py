# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Completions that a teacher writes: teacher text (GKD, PACED), privileged rollouts (GATES, KEPO, HDPO)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad, use_adapter

from .adapter import AdapterTeacher
from .answers import TeacherScoreError
from .base import teacher_name
from .local import LocalTeacher
from .routed import RoutedTeacher
from .self_teacher import SelfTeacher
from .target import TargetTeacher


@dataclass(frozen=True)
class Sampling:
    """
    How completions are sampled: as the student's are.

    A teacher of one's own gives completions by a method `generate(prompt_ids, sampling)`, lists of ids in and out.

    Args:
        max_new_tokens (`int`): Most tokens of a completion.
        temperature (`float`), top_p (`float`), top_k (`int`), min_p (`float`, *optional*), repetition_penalty
            (`float`): The student's.
        eos_token_ids (`tuple[int, ...]`): Ids of which the first ends a completion, and is part of it.
        pad_token_id (`int`): The student's.
        vocab_size (`int`, *optional*): Ids from here on must not be sampled: the student or the teacher knows none.
        options (`Mapping[str, Any]`): Further arguments of transformers' `GenerationConfig`.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float | None
    repetition_penalty: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int | None
    options: Mapping[str, Any]

    @classmethod
    def of_student(cls, trainer: Any) -> "Sampling":
        """What a trainer samples its student with at this moment."""
        args = trainer.args
        options: dict[str, Any] = {}
        if not trainer.use_vllm:  # whose arguments have other names
            options = {"cache_implementation": args.cache_implementation, **(args.generation_kwargs or {})}
        return cls(
            max_new_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=max(trainer.top_k or 0, 0),
            min_p=trainer.min_p,
            repetition_penalty=trainer.repetition_penalty,
            eos_token_ids=tuple(trainer.eos_token_ids),
            pad_token_id=trainer._tokenizer.pad_token_id,
            vocab_size=getattr(trainer, "shared_vocab_size", None),
            options=options,
        )


def why_no_generation(teacher: Any) -> str | None:
    """Why a teacher cannot write completions, `None` if it can."""
    if isinstance(teacher, TargetTeacher):
        return why_no_generation(teacher.members[0])
    if isinstance(teacher, RoutedTeacher):
        reasons = [
            (name, why_no_generation(member)) for name, member in zip(teacher.names, teacher.members, strict=True)
        ]
        return next((f"{reason[:-1]} (its member {name!r})." for name, reason in reasons if reason is not None), None)
    if isinstance(teacher, (LocalTeacher, AdapterTeacher, SelfTeacher)) or callable(
        getattr(teacher, "generate", None)
    ):
        return None
    if teacher is None:
        return "There is no teacher."
    if hasattr(teacher, "members"):
        return "Which member of a mixture would write is not defined."
    return f"{type(teacher).__name__} scores completions, and writes none."


def generate_from_teacher(
    teacher: Any, trainer: Any, prompt_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None
) -> list[list[int]]:
    """
    One completion of the teacher for each of its prompts, sampled as the student samples.

    Ends at the student's end-of-sequence ids. A teacher that ends its turn with another one (an instruct model with
    `<|im_end|>` before a base student) ends there too, and that id becomes the student's.

    Args:
        teacher ([`Teacher`]): Who writes. Its weights are whole on each process.
        trainer ([`~trl.GRPOTrainer`]): The run, whose settings are taken.
        prompt_ids (`Sequence[Sequence[int]]`): The teacher's prompts, see [`teacher_prompts`].
        members (`Sequence[int]`, *optional*): Of a [`RoutedTeacher`] the member for each prompt.

    Returns:
        `list[list[int]]`: Ids of each completion, at least one.

    Raises:
        TeacherScoreError: If the teacher cannot write, or wrote what no completion can be.
    """
    if not prompt_ids:
        return []
    if isinstance(teacher, TargetTeacher):  # the references beside it only score
        teacher = teacher.members[0]
    reason = why_no_generation(teacher)
    if reason is not None:
        raise TeacherScoreError(f"Teacher {teacher_name(teacher)!r} cannot write completions. {reason}")
    if isinstance(teacher, RoutedTeacher):
        return _routed(teacher, trainer, prompt_ids, members or ())
    sampling = Sampling.of_student(trainer)
    if callable(getattr(teacher, "generate", None)):
        completions = [list(ids) for ids in teacher.generate([list(ids) for ids in prompt_ids], sampling)]
        return _checked(completions, len(prompt_ids), sampling, teacher)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise TeacherScoreError(
            "off_policy_source must be 'dataset' under FSDP or DeepSpeed, got 'teacher'. Generation from a sharded "
            "teacher is not supported yet. Use DDP, or write the teacher's completions into the dataset beforehand."
        )
    with _writing(teacher, trainer) as (model, device, size):
        pieces = [prompt_ids[i : i + size] for i in range(0, len(prompt_ids), size)] if size else [prompt_ids]
        completions = [ids for piece in pieces for ids in _sample(model, trainer, piece, sampling, device)]
    return _checked(completions, len(prompt_ids), sampling, teacher)


def _routed(
    teacher: RoutedTeacher, trainer: Any, prompt_ids: Sequence[Sequence[int]], members: Sequence[int]
) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in prompt_ids]
    for i, member in enumerate(teacher.members):
        mine = [row for row, index in enumerate(members) if index == i]
        if not mine:
            continue
        teacher._prepare(member)  # one from a path is loaded when it is needed
        for row, ids in zip(mine, generate_from_teacher(member, trainer, [prompt_ids[r] for r in mine]), strict=True):
            completions[row] = ids
    return completions


@contextmanager
def _writing(teacher: Any, trainer: Any) -> Iterator[tuple[Any, torch.device, int | None]]:
    """The model with the teacher's weights and without dropout, its device, and the most sequences of a batch."""
    accelerator = trainer.accelerator
    if isinstance(teacher, LocalTeacher):
        device = accelerator.device if teacher.device is None else torch.device(teacher.device)
        with teacher._weights(), unwrap_model_for_generation(teacher.model, accelerator) as model:
            yield model, device, teacher.batch_size
        return
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    unwrapped = unwrap_model_for_generation(
        trainer.model_wrapped, accelerator, gradient_checkpointing_kwargs=checkpointing
    )
    with unwrapped as model:
        was_training = model.training
        model.eval()
        torch.clear_autocast_cache()
        adapter = isinstance(teacher, AdapterTeacher)
        try:
            with use_adapter(model, teacher.adapter_name) if adapter else teacher._worn():
                yield model, accelerator.device, None
        finally:
            torch.clear_autocast_cache()  # it knows parameters, not their weights
            model.train(was_training)


def _sample(
    model: Any, trainer: Any, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, device: torch.device
) -> list[list[int]]:
    """Completions of one batch by transformers' `generate`."""
    size = model.config.get_text_config().vocab_size
    limit = min(size, sampling.vocab_size or size)
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    foreign = [i for i in declared if i < limit and i not in sampling.eos_token_ids]
    options = dict(sampling.options)
    suppressed = [*(options.pop("suppress_tokens", None) or []), *range(limit, size)]
    config = GenerationConfig(
        **{
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            **options,
            "max_new_tokens": sampling.max_new_tokens,
            "pad_token_id": sampling.pad_token_id,
            "eos_token_id": [*sampling.eos_token_ids, *foreign],
            "suppress_tokens": suppressed or None,
        },
        disable_compile=True,
    )
    ids = [torch.tensor(row) for row in prompt_ids]
    inputs = {
        "input_ids": pad(ids, padding_value=sampling.pad_token_id, padding_side="left").to(device),
        "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="left").to(device),
    }
    with torch.no_grad():
        output: Tensor = model.generate(**inputs, generation_config=config)
    width = inputs["input_ids"].shape[1]
    ends = {**{i: i for i in sampling.eos_token_ids}, **dict.fromkeys(foreign, sampling.eos_token_ids[0])}
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


def _until_end(ids: Sequence[int], ends: Mapping[int, int]) -> list[int]:
    """The ids up to the first of `ends`, which becomes what it maps to."""
    kept: list[int] = []
    for token in ids:
        kept.append(ends.get(token, token))
        if token in ends:
            break
    return kept


def _checked(completions: list[list[int]], num: int, sampling: Sampling, teacher: Any) -> list[list[int]]:
    """Completions cut as sampled ones are, if they can be completions."""
    ends = {i: i for i in sampling.eos_token_ids}
    completions = [_until_end(ids, ends)[: sampling.max_new_tokens] for ids in completions]
    limit = sampling.vocab_size
    known = all(i >= 0 and (limit is None or i < limit) for ids in completions for i in ids)
    if len(completions) != num or not all(completions) or not known:
        raise TeacherScoreError(
            f"Teacher {teacher_name(teacher)!r} must write one completion of known ids for each of {num} prompts, got "
            f"{len(completions)} of lengths {[len(ids) for ids in completions][:8]}. A completion has at least one "
            f"token, and ids below {limit or 'the vocabulary size'}."
        )
    return completions


# The prompts that it completes


def teacher_prompts(
    trainer: Any, rows: Sequence[Mapping[str, Any]], prompt_ids: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[int]]:
    """
    What the teacher reads before its own completions: `teacher_prompt` of the row where there is one (a hint, a
    document, a solution), else the student's prompt, in the teacher's chat template where it has another.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
        rows (`Sequence[Mapping[str, Any]]`): Dataset rows.
        prompt_ids (`Sequence[Sequence[int]]`): The student's prompts.

    Returns:
        `list[list[int]]`: Ids; `list[int]`: which member of a [`RoutedTeacher`] each goes to, else 0.
    """
    side = trainer._teacher_side
    routed = isinstance(trainer.teacher, RoutedTeacher)
    members = trainer.teacher.route(rows).tolist() if routed else [0] * len(rows)
    prompts = []
    for row, ours, member in zip(rows, prompt_ids, members, strict=True):
        prompt, renderer = row.get("teacher_prompt"), side.renderers[member]
        if prompt is None and (side.alike[member] or isinstance(row["prompt"], str)):
            prompts.append(side._known(list(ours)))
            continue
        try:
            ids = renderer.render(row["prompt"] if prompt is None else prompt, ours, trainer.tools)
        except Exception as error:  # the template's, too
            raise TeacherScoreError(f"A prompt cannot be rendered for the teacher: {error}") from error
        prompts.append(ids if side._has_tokenizer(member) else side._known(ids))
    return prompts, members
