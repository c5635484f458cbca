# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What a teacher that is made of teachers says of them together."""

from collections.abc import Sequence
from typing import Any


class TeacherGroup:
    """Base of teachers with `members`."""

    members: Sequence[Any]

    @property
    def asynchronous(self) -> bool:
        """Whether all that is asked at generation time is asked without waiting."""
        early = [m for m in self.members if not getattr(m, "scores_in_loss", False) or hasattr(m, "submit")]
        return bool(early) and all(getattr(member, "asynchronous", False) for member in early)

    @property
    def changes(self) -> bool:
        """Whether a member's weights move during the run."""
        return any(getattr(member, "changes", False) for member in self.members)

    @property
    def takes_requested_ids(self) -> bool:
        """Whether a member is asked for entries that the student chooses."""
        return any(getattr(member, "takes_requested_ids", False) for member in self.members)
