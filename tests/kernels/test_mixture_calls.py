"""Several teachers: extreme logits, heads over two processes, what is multiplied and held, and what is refused."""

import tempfile
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backends import SINGLE, triton_backend
from mixture_cases import (
    FP32,
    FP64,
    MIXTURES,
    TARGETS,
    TOKEN_WEIGHTS,
    WEIGHTS,
    N,
    V,
    arguments_of,
    ask,
    make_teachers,
    truth,
)
from mixture_runs import FIRST
from processes import run_two
from test_costs import LargestTensor
from textbook import CountGemms, Side, make_sides

from trl_opd import fused_linear_divergence
from trl_opd.kernels import fused

ALONE = {"temperature": 1.0}


def sides_of(*logits):
    """A student and teachers that have exactly these logits `(n, V)`: products with 1 round nothing."""
    eye = torch.eye(len(logits[0]), dtype=FP64)
    sides = [Side(eye.clone(), x.to(FP64).T.contiguous()) for x in logits]
    return sides[0], sides[1:]


def some_logits(seed, rows=3, size=V):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double() * 2


@pytest.mark.parametrize("offset", [1e4, -1e5])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_a_constant_in_one_teacher_s_logits_changes_nothing_but_their_rounding(backend, dtype, mixture, offset):
    a, b, s = (some_logits(i).mul(64).round().div(64) for i in range(3))  # exact with the offset too
    told = ALONE | {"mixture_weights": [0.3, 0.7]}
    plain, expected = ask(*sides_of(s, a, b), mixture, dtype=FP64, **told)
    for i, logits in enumerate(([a, b + offset], [a + offset, b])):
        out, gradients = ask(*sides_of(s, *logits), mixture, dtype=dtype, backend=backend, **told)
        # An arithmetic mixture has the offset of its first teacher; others carry it on into the rounding of a row
        bound = 2e-5 if mixture == "arithmetic" and i == 0 else 1e-6 * abs(offset)
        torch.testing.assert_close(out.divergence.double(), plain.divergence, rtol=0, atol=bound)
        for x, y in zip(gradients, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0, atol=10 * bound)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_a_broken_logit_of_any_teacher_shows_in_its_row_and_nowhere_else(backend, dtype, mixture, value, which):
    logits = [some_logits(i) for i in range(3)]
    logits[1 + which][1, 5] = value
    student, teachers = sides_of(*logits)
    told = {"mixture": mixture, "backend": backend, "target_ids": torch.zeros(3).long()}
    student, teachers = student.to(dtype, grad=True), [t.to(dtype) for t in teachers]
    for teacher, x in zip(teachers, logits[1:], strict=True):  # 0 · inf would break other rows
        teacher.hidden, teacher.weight = torch.zeros(3, 3, dtype=dtype), torch.zeros(V, 3, dtype=dtype)
        teacher.hidden, teacher.weight = rowwise(x.to(dtype))
    out = fused_linear_divergence(**arguments_of(student, teachers) | told)
    for key in ("divergence", "teacher_entropy", "teacher_logprobs", "forward_kl", "reverse_kl"):
        assert getattr(out, key)[1].isnan() and torch.isfinite(getattr(out, key)[[0, 2]]).all(), key
    out.loss.backward()
    assert student.hidden.grad[1].isnan().any() and torch.isfinite(student.hidden.grad[[0, 2]]).all()


