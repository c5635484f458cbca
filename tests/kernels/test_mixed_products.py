"""
The products of a CUDA device (half operands, fp32 result), stood in for on the CPU: which operands meet, and when.

The stand-ins refuse what the device refuses, as read in torch's CUDA sources. test_kernels_gpu.py has the real ones.
"""

import pytest
import torch
from textbook import CASES, CountGemms, Side, divergence, fused_arguments, make_sides

from trl_opd import fused_linear_divergence
from trl_opd.kernels import projection

N, H, V = 38, 16, 300
ROW = V * (2 * 4 + 4 * 2)  # bytes of a row: two models' fp32 logits, and four chunks of bf16 gradients that wait


def mm(a, b, out_dtype, *, out):
    assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    assert out_dtype == out.dtype == torch.float32 and out.shape == (a.shape[0], b.shape[1])
    return out.copy_(a.float() @ b.float())


def make_addmm(adds):
    def addmm(x, a, b, out_dtype, *, beta=1, alpha=1, out=None):
        if not adds and x.dtype != b.dtype:
            raise RuntimeError("self and mat2 must have the same dtype")
        assert a.dtype == b.dtype == torch.bfloat16 and x.dtype == out_dtype == torch.float32
        result = x + a.float() @ b.float()
        return result if out is None else out.copy_(result)

    return addmm


@pytest.fixture(params=[True, False], ids=["adds", "does not add"])
def device_products(request, monkeypatch):
    """A CPU that multiplies as a CUDA device does; whether it can add such a product to an fp32 matrix depends."""
    library = torch.library.Library("aten", "IMPL")
    addmm = make_addmm(request.param)
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("mm.dtype", lambda a, b, dtype: mm(a, b, dtype, out=torch.empty(a.shape[0], b.shape[1])), "CPU")
    library.impl("addmm.dtype", addmm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(projection, "has_mixed_products", lambda device: True)
    monkeypatch.setattr(projection, "_PRODUCT_BYTES", 64 * H * 4)
    projection._adds_mixed_products.cache_clear()
    assert projection._adds_mixed_products(torch.device("cpu")) == request.param
    yield
    projection._adds_mixed_products.cache_clear()
    library._destroy()


def sides(dtype):
    """Numbers that bf16 represents, in float64 and in `dtype`."""
    exact = [Side(*(x.detach().bfloat16().double() for x in side.leaves)) for side in make_sides(N, V, H=(H, H))]
    return exact[0].to(torch.float64, grad=True), exact[1], exact[0].to(dtype, grad=True), exact[1].to(dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [3, 5, 10, 64], ids="{} rows a chunk".format)
@pytest.mark.parametrize("name", ["reverse_kl", "generalized_jsd"])
def test_gradients_that_wait_in_bf16_for_their_product(device_products, name, rows, backend):
    """3 and 5: four windows and two, ragged; 10: one window; 64: one chunk."""
    student, teacher, half_student, half_teacher = sides(torch.bfloat16)
    weights = torch.linspace(-0.5, 1.5, N, dtype=torch.float64)
    truth = divergence(name, student.probs(), teacher.probs())
    expected = torch.autograd.grad((truth * weights).sum(), student.leaves)
    with CountGemms(N, H, V) as products:
        out = fused_linear_divergence(
            **fused_arguments(half_student, half_teacher),
            divergence=name,
            divergence_kwargs=CASES[name][1],
            token_weights=weights,
            chunk_bytes=rows * ROW,
            backend=backend,
        )
    torch.testing.assert_close(out.divergence.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    assert products.total == pytest.approx(4)
    for ours, theirs in zip(torch.autograd.grad(out.loss, half_student.leaves), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 2**-7 * theirs.norm()
