"""The sampled-token policy gradient: its mean, by enumeration of every sample, is the gradient it stands for."""

import math

import pytest
import torch
from sequences import (
    EVERY_TOKEN,
    MASK,
    V,
    along,
    by_hand,
    frozen_prefix_loss,
    mean_gradient,
    normal,
    sequence_loss,
    two_steps,
)
from textbook import forward_kl, fused_arguments, make_sides, reverse_kl

from trl_opd import OnPolicyDistillConfig, fused_linear_divergence
from trl_opd.credit import (
    anchored_logprobs,
    importance_weights,
    k2_loss,
    power_advantages,
    sampled_advantages,
    shaping_weights,
)
from trl_opd.losses import alpha_beta_divergence

INF = float("inf")


def test_the_mean_policy_gradient_at_a_prefix_is_the_reverse_kl_gradient():
    """I1: one row for each token of the vocabulary, weighted by its probability."""
    z, t = normal(V, seed=0).requires_grad_(), normal(V, seed=1).softmax(-1)
    ls = z.log_softmax(-1)
    advantages = sampled_advantages(ls[:, None], t.log()[:, None], torch.ones(V, 1, dtype=torch.bool))
    assert not advantages.requires_grad
    loss = -(ls.detach().exp() * advantages[:, 0] * ls).sum()
    expected = torch.autograd.grad(reverse_kl(z.softmax(-1), t), z)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected)


def test_a_baseline_of_the_prefix_leaves_the_mean_unchanged():
    """I5."""
    z, t = normal(V, seed=2).requires_grad_(), normal(V, seed=3).softmax(-1)
    ls = z.log_softmax(-1)
    advantages = sampled_advantages(ls[:, None], t.log()[:, None], torch.ones(V, 1, dtype=torch.bool))[:, 0] + 7.5
    loss = -(ls.detach().exp() * advantages * ls).sum()
    expected = torch.autograd.grad(reverse_kl(z.softmax(-1), t), z)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected)


def mean_policy_gradient(student, teacher, discount, **options):
    ours, theirs = along(*(z.log_softmax(-1) for z in student)), along(*(t.log() for t in teacher))
    return mean_gradient(student, sampled_advantages(ours, theirs, EVERY_TOKEN, discount, **options))


def test_without_discount_it_is_the_reverse_kl_at_every_visited_prefix():
    """I11c: of one value with the KL between sequences, and of another gradient."""
    student, teacher = two_steps()
    expected = torch.autograd.grad(frozen_prefix_loss(student, teacher), student)
    torch.testing.assert_close(mean_policy_gradient(student, teacher, 0.0), expected)
    torch.testing.assert_close(frozen_prefix_loss(student, teacher), sequence_loss(student, teacher))
    of_sequence = torch.autograd.grad(sequence_loss(student, teacher), student)
    assert (of_sequence[0] - expected[0]).abs().max() > 0.01


def test_with_discount_one_it_is_the_reverse_kl_between_sequences():
    """I11a."""
    student, teacher = two_steps()
    expected = torch.autograd.grad(sequence_loss(student, teacher), student)
    torch.testing.assert_close(mean_policy_gradient(student, teacher, 1.0), expected)


def test_minillm_adds_the_later_return_to_the_divergence_at_each_prefix():
    """I11b."""
    student, teacher = two_steps()
    single_step = torch.autograd.grad(frozen_prefix_loss(student, teacher), student)
    later = mean_policy_gradient(student, teacher, 1.0, from_next=True)
    expected = torch.autograd.grad(sequence_loss(student, teacher), student)
    torch.testing.assert_close(tuple(a + b for a, b in zip(single_step, later, strict=True)), expected)
    assert later[0].abs().max() > 0.01 and later[1].abs().max() < 1e-15


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("from_next", [False, True])
def test_a_baseline_of_the_state_changes_the_advantages_and_no_mean_gradient(discount, from_next):
    """I5, at any discount: in the sum it would take the later tokens' credit away."""
    student, teacher = two_steps()
    first, second = (-reverse_kl(z.detach().softmax(-1), t) for z, t in zip(student, teacher, strict=True))
    baseline = along(first.expand(V), second[:, None].expand(V, V))
    options = {"from_next": from_next}
    free = mean_policy_gradient(student, teacher, discount, **options)
    torch.testing.assert_close(mean_policy_gradient(student, teacher, discount, baseline=baseline, **options), free)
    ours, theirs = along(*(z.log_softmax(-1) for z in student)), along(*(t.log() for t in teacher))
    plain = sampled_advantages(ours, theirs, EVERY_TOKEN, discount, **options)
    lowered = sampled_advantages(ours, theirs, EVERY_TOKEN, discount, baseline=baseline, **options)
    torch.testing.assert_close(lowered, plain - baseline)


