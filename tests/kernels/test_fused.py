"""`fused_linear_divergence` over the full vocabulary against float64 autograd through dense logits (textbook.py)."""

import math
from dataclasses import replace

import pytest
import torch
from textbook import CASES, INFINITE, divergence, fused_arguments, make_sides

from trl_opd import fused_linear_divergence

NAMES = list(CASES)
N, V = 11, 23
ROW = V * 8  # bytes of a row of float64 logits


def settings(case: str) -> tuple:
    """Student, teacher, temperature, bytes of a chunk."""
    student, teacher = make_sides(N, V, bias=case != "no bias")
    if case == "scale, softcap, temperature":
        return replace(student, scale=1.3, softcap=5.0), replace(teacher, scale=0.8, softcap=4.0), 0.7, 3 * 2 * ROW
    return student, teacher, 1.0, None


def token_weights() -> torch.Tensor:
    return torch.linspace(-0.45, 2.0, N, dtype=torch.float64)


def assert_same_gradients(actual, expected, rtol=1e-9, atol=1e-11):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", ["plain", "no bias", "scale, softcap, temperature"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_every_gradient_equal_dense_autograd(name, case):
    student, teacher, temperature, chunk_bytes = settings(case)
    truth = divergence(name, student.probs(temperature), teacher.probs(temperature))
    loss = (truth * token_weights()).sum()
    expected = torch.autograd.grad(loss, student.leaves)

    out = fused_linear_divergence(
        **fused_arguments(student, teacher),
        divergence=name,
        divergence_kwargs=CASES[name][1],
        token_weights=token_weights(),
        temperature=temperature,
        chunk_bytes=chunk_bytes,
    )
    torch.testing.assert_close(out.divergence, truth.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    assert not out.divergence.requires_grad
    assert_same_gradients(torch.autograd.grad(out.loss, student.leaves), expected)


@pytest.mark.parametrize("case", ["plain", "scale, softcap, temperature"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_operands_give_float32_accuracy(name, case):
    student, teacher, temperature, _ = settings(case)
    truth = divergence(name, student.probs(temperature), teacher.probs(temperature))
    expected = torch.autograd.grad((truth * token_weights()).sum(), student.leaves)
    single = student.to(torch.float32, grad=True)
    out = fused_linear_divergence(
        **fused_arguments(single, teacher.to(torch.float32)),
        divergence=name,
        divergence_kwargs=CASES[name][1],
        token_weights=token_weights(),
        temperature=temperature,
    )
    assert out.loss.dtype == out.divergence.dtype == torch.float32
    torch.testing.assert_close(out.divergence.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(out.loss, single.leaves), expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 3e-6 * theirs.norm()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "alpha_divergence"])
def test_gradcheck(name):
    student, teacher = make_sides(N=3, V=5, H=(2, 3))
    arguments = fused_arguments(replace(student, scale=1.2, softcap=3.0), teacher)

    def loss(hidden, weight, bias):
        changed = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        return fused_linear_divergence(**arguments | changed, divergence=name, chunk_bytes=5 * 8 * 2).loss

    assert torch.autograd.gradcheck(loss, student.leaves)


@pytest.mark.parametrize(
    ("name", "params", "same_as"),
    [
        ("generalized_jsd", {"beta": 0.0}, "forward_kl"),
        ("generalized_jsd", {"beta": 1.0}, "reverse_kl"),
        ("alpha_divergence", {"alpha": 1.0}, "forward_kl"),
        ("skew_reverse_kl", {"skew": 0.0}, "reverse_kl"),
    ],
)
def test_parameters_that_name_a_kl_give_it(name, params, same_as):
    student, teacher = make_sides(N, V)
    out = fused_linear_divergence(**fused_arguments(student, teacher), divergence=name, divergence_kwargs=params)
    torch.testing.assert_close(out.divergence, divergence(same_as, student.probs(), teacher.probs()).detach())


@pytest.mark.parametrize("params", [{"alpha": 0.8, "beta": -0.3}, {"alpha": 1.5, "beta": 0.5}])
def test_alpha_beta_with_a_negative_or_large_power(params):
    student, teacher = make_sides(N, V)
    truth = CASES["alpha_beta_divergence"][0](student.probs(), teacher.probs(), **params)
    out = fused_linear_divergence(
        **fused_arguments(student, teacher), divergence="alpha_beta_divergence", divergence_kwargs=params
    )
    torch.testing.assert_close(out.divergence, truth.detach(), rtol=1e-10, atol=1e-12)
    assert_same_gradients(
        torch.autograd.grad(out.loss, student.leaves), torch.autograd.grad(truth.sum(), student.leaves)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_matched_teacher_gives_value_and_gradient_zero(name):
    """I16."""
    student, _ = make_sides(N, V)
    out = fused_linear_divergence(
        **fused_arguments(student, student.to(torch.float64)), divergence=name, divergence_kwargs=CASES[name][1]
    )
    assert out.divergence.abs().max() < 1e-15
    for gradient in torch.autograd.grad(out.loss, student.leaves):
        assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_the_chunk_size_changes_nothing(name, dtype):
    results = []
    for rows in (1, 2, 4, N):
        student, teacher = (side.to(dtype, grad=True) for side in make_sides(N, V))
        out = fused_linear_divergence(
            **fused_arguments(student, teacher),
            divergence=name,
            divergence_kwargs=CASES[name][1],
            token_weights=token_weights().to(dtype),
            chunk_bytes=rows * 2 * V * dtype.itemsize,
        )
        results.append([out.divergence, out.loss, *torch.autograd.grad(out.loss, student.leaves)])
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() <= bound * max(1.0, a.abs().max().item())


@pytest.mark.parametrize(
    ("name", "teacher_zero", "student_zero"),
    [(name, [3, 7], [3, 7]) for name in NAMES]
    + [(name, [3], []) for name in NAMES if name not in INFINITE["teacher"]]
    + [(name, [], [3]) for name in NAMES if name not in INFINITE["student"]],
)
def test_logits_of_minus_infinity_are_the_limit_of_small_probabilities(name, teacher_zero, student_zero):
    student, teacher = make_sides(N, V)

    def with_bias(value):
        s, t = student.bias.detach().clone(), teacher.bias.clone()
        s[student_zero], t[teacher_zero] = value, value
        return replace(student, bias=s.requires_grad_()), replace(teacher, bias=t)

    student, teacher = with_bias(-690.0)  # e^-690 is a normal number in float64
    truth = divergence(name, student.probs(), teacher.probs())
    expected = torch.autograd.grad(truth.sum(), student.leaves)
    student, teacher = with_bias(-math.inf)
    out = fused_linear_divergence(
        **fused_arguments(student, teacher), divergence=name, divergence_kwargs=CASES[name][1], overlap_top_k=3
    )
    torch.testing.assert_close(out.divergence, truth.detach(), rtol=1e-10, atol=1e-12)
    assert_same_gradients(torch.autograd.grad(out.loss, student.leaves), expected)
    assert torch.isfinite(out.student_entropy).all() and torch.isfinite(out.teacher_entropy).all()


def test_a_divergence_without_a_finite_limit_is_infinite_and_not_nan():
    student, teacher = make_sides(N, V)
    teacher.bias[3] = -math.inf
    out = fused_linear_divergence(**fused_arguments(student, teacher))
    assert (out.divergence == math.inf).all() and out.loss == math.inf
    torch.testing.assert_close(out.reverse_kl, out.divergence)


def test_the_statistics_equal_the_dense_ones():
    student, teacher = make_sides(N, V)
    target_ids = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    s, t = student.probs(0.8).detach(), teacher.probs(0.8)
    out = fused_linear_divergence(
        **fused_arguments(student, teacher),
        divergence="total_variation",
        target_ids=target_ids,
        temperature=0.8,
        overlap_top_k=5,
        chunk_bytes=4 * 2 * ROW,
    )
    rows = torch.arange(N)
    overlap = [len({*a.tolist()} & {*b.tolist()}) / 5 for a, b in zip(s.topk(5)[1], t.topk(5)[1], strict=True)]
    assert len(set(overlap)) > 2
    for name, truth in {
        "forward_kl": divergence("forward_kl", s, t),
        "reverse_kl": divergence("reverse_kl", s, t),
        "student_entropy": -(s * s.log()).sum(-1),
        "teacher_entropy": -(t * t.log()).sum(-1),
        "student_logprobs": s[rows, target_ids].log(),
        "teacher_logprobs": t[rows, target_ids].log(),
        "overlap": torch.tensor(overlap, dtype=torch.float64),
    }.items():
        value = getattr(out, name)
        assert not value.requires_grad
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    assert out.rows.all()


def test_statistics_that_were_not_asked_for_are_none():
    student, teacher = make_sides(N, V)
    out = fused_linear_divergence(**fused_arguments(student, teacher))
    assert out.student_logprobs is None and out.teacher_logprobs is None and out.overlap is None


@pytest.mark.parametrize("per_token_grad", [False, True])
def test_a_second_backward_and_a_scaled_one_see_the_same_gradient(per_token_grad):
    student, teacher = make_sides(N, V)
    out = fused_linear_divergence(**fused_arguments(student, teacher), per_token_grad=per_token_grad)
    first = torch.autograd.grad(3.5 * out.loss, student.leaves, retain_graph=True)
    second = torch.autograd.grad(out.loss, student.leaves, retain_graph=True)
    third = torch.autograd.grad(-0.25 * out.loss, student.leaves)
    assert_same_gradients(first, [3.5 * g for g in second], rtol=1e-13, atol=0)
    assert_same_gradients(third, [-0.25 * g for g in second], rtol=1e-13, atol=0)
    expected = torch.autograd.grad(divergence("reverse_kl", student.probs(), teacher.probs()).sum(), student.leaves)
    assert_same_gradients(second, expected)


def test_gradients_add_up_in_leaves_that_two_calls_share():
    student, teacher = make_sides(N, V)
    for name in ("forward_kl", "reverse_kl"):
        fused_linear_divergence(**fused_arguments(student, teacher), divergence=name).loss.backward()
    truth = sum(divergence(name, student.probs(), teacher.probs()).sum() for name in ("forward_kl", "reverse_kl"))
    assert_same_gradients([x.grad for x in student.leaves], torch.autograd.grad(truth, student.leaves))


def test_tied_and_strided_operands():
    student, teacher = make_sides(N, V, bias=False)
    wide = torch.cat([student.hidden, student.hidden], dim=1).detach()
    strided = replace(
        student,
        hidden=wide[:, ::2][:, : student.hidden.shape[1]].requires_grad_(),
        weight=student.weight.detach().T.contiguous().T.requires_grad_(),
    )
    assert not strided.hidden.is_contiguous() and not strided.weight.is_contiguous()
    out = fused_linear_divergence(**fused_arguments(strided, teacher))
    truth = divergence("reverse_kl", strided.probs(), teacher.probs())
    torch.testing.assert_close(out.divergence, truth.detach())
    assert_same_gradients(
        torch.autograd.grad(out.loss, strided.leaves), torch.autograd.grad(truth.sum(), strided.leaves)
    )


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
def test_any_part_of_the_student_may_be_trained_alone(trained, per_token_grad):
    student, teacher = make_sides(N, V)
    expected = torch.autograd.grad(
        divergence("reverse_kl", student.probs(), teacher.probs()).sum(), [student.leaves[i] for i in trained]
    )
    for i, leaf in enumerate(student.leaves):
        leaf.requires_grad_(i in trained)
    out = fused_linear_divergence(**fused_arguments(student, teacher), per_token_grad=per_token_grad)
    out.loss.backward()
    assert_same_gradients([student.leaves[i].grad for i in trained], expected)
    assert all(leaf.grad is None for i, leaf in enumerate(student.leaves) if i not in trained)


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inputs_are_left_as_they_were(dtype, per_token_grad):
    sides = [side.to(dtype, grad=True) for side in make_sides(N, V)]
    arguments = fused_arguments(*sides) | {"token_weights": token_weights(), "target_ids": torch.arange(N)}
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    fused_linear_divergence(**arguments, temperature=0.5, per_token_grad=per_token_grad).loss.backward()
    for key, value in before.items():
        assert torch.equal(arguments[key], value), key


def test_the_teacher_gets_no_gradient():
    student, teacher = make_sides(N, V)
    teacher = teacher.to(torch.float64, grad=True)
    fused_linear_divergence(**fused_arguments(student, teacher)).loss.backward()
    assert all(x.grad is None for x in teacher.leaves)
    assert all(x.grad is not None for x in student.leaves)


def test_calls_do_not_share_results():
    """A later, larger or smaller call leaves an earlier call's values and gradients alone."""
    (student, teacher), results = make_sides(N, V), []
    for rows in (slice(3, 6), slice(0, N), slice(1, 2)):
        part = {"student_hidden": student.hidden[rows], "teacher_hidden": teacher.hidden[rows]}
        results.append((rows, fused_linear_divergence(**fused_arguments(student, teacher) | part, overlap_top_k=2)))
    truth = divergence("reverse_kl", student.probs(), teacher.probs())
    for rows, out in results:
        torch.testing.assert_close(out.divergence, truth[rows].detach())
        expected = torch.autograd.grad(truth[rows].sum(), student.leaves, retain_graph=True)
        assert_same_gradients(torch.autograd.grad(out.loss, student.leaves), expected)


def test_a_call_in_inference_mode_does_not_break_the_next_one():
    student, teacher = make_sides(N, 2 * V)
    with torch.inference_mode():
        inferred = fused_linear_divergence(**fused_arguments(student, teacher))
    out = fused_linear_divergence(**fused_arguments(student, teacher))
    torch.testing.assert_close(out.divergence, inferred.divergence)
    out.loss.backward()
