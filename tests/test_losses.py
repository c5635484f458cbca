"""The divergences against formulas over probabilities (textbook.py), their gradients, and what is always true."""

import inspect
import math

import pytest
import torch
from textbook import CASES, DETACHED, F_DIVERGENCES, INFINITE, divergence

from trl_opd import losses

NAMES = list(CASES)
SPACES = [
    ("generalized_jsd", "beta", (0.0, 0.1, 0.5, 0.9, 1.0)),
    ("skew_forward_kl", "skew", (0.0, 0.1, 0.9)),
    ("skew_reverse_kl", "skew", (0.0, 0.1, 0.9)),
    ("alpha_divergence", "alpha", (-1.0, 0.5, 0.9, 2.0)),
    ("todi", "scale", (0.0, 1.0, 4.0)),
    ("adaptive_kl", "head_mass", (0.1, 0.5, 0.9, 1.0)),
    ("entropy_gated_kl", "threshold", (-1.0, 1.2, 1.6, 9.0, math.inf)),
    ("entropy_gated_kl", "coef", (0.0, 0.3, 5.0)),
]


def make_logits(seed: int = 0, shape: tuple[int, ...] = (4, 9), spread: float = 1.5) -> tuple:
    """Student logits (with gradient) and teacher log-probs in float64."""
    generator = torch.Generator().manual_seed(seed)
    z, zt = (spread * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), zt.log_softmax(-1)


def ours(name: str, z: torch.Tensor, teacher_logprobs: torch.Tensor, **params: float) -> torch.Tensor:
    return getattr(losses, name)(z.log_softmax(-1), teacher_logprobs, **(params or CASES[name][1]))


def gradient(values: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), z, retain_graph=True)[0]


def test_the_names_are_the_contract():
    assert list(losses.DIVERGENCES) == NAMES
    for name in NAMES:
        parameters = list(inspect.signature(losses.DIVERGENCES[name]).parameters)
        own = ["components"] if name == "convex_mix" else CASES[name][1]
        assert parameters == ["student_logprobs", "teacher_logprobs", *own]


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


# Where weights are detached finite differences see another function
@pytest.mark.parametrize("name", [n for n in NAMES if n not in DETACHED])
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


def with_zeros(logits: torch.Tensor, entries: list[int], value: float) -> torch.Tensor:
    return logits.detach().index_fill(-1, torch.tensor(entries, dtype=torch.long), value)


@pytest.mark.parametrize(
    ("name", "zeros"),
    [(name, BOTH_ZERO) for name in NAMES]
    + [(name, TEACHER_ZERO) for name in NAMES if name not in INFINITE["teacher"]]
    + [(name, STUDENT_ZERO) for name in NAMES if name not in INFINITE["student"]]
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
    [(name, TEACHER_ZERO) for name in INFINITE["teacher"]]
    + [(name, STUDENT_ZERO) for name in INFINITE["student"] if name != "entropy_gated_kl"],
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


WEIGHTINGS = ("student", "teacher", "uniform")
PAIRS = [(a, b) for a in WEIGHTINGS for b in WEIGHTINGS]


def held_weights(s: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"student": s.detach(), "teacher": t, "uniform": torch.full_like(t, 1 / t.shape[-1])}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_concrete_score_is_the_double_sum_over_pairs_of_entries(first, second):
    """I12, with the V² differences of logits formed."""
    z, lt = make_logits(15)
    weights = held_weights(z.softmax(-1), lt.exp())
    gap = z - (lt + 3.1)
    pairs = (gap[:, :, None] - gap[:, None, :]) ** 2
    truth = 0.5 * (weights[first][:, None, :] * weights[second][:, :, None] * pairs).sum((-1, -2))
    value = ours("concrete_score", z, lt, first=first, second=second)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(value, z), gradient(truth, z), rtol=1e-11, atol=1e-13)
    closed = CASES["concrete_score"][0](z.softmax(-1), lt.exp(), first, second)
    torch.testing.assert_close(closed, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equal_weights_of_the_concrete_score_are_a_variance(weighting):
    """I12; uniform is the mean squared difference of the centred logits."""
    z, lt = make_logits(16)
    w = held_weights(z.softmax(-1), lt.exp())[weighting]
    gap = z - lt
    variance = (w * (gap - (w * gap).sum(-1, keepdim=True)) ** 2).sum(-1)
    torch.testing.assert_close(ours("concrete_score", z, lt, first=weighting, second=weighting), variance)
    if weighting == "uniform":
        centred = (z - z.mean(-1, keepdim=True)) - (lt - lt.mean(-1, keepdim=True))
        torch.testing.assert_close(variance, centred.square().mean(-1))


def test_the_concrete_score_does_not_tell_its_weights_apart():
    z, lt = make_logits(17)
    for a, b in PAIRS:
        one, other = (ours("concrete_score", z, lt, first=x, second=y) for x, y in ((a, b), (b, a)))
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient(one, z), gradient(other, z), rtol=1e-12, atol=1e-14)


