"""A cache is whole whenever its writer is killed, has one writer, and says when it is not as it was written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from caches import contents, make_rows, make_samples, meta, save_rows, save_teacher, score_arguments

import trl_opd
from trl_opd.score import ScoreArguments, score_dataset
from trl_opd.teachers.cache import CacheReader, CacheWriter
from trl_opd.teachers.cache.files import CorruptCacheError, lock_part


@pytest.fixture(autouse=True)
def no_shared_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def environment():
    path = os.pathsep.join([str(Path(trl_opd.__file__).parents[1]), str(Path(__file__).parent)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def score(tmp_path, **fields):
    return score_dataset(ScoreArguments(**score_arguments(tmp_path, **fields)), progress=False)


def write(folder, samples, **fields):
    with CacheWriter(folder, meta(**fields)) as writer:
        writer.write([q for q, _ in samples], {writer.key(q): a for q, a in samples})


@pytest.mark.slow
def test_killed_at_any_step_of_writing_it_resumes_to_the_same_bytes(tmp_path):
    arguments = score_arguments(tmp_path, rows=make_rows(7), shard_tokens=8)
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    command = [sys.executable, str(Path(__file__).parent / "cache_kills.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["shards"] >= 3
    # A file is two halves, a flush, and two syncs and a rename with a step on either side
    assert result["steps"] >= (2 * result["shards"] + 1) * 8


def test_a_killed_command_resumes_to_the_same_bytes(tmp_path):
    rows = make_rows(600)
    for i, row in enumerate(rows):
        row["prompt"] += f" {i}"
    arguments = score_arguments(tmp_path, rows=rows, batch_size=2)
    fields = [x for name, value in arguments.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_opd.cli", "score", *fields],
        env={**environment(), "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
        stderr=subprocess.DEVNULL,
    )
    scores, deadline = tmp_path / "scores", time.monotonic() + 120
    while len(list(scores.glob("shard-*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = len(list(scores.glob("shard-*.json")))
    before = contents(scores)
    resumed = score_dataset(ScoreArguments(**arguments), progress=False)
    assert 0 < resumed.scored < 600, "it was not killed in the middle"
    whole = score_dataset(ScoreArguments(**{**arguments, "output": str(tmp_path / "whole")}), progress=False)
    assert whole.scored == 600
    assert contents(scores) == contents(tmp_path / "whole")
    kept = {name: data for name, data in before.items() if name.endswith(".json") and name.startswith("shard")}
    assert len(kept) == found >= 3
    assert all(contents(scores)[name] == data for name, data in kept.items())


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    write(tmp_path / "cache", make_samples(2))
    hold = (
        "import sys, time; from trl_opd.teachers.cache.files import lock_part; from pathlib import Path\n"
        "lock = lock_part(Path(sys.argv[1]), 0); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "cache")], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="is being written by another run"):
            CacheWriter(tmp_path / "cache", meta())
        lock_part(tmp_path / "cache", 1).release()  # another part is free
        assert len(CacheReader(tmp_path / "cache")) == 2  # and so is reading
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    CacheWriter(tmp_path / "cache", meta()).close()


DAMAGES = {
    "a flipped bit of the rows": ("*.arrow", lambda data: data[:-200] + bytes([data[-200] ^ 1]) + data[-199:]),
    "a flipped bit at the start": ("*.arrow", lambda data: bytes([data[0] ^ 128]) + data[1:]),
    "rows cut off": ("*.arrow", lambda data: data[:-1]),
    "no rows": ("*.arrow", lambda data: b""),
    "rows too many": ("*.arrow", lambda data: data + b"\0"),
    "another key": ("shard*.json", lambda data: data.replace(b"0", b"1", 1)),
    "names cut off": ("shard*.json", lambda data: data[:-5]),
    "no names": ("shard*.json", lambda data: b""),
    "other names": ("shard*.json", lambda data: b"[1]"),
}


@pytest.mark.parametrize(("pattern", "damage"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_said_and_not_trained_on(tmp_path, pattern, damage):
    samples = make_samples(3)
    write(tmp_path, samples)
    (path,) = tmp_path.glob(pattern)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptCacheError) as error:
        reader = CacheReader(tmp_path)
        _ = reader[reader.meta.key(samples[0][0].prompt_ids, samples[0][0].completion_ids)]
    assert str(path) in str(error.value)
    assert "run the same `trl-opd score` command again" in str(error.value)


def test_every_single_flipped_byte_is_noticed(tmp_path):
    samples = make_samples(1)
    write(tmp_path, samples)
    key = meta().key(samples[0][0].prompt_ids, samples[0][0].completion_ids)
    for path in [*tmp_path.glob("*.arrow"), *tmp_path.glob("shard*.json")]:
        data = path.read_bytes()
        for i in range(0, len(data), 7):
            path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
            with pytest.raises(CorruptCacheError):
                _ = CacheReader(tmp_path)[key]
        path.write_bytes(data)
    assert len(CacheReader(tmp_path)[key].completion_ids)


def test_the_command_mends_what_is_damaged_or_deleted(tmp_path, caplog):
    score(tmp_path)
    whole = contents(tmp_path / "scores")
    shards = sorted((tmp_path / "scores").glob("*.arrow"))
    assert len(shards) == 4
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
    summary = score(tmp_path)
    assert "It is scored again now" in caplog.text
    assert 0 < summary.scored < summary.samples == 12
    assert contents(tmp_path / "scores") == whole
    for name in (shards[2], shards[2].with_suffix(".json")):
        name.unlink()
    score(tmp_path)
    assert contents(tmp_path / "scores") == whole


def test_rows_at_the_end_are_added_and_others_refused(tmp_path):
    rows = make_rows(12)
    score(tmp_path, rows=rows)
    before = contents(tmp_path / "scores")
    more = [{"prompt": "one more", "completion": "yes"}, {"prompt": "and another", "completion": "no"}]
    summary = score(tmp_path, rows=[*rows, *more])
    assert (summary.samples, summary.scored) == (14, 2)
    after = contents(tmp_path / "scores")
    assert {name: after[name] for name in before} == before
    assert len(CacheReader(tmp_path / "scores")) == 14
    with pytest.raises(ValueError, match=r"must hold the first rows of this dataset, but sample 1 is another"):
        score(tmp_path, rows=[rows[0], *more])
    with pytest.raises(ValueError, match=r"but sample 11 is another one there"):
        score(tmp_path, rows=rows[:11])
    assert contents(tmp_path / "scores") == after


OTHER = {
    "temperature": {"temperature": 0.5},
    "support_size": {"support_size": 6},
    "support": {"support": "sampled"},
    "logprob_dtype": {"logprob_dtype": "float16"},
    "compression": {"compression": "zstd"},
}


@pytest.mark.parametrize(("name", "fields"), list(OTHER.items()), ids=OTHER.keys())
def test_other_scores_are_not_mixed_in(tmp_path, name, fields):
    score(tmp_path)
    before = contents(tmp_path / "scores")
    with pytest.raises(ValueError, match=f"holds other scores.*{name}="):
        score(tmp_path, **fields)
    assert contents(tmp_path / "scores") == before


def test_another_teacher_at_the_same_path_is_not_mixed_in(tmp_path):
    score(tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    save_teacher(tmp_path / "teacher", seed=2)
    with pytest.raises(ValueError, match=r"holds other scores.*weights="):
        score(tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    save_teacher(tmp_path / "moved")
    assert score(tmp_path, teacher=str(tmp_path / "moved")).scored == 0  # the same weights elsewhere are the same


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("1")
    with pytest.raises(ValueError, match=r"must be empty or a cache of scores, got .*with \['chapter.txt'\]"):
        CacheWriter(tmp_path / "thesis", meta())
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "1"


def test_a_sample_that_comes_again_is_scored_once_and_replayed_twice(tmp_path):
    rows = [{"prompt": "abc", "completion": text} for text in ("x", "y", "x", "x", "hello", "y")]
    summary = score(tmp_path, rows=rows, shard_tokens=2)
    assert (summary.samples, summary.scored) == (6, 3)
    reader = CacheReader(tmp_path / "scores")
    assert len(reader) == 3
    (keys,) = reader.prompts.values()
    lengths = [len(reader[key].completion_ids) for key in keys]
    assert lengths == [2, 2, 2, 2, 6, 2]
    assert keys[0] == keys[2] == keys[3]
    save_rows(tmp_path / "rows.jsonl", rows)
    assert score(tmp_path, rows=rows, shard_tokens=2).scored == 0


def test_an_unfinished_file_of_a_killed_writer_is_cleared_away(tmp_path):
    write(tmp_path, make_samples(2))
    (tmp_path / "shard-0000-00007.arrow.tmp").write_bytes(b"half")
    (tmp_path / "shard-0000-00001.arrow").write_bytes(b"a shard without its names")
    reader = CacheReader(tmp_path)
    assert len(reader) == 2
    more = make_samples(4, seed=1)
    write(tmp_path, more)
    assert not list(tmp_path.glob("*.tmp"))
    reader.refresh()
    for question, answer in more:
        row = reader[reader.meta.key(question.prompt_ids, question.completion_ids)]
        assert np.array_equal(row.answer.topk_logprobs, answer.topk_logprobs)
