"""Heads that are tied, partly frozen, partitioned by ZeRO-3 or on another device, given to the op as they are."""

from contextlib import contextmanager

import pytest
import torch
from textbook import Side, fused_arguments, make_sides, reverse_kl

from trl_opd import fused_linear_divergence
from trl_opd.kernels import dispatch

N, V = 7, 19
TARGETS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
both_modes = pytest.mark.parametrize("per_token_grad", [False, True], ids=["gradient in forward", "per token"])


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# Tied heads and biases


@both_modes
@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_gets_the_gradient_of_both_its_uses(bias, per_token_grad):
    """The hidden states are looked up in the head itself."""
    student, teacher = make_sides(N, V, bias=bias)
    leaves = student.leaves[1:]

    def tied():
        return Side(torch.nn.functional.embedding(TARGETS, student.weight).tanh(), student.weight, student.bias)

    out = fused_linear_divergence(**fused_arguments(tied(), teacher), per_token_grad=per_token_grad)
    actual = torch.autograd.grad(out.loss * 2, leaves)
    truth = 2 * reverse_kl(tied().probs(), teacher.probs()).sum()
    assert_close(actual, torch.autograd.grad(truth, leaves))


@both_modes
def test_a_student_may_be_its_own_teacher(per_token_grad):
    """The same parameter is the student's head and, detached, the teacher's."""
    student, teacher = make_sides(N, V, H=(6, 6))
    teacher = Side(teacher.hidden, student.weight, student.bias)
    out = fused_linear_divergence(**fused_arguments(student, teacher), per_token_grad=per_token_grad)
    truth = reverse_kl(student.probs(), teacher.probs().detach()).sum()
    assert_close(torch.autograd.grad(out.loss, student.leaves), torch.autograd.grad(truth, student.leaves))


@both_modes
@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 2], [1, 2], [0, 1]], ids=str)
def test_any_of_hidden_states_weight_and_bias_may_be_frozen(trained, per_token_grad):
    student, teacher = make_sides(N, V)
    truth = reverse_kl(student.probs(), teacher.probs()).sum()
    expected = torch.autograd.grad(truth, student.leaves)
    for i, leaf in enumerate(student.leaves):
        leaf.requires_grad_(i in trained)
    fused_linear_divergence(**fused_arguments(student, teacher), per_token_grad=per_token_grad).loss.backward()
    for i, leaf in enumerate(student.leaves):
        assert (leaf.grad is not None) == (i in trained)
    assert_close([student.leaves[i].grad for i in trained], [expected[i] for i in trained])


@both_modes
def test_bias_and_weight_of_different_dtypes_each_get_their_own(per_token_grad):
    student, teacher = (side.to(torch.bfloat16).to(torch.float32, grad=True) for side in make_sides(N, V))
    mixed = Side(student.hidden, student.weight.detach().bfloat16().requires_grad_(), student.bias)
    out = fused_linear_divergence(**fused_arguments(mixed, teacher), per_token_grad=per_token_grad)
    gradients = torch.autograd.grad(out.loss, mixed.leaves)
    truth = reverse_kl(student.probs(), teacher.probs().detach()).sum()
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16, torch.float32]
    for ours, theirs in zip(gradients, torch.autograd.grad(truth, student.leaves), strict=True):
        torch.testing.assert_close(
            ours.float(), theirs, rtol=2**-8 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-5
        )


# ZeRO-3


class Partitioned:
    """Parameters whose data are gone outside of `gather()`, as under ZeRO-3; it may not be nested."""

    def __init__(self, *parameters: torch.Tensor):
        self.data = [(p, p.data.clone()) for p in parameters]
        self.entered, self.open = 0, False
        self.close()

    def close(self):
        self.open = False
        for parameter, _ in self.data:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    @contextmanager
    def gather(self):
        assert not self.open, "gathered twice"
        self.entered, self.open = self.entered + 1, True
        for parameter, data in self.data:
            parameter.data = data.clone()
        yield
        self.close()


def partitioned_sides(whose):
    """Sides of which one or both have partitioned heads, the gradient of the truth, and the partition."""
    student, teacher = make_sides(N, V)
    teacher = teacher.to(torch.float64, grad=True)
    truth = 2 * reverse_kl(student.probs(), teacher.probs().detach()).sum()
    expected = torch.autograd.grad(truth, student.leaves)
    heads = {"student": student.leaves[1:], "teacher": teacher.leaves[1:]}
    return student, teacher, expected, Partitioned(*(p for side in whose for p in heads[side]))


