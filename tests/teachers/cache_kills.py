"""
Kill a run of `trl-opd score` at every step of its writing, and see what the next run makes of it.

    python cache_kills.py FOLDER

FOLDER holds `teacher`, `rows.jsonl` and `arguments.json`. The teacher is loaded once; each run is a forked process
that ends itself with SIGKILL. Prints JSON: the number of steps, and what was wrong after which of them.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401  (one thread; no network)
import datasets
from caches import contents

from trl_opd.score import ScoreArguments, score_dataset
from trl_opd.score.arguments import ScoringRun
from trl_opd.teachers.cache import CacheReader, files


class Steps:
    """Counts the steps of writing and dies at one."""

    def __init__(self, last: int | None):
        self.last, self.count = last, 0

    def __call__(self) -> None:
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class HalfFile:
    """A file in which a step lies between the halves of what is written."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.step()
        self.file.write(data[len(data) // 2 :])

    def flush(self):
        self.file.flush()
        self.step()

    def fileno(self):
        return self.file.fileno()


def watch(step: Steps) -> None:
    """Make each call that changes the disk a step."""
    for name in ("fsync", "replace"):
        call = getattr(os, name)

        def stepped(*args, call=call):
            step()  # before it
            call(*args)
            step()  # after it

        setattr(os, name, stepped)
    files.open = lambda path, mode: HalfFile(open(path, mode), step)  # noqa: SIM115 (HalfFile closes it)


def run_killed(arguments: dict, run: ScoringRun, last: int | None) -> bool:
    """Score in a process that dies at step `last`; whether it came to its end instead."""
    process = os.fork()
    if process == 0:
        try:
            watch(Steps(last))
            score_dataset(ScoreArguments(**arguments), run, progress=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def check_readable(folder: Path) -> None:
    """Whatever can be opened holds whole rows only."""
    if (folder / "meta.json").exists():
        reader = CacheReader(folder)
        for keys in reader.prompts.values():
            for key in keys:
                assert len(reader[key].completion_ids) == len(reader[key].answer.sampled_logprobs)


def main(folder: Path) -> None:
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    arguments = json.loads((folder / "arguments.json").read_text())
    run = ScoringRun(ScoreArguments(**arguments))
    run.prepare()
    run.prepare = lambda: None
    assert run_killed({**arguments, "output": str(folder / "whole")}, run, None)
    expected, wrong, step = contents(folder / "whole"), [], 0
    while True:
        output = folder / f"killed-{step}"
        killed = {**arguments, "output": str(output)}
        ended = run_killed(killed, run, step)
        try:
            check_readable(output)
            if step % 3 == 0:  # killed a second time, early in its next life
                run_killed(killed, run, 4)
                check_readable(output)
            assert run_killed(killed, run, None)
            there = contents(output)
            assert there == expected, sorted(k for k in {*there, *expected} if there.get(k) != expected.get(k))
        except Exception as error:
            wrong.append([step, repr(error)])
        if ended:
            break
        step += 1
    print(json.dumps({"steps": step, "shards": len(list((folder / "whole").glob("*.arrow"))), "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
