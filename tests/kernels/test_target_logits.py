"""Targets made of several models' logits, against dense float64 autograd with the target held fixed."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backends import STATISTICS, assert_gradients, assert_values
from logit_cases import logits_of, on_logits
from mixture_cases import FP32, FP64, TOKEN_WEIGHTS, N, T, V, arguments_of, ask, make_teachers
from processes import run_two
from target_runs import CALLS, FIRST, TOLD
from textbook import CASES, CountGemms, Side, divergence, divergence_on, make_sides, support_of

from trl_opd import fused_linear_divergence
from trl_opd.kernels.problem import Problem

KEPT = TOKEN_WEIGHTS != 0
# (a_1, a_2, a_3), c
COEFFICIENTS = {
    "sharpened": ([2.0], 0.0),
    "extrapolation": ([1.25, -0.25], 0.0),
    "shift": ([0.7, -0.7, 1.0], 0.0),
    "student and teacher": ([0.4], 0.6),
    "student heavy": ([0.2, 0.1], 0.9),
    "any": ([0.3, 1.4, -0.5], -0.2),
}
NAMED = [pytest.param(*x, id=name) for name, x in COEFFICIENTS.items()]


def target_of(student, teachers, weights, student_coef, temperature=T):
    """Probabilities `(N, V)` of the target; numbers or `(N, 1)`."""
    z = sum(w * t.logits(temperature)[:, :V] for w, t in zip(weights, teachers, strict=True))
    return (z + student_coef * student.logits(temperature).detach()).softmax(-1)


def contrast_of(teachers, scale, floor):
    first, second = (t.logits(T)[:, :V] for t in teachers)
    w = scale * (first.softmax(-1) - second.softmax(-1)).abs().sum(-1, keepdim=True) + floor
    return (first + w * (first - second)).softmax(-1), w[:, 0]


def truth(student, target, name="reverse_kl", divisor=1.0):
    """Values and the gradient of their weighted sum."""
    student = student.to(FP64, grad=True)
    value = divergence(name, student.logits(T).softmax(-1), target) / divisor
    return value.detach(), list(torch.autograd.grad((value * TOKEN_WEIGHTS).sum(), student.leaves))


def assert_is(answer, expected, dtype=FP64):
    (out, gradients), (value, theirs) = answer, expected
    assert_values(out.divergence.double(), torch.where(KEPT, value, 0.0), dtype)
    assert_values(out.loss.detach().double(), (value * TOKEN_WEIGHTS).sum(), dtype)
    assert_gradients([g.double() for g in gradients], theirs, dtype)


def affine(student, teachers, weights, student_coef=0.0, name="reverse_kl", dtype=FP64, **told):
    told = TOLD | {"mixture_weights": weights, "student_coef": student_coef} | told
    return ask(student, teachers, "affine", name, dtype, **told)


def plain(student, teacher, name="reverse_kl", dtype=FP64, **told):
    return ask(student, [teacher], "arithmetic", name, dtype, **TOLD | told)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("weights", "student_coef"), NAMED)
def test_value_and_gradient_of_every_divergence(weights, student_coef, name):
    student, teachers = make_teachers()
    teachers = teachers[: len(weights)]
    expected = truth(student, target_of(student, teachers, weights, student_coef), name)
    for chunk_bytes in (1, 3 * 4 * V * 8, None):
        assert_is(affine(student, teachers, weights, student_coef, name, chunk_bytes=chunk_bytes), expected)


@pytest.mark.parametrize(("weights", "student_coef"), NAMED)
def test_in_fp32(weights, student_coef):
    student, teachers = (x.to(FP32).to(FP64) if isinstance(x, Side) else x for x in make_teachers())
    teachers = [t.to(FP32).to(FP64) for t in teachers[: len(weights)]]
    expected = truth(student, target_of(student, teachers, weights, student_coef), "forward_kl")
    assert_is(affine(student, teachers, weights, student_coef, "forward_kl", FP32), expected, FP32)


@pytest.mark.parametrize("which", ["weights", "student_coef", "both"])
def test_coefficients_that_differ_by_token(which):
    student, teachers = make_teachers()
    generator = torch.Generator().manual_seed(3)
    weights, own = [0.3, 0.9, -0.4], 0.2
    columns, column = weights, own
    if which != "student_coef":
        weights = torch.randn(N, 3, generator=generator, dtype=FP64)
        columns = [w[:, None] for w in weights.unbind(-1)]
    if which != "weights":
        own = torch.randn(N, generator=generator, dtype=FP64)
        column = own[:, None]
    expected = truth(student, target_of(student, teachers, columns, column), "generalized_jsd")
    assert_is(affine(student, teachers, weights, own, "generalized_jsd", chunk_bytes=2 * 4 * V * 8), expected)


@pytest.mark.parametrize("per_token_grad", [False, True])
def test_the_student_s_own_term_carries_no_gradient(per_token_grad):
    """The gradient of the target that stands still, and not that of one which moves with the student."""
    student, teachers = make_teachers()
    moving = student.to(FP64, grad=True)
    z = moving.logits(T)
    value = divergence("forward_kl", z.softmax(-1), (0.4 * teachers[0].logits(T)[:, :V] + 0.6 * z).softmax(-1))
    wrong = torch.autograd.grad((value * TOKEN_WEIGHTS).sum(), moving.leaves)
    value, right = truth(student, target_of(student, teachers[:1], [0.4], 0.6), "forward_kl")
    answer = affine(student, teachers[:1], [0.4], 0.6, "forward_kl", per_token_grad=per_token_grad)
    assert_is(answer, (value, right))
    assert all((a - b).norm() > 0.05 * b.norm() for a, b in zip(answer[1], wrong, strict=True))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_taid(t):
    """I9a: the forward KL's gradient is p_S − p_t; none at t = 0, the forward KL at t = 1."""
    s, z = logits_of(0), logits_of(1)
    told = {"divergence": "forward_kl", "mixture": "affine", "mixture_weights": [t], "student_coef": 1 - t}
    out, gradient = on_logits(s, z, **told)
    torch.testing.assert_close(gradient, s.softmax(-1) - ((1 - t) * s + t * z).softmax(-1), rtol=1e-10, atol=1e-13)
    if t == 0:
        assert (gradient == 0).all() and (out.divergence == 0).all()
    if t == 1:
        other, theirs = on_logits(s, z, divergence="forward_kl")
        assert torch.equal(gradient, theirs) and torch.equal(out.divergence, other.divergence)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25])
