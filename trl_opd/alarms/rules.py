# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The rules: functions of the lines so far and the thresholds, `None` while nothing is wrong.

A rule whose metrics are not in the line is silent.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .history import History, is_finite, noise_of

Thresholds = Mapping[str, float]

CLIPPED = "completions/clipped_ratio"
REPETITION = "completions/repetition"
REPETITIVE = "completions/repetitive_share"
EMPTY = "completions/empty_share"
KL = "distill/reverse_kl"
STUDENT_ENTROPY = "distill/student_entropy"
TEACHER_ENTROPY = "distill/teacher_entropy"
OVERLAP = "distill/overlap"
REJECTED = "distill/rejected_share"
GRADIENT = "grad_norm"
REWARD = "reward"
# Undefined where all rewards, or all gaps, are equal
_MAY_BE_UNDEFINED = ("distill/reward_correlation",)


@dataclass
class Sign:
    """
    What a rule has seen.

    Args:
        seen (`str`): In words, with the numbers.
        values (`dict[str, float]`): The numbers, by metric.
        severity (`str`, *optional*, defaults to `"warning"`): Or `"error"`.
        kind (`str`, *optional*): Which of a rule's cases, where their remedies differ: see `trl_opd.alarms.advice`.
    """

    seen: str
    values: dict[str, float | None]
    severity: str = "warning"
    kind: str = ""


@dataclass(frozen=True)
class _Jump:
    """A recent value far above its running level, or not."""

    name: str
    before: float
    now: float
    step: int
    jumped: bool

    def __str__(self) -> str:
        return f"{self.name.rpartition('/')[2]} {self.before:.3g} -> {self.now:.3g}"


def _jump(history: History, name: str, t: Thresholds, limit: Callable[[float], float]) -> _Jump | None:
    """Compare the recent value with `limit` of the running level, and with its spread."""
    now = history.recent(name, t["all.recent"])
    level = history.running(name, t["all.recent"], t)
    if now is None or level is None:
        return None
    jumped = now >= limit(level.median) and now >= level.median + t["all.spreads"] * level.spread_of_shares
    onset = history.onset(name, (level.median + now) / 2) if jumped else history.step
    return _Jump(name, level.median, now, onset, jumped)


def truncation_and_repetition(history: History, t: Thresholds) -> Sign | None:
    """Truncated and repetitive completions jump together, or are too many together."""

    def number(name: str) -> float:
        return t[f"truncation_and_repetition.{name}"]

    clipped = _jump(history, CLIPPED, t, lambda before: before + number("clipped_rise"))
    repetition = _jump(
        history, REPETITION, t, lambda before: max(before * number("repetition_factor"), number("repetition"))
    )
    repetitive = _jump(history, REPETITIVE, t, lambda before: before + number("repetitive_rise"))
    jumps = [jump for jump in (repetition, repetitive) if jump is not None and jump.jumped]
    if clipped is not None and clipped.jumped and jumps:
        shown = [clipped, *jumps]
        seen = f"{' and '.join(map(str, shown))} since step {clipped.step}"
        return Sign(seen, {jump.name: jump.now for jump in shown})
    truncated, repeated = (history.recent(name, t["all.recent"]) for name in (CLIPPED, REPETITIVE))
    if truncated is None or repeated is None:
        return None
    if truncated >= number("clipped") and repeated >= number("repetitive"):
        seen = f"{truncated:.0%} of the completions are truncated and {repeated:.0%} repeat themselves"
        return Sign(seen, {CLIPPED: truncated, REPETITIVE: repeated})
    return None


def entropy_collapse(history: History, t: Thresholds) -> Sign | None:
    """The student is far surer than it was, and far surer than the teacher."""
    start = history.start(STUDENT_ENTROPY)
    student, teacher = (history.recent(name, t["all.recent"]) for name in (STUDENT_ENTROPY, TEACHER_ENTROPY))
    if start is None or student is None or teacher is None:
        return None
    if student > t["entropy_collapse.share_of_start"] * start:
        return None
    if student >= t["entropy_collapse.share_of_teacher"] * teacher:
        return None
    seen = f"the student's entropy {start:.3g} -> {student:.3g} nats since the start; the teacher's is {teacher:.3g}"
    return Sign(seen, {STUDENT_ENTROPY: student, TEACHER_ENTROPY: teacher})


