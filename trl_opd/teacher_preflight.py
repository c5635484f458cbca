# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Checks of the teacher that need no weights, so that bad input fails before a GPU minute is spent."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig
from torch import nn

from .config import OnPolicyDistillConfig
from .losses import nearest_name
from .preflight import check_path, config_of, student_kwargs, student_tokenizer, tokenizer_of
from .targets import resolve_target
from .teachers import AdapterTeacher, LocalTeacher, MixtureTeacher, RemoteTeacher, RoutedTeacher, SelfTeacher
from .teachers.base import leaves
from .vocabulary import as_tokenizer, shared_vocab_size


def check_teacher_fields(args: OnPolicyDistillConfig, teacher: Any) -> None:
    """Fields of a kind of teacher that is not there would be ignored."""
    selves = [leaf for leaf in leaves(teacher) if isinstance(leaf, SelfTeacher)]
    if teacher is not None and not selves and args.teacher_sync != "frozen":
        raise ValueError(
            f"teacher_sync must be 'frozen' unless teacher_model='self', got {args.teacher_sync!r}. Only the student "
            "as its own teacher has weights to follow. Set teacher_model='self', or unset it."
        )
    following = [{"sync": leaf.sync, "steps": leaf.steps, "rate": leaf.rate} for leaf in selves]
    if selves and args.teacher_sync != "frozen" and args.teacher_syncing not in following:
        raise ValueError(
            f"teacher_sync must be unset with a SelfTeacher, or a MixtureTeacher's 'self', that follows otherwise, "
            f"got {args.teacher_sync!r} beside {following}. It would be ignored. Unset it, and make the member with "
            "SelfTeacher(sync=...)."
        )
    kept = [x for x in following if x["sync"] != "live"]
    if any(x != kept[0] for x in kept):
        raise ValueError(
            f"All SelfTeachers of a run that keep weights must follow the student in one way, got {kept}. A "
            "checkpoint holds the weights of one, with which all would go on. Give them one sync, steps and rate."
        )
    if isinstance(teacher, MixtureTeacher) and args.teacher_model_init_kwargs:
        raise ValueError(
            f"teacher_model_init_kwargs must be unset when teacher_model is a MixtureTeacher, got "
            f"{args.teacher_model_init_kwargs!r}. They would be ignored. Pass them to it as init_kwargs."
        )
    local = [leaf for leaf in leaves(teacher) if isinstance(leaf, LocalTeacher)] if teacher is not None else []
    for name, value in args.teacher_memory.items():
        if value is not None and not any(getattr(leaf, name) == value for leaf in local):
            raise ValueError(
                f"teacher_{name} must be unset unless teacher_model is, or has, a path or a model, got {value!r}. "
                "It would be ignored. Unset it, or pass it to the LocalTeacher that you make."
            )


def check_references(args: OnPolicyDistillConfig, teacher: Any, references: Sequence[Any]) -> None:
    """The target must be made of as many models as there are, each of them one teacher."""
    target = resolve_target(args.target, args.target_kwargs, len(references))  # type: ignore[arg-type]
    if not references:
        return
    if teacher is None:
        raise ValueError(
            "reference_model must be unset without teacher_model. It is a part of the distribution that the student "
            "aims at. Pass teacher_model= too, or beta for GRPO's own reference."
        )
    several = [type(x).__name__ for x in (teacher, *references) if getattr(x, "members", None) is not None]
    if several:
        raise ValueError(
            f"teacher_model and reference_model must each be one model with target={args.target!r}, got {several}. "
            "The target combines them token by token. Name one teacher, or set target='teacher'."
        )
    if args.credit != "direct" and target.mixture == "contrast":
        raise ValueError(
            f"credit must be 'direct' with target='contrast', got {args.credit!r}. Its coefficient depends on whole "
            "distributions. Set credit='direct', or target='extrapolate' with a fixed scale."
        )


def check_adapter(teacher: object, model: Any, peft_config: PeftConfig | None) -> None:
    """A teacher that is an adapter of the student needs a student that has it."""
    for leaf in leaves(teacher):
        if isinstance(leaf, AdapterTeacher):
            has_adapters = isinstance(model, nn.Module) and is_peft_model(model)
            adapters, active = (list(model.peft_config), model.active_adapters) if has_adapters else ([], [])
            if peft_config is not None:
                adapters, active = [*adapters, "default"], ["default"]
            leaf.check_student(adapters, active)