@both_modes
@pytest.mark.parametrize("caller_holds_it_open", [False, True])
@pytest.mark.parametrize("whose", [["student"], ["teacher"], ["student", "teacher"]], ids="+".join)
def test_partitioned_heads_are_whole_when_they_are_read(whose, caller_holds_it_open, per_token_grad):
    student, teacher, expected, zero = partitioned_sides(whose)
    arguments = fused_arguments(student, teacher) | {"per_token_grad": per_token_grad, "gather": zero.gather}
    if caller_holds_it_open:
        with zero.gather():
            out = fused_linear_divergence(**arguments)
    else:
        out = fused_linear_divergence(**arguments)
    assert zero.entered == 1 and not zero.open
    gradients = torch.autograd.grad(out.loss * 2, student.leaves)
    assert zero.entered == 1 + per_token_grad and not zero.open
    assert_close(gradients, expected)


def test_heads_that_are_whole_are_not_gathered():
    student, teacher = make_sides(N, V)

    def gather():
        raise AssertionError("gathered")

    fused_linear_divergence(**fused_arguments(student, teacher), gather=gather).loss.backward()


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_partitioned_head_without_its_context_is_named(whose):
    student, teacher, _, _ = partitioned_sides([whose])
    with pytest.raises(ValueError, match=f"{whose}_weight is empty, as parameters that ZeRO-3 .* Pass gather="):
        fused_linear_divergence(**fused_arguments(student, teacher))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_partitioned_bias_that_was_left_out_of_the_context_is_named(whose):
    student, teacher = make_sides(N, V)
    teacher = teacher.to(torch.float64, grad=True)
    side = {"student": student, "teacher": teacher}[whose]
    Partitioned(side.bias)
    weight = Partitioned(side.weight)
    with pytest.raises(ValueError, match=f"{whose}_bias is empty.*do not leave out the bias"):
        fused_linear_divergence(**fused_arguments(student, teacher), gather=weight.gather)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_head_that_is_gone_in_the_backward_pass_is_named(whose):
    student, teacher, _, zero = partitioned_sides([whose])
    with zero.gather():
        loss = fused_linear_divergence(**fused_arguments(student, teacher), per_token_grad=True).loss
    with pytest.raises(ValueError, match=f"{whose}_weight is empty, as parameters that ZeRO-3 .* Pass gather="):
        loss.backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_weight": torch.zeros(V, 5)}, "student_hidden must have the 5 features that student_weight takes"),
        ({"teacher_weight": torch.zeros(V, 5)}, "teacher_hidden must have the 5 features that teacher_weight takes"),
        ({"student_weight": torch.zeros(V * 6)}, r"student_weight must have 2 dimensions, got shape \(114,\)"),
        ({"teacher_bias": torch.zeros(V, 1)}, r"teacher_bias must have 1 dimensions, got shape \(19, 1\)"),
    ],
)
def test_a_head_that_does_not_fit_is_named(changed, message):
    arguments = fused_arguments(*make_sides(N, V))
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(**arguments | changed)


# Several devices


@pytest.mark.parametrize("teacher_kind", ["dense", "top-k"])
@pytest.mark.parametrize("rows", ["all", "mask", "weights"])
def test_everything_is_brought_to_the_student_s_head(teacher_kind, rows, monkeypatch):
    """On a device without data. `test_heads_on_device_gpu.py` has the numbers and the gradients' way back."""
    student, teacher = make_sides(N, V)
    arguments = fused_arguments(student, teacher) | {
        "target_ids": TARGETS,
        "student_weight": student.weight.to("meta"),
    }
    if teacher_kind == "top-k":
        arguments = {key: x for key, x in arguments.items() if not key.startswith("teacher")}
        arguments["teacher_topk"] = (TARGETS[:, None], torch.zeros(N, 1))
    mask = torch.arange(N) % 2 == 0
    arguments |= {"all": {}, "mask": {"mask": mask}, "weights": {"token_weights": mask.double()}}[rows]
    given = []
    monkeypatch.setattr(dispatch, "check_topk", lambda *args: None)  # it reads the ids
    monkeypatch.setattr(dispatch, "_run", lambda *args: given.extend(args))
    fused_linear_divergence(**arguments)
    chosen, hidden, weight, bias, problem = given[:5]
    tensors = [chosen.mask, hidden, weight, bias, problem.target_ids]
    tensors += list(problem.topk) if problem.topk is not None else [problem.members[0].hidden, problem.teacher.weight]
    tensors += [problem.weights] if rows == "weights" else []
    tensors += [problem.teacher.bias] if problem.teacher is not None else []
    assert [x.device.type for x in tensors] == ["meta"] * len(tensors)
    assert hidden.shape[0] == problem.target_ids.shape[0] == (N if rows == "all" else int(mask.sum()))
