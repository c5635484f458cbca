# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Checks of where completions come from that need no weights."""

from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


def is_scheduled(args: Any, field: str) -> bool:
    """Whether a field changes during the run."""
    return field in (getattr(args, "schedules", None) or {}) or field in getattr(args, "_scheduled_fields", ())


def samples_student_only(args: Any) -> bool:
    """Whether every completion of the run is the current student's."""
    moving = is_scheduled(args, "student_fraction") or is_scheduled(args, "injected_completions")
    return args.student_fraction >= 1 and args.injected_completions == 0 and not moving


def needs_source(args: Any) -> bool:
    """Whether completions of `off_policy_source` may be needed."""
    if args.injected_completions > 0 or is_scheduled(args, "injected_completions"):
        return True
    if is_scheduled(args, "student_fraction") or is_scheduled(args, "replay_fraction"):
        return True
    return args.student_fraction + args.replay_fraction < 1 - 1e-9


def check_rollout_fields(args: Any) -> None:
    """
    How the fields of the rollouts combine, beside what [`slots.check_slots`] checks.

    Raises:
        ValueError: Naming the field, its rule, the value, what breaks and what to set.
    """
    replays = args.replay_fraction > 0 or is_scheduled(args, "replay_fraction")
    if replays and args.injected_completions:
        raise ValueError(
            f"replay_fraction must be 0 with injected_completions, got {args.replay_fraction}. The buffer holds what "
            "the student wrote, which the injected members of a group are not. Unset one of them."
        )
    if args.mask_truncated_completions and is_scheduled(args, "max_completion_length"):
        raise ValueError(
            "mask_truncated_completions must be False with a scheduled max_completion_length, got True. The "
            "completions that the schedule cuts would leave the loss. Unset it."
        )


def check_rollout_columns(dataset: Any, name: str, args: Any) -> None:
    """
    The columns that completions come from must exist. For the training data: evaluation samples from the student.

    Raises:
        ValueError: Naming the column.
    """
    if isinstance(dataset, (dict, DatasetDict, IterableDatasetDict)):
        for split, part in dataset.items():
            check_rollout_columns(part, f"{name}[{split!r}]", args)
        return
    if not isinstance(dataset, (Dataset, IterableDataset)) or not needs_source(args):
        return
    columns = dataset.column_names
    if columns is None or args.off_policy_source != "dataset":
        return
    if "completion" not in columns and "completion_ids" not in columns:
        why = f"student_fraction={args.student_fraction}"
        if args.injected_completions:
            why = f"injected_completions={args.injected_completions}"
        raise ValueError(
            f"{name} must have a column 'completion' (or 'completion_ids') with {why} and "
            f"off_policy_source='dataset', got {columns}. Completions come from there that the student does not "
            "sample. Add it, or set off_policy_source='teacher'."
        )


def check_rollout_sources(
    args: Any,
    teacher: Any,
    *,
    has_rewards: bool,
    view: Any = None,
    tools: Any = None,
    rollout_func: Any = None,
    environment_factory: Any = None,
) -> None:
    """
    The sources must be able to give completions, and nothing else may make the rollouts.

    Raises:
        ValueError: Naming the field.
    """
    if samples_student_only(args):
        return
    for name, value in (
        ("tools", tools),
        ("rollout_func", rollout_func),
        ("environment_factory", environment_factory),
    ):
        if value:
            raise ValueError(
                f"{name} must be unset with student_fraction below 1 or injected_completions, got {value!r}. "
                "Completions that the student did not sample have no turns to call tools in. Unset it, or sample from "
                "the student only."
            )
    _check_stored(teacher)
    if args.injected_when == "group_failure" and not has_rewards:
        raise ValueError(
            "injected_when must be 'always' without reward_funcs, got 'group_failure'. Rewards tell which groups "
            "failed. Pass reward_funcs=, with reward_coef=0 if they shall not be trained on."
        )
    if args.off_policy_source != "teacher" or not needs_source(args):
        return
    from .teachers.generation import why_no_generation

    reason = why_no_generation(teacher)
    if reason is not None:
        raise ValueError(
            f"off_policy_source must be 'dataset' with this teacher_model, got 'teacher'. {reason} Write the "
            "teacher's completions into a column 'completion', or pass a teacher with a method "
            "generate(prompt_ids, sampling)."
        )
    if view is not None:
        raise ValueError(
            "teacher_view must be unset with off_policy_source='teacher'. It is shown a completion, and the teacher "
            "has yet to write it. Put what the teacher sees into the column 'teacher_prompt'."
        )


def _check_stored(teacher: Any) -> None:
    from .teachers import CachedTeacher
    from .teachers.base import leaves

    for leaf in leaves(teacher):
        if isinstance(leaf, CachedTeacher) and leaf._replay:
            raise ValueError(
                "student_fraction must be 1, and injected_completions 0, with teacher_model='cache:...', got "
                f"{leaf.name!r}. Its stored completions are the rollouts. Unset them."
            )
