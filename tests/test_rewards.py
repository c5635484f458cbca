"""Rewards and the teacher's signal in one advantage: by hand, and what must come out unchanged."""

import math

import pytest
import torch

from trl_opd.credit import whitened
from trl_opd.rewards import (
    GATES,
    REWARD_MIXES,
    consensus_share,
    multiply_sign_preserving,
    resolve_reward_mix,
    reward_gate,
)

NAN = math.nan


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_whitening_before_the_mix_is_not_whitening_after_it():
    rewards, distill, mask = normal(6, 1, seed=2), 5 * normal(6, 4, seed=3) - 3, torch.ones(6, 4, dtype=torch.bool)

    def add(rewards, distill, reward_coef=1.0, distill_coef=1.0):
        return reward_coef * rewards + distill_coef * distill

    before = add(rewards, whitened(distill, mask), distill_coef=0.1)
    after = whitened(add(rewards, distill, distill_coef=0.1), mask)
    assert (before - after).abs().max() > 0.3
    # Before: the coefficient is the teacher's share against a reward's deviation of 1, whatever the gaps' scale
    torch.testing.assert_close(add(rewards, whitened(7 * distill, mask), distill_coef=0.1), before, rtol=0, atol=1e-4)
    # After: the sum's deviation is 1, and one factor on both coefficients changes nothing
    assert after.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    scaled = whitened(add(rewards, distill, reward_coef=7.0, distill_coef=0.7), mask)
    torch.testing.assert_close(scaled, after, rtol=0, atol=1e-3)
    # ... and the mean that is taken off gives tokens without any signal an advantage
    silent = whitened(torch.cat([add(rewards, distill), torch.zeros(1, 4)]), torch.ones(7, 4, dtype=torch.bool))
    assert silent[-1].abs().min() > 0.1


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize(("strength", "clip"), [(0.5, 0.2), (1.0, 0.9), (0.3, 0.0)])
def test_the_reward_says_which_way_and_the_teacher_how_far(width, strength, clip):
    advantages, gap = normal(4, width, seed=4).requires_grad_(), normal(4, 5, seed=5).requires_grad_()
    ours = multiply_sign_preserving(advantages, gap, strength, clip)
    assert not ours.requires_grad
    for b in range(4):
        for t in range(5):
            a, ell = advantages[b, t % width].item(), gap[b, t].item()
            weight = min(max(math.exp(math.copysign(1, a) * ell), 1 - clip), 1 + clip)
            assert ours[b, t].item() == pytest.approx(a * ((1 - strength) + strength * weight))
            assert ours[b, t] * a > 0
            if clip and ell:  # more of a reward where the teacher likes the token better, less of a punishment
                assert (ours[b, t] > a) == (ell > 0)


def test_no_strength_no_gap_and_no_advantage_leave_the_rewards_as_they_are():
    advantages, gap = normal(4, 1, seed=6).float(), 100 * normal(4, 5, seed=7).float()
    assert torch.equal(multiply_sign_preserving(advantages, gap, 0.0), advantages.expand(4, 5))
    assert torch.equal(multiply_sign_preserving(advantages, torch.zeros(4, 5), 0.25), advantages.expand(4, 5))
    assert (multiply_sign_preserving(torch.zeros(4, 1), gap) == 0).all()
    infinite = torch.tensor([[math.inf, -math.inf]])
    torch.testing.assert_close(multiply_sign_preserving(torch.tensor([[2.0]]), infinite), torch.tensor([[2.2, 1.8]]))
    mask = torch.tensor([[True, False, True, True, False]]).expand(4, 5)
    ours = multiply_sign_preserving(advantages, gap.masked_fill(~mask, NAN), mask=mask)
    assert torch.equal(ours[~mask], advantages.expand(4, 5)[~mask]) and not ours.isnan().any()
    assert torch.equal(ours[mask], multiply_sign_preserving(advantages, gap)[mask])


