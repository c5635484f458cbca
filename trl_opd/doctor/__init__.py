# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""`trl-opd doctor`: what is wrong with a run, before it is started."""

from typing import Any

from ..checks import Run
from ..findings import Finding


def preflight(run: Run, teacher_tokenizers: list[Any]) -> list[Finding]:
    """
    The cheap checks, before any weight is loaded.

    Args:
        run ([`Run`]): The trainer's arguments.
        teacher_tokenizers (`list`): Of `teacher_preflight.check_teacher`.
    """
    return []