def test_extrapolation(scale):
    """I9b: the gradient is that of the policy gradient of the sampled token, enumerated over the vocabulary."""
    s, z, r = (logits_of(i) for i in range(3))
    told = {"mixture": "affine", "mixture_weights": [scale, 1 - scale]}
    out, gradient = on_logits(s, z, r, **told)
    p = s.softmax(-1)
    log_s, log_t, log_r = (x.log_softmax(-1) for x in (s, z, r))
    advantage = -(log_s - log_r - scale * (log_t - log_r))
    # −E[A ∇ log p(y)]
    expected = -(p * advantage - p * (p * advantage).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)
    product = log_r.exp() ** (1 - scale) * log_t.exp() ** scale
    q = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(out.divergence, (p * (p / q).log()).sum(-1), rtol=1e-10, atol=1e-13)
    if scale in (0.0, 1.0):
        alone, theirs = on_logits(s, r if scale == 0 else z)
        torch.testing.assert_close(out.divergence, alone.divergence, rtol=0, atol=0)
        torch.testing.assert_close(gradient, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8])
def test_veto(beta):
    """I9c: the advantage log p_T − (1 − β) log p_S; no gradient at ∝ p_T^(1/(1 − β))."""
    s, z = logits_of(0), logits_of(1)
    told = {"mixture": "affine", "mixture_weights": [1.0], "student_coef": beta}
    out, gradient = on_logits(s, z, **told)
    p = s.softmax(-1)
    advantage = z.log_softmax(-1) - (1 - beta) * s.log_softmax(-1)
    expected = -(p * advantage - p * (p * advantage).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)
    out, gradient = on_logits(z / (1 - beta) + 3.0, z, **told)
    assert out.divergence.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
    if beta == 0:
        out, gradient = on_logits(s, z, **told)
        other, theirs = on_logits(s, z)
        assert torch.equal(gradient, theirs) and torch.equal(out.divergence, other.divergence)


