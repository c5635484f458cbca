"""Completions and their tokens, as they are chosen and packed for the page."""

import math
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from report_runs import tokens_frame, write_run

from trl_opd.report import load_run, tokens
from trl_opd.report.tokens import load_completions, packed, text_of


def run_with(folder: Path, frames: dict[int, pd.DataFrame]):
    write_run(folder, num_steps=2)
    for file in (folder / "completions").iterdir():
        file.unlink()
    for step, frame in frames.items():
        frame.to_parquet(folder / f"completions/completions_{step:05d}.parquet")
    return load_run(folder)


def test_the_worst_of_a_step_comes_first(tmp_path: Path):
    frame = tokens_frame(3).iloc[::-1]
    found, notes = load_completions(run_with(tmp_path, {3: frame}))
    means = [completion.mean_gap for completion in found]
    expected = [pd.Series(gaps).mean() for gaps in tokens_frame(3)["token_gap"]]  # skips the NaN of masked tokens
    assert means == pytest.approx(expected, abs=1e-4) and means == sorted(means)
    assert notes == []
    assert found[0].scores.keys() == {"accuracy_reward", "advantage"}
    assert found[0].mask[-5:] == [True] + [False] * 4
    assert found[0].numbers["gap"][-1] is None
    assert "weight" not in packed(found)[0] and "mask" in packed(found)[0]


def test_rows_without_tokens_yield_to_those_with(tmp_path: Path):
    frame = tokens_frame(3)
    for column in [name for name in frame if name.startswith("token")]:
        frame[column] = [value if i == 2 else None for i, value in enumerate(frame[column])]
    found, _ = load_completions(run_with(tmp_path, {3: frame}))
    assert len(found) == 1 and found[0].tokens


def test_a_log_of_text_alone(tmp_path: Path):
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
    frame = pd.DataFrame({"step": [1], "prompt": [messages], "completion": [[messages[1]]], "advantage": [math.nan]})
    found, notes = load_completions(run_with(tmp_path, {1: frame}))
    assert (found[0].prompt, found[0].text, found[0].scores) == ("user: two?\nassistant: 2", "assistant: 2", {})
    assert "no token columns" in notes[0]


def test_a_torn_file_is_told_and_left_out(tmp_path: Path):
    run = run_with(tmp_path, {1: tokens_frame(1), 2: tokens_frame(2)})
    whole = run.completions[1].read_bytes()
    run.completions[1].write_bytes(whole[: len(whole) // 2])
    found, notes = load_completions(run)
    assert {completion.step for completion in found} == {1}
    assert notes == ["completions_00002.parquet could not be read (ArrowInvalid)."]


def test_the_last_steps_and_some_before(tmp_path: Path):
    files = [Path(f"completions_{step:05d}.parquet") for step in range(1000)]
    chosen = [int(file.stem[-5:]) for file in tokens._spread(files, 24)]
    assert chosen[0] == 0 and chosen[12:] == list(range(988, 1000)) and len(chosen) == 24
    assert chosen == sorted(set(chosen))
    gaps = [b - a for a, b in pairwise(chosen[:12])]
    assert max(gaps) - min(gaps) <= 1
    assert tokens._spread(files[:24], 24) == files[:24]


def test_a_page_holds_the_worst_of_every_step(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_COMPLETIONS", 5)
    found, notes = load_completions(run_with(tmp_path, {s: tokens_frame(s) for s in (1, 2, 3)}))
    assert [completion.step for completion in found] == [1, 2, 2, 3, 3]
    assert notes == ["5 of these steps' 12 completions are shown: the worst of each step."]
    everything, _ = load_completions(run_with(tmp_path, {1: tokens_frame(1)}))
    assert found[0].mean_gap == everything[0].mean_gap


def test_a_page_holds_so_many_tokens(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_TOKENS", 200)
    found, _ = load_completions(run_with(tmp_path, {s: tokens_frame(s) for s in (1, 2, 3)}))
    assert 0 < sum(len(completion.tokens) for completion in found) <= 200
    assert {completion.step for completion in found} == {1, 2, 3}


def test_long_completions_lose_their_middle(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_LENGTH", 30)
    frame = tokens_frame(1, num=1, length=100)
    frame["token_mask"] = [[k % 3 == 0 or k > 95 for k in range(100)]]
    (found,), notes = load_completions(run_with(tmp_path, {1: frame}))
    expected = list(frame["tokens"][0])
    assert found.tokens == expected[:20] + expected[-10:]
    assert (found.cut_at, found.left_out) == (20, 70)
    assert found.numbers["student"][19] == pytest.approx(frame["token_student_logprob"][0][19], abs=1e-4)
    assert found.numbers["student"][20] == pytest.approx(frame["token_student_logprob"][0][90], abs=1e-4)
    assert found.mask == [k % 3 == 0 or k > 95 for k in [*range(20), *range(90, 100)]]
    assert len(found.mask) == 30 and "without their middle" in notes[0]


def test_masked_tokens_do_not_count(tmp_path: Path):
    """A file may have numbers where nothing was distilled."""
    frame = tokens_frame(1, num=1, length=20)
    frame["tokens"] = [list("abcdef")]
    frame["token_gap"] = [[-1.0, -3.0, 100.0, -2.0, 100.0, 100.0]]
    frame["token_mask"] = [[True, True, False, True, False, False]]
    (found,), _ = load_completions(run_with(tmp_path, {1: frame}))
    assert found.gaps() == [-1.0, -3.0, -2.0] and found.mean_gap == -2.0
    assert packed([found])[0]["mask"] == [1, 1, 0, 1, 0, 0]


def test_columns_of_another_length_are_not_shown(tmp_path: Path):
    frame = tokens_frame(1, num=1)
    frame["token_reverse_kl"] = [[1.0, 2.0]]
    frame["token_mask"] = [[True]]
    (found,), _ = load_completions(run_with(tmp_path, {1: frame}))
    assert "kl" not in found.numbers and "gap" in found.numbers and all(found.mask)


def test_texts():
    assert text_of(None) == "" and text_of("x") == "x"
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    assert text_of(calls) == 'assistant: [{"name": "add"}]'
    parts = [{"type": "image"}, {"type": "text", "text": " What is it?"}]
    assert text_of([{"role": "user", "content": parts}]) == "user: <image> What is it?"
    assert len(tokens._clipped("a" * 50_000)) < 20_100