def check_teacher_columns(dataset: Any, name: str, teacher: object, view: object) -> None:
    """The columns that routing needs, and one source of the teacher's prompts."""
    if isinstance(dataset, (dict, DatasetDict, IterableDatasetDict)):
        for split, part in dataset.items():
            check_teacher_columns(part, f"{name}[{split!r}]", teacher, view)
        return
    columns = dataset.column_names if isinstance(dataset, (Dataset, IterableDataset)) else None
    if columns is None or teacher is None:
        return
    if isinstance(teacher, RoutedTeacher):
        if teacher.column not in columns:
            raise ValueError(
                f"{name} must have a column {teacher.column!r} with a teacher_model that is a dict, got {columns}. It "
                f"names each sample's teacher, one of {teacher.names}. Add it."
            )
        if isinstance(dataset, Dataset):
            unknown = set(dataset.unique(teacher.column)) - set(teacher.names)
            if unknown:
                raise ValueError(
                    f"The column {teacher.column!r} of {name} must name one of the teachers {teacher.names}, got "
                    f"{sorted(map(str, unknown))[:5]}. Those samples would have no teacher. Add their teachers, or "
                    f"remove the samples.{nearest_name(min(map(str, unknown)), teacher.names)}"
                )
    if view is not None and "teacher_prompt" in columns:
        raise ValueError(
            f"{name} must not have a column 'teacher_prompt' beside teacher_view=, got {columns}. Both say what the "
            "teacher sees. Remove one; teacher_view gets the row and may return row['teacher_prompt']."
        )


def check_teacher(
    teacher: object,
    model: Any,
    args: OnPolicyDistillConfig,
    processing_class: object,
    teacher_processing_class: Any,
) -> tuple[int | None, list[Any]]:
    """
    Compare the student's vocabulary with those of its teachers, as far as they are known.

    Returns:
        `int` or `None`: leading head entries to compare, `None` for all (or where nothing is known of the teacher).
        `list`: The teacher's tokenizer (`None`: not known); of a [`RoutedTeacher`] one for each member.

    Raises:
        ValueError: If a path does not exist or the vocabularies differ.
    """
    if isinstance(model, str):
        check_path(model, "model")
    if teacher is None:
        return None, []
    routed = isinstance(teacher, RoutedTeacher)
    members = list(zip(teacher.names, teacher.members, strict=True)) if routed else [(None, teacher)]  # type: ignore[attr-defined]
    given = teacher_processing_class
    if isinstance(given, Mapping):
        unknown = set(given) - {name for name, _ in members}
        if unknown:
            raise ValueError(
                f"teacher_processing_class as a dict must be keyed by the teachers' names, got {sorted(unknown)}. "
                "Nothing would be rendered with them. Use the keys of teacher_model."
            )
    student: dict[str, Any] = {}
    sizes, tokenizers = [], []
    for name, member in members:
        own = given.get(name) if isinstance(given, Mapping) else given
        found: list[Any] = []
        for leaf in leaves(member):
            if isinstance(leaf, (AdapterTeacher, SelfTeacher)):
                continue
            if not student:
                student = _student_vocabulary(model, args, processing_class)
            size, tokenizer = _compare(leaf, own, **student)
            sizes.append(size)
            found.append(tokenizer)
        templates = {t.chat_template for t in found if t is not None}
        if own is None and len(templates) > 1 and args.teacher_chat_template == "own":
            raise ValueError(
                "teacher_processing_class must be given for a mixture of teachers with different chat templates: they "
                "read one prompt. Pass the tokenizer that renders it, or set teacher_chat_template='student'."
            )
        tokenizers.append(own if own is not None else next((t for t in found if t is not None), None))
    known = [size for size in sizes if size is not None]
    return min(known) if known else None, tokenizers


def _compare(teacher: Any, given: Any, *, size: int | None, tokenizer: Any) -> tuple[int | None, Any]:
    """Head entries that a student of vocabulary `size` shares with a teacher (`None`: all), and its tokenizer."""
    teacher_tokenizer = as_tokenizer(given)
    if isinstance(teacher, LocalTeacher):
        if isinstance(teacher.model, str):
            check_path(teacher.model, "teacher_model")
        config = config_of(teacher.model, teacher.init_kwargs)
        if config is None and isinstance(teacher.model, str) and "config" not in teacher.init_kwargs:
            raise ValueError(
                f"teacher_model must be a model's folder or a hub id, got {teacher.model!r}, whose config.json cannot "
                "be read. Nothing can be loaded from it. Check the path or id, its revision, and your access to the "
                "hub."
            )
        teacher_tokenizer = teacher_tokenizer or tokenizer_of(teacher.model, config, teacher.init_kwargs)
        teacher_size = None if config is None else config.get_text_config().vocab_size
    else:
        teacher_tokenizer = teacher_tokenizer or as_tokenizer(getattr(teacher, "processing_class", None))
        teacher_size = getattr(teacher, "vocab_size", None)
        if teacher_size is None and isinstance(teacher, RemoteTeacher) and tokenizer is not None:
            teacher_size = max(tokenizer.get_vocab().values()) + 1  # a server refuses ids that are padding
    if size is None or teacher_size is None:
        return None, teacher_tokenizer
    shared = shared_vocab_size(size, teacher_size, tokenizer, teacher_tokenizer)
    return (None if shared == size == teacher_size else shared), teacher_tokenizer


def _student_vocabulary(model: Any, args: OnPolicyDistillConfig, processing_class: object) -> dict[str, Any]:
    config = config_of(model, student_kwargs(args))
    size = None if config is None else config.get_text_config().vocab_size
    return {"size": size, "tokenizer": student_tokenizer(model, args, processing_class)}