def test_delta():
    """Raw models that agree leave the tuned teacher; a teacher that was not tuned leaves the raw student."""
    s, z, raw, raw_student = (logits_of(i) for i in range(4))
    told = {"divergence": "forward_kl", "mixture": "affine"}
    out, gradient = on_logits(s, z, raw, raw, **told, mixture_weights=[1.0, -1.0, 1.0])
    other, theirs = on_logits(s, z, divergence="forward_kl")
    torch.testing.assert_close(out.divergence, other.divergence, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, theirs, rtol=1e-12, atol=1e-14)
    out, gradient = on_logits(raw_student, z, z, raw_student, **told, mixture_weights=[0.7, -0.7, 1.0])
    assert out.divergence.abs().max() < 1e-14 and gradient.abs().max() < 1e-14
    out, _ = on_logits(s, z, raw, raw_student, **told, mixture_weights=[0.7, -0.7, 1.0])
    t = (raw_student + 0.7 * (z - raw)).softmax(-1)
    torch.testing.assert_close(out.divergence, (t * (t / s.softmax(-1)).log()).sum(-1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "todi"])
def test_contrast(name, per_token_grad):
    student, teachers = make_teachers()
    target, w = contrast_of(teachers[:2], 4.0, 0.1)
    told = {"contrast_scale": 4.0, "contrast_floor": 0.1, "per_token_grad": per_token_grad}
    answer = ask(student, teachers[:2], "contrast", name, **TOLD | told, chunk_bytes=2 * 3 * V * 8)
    assert_is(answer, truth(student, target, name, w))
    torch.testing.assert_close(answer[0].target_coef, torch.where(KEPT, w, 0.0), rtol=1e-12, atol=1e-14)
    assert w.max() > 1.5 * w.min()


def test_contrast_of_equal_models_and_without_scale():
    s, z, r = (logits_of(i) for i in range(3))
    out, gradient = on_logits(s, z, z, mixture="contrast", contrast_floor=0.5)
    other, theirs = on_logits(s, z)
    assert torch.equal(out.divergence, other.divergence / 0.5) and torch.equal(gradient, theirs / 0.5)
    assert (out.target_coef == 0.5).all()
    out, _ = on_logits(s, z, r, mixture="contrast", contrast_scale=0.0, contrast_floor=1e-9)
    torch.testing.assert_close(out.divergence * 1e-9, other.divergence, rtol=1e-6, atol=1e-8)
    assert out.target_coef is not None and other.target_coef is None


IDENTITIES = {
    "one teacher": ([1.0], 0.0, 1),
    "by default": (None, 0.0, 1),
    "no references": ([1.0, 0.0, 0.0], 0.0, 3),
    "by token": (torch.tensor([1.0, 0.0]).expand(N, 2), torch.zeros(N), 2),
}


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32, torch.bfloat16])
@pytest.mark.parametrize(("weights", "student_coef", "count"), [*IDENTITIES.values()], ids=[*IDENTITIES])
def test_the_identity_is_no_mixture_to_the_bit(weights, student_coef, count, dtype, per_token_grad):
    student, teachers = make_teachers()
    told = {"per_token_grad": per_token_grad, "overlap_top_k": 5, "chunk_bytes": 3 * 2 * V * 8}
    one, gradients = affine(student, teachers[:count], weights, student_coef, "todi", dtype, **told)
    other, theirs = plain(student, teachers[0], "todi", dtype, **told)
    assert torch.equal(one.loss, other.loss)
    assert all(torch.equal(getattr(one, key), getattr(other, key)) for key in ("divergence", *STATISTICS))
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("weights", "student_coef"), [([0.4], 0.6), ([1.25, -0.25], 0.0), ([0.5, -0.5, 1.0], 0.0)])
def test_equal_models_give_nothing(weights, student_coef, name):
    """I16, in fp32 to the bit."""
    student, _ = make_teachers((1.0, None))
    out, gradients = affine(student, [student] * len(weights), weights, student_coef, name, FP32)
    assert (out.divergence == 0).all() and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("mixture", ["affine", "contrast"])
