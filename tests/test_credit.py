"""The sampled-token policy gradient: its mean, by enumeration of every sample, is the gradient it stands for."""

import itertools

import pytest
import torch
from textbook import forward_kl, fused_arguments, make_sides, reverse_kl

from trl_opd import OnPolicyDistillConfig, fused_linear_divergence
from trl_opd.credit import sampled_advantages

V = 5


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.fixture
def two_steps():
    """A student and a teacher over sequences of two tokens: logits of the first, and of the second given the first."""
    student = [normal(V, seed=4).requires_grad_(), normal(V, V, seed=5).requires_grad_()]
    return student, [normal(V, seed=6).softmax(-1), normal(V, V, seed=7).softmax(-1)]


def mean_policy_gradient(student, teacher, discount):
    """Over all V² sequences."""
    sequences = list(itertools.product(range(V), repeat=2))

    def logprobs(first, second):
        return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in sequences])

    ours = logprobs(student[0].log_softmax(-1), student[1].log_softmax(-1))
    theirs = logprobs(teacher[0].log(), teacher[1].log())
    advantages = sampled_advantages(ours, theirs, torch.ones(V * V, 2, dtype=torch.bool), discount=discount)
    loss = -(ours.detach().sum(-1).exp()[:, None] * advantages * ours).sum()
    return torch.autograd.grad(loss, student)


def test_without_discount_it_is_the_reverse_kl_at_every_visited_prefix(two_steps):
    """I11c."""
    student, teacher = two_steps
    first, second = (z.softmax(-1) for z in student)
    truth = reverse_kl(first, teacher[0]) + (first.detach() * reverse_kl(second, teacher[1])).sum()
    torch.testing.assert_close(mean_policy_gradient(*two_steps, 0.0), torch.autograd.grad(truth, student))


def test_with_discount_one_it_is_the_reverse_kl_between_sequences(two_steps):
    """I11a."""
    student, teacher = two_steps
    first, second = (z.softmax(-1) for z in student)
    truth = reverse_kl((first[:, None] * second).flatten(), (teacher[0][:, None] * teacher[1]).flatten())
    torch.testing.assert_close(mean_policy_gradient(*two_steps, 1.0), torch.autograd.grad(truth, student))


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_advantages_are_discounted_sums_of_the_gaps_that_count(discount):
    student, teacher = normal(3, 6, seed=8), normal(3, 6, seed=9)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        for later in range(t, 6):
            if mask[b, later]:
                expected[b, t] += discount ** (later - t) * (teacher[b, later] - student[b, later])
    torch.testing.assert_close(sampled_advantages(student, teacher, mask, discount), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_masked_token_is_never_read(poison):
    student, teacher = normal(2, 4, seed=10), normal(2, 4, seed=11)
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    clean = sampled_advantages(student, teacher, mask, 0.9)
    student[~mask] = poison
    teacher[~mask] = poison
    assert torch.equal(sampled_advantages(student, teacher, mask, 0.9), clean)
    assert (clean[~mask] == 0).all()


def test_the_clip_bounds_the_discounted_advantage_on_both_sides():
    student, teacher = 3 * normal(4, 8, seed=12), 3 * normal(4, 8, seed=13)
    mask = torch.ones(4, 8, dtype=torch.bool)
    free = sampled_advantages(student, teacher, mask, 0.5)
    clipped = sampled_advantages(student, teacher, mask, 0.5, clip=2.0)
    assert free.min() < -2 and free.max() > 2
    assert torch.equal(clipped, torch.where(free.abs() > 2, 2 * free.sign(), free))


def test_equal_models_have_no_advantage():
    """I16."""
    logprobs = normal(2, 3, seed=14)
    advantages = sampled_advantages(logprobs, logprobs.clone(), torch.ones(2, 3, dtype=torch.bool), 1.0)
    assert (advantages == 0).all()


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
