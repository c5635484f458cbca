"""Weights of tokens from their own statistics, inside the op: a gate in float64 autograd, and none to the bit."""

import pytest
import torch
from backends import BACKENDS, STATISTICS, assert_gradients, assert_values, device_of, needs_triton
from mixture_cases import (
    FP32,
    FP64,
    MIXTURES,
    TARGETS,
    TOKEN_WEIGHTS,
    WEIGHTS,
    N,
    T,
    V,
    arguments_of,
    ask,
    make_teachers,
    mixed,
    probs_of,
    value_of,
)
from textbook import CASES, CountGemms, make_sides

from trl_opd import fused_linear_divergence
from trl_opd.kernels import fused

pytestmark = pytest.mark.usefixtures("short_blocks")
KEPT = TOKEN_WEIGHTS != 0
TOLD = {"token_weights": TOKEN_WEIGHTS, "target_ids": TARGETS}


def weigh(stats):
    """Of entropies, a divergence and a log-ratio."""
    ratio = stats["teacher_logprobs"] - stats["student_logprobs"]
    return torch.sigmoid(ratio) * stats["teacher_entropy"] + 0.3 * stats["student_entropy"] * stats["forward_kl"]


def textbook_weights(s, probs, weights, mixture):
    def entropy(p):
        return -(p * p.log()).sum(-1)

    if mixture == "loss_sum":
        parts = list(zip(weights, probs, strict=True))
    else:
        parts = [(1.0, mixed(probs, weights, mixture) if len(probs) > 1 else probs[0])]
    at = TARGETS[:, None]
    log_t = sum(w * p.gather(1, at)[:, 0].log() for w, p in parts)
    ratio = log_t - s.gather(1, at)[:, 0].log()
    forward = sum(w * (p * (p / s).log()).sum(-1) for w, p in parts)
    return torch.sigmoid(ratio) * sum(w * entropy(p) for w, p in parts) + 0.3 * entropy(s) * forward


def truth(student, teachers, mixture, name="reverse_kl"):
    student = student.to(FP64, grad=True)
    s, probs = student.logits(T).softmax(-1), probs_of(teachers)
    shares = WEIGHTS if len(probs) > 1 else [1.0]
    weights = textbook_weights(s.detach(), probs, shares, mixture)
    value = value_of(name, s, probs, shares, mixture)
    loss = (value * TOKEN_WEIGHTS * weights).sum()
    return value.detach(), weights, loss.detach(), list(torch.autograd.grad(loss, student.leaves))


def rounded(dtype):
    student, teachers = make_teachers()
    return student.to(dtype).to(FP64), [t.to(dtype).to(FP64) for t in teachers]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_value_weights_and_gradient(backend, dtype, per_token_grad, count, mixture):
    student, teachers = rounded(dtype)
    teachers = teachers[:count]
    value, weights, loss, expected = truth(student, teachers, mixture, "generalized_jsd")
    told = TOLD | {"token_weighting": weigh, "per_token_grad": per_token_grad, "backend": backend}
    told |= {"mixture_weights": WEIGHTS} if count > 1 else {}
    some_rows = 3 * (1 + count) * V * 8
    for chunk_bytes in [some_rows] if backend == "triton" else [1, some_rows, None]:
        out, gradients = ask(student, teachers, mixture, "generalized_jsd", dtype, **told, chunk_bytes=chunk_bytes)
        assert_values(out.divergence.detach().double(), torch.where(KEPT, value, 0.0), dtype)
        assert_values(out.weights.double(), torch.where(KEPT, weights, 0.0), dtype)
        assert_values(out.loss.detach().double(), loss, dtype)
        assert_gradients([g.double() for g in gradients], expected, dtype)
    assert not out.weights.requires_grad


ONES = [(*case.values, name) for case in BACKENDS[:2] for name in CASES]
ONES += [pytest.param("triton", FP32, name, marks=needs_triton) for name in ("reverse_kl", "todi")]


