"""`trl-opd bench diagnostics`: steps with diagnostics and without take turns, with a log line in every window."""

import json

import pytest
import torch

from trl_opd.bench import diagnostics
from trl_opd.bench.diagnostics import Turns, figures
from trl_opd.cli import main as cli

TINY = ["--student-hidden", "64", "--teacher-hidden", "64", "--layers", "1", "--vocab", "200", "--batch", "2"]
TINY += ["--prompt", "4", "--completion", "6", "--random-rollouts"]


def test_every_window_holds_one_log_line(tmp_path, capsys, monkeypatch):
    logged = []
    real = diagnostics.make_trainer

    def make(turns, *args):
        trainer = real(turns, *args)
        log = trainer.log
        trainer.log = lambda logs, *rest: (log(logs, *rest), logged.append((turns._step, logs)))
        return trainer

    monkeypatch.setattr(diagnostics, "make_trainer", make)
    path = tmp_path / "diagnostics.json"
    options = ["--steps", "4", "--logging-steps", "1", "2", "--json", str(path)]
    assert cli(["bench", "diagnostics", *TINY, *options]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["logging_steps"] for row in rows] == [1, 2]
    for row, pairs in zip(rows, (4, 2), strict=True):
        assert len(row["pairs"]) == pairs
        for on, off in row["pairs"]:
            assert on["step"] > on["own"] > off["own"] >= 0
            assert on["step"] > on["sampling"] > 0
    lines = [(step, "distill/teacher_rank" in logs) for step, logs in logged if "loss" in logs]
    assert lines[:10] == list(enumerate([False, False, True, True, False, False, True, True, False, False], 1))
    assert lines[10:] == [(2, False), (4, False), (6, True), (8, True), (10, False)]
    assert "below 1% of the step" in capsys.readouterr().out


def test_pairs_are_of_neighbours_and_figures_are_theirs():
    turns = Turns(torch.device("cpu"), 1, 2)
    assert turns.order == [False, False, True, True, False] and turns.max_steps == 6
    turns.windows = [{"step": float(i), "sampling": 0.5, "own": 0.1 * i} for i in range(5)]
    pairs = turns.pairs()
    assert [(on["step"], off["step"]) for on, off in pairs] == [(2, 1), (3, 4)]
    found = figures(pairs)
    assert found["cost"] == pytest.approx({"median": 0.375, "low": 0.0625, "high": 0.6875})
    assert found["cost_without_sampling"]["median"] == pytest.approx((1.5 / 0.5 + 2.5 / 3.5) / 2 - 1)
    assert found["own_s"] == pytest.approx(0.0, abs=1e-12) and found["off"]["median_s"] == 2.5


def test_windows_must_fit(capsys):
    with pytest.raises(SystemExit):
        cli(["bench", "diagnostics", "--steps", "15"])
    assert "--steps must be a multiple of each of --logging-steps [1, 10], got 15" in capsys.readouterr().err