@pytest.mark.parametrize("per_token_grad", [False, True])
def test_what_is_said_of_the_teacher_is_that_of_the_first(mixture, per_token_grad):
    student, teachers = make_teachers()
    told = {"overlap_top_k": 5, "statistics": {"hellinger": None, "teacher_rank": None}}
    told |= {"per_token_grad": per_token_grad}
    other, _ = plain(student, teachers[0], **told)
    given = told | ({"mixture_weights": [0.5, 0.8], "student_coef": 0.1} if mixture == "affine" else {})
    out, _ = ask(student, teachers[:2], mixture, **TOLD | given)
    for key in STATISTICS:
        assert torch.equal(getattr(out, key), getattr(other, key)), key
    assert all(torch.equal(out.further[key], other.further[key]) for key in told["statistics"])
    assert (out.divergence - other.divergence)[KEPT].abs().min() > 1e-4


@pytest.mark.parametrize(
    ("support", "tail"),
    [("teacher_top_k", "bucket"), ("student_top_k", "renormalize"), ("union_top_k", "none")],
)
def test_supports_are_those_of_the_target(support, tail):
    student, teachers = make_teachers()
    told = {"support": support, "support_size": 5, "tail": tail}
    answer = affine(student, teachers[:2], [1.4, -0.4], 0.1, "skew_forward_kl", **told)
    theirs = student.to(FP64, grad=True)
    s, t = theirs.logits(T).softmax(-1), target_of(student, teachers[:2], [1.4, -0.4], 0.1)
    rows = [(a, b, support_of(a, b, support, 5)) for a, b in zip(s, t, strict=True)]
    value = torch.stack([divergence_on("skew_forward_kl", a, b, e, tail) for a, b, e in rows])
    expected = torch.autograd.grad((value * TOKEN_WEIGHTS).sum(), theirs.leaves)
    assert_is(answer, (value.detach(), expected))


@pytest.mark.parametrize("per_token_grad", [False, True])
def test_gradcheck(per_token_grad):
    """Of a target without the student, the gradient is that of the value."""
    sides = [make_sides(3, 6, (2, 3), seed=i)[min(i, 1)] for i in range(3)]
    student = replace(sides[0], scale=1.2, softcap=3.0)

    def values(hidden, weight, bias):
        changed = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias, "chunk_bytes": 2 * 3 * 48}
        told = {"mixture": "affine", "mixture_weights": [1.5, -0.5], "temperature": 0.8}
        told |= {"divergence": "generalized_jsd", "per_token_grad": per_token_grad}
        out = fused_linear_divergence(**arguments_of(student, sides[1:]) | changed | told)
        return out.divergence if per_token_grad else out.loss

    assert torch.autograd.gradcheck(values, student.leaves)


@pytest.mark.parametrize(("mixture", "count"), [("affine", 1), ("affine", 3), ("contrast", 2)])
def test_each_teacher_costs_its_projection_and_a_buffer(mixture, count):
    sides = [make_sides(6, V, (8, 8), seed=i)[min(i, 1)].to(FP32) for i in range(count + 1)]
    student = sides[0].to(FP32, grad=True)
    told = {"mixture": mixture, "chunk_bytes": 3 * (1 + count) * V * 4}
    if mixture == "affine":
        told |= {"mixture_weights": [0.5] * count, "student_coef": 0.5}
    with CountGemms(6, 8, V) as products:
        fused_linear_divergence(**arguments_of(student, sides[1:]), **told).loss.backward()
    assert products.total == pytest.approx(3 + count)


def test_an_entry_that_all_rule_out_stays_out():
    s, z, r = (logits_of(i).index_fill(1, torch.tensor([3]), -torch.inf) for i in range(3))
    eye = torch.ones(1, 1, dtype=FP64)
    sides = [Side(eye.clone(), x[:1].T.contiguous()) for x in (s, z, r)]
    told = {"mixture": "affine", "mixture_weights": [1.25, -0.35], "student_coef": 0.1, "divergence": "forward_kl"}
    out = fused_linear_divergence(**arguments_of(sides[0], sides[1:]), **told)
    s, z, r = (x[:1, [0, 1, 2, 4, 5, 6]] for x in (s, z, r))
    t = (1.25 * z - 0.35 * r + 0.1 * s).softmax(-1)
    torch.testing.assert_close(out.divergence, (t * (t / s.softmax(-1)).log()).sum(-1), rtol=1e-9, atol=1e-12)


