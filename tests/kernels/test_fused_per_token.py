"""`per_token_grad`: differentiable divergence, log-prob and entropy of each token against dense autograd."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from textbook import CASES, divergence, fused_arguments, make_sides

from trl_opd import fused_linear_divergence

N, V = 9, 21
TARGETS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
ROWS = torch.tensor([1, 1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)


def setup(teacher: bool = True):
    """Sides with every head option, and the op's arguments."""
    student, other = make_sides(N, V)
    student, other = replace(student, scale=1.3, softcap=6.0), replace(other, scale=0.9, softcap=5.0)
    arguments = fused_arguments(student, other) | {"temperature": 0.8, "target_ids": TARGETS, "per_token_grad": True}
    if not teacher:
        arguments = {k: x for k, x in arguments.items() if not k.startswith("teacher")}
    return student, other, arguments


def dense(student, teacher, name="reverse_kl"):
    """Divergence, log-prob and entropy from full logits."""
    s = student.probs(0.8)
    return (
        divergence(name, s, teacher.probs(0.8)),
        s.gather(1, TARGETS[:, None]).squeeze(1).log(),
        -(s * s.log()).sum(-1),
    )


def values(out):
    return out.divergence, out.student_logprobs, out.student_entropy


def combine(divergence, logprobs, entropy, which):
    """A nonlinear loss of the values in `which`, whose gradients with respect to them differ from row to row."""
    terms = {
        "divergence": (divergence**2 * torch.linspace(-1, 2, len(divergence))).sum(),
        "logprobs": -(torch.exp(logprobs - logprobs.detach()) * torch.linspace(2, -1, len(logprobs))).sum(),
        "entropy": -0.3 * (entropy.tanh() * entropy).sum(),
    }
    return sum(terms[name] for name in which)


COMBINATIONS = [
    ["divergence"],
    ["logprobs"],
    ["entropy"],
    ["divergence", "logprobs"],
    ["logprobs", "entropy"],
    ["divergence", "logprobs", "entropy"],
]


def assert_same_gradients(ours, theirs, student):
    expected = torch.autograd.grad(theirs, student.leaves)
    for a, b in zip(torch.autograd.grad(ours, student.leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", COMBINATIONS, ids="+".join)
def test_any_combination_of_the_values_has_the_dense_gradient(which):
    student, teacher, arguments = setup()
    out = fused_linear_divergence(**arguments, chunk_bytes=4 * 2 * V * 8)
    for ours, theirs in zip(values(out), dense(student, teacher), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert_same_gradients(combine(*values(out), which), combine(*dense(student, teacher), which), student)


@pytest.mark.parametrize("name", CASES)
def test_every_divergence_beside_log_probs_and_entropy(name):
    student, teacher, arguments = setup()
    out = fused_linear_divergence(**arguments, divergence=name, divergence_kwargs=CASES[name][1])
    truth = dense(student, teacher, name)
    assert_same_gradients(combine(*values(out), COMBINATIONS[-1]), combine(*truth, COMBINATIONS[-1]), student)


@pytest.mark.parametrize("which", COMBINATIONS[1:3] + COMBINATIONS[4:5], ids="+".join)
def test_without_a_teacher_there_are_log_probs_and_entropy(which):
    student, teacher, arguments = setup(teacher=False)
    out = fused_linear_divergence(**arguments)
    assert out.divergence is None and out.teacher_entropy is None and out.reverse_kl is None and out.loss == 0
    truth = dense(student, teacher)
    ours = combine(torch.zeros(1), out.student_logprobs, out.student_entropy, which)
    assert_same_gradients(ours, combine(*truth, which), student)


def test_the_loss_of_the_call_is_the_weighted_sum_of_its_values():
    student, teacher, arguments = setup()
    weights = torch.linspace(0.5, 2.0, N).double()
    out = fused_linear_divergence(**arguments, token_weights=weights)
    assert_same_gradients(out.loss, (weights * dense(student, teacher)[0]).sum(), student)


def test_masked_rows_are_never_projected_and_get_exactly_zero():
    student, teacher, arguments = setup()
    hidden, teacher_hidden = student.hidden.detach().clone(), teacher.hidden.clone()
    hidden[~ROWS], teacher_hidden[~ROWS] = float("nan"), float("inf")
    hidden.requires_grad_()
    poisoned = {"student_hidden": hidden, "teacher_hidden": teacher_hidden, "mask": ROWS}
    out = fused_linear_divergence(**arguments | poisoned)
    for value in values(out):
        assert (value[~ROWS] == 0).all()
    truth = combine(*(x[ROWS] for x in dense(student, teacher)), COMBINATIONS[-1])
    ours = combine(*(x[ROWS] for x in values(out)), COMBINATIONS[-1])
    expected = torch.autograd.grad(truth, student.leaves)
    actual = torch.autograd.grad(ours, [hidden, student.weight, student.bias])
    assert (actual[0][~ROWS] == 0).all()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_top_k_support_beside_log_probs():
    student, teacher, arguments = setup()
    out = fused_linear_divergence(**arguments, support="teacher_top_k", support_size=V)
    truth = dense(student, teacher)
    assert_same_gradients(combine(*values(out), COMBINATIONS[-1]), combine(*truth, COMBINATIONS[-1]), student)


def test_gradcheck():
    student, _, arguments = setup()

    def loss(hidden, weight, bias):
        changed = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        return values(fused_linear_divergence(**arguments | changed))

    assert torch.autograd.gradcheck(loss, student.leaves, fast_mode=True)


def test_a_frozen_head_gets_no_gradient():
    student, _, arguments = setup()
    student.weight.requires_grad_(False)
    student.bias.requires_grad_(False)
    out = fused_linear_divergence(**arguments)
    combine(*values(out), COMBINATIONS[-1]).backward()
    assert student.weight.grad is None and student.bias.grad is None and student.hidden.grad is not None


def test_the_backward_pass_opens_the_context_in_which_sharded_weights_are_whole():
    """As under ZeRO-3, the head is unusable outside."""
    student, teacher, arguments = setup()
    whole, entered = student.weight.detach().clone(), []

    @contextmanager
    def gather():
        entered.append(True)
        student.weight.data.copy_(whole)
        yield
        student.weight.data.fill_(float("nan"))

    truth = torch.autograd.grad(combine(*dense(student, teacher), COMBINATIONS[-1]), student.leaves)
    with gather():
        out = fused_linear_divergence(**arguments, gather=gather)
    actual = torch.autograd.grad(combine(*values(out), COMBINATIONS[-1]), student.leaves)
    assert len(entered) == 2
    for a, b in zip(actual, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_under_autocast_the_backward_pass_multiplies_what_the_forward_pass_did():
    student, teacher = (side.to(torch.bfloat16).to(torch.float32, grad=True) for side in make_sides(N, V))
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_linear_divergence(**fused_arguments(student, teacher), target_ids=TARGETS, per_token_grad=True)
    actual = torch.autograd.grad(combine(*values(out), COMBINATIONS[-1]), student.leaves)
    double = student.to(torch.float64, grad=True), teacher.to(torch.float64)
    s = double[0].probs()
    truth = (
        divergence("reverse_kl", s, double[1].probs()),
        s.gather(1, TARGETS[:, None]).squeeze(1).log(),
        -(s * s.log()).sum(-1),
    )
    expected = torch.autograd.grad(combine(*truth, COMBINATIONS[-1]), double[0].leaves)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() < 2e-5 * b.norm()
