"""Advantages of the f-divergences: u f′(u) − f(u), and by enumeration of a vocabulary the divergence's gradient."""

import math

import pytest
import torch

from trl_opd.credit import POLICY_GRADIENT_DIVERGENCES, f_advantages
from trl_opd.losses import DIVERGENCES

V = 7
# The generator of each divergence: D = Σ s f(t / s)
GENERATORS = {
    "reverse_kl": lambda u: -u.log(),
    "forward_kl": lambda u: u * u.log(),
    "generalized_jsd": lambda u, beta: (
        beta * u * (u / (beta * u + 1 - beta)).log() - (1 - beta) * (beta * u + 1 - beta).log()
    ),
    "skew_forward_kl": lambda u, skew: u * (u / (skew * u + 1 - skew)).log(),
    "skew_reverse_kl": lambda u, skew: -(skew + (1 - skew) * u).log(),
    "total_variation": lambda u: (u - 1).abs() / 2,
    "alpha_divergence": lambda u, alpha: (1 - u**alpha) / (alpha * (1 - alpha)),
}
SETTINGS = [
    ("reverse_kl", {}),
    ("forward_kl", {}),
    *(("generalized_jsd", {"beta": x}) for x in (0.1, 0.5, 0.9)),
    *(("skew_forward_kl", {"skew": x}) for x in (0.1, 0.7)),
    *(("skew_reverse_kl", {"skew": x}) for x in (0.1, 0.7)),
    ("total_variation", {}),
    *(("alpha_divergence", {"alpha": x}) for x in (-0.5, 0.5, 2.0)),
]
each_setting = pytest.mark.parametrize(("name", "params"), SETTINGS)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_f_divergence_is_tested():
    assert list(POLICY_GRADIENT_DIVERGENCES) == list(GENERATORS) == list(dict.fromkeys(name for name, _ in SETTINGS))


@each_setting
def test_it_is_u_times_the_generators_slope_minus_the_generator(name, params):
    u = torch.logspace(-2, 2, 24, dtype=torch.float64, requires_grad=True)

    def advantages(u):
        f = GENERATORS[name](u, **params)
        return u * torch.autograd.grad(f.sum(), u)[0] - f

    # f up to c (u − 1): the constant that makes A(1) = 0. The slope of |u − 1| at 1 is 0.
    constant = advantages(torch.ones(1, dtype=torch.float64, requires_grad=True))
    ours = f_advantages(u.log(), name, params)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, (advantages(u) - constant).detach())
    assert (ours.diff() >= 0).all()


@each_setting
@pytest.mark.parametrize("seed", [0, 1])
def test_its_mean_policy_gradient_is_the_divergences(name, params, seed):
    """I4: and that of −f(u) is not, but for the reverse KL."""
    z, t = logits(seed).requires_grad_(), (2 * logits(seed + 10)).log_softmax(-1)
    s = z.log_softmax(-1)

    def mean(advantages):
        return torch.autograd.grad(-(s.detach().exp() * advantages * s).sum(), z, retain_graph=True)[0]

    expected = torch.autograd.grad(DIVERGENCES[name](z.log_softmax(-1), t, **params), z)[0]
    torch.testing.assert_close(mean(f_advantages(t - s, name, params)), expected)
    naive = mean(-GENERATORS[name]((t - s).detach().exp(), **params))
    gap = (naive - expected).abs().max()
    assert gap < 1e-12 if name == "reverse_kl" else gap > 0.05 * expected.abs().max()


@each_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_have_none_and_large_gaps_are_finite(name, params, dtype):
    log_ratio = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 80, -80, 1e4, -1e4, 1e30, -1e30, -math.inf], dtype=dtype)
    ours = f_advantages(log_ratio, name, params)
    assert ours.dtype == dtype and (ours[:2] == 0).all()
    assert torch.isfinite(ours[:-1]).all() and not ours.isnan().any()
    assert (ours[2::2][:4] > 0).all() and (ours[3::2] < 0).all()
    assert ours[:8].square().sum().isfinite()  # which whitening needs
    # As exact near 1 as far from it
    slope = ours[2:4] / log_ratio[2:4]
    if name != "total_variation":
        torch.testing.assert_close(slope[0], slope[1], rtol=1e-3, atol=0)


def test_special_cases_and_limits():
    gap = torch.linspace(-3, 3, 13, dtype=torch.float64)
    reverse, forward = gap, gap.expm1()
    for name, params, expected in (
        ("generalized_jsd", {"beta": 0.0}, forward),
        ("generalized_jsd", {"beta": 1.0}, reverse),
        ("alpha_divergence", {"alpha": 0.0}, reverse),
        ("alpha_divergence", {"alpha": 1.0}, forward),
        ("skew_forward_kl", {"skew": 0.0}, forward),
        ("skew_reverse_kl", {"skew": 0.0}, reverse),
        ("alpha_divergence", {"alpha": 2.0}, (gap.exp() ** 2 - 1) / 2),
        ("generalized_jsd", None, 0.5 * ((1 + gap.exp()) / 2).log()),
    ):
        torch.testing.assert_close(f_advantages(gap, name, params), expected)
    for params, scale, expected in (({"beta": 1e-7}, 1e-7, forward), ({"beta": 1 - 1e-7}, 1e-7, reverse)):
        torch.testing.assert_close(
            f_advantages(gap, "generalized_jsd", params) / scale, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["todi", "adaptive_kl", "alpha_beta_divergence"])
def test_a_divergence_without_a_generator_is_refused(name):
    with pytest.raises(ValueError, match=rf"must be an f-divergence for sampled advantages, got '{name}'.*Valid: rev"):
        f_advantages(torch.zeros(2), name, {})


def test_a_skewed_reverse_kl_whose_mixture_is_detached():
    z, t = logits(3).requires_grad_(), (2 * logits(4)).log_softmax(-1)
    s, params = z.log_softmax(-1), {"skew": 0.3, "detached": 1}
    advantages = f_advantages(t - s, "skew_reverse_kl", params)
    ours = torch.autograd.grad(-(s.detach().exp() * advantages * s).sum(), z, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(DIVERGENCES["skew_reverse_kl"](s, t, **params), z))


def test_unknown_names_and_parameters_are_refused():
    with pytest.raises(ValueError, match=r"got 'reverse_k'\. Did you mean 'reverse_kl'"):
        f_advantages(torch.zeros(2), "reverse_k", {})
    with pytest.raises(ValueError, match=r"divergence_kwargs\['beta'\] .* must be in \[0, 1\], got 2"):
        f_advantages(torch.zeros(2), "generalized_jsd", {"beta": 2})
