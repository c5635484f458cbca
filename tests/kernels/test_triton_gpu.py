"""What only a CUDA device can show of the Triton backend: real launches, bf16 products, long rows, large offsets."""

from dataclasses import replace

import pytest
import torch
from backends import STATISTICS, served
from textbook import CASES, CountGemms, Side, divergence, fused_arguments, make_sides

from trl_opd import fused_linear_divergence

pytestmark = pytest.mark.gpu
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = served("triton")
N, H, V = 70, 64, 5003  # an odd vocabulary of several blocks


@pytest.fixture(autouse=True)
def exact_products():
    """Of float32 operands."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_device(side: Side, dtype: torch.dtype, device: str = "cuda", grad: bool = False) -> Side:
    hidden, weight, bias = (
        None if x is None else x.detach().to(device, dtype).requires_grad_(grad)
        for x in (side.hidden, side.weight, side.bias)
    )
    return replace(side, hidden=hidden, weight=weight, bias=bias)


def sides(dtype: torch.dtype, shaped: bool = False, tokens: int = N, size: int = V) -> tuple[Side, Side, Side, Side]:
    """Student and teacher in float64 and in `dtype`, of numbers that `dtype` represents, all on the device."""
    double = [on_device(on_device(side, dtype), FP64) for side in make_sides(tokens, size, H=(H, H))]
    if shaped:
        double = [replace(side, scale=scale, softcap=12.0) for side, scale in zip(double, (1.3, 0.8), strict=True)]
    double[0] = on_device(double[0], FP64, grad=True)
    return *double, *(on_device(side, dtype, grad=i == 0) for i, side in enumerate(double))


def targets(tokens: int = N, size: int = V) -> torch.Tensor:
    return torch.randint(0, size, (tokens,), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("chunk_rows", [None, 9])
@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_against_float64(name, dtype, shaped, chunk_rows):
    """With `chunk_rows` there are 8 chunks, so that bf16 gradients wait in two windows, the second one ragged."""
    student, teacher, ours, theirs = sides(dtype, shaped)
    weights = torch.linspace(-0.3, 1.5, N, device="cuda")
    truth = divergence(name, student.probs(0.9).cpu(), teacher.probs(0.9).cpu()).cuda()
    entry = 2 * 4 + (4 * 2 if dtype == BF16 else 0)
    out = fused_linear_divergence(
        **fused_arguments(ours, theirs),
        divergence=name,
        divergence_kwargs=CASES[name][1],
        temperature=0.9,
        token_weights=weights,
        chunk_bytes=None if chunk_rows is None else chunk_rows * V * entry,
        backend="triton",
    )
    assert out.divergence.dtype == FP32
    torch.testing.assert_close(out.divergence.double(), truth.detach(), rtol=2e-5, atol=2e-6)
    expected = torch.autograd.grad((truth * weights).sum(), student.leaves)
    bound = {FP32: 1e-5, FP16: 2**-10, BF16: 2**-7}[dtype]  # in bf16 the logits' gradient is rounded too
    for a, b in zip(torch.autograd.grad(out.loss, ours.leaves), expected, strict=True):
        assert a.dtype == dtype and torch.isfinite(a).all()
        assert (a.double() - b).norm() < bound * b.norm()


KINDS = ["full", "teacher_top_k", "union_top_k", "intersection_top_k", "top-k teacher", "none"]


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "adaptive_kl"])
def test_the_two_backends_agree_on_the_device(name, kind, per_token_grad):
    if kind == "none" and not per_token_grad:
        pytest.skip("without a teacher there are per-token values only")
    results = []
    for backend in ("torch", "triton"):
        _, teacher, ours, theirs = sides(FP32, shaped=True)
        arguments = fused_arguments(ours, theirs)
        if kind in ("top-k teacher", "none"):
            arguments = {key: x for key, x in arguments.items() if not key.startswith("teacher")}
        if kind == "top-k teacher":
            logprobs, ids = teacher.probs().log().topk(64)
            ids[3, 10:], ids[5] = -1, -1
            arguments["teacher_topk"] = ids, logprobs.float()
        elif kind not in ("full", "none"):
            arguments |= {"support": kind, "support_size": 64}
        if kind != "none":
            arguments["statistics"] = {"teacher_rank": None}
        out = fused_linear_divergence(
            **arguments,
            divergence=name,
            divergence_kwargs=CASES[name][1],
            target_ids=targets(),
            overlap_top_k=20,
            per_token_grad=per_token_grad,
            backend=backend,
        )
        loss = out.loss
        if per_token_grad:
            loss = loss + out.student_logprobs.square().sum() + out.student_entropy.square().sum()
        statistics = {s: x.detach() for s in ("divergence", *STATISTICS) if (x := getattr(out, s)) is not None}
        statistics |= out.further
        results.append((statistics, torch.autograd.grad(loss, ours.leaves)))
    (statistics, gradients), (their_statistics, their_gradients) = results
    assert statistics.keys() == their_statistics.keys()
    for s, value in statistics.items():
        torch.testing.assert_close(their_statistics[s], value, rtol=2e-5, atol=2e-5, msg=lambda m, s=s: f"{s}: {m}")
    for a, b in zip(their_gradients, gradients, strict=True):
        assert (a - b).norm() < 2e-5 * b.norm()


def test_auto_is_triton_on_the_device():
    _, _, ours, theirs = sides(FP32)
    auto, triton = (
        fused_linear_divergence(**fused_arguments(ours, theirs), backend=backend) for backend in ("auto", "triton")
    )
    assert torch.equal(auto.divergence, triton.divergence)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_two_runs_are_bit_for_bit_equal(dtype):
    """A missing barrier between passes would show here now and then."""
    results = []
    for _ in range(5):
        _, _, ours, theirs = sides(dtype, shaped=True)
        out = fused_linear_divergence(
            **fused_arguments(ours, theirs), divergence="generalized_jsd", target_ids=targets(), backend="triton"
        )
        results.append([out.divergence, out.student_logprobs, *torch.autograd.grad(out.loss, ours.leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["reverse_kl", "generalized_jsd", "adaptive_kl"])
def test_a_row_of_a_large_vocabulary(name):
    tokens, size = 5, 151_937
    student, teacher, ours, theirs = sides(BF16, tokens=tokens, size=size)
    truth = divergence(name, student.probs().cpu(), teacher.probs().cpu()).detach().cuda()
    out = fused_linear_divergence(
        **fused_arguments(ours, theirs),
        divergence=name,
        divergence_kwargs=CASES[name][1],
        overlap_top_k=100,
        backend="triton",
    )
    torch.testing.assert_close(out.divergence.double(), truth, rtol=2e-5, atol=2e-6)
    tops = [side.logits().topk(100).indices.tolist() for side in (student, teacher)]
    common = [len({*a} & {*b}) / 100 for a, b in zip(*tops, strict=True)]
    assert out.overlap.tolist() == pytest.approx(common)
    out.loss.backward()
    assert all(torch.isfinite(x.grad).all() for x in ours.leaves)


def test_offsets_beyond_32_bits():
    """A chunk of more than 2³¹ logits: its last rows equal those of a call of their own."""
    tokens, size = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of the device's memory")
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight, other = (
        torch.randn(n, 16, generator=generator, device="cuda", dtype=BF16) for n in (tokens, size, size)
    )
    chunk_bytes = tokens * size * (2 * 4 + 4 * 2)
    results = []
    for rows in (slice(0, tokens), slice(tokens - 8, tokens)):
        leaf = hidden[rows].clone().requires_grad_()
        out = fused_linear_divergence(leaf, weight, hidden[rows], other, chunk_bytes=chunk_bytes, backend="triton")
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        results.append((out.divergence[-8:], gradient[-8:].float()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_the_current_one():
    student, teacher, ours, theirs = sides(FP32)
    ours, theirs = on_device(ours, FP32, "cuda:1", grad=True), on_device(theirs, FP32, "cuda:1")
    truth = divergence("reverse_kl", student.probs().cpu(), teacher.probs().cpu()).detach()
    out = fused_linear_divergence(**fused_arguments(ours, theirs), backend="triton")
    assert out.divergence.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    torch.testing.assert_close(out.divergence.cpu().double(), truth, rtol=2e-5, atol=2e-6)
    out.loss.backward()
    assert ours.weight.grad.device == torch.device("cuda:1")


@pytest.mark.parametrize(("frozen", "expected"), [(False, 4), (True, 3)])
def test_number_of_matrix_products_on_the_device(frozen, expected):
    _, _, ours, theirs = sides(BF16)
    ours.weight.requires_grad_(not frozen)
    arguments = fused_arguments(ours, theirs) | {"chunk_bytes": 9 * V * 16, "backend": "triton"}
    fused_linear_divergence(**arguments)  # what torch can multiply is tried out once
    with CountGemms(N, H, V) as products:
        fused_linear_divergence(**arguments)
    assert products.total == pytest.approx(expected)


def test_memory_stays_within_the_budget_however_many_tokens():
    size, budget, peaks = 65_536, 64 << 20, []
    for tokens in (512, 4096):
        generator = torch.Generator("cuda").manual_seed(0)
        hidden, weight, other = (
            torch.randn(n, 32, generator=generator, device="cuda", dtype=BF16) for n in (tokens, size, size)
        )
        leaves = hidden.clone().requires_grad_(), weight.requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fused_linear_divergence(*leaves, hidden, other, chunk_bytes=budget, backend="triton").loss.backward()
        gradients = sum(x.numel() * (4 + 2) for x in leaves)  # summed in fp32, kept in bf16
        peaks.append(torch.cuda.max_memory_allocated() - before - gradients)
    assert max(peaks) < budget + (16 << 20) and abs(peaks[1] - peaks[0]) < 16 << 20, peaks
