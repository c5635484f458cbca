# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The figures of `trl-opd bench head` beside each other, and beside what the project set out to reach."""

from collections.abc import Iterable, Mapping
from typing import Any

from .measure import show_table

Row = Mapping[str, Any]
_SHAPE = (
    "student_hidden",
    "teacher_hidden",
    "vocab",
    "tokens",
    "divergence",
    "frozen_head",
    "teacher",
    "dtype",
)
# On a GPU, hidden 2048, vocabulary 152k, 16k tokens, bf16: how many times ours they take at least
_GPU = {"reverse_kl": {"trl": 1.8, "liger": 2.0}, "jsd": {"trl": 2.5, "liger": 2.5}}
_GPU_GEMMS = 1.20  # and ours the bare GEMMs at most
# On a CPU in fp32 never slower than full logits, and as many times as fast as TRL at hidden 256/512, vocabulary 32k.
# Wider heads are matrix products for the most part, of which TRL has 6 and 8 to our 4: the ratio tends to 1.5 and 2
_CPU = {"reverse_kl": {"trl": 2.5, "full_logits": 1.0}, "jsd": {"trl": 4.0, "full_logits": 1.0}}


def by_cell(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows of each problem by the implementation's name, `liger` being the faster of Liger's two."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in _SHAPE), {})[row["name"]] = row
    for named in cells.values():
        ran = [row for name, row in named.items() if name.startswith("liger") and "median_s" in row]
        if ran:
            named["liger"] = min(ran, key=lambda row: row["median_s"])
    return cells


def times_ours(named: Mapping[str, Row], name: str) -> float | None:
    """How many times ours an implementation takes; `None` if one of the two has no figure."""
    other, ours = named.get(name, {}).get("median_s"), named.get("ours", {}).get("median_s")
    return other / ours if other and ours else None


def ratios(rows: Iterable[Row]) -> str:
    """One line for each problem: our time, and the others' as multiples of it."""
    others = ("trl", "liger", "full_logits")
    lines = []
    for shape, named in by_cell(rows).items():
        of = dict(zip(_SHAPE, shape, strict=True))
        name = f"{of['divergence']} {_width(of)} V {of['vocab']} N {of['tokens']}"
        name += f" {'frozen' if of['frozen_head'] else 'trained'} {of['teacher']}"
        if "median_s" not in named.get("ours", {}):
            lines.append([name, f"ours: {named.get('ours', {}).get('problem', 'left out')}"])
            continue
        floor = times_ours(named, "gemms")
        line = [name, f"{1000 * named['ours']['median_s']:.1f}", "" if floor is None else f"{1 / floor:.2f}"]
        for other in others:
            ratio = times_ours(named, other)
            line.append("–" if ratio is None else f"{ratio:.2f}")
        lines.append(line)
    return show_table(("", "ours ms", "ours / gemms", "trl / ours", "liger / ours", "full logits / ours"), lines)


def check_targets(rows: Iterable[Row], device_type: str) -> list[dict[str, Any]]:
    """What was promised for the problems that were run: the value, the bound, whether it holds, and that in a line."""
    found: list[dict[str, Any]] = []

    def check(what: str, value: float | None, bound: float, at_most: bool) -> None:
        if value is None:
            found.append({"what": what, "met": None, "text": f"target not measured: {what}"})
            return
        met = value <= bound if at_most else value >= bound
        rule = f"{'at most' if at_most else 'at least'} {bound:g}"
        text = f"target {'met' if met else 'MISSED'}: {what} {value:.2f} ({rule})"
        found.append({"what": what, "value": value, "bound": bound, "met": met, "text": text})

    for shape, named in by_cell(rows).items():
        of = dict(zip(_SHAPE, shape, strict=True))
        if of["frozen_head"] or of["teacher"] != "full" or of["divergence"] not in _GPU:
            continue
        at = f"{of['divergence']}, {_width(of)}, V {of['vocab']}, N {of['tokens']}:"
        if device_type == "cuda" and _is_target(of):
            floor = times_ours(named, "gemms")
            check(f"{at} ours / gemms", None if floor is None else 1 / floor, _GPU_GEMMS, at_most=True)
            bounds = _GPU[of["divergence"]]
            for name in bounds:
                check(f"{at} ours / {name} (peak memory)", _memory_ratio(named, name), 1.0, at_most=True)
        elif device_type == "cpu" and of["dtype"] == "float32":
            bounds = dict(_CPU[of["divergence"]])
            if (of["student_hidden"], of["teacher_hidden"], of["vocab"]) != (256, 512, 32000):
                del bounds["trl"]
        else:
            continue
        for name, bound in bounds.items():
            check(f"{at} {name} / ours", times_ours(named, name), bound, at_most=False)
    return found


def _width(of: Mapping[str, Any]) -> str:
    equal = of["teacher_hidden"] == of["student_hidden"] or of["teacher"] != "full"
    return f"H {of['student_hidden']}" + ("" if equal else f"/{of['teacher_hidden']}")


def _is_target(of: Mapping[str, Any]) -> bool:
    wide = of["student_hidden"] == of["teacher_hidden"] == 2048
    return wide and 150_000 < of["vocab"] < 155_000 and of["tokens"] == 16384 and of["dtype"] == "bfloat16"


def _memory_ratio(named: Mapping[str, Row], name: str) -> float | None:
    """Our peak over the leanest of that name."""
    peaks = [row["peak_mib"] for other, row in named.items() if other.startswith(name) and "peak_mib" in row]
    ours = named.get("ours", {}).get("peak_mib")
    return ours / min(peaks) if peaks and ours is not None and min(peaks) > 0 else None
