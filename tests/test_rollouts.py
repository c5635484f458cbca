"""Where completions come from: the draw, its marks, injected members, the length; no training."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rollout_fakes import Writer, X, make_args, make_trainer

from trl_opd.injection import failed_groups, injected_rows
from trl_opd.rollout_checks import check_rollout_columns, check_rollout_fields, check_rollout_sources
from trl_opd.rollouts import RolloutSources


def draws(steps=2000, turns=1, length=0, **fields):
    """The source of each batch of a run whose buffer holds `length` completions."""
    trainer = make_trainer(**fields)
    sources = RolloutSources(trainer)
    rows = [{"prompt": "a"}] * 4
    if length:
        sources.buffer.push([{"prompt": "b"}] * length, [[X]] * length, 0, 2)
    drawn = []
    for step in range(steps):
        trainer.state.global_step = step
        for callback in trainer.callbacks:
            callback.on_step_begin(trainer.args, trainer.state, None)
        for _ in range(turns):
            sources.begin(rows)
            drawn.append(sources._source)
    return drawn


# The draw


def test_the_shares_are_those_of_the_fields():
    counts = Counter(draws(student_fraction=0.3, replay_fraction=0.5, length=8))
    for source, share in (("student", 0.3), ("replay", 0.5), ("dataset", 0.2)):
        assert abs(counts[source] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000), source


def test_the_draw_is_a_function_of_seed_step_and_place_in_the_step():
    fields = {"student_fraction": 0.5, "replay_fraction": 0.2, "length": 8, "steps": 50, "turns": 3}
    drawn = draws(**fields)
    assert drawn == draws(rank=1, **fields)  # on every process
    assert drawn != draws(seed=43, **fields)
    assert drawn[::3] == draws(**{**fields, "turns": 1})  # whatever happened before in the step
    assert drawn[::3] != drawn[1::3] != drawn[2::3]


@pytest.mark.parametrize("fraction, only", [(0.0, "dataset"), (1.0, "student")])
def test_the_ends_are_certain(fraction, only):
    assert set(draws(student_fraction=fraction, steps=300)) == {only}


def test_the_student_samples_until_the_buffer_holds_a_batch():
    assert set(draws(student_fraction=0.0, replay_fraction=1.0, length=2, steps=20)) == {"student"}
    assert set(draws(student_fraction=0.0, replay_fraction=1.0, length=4, steps=20)) == {"replay"}


def test_a_run_of_the_student_alone_draws_nothing():
    trainer = make_trainer()
    sources = RolloutSources(trainer)
    state, torch_state = random.getstate(), torch.get_rng_state()
    rows, sampled, output = [{"prompt": "a"}], ([[X]], None), {"completion_ids": torch.tensor([[X]])}
    assert sources.begin(rows) is rows
    assert sources.generate([[X]], lambda: sampled) is sampled
    sources.mark(output)
    assert output.keys() == {"completion_ids"} and sources.take_rewards() is None
    assert not trainer.callbacks and not sources.active
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)


def test_no_source_takes_from_the_generators_of_sampling():
    state, torch_state = random.getstate(), torch.get_rng_state()
    draws(student_fraction=0.3, replay_fraction=0.5, length=8, steps=5)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize(
    "fields",
    [{"student_fraction": 0.0}, {"student_fraction": 0.0, "replay_fraction": 1.0}, {"injected_completions": 1}],
)
def test_evaluation_samples_from_the_student(fields):
    trainer = make_trainer(**fields)
    trainer.model.training = False
    sources = RolloutSources(trainer)
    sources.buffer.push([{"prompt": "b"}] * 2, [[X]] * 2, 0, 2)
    rows, output = [{"prompt": "a", "completion_ids": [7]}] * 2, {"completion_ids": torch.tensor([[X], [X]])}
    assert sources.begin(rows) is rows
    assert sources.generate([[X]] * 2, lambda: ([[5], [6]], None)) == ([[5], [6]], None)
    sources.mark(output)
    assert output["on_policy"].tolist() == [True, True]


def test_members_of_a_group_on_another_process_take_later_completions():
    trainer = make_trainer(rank=1, student_fraction=0.0, num_generations=8)
    sources = RolloutSources(trainer)
    sources.begin([{"prompt": "a", "completion_ids": [[10 + i] for i in range(7)]}] * 4)
    assert sources.generate([[X]] * 4, None)[0] == [[14], [15], [16], [10]]


def test_later_turns_of_a_batch_are_the_students():
    trainer = make_trainer(student_fraction=0.0)
    sources = RolloutSources(trainer)
    sources.begin([{"prompt": "a", "completion_ids": [5]}])
    assert sources.generate([[X]], lambda: ([[9]], None))[0] == [[5]]
    assert sources.generate([[X]], lambda: ([[9]], None))[0] == [[9]]


@pytest.mark.parametrize("correction, logprobs", [(True, [[None, None], [None]]), (False, None)])
def test_an_engine_has_no_logprobs_of_what_it_did_not_sample(correction, logprobs):
    trainer = make_trainer(student_fraction=0.0)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, correction
    sources = RolloutSources(trainer)
    sources.begin([{"prompt": "a", "completion_ids": [5, 6]}, {"prompt": "a", "completion_ids": [7]}])
    assert sources.generate([[X]] * 2, None) == ([[5, 6], [7]], logprobs)


def test_the_ratio_of_injected_completions_to_an_engine_is_1():
    trainer = make_trainer(injected_completions=1)
    trainer.use_vllm = True
    trainer.mode_metrics = SimpleNamespace(add_sum=lambda *args: None)
    sources = RolloutSources(trainer)
    sources.begin([{"prompt": "a", "completion_ids": [5, 6]}] * 2)
    ids, logprobs = sources.generate([[X]] * 2, lambda: ([[9, 9], [9, 9]], [[-1.0, -2.0], [-3.0, -4.0]]))
    assert ids == [[9, 9], [5, 6]] and logprobs == [[-1.0, -2.0], [None, None]]
    nan = math.nan
    output = {
        "completion_ids": torch.tensor(ids),
        "sampling_per_token_logps": torch.tensor([[-1.0, -2.0], [nan, nan]]),
        "old_per_token_logps": torch.tensor([[-1.5, -2.5], [-0.5, -0.25]]),
    }
    sources.mark(output)
    assert output["sampling_per_token_logps"].tolist() == [[-1.0, -2.0], [-0.5, -0.25]]
    assert output["on_policy"].tolist() == [True, False]


# Injection


@pytest.mark.parametrize(
    "rank, num, size, count, failed, rows",
    [
        (0, 8, 4, 1, None, [3, 7]),
        (0, 8, 4, 3, None, [1, 2, 3, 5, 6, 7]),
        (1, 4, 8, 2, None, [2, 3]),  # a group over two processes: its last members are on the second
        (0, 4, 8, 2, None, []),
        (0, 8, 4, 1, {1}, [7]),
        (1, 8, 4, 1, {1, 2}, [3]),  # groups 2 and 3 are here
    ],
)
def test_the_last_members_of_a_group_are_injected(rank, num, size, count, failed, rows):
    trainer = make_trainer(rank, num_generations=size, injected_completions=count)
    assert injected_rows(trainer, num, failed) == rows


def test_a_group_fails_without_a_reward_above_0():
    nan = math.nan
    rewards = torch.tensor(
        [[0.0, 1], [0, 0], [0, -1], [0, 0], [nan, nan], [nan, nan], [nan, nan], [0, nan], [1, -2], [0, 0]]
    )
    assert failed_groups(rewards, torch.tensor([1.0, 1.0]), 2) == {1, 3, 4}
    assert failed_groups(rewards, torch.tensor([1.0, 0.1]), 2) == {1, 3}


# The length


# Bad input


def test_a_dataset_without_completions_is_refused():
    bare, full = Dataset.from_dict({"prompt": ["a"]}), Dataset.from_dict({"prompt": ["a"], "completion_ids": [[1]]})
    for fields in (
        {"student_fraction": 0.5},
        {"injected_completions": 1},
        {"schedules": {"student_fraction": {"type": "linear"}}},
    ):
        args = make_args(**fields)
        check_rollout_columns(full, "train_dataset", args)
        with pytest.raises(ValueError, match="train_dataset must have a column 'completion'"):
            check_rollout_columns(bare, "train_dataset", args)
        with pytest.raises(ValueError, match=r"train_dataset\['a'\] must have a column 'completion'"):
            check_rollout_columns({"a": bare}, "train_dataset", args)
        args.off_policy_source = "teacher"
        check_rollout_columns(bare, "train_dataset", args)
    for fields in ({}, {"student_fraction": 0.9, "replay_fraction": 0.1}):  # nothing else is ever drawn
        check_rollout_columns(bare, "train_dataset", make_args(**fields))


@pytest.mark.parametrize(
    "fields, given, message",
    [
        ({"student_fraction": 0.5}, {"tools": [print]}, "tools must be unset"),
        ({"injected_completions": 1}, {"rollout_func": print}, "rollout_func must be unset"),
        ({"student_fraction": 0.5}, {"environment_factory": print}, "environment_factory must be unset"),
        ({"injected_completions": 1, "injected_when": "group_failure"}, {}, "injected_when must be 'always'"),
        (
            {"student_fraction": 0.5, "off_policy_source": "teacher"},
            {"teacher": print},
            "off_policy_source must be 'd",
        ),
        ({"student_fraction": 0.5, "off_policy_source": "teacher"}, {"view": print}, "teacher_view must be unset"),
    ],
)
def test_sources_that_cannot_be_are_refused(fields, given, message):
    given = {"teacher": Writer([1]), "has_rewards": False, **given}
    check_rollout_sources(make_args(), **given)
    with pytest.raises(ValueError, match=message):
        check_rollout_sources(make_args(**fields), **given)


def test_fields_that_do_not_go_together_are_refused():
    check_rollout_fields(make_args(mask_truncated_completions=True))
    with pytest.raises(ValueError, match="replay_fraction must be 0 with injected_completions"):
        check_rollout_fields(make_args(replay_fraction=0.5, student_fraction=0.5, injected_completions=1))
    scheduled = {"mask_truncated_completions": True, "schedules": {"max_completion_length": 3}}
    with pytest.raises(ValueError, match="mask_truncated_completions must be False"):
        check_rollout_fields(make_args(**scheduled))


@pytest.mark.parametrize(
    "fields, changes, message",
    [
        ({"student_fraction": 0.5}, {"_is_vlm": True}, "vision-language student"),
        ({"student_fraction": 0.5}, {"rollout_func": print}, "They make the rollouts"),
        ({"student_fraction": 0.5, "replay_fraction": 0.5, "replay_size": 3}, {}, "generation batch, 4 completions"),
    ],
)
def test_a_run_that_cannot_be_is_refused(fields, changes, message):
    trainer = make_trainer(**fields)
    vars(trainer).update(changes)
    with pytest.raises(ValueError, match=message):
        RolloutSources(trainer)