def rowwise(x):
    """Hidden states and a head of which only row 1 is broken, where `x` is."""
    hidden = torch.eye(3, dtype=x.dtype)
    hidden[1] = torch.where(torch.isfinite(x[1]).all(), hidden[1], torch.full((3,), float("nan"), dtype=x.dtype))
    return hidden, torch.nan_to_num(x.T.contiguous(), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_an_entry_that_one_teacher_rules_out(backend, dtype, order):
    """Possible for the arithmetic mixture, impossible for the geometric one and for that teacher's own loss."""
    hidden = torch.ones(2, 1, dtype=FP64)
    logits = [some_logits(i, 1).expand(2, V).clone() for i in range(3)]
    logits[2][:, 4] = -torch.inf
    student, first, second = (Side(hidden.clone(), x[0][:, None].clone()) for x in logits)
    teachers = [(first, second)[i] for i in order]
    told = ALONE | {"backend": backend, "target_ids": torch.full((2,), 4)}
    out, _ = ask(student, teachers, "arithmetic", "forward_kl", dtype, **told)
    s, p, q = (x.softmax(-1) for x in logits)
    m = (p + q) / 2
    torch.testing.assert_close(out.divergence.double(), (m * (m / s).log()).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.teacher_logprobs.double(), m[:, 4].log(), rtol=1e-5, atol=1e-6)
    for mixture in ("geometric", "loss_sum"):
        out, _ = ask(student, teachers, mixture, "reverse_kl", dtype, **told)
        assert (out.divergence == torch.inf).all() and (out.teacher_logprobs < -1e20).all()
        out, gradients = ask(student, teachers, mixture, "forward_kl", dtype, **told)
        g = (p * q).sqrt() / (p * q).sqrt().sum(-1, keepdim=True)
        q_safe = q.clamp(min=1e-300)
        sums = ((p * (p / s).log()).sum(-1) + (q * (q_safe / s).log()).sum(-1)) / 2
        expected = sums if mixture == "loss_sum" else (g * (g.clamp(min=1e-300) / s).log()).sum(-1)
        torch.testing.assert_close(out.divergence.double(), expected, rtol=1e-5, atol=1e-6)
        assert all(torch.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("weight", [1e-30, 1 - 1e-12])
def test_a_tiny_weight_keeps_its_digits(weight):
    """Where one teacher all but rules an entry out, the other's share of it is what is left, however small."""
    apart = torch.zeros(1, V, dtype=FP64)
    apart[0, :5] = 300.0
    other = torch.zeros(1, V, dtype=FP64)
    other[0, 5:] = 300.0
    weights = [weight, 1 - weight]
    out, _ = ask(
        *sides_of(torch.zeros(1, V), apart, other), "arithmetic", "reverse_kl", FP32, **ALONE, mixture_weights=weights
    )
    log_m = torch.logsumexp(
        torch.stack(
            [x.log_softmax(-1) + torch.tensor(w).double().log() for x, w in zip((apart, other), weights, strict=True)]
        ),
        0,
    )
    torch.testing.assert_close(
        out.divergence.double(), (-torch.tensor(V).double().log() - log_m).mean(-1), rtol=1e-5, atol=1e-5
    )


@pytest.fixture(scope="module")
def two_processes():
    with tempfile.TemporaryDirectory() as output_dir:
        run_two(str(Path(__file__).with_name("mixture_runs.py")), output_dir)
        return [torch.load(Path(output_dir, f"{rank}.pt")) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize("first", [FIRST, V])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_heads_over_two_processes_give_what_whole_heads_give(two_processes, mixture, first):
    student, teachers = make_teachers()
    results = [result[first, mixture] for result in two_processes]
    value, (hidden, weight, bias) = truth(student, teachers, mixture)
    whole, _ = ask(
        student, teachers, mixture, mixture_weights=WEIGHTS, token_weights=TOKEN_WEIGHTS, target_ids=TARGETS
    )
    for result in results:
        torch.testing.assert_close(result["divergence"][1:], value[1:], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(result["hidden"], hidden, rtol=1e-9, atol=1e-11)
        for key in ("teacher_entropy", "teacher_logprobs", "student_entropy", "forward_kl"):
            torch.testing.assert_close(result[key], getattr(whole, key), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([r["weight"] for r in results])[:V], weight, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([r["bias"] for r in results])[:V], bias, rtol=1e-9, atol=1e-11)


def equal_sizes(count, tokens=N, size=V, frozen=False):
    sides = [make_sides(tokens, size, (8, 8), seed=i)[min(i, 1)].to(FP32) for i in range(count + 1)]
    student = sides[0].to(FP32, grad=True)
    for x in (student.weight, student.bias):
        x.requires_grad_(not frozen)
    return student, sides[1:]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_each_teacher_costs_its_projection(backend, dtype, count, mixture):
    tokens = 6  # no chunk of one row, whose products are not counted
    for frozen, per_token, grad in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 0)):
        student, teachers = equal_sizes(count, tokens, frozen=bool(frozen))
        with CountGemms(tokens, 8, V) as products, nullcontext() if grad else torch.no_grad():
            out = fused_linear_divergence(
                **arguments_of(student, teachers), mixture=mixture, backend=backend,
                per_token_grad=bool(per_token), chunk_bytes=3 * 4 * V * 4,
            )  # fmt: skip
            if grad:
                out.loss.backward()
        expected = (1 + count) * (1 + per_token) + grad * (2 - frozen)
        assert products.total == pytest.approx(expected)


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_buffers_stay_within_the_budget(backend, dtype, count, mixture, per_token_grad, monkeypatch):
    if triton_backend is not None:
        monkeypatch.setattr(triton_backend, "MAX_BLOCK", 512)
    monkeypatch.setattr(fused, "_workspaces", threading.local())
    tokens, size, rows = 48, 1024, 2
    student, teachers = equal_sizes(count, tokens, size)
    budget = rows * 4 * size * 4
    with LargestTensor() as largest:
        out = fused_linear_divergence(
            **arguments_of(student, teachers), mixture=mixture, divergence="generalized_jsd", backend=backend,
            per_token_grad=per_token_grad, chunk_bytes=budget,
        )  # fmt: skip
        out.loss.backward()
    assert largest.size <= max(budget, 4 * 8 * size)
    assert largest.size < 4 * tokens * size / 2


def test_one_argument_serves_all_teachers_and_a_sequence_of_one_is_one():
    student, teachers = make_teachers()
    shared = [
        replace(t, weight=teachers[0].weight, hidden=teachers[0].hidden * x, bias=None, scale=0.9, softcap=3.0)
        for t, x in zip(teachers, (1, 2, -1), strict=True)
    ]
    several, _ = ask(student, shared, "loss_sum", mixture_weights=WEIGHTS)
    told = {
        "teacher_weight": shared[0].weight,
        "teacher_bias": None,
        "teacher_logit_scale": 0.9,
        "teacher_softcap": 3.0,
    }
    same, _ = ask(student, shared, "loss_sum", mixture_weights=torch.tensor(WEIGHTS, dtype=FP64), **told)
    assert torch.equal(several.divergence, same.divergence)
    one, _ = ask(student, shared[:1], "loss_sum")
    told["teacher_hidden"] = shared[0].hidden
    plain, _ = ask(student, shared[:1], "arithmetic", **told)
    assert torch.equal(one.divergence, plain.divergence) and torch.equal(one.loss, plain.loss)


TOPK = (torch.zeros(N, 1).long(), torch.full((N, 1), -0.1, dtype=FP64))
REFUSED = [
    ({"mixture": "arithmetical"}, "Did you mean 'arithmetic'"),
    ({"mixture_weights": [0.5, 0.5]}, "3 numbers above 0"),
    ({"mixture_weights": [0.5, 0.5, 0.0]}, "above 0"),
    ({"mixture_weights": [0.5, 0.7, -0.2]}, "above 0"),
    ({"mixture_weights": [0.5, 0.3, 0.3]}, "sum to 1"),
    ({"mixture_weights": [0.5, 0.5, float("nan")]}, "above 0"),
    ({"mixture_weights": torch.full((N, 2), 0.5)}, "3 numbers above 0"),
    ({"mixture_weights": torch.full((N + 1, 3), 1 / 3)}, "one row per token"),
    ({"teacher_bias": [None, None]}, "one entry for each"),
    ({"teacher_hidden": [], "teacher_weight": []}, "one entry for each"),
    ({"teacher_topk": [TOPK, None, None]}, "of teacher 0: pass the one or the others"),
    ({"teacher_topk": TOPK}, "pass the one or the others"),
    ({"teacher_hidden": [torch.zeros(N, 9, dtype=FP64), None, None]}, "of teacher 1 go together"),
    ({"backend": "liger"}, "several teachers"),
]


@pytest.mark.parametrize(("told", "message"), REFUSED)
def test_bad_arguments(told, message):
    student, teachers = make_teachers()
    told = dict(told)
    with pytest.raises(ValueError, match=message):
        ask(student, teachers, told.pop("mixture", "loss_sum"), **told)


def test_a_gap_among_the_teachers_and_lists_in_a_mixture_of_distributions_are_refused():
    student, teachers = make_teachers()
    hidden, weight = [teachers[0].hidden, None, None], [teachers[0].weight, None, None]
    told = {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": None, "teacher_softcap": None}
    with pytest.raises(ValueError, match="got nothing of teacher 1"):
        ask(student, teachers, "loss_sum", **told)
    told["teacher_topk"] = [None, TOPK, TOPK]
    for mixture in ("arithmetic", "geometric"):
        with pytest.raises(ValueError, match="mixture must be 'loss_sum'"):
            ask(student, teachers, mixture, **told)
    repeated = (torch.zeros(N, 2).long(), torch.full((N, 2), -1.0, dtype=FP64))
    with pytest.raises(ValueError, match="must be distinct"):
        ask(student, teachers, "loss_sum", **told | {"teacher_topk": [None, TOPK, repeated]})
    with pytest.raises(ValueError, match="support_size must be at least 2"):
        ask(student, teachers, "loss_sum", tail="renormalize", **told)
    with pytest.raises(ValueError, match="support_size must be at least 1"):
        ask(student, teachers, "loss_sum", support="union_top_k", **told)
