"""Concrete score, entropy-gated KL, detached skew and mixtures by every backend: what their parameters promise."""

import itertools
import math

import pytest
import torch
from backends import (
    BACKENDS,
    FP32,
    FP64,
    SINGLE,
    TRITON,
    V,
    ask,
    assert_gradients,
    assert_values,
    one_row,
    pair,
    represented,
    rows_of,
    triton_backend,
)
from textbook import CASES, Side, divergence_on, fused_arguments, make_sides, support_of

from trl_opd import fused_linear_divergence

pytestmark = pytest.mark.usefixtures("short_blocks")
WEIGHTINGS = ("student", "teacher", "uniform")
PAIRS = list(itertools.product(WEIGHTINGS, WEIGHTINGS))
SETTINGS = [
    *(("concrete_score", {"first": first, "second": second}) for first, second in PAIRS[:6] + PAIRS[8:]),
    ("entropy_gated_kl", {"threshold": -1.0, "coef": 1.0}),
    ("entropy_gated_kl", {"threshold": 2.6, "coef": 0.4}),
    ("skew_reverse_kl", {"skew": 0.3, "detached": 1}),
    ("convex_mix", {"forward_kl": 0.5, "concrete_score": {"weight": 0.5, "first": "student", "second": "uniform"}}),
]


@pytest.fixture
def longer_blocks(short_blocks, monkeypatch):
    """For rows of several hundred entries, which the interpreter walks slowly."""
    if triton_backend is not None:
        monkeypatch.setattr(triton_backend, "MAX_BLOCK", 128)


def truth_of(name: str, params: dict, student: Side, teacher: Side) -> tuple[torch.Tensor, tuple]:
    value = CASES[name][0](student.probs(), teacher.probs(), **params)
    return value.detach(), torch.autograd.grad(value.sum(), student.leaves)


@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_float32_values_are_right_to_one_in_a_million(backend, dtype, name, params, longer_blocks):
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        logits = [(2 * torch.randn(4, 301, generator=generator) * 256).round() / 256 for _ in range(2)]
        sides = rows_of(*logits)
        sides[0] = sides[0].to(FP64, grad=True)
        ours = ask(backend, dtype, *sides, name, divergence_kwargs=params)
        value, gradients = truth_of(name, params, *sides)
        assert ((ours.divergence - value) / value).abs().max() < 1e-6
        assert_gradients(ours.gradients, gradients, dtype)


