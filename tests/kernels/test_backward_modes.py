"""What autograd may ask of `fused_linear_divergence` in the backward pass, and the memory that it costs."""

from contextlib import nullcontext

import pytest
import torch
from textbook import fused_arguments, make_sides, reverse_kl
from torch.autograd.graph import save_on_cpu
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from trl_opd import fused_linear_divergence
from trl_opd.kernels import modes

N, V = 7, 19
WEIGHTS = torch.linspace(0.5, 2.0, N).double()
both_modes = pytest.mark.parametrize("per_token_grad", [False, True], ids=["gradient in forward", "per token"])
either_way = pytest.mark.parametrize("use_reentrant", [False, True])


def dense_gradients(student, teacher):
    """Of the weighted sum, from full logits."""
    loss = (reverse_kl(student.probs(), teacher.probs()) * WEIGHTS).sum()
    return torch.autograd.grad(loss, student.leaves)


def fused(student, teacher, per_token_grad=False):
    arguments = fused_arguments(student, teacher) | {"token_weights": WEIGHTS}
    return fused_linear_divergence(**arguments, per_token_grad=per_token_grad).loss


def assert_gradients(student, expected, factor=1.0):
    for leaf, gradient in zip(student.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient * factor, rtol=1e-9, atol=1e-11)


@both_modes
def test_each_backward_of_a_kept_graph_adds_the_same_gradient(per_token_grad):
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    loss = fused(student, teacher, per_token_grad)
    (loss * 3).backward(retain_graph=True)
    assert_gradients(student, expected, 3)
    (loss * -0.7).backward(retain_graph=True)
    assert_gradients(student, expected, 3 - 0.7)
    loss.backward()
    assert_gradients(student, expected, 3 - 0.7 + 1)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@both_modes
def test_autograd_grad_sees_the_same_gradient_as_backward(per_token_grad):
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    loss = fused(student, teacher, per_token_grad) * 2
    for options in ({"retain_graph": True}, {"create_graph": True}, {}):
        for ours, theirs in zip(torch.autograd.grad(loss, student.leaves, **options), expected, strict=True):
            torch.testing.assert_close(ours, theirs * 2, rtol=1e-9, atol=1e-11)
    assert all(leaf.grad is None for leaf in student.leaves)


@both_modes
def test_one_leaf_at_a_time(per_token_grad):
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    loss = fused(student, teacher, per_token_grad) * 5
    for i, leaf in enumerate(student.leaves):
        last = i == len(student.leaves) - 1
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=not last)
        torch.testing.assert_close(gradient, expected[i] * 5, rtol=1e-9, atol=1e-11)


def test_micro_batches_accumulate():
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    for factor in (1.0, 2.0, 4.0):
        (fused(student, teacher) * factor).backward()
    assert_gradients(student, expected, 7)


def test_two_calls_in_one_graph_add_up():
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    (fused(student, teacher) * 2 + fused(student, teacher, per_token_grad=True) * 3).backward()
    assert_gradients(student, expected, 5)


def test_a_branch_of_the_graph_that_frees_its_buffers_leaves_other_calls_alone():
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    first, second = fused(student, teacher), fused(student, teacher)
    (first * 2).backward()
    (second * 2).backward(retain_graph=True)
    second.backward()
    assert_gradients(student, expected, 5)


def test_hooks_see_and_change_the_gradient():
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    seen, accumulated = [], []
    for leaf in student.leaves:
        leaf.register_hook(lambda g: (seen.append(g.clone()), g * 10)[1])
        leaf.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    loss = fused(student, teacher)
    for keep in (True, False):
        seen.clear()
        (loss * 3).backward(retain_graph=keep)
        assert sorted(g.sum().item() for g in seen) == pytest.approx(sorted(g.sum().item() * 3 for g in expected))
    assert len(accumulated) == 6
    assert_gradients(student, expected, 2 * 30)


@both_modes
@either_way
def test_activation_checkpointing_around_the_op(per_token_grad, use_reentrant):
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    tensors = fused_arguments(student, teacher)

    def loss(hidden, weight, bias):
        changed = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias, "token_weights": WEIGHTS}
        return fused_linear_divergence(**tensors | changed, per_token_grad=per_token_grad).loss

    out = checkpoint(loss, *student.leaves, use_reentrant=use_reentrant) * 3
    for done in (1, 2, 3):
        out.backward(retain_graph=done < 3)
        assert_gradients(student, expected, 3 * done)


class HeadModule(torch.nn.Module):
    """A backbone of one layer, and a head whose loss is formed inside the checkpointed forward."""

    def __init__(self, per_token_grad):
        super().__init__()
        self.layer = torch.nn.Linear(6, 6, dtype=torch.float64)
        self.head = torch.nn.Linear(6, V, dtype=torch.float64)
        self.per_token_grad = per_token_grad

    def forward(self, x, teacher):
        return fused_linear_divergence(
            self.layer(x).tanh(),
            self.head.weight,
            teacher.hidden,
            teacher.weight,
            student_bias=self.head.bias,
            teacher_bias=teacher.bias,
            token_weights=WEIGHTS,
            per_token_grad=self.per_token_grad,
        ).loss


