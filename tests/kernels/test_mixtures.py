"""Several teachers in each mixture against the textbook in float64; equal teachers are one."""

import pytest
import torch
from backends import BACKENDS, SINGLE, assert_gradients, assert_values, served
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
    truth,
    value_of,
)
from textbook import CASES, divergence_on, make_sides, overlap_advantage, support_of

from trl_opd import fused_linear_divergence
from trl_opd.kernels import fused
from trl_opd.kernels.mixtures import shares

pytestmark = pytest.mark.usefixtures("short_blocks")
TOLD = {"mixture_weights": WEIGHTS, "token_weights": TOKEN_WEIGHTS, "target_ids": TARGETS}
KEPT = TOKEN_WEIGHTS != 0
STATISTICS = [
    "divergence",
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprobs",
    "teacher_logprobs",
    "overlap",
    "student_logsumexp",
    "teacher_logsumexp",
]


def rounded(sides, dtype):
    student, teachers = sides
    return student.to(dtype).to(FP64), [t.to(dtype).to(FP64) for t in teachers]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_value_and_gradient_of_every_divergence(backend, dtype, mixture, name):
    if name not in served(backend):
        pytest.skip(f"{backend} has no {name}")
    student, teachers = rounded(make_teachers(), dtype)
    out, gradients = ask(student, teachers, mixture, name, dtype, backend=backend, **TOLD)
    value, expected = truth(student, teachers, mixture, name)
    assert_values(out.divergence.double(), torch.where(KEPT, value, 0.0), dtype)
    assert_values(out.loss.detach().double(), (value * TOKEN_WEIGHTS).sum(), dtype)
    assert_gradients([g.double() for g in gradients], expected, dtype)


def entropy(p):
    return -(p * p.log()).sum(-1)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_statistics_are_those_of_the_mixture_or_the_means_over_the_teachers(backend, dtype, mixture):
    student, teachers = rounded(make_teachers(), dtype)
    out, _ = ask(student, teachers, mixture, dtype=dtype, backend=backend, **TOLD, overlap_top_k=5)
    s, probs = student.logits(T).softmax(-1), probs_of(teachers)
    alone = [(1.0, p) for p in [mixed(probs, WEIGHTS, mixture)]]
    if mixture == "loss_sum":
        alone = list(zip(WEIGHTS, probs, strict=True))
    at = TARGETS[:, None]
    top = s.topk(5).indices
    expected = {
        "forward_kl": sum(w * (p * (p / s).log()).sum(-1) for w, p in alone),
        "reverse_kl": sum(w * (s * (s / p).log()).sum(-1) for w, p in alone),
        "teacher_entropy": sum(w * entropy(p) for w, p in alone),
        "teacher_logprobs": sum(w * p.log().gather(1, at)[:, 0] for w, p in alone),
        "overlap": sum(
            w * (p.topk(5).indices[:, :, None] == top[:, None]).any(-1).double().mean(-1) for w, p in alone
        ),
        "overlap_advantage": sum(w * overlap_advantage(s, p, 5) for w, p in alone),
        "student_entropy": entropy(s),
        "student_logprobs": s.log().gather(1, at)[:, 0],
        "student_logsumexp": student.logits(T).logsumexp(-1),
    }
    for key, value in expected.items():
        assert_values(getattr(out, key).double(), torch.where(KEPT, value.detach(), 0.0), dtype)