@pytest.mark.parametrize("weights", [None, TOKEN_WEIGHTS])
@pytest.mark.parametrize("support", ["full", "teacher_top_k"])
@pytest.mark.parametrize(("backend", "dtype", "name"), ONES)
def test_ones_are_no_hook_to_the_bit(backend, dtype, support, weights, name):
    student, teachers = make_teachers()
    told = TOLD | {"token_weights": weights, "backend": backend}
    told |= {"support": support, "support_size": 5}
    for count, mixture in ((1, "arithmetic"), (2, "arithmetic"), (2, "loss_sum")):
        plain, others = ask(student, teachers[:count], mixture, name, dtype, **told)
        out, gradients = ask(
            student, teachers[:count], mixture, name, dtype, **told,
            token_weighting=lambda stats: torch.ones_like(stats["divergence"]),
        )  # fmt: skip
        assert torch.equal(out.loss, plain.loss) and plain.weights is None
        assert torch.equal(out.weights, (torch.ones(N) if weights is None else KEPT).to(out.weights.dtype))
        for key in {"divergence", *STATISTICS} - {"overlap", "overlap_advantage"}:
            assert torch.equal(getattr(out, key), getattr(plain, key)), key
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("weights", [None, TOKEN_WEIGHTS])
@pytest.mark.parametrize("support", ["full", "teacher_top_k", "listed"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_constant_is_a_token_weight(backend, dtype, support, weights):
    """Also where a list is all that is known, and without any other weight."""
    student, teachers = make_teachers()
    told = {"target_ids": TARGETS, "backend": backend, "token_weights": weights, "chunk_bytes": 2 * V * 8}
    if support == "listed":
        values, ids = probs_of(teachers[:1])[0].topk(5)
        told |= dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_softcap"))
        told |= {"teacher_logit_scale": 1.0, "teacher_topk": (ids, values.log().to(dtype))}
    else:
        told |= {"support": support, "support_size": 5}
    constant = torch.linspace(-1, 2, N, dtype=FP64)
    rows = constant if weights is None else constant[KEPT]
    seen = []

    def chosen(stats):
        n = len(stats["divergence"])
        seen.append(n)
        return rows[sum(seen) - n : sum(seen)]

    out, gradients = ask(student, teachers[:1], "arithmetic", dtype=dtype, **told, token_weighting=chosen)
    product = constant if weights is None else constant * weights
    expected, others = ask(
        student,
        teachers[:1],
        "arithmetic",
        dtype=dtype,
        **told | {"token_weights": product, "mask": weights != 0 if weights is not None else None},
    )
    assert sum(seen) == len(rows) and len(seen) > 1
    assert_values(out.loss.detach().double(), expected.loss.detach().double(), dtype)
    assert_gradients([g.double() for g in gradients], [g.double() for g in others], dtype)


def test_means_over_teachers_have_the_weights_of_their_rows():
    """In every chunk, of a sum of losses whose weights differ by token."""
    student, teachers = make_teachers()
    weights = torch.rand(N, 3, generator=torch.Generator().manual_seed(1), dtype=FP64).softmax(-1)
    given = []

    def look(stats):
        given.append(stats["teacher_entropy"])
        return torch.ones_like(given[-1])

    told = TOLD | {"mixture_weights": weights, "chunk_bytes": 2 * 4 * V * 8}
    out, _ = ask(student, teachers, "loss_sum", **told, token_weighting=look)
    assert len(given) > 1 and torch.equal(torch.cat(given), out.teacher_entropy[KEPT])


def test_what_the_hook_is_given():
    student, teachers = make_teachers()
    given = []

    def look(stats):
        given.append(stats)
        stats["divergence"].zero_()  # its own
        return torch.ones(len(stats["divergence"]))

    told = TOLD | {"statistics": {"hellinger": None}, "overlap_top_k": 4, "chunk_bytes": 4 * 3 * V * 8}
    out, _ = ask(student, teachers[:2], "contrast", **told, token_weighting=look)
    assert set(given[0]) == {*STATISTICS, "divergence", "hellinger", "target_coef"}
    for name in set(given[0]) - {"divergence"}:
        whole = torch.cat([stats[name] for stats in given])
        result = out.further[name] if name in out.further else getattr(out, name)
        assert torch.equal(whole, result[KEPT]) and not whole.requires_grad
    assert (out.divergence[KEPT] != 0).all()
    given.clear()
    ask(student, teachers[:1], "arithmetic", token_weights=TOKEN_WEIGHTS, token_weighting=look)
    missing = {"student_logprobs", "teacher_logprobs", "overlap", "overlap_advantage"}
    assert set(given[0]) == {*STATISTICS, "divergence"} - missing


def test_a_gate_takes_out_a_row_of_infinite_value():
    eye, s, z = torch.eye(3, dtype=FP64), torch.randn(3, 5, dtype=FP64), torch.zeros(3, 5, dtype=FP64)
    z[1] = torch.tensor([1e4, -1e4, -1e4, -1e4, -1e4])
    s[1] = -z[1] * 3e19  # of the teacher's only entry the student has nothing
    weight = s.T.contiguous().requires_grad_()
    out = fused_linear_divergence(
        eye, weight, eye, z.T.contiguous(), divergence="forward_kl",
        token_weighting=lambda stats: (stats["divergence"] < 1e10).double(),
    )  # fmt: skip
    assert out.divergence.isinf().tolist() == [False, True, False]
    assert torch.isfinite(out.loss) and out.weights.tolist() == [1, 0, 1]
    (gradient,) = torch.autograd.grad(out.loss, weight)
    assert (gradient[:, 1] == 0).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("count", [1, 3])
def test_weights_join_half_precision_gradients_that_wait(monkeypatch, count):
    """As on CUDA, where bf16 gradients of several chunks are multiplied together: they have their weights by then."""

    class Bf16Gradients(fused.Projector):
        def __init__(self, *args):
            super().__init__(*args)
            self.grad_dtype = torch.bfloat16

        def add_gradients(self, grad, weights, hidden, grad_hidden, grad_weight):
            assert grad.dtype == torch.bfloat16 and weights is None
            seen.append(len(grad))
            self.grad_dtype = FP32
            super().add_gradients(grad.float(), weights, hidden, grad_hidden, grad_weight)
            self.grad_dtype = torch.bfloat16

    student, teachers = make_teachers((1.0, None))
    told = TOLD | {"token_weighting": weigh, "chunk_bytes": 4 * 2 * 4 * V * 4}
    _, expected = ask(student, teachers[:count], "loss_sum", dtype=FP32, **told)
    seen = []
    monkeypatch.setattr(fused, "Projector", Bf16Gradients)
    _, gradients = ask(student, teachers[:count], "loss_sum", dtype=FP32, **told)
    assert sum(seen) == N - 1
    for a, b in zip(gradients, expected, strict=True):
        assert 0 < (a - b).norm() <= 4e-3 * b.norm()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[1:])
@pytest.mark.parametrize("per_token_grad", [False, True])
def test_it_costs_no_product(backend, dtype, per_token_grad):
    device = device_of(backend)
    student, teacher = (side.to(FP32) for side in make_sides(6, V, (8, 8)))
    for side in (student, teacher):
        side.hidden, side.weight, side.bias = (x.to(device) for x in side.leaves)
    for x in student.leaves:
        x.requires_grad_()
    told = {"backend": backend, "token_weighting": lambda stats: stats["teacher_entropy"]}
    told |= {"per_token_grad": per_token_grad, "chunk_bytes": 3 * 2 * V * 4}
    with CountGemms(6, 8, V) as products:
        fused_linear_divergence(**arguments_of(student, [teacher]), **told).loss.backward()
    assert products.total == pytest.approx(6 if per_token_grad else 4)


def test_no_gradient_changes_no_value():
    student, teachers = make_teachers()
    out, _ = ask(student, teachers, "loss_sum", **TOLD, token_weighting=weigh)
    with torch.no_grad():
        told = arguments_of(student, teachers) | TOLD | {"mixture": "loss_sum", "temperature": T}
        again = fused_linear_divergence(**told, token_weighting=weigh)
    assert torch.equal(out.loss.detach(), again.loss) and torch.equal(out.weights, again.weights)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda stats: 1.0, "must return a tensor of one weight per row, .* got 1.0"),
        (lambda stats: torch.ones(()), r"one weight per row, \(6,\) .* got shape \(\)"),
        (lambda stats: torch.ones(6, 1), r"one weight per row, \(6,\) .* got shape \(6, 1\)"),
    ],
)
def test_bad_weights(returned, message):
    student, teachers = make_teachers()
    with pytest.raises(ValueError, match=message):
        ask(student, teachers[:1], "arithmetic", **TOLD, token_weighting=returned)


def test_where_there_is_nothing_to_weigh():
    student, teachers = make_teachers((1.0, None))
    with pytest.raises(ValueError, match="token_weighting needs a teacher"):
        fused_linear_divergence(student.hidden, student.weight, per_token_grad=True, token_weighting=weigh)
    with pytest.raises(ValueError, match="loss_backend='liger' cannot compute"):
        ask(student, teachers[:1], "arithmetic", **TOLD, token_weighting=weigh, backend="liger")
