# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Checks of the teacher that need no weights, so that bad input fails before a GPU minute is spent."""

from typing import Any

from .config import OnPolicyDistillConfig
from .teachers import LocalTeacher, SelfTeacher
from .teachers.base import leaves


def check_teacher_fields(args: OnPolicyDistillConfig, teacher: Any) -> None:
    """Fields of a kind of teacher that is not there would be ignored."""
    kinds = [type(leaf) for leaf in leaves(teacher)] if teacher is not None else []
    if teacher is not None and SelfTeacher not in kinds and args.teacher_sync != "frozen":
        raise ValueError(
            f"teacher_sync must be 'frozen' unless teacher_model='self', got {args.teacher_sync!r}. Only the student "
            "as its own teacher has weights to follow. Set teacher_model='self', or unset it."
        )
    for name, value in args.teacher_memory.items():
        if value is not None and LocalTeacher not in kinds:
            raise ValueError(
                f"teacher_{name} must be unset without a teacher whose weights are loaded here, got {value!r}. It "
                "would be ignored. Unset it."
            )
