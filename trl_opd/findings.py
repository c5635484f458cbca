# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What a check has found: the form that the doctor, the checks of servers and the alarms share."""

from dataclasses import asdict, dataclass

SEVERITIES = ("ok", "info", "warning", "error")


@dataclass
class Finding:
    """
    One thing that was looked at.

    Args:
        check (`str`): What.
        severity (`str`): `"ok"`, `"info"` (worth knowing, nothing is wrong), `"warning"` or `"error"`.
        seen (`str`), why (`str`), do (`str`): What was found, what it breaks, what mends it.
    """

    check: str
    severity: str
    seen: str
    why: str = ""
    do: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (f"{self.check}: {self.seen.rstrip('.')}.", self.why, self.do) if part)

    @property
    def is_problem(self) -> bool:
        """Whether something is wrong."""
        return self.severity in ("warning", "error")

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)