def test_the_concrete_score_under_the_student_is_twice_the_reverse_kl_near_the_teacher():
    z, _ = make_logits(18)
    lt = (z + 1e-4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))).detach().log_softmax(-1)
    score = ours("concrete_score", z, lt, first="student", second="student")
    torch.testing.assert_close(score, 2 * ours("reverse_kl", z, lt), rtol=1e-3, atol=0)


def test_concrete_score_gradient_is_a_finite_difference_with_its_weights_held():
    z, lt = make_logits(3, shape=(5,))
    for first, second in PAIRS:
        weights = held_weights(z.softmax(-1), lt.exp())
        w, u = weights[first], weights[second]

        def held(z, w=w, u=u):
            gap = z.detach() - lt
            return float(0.5 * (w[None, :] * u[:, None] * (gap[:, None] - gap[None, :]) ** 2).sum())

        numeric = [(held(z + e) - held(z - e)) / 2e-6 for e in 1e-6 * torch.eye(5, dtype=torch.float64)]
        ours_ = gradient(ours("concrete_score", z, lt, first=first, second=second), z)
        torch.testing.assert_close(ours_.tolist(), numeric, rtol=1e-7, atol=1e-8)


def test_uniform_weights_leave_out_entries_that_neither_model_has():
    z, lt = make_logits(19)
    left = [0, 1, 2, 3, 6, 7, 8]
    z_zero = with_zeros(z, [4, 5], -math.inf).requires_grad_()
    value = ours("concrete_score", z_zero, with_zeros(lt, [4, 5], -math.inf).log_softmax(-1))
    z_left = z.detach()[:, left].requires_grad_()
    truth = ours("concrete_score", z_left, lt[:, left].log_softmax(-1))
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
    actual = gradient(value, z_zero)
    torch.testing.assert_close(actual[:, left], gradient(truth, z_left), rtol=1e-12, atol=1e-14)
    assert (actual[:, [4, 5]] == 0).all()


def test_the_concrete_score_is_infinite_where_an_entry_with_weight_is_lacking():
    """An entry that the student lacks has weight 0 under the student, and Δ is -∞ there: its limit is 0."""
    z, lt = make_logits(12)
    for zeros, lacking in ((TEACHER_ZERO, "teacher"), (STUDENT_ZERO, "student")):
        z_zero = with_zeros(z, zeros[1], -math.inf).requires_grad_()
        lt_zero = with_zeros(lt, zeros[0], -math.inf).log_softmax(-1)
        for first, second in PAIRS:
            value = ours("concrete_score", z_zero, lt_zero, first=first, second=second)
            finite = {first, second} == {lacking}
            assert torch.isfinite(value).all() if finite else (value == math.inf).all()
            assert torch.isfinite(gradient(value, z_zero)).all()


def open_gates(lt: torch.Tensor, threshold: float) -> torch.Tensor:
    return -(lt.exp() * lt).sum(-1) > threshold


def test_the_entropy_gate_is_the_teachers_alone_and_adds_the_forward_kl():
    z, lt = make_logits(1)
    is_open = open_gates(lt, 1.5)
    assert is_open.tolist() == [False, True, False, True]
    reverse, forward = ours("reverse_kl", z, lt), ours("forward_kl", z, lt)
    value = ours("entropy_gated_kl", z, lt, threshold=1.5, coef=0.3)
    torch.testing.assert_close(value, reverse + 0.3 * forward * is_open, rtol=1e-13, atol=0)
    expected = gradient(reverse, z) + 0.3 * is_open[:, None].double() * gradient(forward, z)
    torch.testing.assert_close(gradient(value, z), expected, rtol=1e-11, atol=1e-14)


def test_an_entropy_gate_that_never_opens_is_the_reverse_kl_and_one_that_always_is_is_the_sum():
    z, lt = make_logits(20)
    reverse = ours("reverse_kl", z, lt)
    shut = ours("entropy_gated_kl", z, lt, threshold=math.inf)
    assert torch.equal(shut, reverse) and torch.equal(gradient(shut, z), gradient(reverse, z))
    always = ours("entropy_gated_kl", z, lt, threshold=-1.0)
    torch.testing.assert_close(always, reverse + ours("forward_kl", z, lt), rtol=1e-14, atol=0)