@pytest.mark.parametrize("weights", [None, [0.3, 0.7], [0.1, 0.2, 0.7]])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_equal_teachers_are_one_teacher_to_the_bit(backend, dtype, mixture, weights):
    student, teachers = rounded(make_teachers(), dtype)
    count = 2 if weights is None else len(weights)
    told = {"backend": backend, "token_weights": TOKEN_WEIGHTS.to(dtype), "target_ids": TARGETS, "overlap_top_k": 5}
    if backend == "triton" and mixture != "loss_sum":  # whose tanh is not PyTorch's, which forms the mixture
        teachers = [t for t in teachers if t.softcap is None]
    for teacher in teachers:
        one, gradients = ask(student, [teacher], mixture, "todi", dtype, **told)
        several, others = ask(student, [teacher] * count, mixture, "todi", dtype, **told, mixture_weights=weights)
        assert torch.equal(one.loss, several.loss)
        for key in STATISTICS:
            assert torch.equal(getattr(one, key), getattr(several, key)), key
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_shares_add_up_to_one_to_the_bit_and_small_ones_keep_their_digits():
    weights = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=FP64).pow(9).softmax(-1)
    weights = torch.cat([weights, torch.tensor([[1e-30, 0.3, 0.7, 1e-20]], dtype=FP64)])
    rest, own = shares(weights, FP32)
    assert (rest + own == 1).all()
    for i in range(1, 4):
        total = weights[:, : i + 1].sum(-1)
        torch.testing.assert_close(own[:, i].double(), weights[:, i] / total, rtol=2e-7, atol=0)
        torch.testing.assert_close(rest[:, i].double(), weights[:, :i].sum(-1) / total, rtol=2e-7, atol=0)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_weights_are_divided_by_a_sum_that_is_1_but_for_rounding(mixture):
    student, teachers = make_teachers()
    out, _ = ask(student, teachers, mixture, **TOLD | {"mixture_weights": [w * (1 + 5e-6) for w in WEIGHTS]})
    value, _ = truth(student, teachers, mixture)
    assert_values(out.divergence, torch.where(KEPT, value, 0.0), FP64)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_equal_teachers_are_one_teacher_in_float64(mixture):
    student, teachers = make_teachers()
    one, gradients = ask(student, teachers[1:2], mixture, **TOLD | {"mixture_weights": None})
    several, others = ask(student, teachers[1:2] * 3, mixture, **TOLD)
    torch.testing.assert_close(one.divergence, several.divergence, rtol=1e-14, atol=1e-15)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("one", [0, 1, 2])
def test_a_weight_near_one_leaves_one_teacher(mixture, one):
    student, teachers = make_teachers()
    weights = [1 - 2e-13 if i == one else 1e-13 for i in range(3)]
    several, gradients = ask(student, teachers, mixture, "forward_kl", **TOLD | {"mixture_weights": weights})
    alone, expected = ask(student, [teachers[one]], mixture, "forward_kl", **TOLD | {"mixture_weights": None})
    torch.testing.assert_close(several.divergence, alone.divergence, rtol=1e-10, atol=1e-11)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "mixture"), [("forward_kl", "arithmetic"), ("reverse_kl", "geometric")])
