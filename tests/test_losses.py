"""The ten divergences against formulas over probabilities (textbook.py), their gradients, and what is always true."""

import inspect
import math

import pytest
import torch
from textbook import CASES, F_DIVERGENCES, divergence

from trl_opd import losses

NAMES = list(CASES)
SPACES = [
    ("generalized_jsd", "beta", (0.0, 0.1, 0.5, 0.9, 1.0)),
    ("skew_forward_kl", "skew", (0.0, 0.1, 0.9)),
    ("skew_reverse_kl", "skew", (0.0, 0.1, 0.9)),
    ("alpha_divergence", "alpha", (-1.0, 0.5, 0.9, 2.0)),
    ("todi", "scale", (0.0, 1.0, 4.0)),
    ("adaptive_kl", "head_mass", (0.1, 0.5, 0.9, 1.0)),
]


def make_logits(seed: int = 0, shape: tuple[int, ...] = (4, 9), spread: float = 1.5) -> tuple:
    """Student logits (with gradient) and teacher log-probs in float64."""
    generator = torch.Generator().manual_seed(seed)
    z, zt = (spread * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), zt.log_softmax(-1)


def ours(name: str, z: torch.Tensor, teacher_logprobs: torch.Tensor, **params: float) -> torch.Tensor:
    return getattr(losses, name)(z.log_softmax(-1), teacher_logprobs, **(params or CASES[name][1]))


def gradient(values: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), z)[0]


def test_the_names_are_the_contract():
    assert list(losses.DIVERGENCES) == NAMES
    for name in NAMES:
        parameters = list(inspect.signature(losses.DIVERGENCES[name]).parameters)
        assert parameters == ["student_logprobs", "teacher_logprobs", *CASES[name][1]]


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_textbook(name):
    z, lt = make_logits(shape=(2, 3, 9))
    value, truth = ours(name, z, lt), divergence(name, z.softmax(-1), lt.exp())
    assert value.shape == (2, 3)
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient(value, z), gradient(truth, z), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "params"),
    [(name, {key: x}) for name, key, values in SPACES for x in values]
    + [
        ("alpha_beta_divergence", {"alpha": a, "beta": b}) for a, b in ((0.2, 0.7), (1.5, 0.5), (0.8, -0.3), (-0.5, 2))
    ],
)
def test_every_parameter_value_equals_the_textbook(name, params):
    z, lt = make_logits(1)
    value, truth = ours(name, z, lt, **params), CASES[name][0](z.softmax(-1), lt.exp(), **params)
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient(value, z), gradient(truth, z), rtol=1e-10, atol=1e-12)


# The weights of the other two are detached, so that finite differences see another function
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("todi", "adaptive_kl")])
def test_gradcheck(name):
    z, lt = make_logits(2, shape=(2, 5))
    assert torch.autograd.gradcheck(lambda z: ours(name, z, lt), (z,))


def test_todi_gradient_is_a_finite_difference_with_its_weight_held():
    z, lt = make_logits(3, shape=(5,))
    t, weight = lt.exp(), 1 / (1 + (z.softmax(-1) / lt.exp()).detach() ** 1.3)

    def held(z):
        s = z.detach().softmax(-1)
        return float((weight * t * (t / s).log() + (1 - weight) * s * (s / t).log()).sum())

    numeric = [(held(z + e) - held(z - e)) / 2e-6 for e in 1e-6 * torch.eye(5, dtype=torch.float64)]
    torch.testing.assert_close(gradient(ours("todi", z, lt), z).tolist(), numeric, rtol=1e-7, atol=1e-8)


def test_the_kl_gradients_have_their_closed_forms():
    """I2."""
    z, lt = make_logits(4)
    s, t = z.softmax(-1), lt.exp()
    torch.testing.assert_close(gradient(losses.forward_kl(z.log_softmax(-1), lt), z), s - t)
    gap = (s / t).log()
    reverse = (s * gap).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient(losses.reverse_kl(z.log_softmax(-1), lt), z), s * (gap - reverse))