@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_near_a_matched_teacher_nothing_is_lost_to_cancellation(backend, dtype, name, params, longer_blocks):
    """Divergences of about 1e-7, from logits whose differences float32 represents; and then exactly 0."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 301, generator=generator, dtype=FP64) * 256).round() / 256
    noise = (2 * torch.rand(3, 301, generator=generator, dtype=FP64) - 1).mul(16).round() / 2**15
    sides = rows_of(logits, logits + noise)
    sides[0] = sides[0].to(FP64, grad=True)
    value, gradients = truth_of(name, params, *sides)
    assert 1e-9 < value.min() <= value.max() < 1e-6
    ours = ask(backend, dtype, *sides, name, divergence_kwargs=params)
    assert ((ours.divergence - value) / value).abs().max() < 1e-4
    for a, b in zip(ours.gradients, gradients, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()
    same = ask(backend, dtype, *rows_of(logits, logits), name, divergence_kwargs=params)
    assert (same.divergence == 0).all() and all((g == 0).all() for g in same.gradients)


@pytest.mark.parametrize("offsets", [(512.0, 512.0), (-300.0, 700.0)], ids=str)
@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_what_a_row_s_logits_have_in_common_changes_nothing(backend, dtype, name, params, offsets):
    generator = torch.Generator().manual_seed(1)
    logits = [(torch.randn(2, V, generator=generator, dtype=FP64) * 256).round() / 256 for _ in range(2)]
    plain = ask(backend, dtype, *rows_of(*logits), name, divergence_kwargs=params)
    shifted = [x + offset for x, offset in zip(logits, offsets, strict=True)]
    ours = ask(backend, dtype, *rows_of(*shifted), name, divergence_kwargs=params)
    # Apart from each other, the models' logits differ by numbers that float32 rounds to 6e-5
    bounds = {"rtol": 1e-6, "atol": 1e-6} if offsets[0] == offsets[1] else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours.divergence, plain.divergence, **bounds)
    torch.testing.assert_close(ours.gradients[1], plain.gradients[1], **bounds)


GONE = [0, 15, 20, 36]


@pytest.mark.parametrize("lacking", ["student", "teacher", "both"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_concrete_score_where_a_model_lacks_entries(backend, dtype, first, second, lacking):
    """Entries that neither has are no part of the vocabulary; one that has weight and is lacking makes it infinite."""
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(V, generator=generator).to(dtype).double() for _ in range(2)]
    for i, model in enumerate(("student", "teacher")):
        if lacking in (model, "both"):
            logits[i][GONE] = -math.inf
    params = {"first": first, "second": second}
    ours = ask(backend, dtype, *one_row(*logits), "concrete_score", divergence_kwargs=params)
    assert not ours.gradients[1].isnan().any()
    if lacking != "both" and {first, second} != {lacking}:
        assert ours.divergence.item() == ours.loss.item() == math.inf
        return
    kept = [v for v in range(V) if v not in GONE]
    z, zt = logits
    if lacking == "both":
        z, zt = z[kept], zt[kept]
    z.requires_grad_()
    s, t = z.softmax(-1), zt.softmax(-1)
    gap = z[kept] - zt[kept] if lacking != "both" else z - zt
    if lacking != "both":  # the weights of the others are the same twice
        s, t = s[kept], t[kept]
    w, u = (
        {"student": s.detach(), "teacher": t, "uniform": torch.full_like(t, 1 / len(t))}[x] for x in params.values()
    )
    truth = 0.5 * (w[None, :] * u[:, None] * (gap[:, None] - gap[None, :]) ** 2).sum()
    assert_values(ours.divergence, truth.detach()[None], dtype)
    (expected,) = torch.autograd.grad(truth, z)
    entries = kept if lacking == "both" else list(range(V))
    assert_gradients([ours.gradients[1][entries, 0]], [expected], dtype)
    assert (ours.gradients[1][GONE] == 0).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_uniform_weights_of_huge_differences_are_finite(backend, dtype):
    student, teacher = torch.zeros(2, 1, V, dtype=FP64)
    student[0, 3], teacher[0, 35] = 200.0, 300.0
    sides = [x.to(FP64, grad=True) for x in rows_of(student, teacher)]
    params = {"first": "uniform", "second": "uniform"}
    value, gradients = truth_of("concrete_score", params, *sides)
    ours = ask(backend, dtype, *sides, "concrete_score", divergence_kwargs=params)
    assert_values(ours.divergence, value, dtype)
    assert_gradients(ours.gradients, gradients, dtype)


def bits_of(answer) -> list[torch.Tensor]:
    return [answer.loss, answer.divergence, *answer.gradients]


def equal_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits_of(a), bits_of(b), strict=True))


# What is the identity, and the divergence whose bits it must have
IDENTITIES = [
    ("entropy_gated_kl", {"threshold": math.inf}, "reverse_kl", {}),
    ("entropy_gated_kl", {"coef": 0.0, "threshold": -1.0}, "reverse_kl", {}),
    ("entropy_gated_kl", {"threshold": 50.0}, "reverse_kl", {}),
    ("convex_mix", {"todi": 1.0}, "todi", {}),
    ("convex_mix", {"todi": 1.0, "reverse_kl": None}, "todi", {}),
    ("convex_mix", {"generalized_jsd": {"weight": None, "beta": 0.9}}, "generalized_jsd", {"beta": 0.9}),
    ("skew_reverse_kl", {"skew": 0.3, "detached": 0}, "skew_reverse_kl", {"skew": 0.3}),
]


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize(("name", "params", "same_as", "own"), IDENTITIES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_an_identity_has_the_bits_of_what_it_is(backend, dtype, name, params, same_as, own, per_token_grad):
    student, teacher = pair(dtype=dtype)
    told = {"per_token_grad": per_token_grad}
    ours = ask(backend, dtype, student, teacher, name, divergence_kwargs=params, **told)
    assert equal_bits(ours, ask(backend, dtype, student, teacher, same_as, divergence_kwargs=own, **told))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_gate_opens_row_by_row_by_the_entropy_of_the_teacher(backend, dtype):
    student, teacher = pair(5, dtype=dtype)
    t = teacher.probs()
    entropy = -(t * t.log()).sum(-1)
    threshold = float(entropy.sort().values[1:3].mean())
    ours, reverse, forward = (
        ask(backend, dtype, student, teacher, name, divergence_kwargs=params)
        for name, params in (
            ("entropy_gated_kl", {"threshold": threshold, "coef": 0.4}),
            ("reverse_kl", {}),
            ("forward_kl", {}),
        )
    )
    is_open = (entropy > threshold).double()
    assert is_open.sum() == 3
    assert_values(ours.divergence, reverse.divergence + 0.4 * is_open * forward.divergence, dtype)
    assert_gradients(ours.gradients[:1], [reverse.gradients[0] + 0.4 * is_open[:, None] * forward.gradients[0]], dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_certain_teacher_never_opens_the_gate(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, V, generator=generator), torch.full((2, V), -200.0)
    teacher[0, 3] = teacher[1, 30] = 0.0
    sides = represented(rows_of(student, teacher), dtype)
    shut = ask(backend, dtype, *sides, "entropy_gated_kl", divergence_kwargs={"threshold": 1e-6})
    assert equal_bits(shut, ask(backend, dtype, *sides, "reverse_kl"))
    is_open = ask(backend, dtype, *sides, "entropy_gated_kl", divergence_kwargs={"threshold": -1e-6})
    assert (is_open.divergence > shut.divergence + 1).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_shut_gate_hides_an_infinite_forward_kl(backend, dtype):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(V, generator=generator).to(dtype).double() for _ in range(2))
    student[GONE] = -math.inf
    for threshold, infinite in ((50.0, False), (-1.0, True)):
        params = {"threshold": threshold}
        ours = ask(backend, dtype, *one_row(student, teacher), "entropy_gated_kl", divergence_kwargs=params)
        assert (ours.divergence.item() == math.inf) == infinite
        assert not ours.gradients[1].isnan().any()


@pytest.mark.parametrize("skew", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_detached_mixture_is_frozen_in_the_gradient_and_the_same_in_the_value(backend, dtype, skew):
    student, teacher = pair(dtype=dtype)
    ours, live = (
        ask(backend, dtype, student, teacher, "skew_reverse_kl", divergence_kwargs={"skew": skew, "detached": x})
        for x in (1, 0)
    )
    assert torch.equal(ours.divergence, live.divergence)
    s = student.probs()
    frozen = (skew * s + (1 - skew) * teacher.probs()).detach()
    truth = (s * (s / frozen).log()).sum()
    assert_gradients(ours.gradients, torch.autograd.grad(truth, student.leaves), dtype)
    assert (ours.gradients[0] - live.gradients[0]).norm() > 0.01 * live.gradients[0].norm()


MIX = {"forward_kl": 0.2, "todi": {"weight": 0.5, "scale": 2.0}, "concrete_score": {"weight": None}}


@pytest.mark.parametrize("told", [{}, {"support": "union_top_k", "support_size": 5}], ids=["full", "support"])
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32])
def test_a_mixture_is_the_weighted_sum_of_its_divergences(dtype, per_token_grad, told):
    student, teacher = pair(dtype=dtype)
    told = told | {"per_token_grad": per_token_grad}
    ours = ask("torch", dtype, student, teacher, "convex_mix", divergence_kwargs=MIX, **told)
    parts = [
        (weight, ask("torch", dtype, student, teacher, name, divergence_kwargs=params, **told))
        for name, weight, params in (
            ("forward_kl", 0.2, {}),
            ("todi", 0.5, {"scale": 2.0}),
            ("concrete_score", 0.3, {"first": "student", "second": "uniform"}),
        )
    ]
    assert_values(ours.divergence, sum(weight * part.divergence for weight, part in parts), dtype)
    gradients = zip(*([weight * g for g in part.gradients] for weight, part in parts), strict=True)
    assert_gradients(ours.gradients, [sum(x) for x in gradients], dtype)


@pytest.mark.parametrize(("backend", "dtype"), [TRITON])
def test_triton_has_mixtures_on_a_part_of_the_vocabulary_and_says_so_where_not(backend, dtype):
    student, teacher = pair(dtype=dtype)
    arguments = fused_arguments(student.to(FP32), teacher.to(FP32)) | {"divergence": "convex_mix"}
    with pytest.raises(ValueError, match=r"backend='triton' cannot be used: .*convex_mix.*'auto' or 'torch'"):
        fused_linear_divergence(**arguments, divergence_kwargs=MIX, backend="triton")
    logprobs, ids = teacher.probs().log().topk(5)
    for other, told in ((teacher, {"support": "teacher_top_k", "support_size": 5}), (None, {})):
        told = told or {"teacher_topk": (ids, logprobs)}
        ours, theirs = (
            ask(x, dtype, student, other, "convex_mix", divergence_kwargs=MIX, **told) for x in (backend, "torch")
        )
        assert_values(ours.divergence, theirs.divergence, dtype)
        assert_gradients(ours.gradients, theirs.gradients, dtype)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
@pytest.mark.parametrize("support", ["teacher_top_k", "intersection_top_k"])
@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=str)
def test_on_a_support_every_setting_is_that_of_the_few_probabilities(name, params, support, tail, monkeypatch):
    student, teacher = make_sides(5, 19)
    monkeypatch.setitem(CASES, name, (CASES[name][0], params))
    pairs = zip(student.probs(), teacher.probs(), strict=True)
    truth = torch.stack([divergence_on(name, s, t, support_of(s, t, support, 6), tail) for s, t in pairs])
    told = {"support": support, "support_size": 6, "tail": tail, "divergence_kwargs": params}
    ours = ask("torch", FP64, student, teacher, name, **told)
    assert_values(ours.divergence, truth.detach(), FP64)
    assert_gradients(ours.gradients, torch.autograd.grad(truth.sum(), student.leaves), FP64)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_raw_concrete_score_moves_no_mass_out_of_its_support(first, second):
    """Unlike the reverse KL (I8c): it sees differences between entries of the support alone."""
    student, teacher = make_sides(1, 19)
    inside = support_of(student.probs()[0], teacher.probs()[0], "teacher_top_k", 6)
    outside = torch.tensor([v for v in range(19) if v not in inside])
    params = {"first": first, "second": second}
    told = {"support": "teacher_top_k", "support_size": 6, "tail": "none", "divergence_kwargs": params}
    _, _, bias = ask("torch", FP64, student, teacher, "concrete_score", **told).gradients
    assert bias[outside].abs().max() < 1e-15 and bias[inside].abs().max() > 1e-2
    _, _, bias = ask("torch", FP64, student, teacher, "reverse_kl", **told | {"divergence_kwargs": None}).gradients
    assert (bias[outside] < -1e-6).all()


def test_on_a_support_the_gate_goes_by_the_entropy_that_is_left_there():
    student, teacher = make_sides(1, 19)
    t = teacher.probs()[0]
    kept = t.topk(4).values
    bucketed = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)])
    whole, left = (-(p * p.log()).sum() for p in (t, bucketed))
    assert left < whole
    told = {"support": "teacher_top_k", "support_size": 4}
    values = [
        ask("torch", FP64, student, teacher, name, divergence_kwargs=params, **told).divergence
        for name, params in (
            ("reverse_kl", {}),
            ("entropy_gated_kl", {"threshold": float(left) + 1e-9}),
            ("entropy_gated_kl", {"threshold": float(left) - 1e-9}),
        )
    ]
    torch.testing.assert_close(values[1], values[0], rtol=1e-13, atol=0)
    assert values[2] > values[0] + 1e-3


@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), [TRITON])
def test_a_longer_vocabulary_in_blocks_of_the_usual_size(backend, dtype, name, params, monkeypatch):
    monkeypatch.setattr(triton_backend, "MAX_BLOCK", 2048)
    student, teacher = represented(make_sides(2, 5003, H=(4, 4)), FP32)
    ours = ask(backend, dtype, student, teacher, name, divergence_kwargs=params)
    value, gradients = truth_of(name, params, student, teacher)
    assert_values(ours.divergence, value, dtype)
    assert_gradients(ours.gradients, gradients, dtype)
