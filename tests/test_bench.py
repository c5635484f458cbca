"""`trl-opd bench head`: its figures are what they say they are."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opd.bench import candidates, exact, head, measure
from trl_opd.bench.candidates import Cell, make_inputs
from trl_opd.bench.gemms import BareGemms
from trl_opd.bench.plots import plot_head
from trl_opd.bench.targets import check_targets
from trl_opd.cli import main as cli

CPU = torch.device("cpu")
TINY = ["--student-hidden", "24", "--teacher-hidden", "40", "--vocab", "300", "--tokens", "70", "--repeats", "2"]
TINY += ["--threads", "1"]
SMALL = Cell(student_hidden=24, teacher_hidden=40, vocab=300, tokens=70)
PEERS = ("trl", "liger_chunked")


def run(tmp_path: Path, *options: str) -> dict:
    """The JSON of a run on tiny shapes."""
    path = tmp_path / "head.json"
    assert cli(["bench", "head", *TINY, "--no-memory", "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


def test_every_implementation_has_a_row_and_computes_the_same_loss(tmp_path, capsys):
    result = run(tmp_path, "--teacher", "full", "top8", "--divergence", "reverse_kl", "jsd", "todi")
    cells = {}
    for row in result["rows"]:
        cells.setdefault((row["divergence"], row["teacher"]), {})[row["name"]] = row
    assert len(cells) == 6
    for (divergence, teacher), rows in cells.items():
        assert set(rows) == {"ours", "trl", "liger_triton", "liger_chunked", "full_logits", "gemms"}
        peers = PEERS if teacher == "full" and divergence != "todi" else ()
        for name in ("ours", "full_logits", *peers):
            assert rows[name]["loss"] == pytest.approx(rows["full_logits"]["loss"], rel=1e-5)
            for error in ("loss_error", "hidden_error", "head_error"):
                assert 0 <= rows[name][error] < 2e-5
        for name in set(PEERS) - set(peers):
            assert "median_s" not in rows[name]
            assert "only" in rows[name]["problem"]
        for row in rows.values():
            assert "problem" in row or 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    out = capsys.readouterr().out
    assert "needs CUDA" in out
    assert "takes a dense teacher only" in out
    assert "has forward KL, reverse KL and the generalized JSD only" in out
    assert "bench head" in result["command"] and result["machine"]["threads"] == 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("teacher", ["full", "top8"])
def test_reference_is_float64_autograd_through_all_logits(monkeypatch, frozen, teacher):
    monkeypatch.setattr(exact, "_SLICE_BYTES", 8 * 24 * 7)  # slices of a few rows, the last one shorter
    cell = Cell(24, 40, 300, 70, divergence="reverse_kl", frozen_head=frozen, teacher=teacher)
    x = make_inputs(cell, CPU)
    truth = exact.reference(x, "reverse_kl")
    hidden = x.student_hidden[:64].detach().double().requires_grad_()
    weight = x.student_weight.detach().double().requires_grad_()
    s = (hidden @ weight.t()).softmax(-1)
    if teacher == "full":
        t = (x.teacher_hidden[:64].double() @ x.teacher_weight.double().t()).softmax(-1)
    else:
        ids, logprobs = x.topk[0][:64], x.topk[1][:64].double()
        known = s.gather(1, ids)
        s = torch.cat([known, 1 - known.sum(1, keepdim=True)], 1)
        t = torch.cat([logprobs.exp(), 1 - logprobs.exp().sum(1, keepdim=True)], 1)
    loss = (s * (s.log() - t.log())).sum(1).mean()
    loss.backward()
    assert truth.loss == pytest.approx(loss.item(), rel=1e-9)

    found = {}

    def off_by_a_tenth(few, divergence):
        """A loss whose gradients are 1.1 times the exact ones in the hidden states, and 1.3 times in the head."""
        found["tokens"] = few.student_hidden.shape[0]
        value = (few.student_hidden.double() * hidden.grad).sum() * 1.1
        if few.student_weight.requires_grad:
            value = value + (few.student_weight.double() * weight.grad).sum() * 1.3
        return value - value.detach() + 2 * loss.detach()

    errors = exact.errors(off_by_a_tenth, truth, "reverse_kl")
    assert found["tokens"] == 64
    assert errors["loss_error"] == pytest.approx(1.0, rel=1e-6)
    assert errors["hidden_error"] == pytest.approx(0.1, rel=1e-4)
    assert ("head_error" in errors) is not frozen
    if not frozen:
        assert errors["head_error"] == pytest.approx(0.3, rel=1e-4)


def test_broken_and_failing_implementations_are_seen(tmp_path, monkeypatch, capsys):
    real = candidates.candidates

    def wrong_sign(x, divergence):
        return -candidates.trl(x, divergence)

    def fails(x, divergence):
        raise ValueError("no such kernel")

    def too_large(x, divergence):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def broken(device):
        return real(device) | {"wrong_sign": wrong_sign, "fails": fails, "too_large": too_large}

    monkeypatch.setattr(head, "candidates", broken)
    result = run(tmp_path, "--divergence", "reverse_kl")
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["wrong_sign"]["hidden_error"] == pytest.approx(2.0, rel=1e-4)
    assert rows["wrong_sign"]["head_error"] == pytest.approx(2.0, rel=1e-4)
    assert rows["fails"]["problem"] == "ValueError: no such kernel"
    assert rows["too_large"]["problem"] == "does not fit: out of memory"
    assert rows["ours"]["hidden_error"] < 2e-5
    out = capsys.readouterr().out
    assert "no such kernel" in out and "does not fit" in out


def test_what_would_not_fit_into_memory_is_not_tried(tmp_path, monkeypatch):
    needed = candidates.estimated_bytes("full_logits", SMALL)
    assert needed > 10 * 4 * SMALL.tokens * SMALL.vocab
    monkeypatch.setattr(candidates, "bytes_free", lambda device: int(needed) - 1)
    rows = {row["name"]: row for row in run(tmp_path, "--divergence", "reverse_kl")["rows"]}
    assert rows["full_logits"]["problem"].startswith("does not fit: about")


class _Products(TorchDispatchMode):
    """Operations of all matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "teacher", "products"), [
    (False, "full", 4), (True, "full", 3), (False, "top8", 3), (True, "top8", 2),
])  # fmt: skip
def test_bare_gemms_are_the_products_of_an_exact_step(frozen, teacher, products):
    cell = Cell(24, 24, 300, 70, frozen_head=frozen, teacher=teacher)
    x = make_inputs(cell, CPU)
    gemms = BareGemms(x, cell, rows=32)
    with _Products() as counted:
        gemms()
    assert counted.flops == cell.flops == products * 2 * 70 * 300 * 24
    assert cell.num_gemms == products
    if not frozen:
        grads = torch.cat([gemms.grad, gemms.grad, gemms.grad[:6]])
        torch.testing.assert_close(gemms.grad_weight, grads.t() @ x.student_hidden.detach())