def test_jsd_tends_to_zero_and_its_scaled_limits_are_the_kls():
    """I6; the KLs that the code returns at β = 0 and 1 are a special case and not the limit."""
    z, lt = make_logits(5)
    ls = z.log_softmax(-1).detach()
    forward, reverse = losses.forward_kl(ls, lt), losses.reverse_kl(ls, lt)
    small = losses.generalized_jsd(ls, lt, beta=1e-7)
    large = losses.generalized_jsd(ls, lt, beta=1 - 1e-7)
    assert small.max() < 1e-5 and large.max() < 1e-5
    torch.testing.assert_close(small / 1e-7, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(large / 1e-7, reverse, rtol=1e-4, atol=0)
    assert torch.equal(losses.generalized_jsd(ls, lt, beta=0.0), forward)
    assert torch.equal(losses.generalized_jsd(ls, lt, beta=1.0), reverse)


def test_skew_zero_is_the_kl_skew_one_is_zero_and_minus_log_skew_bounds_it():
    """I7."""
    z, lt = make_logits(6, spread=8.0)
    ls = z.log_softmax(-1).detach()
    for skewed, plain in (
        (losses.skew_forward_kl, losses.forward_kl),
        (losses.skew_reverse_kl, losses.reverse_kl),
    ):
        torch.testing.assert_close(skewed(ls, lt, skew=0.0), plain(ls, lt))
        torch.testing.assert_close(skewed(ls, lt, skew=1.0), torch.zeros(4).double())
        assert plain(ls, lt).max() > -math.log(0.1)
        for skew in (0.1, 0.5, 0.9):
            assert (skewed(ls, lt, skew=skew) <= -math.log(skew)).all()


def test_alpha_limits_are_the_kls():
    z, lt = make_logits(7)
    ls = z.log_softmax(-1).detach()
    for alpha, kl in ((1.0, losses.forward_kl), (0.0, losses.reverse_kl)):
        assert torch.equal(losses.alpha_divergence(ls, lt, alpha=alpha), kl(ls, lt))
        near = losses.alpha_divergence(ls, lt, alpha=abs(alpha - 1e-6))
        torch.testing.assert_close(near, kl(ls, lt), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_value_and_gradient_zero(name):
    """I16."""
    z, _ = make_logits(8)
    value = ours(name, z, z.detach().log_softmax(-1))
    # 1 - Σ of an α-divergence is off by one rounding, divided by α (1 - α)
    torch.testing.assert_close(value, torch.zeros(4).double(), rtol=0, atol=5e-15)
    torch.testing.assert_close(gradient(value, z), torch.zeros_like(z), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_different_distributions_have_a_positive_value(name):
    for seed in range(20):
        z, lt = make_logits(seed, spread=0.02 + seed / 4)
        assert (ours(name, z, lt) > 0).all()


def test_bounds():
    z, lt = make_logits(9, shape=(200, 7), spread=10.0)
    ls = z.log_softmax(-1)
    assert 0.6 < losses.generalized_jsd(ls, lt).max() <= math.log(2)
    assert 0.9 < losses.total_variation(ls, lt).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_shifting_logits_and_permuting_entries_change_nothing(name):
    z, lt = make_logits(10)
    value = ours(name, z, lt)
    torch.testing.assert_close(ours(name, z + 3.7, (lt - 2.2).log_softmax(-1)), value, rtol=1e-12, atol=1e-13)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(name, z[:, order], lt[:, order]), value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_mix(name):
    z, lt = make_logits(11)
    value = ours(name, z, lt)
    for i in range(4):
        torch.testing.assert_close(ours(name, z[i], lt[i]), value[i], rtol=1e-13, atol=1e-15)
        assert gradient(ours(name, z, lt)[i], z)[[j for j in range(4) if j != i]].abs().max() == 0


TEACHER_ZERO, STUDENT_ZERO, BOTH_ZERO = ([4], []), ([], [2]), ([4, 5], [4, 5])
UNBOUNDED = {"todi", "adaptive_kl"}


def with_zeros(logits: torch.Tensor, entries: list[int], value: float) -> torch.Tensor:
    return logits.detach().index_fill(-1, torch.tensor(entries, dtype=torch.long), value)


@pytest.mark.parametrize(
    ("name", "zeros"),
    [(name, BOTH_ZERO) for name in NAMES]
    + [(name, TEACHER_ZERO) for name in NAMES if name not in UNBOUNDED | {"reverse_kl"}]
    + [(name, STUDENT_ZERO) for name in NAMES if name not in UNBOUNDED | {"forward_kl"}]
    + [(name, ([4, 1], [2, 1])) for name in F_DIVERGENCES if not name.endswith("e_kl") and name != "forward_kl"],
)
def test_probability_zero_is_the_limit_of_small_probabilities(name, zeros):
    z, lt = make_logits(12)
    tiny = math.log(1e-300)
    z_limit = with_zeros(z, zeros[1], tiny).requires_grad_()
    truth = divergence(name, z_limit.softmax(-1), with_zeros(lt, zeros[0], tiny).softmax(-1))
    z_zero = with_zeros(z, zeros[1], -math.inf).requires_grad_()
    value = ours(name, z_zero, with_zeros(lt, zeros[0], -math.inf).log_softmax(-1))
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient(value, z_zero), gradient(truth, z_limit), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("alpha_divergence", {"alpha": 2.0}),
        ("alpha_divergence", {"alpha": -1.0}),
        ("alpha_beta_divergence", {"alpha": 0.8, "beta": -0.3}),
        ("alpha_beta_divergence", {"alpha": -0.3, "beta": 0.8}),
    ],
)
def test_an_entry_that_neither_has_adds_nothing_at_powers_of_either_sign(name, params):
    z, lt = make_logits(13)
    z_zero, lt_zero = (with_zeros(x, [0, 4], -math.inf) for x in (z, lt))
    z_zero.requires_grad_()
    value = ours(name, z_zero, lt_zero.log_softmax(-1), **params)
    left = [1, 2, 3, 5, 6, 7, 8]
    z_left = z.detach()[:, left].requires_grad_()
    truth = CASES[name][0](z_left.softmax(-1), lt[:, left].softmax(-1), **params)
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-12)
    actual = gradient(value, z_zero)
    torch.testing.assert_close(actual[:, left], gradient(truth, z_left), rtol=1e-10, atol=1e-12)
    assert (actual[:, [0, 4]] == 0).all()