def test_what_is_set_to_its_identity_is_bit_equal():
    student, teacher = normal(4, 7, seed=8).float(), normal(4, 7, seed=9).float()
    gap = (teacher - student).masked_fill(~MASK, 0.0)
    identity = {"divergence": "reverse_kl", "power": 0.0, "horizon": None, "floor": -INF, "baseline": 0 * gap}
    assert torch.equal(sampled_advantages(student, teacher, MASK), gap)
    assert torch.equal(sampled_advantages(student, teacher, MASK, 0.0, None, **identity), gap)
    assert torch.equal(sampled_advantages(student, teacher, MASK, 1.0, horizon=1), gap)
    full = sampled_advantages(student, teacher, MASK, 0.9)
    assert torch.equal(sampled_advantages(student, teacher, MASK, 0.9, horizon=7), full)


OPTIONS = [
    {},
    {"divergence": "forward_kl", "floor": 0.5},
    {"power": 0.7, "floor": -0.5},
    {"horizon": 2, "normalize_length": True, "from_next": True, "discount": 1.0},
]


@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_masked_token_is_never_read(poison, options):
    student, teacher, baseline = normal(4, 7, seed=10), normal(4, 7, seed=11), normal(4, 7, seed=12)
    options = {"discount": 0.9, **options}
    leaves = [x.clone().requires_grad_() for x in (student, teacher, baseline)]
    clean = sampled_advantages(leaves[0], leaves[1], MASK, baseline=leaves[2], **options)
    assert not clean.requires_grad
    for x in (student, teacher, baseline):
        x[~MASK] = poison
    assert torch.equal(sampled_advantages(student, teacher, MASK, baseline=baseline, **options), clean)
    assert (clean[~MASK] == 0).all()


def test_the_floor_bounds_the_gap_before_it_is_summed():
    """REOPOLD's log(λ/(1−λ)); a λ near 0 changes nothing."""
    student, teacher = 3 * normal(4, 7, seed=13), 3 * normal(4, 7, seed=14)
    floor = math.log(0.2 / 0.8)
    gap = teacher - student
    assert gap.min() < floor - 1
    for discount in (0.0, 1.0):
        ours = sampled_advantages(student, teacher, MASK, discount, floor=floor)
        torch.testing.assert_close(ours, by_hand(gap.clamp(min=floor), MASK, discount, None, False, False))
    free = sampled_advantages(student, teacher, MASK)
    assert torch.equal(sampled_advantages(student, teacher, MASK, floor=math.log(1e-30)), free)
    # In nats of ℓ whatever the advantage
    floored = torch.maximum(teacher, student + floor)
    for options, expected in (
        ({"divergence": "forward_kl"}, (floored - student).expm1()),
        ({"power": 0.7}, (0.7 * floored).exp() - (0.7 * student).exp()),
    ):
        ours = sampled_advantages(student, teacher, MASK, floor=floor, **options)
        torch.testing.assert_close(ours, expected.masked_fill(~MASK, 0.0))


def test_a_power_takes_the_place_of_the_gap():
    student, teacher = normal(4, 7, seed=15).sigmoid().log(), normal(4, 7, seed=16).sigmoid().log()
    expected = (teacher.exp() ** 0.7 - student.exp() ** 0.7).masked_fill(~MASK, 0.0)
    torch.testing.assert_close(sampled_advantages(student, teacher, MASK, power=0.7), expected)
    torch.testing.assert_close(
        power_advantages(teacher, student, 1e-6) / 1e-6, teacher - student, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"power must be 0 with divergence='forward_kl', got 0\.7"):
        sampled_advantages(student, teacher, MASK, power=0.7, divergence="forward_kl")


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
def test_a_power_is_the_policy_gradient_of_an_alpha_beta_divergence(power):
    z, t = normal(V, seed=17).requires_grad_(), normal(V, seed=18).log_softmax(-1)
    s = z.log_softmax(-1)
    advantages = power_advantages(t, s, power)
    assert not advantages.requires_grad
    ours = torch.autograd.grad(-(s.detach().exp() * advantages * s).sum() / power, z)[0]
    truth = alpha_beta_divergence(z.log_softmax(-1), t, alpha=power, beta=1.0)
    torch.testing.assert_close(ours, torch.autograd.grad(truth, z)[0])


def test_the_clip_bounds_the_discounted_advantage_on_both_sides():
    student, teacher = 3 * normal(4, 8, seed=12), 3 * normal(4, 8, seed=13)
    mask = torch.ones(4, 8, dtype=torch.bool)
    free = sampled_advantages(student, teacher, mask, 0.5)
    clipped = sampled_advantages(student, teacher, mask, 0.5, clip=2.0)
    assert free.min() < -2 and free.max() > 2
    assert torch.equal(clipped, torch.where(free.abs() > 2, 2 * free.sign(), free))
    lowered = sampled_advantages(student, teacher, mask, 0.5, clip=2.0, baseline=torch.full_like(student, 9.0))
    assert lowered.min() == -2 and lowered.abs().max() <= 2


@pytest.mark.parametrize("options", [{}, *OPTIONS[2:], {"divergence": "skew_reverse_kl"}])
def test_equal_models_have_no_advantage(options):
    """I16."""
    logprobs = normal(2, 3, seed=14)
    options = {"discount": 1.0, **options, "floor": None}
    advantages = sampled_advantages(logprobs, logprobs.clone(), torch.ones(2, 3, dtype=torch.bool), **options)
    assert (advantages == 0).all()


