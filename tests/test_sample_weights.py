"""Weights of completions against their formulas, and running pass rates."""

import json
import math
import subprocess
import sys

import pytest
import torch

from trl_opd.sample_weights import (
    SAMPLE_WEIGHTINGS,
    PassRates,
    SampleStats,
    prompt_key,
    resolve_sample_weighting,
    sample_weights,
)

RATES = torch.tensor([0.0, 0.125, 0.5, 0.875, 1.0], dtype=torch.float64)
DRIFT = torch.tensor([0.0, 0.01, 0.5, 2.0, 30.0], dtype=torch.float64)
STATS = SampleStats(pass_rate=RATES, drift=DRIFT)
ONES = torch.ones(5, dtype=torch.float64)


def weigh(spec, stats=STATS):
    size = next(len(x) for x in vars(stats).values() if x is not None)
    return sample_weights(resolve_sample_weighting(spec), stats, size, "cpu")


@pytest.mark.parametrize(("a", "b", "scale"), [(1, 1, 1), (1, 1, 4), (2, 0.5, 1), (0, 1, 1), (1, 0, 3)])
def test_beta_kernel(a, b, scale):
    weights = weigh({"beta_kernel": {"a": a, "b": b, "scale": scale}})
    expected = [scale * p**a * (1 - p) ** b for p in RATES.tolist()]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_beta_kernel_vanishes_where_nothing_or_everything_passes():
    assert weigh("beta_kernel").tolist()[::4] == [0.0, 0.0]
    assert weigh({"beta_kernel": {"scale": 4}})[2] == 1.0


def test_freshness():
    expected = [math.exp(-0.5 * d) for d in DRIFT.tolist()]
    torch.testing.assert_close(weigh({"freshness": {"kappa": 0.5}}), torch.tensor(expected, dtype=torch.float64))
    fresh = SampleStats(drift=torch.zeros(5, dtype=torch.float64))
    assert torch.equal(weigh({"freshness": {"kappa": 7.0}}, fresh), ONES)


@pytest.mark.parametrize(
    "spec", [{"beta_kernel": {"a": 0, "b": 0}}, {"freshness": {"kappa": 0.0}}, {"freshness": {"kappa": 0}}, {}]
)
def test_identities_are_bit_equal_to_ones(spec):
    weights = weigh(spec)
    assert torch.equal(weights, ONES.to(weights.dtype))


def old(stats, months=1):
    return 1.0 / (1.0 + months * stats.age)


def test_several_multiply_and_functions_are_weightings():
    assert torch.equal(weigh({"beta_kernel": {}, "freshness": None}), weigh("beta_kernel") * weigh("freshness"))
    stats = SampleStats(age=torch.tensor([0, 1, 3]))
    assert weigh(old, stats).tolist() == [1.0, 0.5, 0.25]
    assert weigh({"test_sample_weights.old": {"months": 3}}, stats).tolist() == pytest.approx([1.0, 0.25, 0.1])