@both_modes
@either_way
def test_the_op_inside_a_checkpointed_module(per_token_grad, use_reentrant):
    torch.manual_seed(0)
    module = HeadModule(per_token_grad)
    student, teacher = make_sides(N, V)
    x = student.hidden
    for factor in (2.0, 1.0):
        (checkpoint(module, x, teacher, use_reentrant=use_reentrant) * factor).backward()
    actual = {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}

    logits = module.head(module.layer(x).tanh())
    loss = (reverse_kl(logits.softmax(-1), teacher.probs()) * WEIGHTS).sum() * 3
    names = [name for name, _ in module.named_parameters()] + ["x"]
    for name, theirs in zip(names, torch.autograd.grad(loss, [*module.parameters(), x]), strict=True):
        torch.testing.assert_close(actual[name], theirs, rtol=1e-9, atol=1e-11)


@both_modes
def test_saved_tensors_may_be_kept_elsewhere(per_token_grad):
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    with save_on_cpu():
        loss = fused(student, teacher, per_token_grad)
    (loss * 2).backward(retain_graph=True)
    (loss * 3).backward()
    assert_gradients(student, expected, 5)


@both_modes
def test_a_second_derivative_is_an_error_rather_than_a_wrong_number(per_token_grad):
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    loss = fused(student, teacher, per_token_grad)
    gradients = torch.autograd.grad(loss, student.leaves, create_graph=True)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for gradient in gradients:
        # Without an error this would be the gradient of the loss alone
        with pytest.raises(RuntimeError, match="fused_linear_divergence has no second derivative"):
            (loss + gradient.square().sum()).backward(retain_graph=True)


def test_create_graph_for_the_sake_of_another_term_is_no_error():
    student, teacher = make_sides(N, V)
    other = student.hidden.detach().clone().requires_grad_()
    loss = fused(student, teacher) + other.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, other, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), other)
    torch.testing.assert_close(second, 6 * other)


# Memory


def bf16_sides(size):
    return [side.to(torch.bfloat16, grad=i == 0) for i, side in enumerate(make_sides(N, size, H=(64, 64)))]


def peak_bytes(function) -> int:
    """What the CPU allocator holds at most beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_not_kept_gives_its_gradients_away(dtype, monkeypatch):
    """The head's gradient is not copied, neither by us nor by autograd when it becomes `.grad`."""
    monkeypatch.setattr(modes, "_SCALED_AT_ONCE", 1000)
    size = 2000
    student, teacher = (side.to(dtype, grad=i == 0) for i, side in enumerate(bf16_sides(size)))
    loss = fused_linear_divergence(**fused_arguments(student, teacher)).loss  # all rows, or the hidden states' spread
    saved = [gradient.data_ptr() for gradient in loss.grad_fn.saved_tensors]
    head_bytes = student.weight.numel() * dtype.itemsize
    scaled_loss = loss * 3
    kept = peak_bytes(lambda: torch.autograd.grad(scaled_loss, student.leaves, retain_graph=True))
    assert kept > head_bytes
    assert peak_bytes(scaled_loss.backward) < head_bytes / 4
    assert [leaf.grad.data_ptr() for leaf in student.leaves] == saved


def test_a_kept_graph_gives_copies():
    student, teacher = bf16_sides(V)
    loss = fused(student, teacher)
    before = [g.clone() for g in loss.grad_fn.saved_tensors]
    gradients = torch.autograd.grad(loss * 3, student.leaves, retain_graph=True)
    for saved, old, gradient in zip(loss.grad_fn.saved_tensors, before, gradients, strict=True):
        assert torch.equal(saved, old) and gradient.data_ptr() != saved.data_ptr()


def test_without_a_way_to_ask_autograd_the_gradients_are_copied(monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    student, teacher = make_sides(N, V)
    expected = dense_gradients(student, teacher)
    loss = fused(student, teacher)
    (loss * 2).backward(retain_graph=True)
    loss.backward()
    assert_gradients(student, expected, 3)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_upstream_gradient_is_not_rounded_to_the_head_s_dtype(keep, blocks, monkeypatch):
    monkeypatch.setattr(modes, "_SCALED_AT_ONCE", 100 if blocks else 1 << 20)
    student, teacher = bf16_sides(300)
    loss = fused(student, teacher)
    factor = 1.003  # 1 in bf16
    saved = [gradient.clone() for gradient in loss.grad_fn.saved_tensors]
    for gradient, ours in zip(
        saved, torch.autograd.grad(loss * factor, student.leaves, retain_graph=keep), strict=True
    ):
        expected = (gradient.double() * torch.tensor(factor)).bfloat16()
        assert torch.equal(ours, expected) and not torch.equal(ours, gradient)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_training_loop_learns_from_its_own_gradients_only(set_to_none):
    """`.grad` is the buffer that the op has given away; the next step's is another one."""
    student, teacher = make_sides(N, V)
    reference = student.to(torch.float64, grad=True)
    ours, theirs = (torch.optim.SGD(side.leaves, lr=0.1, momentum=0.9) for side in (student, reference))
    for _ in range(3):
        fused(student, teacher).backward()
        (reverse_kl(reference.probs(), teacher.probs()) * WEIGHTS).sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    for a, b in zip(student.leaves, reference.leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_no_gradient_no_buffers(grad_enabled):
    student, teacher = make_sides(N, V)
    if grad_enabled:
        student = student.to(torch.float64)
    with nullcontext() if grad_enabled else torch.no_grad():
        loss = fused(student, teacher)
    assert loss.grad_fn is None and not loss.requires_grad
