# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""On-policy distillation as a plugin to TRL: `OnPolicyDistillTrainer` where `GRPOTrainer` stood."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .collators import TeacherBatch, TeacherScores
    from .config import OnPolicyDistillConfig
    from .kernels import fused_linear_divergence
    from .teachers import (
        AdapterTeacher,
        CachedTeacher,
        LocalTeacher,
        MixtureTeacher,
        RecordingTeacher,
        RemoteTeacher,
        RoutedTeacher,
        SelfTeacher,
        Teacher,
    )
    from .trainer import OnPolicyDistillTrainer

# `import trl_opd.losses` must not import TRL: names are found when they are asked for
_EXPORTS = {
    "AdapterTeacher": "teachers",
    "CachedTeacher": "teachers",
    "LocalTeacher": "teachers",
    "MixtureTeacher": "teachers",
    "OnPolicyDistillConfig": "config",
    "OnPolicyDistillTrainer": "trainer",
    "RecordingTeacher": "teachers",
    "RemoteTeacher": "teachers",
    "RoutedTeacher": "teachers",
    "SelfTeacher": "teachers",
    "Teacher": "teachers",
    "TeacherBatch": "collators",
    "TeacherScores": "collators",
    "fused_linear_divergence": "kernels",
}

__all__ = [
    "AdapterTeacher",
    "CachedTeacher",
    "LocalTeacher",
    "MixtureTeacher",
    "OnPolicyDistillConfig",
    "OnPolicyDistillTrainer",
    "RecordingTeacher",
    "RemoteTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "Teacher",
    "TeacherBatch",
    "TeacherScores",
    "__version__",
    "fused_linear_divergence",
]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