def test_weights_carry_no_gradient():
    rates = RATES.clone().requires_grad_()
    assert not weigh("beta_kernel", SampleStats(pass_rate=rates)).requires_grad


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("beta", r"sample_weighting must be a known name .* got 'beta'\. Did you mean 'beta_kernel'\?"),
        (
            {"beta_kernel": {"a": -1}},
            r"sample_weighting\['beta_kernel'\]\['a'\] must be a finite number of at least 0",
        ),
        ({"beta_kernel": {"scale": 0}}, r"\['scale'\] must be a finite number above 0, got 0"),
        ({"freshness": {"kappa": math.inf}}, r"\['kappa'\] must be a finite number of at least 0, got inf"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_sample_weighting(spec)


@pytest.mark.parametrize("name", SAMPLE_WEIGHTINGS)
def test_bad_statistics(name):
    (resolved,) = resolve_sample_weighting(name)
    (need,) = resolved.needs
    with pytest.raises(ValueError, match=f"SampleStats.{need} must be known to weigh by it, got None"):
        weigh(name, SampleStats(age=ONES))
    with pytest.raises(ValueError, match=rf"sample_weighting {name!r} must return finite weights, got nan at \(1,\)"):
        weigh(name, SampleStats(**{need: torch.tensor([0.5, math.nan])}))
    with pytest.raises(ValueError, match=r"must return weights of at least 0, got -1 at \(0,\)"):
        weigh(lambda stats: -ONES)


def test_window_counts_the_last_completions():
    rates = PassRates(window=4)
    assert rates.rate("p") is None
    rates.update(["p", "q", "p"], [1, 0, False])
    assert (rates.rate("p"), rates.rate("q")) == (0.5, 0.0)
    rates.update(["p"] * 3, [True, True, 0.5])
    assert rates.rate("p") == (0 + 1 + 1 + 0.5) / 4  # the first of five is forgotten
    rates.update(["p"] * 6, [1, 1, 1, 0, 0, 0])
    assert rates.rate("p") == 0.5  # a generation counts whole, though longer than the window


def test_decay_averages_updates():
    rates = PassRates(window=None, decay=0.75)
    rates.update(["p", "p"], [1, 0])
    assert rates.rate("p") == 0.5
    rates.update(["p", "q"], [1, 1])
    assert (rates.rate("p"), rates.rate("q")) == (0.75 * 0.5 + 0.25, 1.0)


@pytest.mark.parametrize("kwargs", [{"window": 3}, {"window": None, "decay": 0.9}])
def test_state_survives_a_checkpoint(kwargs):
    rates, again = PassRates(**kwargs), PassRates(**kwargs)
    rates.update([[{"role": "user", "content": c}] for c in "abcab"], [1, 0, 0, 1, 1])
    again.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    for side in (rates, again):
        side.update([[{"role": "user", "content": c}] for c in "aab"], [0, 1, 0])
    assert again.state_dict() == rates.state_dict()


def test_a_window_is_loaded_as_an_average():
    rates, average = PassRates(window=4), PassRates(window=None, decay=0.5)
    rates.update(["p"] * 4, [1, 0, 0, 0])
    average.load_state_dict(rates.state_dict())
    assert average.rate("p") == 0.25
    average.update(["p"], [1])
    assert average.rate("p") == 0.625


def test_memory_is_bounded_and_forgets_the_longest_unseen():
    rates = PassRates(max_prompts=2)
    for prompt in ("a", "b", "a", "c"):
        rates.update([prompt], [1])
    assert [rates.rate(prompt) for prompt in "abc"] == [1.0, None, 1.0]
    small = PassRates(max_prompts=1)
    small.load_state_dict(rates.state_dict())
    assert [small.rate(prompt) for prompt in "ac"] == [None, 1.0]


def test_the_order_of_prompts_does_not_matter():
    """The number of processes changes it."""
    one, other = PassRates(max_prompts=3), PassRates(max_prompts=3)
    one.update(["a", "b", "c", "d"], [1, 0, 1, 0])
    other.update(["d", "c", "b", "a"], [0, 1, 0, 1])
    assert json.dumps(one.state_dict()) == json.dumps(other.state_dict())


def test_keys_are_the_same_in_every_process():
    prompt = [{"role": "user", "content": "Ω\ud800"}]
    code = (
        "from trl_opd.sample_weights import prompt_key; print(prompt_key([{'content': 'Ω\\ud800', 'role': 'user'}]))"
    )
    key = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert prompt_key(prompt) == key and len(key) == 16
    assert prompt_key("a") != prompt_key(["a"]) != prompt_key("b")
    assert prompt_key([object()]) == prompt_key([object()])  # an image: no address in the key


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window": 8, "decay": 0.5}, "PassRates must have a window or a decay, got window=8 and decay=0.5"),
        ({"window": None}, "PassRates must have a window or a decay"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"window": None, "decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_pass_rates(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PassRates(**kwargs)


@pytest.mark.parametrize("passed", [-0.5, 2, math.nan])
def test_a_pass_is_a_share(passed):
    with pytest.raises(ValueError, match=r"passes must be in \[0, 1\]"):
        PassRates().update(["p"], [passed])
    with pytest.raises(ValueError):
        PassRates().update(["p", "q"], [1])
