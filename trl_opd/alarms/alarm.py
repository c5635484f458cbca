# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What an alarm says."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .history import is_finite

ALARMS = (
    "truncation_and_repetition",
    "entropy_collapse",
    "overlap_stalled",
    "kl_spike",
    "gradient_norm",
    "empty_completions",
    "teacher_disagreement",
    "reward_falls_with_kl",
    "not_a_number",
)


@dataclass
class Alarm:
    """
    One thing in the log that precedes a collapse.

    Args:
        alarm (`str`): Which of `trl_opd.alarms.ALARMS`.
        step (`int`): Optimizer step of the log line.
        severity (`str`): `"warning"`, or `"error"` where the run is lost as it is.
        seen (`str`), why (`str`), do (`str`): What was seen, what it leads to, what to try.
        values (`dict[str, float]`): The numbers in `seen`, by metric.
    """

    alarm: str
    step: int
    severity: str
    seen: str
    why: str = ""
    do: str = ""
    values: dict[str, float | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.alarm} at step {self.step}: {self.seen.rstrip('.')}. {self.why} {self.do}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: it is `None`."""
        values = {name: value if is_finite(value) else None for name, value in self.values.items()}
        return asdict(self) | {"values": values}