def overlap_stalled(history: History, t: Thresholds) -> Sign | None:
    """The top sets do not approach each other, nor the distributions, although they are far apart."""
    num, now = t["overlap_stalled.lines"], history.recent(OVERLAP, t["all.recent"])
    if now is None or now >= t["overlap_stalled.overlap"]:
        return None
    overlap, kl = history.drift(OVERLAP, num), history.drift(KL, num)
    if overlap is None or kl is None or not _has_settled_rate(history, num):
        return None
    errors = t["overlap_stalled.errors"]
    rises = overlap.last - overlap.first + errors * overlap.error >= t["overlap_stalled.rise"]
    falls = kl.first - kl.last + errors * kl.error >= t["overlap_stalled.kl_fall"] * kl.first
    if rises or falls or overlap.last >= t["overlap_stalled.overlap"]:
        return None
    seen = (
        f"overlap {overlap.first:.3f} -> {overlap.last:.3f} and reverse_kl {kl.first:.3g} -> {kl.last:.3g} in "
        f"{num:.0f} log lines"
    )
    return Sign(seen, {OVERLAP: overlap.last, KL: kl.last})


def _has_settled_rate(history: History, num: float) -> bool:
    """Whether the learning rate neither warms up nor has nearly decayed: then nothing moves, and nothing should."""
    rates = history.last("learning_rate", num)
    return not rates or (
        rates[-1] <= 1.2 * rates[0] and rates[-1] >= 0.1 * max(rates[0], history.peak("learning_rate"))
    )


def kl_spike(history: History, t: Thresholds) -> Sign | None:
    """The KL is far above its running level."""
    return _spike(history, KL, t, "kl_spike", "reverse_kl")


def gradient_norm(history: History, t: Thresholds) -> Sign | None:
    """The gradient norm is not finite, or far above its running level."""
    norm = history.logs.get(GRADIENT)
    if isinstance(norm, float) and not is_finite(norm):
        if history.num_broken(GRADIENT) < (t["gradient_norm.fp16_lines"] if history.fp16 else 1):
            return None
        return Sign(f"the gradient norm is {norm}", {GRADIENT: norm}, "error", "not finite")
    return _spike(history, GRADIENT, t, "gradient_norm", "the gradient norm")


def _spike(history: History, name: str, t: Thresholds, alarm: str, called: str) -> Sign | None:
    lines = t[f"{alarm}.lines"]
    values = history.last(name, lines)
    level = history.running(name, lines, t)
    if not values or level is None:
        return None
    if min(values) < max(t[f"{alarm}.factor"] * level.median, t[f"{alarm}.floor"]):
        return None
    if min(values) < level.median + t["all.spreads"] * level.spread:
        return None
    onset = history.onset(name, (level.median + min(values)) / 2)
    seen = f"{called} {level.median:.3g} -> {values[-1]:.3g} since step {onset}"
    return Sign(seen, {name: values[-1]})


def empty_completions(history: History, t: Thresholds) -> Sign | None:
    """Completions without a token beside the end token."""
    values = history.up_to(EMPTY, t["empty_completions.lines"])
    # Of a run's first lines, as if those before them had none
    if len(values) < t["all.recent"] or sum(values) == 0:
        return None
    if sum(values) < t["empty_completions.share"] * t["empty_completions.lines"]:
        return None
    share = statistics.fmean(values)
    return Sign(f"{share:.0%} of the completions of the last {len(values)} log lines are empty", {EMPTY: share})


def teacher_disagreement(history: History, t: Thresholds) -> Sign | None:
    """The teacher rejects more and more of what the student writes, or one of several teachers is left behind."""
    now = history.recent(REJECTED, t["all.recent"])
    level = history.running(REJECTED, t["all.recent"], t)
    start = history.start(REJECTED)
    if now is not None and level is not None and start is not None:
        before = min(level.median, start)
        rises = now - before >= t["teacher_disagreement.rejected_rise"]
        if now >= t["teacher_disagreement.rejected"] and rises and now - before >= t["all.spreads"] * level.spread:
            seen = f"the teacher rejects {now:.0%} of the student's tokens, {before:.0%} before"
            return Sign(seen, {REJECTED: now})
    return _left_behind(history, t)


