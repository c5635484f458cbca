"""A temperature of each row, against float64 autograd and against one temperature for all."""

import pytest
import torch
from backends import STATISTICS, assert_gradients, assert_values
from mixture_cases import FP32, FP64, TARGETS, TOKEN_WEIGHTS, WEIGHTS, N, V, ask, make_teachers, mixed
from textbook import CASES, divergence

from trl_opd import fused_linear_divergence

KEPT = TOKEN_WEIGHTS != 0
TEMPERATURES = torch.linspace(0.4, 2.5, N, dtype=FP64)
TOLD = {"token_weights": TOKEN_WEIGHTS, "target_ids": TARGETS, "temperature": TEMPERATURES}


def truth(student, teachers, mixture, name):
    student = student.to(FP64, grad=True)
    column = TEMPERATURES[:, None]
    s = student.logits(column).softmax(-1)
    probs = [t.logits(column)[:, :V].softmax(-1) for t in teachers]
    value = divergence(name, s, mixed(probs, WEIGHTS[: len(probs)], mixture) if len(probs) > 1 else probs[0])
    return (
        value.detach(),
        s,
        list(torch.autograd.grad((value * TOKEN_WEIGHTS).sum(), student.leaves, retain_graph=True)),
    )


@pytest.mark.parametrize("student", [(1.2, 5.0), (1.2, None), (1.0, None)])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, student):
    """With a softcap, a logit scale, and neither."""
    student, teachers = make_teachers(student)
    value, s, expected = truth(student, teachers[:1], "arithmetic", name)
    for chunk_bytes in (1, 3 * 2 * V * 8, None):
        out, gradients = ask(student, teachers[:1], "arithmetic", name, **TOLD, chunk_bytes=chunk_bytes)
        assert_values(out.divergence, torch.where(KEPT, value, 0.0), FP64)
        assert_gradients(gradients, expected, FP64)
    entropy = -(s * s.log()).sum(-1)
    assert_values(out.student_entropy, torch.where(KEPT, entropy, 0.0).detach(), FP64)


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "affine"])
def test_of_several_teachers(mixture, monkeypatch):
    monkeypatch.setattr("trl_opd.kernels.mixtures._BLOCK_BYTES", dict.fromkeys(("cpu", "cuda"), 2 * V * 8))  # two rows
    student, teachers = make_teachers()
    how = "geometric" if mixture == "affine" else mixture
    value, _, expected = truth(student, teachers, how, "generalized_jsd")
    told = TOLD | {"mixture_weights": WEIGHTS, "chunk_bytes": 5 * 4 * V * 8}
    out, gradients = ask(student, teachers, mixture, "generalized_jsd", **told)
    assert_values(out.divergence, torch.where(KEPT, value, 0.0), FP64)
    assert_gradients(gradients, expected, FP64)


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP64, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 0.8, 1.2])
@pytest.mark.parametrize("mixture", ["arithmetic", "loss_sum"])
def test_equal_ones_are_one_temperature_to_the_bit(mixture, value, dtype, per_token_grad):
    student, teachers = make_teachers()
    told = TOLD | {"per_token_grad": per_token_grad, "overlap_top_k": 4}
    ours, gradients = ask(
        student, teachers, mixture, dtype=dtype, **told | {"temperature": torch.full((N,), value, dtype=FP64)}
    )
    theirs, others = ask(student, teachers, mixture, dtype=dtype, **told | {"temperature": value})
    for key in ("divergence", *STATISTICS):
        assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_per_token_values_are_differentiated_with_their_rows_temperature():
    student, teachers = make_teachers()
    theirs = student.to(FP64, grad=True)
    s = theirs.logits(TEMPERATURES[:, None]).softmax(-1)
    t = teachers[0].logits(TEMPERATURES[:, None]).softmax(-1)
    at = s.gather(1, TARGETS[:, None]).squeeze(1).log()
    coefs = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=FP64)
    values = divergence("reverse_kl", s, t), at, -(s * s.log()).sum(-1)
    expected = torch.autograd.grad(sum((c * v).sum() for c, v in zip(coefs, values, strict=True)), theirs.leaves)
    ours = student.to(FP64, grad=True)
    told = {"target_ids": TARGETS, "temperature": TEMPERATURES, "per_token_grad": True}
    out = fused_linear_divergence(
        ours.hidden, ours.weight, teachers[0].hidden, teachers[0].weight, student_bias=ours.bias,
        teacher_bias=teachers[0].bias, student_logit_scale=ours.scale, student_softcap=ours.softcap,
        teacher_logit_scale=teachers[0].scale, teacher_softcap=teachers[0].softcap, **told,
    )  # fmt: skip
    values = out.divergence, out.student_logprobs, out.student_entropy
    loss = sum((c * v).sum() for c, v in zip(coefs, values, strict=True))
    assert_gradients(torch.autograd.grad(loss, ours.leaves), expected, FP64)


def test_of_rows_that_are_left_out_nothing_is_asked():
    student, teachers = make_teachers()
    broken = TEMPERATURES.clone()
    broken[0] = 0.0  # of weight 0
    out, _ = ask(student, teachers[:1], "arithmetic", **TOLD | {"temperature": broken})
    plain, _ = ask(student, teachers[:1], "arithmetic", **TOLD)
    assert torch.equal(out.divergence, plain.divergence)


REFUSED = [
    ({"temperature": torch.ones(N + 1)}, r"temperature must have one row per token \(7\), got shape \(8,\)"),
    ({"temperature": torch.ones(N, 1)}, r"temperature must be a number, or a tensor \(N,\)"),
    ({"temperature": torch.zeros(N)}, "temperature must be above 0 and finite in every row"),
    ({"temperature": torch.full((N,), torch.nan)}, "temperature must be above 0 and finite in every row"),
    ({"temperature": torch.full((N,), torch.inf)}, "temperature must be above 0 and finite in every row"),
    ({"temperature": torch.tensor(-1.0)}, "temperature must be above 0, got"),
    ({"backend": "triton"}, "backend='triton' cannot be used: its kernels take one temperature for all rows"),
    ({"backend": "liger"}, "loss_backend='liger' cannot compute a temperature of each token"),
]


@pytest.mark.parametrize(("told", "message"), REFUSED)
def test_bad_ones(told, message):
    student, teachers = make_teachers()
    with pytest.raises(ValueError, match=message):
        ask(student, teachers[:1], "arithmetic", **TOLD | told)


def test_a_list_has_the_temperature_that_it_was_made_at():
    student, _ = make_teachers()
    topk = (torch.arange(3).expand(N, 3), torch.full((N, 3), -1.5, dtype=FP64))
    with pytest.raises(ValueError, match="with teachers that give hidden states"):
        fused_linear_divergence(student.hidden, student.weight, teacher_topk=topk, temperature=TEMPERATURES)