def test_an_entropy_gate_is_shut_at_its_threshold():
    z, _ = make_logits(20, shape=(2,))
    coin = torch.tensor([0.5, 0.5]).double().log()
    reverse, forward = ours("reverse_kl", z, coin), ours("forward_kl", z, coin)
    assert torch.equal(ours("entropy_gated_kl", z, coin, threshold=math.log(2)), reverse)
    assert torch.equal(ours("entropy_gated_kl", z, coin, threshold=math.nextafter(math.log(2), 0)), reverse + forward)


def test_a_shut_entropy_gate_hides_an_infinite_forward_kl():
    z, lt = make_logits(12)
    is_open = open_gates(lt, 1.5)
    assert is_open.any() and not is_open.all()
    z_zero = with_zeros(z, STUDENT_ZERO[1], -math.inf).requires_grad_()
    value = ours("entropy_gated_kl", z_zero, lt, threshold=1.5)
    assert torch.equal(value == math.inf, is_open)
    assert torch.equal(value[~is_open], ours("reverse_kl", z_zero, lt)[~is_open])
    alone = gradient(ours("reverse_kl", z_zero, lt), z_zero)[~is_open]
    assert torch.equal(gradient(value[~is_open], z_zero)[~is_open], alone)


@pytest.mark.parametrize("skew", [0.1, 0.5, 0.9])
def test_a_detached_skew_mixture_has_the_value_of_the_other_and_the_gradient_of_a_frozen_one(skew):
    z, lt = make_logits(21)
    value = ours("skew_reverse_kl", z, lt, skew=skew, detached=1)
    live = ours("skew_reverse_kl", z, lt, skew=skew, detached=0)
    assert torch.equal(value, live) and torch.equal(live, ours("skew_reverse_kl", z, lt, skew=skew))
    frozen = (skew * z.softmax(-1) + (1 - skew) * lt.exp()).detach().log()
    truth = losses.reverse_kl(z.log_softmax(-1), frozen)
    torch.testing.assert_close(gradient(value, z), gradient(truth, z), rtol=1e-11, atol=1e-13)
    s = z.detach().softmax(-1)
    closed = s * (s.log() - frozen - truth.detach()[:, None])
    torch.testing.assert_close(gradient(value, z), closed, rtol=1e-11, atol=1e-13)
    assert (gradient(value, z) - gradient(live, z)).abs().max() > 1e-2


def test_a_mixture_is_the_weighted_sum_of_its_divergences():
    z, lt = make_logits(22)
    mix = {"total_variation": 0.25, "concrete_score": {"weight": 0.35, "second": "teacher"}, "todi": {"weight": 0.4}}
    value = losses.convex_mix(z.log_softmax(-1), lt, **mix)
    truth = (
        0.25 * ours("total_variation", z, lt)
        + 0.35 * ours("concrete_score", z, lt, first="student", second="teacher")
        + 0.4 * ours("todi", z, lt, scale=1.0)
    )
    torch.testing.assert_close(value, truth, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient(value, z), gradient(truth, z), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mix", [{"todi": 1}, {"todi": None}, {"todi": 1.0, "forward_kl": 0}, {"todi": {"weight": 1}}])
def test_a_mixture_of_one_is_that_one(mix):
    z, lt = make_logits(23)
    value, truth = losses.convex_mix(z.log_softmax(-1), lt, **mix), losses.todi(z.log_softmax(-1), lt)
    assert torch.equal(value, truth) and torch.equal(gradient(value, z), gradient(truth, z))


def test_a_weight_of_none_is_what_the_others_leave():
    z, lt = make_logits(24)
    ls = z.log_softmax(-1)
    for weight in (0.0, 0.2, 0.7, 1.0):
        rest = losses.convex_mix(ls, lt, forward_kl=weight, reverse_kl=None)
        assert torch.equal(rest, losses.convex_mix(ls, lt, forward_kl=weight, reverse_kl=1 - weight))
    jsd = losses.convex_mix(ls, lt, forward_kl=0.2, generalized_jsd={"weight": None, "beta": 0.9})
    truth = 0.2 * losses.forward_kl(ls, lt) + 0.8 * losses.generalized_jsd(ls, lt, beta=0.9)
    torch.testing.assert_close(jsd, truth, rtol=1e-14, atol=0)
