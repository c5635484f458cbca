"""The student's former completions: what is kept, what is drawn, what a checkpoint holds."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from rollout_fakes import X, make_trainer

from trl_opd.replay_buffer import ReplayBuffer
from trl_opd.rollouts import RolloutSources


def push(buffer, first, num, step=0, unit=1):
    rows = [{"prompt": f"prompt {i}", "number": i} for i in range(first, first + num)]
    buffer.push(rows, [[i, i + 1] for i in range(first, first + num)], step, unit)


def numbers(buffer):
    return [entry.row["number"] for entry in buffer.entries]


def test_the_oldest_make_room():
    buffer = ReplayBuffer(6)
    for first in range(0, 12, 4):
        push(buffer, first, 4, step=first)
    assert numbers(buffer) == [6, 7, 8, 9, 10, 11] and len(buffer) == 6
    assert [entry.step for entry in buffer.entries] == [4, 4, 8, 8, 8, 8]
    assert [entry.completion_ids.tolist() for entry in buffer.entries] == [[i, i + 1] for i in range(6, 12)]


def test_units_stay_together_and_never_exceed_the_capacity():
    buffer = ReplayBuffer(5)
    push(buffer, 0, 6, unit=2)
    assert numbers(buffer) == [2, 3, 4, 5]
    for seed in range(20):
        drawn = [entry.row["number"] for entry in buffer.draw(random.Random(seed), 2)]
        assert drawn in ([2, 3], [4, 5])
    with pytest.raises(ValueError, match="units of 2"):
        buffer.draw(random.Random(0), 3)


def test_draws_are_uniform_without_repetition():
    buffer = ReplayBuffer(10)
    push(buffer, 0, 10)
    counts = Counter()
    for seed in range(2000):
        drawn = [entry.row["number"] for entry in buffer.draw(random.Random(seed), 3)]
        assert len(set(drawn)) == 3
        counts.update(drawn)
    assert all(abs(counts[i] - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7) for i in range(10)), counts


def test_a_replayed_batch_brings_its_rows_and_steps():
    trainer = make_trainer(student_fraction=0.0, replay_fraction=1.0)
    trainer.mode_metrics = SimpleNamespace(add_sum=lambda *args: None)
    sources = RolloutSources(trainer)
    seen = {}
    for step in range(3):
        trainer.state.global_step = step
        rows = sources.begin([{"prompt": f"prompt {step}", "number": 4 * step + i} for i in range(4)])
        ids, _ = sources.generate([[X]] * 4, lambda step=step: ([[4 * step + i, 50] for i in range(4)], None))
        output = {"completion_ids": torch.tensor(ids)}
        sources.mark(output)
        seen[step] = rows, ids, output
    assert seen[0][2]["on_policy"].all() and seen[0][2]["sampled_step"].tolist() == [0] * 4
    for step in (1, 2):  # the buffer held the first batch only: replayed ones are not pushed again
        rows, ids, output = seen[step]
        assert [row["number"] for row in rows] == [row[0] for row in ids]
        assert sorted(row[0] for row in ids) == [0, 1, 2, 3]
        assert [row["number"] % 2 for row in rows] == [0, 1, 0, 1]  # in groups of two
        assert not output["on_policy"].any() and output["sampled_step"].tolist() == [0] * 4
    assert len(sources.buffer) == 4


def test_groups_over_several_processes_are_drawn_whole():
    def run(rank):
        trainer = make_trainer(rank, student_fraction=0.0, replay_fraction=1.0, num_generations=8)
        trainer.mode_metrics = SimpleNamespace(add_sum=lambda *args: None)
        sources = RolloutSources(trainer)
        for step in range(6):
            trainer.state.global_step = step
            trainer.args.student_fraction = 1.0 if step < 5 else 0.0
            rows = sources.begin([{"prompt": f"prompt {step}"}] * 4)  # half a group
            ids, _ = sources.generate([[X]] * 4, lambda: ([[X]] * 4, None))
            sources.mark({"completion_ids": torch.tensor(ids)})
        return {row["prompt"] for row in rows}

    assert len(run(0)) == 1 and run(0) == run(1)


def test_a_saved_buffer_holds_what_finished_batches_left(tmp_path):
    buffer, path = ReplayBuffer(6), str(tmp_path / "checkpoint" / "replay.pt")
    push(buffer, 0, 4, step=0, unit=2)
    buffer.commit()
    push(buffer, 4, 4, step=1, unit=2)  # a run resumed from here makes this batch again
    assert numbers(buffer) == [2, 3, 4, 5, 6, 7]
    buffer.save(path)
    resumed = ReplayBuffer(6)
    push(resumed, 90, 4)
    resumed.load(path)
    assert numbers(resumed) == [0, 1, 2, 3]
    push(resumed, 4, 4, step=1, unit=2)
    assert numbers(resumed) == numbers(buffer)
    resumed.commit()
    resumed.save(path)
    again = ReplayBuffer(6)
    again.load(path)
    assert numbers(again) == numbers(buffer)
    assert [(e.step, e.completion_ids.tolist()) for e in again.entries] == [
        (e.step, [*e.completion_ids]) for e in buffer.entries
    ]
    generators = random.Random(3), random.Random(3)
    drawn = [[e.row["number"] for e in b.draw(g, 4)] for b, g in zip((again, buffer), generators, strict=True)]
    assert drawn[0] == drawn[1]


def test_a_row_that_a_checkpoint_cannot_hold_is_named():
    with pytest.raises(ValueError, match=r"replay_fraction must be 0 with the column 'image', which holds a object"):
        ReplayBuffer(4).push([{"prompt": "a", "image": object()}], [[1]], 0, 1)