@pytest.mark.parametrize("rounded", [False, True])
def test_bare_gemms_of_half_operands_keep_fp32_results(rounded):
    cell = Cell(24, 24, 300, 70, dtype="bfloat16")
    gemms = BareGemms(make_inputs(cell, CPU), cell, rows=70, rounded=rounded)
    gemms()
    assert gemms.logits.dtype == (torch.bfloat16 if rounded else torch.float32)


def test_teacher_is_the_student_with_noise():
    x = make_inputs(Cell(32, 48, 4000, 50, gap=0.25), CPU)
    student = x.student_hidden @ x.student_weight.t()
    teacher = x.teacher_hidden @ x.teacher_weight.t()
    assert student.std().item() == pytest.approx(3, rel=0.1)
    assert (teacher - student).std().item() == pytest.approx(0.25, rel=0.1)
    again = make_inputs(Cell(32, 48, 4000, 50, gap=0.25), CPU)
    assert torch.equal(x.student_weight, again.student_weight)


def test_grid_is_the_issues_and_begins_with_the_target():
    args = head.parse_arguments(["--grid", "--dtype", "bfloat16"], "head")
    cells = head.make_cells(args)
    assert len(set(cells)) == len(cells) == 3 * 3 * 3 * 2 * 2 * 2
    first = Cell(2048, 2048, 151936, 16384, "reverse_kl", False, "full", "bfloat16")
    second = Cell(2048, 2048, 151936, 16384, "jsd", False, "full", "bfloat16")
    assert cells[:2] == [first, second]
    restricted = head.make_cells(head.parse_arguments(["--grid", "--vocab", "32000", "--frozen-head"], "head"))
    assert {cell.vocab for cell in restricted} == {32000} and all(cell.frozen_head for cell in restricted)


def test_what_is_out_of_time_is_listed(tmp_path, capsys):
    result = run(tmp_path, "--time-budget", "1e-6", "--teacher", "full", "top8")
    assert result["rows"] == []
    assert [row["problem"].split(":")[0] for row in result["not_run"]] == ["time budget"] * 4
    assert capsys.readouterr().out.count("not run: ") == 4