RATIOS = torch.tensor(
    [-INF, math.log(0.4), math.log(0.5), -0.1, 0.0, 0.1, math.log(2.0), 1.0, 200.0], dtype=torch.float64
)


def test_importance_weights_are_the_bounded_ratio():
    ratio = RATIOS.exp()
    log_ratio = RATIOS.clone().requires_grad_()
    truncated = importance_weights(log_ratio, "truncate", high=2.0)
    assert not truncated.requires_grad
    assert torch.equal(truncated, torch.minimum(ratio, torch.tensor(2.0)))
    band = importance_weights(RATIOS, "band", 0.45, 2.1)
    kept = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert torch.equal(band, torch.where(kept, ratio, 0.0))
    assert importance_weights(RATIOS.float(), "band", 0.0, 5.0)[-1] == 0
    for mode in ("truncate", "band"):
        assert importance_weights(torch.zeros(3), mode, 1.0, 1.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip", 0.5, 2.0), "mode must be a known name, got 'clip'"),
        (("truncate", None, None), "high must be at least 1, got None"),
        (("truncate", None, 0.5), "high must be at least 1, got 0.5"),
        (("band", None, 2.0), r"low must be in \[0, 1\], got None"),
        (("band", 1.5, 2.0), r"low must be in \[0, 1\], got 1.5"),
        (("band", -0.1, 2.0), r"low must be in \[0, 1\], got -0.1"),
    ],
)
def test_bounds_that_shut_out_the_own_tokens_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        importance_weights(RATIOS, *arguments)


def test_the_anchored_ratio():
    old, teacher = normal(2, 3, seed=28).requires_grad_(), normal(2, 3, seed=29).requires_grad_()
    assert torch.equal(anchored_logprobs(old, torch.full_like(teacher, -INF), 1.0), old)
    ours = anchored_logprobs(old, teacher, 0.3)
    assert not ours.requires_grad and not anchored_logprobs(old, teacher, 1.0).requires_grad
    torch.testing.assert_close(ours.exp(), old.exp() ** 0.3 * teacher.exp() ** 0.7)
    torch.testing.assert_close(anchored_logprobs(old, old, 0.3), old.detach())
    # The scale at the start of a step
    torch.testing.assert_close((old - ours).exp(), (-0.7 * (teacher - old)).exp())


def test_shaping_weights_are_the_gradient_of_the_shaped_probability():
    logprobs = torch.tensor([-30.0, -5.0, math.log(0.1), -0.5, 0.0], dtype=torch.float64, requires_grad=True)
    probs = logprobs.exp()
    expected = torch.autograd.grad((probs / (probs + 0.1)).sum(), logprobs)[0]
    ours = shaping_weights(logprobs, 0.1)
    assert not ours.requires_grad and ours.argmax() == 2 and ours.max().item() == pytest.approx(0.25)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(shaping_weights(torch.tensor([-INF]), 0.1), torch.zeros(1))


def test_the_mean_gradient_of_half_the_squared_log_ratio_is_the_reverse_kls():
    """I3, and its value is not the reverse KL."""
    z, t = normal(V, seed=30).requires_grad_(), normal(V, seed=31).softmax(-1).requires_grad_()
    s = z.log_softmax(-1)
    mean = (s.detach().exp() * k2_loss(s, t.log())).sum()
    truth = reverse_kl(z.softmax(-1), t.detach())
    torch.testing.assert_close(torch.autograd.grad(mean, z, retain_graph=True), torch.autograd.grad(truth, z))
    assert torch.autograd.grad(mean, t, allow_unused=True) == (None,)
    assert abs(mean.item() - truth.item()) > 0.01


ESTIMATORS = {
    "k1": (lambda gap: -gap, lambda s, t: 0.0 * s.sum()),
    "k2": (lambda gap: gap**2 / 2, reverse_kl),
    "k3": (lambda gap: gap.exp() - gap - 1, forward_kl),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_gradient_of_a_differentiated_estimator(estimator):
    """I3: k1 has none, k2 has the reverse KL's, k3 the forward KL's. Row v is the sample v at one prefix."""
    student, teacher = make_sides(N=1, V=V)
    rows = {"student_hidden": student.hidden.expand(V, -1), "teacher_hidden": teacher.hidden.expand(V, -1)}
    arguments = fused_arguments(student, teacher) | rows
    out = fused_linear_divergence(**arguments, target_ids=torch.arange(V), per_token_grad=True)
    of_sample, truth = ESTIMATORS[estimator]
    estimates = of_sample(out.teacher_logprobs - out.student_logprobs)
    mean = (student.probs()[0].detach() * estimates).sum()
    expected = torch.autograd.grad(truth(student.probs()[0], teacher.probs()[0]), student.leaves)
    for ours, theirs in zip(torch.autograd.grad(mean, student.leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_the_config_refuses_to_differentiate_the_sampled_gap():
    """I3: that is k1."""
    with pytest.raises(ValueError, match=r"support must be .* got 'sampled'.*zero mean gradient.*policy_gradient"):
        OnPolicyDistillConfig(output_dir="unused", report_to="none", use_cpu=True, credit="direct", support="sampled")
