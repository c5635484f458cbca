# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The log lines of a run so far, and robust levels of a metric in them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

# Of a normal distribution: standard deviations in a median absolute deviation, and in the 90th percentile's distance
_MAD = 1.4826
_P90 = 1.2816
_MEDIAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean


@dataclass(frozen=True)
class Level:
    """Of a metric over some lines."""

    median: float
    values: Sequence[float]

    @property
    def spread(self) -> float:
        """See `trl_opd.alarms.thresholds`."""
        return spread_of(self.values)[1]

    @property
    def spread_of_shares(self) -> float:
        """See `trl_opd.alarms.thresholds`."""
        return max(self.spread, (_percentile_90(self.values) - self.median) / _P90)


@dataclass(frozen=True)
class Drift:
    """From the median of the first lines to that of the last ones, and the standard error of the difference."""

    first: float
    last: float
    error: float


@dataclass
class _Series:
    """What is kept of a metric."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    peak: float = -math.inf
    num_broken: int = 0


class History:
    """
    The last lines of each metric, and its first ones.

    Args:
        capacity (`int`): Lines to keep.
        num_first (`int`): Lines at the beginning of the run that are kept for good.
        fp16 (`bool`, *optional*, defaults to `False`): Whether the run scales its loss.
    """

    def __init__(self, capacity: int, num_first: int, fp16: bool = False):
        self.step, self.fp16 = 0, fp16
        self.logs: Mapping[str, Any] = {}
        self._capacity, self._num_first = capacity, num_first
        self._series: dict[str, _Series] = {}

    def add(self, step: int, logs: Mapping[str, Any]) -> None:
        """A line. What is no finite number is left out of the series."""
        self.step, self.logs = step, logs
        for name, value in logs.items():
            series = self._series.setdefault(name, _Series())
            if not is_finite(value):
                series.num_broken += 1
                continue
            series.num_broken, series.peak = 0, max(series.peak, value)
            series.steps.append(step)
            series.values.append(float(value))
            if len(series.first) < self._num_first:
                series.first.append(float(value))
            if len(series.values) > 2 * self._capacity:
                del series.steps[: -self._capacity], series.values[: -self._capacity]

    def up_to(self, name: str, num: float) -> list[float]:
        """At most so many last values, oldest first; none if there is none in this line."""
        series = self._current(name)
        return [] if series is None else series.values[-min(int(num), self._capacity) :]

    def last(self, name: str, num: float) -> list[float]:
        """The last values, oldest first; none if there are fewer, or none in this line."""
        values = self.up_to(name, num)
        return values if len(values) == int(num) else []

    def pairs(self, name: str, other: str, num: float) -> list[tuple[float, float]]:
        """Up to `num` last values of two metrics from the lines that have both; none if this line has not."""
        one, two = self._current(name), self._current(other)
        if one is None or two is None:
            return []
        last = -min(int(num), self._capacity)
        others = dict(zip(two.steps[last:], two.values[last:], strict=True))
        pairs = zip(one.steps[last:], one.values[last:], strict=True)
        return [(value, others[step]) for step, value in pairs if step in others]

    def recent(self, name: str, num: float) -> float | None:
        """Median of the last values."""
        values = self.last(name, num)
        return statistics.median(values) if values else None

    def start(self, name: str) -> float | None:
        """Median of the run's first values."""
        series = self._series.get(name)
        return None if series is None or len(series.first) < self._num_first else statistics.median(series.first)

    def running(self, name: str, skip: float, t: Mapping[str, float]) -> Level | None:
        """Level of the lines before the last `skip`, and before the gap; none before the warm-up."""
        series, num = self._current(name), t["all.warm_up"]
        if series is None or len(series.values) - skip < num:
            return None
        end = -int(skip + min(t["all.gap"], len(series.values) - skip - num))
        values = series.values[:end][-int(t["all.window"]) :]
        return Level(statistics.median(values), values)

    def onset(self, name: str, value: float) -> int:
        """Step of the last line in which a metric was below this."""
        series = self._series[name]
        lines = zip(reversed(series.steps), reversed(series.values), strict=True)
        return next((step for step, other in lines if other < value), series.steps[0])

    def drift(self, name: str, num: float) -> Drift | None:
        """From the first third of the last `num` lines to their last third."""
        values = self.last(name, num)
        third = len(values) // 3
        if not third:
            return None
        drift = drift_of(values[:third], values[-third:])
        correlation = _correlation([values[:third], values[third:-third], values[-third:]])
        return replace(drift, error=drift.error * math.sqrt((1 + correlation) / (1 - correlation)))

    def peak(self, name: str) -> float:
        """Largest value of the run so far."""
        return self._series[name].peak

    def num_broken(self, name: str) -> int:
        """Lines up to this one in a row in which it was not finite."""
        return self._series[name].num_broken

    def _current(self, name: str) -> "_Series | None":
        """If this line has the metric."""
        series = self._series.get(name)
        return series if series is not None and series.steps and series.steps[-1] == self.step else None


def spread_of(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the median absolute deviation in standard deviations of a normal distribution."""
    median = statistics.median(values)
    return median, _MAD * statistics.median([abs(value - median) for value in values])


def _percentile_90(values: Sequence[float]) -> float:
    ordered, place = sorted(values), 0.9 * (len(values) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def drift_of(first: Sequence[float], last: Sequence[float]) -> Drift:
    """From the median of some values to that of others."""
    (a, spread_a), (b, spread_b) = spread_of(first), spread_of(last)
    error = _MEDIAN_ERROR * math.sqrt(spread_a**2 / len(first) + spread_b**2 / len(last))
    return Drift(a, b, error)


def noise_of(values: Sequence[float]) -> float:
    """Standard deviation of the values about a level that moves slowly, from neighbours' differences."""
    return math.sqrt(statistics.fmean((b - a) ** 2 for a, b in pairwise(values)) / 2)


def _correlation(parts: Sequence[Sequence[float]]) -> float:
    """Of neighbouring lines, about the medians of the parts: noise that lasts averages out less. In [0, 0.8]."""
    parts = [[value - statistics.median(part) for value in part] for part in parts]
    square = sum(x * x for part in parts for x in part)
    product = sum(x * y for part in parts for x, y in pairwise(part))
    return min(max(product / square, 0.0), 0.8) if square else 0.0


def is_finite(value: Any) -> bool:
    """Whether this is a number, and a finite one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
