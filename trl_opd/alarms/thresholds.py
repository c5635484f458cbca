# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Thresholds of the alarms: one table, in which `alarm_thresholds` changes numbers by name.

A *line* is a logged training line (`logging_steps` optimizer steps). *Recent* is the median of the last
`all.recent` lines; the *running* level is the median of `all.window` lines before them and before a gap. Its *spread*
is the median absolute deviation, in standard deviations of a normal distribution; of metrics of completions, where a
line may hold few, the distance from the median to the 90th percentile, if that is larger: rare events are in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..resolve import nearest_name
from .alarm import ALARMS

_OURS = "ours"
_SIGNS = "papers: truncation and repetition jump about 30 steps before a collapse"
_OVERLAP = "papers: the overlap of the top 16 rises from 0.72 to 0.91 in runs that succeed"


@dataclass(frozen=True)
class Threshold:
    """
    A number that a rule compares with.

    Args:
        name (`str`): `ALARM.name`, or `all.name` where several alarms share it.
        default (`float`): Its value unless `alarm_thresholds` names it.
        unit (`str`): What it counts. Of `"lines"`, a whole number of at least 1.
        meaning (`str`): When the rule speaks.
        source (`str`): Where the default comes from.
    """

    name: str
    default: float
    unit: str
    meaning: str
    source: str = _OURS


_Row = tuple[str, float, str, str] | tuple[str, float, str, str, str]
_ROWS: tuple[_Row, ...] = (
    ("all.warm_up", 10, "lines", "lines before a rule that compares with the run's own past may speak"),
    ("all.window", 50, "lines", "lines that a running level is the median of"),
    ("all.recent", 3, "lines", "lines whose median is compared with a running level"),
    (
        "all.gap",
        10,
        "lines",
        "lines between these and the recent ones, which a slow onset may fill; fewer where the run has fewer",
        _SIGNS,
    ),
    ("all.spreads", 4, "spreads", "a jump is at least so many spreads above the running level"),
    ("all.clear", 5, "lines", "lines without the sign after which an alarm has cleared, and may speak again"),
    ("all.quiet", 50, "lines", "an alarm speaks at most once in so many lines"),
    (
        "truncation_and_repetition.clipped_rise",
        0.15,
        "share of completions",
        "recent completions/clipped_ratio above its running level; repetition must jump with it",
        _SIGNS,
    ),
    (
        "truncation_and_repetition.repetition_factor",
        1.5,
        "times",
        "recent completions/repetition over its running level: a jump of repetition",
        _SIGNS,
    ),
    (
        "truncation_and_repetition.repetition",
        3.5,
        "zlib ratio",
        "recent completions/repetition of less is no jump: longer texts compress better, and plain prose to 2 or 3",
    ),
    (
        "truncation_and_repetition.repetitive_rise",
        0.1,
        "share of completions",
        "recent completions/repetitive_share above its running level: a jump of repetition too",
        "papers: a completion whose zlib ratio is above 10 repeats itself",
    ),
    (
        "truncation_and_repetition.clipped",
        0.5,
        "share of completions",
        "recent completions/clipped_ratio that is too high whatever it was before, if as many repeat as below",
        "tinker-cookbook 796: 17 of 30 completions truncated at 43% of the expected accuracy",
    ),
    (
        "truncation_and_repetition.repetitive",
        0.3,
        "share of completions",
        "recent completions/repetitive_share that is too high whatever it was before, if as many are truncated as "
        "above",
    ),
    (
        "entropy_collapse.share_of_start",
        0.3,
        "times",
        "recent distill/student_entropy at most this share of that of the run's first lines, and",
    ),
    (
        "entropy_collapse.share_of_teacher",
        0.5,
        "times",
        "at most this share of distill/teacher_entropy: the student is not following a sharp teacher",
        "papers: the gap of the entropies narrows in runs that succeed",
    ),
    ("overlap_stalled.lines", 50, "lines", "lines whose first and last third are compared"),
    ("overlap_stalled.errors", 1, "standard errors", "by which both must have missed the next two numbers"),
    ("overlap_stalled.overlap", 0.7, "share of the top sets", "distill/overlap below this is low", _OVERLAP),
    (
        "overlap_stalled.rise",
        0.01,
        "share of the top sets",
        "a rise of less between the thirds is none",
        _OVERLAP,
    ),
    (
        "overlap_stalled.kl_fall",
        0.05,
        "share of the KL",
        "a fall of distill/reverse_kl of less between the thirds is none",
    ),
    ("kl_spike.factor", 3, "times", "distill/reverse_kl over its running level, in all of the next lines"),
    ("kl_spike.lines", 2, "lines", "consecutive lines that are all so high"),
    ("kl_spike.floor", 0.1, "nats a token", "a KL below this is no spike, however small it was before"),
    (
        "gradient_norm.factor",
        5,
        "times",
        "grad_norm (before clipping) over its running level, in all of the next lines",
        "papers: the gradient norm stays in runs that succeed; the factor is ours",
    ),
    ("gradient_norm.lines", 2, "lines", "consecutive lines that are all so high"),
    ("gradient_norm.floor", 0.05, "norm", "a norm below this is no alarm, however small it was before"),
    (
        "gradient_norm.fp16_lines",
        3,
        "lines",
        "consecutive lines with a norm that is not finite under fp16, whose loss scaling skips such steps at first; "
        "one line without fp16",
    ),
    ("empty_completions.share", 0.1, "share of completions", "mean completions/empty_share of at least this"),
    ("empty_completions.lines", 10, "lines", "lines that it is the mean of: a small batch may hold one by chance"),
    (
        "teacher_disagreement.rejected",
        0.3,
        "share of tokens",
        "recent distill/rejected_share of at least this, and",
    ),
    (
        "teacher_disagreement.rejected_rise",
        0.15,
        "share of tokens",
        "so much above the lower of its running level and that of the run's first lines",
    ),
    (
        "teacher_disagreement.factor",
        5,
        "times",
        "of several teachers, the largest distill/NAME/reverse_kl over the smallest, medians of the last "
        "teacher_disagreement.lines, and",
    ),
    ("teacher_disagreement.floor", 0.3, "nats a token", "the largest is at least this, and"),
    (
        "teacher_disagreement.fall",
        0.2,
        "share of the KL",
        "the largest has fallen by less than this share since the run's first lines",
    ),
    ("teacher_disagreement.lines", 10, "lines", "lines of every teacher that are compared, after the warm-up"),
    ("reward_falls_with_kl.lines", 10, "lines", "lines of a block; the last block is compared with the best one"),
    ("reward_falls_with_kl.window", 200, "lines", "lines in which the best block is sought"),
    (
        "reward_falls_with_kl.reward_fall",
        0.3,
        "times",
        "fall of the reward since its best block, over the larger of that block's reward and its reward_std",
    ),
    ("reward_falls_with_kl.errors", 5, "standard errors", "by which the reward has fallen, of the two blocks"),
    ("reward_falls_with_kl.kl_fall", 0.1, "share of the KL", "fall of distill/reverse_kl since then"),
)
THRESHOLDS = tuple(Threshold(*row) for row in _ROWS) + tuple(
    Threshold(f"{name}.on", 1, "0 or 1", "0: this alarm never speaks") for name in ALARMS
)
DEFAULTS = {threshold.name: threshold.default for threshold in THRESHOLDS}