@pytest.mark.parametrize(
    ("name", "zeros"),
    [(name, TEACHER_ZERO) for name in ("reverse_kl", *sorted(UNBOUNDED))]
    + [(name, STUDENT_ZERO) for name in ("forward_kl", *sorted(UNBOUNDED))],
)
def test_a_divergence_without_a_finite_limit_is_infinite_and_not_nan(name, zeros):
    z, lt = make_logits(12)
    value = ours(name, with_zeros(z, zeros[1], -math.inf), with_zeros(lt, zeros[0], -math.inf).log_softmax(-1))
    assert (value == math.inf).all()


def test_the_adaptive_head_holds_the_entry_that_crosses_its_mass():
    t = torch.tensor([0.1, 0.45, 0.15, 0.3]).double()
    s = torch.tensor([0.2, 0.25, 0.15, 0.4]).double()
    # Gaps .1 .2 0 .1; by teacher mass the entries come as 1, 3, 2, 0
    for head_mass, head_gap in ((0.4, 0.2), (0.5, 0.3), (0.74, 0.3), (0.89, 0.3), (0.95, 0.4), (1.0, 0.4)):
        weight = losses.adaptive_kl_weight(s, t, head_mass)
        assert weight.item() == pytest.approx(head_gap / 0.4)
    assert losses.adaptive_kl_weight(t, t, 0.5) == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_different_shapes_are_refused(name):
    with pytest.raises(ValueError, match=r"same shape, got \(2, 5\) and \(2, 6\)"):
        losses.DIVERGENCES[name](torch.zeros(2, 5), torch.zeros(2, 6))
