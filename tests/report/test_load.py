"""Folders of runs: whole, torn, half written, without a record, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_runs import FINDING, GONE, course, write_checkpoint, write_json, write_run, write_status

from trl_opd.report import NoRunError, load_run, load_runs
from trl_opd.report.state import duration


def test_a_whole_run(tmp_path: Path):
    run = load_run(write_run(tmp_path / "lora", num_steps=30, alarms=(7, 9)))
    expected = course(30)
    assert run.name == "lora"
    assert [line.step for line in run.lines] == list(range(1, 31))
    assert run.series("distill/overlap")[1] == [logs["distill/overlap"] for _, logs in expected]
    assert run.series("eval_loss")[0] == [10, 20, 30]
    assert run.series("nothing") == ([], [])
    assert [alarm["step"] for alarm in run.alarms] == [7, 9]
    assert run.findings == [FINDING] and len(run.checks) == 2
    assert run.restarts == [20]
    assert [file.name for file in run.completions] == [f"completions_{s:05d}.parquet" for s in (1, 15, 30)]
    assert run.notes == []
    assert (run.state.name, run.state.step, run.state.progress) == ("finished", 30, 1.0)


@pytest.mark.parametrize("tail", ['{"time": 1.0, "step": 31, "lo', '{"time"', "\x00\x00\x00"])
def test_a_torn_last_line_is_left_out_silently(tmp_path: Path, tail: str):
    """A run is being written, or was killed while it wrote."""
    folder = write_run(tmp_path / "run", num_steps=30)
    with open(folder / "_opd/log.jsonl", "a") as file:
        file.write(tail)
    run = load_run(folder)
    assert run.lines[-1].step == 30 and run.notes == []


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path: Path):
    folder = write_run(tmp_path / "run", num_steps=3)
    with open(folder / "_opd/log.jsonl", "a") as file:
        file.write('{"time": 1.0, "step": 4, "logs": {"loss": 0.5}}')
    assert load_run(folder).lines[-1].logs == {"loss": 0.5}


def test_a_broken_line_in_the_middle_is_told(tmp_path: Path):
    folder = write_run(tmp_path / "run", num_steps=4)
    lines = (folder / "_opd/log.jsonl").read_text().splitlines()
    lines[1] = lines[1][:40]
    (folder / "_opd/log.jsonl").write_text("\n".join(lines) + "\n")
    run = load_run(folder)
    assert [line.step for line in run.lines] == [1, 3, 4]
    assert run.notes == ["log.jsonl: 1 unreadable line left out."]


def test_numbers_that_are_none_are_gaps(tmp_path: Path):
    folder = write_run(tmp_path / "run", num_steps=1)
    logs = '{"loss": NaN, "grad_norm": null, "reward": Infinity, "text": "no", "flag": true, "kl": 2}'
    lines = ['{"time": 1.0, "step": 1, "logs": ' + logs + "}", '{"step": "x", "logs": {}}', ""]
    (folder / "_opd/log.jsonl").write_text("\n".join(lines))
    (line,) = load_run(folder).lines
    assert line.logs == {"loss": None, "grad_norm": None, "reward": None, "kl": 2}


@pytest.mark.parametrize("missing", ["run.json", "log.jsonl", "alarms.jsonl", "findings.json", "status.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "torn"])
def test_any_file_may_be_missing_or_torn(tmp_path: Path, missing: str, how: str):
    folder = write_run(tmp_path / "run", num_steps=5)
    file = folder / "_opd" / missing
    if how == "gone":
        file.unlink()
    else:
        file.write_text("" if how == "empty" else file.read_text()[:20])
    run = load_run(folder)
    assert bool(run.lines) == (missing != "log.jsonl")
    assert bool(run.info) == (missing != "run.json")
    assert (run.state.name == "finished") == (missing != "status.json")
    # A log that is torn is one that is being written; without findings and alarms there were none to write
    told = missing in ("run.json", "status.json") or (missing, how) == ("log.jsonl", "gone")
    told = told or (missing == "findings.json" and how != "gone")
    assert any(missing in note for note in run.notes) == told


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null", '{"history": 3, "config": [], "student": "x"}'])
def test_files_of_another_form_do_no_harm(tmp_path: Path, content: str):
    folder = write_run(tmp_path / "run", num_steps=5)
    for name in ("run.json", "findings.json", "status.json"):
        (folder / "_opd" / name).write_text(content)
    run = load_run(folder)
    assert len(run.lines) == 5 and run.restarts == []


def test_without_a_record_the_newest_checkpoint_is_read(tmp_path: Path):
    """By its step: checkpoint-9 comes after checkpoint-10 in a listing."""
    for step in (9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}", step)
    run = load_run(tmp_path)
    assert [line.step for line in run.lines] == list(range(1, 11))
    assert run.lines[3].logs["distill/reverse_kl"] == course(10)[3][1]["distill/reverse_kl"]
    assert "checkpoint-10/trainer_state.json" in run.notes[0]
    assert (run.state.name, run.state.step, run.state.max_steps) == ("unknown", 10, 40)
    assert "step 10 of 40" in run.state.text


def test_the_state_of_a_finished_run_without_a_record(tmp_path: Path):
    write_checkpoint(tmp_path, 40)
    assert load_run(tmp_path).state.name == "finished"
    write_checkpoint(tmp_path / "checkpoint-20", 20)
    assert load_run(tmp_path).lines[-1].step == 40


def test_a_checkpoint_or_the_opd_folder_will_do(tmp_path: Path):
    write_checkpoint(tmp_path / "old" / "checkpoint-9", 9)
    assert load_run(tmp_path / "old" / "checkpoint-9").lines[-1].step == 9
    folder = write_run(tmp_path / "new", num_steps=5)
    assert load_run(folder / "_opd").path == folder


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(NoRunError, match="is not a folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(NoRunError) as caught:
        load_run(tmp_path)
    for name in ("_opd/run.json", "_opd/log.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json"):
        assert name in str(caught.value)
    write_run(tmp_path / "a", num_steps=2)
    with pytest.raises(NoRunError, match=r"for example \S*/a$"):
        load_run(tmp_path)


def test_names_are_told_apart_by_the_folders_above(tmp_path: Path):
    folders = [write_run(tmp_path / where, num_steps=2) for where in ("x/out", "y/out", "y/other")]
    names = [run.name for run in load_runs([*folders, folders[0]])]
    assert names[1:3] == ["y/out", "other"]
    assert len(set(names)) == 4 and all("out" in name for name in (names[0], names[3]))


class TestState:
    def of(self, tmp_path: Path, **status):
        folder = write_run(tmp_path / "run", num_steps=5)
        write_status(folder, **status)
        return load_run(folder).state

    def test_running(self, tmp_path: Path):
        state = self.of(tmp_path, state="running", updated=time.time() - 3, step=2)
        assert state.name == "running" and state.tone == "busy"
        assert "last line 3 s ago" in state.text or "last line 4 s ago" in state.text

    def test_alive_but_silent(self, tmp_path: Path):
        """The process of a run that hangs is there: it is running, and that it says nothing is said."""
        import psutil

        began = psutil.Process().create_time()
        state = self.of(tmp_path, state="running", updated=max(began, time.time() - 5), pid=os.getpid())
        assert state.name == "running"
        # pid 1 has run since this machine was started
        parent = psutil.Process(1)
        if time.time() - parent.create_time() > 2000:
            state = self.of(tmp_path, state="running", updated=time.time() - 1500, pid=1)
            assert state.name == "running" and "without a new line for 25 min" in state.text

    def test_killed(self, tmp_path: Path):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        try:
            time.sleep(0.1)
            status = {"state": "running", "pid": process.pid, "updated": time.time()}
            assert self.of(tmp_path, **status).name == "running"
            process.send_signal(signal.SIGKILL)
            for _ in range(100):  # until it is a zombie, which has a pid and does nothing
                if Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z":
                    break
                time.sleep(0.02)
            state = self.of(tmp_path, **status)
            assert state.name == "silent" and "no sign of life since" in state.text and state.tone == "bad"
        finally:
            process.kill()
            process.wait()
        assert self.of(tmp_path, **status).name == "silent"

    def test_a_pid_that_another_process_has_now(self, tmp_path: Path):
        assert self.of(tmp_path, state="running", pid=os.getpid(), updated=1_600_000_000.0).name == "silent"

    @pytest.mark.parametrize(("ago", "expected"), [(30, "running"), (3600, "silent")])
    def test_of_another_machine(self, tmp_path: Path, ago: float, expected: str):
        state = self.of(tmp_path, state="running", host="far-away", pid=1, updated=time.time() - ago)
        assert state.name == expected
        if expected == "silent":
            assert "far-away" in state.text

    def test_of_another_machine_that_logs_rarely(self, tmp_path: Path):
        """An hour of silence means nothing where lines are half an hour apart."""
        folder = write_run(tmp_path / "run", num_steps=2)
        now = time.time()
        lines = [{"time": now - t, "step": i, "logs": {"loss": 1.0}} for i, t in enumerate((5400, 3600))]
        (folder / "_opd/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_status(folder, "running", host="far-away", updated=now - 3600)
        assert load_run(folder).state.name == "running"

    def test_failed_stopped_interrupted(self, tmp_path: Path):
        state = self.of(tmp_path, state="failed", error="ValueError: NaN", step=3)
        assert (state.name, state.error) == ("failed", "ValueError: NaN") and "at step 3" in state.text
        assert self.of(tmp_path, state="stopped").tone == "warn"
        assert self.of(tmp_path, state="interrupted").text.startswith("interrupted at step 60")

    def test_no_status(self, tmp_path: Path):
        folder = write_run(tmp_path / "run", num_steps=5)
        (folder / "_opd/status.json").unlink()
        assert load_run(folder).state.name == "unknown"
        write_json(folder / "_opd/status.json", {"state": 3, "updated": "yesterday", "step": float("nan"), "pid": "x"})
        assert load_run(folder).state.name == "unknown"


def test_durations():
    assert [duration(s) for s in (5, 65, 3600, 3660, 200_000)] == ["5 s", "1 min", "1 h", "1 h 1 min", "2 days"]


def test_gone_is_no_process():
    assert not Path(f"/proc/{GONE}").exists()
