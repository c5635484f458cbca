"""The few things about the fused divergence that only a CUDA device can show: its native bf16 products."""

import pytest
import torch
from textbook import CASES, CountGemms, Side, divergence, fused_arguments, make_sides

from trl_opd import fused_linear_divergence

pytestmark = pytest.mark.gpu
N, H, V = 96, 64, 3000


def cuda_sides(dtype: torch.dtype) -> tuple[list[Side], list[Side]]:
    """Numbers that bf16 represents, in float64 on the CPU and in `dtype` on the device."""
    double = [Side(*(x.detach().bfloat16().double() for x in side.leaves)) for side in make_sides(N, V, H=(H, H))]
    device = [Side(*(x.to("cuda", dtype).requires_grad_() for x in side.leaves)) for side in double]
    return [side.to(torch.float64, grad=True) for side in double], device


@pytest.mark.parametrize("mode", ["bf16 model", "fp32 model under bf16 autocast"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "adaptive_kl"])
def test_bf16_products_on_the_device_against_float64(name, mode):
    dtype = torch.bfloat16 if mode == "bf16 model" else torch.float32
    (student, teacher), (cuda_student, cuda_teacher) = cuda_sides(dtype)
    truth = divergence(name, student.probs(), teacher.probs())
    weights = torch.linspace(0.5, 1.5, N)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
        out = fused_linear_divergence(
            **fused_arguments(cuda_student, cuda_teacher),
            divergence=name,
            divergence_kwargs=CASES[name][1],
            token_weights=weights.cuda(),
            chunk_bytes=40 * V * 4 * 8,
        )
    assert out.divergence.dtype == torch.float32
    torch.testing.assert_close(out.divergence.double().cpu(), truth.detach(), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad((truth * weights).sum(), student.leaves)
    for ours, theirs in zip(torch.autograd.grad(out.loss, cuda_student.leaves), expected, strict=True):
        assert ours.dtype == dtype
        # The logit gradient is rounded to bf16 for its two products: 2^-9 of each entry at most
        assert (ours.double().cpu() - theirs).norm() < 2**-8 * theirs.norm()


@pytest.mark.parametrize(("frozen", "expected"), [(False, 4), (True, 3)])
def test_number_of_matrix_products_on_the_device(frozen, expected):
    _, (student, teacher) = cuda_sides(torch.bfloat16)
    student.weight.requires_grad_(not frozen)
    fused_linear_divergence(**fused_arguments(student, teacher))  # the first call tries a product of its own
    with CountGemms(N, H, V) as products:
        fused_linear_divergence(**fused_arguments(student, teacher), chunk_bytes=40 * V * 4 * 8)
    assert products.total == pytest.approx(expected)


def test_the_chunk_size_changes_nothing_on_the_device():
    results = []
    for rows in (7, N):
        _, (student, teacher) = cuda_sides(torch.float32)
        out = fused_linear_divergence(**fused_arguments(student, teacher), chunk_bytes=rows * V * 4 * 8)
        results.append([out.divergence, *torch.autograd.grad(out.loss / N, student.leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-6
