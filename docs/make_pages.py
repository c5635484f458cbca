# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Writes the pages of the documentation that are made of the code.

    python docs/make_pages.py api > docs/api.md          # from the docstrings
    python docs/make_pages.py alarms > docs/alarms.md    # from the alarms' thresholds and advice
"""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Heading, module, names (`None`: its public functions and classes)
PAGES: list[tuple[str, str, list[str] | None]] = [
    ("Trainer", "trl_opd.trainer", ["OnPolicyDistillTrainer"]),
    ("Configuration", "trl_opd.config", ["OnPolicyDistillConfig"]),
    (
        "Teachers",
        "trl_opd.teachers",
        [
            "Teacher",
            "LocalTeacher",
            "AdapterTeacher",
            "SelfTeacher",
            "RemoteTeacher",
            "RoutedTeacher",
            "MixtureTeacher",
            "CachedTeacher",
            "RecordingTeacher",
        ],
    ),
    ("What a teacher is asked, and answers", "trl_opd.collators", ["TeacherBatch", "TeacherScores"]),
    ("The head", "trl_opd.kernels", ["fused_linear_divergence"]),
    ("Divergences", "trl_opd.losses", None),
    ("Targets", "trl_opd.targets", None),
    ("Weights of tokens", "trl_opd.token_weights", ["TokenStats"]),
    ("Weights of completions", "trl_opd.sample_weights", None),
    ("Rewards", "trl_opd.rewards", None),
    ("Recipes", "trl_opd.recipes", ["list_recipes", "get_recipe", "Recipe"]),
    ("Findings", "trl_opd.findings", ["Finding"]),
    ("Alarms", "trl_opd.alarms", ["Alarm", "AlarmCallback"]),
    ("Report", "trl_opd.report", ["write_report"]),
]
_SECTIONS = ("Args", "Parameters", "Returns", "Raises", "Paper", "Example", "Yields")
ENTRY = re.compile(r"^\w+(, \w+)*(?= \(|:)")  # the names of an entry


def api() -> str:
    """docs/api.md."""
    parts = [
        "# API",
        "Written by `python docs/make_pages.py api` from the docstrings. B are sequences, T completion tokens, N "
        "tokens, V the vocabulary, H hidden, K the support.",
    ]
    for heading, module_name, names in PAGES:
        module = importlib.import_module(module_name)
        parts += [f"## {heading}", f"`{module_name}`"]
        for name in names or _public(module):
            parts.append(_entry(name, getattr(module, name)))
    return "\n\n".join(parts) + "\n"


def _public(module: Any) -> list[str]:
    """Functions and classes that a module defines itself, in its own order."""
    members = [
        (inspect.getsourcelines(value)[1], name)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    return [name for _, name in sorted(members)]


def _entry(name: str, value: Any) -> str:
    signature = "" if name == "OnPolicyDistillConfig" else _signature(value)
    text = inspect.getdoc(value) or ""
    lines = [f"### `{name}`", *([f"```python\n{name}{signature}\n```"] if signature else []), markdown(text)]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if method.startswith("_") or not inspect.isfunction(function) or not inspect.getdoc(function):
                continue
            if name == "OnPolicyDistillTrainer":
                continue  # GRPOTrainer's, overridden
            lines.append(f"**`{method}{_signature(function)}`** {markdown(inspect.getdoc(function) or '')}")
    return "\n\n".join(line for line in lines if line)


def _signature(value: Any) -> str:
    try:
        parameters = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
    except (TypeError, ValueError):
        return "()"
    plain = []
    for p in parameters:
        default = "" if p.default is p.empty else f"={p.default!r}"
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.kind is p.KEYWORD_ONLY and "*" not in plain and not any(x.startswith("*") for x in plain):
            plain.append("*")
        plain.append(f"{star}{p.name}{default if len(default) < 40 else '=...'}")
    if sum(map(len, plain)) > 80:
        return "(\n    " + ",\n    ".join(plain) + ",\n)"
    return f"({', '.join(plain)})"


def _names(match: "re.Match[str]") -> str:
    return ", ".join(f"`{name}`" for name in match[0].split(", "))


def markdown(text: str) -> str:
    """A docstring in TRL's format as Markdown: sections become bold, their entries a list."""
    out: list[str] = []
    section, code = None, False
    for line in text.split("\n"):
        line = re.sub(r"\[`~?([\w.]+)`\]", lambda m: f"`{m[1].rpartition('.')[2] or m[1]}`", line)
        stripped = line.strip()
        if stripped.startswith("```"):
            code = not code
            out.append(stripped)
        elif code:
            out.append(line)
        elif stripped.rstrip(":") in _SECTIONS and stripped.endswith(":") and not line.startswith(" "):
            section = stripped
            out += ["", f"**{stripped.rstrip(':')}**", ""]
        elif section and stripped.startswith("> "):
            out += ["", f"*{stripped[2:]}*", ""]
        elif section and line.startswith("    ") and not line.startswith("        ") and stripped:
            if out and out[-1].startswith("- ") and out[-1].endswith(","):  # names that take two lines
                out[-1] += f" {stripped}"
            else:
                out.append(f"- {re.sub(ENTRY, _names, stripped)}")
        elif section and line.startswith("        ") and stripped:
            out.append(f"  {stripped}")
        else:
            section = section if not stripped or line.startswith(" ") else None
            out.append(stripped if section is None else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def alarms() -> str:
    """docs/alarms.md."""
    from trl_opd.alarms import ALARMS, THRESHOLDS
    from trl_opd.alarms.advice import ADVICE

    parts = [
        "# Alarms",
        "Written by `python docs/make_pages.py alarms`. A callback reads each training line of the log for what "
        "precedes a collapse. `on_alarm` says what follows: `warn` (default) logs the alarm, `stop` also ends the run "
        "after that step with a checkpoint, `off`, or the import path of a function of the `Alarm`, which may return "
        '`"stop"`. `callbacks=[AlarmCallback(on_alarm=my_function)]` takes a function as it is. Alarms are kept in '
        "`output_dir/_opd/alarms.jsonl` and shown in the report.",
        "A *line* is a logged training line (`logging_steps` optimizer steps). *Recent* is the median of the last few "
        "lines; the *running* level is the median of the window before them, its *spread* the larger of its scaled "
        "median absolute deviation and of the distance from its median to its 90th percentile in standard deviations "
        "of a normal distribution. A number changes by its name: `alarm_thresholds: {kl_spike.factor: 5, "
        "overlap_stalled.on: 0}`.",
    ]
    for name in ("all", *ALARMS):
        advice = [(kind, text) for kind, text in ADVICE.items() if kind.partition(":")[0] == name]
        rows = [t for t in THRESHOLDS if t.name.partition(".")[0] == name and not t.name.endswith(".on")]
        parts.append("## Shared by several" if name == "all" else f"## `{name}`")
        for kind, text in advice:
            label = f"*{kind.partition(': ')[2]}*: " if ":" in kind else ""
            parts.append(f"{label}{text.why} **Try:** {text.do}")
        if rows:
            table = ["| threshold | default | unit | it speaks when | from |", "|---|---:|---|---|---|"]
            table += [f"| `{t.name}` | {t.default:g} | {t.unit} | {t.meaning} | {t.source} |" for t in rows]
            parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.stdout.write({"api": api, "alarms": alarms}[sys.argv[1]]())
