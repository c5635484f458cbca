"""Sums along a completion, against sums token by token and the gradients of all sequences; and their scale."""

import pytest
import torch
from sequences import EVERY_TOKEN, MASK, ROWS, V, along, by_hand, mean_gradient, normal, two_steps

from trl_opd.credit import mean_and_std, moment_sums, sampled_advantages, telescoped_returns, whitened


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("horizon", [None, 1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("normalize_length", [False, True])
@pytest.mark.parametrize("from_next", [False, True])
def test_advantages_are_discounted_sums_of_the_gaps_that_count(discount, horizon, normalize_length, from_next):
    student, teacher = normal(4, 7, seed=8), normal(4, 7, seed=9)
    options = {"horizon": horizon, "normalize_length": normalize_length, "from_next": from_next}
    ours = sampled_advantages(student, teacher, MASK, discount, **options)
    torch.testing.assert_close(ours, by_hand(teacher - student, MASK, discount, **options))


@pytest.mark.parametrize(("discount", "horizon"), [(1.0, None), (0.99, None), (1.0, 37), (0.5, 1000)])
def test_long_completions_lose_no_precision(discount, horizon):
    gap = normal(1, 3000, seed=15).float()
    mask = normal(1, 3000, seed=16) > -0.5
    ours = sampled_advantages(torch.zeros_like(gap), gap, mask, discount, horizon=horizon)
    positions = torch.arange(3000)[mask[0]]
    kept, distances = gap.double()[mask], positions[None, :] - positions[:, None]
    within = (torch.arange(len(kept))[None, :] - torch.arange(len(kept))[:, None]) < (horizon or 3000)
    powers = torch.where((distances >= 0) & within, discount ** distances.clamp(min=0).double(), 0.0)
    torch.testing.assert_close(ours[mask].double(), powers @ kept, rtol=1e-5, atol=1e-4)


def test_a_horizon_does_not_see_what_lies_beyond_it():
    gap = normal(1, 9, seed=17)
    gap[0, 6] = float("-inf")
    ours = sampled_advantages(torch.zeros_like(gap), gap, torch.ones(1, 9, dtype=torch.bool), 1.0, horizon=3)
    assert torch.isfinite(ours[0]).tolist() == [True] * 4 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("horizon", [0, -1])
def test_an_empty_horizon_is_refused(horizon):
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=rf"horizon must be at least 1, got {horizon}"):
        sampled_advantages(x, x, x == 0, horizon=horizon)
    with pytest.raises(ValueError, match=rf"horizon must be at least 1, got {horizon}"):
        telescoped_returns(x, x, x == 0, horizon)


@pytest.mark.parametrize("horizon", [1, 2, 3, 4, 7, 50])
def test_telescoped_returns_by_hand(horizon):
    q, best = normal(4, 7, seed=20), normal(4, 7, seed=21)
    expected = torch.zeros(4, 7, dtype=torch.float64)
    for b, row in enumerate(ROWS):
        kept = [t for t, x in enumerate(row) if x]
        for i, t in enumerate(kept):
            for j in range(i, len(kept), horizon):
                expected[b, t] += q[b, kept[j]] - (best[b, kept[j + horizon]] if j + horizon < len(kept) else 0)
    ours = telescoped_returns(q.clone().requires_grad_(), best.clone().requires_grad_(), MASK, horizon)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, expected)
    for x in (q, best):
        x[~MASK] = float("nan")
    assert torch.equal(telescoped_returns(q, best, MASK, horizon), ours)
    if horizon == 1:  # LLMR: the sum of the rewards
        rewards = [q[0, t] - (best[0, t + 1] if t < 6 else 0) for t in range(7)]
        torch.testing.assert_close(ours[0], torch.stack(rewards).flip(0).cumsum(0).flip(0))
    if horizon >= 7:
        torch.testing.assert_close(ours, q.masked_fill(~MASK, 0.0))


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_a_shift_of_the_teachers_logits_telescopes(horizon):
    """To c(s_t), which is a baseline: raw logits and log-probs have one mean gradient."""
    student, _ = two_steps()
    logits = [3 * normal(V, seed=22), 3 * normal(V, V, seed=23)]
    shift = [normal(1, seed=24), normal(V, 1, seed=25)]

    def returns(first, second):
        best = along(first.max().expand(V), second.max(-1, keepdim=True).values.expand(V, V))
        return telescoped_returns(along(first, second), best, EVERY_TOKEN, horizon)

    plain, shifted = returns(*logits), returns(*(z + c for z, c in zip(logits, shift, strict=True)))
    torch.testing.assert_close(shifted - plain, along(shift[0].expand(V), shift[1].expand(V, V)))
    expected = mean_gradient(student, plain)
    torch.testing.assert_close(mean_gradient(student, shifted), expected)
    torch.testing.assert_close(mean_gradient(student, returns(*(z.log_softmax(-1) for z in logits))), expected)


def test_whitened_values_have_mean_0_and_deviation_1():
    values = (5 * normal(4, 7, seed=26) + 3).requires_grad_()
    ours = whitened(values, MASK, eps=0.0)
    kept = ours[MASK]
    assert not ours.requires_grad and (ours[~MASK] == 0).all()
    assert kept.mean().abs() < 1e-12 and kept.std(correction=0).item() == pytest.approx(1.0)
    deviation = values[MASK].std(correction=0)
    torch.testing.assert_close(whitened(values, MASK), ours * deviation / (deviation + 1e-4))
    with torch.no_grad():
        values[~MASK] = float("nan")
    assert torch.equal(whitened(values, MASK, eps=0.0), ours)


def test_processes_whiten_by_the_moments_of_all():
    values = normal(4, 7, seed=27).float()
    sums = moment_sums(values[:1], MASK[:1]) + moment_sums(values[1:], MASK[1:])
    parts = [whitened(values[rows], MASK[rows], mean_and_std(sums)) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), whitened(values, MASK))
    assert parts[0].dtype == torch.float32 and parts[0].sum().abs() > 0.1


@pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK), MASK & (torch.arange(7) == 2) & (MASK[:, :1] == 0)])
def test_there_is_nothing_to_whiten_in_equal_values(mask):
    ours = whitened(torch.full((4, 7), 0.1), mask)
    torch.testing.assert_close(ours, torch.zeros(4, 7), rtol=0, atol=1e-4)
