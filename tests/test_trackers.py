"""What trackers get beside numbers: real TensorBoard, W&B (offline) and trackio runs, read back from their files."""

import contextlib
import itertools
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_model, make_prompts, make_tokenizer, trainer_config
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

import trl_opd
from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.findings import Finding
from trl_opd.trackers import TrackerCallback, gap_by_position, heat_map

ALARM = {"alarm": "kl_spike", "severity": "error", "seen": "KL 9 | 3", "why": "it", "do": "that", "values": {}}


class RaiseAlarm(TrainerCallback):
    """Stands where the alarms do: before the recorder and the trackers."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == self.step and "loss" in logs:
            self.trainer.recorder.add_alarm({"step": self.step, **ALARM})


def train(path, report_to="none", callbacks=None, **fields):
    """Three steps with a finding and an alarm at the second one. `callbacks` come before ours, as transformers' do."""
    trainer = OnPolicyDistillTrainer(
        model=make_model(),
        teacher_model=make_model(hidden_size=24, seed=1),
        args=OnPolicyDistillConfig(**{**trainer_config(path), "report_to": report_to, **fields}),
        train_dataset=make_prompts(),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )
    trainer.findings = [Finding("eos", "warning", "two ends", "why", "do"), Finding("pad", "ok", "same")]
    ours = next(i for i, c in enumerate(trainer.callback_handler.callbacks) if isinstance(c, TrackerCallback))
    trainer.callback_handler.callbacks.insert(ours - 1, RaiseAlarm(trainer, 2))
    trainer.train()
    return trainer


# TensorBoard


def events(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(next(path.glob("**/events.*")).parent), size_guidance={"tensors": 0, "images": 0})
    log.Reload()
    return log


def texts(log, name):
    tag = f"{name}/text_summary"
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in log.Tensors(tag)]


@pytest.mark.parametrize("matplotlib", [pytest.param(True, marks=pytest.mark.slow), False])
def test_tensorboard(tmp_path, monkeypatch, matplotlib):
    pytest.importorskip("tensorboard")
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        pytest.importorskip("matplotlib")
    trainer = train(tmp_path, "tensorboard", max_completion_length=12)
    log = events(tmp_path / "runs")
    ((_, findings),) = texts(log, "opd/findings")
    assert "| eos | warning | two ends | why | do |" in findings and "pad" not in findings
    ((step, alarm),) = texts(log, "opd/alarms")
    assert step == 2 and "| 2 | kl_spike | error | KL 9 \\| 3 | it | that |" in alarm
    views = dict(texts(log, "opd/tokens"))
    assert sorted(views) == [1, 2, 3] and len(texts(log, "opd/tokens")) == 3
    assert all(line.startswith("    ") for line in views[3].split("\n")), "a block of code: signs are no Markdown"
    assert "[-" in views[1] and views[1].count("mean gap") == 4
    if matplotlib:
        assert [e.step for e in log.Images("opd/gap_by_position")] == [2, 3]
    else:
        step, table = texts(log, "opd/gap_by_position")[-1]
        line = trainer.state.log_history[2]
        last = max(name for name in line if name.startswith("distill/gap_at/"))
        assert step == 3 and table.endswith(f" {line[last]:+.3f} |") and len(table.split("\n")) == 4
        assert table.startswith("| tokens | 1 | 2 | 3 |")
    assert {"train/distill/reverse_kl"} <= set(log.Tags()["scalars"]), "numbers come by transformers"


# W&B and trackio


class Library:
    """Stands for `wandb` where only the calls matter."""

    AlertLevel = SimpleNamespace(WARN="WARN", ERROR="ERROR")
    run = None

    def __init__(self):
        self.logged, self.alerts = [], []
        self.config, self.summary = {}, {}

    def log(self, values):
        self.logged.append(values)

    def alert(self, title, text, level):
        self.alerts.append((title, text, level))

    def Table(self, columns, data):
        return ("table", columns, data)

    def Html(self, text, inject=True):
        return ("html", text)


def fake_wandb(library):
    """transformers' callback with a library of our own; its run opens when training begins."""
    callback = WandbCallback.__new__(WandbCallback)
    callback._wandb, callback._initialized = library, True
    callback.on_train_begin = lambda *args, **kwargs: setattr(library, "run", library)
    callback.on_train_end = lambda *args, **kwargs: None
    return callback


def ours(library):
    return [
        (line["train/global_step"], name, v) for line in library.logged for name, v in line.items() if "opd/" in name
    ]


def test_wandb_gets_tables_pages_and_alerts(tmp_path):
    library = Library()
    train(tmp_path, callbacks=[fake_wandb(library)])
    named = {}
    for step, name, value in ours(library):
        named.setdefault(name, []).append((step, value))
    columns = ["check", "severity", "seen", "why", "do"]
    assert named["opd/findings"] == [(0, ("table", columns, [["eos", "warning", "two ends", "why", "do"]]))]
    assert library.alerts == [("kl_spike", "KL 9 | 3\n\nit\n\nthat", "ERROR")]
    ((step, (_, columns, rows)),) = named["opd/alarms"]
    assert step == 2 and rows == [["2", "kl_spike", "error", "KL 9 | 3", "it", "that"]]
    assert [step for step, _ in named["opd/tokens"]] == [1, 2, 3]
    page = named["opd/tokens"][0][1][1]
    assert "mean gap" in page and "background-color: #ff" in page and "<script" not in page and "http" not in page
    assert [step for step, _ in named["opd/gap_by_position"]] == [2, 3]


