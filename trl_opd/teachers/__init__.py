# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Who answers: teachers, one idea a file."""

from .adapter import AdapterTeacher
from .base import Teacher, TeacherScoreError, resolve_teacher
from .local import LocalTeacher

__all__ = ["AdapterTeacher", "LocalTeacher", "Teacher", "TeacherScoreError", "resolve_teacher"]
