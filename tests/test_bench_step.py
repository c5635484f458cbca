"""`trl-opd bench step`: the phases exclude each other and hold what they say, and ratios compare like with like."""

import json
import time

import pytest
import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import distillation_trainer

from trl_opd import distill_head
from trl_opd.bench import measure, phases, step, trainers
from trl_opd.bench.phases import PHASES, PhaseTimer, WatchedHead
from trl_opd.cli import main as cli

TINY = ["--student-hidden", "64", "--teacher-hidden", "64", "--layers", "1", "--vocab", "200", "--batch", "2"]
TINY += ["--prompt", "4", "--completion", "6", "--no-memory", "--steps", "1"]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test lets it."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_phases_exclude_each_other_and_sum_to_the_step(clock):
    timer = PhaseTimer(torch.device("cpu"))
    timer.detailed = True
    student_forward = timer.wrap("student", lambda: clock(2))
    head = timer.wrap("head", lambda: clock(5))

    def sample():
        clock(10)
        student_forward()  # of the rollout, not a phase of its own

    def backward():
        clock(1)
        head()
        clock(1)

    timer.begin_step()
    clock(0.5)
    timer.wrap("rollout", sample)()
    student_forward()
    head()
    timer.wrap("backward", backward)()
    timer.end_step()
    ((detailed, seconds),) = timer.steps
    assert detailed
    expected = {"rollout": 12, "teacher": 0, "student": 2, "head": 10, "backward": 2, "other": 0.5}
    assert seconds == pytest.approx(expected)


def test_a_plain_step_times_its_rollout_alone(clock):
    timer = PhaseTimer(torch.device("cpu"))
    outside = timer.wrap("student", lambda: clock(3))
    outside()  # before any step: evaluation, say
    timer.begin_step()
    timer.wrap("rollout", lambda: clock(4))()
    outside()
    timer.end_step()
    ((detailed, seconds),) = timer.steps
    assert not detailed
    assert seconds == pytest.approx(dict.fromkeys(PHASES, 0.0) | {"rollout": 4, "other": 3})


def test_phase_ends_when_its_function_raises(clock):
    timer = PhaseTimer(torch.device("cpu"))
    timer.detailed = True

    def fails():
        clock(2)
        raise ValueError("broken")

    timer.begin_step()
    with pytest.raises(ValueError, match="broken"):
        timer.wrap("head", fails)()
    clock(1)
    timer.end_step()
    assert timer.steps[0][1]["head"] == 2 and timer.steps[0][1]["other"] == 1


@pytest.fixture
def slow_backward(monkeypatch):
    """TRL's head takes a fifth of a second more in its backward pass."""
    real = ChunkedDivergenceFunction.backward

    def backward(*args):
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(ChunkedDivergenceFunction, "backward", staticmethod(backward))


