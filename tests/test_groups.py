"""What a generation batch's groups tell about each completion."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_opd.groups import Groups

NAN = float("nan")


def make(**args: Any) -> Groups:
    trainer = SimpleNamespace(
        args=SimpleNamespace(**{"sample_weighting": None, "reward_mix": "add", "reward_mix_kwargs": None, **args}),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(process_index=0, num_processes=1, is_main_process=True),
        num_generations=2,
        num_generations_eval=1,
        has_rewards=True,
        reward_weights=torch.tensor([1.0, 0.5]),
    )
    return Groups(trainer)  # type: ignore[arg-type]


def finish(
    groups: Groups, rewards: list[list[float]], prompts: str = "aabb", completions: Any = None, **marks: Tensor
) -> dict:
    output = {"completion_ids": torch.zeros(len(rewards), 3), **marks}
    groups.begin()
    groups.note_rewards(torch.tensor(rewards))
    groups.finish(output, [{"prompt": p} for p in prompts], completions or ["x"] * len(rewards))
    return output


def test_rewards_are_weighted_and_stand_by_groups():
    output = finish(make(), [[1, 0], [0, 2], [NAN, 4], [NAN, NAN]])
    expected: Tensor = torch.tensor([1.0, 1.0, 2.0, NAN])
    torch.testing.assert_close(output["rewards"], expected, equal_nan=True)
    torch.testing.assert_close(output["group_rewards"], expected.view(2, 2).repeat_interleave(2, 0), equal_nan=True)
    assert "pass_rate" not in output


def test_pass_rates_run_over_the_batches():
    groups = make(sample_weighting="beta_kernel")
    first = finish(groups, [[1, 0], [0, 0], [0, 0], [0, 0]])
    assert first["pass_rate"].tolist() == [0.5, 0.5, 0.0, 0.0]
    second = finish(groups, [[1, 0], [1, 0], [1, 0], [NAN, NAN]])
    assert second["pass_rate"].tolist() == pytest.approx([0.75, 0.75, 1 / 3, 1 / 3])


def test_evaluation_reads_the_rates_and_does_not_move_them():
    groups = make(sample_weighting="beta_kernel")
    finish(groups, [[1, 0], [0, 0], [0, 0], [0, 0]])
    groups.trainer.model.training = False
    output = finish(groups, [[1, 0], [0, 0], [1, 0], [NAN, NAN]], prompts="abcd")
    assert output["pass_rate"].tolist() == pytest.approx([2 / 3, 0.0, 1.0, 0.5])  # nothing is known of d
    assert groups.pass_rates.rate("a") == 0.5
    assert groups.pass_rates.rate("c") is None


def test_pass_rates_are_of_the_students_completions():
    groups = make(sample_weighting="beta_kernel")
    others = torch.tensor([True, False, False, False])
    output = finish(groups, [[0, 0], [1, 0], [1, 0], [1, 0]], on_policy=others)
    assert output["pass_rate"].tolist() == [0.0, 0.0, 0.5, 0.5]  # the student has not written for b


def test_a_column_of_pass_rates_wins():
    groups = make(sample_weighting="beta_kernel")
    output = {"completion_ids": torch.zeros(2, 3)}
    groups.begin()
    groups.note_rewards(torch.tensor([[1.0, 0], [0, 0]]))
    groups.finish(output, [{"prompt": "a", "pass_rate": 0.25}] * 2, ["x", "y"])
    assert output["pass_rate"].tolist() == [0.25, 0.25]


def first_word(completion: str) -> str:
    return completion.split()[0]


def test_agreement_is_of_the_answers():
    kwargs = {"on": "consensus", "threshold": 1.0, "answer": f"{__name__}.first_word"}
    groups = make(reward_mix="gate", reward_mix_kwargs=kwargs)
    output = finish(groups, [[0, 0]] * 4, completions=["7 yes", "7 no", "1", "2"])
    assert output["consensus"].tolist() == [1.0, 1.0, 0.5, 0.5]


def test_the_rates_survive_a_checkpoint(tmp_path):
    groups = make(sample_weighting="beta_kernel")
    finish(groups, [[1, 0], [0, 0], [0, 0], [0, 0]])
    groups.save_state(str(tmp_path))
    resumed = make(sample_weighting="beta_kernel")
    resumed.load_state(str(tmp_path))
    assert resumed.pass_rates.rate("a") == 0.5
    assert resumed.pass_rates.rate("b") == 0.0
