# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Which rules speak at which line: warm-up, hysteresis, and what is kept of the lines for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .advice import advice_for
from .alarm import Alarm
from .history import History
from .rules import RULES
from .thresholds import check_thresholds


@dataclass
class _Speaker:
    """Whether a rule's alarm has been raised and not cleared, and when it was raised last."""

    speaking: bool = False
    lines_clear: int = 0
    last_line: int | None = None


class Watch:
    """
    Reads the training lines of one run, in order.

    Args:
        thresholds (`dict[str, float]`, *optional*): Those that differ from the defaults, by name.
        fp16 (`bool`, *optional*, defaults to `False`): Whether the run scales its loss.

    Raises:
        ValueError: Of an unknown threshold.
    """

    def __init__(self, thresholds: Mapping[str, Any] | None = None, fp16: bool = False):
        self.thresholds = check_thresholds(thresholds)
        t = self.thresholds
        longest = t["all.window"] + t["all.gap"] + max(t["all.recent"], t["kl_spike.lines"], t["gradient_norm.lines"])
        others = (
            "empty_completions.lines",
            "overlap_stalled.lines",
            "reward_falls_with_kl.window",
            "reward_falls_with_kl.lines",
        )
        compared = t["all.warm_up"] + t["teacher_disagreement.lines"]
        capacity = int(max(longest, compared, *(2 * t[name] for name in others)))
        self.history = History(capacity, int(t["all.warm_up"]), fp16)
        self._speakers = {name: _Speaker() for name in RULES if t[f"{name}.on"]}
        self._line = 0

    def read(self, step: int, logs: Mapping[str, Any]) -> list[Alarm]:
        """
        The alarms that a line raises.

        Args:
            step (`int`): Optimizer steps so far.
            logs (`dict[str, float]`): The line, as transformers' callbacks get it.

        Returns:
            `list[Alarm]`
        """
        self._line += 1
        self.history.add(step, logs)
        alarms = []
        for name, speaker in self._speakers.items():
            sign = RULES[name](self.history, self.thresholds)
            if self._speaks(speaker, sign is not None) and sign is not None:
                advice = advice_for(name, sign.kind)
                alarms.append(Alarm(name, step, sign.severity, sign.seen, advice.why, advice.do, sign.values))
        return alarms

    def _speaks(self, speaker: _Speaker, signed: bool) -> bool:
        """Whether an alarm is raised: one has cleared, and the last is long enough ago."""
        if not signed:
            speaker.lines_clear += 1
            if speaker.lines_clear >= self.thresholds["all.clear"]:
                speaker.speaking = False
            return False
        speaker.lines_clear = 0
        last = speaker.last_line
        if speaker.speaking or (last is not None and self._line - last < self.thresholds["all.quiet"]):
            return False
        speaker.speaking, speaker.last_line = True, self._line
        return True
