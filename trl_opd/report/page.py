# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
One or several runs as one HTML file that needs nothing else: no network, no other file.

Every text of a run is escaped, by the template where it is HTML and as \\u003c where it is JSON. As a second lock the
page has a policy that lets no script run but its own (by their hashes) and asks the network for nothing.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import __version__
from ..findings import SEVERITIES
from .catalogue import Chart
from .charts import FURTHER, charts_of
from .figures import Curve, curve, heat_maps, marks, metrics_of
from .load import Run, load_runs
from .numbers import as_text, config_differences, count, final_numbers, key_numbers, logged_once, raised, short
from .tokens import load_completions, packed

Folder = str | os.PathLike[str]
_ICONS = {"error": "✖", "warning": "▲", "info": "i", "ok": "✓"}


@dataclass
class Drawn:
    """A chart or a heat map with the identifier that the page's script finds its figure by."""

    id: str
    chart: Chart
    curve: Curve


def write_report(runs: Folder | Iterable[Folder], path: Folder) -> Path:
    """
    Write one or several runs as one HTML file.

    Args:
        runs (`str`, `PathLike` or an iterable of these): Output folders of runs: running, finished or crashed.
        path (`str` or `PathLike`): The file. Its folder is made if it does not exist.

    Returns:
        `Path`: The file.

    Raises:
        `ValueError`: If a folder holds no run.
    """
    folders = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    file = Path(path)
    text = render(load_runs(folders))
    file.parent.mkdir(parents=True, exist_ok=True)
    # A reader who reloads a page that is being rewritten sees the old one or the new one
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    unfinished.replace(file)
    return file


def render(runs: Sequence[Run]) -> str:
    """
    The page of one or several runs.

    Args:
        runs (`Sequence[Run]`): At least one.

    Returns:
        `str`: HTML.
    """
    from jinja2 import Environment, FunctionLoader

    charts, once = _draw(runs)
    maps = [(item.run, f"map-{i}", item) for i, item in enumerate(heat_maps(runs))]
    completions = [load_completions(run) for run in runs]
    data = {
        "runs": [run.name for run in runs],
        "figures": {
            **{drawn.id: _figure(drawn.curve.figure) for drawn in charts},
            **{name: _figure(item.figure) for _, name, item in maps},
        },
        "marks": marks(runs),
        "lines": max(len(run.lines) for run in runs),
        "tokens": [packed(found) for found, _ in completions],
    }
    data_json = embedded(data)
    scripts = [_plotly_js(), _asset("page.js")]
    environment = Environment(autoescape=True, loader=FunctionLoader(_asset), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": as_text, "short": short, "count_of": count}
    return environment.get_template("template.html.j2").render(
        runs=runs,
        several=len(runs) > 1,
        numbers=[key_numbers(run) for run in runs],
        groups=_grouped(charts),
        once=once,
        maps=maps,
        differences=config_differences(runs) if len(runs) > 1 else [],
        finals=final_numbers(runs) if len(runs) > 1 else [],
        token_notes=[notes for _, notes in completions],
        token_runs=[r for r, (found, _) in enumerate(completions) if found],
        icons=_ICONS,
        alarms=[raised(run) for run in runs],
        num_alarms=sum(len(run.alarms) for run in runs),
        findings=[sorted(run.findings, key=_severity) for run in runs],
        config=[_config(run) for run in runs],
        link=_link,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        css=_asset("page.css"),
        scripts=scripts,
        hashes=" ".join(f"'{_hash(script)}'" for script in scripts),
        data=data_json,
    )


def _draw(runs: Sequence[Run]) -> tuple[list[Drawn], list[Any]]:
    """The charts, and the rows of what was logged once and is no curve."""
    drawn: list[Drawn] = []
    once: list[str] = []
    for chart in charts_of(metrics_of(runs)):
        if chart.group == FURTHER and not any(_has_curve(run, chart.metrics[0]) for run in runs):
            once.append(chart.metrics[0])
        else:
            drawn.append(Drawn(f"chart-{len(drawn)}", chart, curve(chart, runs)))
    return drawn, logged_once(runs, once)


def _has_curve(run: Run, metric: str) -> bool:
    return any(len(run.series(name)[0]) > 1 for name in (metric, f"eval_{metric}"))


def _figure(figure: Any) -> dict[str, Any]:
    """A figure without plotly's own colours, which would be 7 kB of it."""
    content: dict[str, Any] = figure.to_plotly_json()
    content["layout"].pop("template", None)
    return content


def _grouped(charts: Sequence[Drawn]) -> dict[str, list[Drawn]]:
    groups: dict[str, list[Drawn]] = {}
    for drawn in charts:
        groups.setdefault(drawn.chart.group, []).append(drawn)
    return groups


def _severity(finding: dict[str, Any]) -> int:
    severity = finding.get("severity")
    return -SEVERITIES.index(severity) if severity in SEVERITIES else 0


def _config(run: Run) -> dict[str, dict[str, Any]]:
    config, changed = (run.info.get(name) for name in ("config", "changed"))
    return {
        "changed": changed if isinstance(changed, dict) else {},
        "config": config if isinstance(config, dict) else {},
    }


def _link(address: Any) -> str | None:
    """An address that may be followed: a run's file could say `javascript:`."""
    return address if isinstance(address, str) and address.startswith(("https://", "http://")) else None


def embedded(data: Any) -> str:
    """Data as JSON that may stand in a `<script>`: none of its texts can end the element or open another."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=_plain)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


@cache
def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    if "</script" in script.lower() or "<!--" in script:
        raise RuntimeError("plotly's JavaScript cannot stand in a page: it holds the end of a script element.")
    return script