def run(tmp_path, *options: str) -> dict:
    path = tmp_path / "step.json"
    assert cli(["bench", "step", *TINY, "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


def test_step_beside_trl(tmp_path, slow_backward, capsys):
    before = vars(ChunkedDivergenceFunction)["backward"]
    start = time.perf_counter()
    result = run(tmp_path, "--rounds", "2", "--png", str(tmp_path / "step.png"))
    wall = time.perf_counter() - start
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"ours", "trl"}
    everything = 0.0
    for row in rows.values():
        assert len(row["steps"]) == len(row["detailed_steps"]) == 2
        everything += sum(sum(s.values()) for s in row["steps"] + row["detailed_steps"])
        for phase in PHASES:
            assert all(s[phase] > 0 for s in row["detailed_steps"]), phase
            assert all((s[phase] > 0) == (phase in ("rollout", "other")) for s in row["steps"])
        assert row["median_s"] >= row["without_generation"]["median_s"] > 0
        assert row["tokens_per_s"] == pytest.approx(2 * 6 / row["median_s"])
    assert everything < wall
    # The head's backward pass is the head's: the rest of TRL's backward pass did not become slower
    assert rows["trl"]["phases"]["head"] > 0.2 > rows["trl"]["phases"]["backward"]
    assert rows["ours"]["phases"]["head"] < 0.2
    ratios = {r["scope"]: r for r in result["ratios"]}
    assert ratios["step without generation"]["median"] > ratios["step"]["min"] > 1
    assert ratios["step without generation"]["target"] == 1.3 and ratios["step"]["target"] is None
    assert "at equal precision" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    # Nothing stays patched
    assert vars(ChunkedDivergenceFunction)["backward"] is before
    assert not hasattr(distill_head.fused_linear_divergence, "_is_timed")
    assert not hasattr(distillation_trainer._chunked_divergence_loss, "_is_timed")


def test_bf16_is_ignored_by_trl_and_put_back(tmp_path, monkeypatch):
    """The premise of the comparison: TRL's loss runs in fp32 under `bf16=True`, ours and `trl_autocast` in bf16."""
    seen = {}
    real_trl, real_ours = distillation_trainer._chunked_divergence_loss, distill_head.fused_linear_divergence
    real_round = step._round

    def record(row, *args):
        monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", watch(row["name"], real_trl))
        monkeypatch.setattr(distill_head, "fused_linear_divergence", watch(row["name"], real_ours))
        return real_round(row, *args)

    def watch(name, function):
        def call(student_hidden, *args, **kwargs):
            autocast = torch.is_autocast_enabled("cpu")
            seen[name] = torch.get_autocast_dtype("cpu") if autocast else student_hidden.dtype
            return function(student_hidden, *args, **kwargs)

        return call

    monkeypatch.setattr(step, "_round", record)
    result = run(tmp_path, "--rounds", "1", "--precision", "bf16", "--random-rollouts")
    assert seen == {"ours": torch.bfloat16, "trl": torch.float32, "trl_autocast": torch.bfloat16}
    losses = [row["loss"] for row in result["rows"]]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.05)  # the same random completions, the same objective
    pairs = {(r["slow"], r["fast"], r["what"].split(",")[0]) for r in result["ratios"]}
    assert pairs == {
        ("trl", "ours", "as configured"),
        ("trl_autocast", "ours", "at equal precision"),
        ("trl", "trl_autocast", "what TRL's ignored bf16 costs it"),
    }


def test_a_trainer_that_fails_is_reported(tmp_path, monkeypatch, capsys):
    real = step.make_trainer

    def make(name, *args):
        if name == "trl":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(name, *args)

    monkeypatch.setattr(step, "make_trainer", make)
    result = run(tmp_path, "--rounds", "1", "--random-rollouts")
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["trl"]["problem"] == "does not fit: out of memory"
    assert rows["ours"]["median_s"] > 0
    assert result["ratios"] == []
    assert "does not fit: out of memory" in capsys.readouterr().out


def test_ratios_are_of_pairs_of_steps():
    def steps(*others):
        return [dict.fromkeys(PHASES, 0.0) | {"rollout": 1.0, "other": other} for other in others]

    rows = [
        {"precision": "fp32", "name": "ours", "steps": steps(1.0, 2.0, 4.0)},
        {"precision": "fp32", "name": "trl", "steps": steps(3.0, 4.0, 6.0)},
    ]
    whole, rest = step.compare(rows)
    assert [whole[k] for k in ("median", "min", "max")] == pytest.approx([5 / 3, 7 / 5, 2.0])
    assert [rest[k] for k in ("median", "min", "max")] == pytest.approx([2.0, 1.5, 3.0])


def test_heads_of_modules_imported_later_are_found():
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    Late.__module__ = "trl_opd.kernels.late"
    timer = PhaseTimer(torch.device("cpu"))
    original = vars(Late)["backward"]
    with WatchedHead(timer, trainers.our_head, "fused_linear_divergence", "trl_opd.kernels") as watched:
        timed = vars(Late)["backward"]
        watched.refresh()
        assert timed is not original and vars(Late)["backward"] is timed  # wrapped once
        x = torch.ones(3, requires_grad=True)
        timer.detailed = True
        timer.begin_step()
        Late.apply(x).sum().backward()
        timer.end_step()
    assert timer.steps[0][1]["head"] > 0
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
    assert vars(Late)["backward"] is original


def test_bf16_weights_leave_no_fp32_precision(capsys):
    with pytest.raises(SystemExit):
        cli(["bench", "step", "--weights", "bfloat16", "--precision", "fp32"])
    assert "needs --weights float32" in capsys.readouterr().err


def test_own_process_reports_its_complaint():
    with pytest.raises(RuntimeError, match="No module named"):
        measure.own_process("trl_opd.bench.nothing", [])