@pytest.mark.slow
def test_a_long_run_hands_over_some_and_the_last(tmp_path):
    library = Library()
    trainer = train(tmp_path, callbacks=[fake_wandb(library)], max_steps=3, logging_steps=1)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TrackerCallback))
    library.logged.clear()
    callback._num_logs, state = 0, SimpleNamespace(**vars(trainer.state))
    state.max_steps, state.is_world_process_zero = 400, True
    for step in range(1, 401):
        state.global_step = trainer._token_view.shown_step = step
        callback.on_log(trainer.args, state, None, logs={"loss": 1.0})
    callback.on_log(trainer.args, state, None, logs={"train_runtime": 1.0})
    steps = {name: [s for s, n, _ in ours(library) if n == name] for name in ("opd/tokens", "opd/gap_by_position")}
    assert len(steps["opd/tokens"]) == 41 and steps["opd/tokens"][:2] == [1, 11] and steps["opd/tokens"][-1] == 400
    assert steps["opd/gap_by_position"] == [50 * i for i in range(1, 9)]


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(tmp_path):
    broken, whole = Library(), Library()
    broken.Table = broken.Html = lambda *args, **kwargs: 1 / 0
    with pytest.warns(UserWarning, match="Handing texts and tables to W&B failed with ZeroDivisionError") as caught:
        trainer = train(tmp_path, callbacks=[fake_wandb(broken), fake_wandb(whole)])
    assert trainer.state.global_step == 3 and len(ours(whole)) > 5 and not ours(broken)
    assert any("distill/reverse_kl" in key for line in broken.logged for key in line)
    assert sum("Handing" in str(w.message) for w in caught) == 1


def test_without_trackers_nothing_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_opd.trackers.to_html", lambda parts: 1 / 0)
    trainer = train(tmp_path, max_steps=1)
    assert not any(isinstance(c, (WandbCallback, TensorBoardCallback)) for c in trainer.callback_handler.callbacks)


@pytest.mark.slow
def test_a_real_wandb_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(tmp_path, "wandb")
    wandb.finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    media = folder / "files" / "media"
    (findings,) = media.glob("table/opd/findings*")
    assert json.loads(findings.read_text())["data"] == [["eos", "warning", "two ends", "why", "do"]]
    (alarms,) = media.glob("table/opd/alarms*")
    assert json.loads(alarms.read_text())["data"][0][1] == "kl_spike"
    pages = [f.read_text() for f in media.glob("html/opd/tokens*")]
    assert len(pages) == 3 and all("mean gap" in page for page in pages)
    assert len(list(media.glob("html/opd/gap_by_position*"))) == 2
    assert b"KL 9 | 3\n\nit\n\nthat" in next(folder.glob("*.wandb")).read_bytes(), "the alert is in the run's file"


@pytest.mark.slow
def test_a_real_trackio_run(tmp_path):
    """In a process of its own: trackio reads its folder when it is imported, and leaves threads behind."""
    pytest.importorskip("trackio")
    path = os.pathsep.join([str(Path(trl_opd.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": path}
    script = "import sys; from test_trackers import train; train(sys.argv[1], 'trackio', project='runs')"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "runs.db")) as database:
        alerts = database.execute("select title, text, level from alerts").fetchall()
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    assert alerts == [("kl_spike", "KL 9 | 3\n\nit\n\nthat", "error")]
    ((findings, step),) = [(r["opd/findings"], r["train/global_step"]) for r in rows if "opd/findings" in r]
    assert step == 0 and findings["_value"][0]["seen"] == "two ends"
    pages = [r["opd/tokens"]["file_path"] for r in rows if "opd/tokens" in r]
    assert len(pages) == 3 and "mean gap" in (tmp_path / "store" / "media" / pages[0]).read_text()
    assert sum("opd/gap_by_position" in r for r in rows) == 2


# The gap by position


def test_the_heat_map_has_a_row_a_bucket_and_a_column_a_log():
    a, b = "distill/gap_at/00000-00007", "distill/gap_at/00008-00015"
    history = [
        {"step": 2, a: -1.0, b: 0.5, "loss": 1.0},
        {"step": 3, "eval_loss": 1.0, f"eval_{a}": 9.0},
        {"step": 4, a: math.nan},
        {"step": 6, a: -0.25, b: 0.0},
    ]
    grid = gap_by_position(history)
    assert grid == (["00000-00007", "00008-00015"], [2, 4, 6], [[-1.0, None, -0.25], [0.5, None, 0.0]])
    page = heat_map(grid)
    cells = re.findall(r"<td(?: style=\"background:rgb\((\d+),(\d+),(\d+)\))?", page)
    assert [tuple(map(int, c)) if c[0] else None for c in cells] == [
        (255, 0, 0),
        None,
        (255, 191, 191),
        (128, 255, 128),
        None,
        (255, 255, 255),
    ]
    assert "steps 2 to 6" in page and 'title="+0.5000"' in page


def test_of_many_lines_the_first_the_last_and_some_between_are_taken():
    history = [{"step": i, "distill/gap_at/00000-00007": float(i)} for i in range(1, 1001)]
    _, steps, values = gap_by_position(history)
    assert len(steps) == 60 and steps[0] == 1 and steps[-1] == 1000 and values == [list(map(float, steps))]
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 18
