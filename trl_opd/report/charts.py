# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The pictures of a run: those of the catalogue that it has numbers for, and one for each other number."""

import re
from collections.abc import Iterable

from .catalogue import GROUPS, Chart

# `distill/gap_at/00008-00015`; of one of several teachers `distill/NAME/gap_at/00008-00015`
BY_POSITION = re.compile(r"distill/(?:(?P<teacher>.+)/)?(?P<number>gap|reverse_kl)_at/(?P<first>\d+)-(?P<last>\d+)")
# Sums of a whole run that transformers logs once, at its end, and the fraction of the dataset: no curves.
NOT_CURVES = frozenset({"epoch", "total_flos"})
FURTHER = "Further"
TEACHERS = "By teacher"


def charts_of(metrics: Iterable[str]) -> list[Chart]:
    """
    The pictures for these numbers, each with the numbers that are there; what no picture knows gets one of its own.

    Args:
        metrics (`Iterable[str]`): Names as they were logged. `eval_NAME` is drawn with `NAME`.

    Returns:
        `list[Chart]`: In the order in which they are shown.
    """
    names = list(dict.fromkeys(metrics))
    left = dict.fromkeys(plain_name(name) for name in names if not _is_elsewhere(plain_name(name)))
    charts = []
    for group, known in GROUPS.items():
        for chart in known:
            found = tuple(name for pattern in chart.metrics for name in list(left) if _matches(pattern, name))
            if found:
                charts.append(Chart(chart.title, found, chart.unit, chart.healthy, group))
            for name in found:
                left.pop(name, None)
    return [*charts, *_of_teachers(left), *(_further(name) for name in left)]


def plain_name(name: str) -> str:
    """The training number that an evaluation's number belongs to."""
    return name.removeprefix("eval_")


def _is_elsewhere(name: str) -> bool:
    return name in NOT_CURVES or BY_POSITION.fullmatch(name) is not None


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


def _of_teachers(left: dict[str, None]) -> list[Chart]:
    """Numbers of each of several teachers, `distill/TEACHER/NUMBER`, one picture a number; they leave `left`."""
    titles = {name.removeprefix("distill/"): chart for chart in _known() for name in chart.metrics}
    by_number: dict[str, list[str]] = {}
    for name in left:
        prefix, _, rest = name.partition("/")
        teacher, _, number = rest.rpartition("/")
        if prefix == "distill" and teacher and (number in titles or number == "share"):
            by_number.setdefault(number, []).append(name)
    charts = []
    for number, names in by_number.items():
        known = titles.get(number)
        title = number.replace("_", " ").capitalize()
        unit = known.unit if known else "share of tokens"
        healthy = (
            known.healthy if known else "The share of the distilled tokens that each teacher has: as in the data."
        )
        charts.append(Chart(f"{title} by teacher", tuple(names), unit, healthy, TEACHERS))
        for name in names:
            del left[name]
    return charts


def _known() -> list[Chart]:
    return [chart for charts in GROUPS.values() for chart in charts]


def _further(name: str) -> Chart:
    return Chart(name, (name,), "", "A number of this run that the report has no words for.", FURTHER)