def check_thresholds(thresholds: Mapping[str, Any] | None) -> dict[str, float]:
    """
    All thresholds, with the given ones in the place of the defaults.

    Args:
        thresholds (`dict[str, float]`, *optional*): By name, e.g. `{"kl_spike.factor": 5}`.

    Returns:
        `dict[str, float]`: Every threshold of the table, by name.

    Raises:
        ValueError: Of a name that is not in the table, or a number out of range.
    """
    if thresholds is None:
        return dict(DEFAULTS)
    if not isinstance(thresholds, Mapping):
        raise ValueError(
            f"alarm_thresholds must be a dict of numbers by name, got {thresholds!r}. It says which thresholds differ "
            "from the defaults. Set for example {'kl_spike.factor': 5}."
        )
    units = {threshold.name: threshold.unit for threshold in THRESHOLDS}
    for name, value in thresholds.items():
        if name not in units:
            raise ValueError(
                f"alarm_thresholds must name thresholds of trl_opd.alarms, got {name!r}. No rule would read it."
                f"{nearest_name(name, list(units))}"
            )
        rule = _broken_rule(value, units[name])
        if rule is not None:
            alarm = name.partition(".")[0]
            silence = "" if alarm == "all" else f"; {alarm}.on=0 silences the alarm"
            raise ValueError(
                f"alarm_thresholds[{name!r}] must be {rule}, got {value!r}. The log is compared with it. The default "
                f"is {DEFAULTS[name]:g}{silence}."
            )
    return DEFAULTS | {name: float(value) for name, value in thresholds.items()}


def _broken_rule(value: Any, unit: str) -> str | None:
    """The rule that a value of this unit breaks, if any."""
    number = isinstance(value, (int, float)) and (not isinstance(value, bool) or unit == "0 or 1")
    number = number and math.isfinite(value)
    if unit == "0 or 1":
        return None if number and value in (0, 1) else unit
    if unit == "lines":
        return None if number and value >= 1 and value == int(value) else "a whole number of at least 1"
    return None if number and value >= 0 else "a finite number of at least 0"
