"""The `liger` backend: equal to the reference where Liger is right, and refused with the reason where it is not."""

import pytest
import torch
from textbook import CASES, divergence, fused_arguments, generalized_jsd, make_sides

from trl_opd import fused_linear_divergence
from trl_opd.kernels.supports import SUPPORTS

liger_jsd = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss

N, V = 12, 37
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)


def float32_sides(**kwargs):
    student, teacher = make_sides(N, V, **kwargs)
    return student.to(torch.float32, grad=True), teacher.to(torch.float32)


def jsd(beta: float) -> dict:
    return {"divergence": "generalized_jsd", "divergence_kwargs": {"beta": beta}}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_torch_backend_equals_liger_chunked_jsd(beta, temperature, bias):
    """Liger called as its users call it, with padding marked by a label."""
    student, teacher = float32_sides(bias=bias)
    labels = torch.zeros(N, dtype=torch.long).masked_fill(~MASK, -100)
    module = liger_jsd(0.0, 1.0, beta, compiled=False, temperature=temperature, chunk_size=5)
    theirs = module(student.hidden, student.weight, teacher.hidden, teacher.weight, labels, student.bias, teacher.bias)
    expected = torch.autograd.grad(theirs, student.leaves)
    out = fused_linear_divergence(
        **fused_arguments(student, teacher), **jsd(beta), token_weights=MASK / MASK.sum(), temperature=temperature
    )
    torch.testing.assert_close(out.loss, theirs, rtol=2e-6, atol=0)
    for ours, other in zip(torch.autograd.grad(out.loss, student.leaves), expected, strict=True):
        assert (ours - other).norm() < 3e-6 * other.norm()


@pytest.mark.parametrize("chunk_bytes", [None, 5 * 2 * V * 4])
@pytest.mark.parametrize("rows", ["all", "mask", "weights", "mask and weights"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_liger_backend_equals_the_textbook(beta, rows, chunk_bytes):
    student, teacher = float32_sides()
    choice = {"mask": MASK} if "mask" in rows else {}
    if "weights" in rows:
        choice["token_weights"] = 0.7 * MASK
    out = fused_linear_divergence(
        **fused_arguments(student, teacher),
        **jsd(beta),
        **choice,
        temperature=0.8,
        chunk_bytes=chunk_bytes,
        backend="liger",
    )
    double = student.to(torch.float64, grad=True), teacher.to(torch.float64)
    values = generalized_jsd(double[0].probs(0.8), double[1].probs(0.8), beta)
    weights = torch.ones(N) if rows == "all" else MASK * (0.7 if "weights" in rows else 1.0)
    truth = (values * weights).sum()
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=0)
    assert out.divergence is None and out.reverse_kl is None and torch.equal(out.rows, weights != 0)
    actual = torch.autograd.grad(out.loss, student.leaves)
    for ours, theirs in zip(actual, torch.autograd.grad(truth, double[0].leaves), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (actual[0][weights == 0] == 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_two_kls_go_through_liger_by_name(name):
    student, teacher = float32_sides()
    out = fused_linear_divergence(**fused_arguments(student, teacher), divergence=name, backend="liger")
    truth = divergence(name, student.probs().double(), teacher.probs().double()).sum()
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mask", [None, torch.zeros(N, dtype=torch.bool)], ids=["no tokens", "all masked"])
def test_nothing_to_train_on_is_a_differentiable_zero(mask):
    student, teacher = float32_sides()
    arguments = fused_arguments(student, teacher)
    if mask is None:
        arguments["student_hidden"] = student.hidden.detach()[:0].requires_grad_()
        arguments["teacher_hidden"] = teacher.hidden[:0]
    out = fused_linear_divergence(**arguments, mask=mask, backend="liger")
    assert out.loss == 0
    out.loss.backward()
    assert (arguments["student_hidden"].grad == 0).all() and (student.weight.grad == 0).all()
    assert (student.bias.grad == 0).all()


def test_a_frozen_head_gets_no_gradient():
    student, teacher = float32_sides(bias=False)
    student.weight.requires_grad_(False)
    fused_linear_divergence(**fused_arguments(student, teacher), backend="liger").loss.backward()
    assert student.weight.grad is None and student.hidden.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changed", "what", "reason"),
    [
        *(
            (
                {"divergence": name, "divergence_kwargs": CASES[name][1]},
                name,
                "forward KL, reverse KL and the generalized JSD only",
            )
            for name in list(CASES)[3:]
        ),
        *(
            ({"support": support, "support_size": 4}, "a top-k support", "compares whole vocabularies")
            for support in SUPPORTS[1:-1]
        ),
        (
            {"teacher_topk": (torch.arange(3).expand(N, 3), torch.zeros(N, 3)), "teacher_hidden": None}
            | {"teacher_weight": None},
            "a top-k support",
            "compares whole vocabularies",
        ),
        ({"per_token_grad": True}, "differentiable per-token values", "returns a scalar"),
        ({"teacher_weight": torch.zeros(V + 3, 9)}, f"heads of {V} and {V + 3}", "gives the padding probability"),
        ({"vocab_size": V - 2}, f"the first {V - 2} of {V} entries", "compares all of them"),
        ({"student_softcap": 5.0}, "a softcap or a logit scale", "plain projection"),
        ({"teacher_softcap": 5.0}, "a softcap or a logit scale", "plain projection"),
        ({"student_logit_scale": 2.0}, "a softcap or a logit scale", "plain projection"),
        ({"teacher_logit_scale": 2.0}, "a softcap or a logit scale", "plain projection"),
        ({"token_weights": torch.linspace(1, 2, N)}, "token weights that differ", "takes a mean"),
        ({"token_weights": MASK.float(), "mask": torch.ones(N).bool()}, "token weights that differ", "takes a mean"),
    ],
)
def test_what_liger_gets_wrong_is_refused_with_the_reason(changed, what, reason):
    student, teacher = float32_sides()
    with pytest.raises(ValueError, match=rf"loss_backend='liger' cannot compute {what}.*{reason}.*'auto' or 'torch'"):
        fused_linear_divergence(**fused_arguments(student, teacher) | changed, backend="liger")


@pytest.mark.parametrize("how", ["autocast", "bf16 operands"])
def test_logits_below_float32_are_refused(how):
    student, teacher = float32_sides()
    if how == "bf16 operands":
        student, teacher = student.to(torch.bfloat16, grad=True), teacher.to(torch.bfloat16)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        pytest.raises(ValueError, match=r"torch.bfloat16 logits.*off by 340%"),
    ):
        fused_linear_divergence(**fused_arguments(student, teacher), backend="liger")
