"""What the backends lose to float32 and bf16: near a matched teacher, and beside full-softmax autograd."""

import pytest
import torch
from backends import FP32, FP64, SINGLE, ask, rows_of, triton_backend, truth_of
from textbook import CASES, Side, divergence, make_sides
from torch.nn.functional import linear

from trl_opd.kernels import fused
from trl_opd.kernels.projection import Projector

BF16 = torch.bfloat16
NAMES = list(CASES)
N, V = 6, 4096


@pytest.fixture(autouse=True)
def several_blocks_a_row(monkeypatch):
    if triton_backend is not None:
        monkeypatch.setattr(triton_backend, "MAX_BLOCK", 1024)


def nearly_matched(gap: float = 4e-4, size: int = V) -> list[Side]:
    """Two heads whose products float32 represents, so that both backends get the true logits."""
    generator = torch.Generator().manual_seed(0)

    def multiples(bits: int, spread: float, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=FP64) * spread * 2**bits).round() / 2**bits

    hidden, weight = multiples(3, 1.0, N, 16), multiples(10, 0.4, size, 16)
    sides = [Side(hidden, weight), Side(hidden, weight + multiples(14, gap, size, 16))]
    for side in sides:
        assert torch.equal(side.to(FP32).logits().double(), side.logits())
    return [sides[0].to(FP64, grad=True), sides[1]]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_a_divergence_of_1e_6_has_five_digits_in_every_row(backend, dtype, name):
    sides = nearly_matched()
    value = divergence(name, *(side.probs() for side in sides)).detach()
    assert value.min() > 1e-7 and value.max() < 4e-6
    ours = ask(backend, dtype, *sides, name)
    assert ((ours.divergence - value) / value).abs().max() < 1e-5
    for kl in ("forward_kl", "reverse_kl"):
        truth = divergence(kl, *(side.probs() for side in sides)).detach()
        assert ((getattr(ours, kl) - truth) / truth).abs().max() < 1e-5
    # Which the textbook form in float32 has not
    textbook = divergence(name, *(side.to(FP32).probs() for side in sides)).double()
    assert ((textbook - value) / value).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_every_divergence_and_its_gradient_near_a_matched_teacher(backend, dtype, name):
    sides = nearly_matched()
    value, gradients = truth_of(*sides, name)
    ours = ask(backend, dtype, *sides, name)
    assert ((ours.divergence - value) / value).abs().max() < 5e-5
    bound = 1e-2 if name == "total_variation" else 1e-3  # whose gradient jumps where s = t to rounding
    for a, b in zip(ours.gradients, gradients, strict=True):
        assert (a - b).norm() < bound * b.norm()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_no_kl_is_ever_negative(backend, dtype, name):
    generator = torch.Generator().manual_seed(0)
    spreads = torch.tensor([0.3, 1.0, 12.0]).repeat(4)[:, None]
    gaps = 10.0 ** -torch.arange(1, 13)[:, None]
    for size in (7, 1500):
        logits = spreads * torch.randn(12, size, generator=generator)
        teacher_logits = logits + gaps * torch.randn(12, size, generator=generator)
        ours = ask(backend, dtype, *rows_of(logits, teacher_logits), name, frozen=True)
        for value in (ours.divergence, ours.forward_kl, ours.reverse_kl):
            assert value.min() >= 0, size


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_a_matched_teacher_gives_exactly_zero(backend, dtype, name, temperature):
    student, _ = make_sides(3, 1500, H=(8, 8))
    student = Side(student.hidden, student.weight, student.bias, 1.0, 9.0)
    ours = ask(backend, dtype, student, student, name, temperature=temperature)
    assert (ours.divergence == 0).all() and (ours.forward_kl == 0).all() and (ours.reverse_kl == 0).all()
    assert all((g == 0).all() for g in ours.gradients)


class Bf16Gradients(Projector):
    """As on a GPU, where the logits' gradients are bf16 operands of their two products, whose sums are float32."""

    def __init__(self, *args):
        super().__init__(*args)
        self.grad_dtype = BF16

    def add_gradients(self, grad, *others):
        assert grad.dtype == BF16
        self.grad_dtype = self.out_dtype
        super().add_gradients(grad.to(self.out_dtype), *others)
        self.grad_dtype = BF16


def bf16_sides(matched: bool) -> list[Side]:
    """Both models in float64, every number one that bf16 represents."""
    student, teacher = make_sides(N=10, V=1500, H=(24, 24), bias=False)
    if matched:
        noise = torch.randn(teacher.weight.shape, generator=torch.Generator().manual_seed(1), dtype=FP64)
        teacher = Side(student.hidden.detach(), student.weight.detach() + 0.03 * noise)
    student, teacher = (Side(*(x.detach().to(BF16).double() for x in side.leaves)) for side in (student, teacher))
    return [student.to(FP64, grad=True), teacher]


@pytest.mark.parametrize("products", [Projector, Bf16Gradients])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_bf16_gradients_beside_those_of_full_float32_softmax_autograd(
    backend, dtype, name, matched, products, monkeypatch
):
    """Both from the same bf16 numbers: bf16 linear, `.float()`, log-softmax and autograd is what TRL's trainers do."""
    monkeypatch.setattr(fused, "Projector", products)
    sides = bf16_sides(matched)
    _, truth = truth_of(*sides, name)
    ours = ask(backend, BF16, *sides, name)

    student, teacher = sides[0].to(BF16, grad=True), sides[1].to(BF16)
    logits = [linear(side.hidden, side.weight).float() for side in (student, teacher)]
    value = divergence(name, logits[0].log_softmax(-1).exp(), logits[1].log_softmax(-1).exp())
    reference = torch.autograd.grad(value.sum(), student.leaves)
    for a, b, c in zip(ours.gradients, truth, reference, strict=True):
        assert (a - b).norm() <= 1.5 * (c.double() - b).norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_bf16_models_are_compared_in_float32(backend, dtype, name):
    """The products of bf16 numbers are exact in float32; what is rounded is the gradient, once."""
    sides = bf16_sides(matched=True)
    value, gradients = truth_of(*sides, name)
    ours = ask(backend, BF16, *sides, name)
    assert ours.out.divergence.dtype == FP32
    assert (ours.divergence - value).norm() < 2e-5 * value.norm()
    for a, b in zip(ours.gradients, gradients, strict=True):
        assert (a - b).norm() <= 1.05 * (b.to(BF16).double() - b).norm()