# Groups of three: all pass, some, none, one not scored, none scored
GROUPS = torch.tensor([[1.0, 1.0, 2.0], [1.0, 0.5, 0.0], [0.5, 0.0, -1.0], [1.0, NAN, 0.0], [NAN, NAN, NAN]])
GROUPS = torch.cat([GROUPS, torch.tensor([[1.0, 1.0, NAN], [NAN, 0.0, 0.0]])])
EXPECTED = {
    "success": [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
    "failure": [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    "group_failure": [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    "group_success": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
    "mixed_group": [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_gates_by_reward(kind):
    gate = reward_gate(kind, GROUPS.flatten(), GROUPS.repeat_interleave(3, dim=0), 1.0)
    assert gate.dtype == torch.float32 and gate.tolist() == EXPECTED[kind]


def test_the_gate_by_consensus_asks_for_no_rewards():
    rewards, shares = torch.full((4,), NAN), torch.tensor([0.0, 0.5, 0.75, 1.0])
    assert reward_gate("consensus", rewards, rewards[:, None], 0.75, consensus=shares).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="consensus must be given with kind='consensus', got None"):
        reward_gate("consensus", rewards, rewards[:, None], 0.75)
    assert set(GATES) == {*EXPECTED, "consensus"}


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match=r"kind must be a known name, got 'sucess'\. Did you mean 'success'"):
        reward_gate("sucess", torch.zeros(2), torch.zeros(2, 1), 1.0)


def test_the_share_of_a_group_that_agrees():
    answers = ["a", "b", "a", None, None, None, 1, 2, 3, "x", None, None]
    assert consensus_share(answers, 3) == pytest.approx([2 / 3] * 3 + [0] * 3 + [1 / 3] * 3 + [1 / 3] * 3)
    assert consensus_share([("t", 1), ("t", 1)], 2) == [1, 1]
    assert consensus_share([], 4) == []


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_group_is_whole(size):
    with pytest.raises(ValueError, match=f"group_size must be a divisor of the 3 completions, got {size}"):
        consensus_share([1, 2, 3], size)


def test_reward_mixes_and_their_defaults():
    defaults = {
        "add": {},
        "multiply": {"strength": 0.5, "clip": 0.2},
        "gate": {"on": "success", "threshold": 1.0, "answer": None},
    }
    assert {name: resolve_reward_mix(name)[1] for name in REWARD_MIXES} == defaults
    assert resolve_reward_mix("multiply", {"strength": 1}) == ("multiply", {"strength": 1.0, "clip": 0.2})
    given = {"on": "consensus", "threshold": 0.5, "answer": "module.answer"}
    assert resolve_reward_mix("gate", given) == ("gate", given)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("multiplied", None, r"reward_mix must be a known name, got 'multiplied'\. Did you mean 'multiply'"),
        ("add", {"coef": 1}, r"reward_mix_kwargs has 'coef', but add takes no parameters"),
        ("multiply", {"strenght": 1}, r"has 'strenght', but multiply takes strength, clip\. Remove it or rename it"),
        ("multiply", {"strength": 1.1}, r"reward_mix_kwargs\['strength'\] of multiply must be in \[0, 1\], got 1\.1"),
        ("multiply", {"strength": True}, r"'strength'\] of multiply must be in \[0, 1\], got True"),
        ("multiply", {"strength": "0.5"}, r"'strength'\] of multiply must be in \[0, 1\], got '0\.5'"),
        ("multiply", {"clip": 1.0}, r"'clip'\] of multiply must be in \[0, 1\), so that no sign .* got 1\.0"),
        ("gate", {"on": "wins"}, r"'on'\] of gate must be one of success, failure, .*got 'wins'"),
        ("gate", {"threshold": math.inf}, r"'threshold'\] of gate must be a finite number, got inf"),
        ("gate", {"on": "consensus", "threshold": 2}, r"must be in \(0, 1\] with on='consensus', got 2\.0"),
        ("gate", {"on": "consensus", "threshold": 0}, r"must be in \(0, 1\] with on='consensus', got 0\.0"),
        ("gate", {"answer": "module.answer"}, r"'answer'\] of gate must be unset with on='success', got 'module"),
        ("gate", {"on": "consensus", "answer": "answer"}, r"must be an import path 'module\.function'.*got 'answer'"),
    ],
)
def test_bad_reward_mixes_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward_mix(name, kwargs)