def _rows(**seconds: float) -> list[dict]:
    shape = {"student_hidden": 2048, "teacher_hidden": 2048, "vocab": 151936, "tokens": 16384, "frozen_head": False}
    shape |= {"divergence": "reverse_kl", "teacher": "full", "dtype": "bfloat16"}
    times = {name: {"median_s": s, "min_s": 0.9 * s, "max_s": 1.2 * s} for name, s in seconds.items()}
    return [shape | {"name": name, "peak_mib": 100 * seconds[name]} | t for name, t in times.items()]


def test_targets_of_the_gpu_shape():
    rows = _rows(ours=1.1, gemms=1.0, trl=1.9, liger_triton=4.0, liger_chunked=2.3)
    found = {t["what"].split(": ")[1]: t for t in check_targets(rows, "cuda")}
    assert (found["ours / gemms"]["value"], found["ours / gemms"]["met"]) == (pytest.approx(1.1), True)
    assert found["trl / ours"]["value"] == pytest.approx(1.9 / 1.1) and found["trl / ours"]["met"] is False
    assert found["liger / ours"]["value"] == pytest.approx(2.3 / 1.1)  # the faster of the two
    assert found["ours / liger (peak memory)"]["met"] and found["ours / trl (peak memory)"]["met"]
    unmeasured = check_targets(_rows(ours=1.1, gemms=1.0), "cuda")
    assert any(t["met"] is None and "not measured" in t["text"] for t in unmeasured)
    assert check_targets(rows, "cpu") == []  # bf16: the CPU's targets are of fp32


def test_turns_are_taken_and_the_first_is_not_counted(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times, problems = measure.take_turns(functions, 3, CPU)
    assert calls == list("abc") * 4 and not problems
    assert all(t == [1, 1, 1] for t in times.values())
    assert all(a != b for a, b in pairwise(calls))


def test_peak_is_measured_in_a_process_of_its_own():
    """Full logits hold a few copies of the logits."""
    cell = Cell(8, 8, 8000, 1000)
    x = make_inputs(cell, CPU)
    mib = head._measure_peak("full_logits", lambda: None, x, cell)
    logits = cell.tokens * cell.vocab * 4 / 2**20
    assert 3 * logits < mib < 12 * logits


@pytest.mark.parametrize("num_cells", [1, 4, 5, 40])
def test_png_is_a_png(tmp_path, num_cells):
    """Bars for a few problems, dots for many; a candidate without a figure is left out of both."""
    pytest.importorskip("matplotlib")
    rows = []
    for i in range(num_cells):
        some = _rows(ours=1.1, gemms=1.0, trl=1.9 + i, liger_triton=4.0, liger_chunked=2.3)
        some[-1] = {k: v for k, v in some[-1].items() if k not in ("median_s", "peak_mib")} | {"problem": "no"}
        rows += [row | {"tokens": 1000 + i} for row in some]
    path = tmp_path / "head.png"
    assert plot_head({"rows": rows, "machine": {"device": "cuda (H200)", "threads": 1}}, str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def test_png_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "head.png"
    run(tmp_path, "--png", str(path), "--divergence", "reverse_kl", "--skip", "trl", "liger_chunked", "gemms_rounded")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    path = tmp_path / "head.png"
    run(tmp_path, "--png", str(path), "--divergence", "reverse_kl", "--skip", "trl", "liger_chunked")
    assert not path.exists()
    assert "matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--divergence", "revers_kl"], "Did you mean 'reverse_kl'?"),
    (["--teacher", "top"], "full or top and a number"),
    (["--skip", "lige_triton"], "Did you mean 'liger_triton'?"),
    (["--repeats", "0"], "at least 1"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_runs(capsys, options, message):
    with pytest.raises(SystemExit) as error:
        cli(["bench", "head", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("command", "text"), [
    (["--help"], "trl-opd bench"),
    (["head", "--help"], "usage: trl-opd bench head"),
    (["step", "--help"], "usage: trl-opd bench step"),
])  # fmt: skip
def test_help(capsys, command, text):
    assert cli(["bench", *command]) == 0
    assert text in capsys.readouterr().out


def test_script_runs_from_a_checkout(tmp_path):
    root = Path(__file__).resolve().parents[1]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = root / "benchmarks" / "divergence_head.py"
    command = [sys.executable, "-W", "ignore", str(script), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=True).stdout
    assert "usage: python benchmarks/divergence_head.py" in out
