# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Who answers: teachers, one idea a file."""

from .adapter import AdapterTeacher
from .answers import TeacherScoreError
from .base import Teacher
from .cached import CachedTeacher
from .local import LocalTeacher
from .mixture import MixtureTeacher
from .recording import RecordingTeacher
from .remote import RemoteTeacher
from .resolve import resolve_teacher
from .routed import RoutedTeacher
from .self_teacher import SelfTeacher

__all__ = [
    "AdapterTeacher",
    "CachedTeacher",
    "LocalTeacher",
    "MixtureTeacher",
    "RecordingTeacher",
    "RemoteTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "Teacher",
    "TeacherScoreError",
    "resolve_teacher",
]