def test_two_pairs_of_objectives_have_one_gradient(name, mixture):
    """s − Σ w p = Σ w (s − p), and log s − Σ w log p is the mean of the log-ratios."""
    student, teachers = make_teachers()
    (_, a), (_, b), (_, other) = (
        ask(student, teachers, kind, name, **TOLD)
        for kind in (mixture, "loss_sum", "geometric" if mixture == "arithmetic" else "arithmetic")
    )
    for x, y, z in zip(a, b, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        assert (x - z).norm() > 1e-2 * x.norm()


@pytest.mark.parametrize(("count", "rows_in_chunk"), [(2, 1), (3, 3)])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_chunks_change_nothing(backend, dtype, per_token_grad, count, mixture, rows_in_chunk):
    student, teachers = make_teachers()
    weights = [w / sum(WEIGHTS[:count]) for w in WEIGHTS[:count]]
    told = TOLD | {"mixture_weights": weights, "backend": backend, "per_token_grad": per_token_grad}
    buffers = 3 if mixture != "loss_sum" or count == 2 else 4
    told["chunk_bytes"] = rows_in_chunk * buffers * V * torch.finfo(dtype).bits // 8
    small, gradients = ask(student, teachers[:count], mixture, "generalized_jsd", dtype, **told)
    value, expected = truth(student, teachers[:count], mixture, "generalized_jsd", weights)
    assert_values(small.divergence.double(), torch.where(KEPT, value, 0.0), dtype)
    assert_gradients([g.double() for g in gradients], expected, dtype)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_per_token_values_are_differentiable(backend, dtype, mixture):
    student, teachers = rounded(make_teachers(), dtype)
    ours = student.to(dtype, grad=True)

    def objective(divergence, logprobs, entropy):
        return (divergence.square() * TOKEN_WEIGHTS).sum() + (logprobs * entropy * TOKEN_WEIGHTS).sum()

    told = {"backend": backend, "per_token_grad": True, "divergence": "skew_reverse_kl"}
    out = fused_linear_divergence(
        **arguments_of(ours, [t.to(dtype) for t in teachers]),
        **TOLD,
        **told,
        divergence_kwargs=CASES["skew_reverse_kl"][1],
        temperature=T,
        mixture=mixture,
        chunk_bytes=2 * 4 * V * 8,
    )
    gradients = torch.autograd.grad(objective(out.divergence, out.student_logprobs, out.student_entropy), ours.leaves)
    theirs = student.to(FP64, grad=True)
    s = theirs.logits(T).softmax(-1)
    value = value_of("skew_reverse_kl", s, probs_of(teachers), WEIGHTS, mixture)
    expected = torch.autograd.grad(
        objective(value, s.log().gather(1, TARGETS[:, None])[:, 0], entropy(s)), theirs.leaves
    )
    assert_gradients([g.double() for g in gradients], expected, dtype, bound=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_weights_may_differ_by_token(backend, dtype, mixture):
    student, teachers = rounded(make_teachers(), dtype)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(N, 3, generator=generator, dtype=FP64).softmax(-1).to(dtype)
    told = TOLD | {"mixture_weights": weights, "backend": backend, "chunk_bytes": 2 * 4 * V * 8}
    out, gradients = ask(student, teachers, mixture, "generalized_jsd", dtype, **told)
    columns = [w[:, None].double() for w in weights.unbind(-1)]
    value, expected = truth(student, teachers, mixture, "generalized_jsd", columns)
    assert_values(out.divergence.double(), torch.where(KEPT, value, 0.0), dtype)
    assert_gradients([g.double() for g in gradients], expected, dtype)


@pytest.mark.parametrize(
    ("support", "tail"),
    [
        ("teacher_top_k", "bucket"),
        ("student_top_k", "renormalize"),
        ("union_top_k", "none"),
        ("intersection_top_k", "bucket"),
    ],
)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_supports(backend, dtype, mixture, support, tail):
    """Those of the mixture; with a sum of losses each teacher's own."""
    student, teachers = rounded(make_teachers(), dtype)
    out, gradients = ask(
        student, teachers, mixture, "skew_forward_kl", dtype, **TOLD, backend=backend,
        support=support, support_size=5, tail=tail,
    )  # fmt: skip
    theirs, probs = student.to(FP64, grad=True), probs_of(teachers)
    s = theirs.logits(T).softmax(-1)

    def restricted(t):
        entries = [support_of(a, b, support, 5) for a, b in zip(s, t, strict=True)]
        rows = zip(s, t, entries, strict=True)
        return torch.stack([divergence_on("skew_forward_kl", a, b, e, tail) for a, b, e in rows])

    if mixture == "loss_sum":
        value = sum(w * restricted(p) for w, p in zip(WEIGHTS, probs, strict=True))
    else:
        value = restricted(mixed(probs, WEIGHTS, mixture))
    expected = torch.autograd.grad((value * TOKEN_WEIGHTS).sum(), theirs.leaves)
    assert_values(out.divergence.double(), torch.where(KEPT, value.detach(), 0.0), dtype)
    assert_gradients([g.double() for g in gradients], expected, dtype, bound=1e-5)


@pytest.mark.parametrize("kinds", ["top-k", "top-k and dense", "dense and top-k"])
@pytest.mark.parametrize(("count", "per_token_grad"), [(2, False), (3, True)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_sum_of_losses_takes_teachers_of_which_only_the_top_is_known(backend, dtype, per_token_grad, count, kinds):
    student, teachers = rounded(make_teachers(), dtype)
    teachers, probs = teachers[:count], probs_of(teachers[:count])
    weights = [w / sum(WEIGHTS[:count]) for w in WEIGHTS[:count]]
    dense = {"top-k": [], "top-k and dense": [count - 1], "dense and top-k": [0]}[kinds]
    known = [None if i in dense else p.topk(4 + i) for i, p in enumerate(probs)]
    told = {
        "teacher_hidden": [t.hidden.to(dtype) if i in dense else None for i, t in enumerate(teachers)],
        "teacher_weight": [t.weight.to(dtype) if i in dense else None for i, t in enumerate(teachers)],
        "teacher_topk": [None if k is None else (k.indices, k.values.log().to(dtype)) for k in known],
        "backend": backend,
        "per_token_grad": per_token_grad,
        "mixture_weights": weights,
        "chunk_bytes": 3 * 4 * V * 8,
    }
    out, gradients = ask(student, teachers, "loss_sum", "reverse_kl", dtype, **TOLD | told)
    theirs = student.to(FP64, grad=True)
    s, value = theirs.logits(T).softmax(-1), 0.0
    for p, k, w in zip(probs, known, weights, strict=True):
        entries = [list(range(V))] * N if k is None else k.indices.tolist()
        rows = zip(s, p, entries, strict=True)
        value = value + w * torch.stack([divergence_on("reverse_kl", a, b, e, "bucket") for a, b, e in rows])
    expected = torch.autograd.grad((value * TOKEN_WEIGHTS).sum(), theirs.leaves)
    assert_values(out.divergence.double(), torch.where(KEPT, value.detach(), 0.0), dtype)
    assert_gradients([g.double() for g in gradients], expected, dtype, bound=1e-5)
    assert out.teacher_logprobs is None and out.teacher_logsumexp is None


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_frozen_head_gets_no_gradient_and_no_gradient_changes_no_value(mixture):
    student, teachers = make_teachers()
    expected, gradients = ask(student, teachers, mixture, **TOLD)
    ours = student.to(FP64, grad=True)
    for x in (ours.weight, ours.bias):
        x.requires_grad_(False)
    told = arguments_of(ours, teachers) | TOLD | {"mixture": mixture, "temperature": T}
    out = fused_linear_divergence(**told)
    assert torch.equal(torch.autograd.grad(out.loss, ours.hidden)[0], gradients[0])
    with torch.no_grad():
        assert torch.equal(fused_linear_divergence(**told).divergence, expected.divergence)


def test_half_precision_gradients_wait_for_the_mean_of_the_teachers(monkeypatch):
    """As on CUDA, where bf16 gradients of several chunks are multiplied together: they are rounded at the end."""

    class Bf16Gradients(fused.Projector):
        def __init__(self, *args):
            super().__init__(*args)
            self.grad_dtype = torch.bfloat16

        def add_gradients(self, grad, weights, hidden, grad_hidden, grad_weight):
            assert grad.dtype == torch.bfloat16 and weights is None
            seen.append(grad.float())
            self.grad_dtype = FP32
            super().add_gradients(grad.float(), weights, hidden, grad_hidden, grad_weight)
            self.grad_dtype = torch.bfloat16

    student, teachers = make_teachers((1.0, None))
    for count in (2, 3):
        seen = []
        weights = [1 / count] * count
        told = TOLD | {"mixture_weights": weights, "chunk_bytes": 4 * 2 * 4 * V * 4}
        _, expected = ask(student, teachers[:count], "loss_sum", dtype=FP32, **told)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "Projector", Bf16Gradients)
            _, gradients = ask(student, teachers[:count], "loss_sum", dtype=FP32, **told)
        assert sum(len(x) for x in seen) == N - 1
        for a, b in zip(gradients, expected, strict=True):
            assert 0 < (a - b).norm() <= 4e-3 * b.norm()


def test_textbook_weights_have_an_effect():
    """The cases above could not tell equal weights from others if the teachers were alike."""
    s = make_sides(N, V)[0].probs(T)
    probs = probs_of(make_teachers()[1])
    values = [value_of("reverse_kl", s, probs, w, m) for w in (WEIGHTS, [1 / 3] * 3) for m in MIXTURES]
    assert all((a - b).abs().min() > 1e-4 for i, a in enumerate(values) for b in values[:i])
