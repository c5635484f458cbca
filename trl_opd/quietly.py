# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What only watches a run must not end it."""

import warnings
from types import TracebackType


class Quietly:
    """
    A context that swallows errors: the first one is warned about, and `failed` is set from then on.

    Args:
        what (`str`): What goes on inside, as the subject of the warning.
        so (`str`): What the error costs.
    """

    def __init__(self, what: str, so: str = "The run goes on without it"):
        self.what, self.so = what, so
        self.failed = False

    def __enter__(self) -> "Quietly":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        first, self.failed = not self.failed, True
        if first:
            warnings.warn(f"{self.what} failed with {type(error).__name__}: {error}. {self.so}.", stacklevel=3)
        return True