def _left_behind(history: History, t: Thresholds) -> Sign | None:
    """Of several teachers, the KL to the farthest is far above that to the nearest, and has not fallen."""
    names = sorted(name[len("distill/") : -len("/share")] for name in history.logs if _is_share(name))
    kls, starts, lines = {}, {}, int(t["teacher_disagreement.lines"])
    for name in names:
        key = f"distill/{name}/reverse_kl"
        last, start = history.last(key, t["all.warm_up"] + lines), history.start(key)
        if last and start is not None:
            kls[name], starts[name] = statistics.median(last[-lines:]), start
    if len(kls) < 2:
        return None
    near, far = min(kls, key=lambda name: kls[name]), max(kls, key=lambda name: kls[name])
    if kls[far] < t["teacher_disagreement.factor"] * kls[near] or kls[far] < t["teacher_disagreement.floor"]:
        return None
    if kls[far] <= (1 - t["teacher_disagreement.fall"]) * starts[far]:
        return None
    seen = (
        f"reverse_kl to teacher {far!r} {starts[far]:.3g} -> {kls[far]:.3g} since the start, while that to {near!r} "
        f"is {kls[near]:.3g}"
    )
    values: dict[str, float | None] = {f"distill/{name}/reverse_kl": kls[name] for name in (near, far)}
    return Sign(seen, values, kind="several")


def _is_share(name: str) -> bool:
    """Whether a metric is `distill/NAME/share`, which every one of several teachers has."""
    return name.startswith("distill/") and name.endswith("/share") and name.count("/") >= 2


def reward_falls_with_kl(history: History, t: Thresholds) -> Sign | None:
    """The reward is below that of the best lines, while the KL is below what it was then: the student copies."""
    num = int(t["reward_falls_with_kl.lines"])
    pairs = history.pairs(REWARD, KL, t["reward_falls_with_kl.window"])
    if len(pairs) < 2 * num:
        return None
    rewards, kls = zip(*pairs, strict=True)
    sums = list(accumulate(rewards, initial=0.0))
    blocks = [sums[i + num] - sums[i] for i in range(len(rewards) - num + 1)]
    best = max(range(len(blocks) - num), key=lambda i: blocks[i])
    reward, last = blocks[best] / num, blocks[-1] / num
    kl, last_kl = statistics.median(kls[best : best + num]), statistics.median(kls[-num:])
    if last_kl > (1 - t["reward_falls_with_kl.kl_fall"]) * kl:
        return None
    scale = max(abs(reward), history.recent("reward_std", 1) or 0.0)
    error = noise_of(rewards) * math.sqrt(2 / num)
    if reward - last <= max(t["reward_falls_with_kl.reward_fall"] * scale, t["reward_falls_with_kl.errors"] * error):
        return None
    seen = f"reward {reward:.3g} -> {last:.3g} while reverse_kl {kl:.3g} -> {last_kl:.3g}"
    return Sign(seen, {REWARD: last, KL: last_kl})


def not_a_number(history: History, t: Thresholds) -> Sign | None:
    """The loss or a metric of the distillation is NaN or infinite."""
    broken: dict[str, Any] = {}
    for name, value in history.logs.items():
        ours = name == "loss" or (name.startswith("distill/") and name not in _MAY_BE_UNDEFINED)
        # GRPOTrainer.log writes None for NaN
        if ours and (value is None or (isinstance(value, float) and not is_finite(value))):
            broken[name] = value
    if not broken:
        return None
    shown = [f"{name} is {'NaN' if value is None else value}" for name, value in broken.items()]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return Sign(", ".join(shown[:3]) + more, broken, "error")


RULES: Mapping[str, Callable[[History, Thresholds], Sign | None]] = {
    rule.__name__: rule
    for rule in (
        truncation_and_repetition,
        entropy_collapse,
        overlap_stalled,
        kl_spike,
        gradient_norm,
        empty_completions,
        teacher_disagreement,
        reward_falls_with_kl,
        not_a_number,
    )
}
