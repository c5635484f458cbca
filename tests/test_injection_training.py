"""Off-policy members in the student's groups: always, and where a group failed; in two processes, too."""

from pathlib import Path

import pytest
import torch
from processes import run_two
from rollout_runs import (
    COMPLETIONS,
    TOKENIZER,
    Judge,
    build,
    completion_of,
    ids_of,
    in_order,
    make_rows,
    pairs,
    written,
)


def length_reward(completions, **kwargs):
    return [float(len(text)) for text in completions]


INJECT = {"num_generations": 4, "per_device_train_batch_size": 8, "shuffle_dataset": False}


def test_injected_members_are_the_last_of_their_groups(tmp_path):
    fields = {**INJECT, "rewards": length_reward, "max_steps": 1, "rows": make_rows(several=True)}
    ours = build(tmp_path, injected_completions=2, **fields)
    (mixed,) = in_order(ours)
    (own,) = in_order(build(tmp_path, **fields))
    assert mixed["on_policy"].tolist() == [True, True, False, False] * 2 and "on_policy" not in own
    for i, (pair, sampled) in enumerate(zip(pairs(mixed), pairs(own), strict=True)):
        assert pair[0] == sampled[0]
        if i % 4 < 2:
            assert pair == sampled  # the student samples as it would have
        else:
            text = completion_of(pair[0])
            assert pair[1] == tuple(written(text + "z" * (i % 4 - 2)))
    assert ours.state.log_history[0]["rollout/student_share"] == 0.5
    rewards = torch.tensor(
        [length_reward([TOKENIZER.decode(p[1], skip_special_tokens=True)])[0] for p in pairs(mixed)]
    )
    groups = rewards.view(-1, 4)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    assert torch.allclose(mixed["advantages"].float(), expected, atol=1e-4)


def test_only_failed_groups_are_injected(tmp_path):
    firsts = {ids_of(text)[0] for text in COMPLETIONS.values()}
    judge = Judge(set(range(0, 50, 3)) - firsts)  # what the dataset has never passes: groups stay failed
    trainer = build(tmp_path, rewards=judge, injected_completions=1, injected_when="group_failure", **INJECT)
    outputs = in_order(trainer)
    kinds = []
    for output in outputs:
        marks = output["on_policy"].view(-1, 4).tolist()
        for group, mark in enumerate(marks):
            completions = [pair[1] for pair in pairs(output)][4 * group : 4 * group + 4]
            passed = any(ids[0] in judge.accepts for ids in completions)
            assert mark == [True, True, True, passed]
            kinds.append(passed)
            if not passed:
                text = completion_of(pairs(output)[4 * group][0])
                assert completions[3] == tuple(written(text))
    assert set(kinds) == {True, False}


def test_rewards_are_those_of_the_batch_that_is_trained_on(tmp_path):
    firsts = {ids_of(text)[0] for text in COMPLETIONS.values()}
    judge = Judge(firsts)
    trainer = build(tmp_path, rewards=judge, injected_completions=1, injected_when="group_failure", **INJECT)
    outputs = in_order(trainer)
    second = sum(bool((~output["on_policy"]).any()) for output in outputs)
    assert judge.calls == len(outputs) + second > len(outputs)  # twice where a group failed
    for output, line in zip(outputs, trainer.state.log_history, strict=False):
        rewards = torch.tensor([float(ids[0] in judge.accepts) for _, ids in pairs(output)])
        assert line["reward"] == pytest.approx(float(rewards.mean()))
        assert (rewards.view(-1, 4).sum(1) > 0).all()  # the dataset's pass
        advantages = rewards.view(-1, 4) - rewards.view(-1, 4).mean(1, keepdim=True)
        assert torch.equal(output["advantages"].sign(), advantages.flatten().sign())
    judged = [line["judged"] for line in trainer.state.log_history if "judged" in line]
    assert all(value == int(value) for value in judged)  # of the call that counts, not a mean over two


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made."""
    folder = tmp_path_factory.mktemp("two")
    run_two(str(Path(__file__).with_name("rollout_runs.py")), folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_take_the_same_source_and_keep_groups_whole(two):
    (first, _), (second, _) = (result["whole"] for result in two)
    kinds = []
    for here, there in zip(first, second, strict=True):
        assert here["on_policy"] == there["on_policy"] and len(set(here["on_policy"])) == 1
        assert here["sampled_step"] == there["sampled_step"]
        group = [*here["pairs"], *there["pairs"]]
        assert len({prompt for prompt, _ in group}) == 1  # one prompt's four completions
        text = completion_of(group[0][0])
        dataset = [completion for _, completion in group] == [tuple(written(text + x)) for x in "hijk"]
        kinds.append("student" if here["on_policy"][0] else "dataset" if dataset else "replay")
    assert set(kinds) == {"student", "dataset", "replay"}
    assert "replay" in kinds[5:]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_resume_with_the_same_draws(two):
    for result in two:
        (whole, logs), (resumed, again) = result["whole"], result["resumed"]
        assert resumed == whole[5:] and again[:-1] == logs[:-1]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_group_over_two_processes_fails_as_one(two):
    (first, calls), (second, others) = (result["failing"] for result in two)
    failed = 0
    for here, there in zip(first, second, strict=True):
        assert here["on_policy"] == [True, True]
        assert there["on_policy"] in ([True, True], [True, False])
        failed += not there["on_policy"][1]
        firsts = {ids_of(text)[0] for text in COMPLETIONS.values()}
        assert any(completion[0] in firsts for _, completion in [*here["pairs"], *there["pairs"]])
    assert 0 < failed < len(first) and calls == others == len(first) + failed


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failure_of_one_process_stops_both(two):
    messages = [result["stopped"] for result in two]
    assert "out of ink" in messages[1] and "on another process" in messages[0]
    assert all("No step was taken" in message for message in messages)