def test_what_the_student_s_chunk_needs_on_a_device(monkeypatch):
    """Every temporary of a target is as long as the chunk there: the budget counts them."""
    student, teachers = make_teachers()
    rows = []
    num_rows = Problem.num_rows
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        Problem,
        "num_rows",
        lambda p, n, _, *rest: rows.append(num_rows(p, 10**6, cuda, *rest)) or num_rows(p, n, _, *rest),
    )
    plain(student, teachers[0], chunk_bytes=1 << 26)
    affine(student, teachers[:1], [0.5], 0.5, chunk_bytes=1 << 26)
    assert rows[1] == pytest.approx(rows[0] * 8 / 12, rel=1e-2)


TOPK = (torch.arange(3).expand(N, 3), torch.full((N, 3), -1.5, dtype=FP64))
LISTED = {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None, "teacher_softcap": None}
REFUSED = [
    ({"mixture": "afine"}, "Did you mean 'affine'"),
    ({"mixture_weights": None}, "mixture='affine' needs mixture_weights, one number for each of the 3 teachers"),
    ({"mixture_weights": [0.5, 0.5]}, "must be 3 finite numbers"),
    ({"mixture_weights": [1.0, float("nan"), 0.0]}, "must be 3 finite numbers"),
    ({"mixture_weights": torch.ones(N, 2)}, r"must be 3 finite numbers.*tensor of shape \(6, 2\)"),
    ({"mixture_weights": torch.ones(N + 1, 3)}, "mixture_weights must have one row per token"),
    ({"student_coef": float("inf")}, "student_coef must be a finite number"),
    ({"student_coef": torch.ones(N + 1)}, "student_coef must have one row per token"),
    ({"mixture": "geometric", "mixture_weights": None, "student_coef": 0.5}, "student_coef needs mixture='affine'"),
    ({"mixture": "contrast", "mixture_weights": None}, "needs two teachers, the chosen and the reversed one, got 3"),
    (LISTED | {"teacher_topk": [TOPK] * 3}, "mixture='affine' needs teachers that give hidden states"),
    (LISTED | {"teacher_topk": TOPK, "teacher_logit_scale": 1.0}, "mixture='affine' needs teachers that give hidden"),
    ({"backend": "triton"}, "backend='triton' cannot be used: its kernels compare with the teacher itself"),
]


@pytest.mark.parametrize(("told", "message"), REFUSED)
def test_bad_arguments(told, message):
    student, teachers = make_teachers()
    told = {"mixture": "affine", "mixture_weights": [1.0, 0.5, -0.5]} | told
    with pytest.raises(ValueError, match=message):
        ask(student, teachers, **TOLD | told)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"mixture_weights": [1.0, 0.5]}, "mixture_weights must be left out"),
        ({"contrast_scale": -1.0}, "contrast_scale must be a finite number, at least 0, got -1.0"),
        ({"contrast_floor": 0.0}, "contrast_floor must be a finite number above 0, got 0.0"),
        ({"backend": "liger", "teacher_hidden": []}, "one entry for each"),
    ],
)
def test_bad_contrasts(told, message):
    student, teachers = make_teachers()
    with pytest.raises(ValueError, match=message):
        ask(student, teachers[:2], "contrast", **TOLD | told)


def test_liger_has_no_targets():
    student, teachers = make_teachers((1.0, None))
    with pytest.raises(ValueError, match="loss_backend='liger' cannot compute targets"):
        affine(student, teachers[:1], [0.5], 0.5, backend="liger")


@pytest.fixture(scope="module")
def two_processes():
    with tempfile.TemporaryDirectory() as output_dir:
        run_two(str(Path(__file__).with_name("target_runs.py")), output_dir)
        return [torch.load(Path(output_dir, f"{rank}.pt")) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize("first", [FIRST, V])
@pytest.mark.parametrize("call", CALLS)
def test_heads_over_two_processes_give_what_whole_heads_give(two_processes, call, first):
    student, teachers = make_teachers()
    count, told = CALLS[call]
    out, gradients = ask(student, teachers[:count], **TOLD | told)
    results = [result[first, call] for result in two_processes]
    for result in results:
        for key, theirs in result["stats"].items():
            ours = out.further[key] if key in out.further else getattr(out, key)
            torch.testing.assert_close(theirs, ours.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(result["hidden"], gradients[0], rtol=1e-9, atol=1e-11)
    for key, whole in zip(("weight", "bias"), gradients[1:], strict=True):
        torch.testing.assert_close(torch.cat([r[key] for r in results])[:V], whole, rtol=1e-9, atol=1e-11)
