"""Further statistics by name, against textbook float64; of dense teachers, lists, mixtures."""

import math

import pytest
import torch
from logit_cases import logits_of, on_logits
from mixture_cases import FP32, FP64, TARGETS, WEIGHTS, N, T, V, ask, make_teachers, mixed, probs_of
from textbook import make_sides

from trl_opd import fused_linear_divergence
from trl_opd.kernels import statistics
from trl_opd.kernels.rows import make_rows, normalize
from trl_opd.kernels.vocab_parallel import VocabShard

ALL = {
    "hellinger": None,
    "total_variation": None,
    "accepted": 12,
    "teacher_margin": 4,
    "teacher_rank": None,
    "student_rank": None,
    "teacher_max_logprob": None,
}
IN_LISTS = {name: size for name, size in ALL.items() if name not in ("hellinger", "total_variation")}
MASK = torch.arange(N) != 2
TOLD = {"target_ids": TARGETS, "mask": MASK}


def textbook(s, t, target, accepted=12, margin=4):
    """Row by row in plain Python."""
    s, t = s.tolist(), t.tolist()
    order = {name: sorted(range(len(x)), key=lambda v: -x[v]) for name, x in (("s", s), ("t", t))}
    among = sorted((t[v] for v in order["s"][:margin]), reverse=True)
    return {
        "hellinger": math.sqrt(sum((a**0.5 - b**0.5) ** 2 for a, b in zip(s, t, strict=True)) / 2),
        "total_variation": sum(abs(a - b) for a, b in zip(s, t, strict=True)) / 2,
        "accepted": float(order["s"][0] in order["t"][:accepted]),
        "teacher_margin": math.log(among[0] / among[1]),
        "teacher_rank": order["t"].index(target) + 1,
        "student_rank": order["s"].index(target) + 1,
        "teacher_max_logprob": math.log(max(t)),
    }


def assert_textbook(further, s, t, rows=None, tolerance=1e-11):
    expected = [textbook(a, b, int(y)) for a, b, y in zip(s, t, TARGETS, strict=True)]
    assert list(further) == list(rows or ALL)
    for name, value in further.items():
        column = torch.tensor([row[name] for row in expected], dtype=FP64)
        torch.testing.assert_close(
            value.double(), torch.where(MASK, column, 0.0), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("dtype", [FP64, FP32])
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 3 * 2 * V * 8, None])
def test_of_a_dense_teacher(chunk_bytes, per_token_grad, dtype):
    student, teachers = make_teachers()
    told = TOLD | {"statistics": ALL, "per_token_grad": per_token_grad, "chunk_bytes": chunk_bytes}
    out, _ = ask(student, teachers[:1], "arithmetic", dtype=dtype, **told)
    s, t = student.logits(T).softmax(-1), probs_of(teachers[:1])[0]
    assert_textbook(out.further, s, t, tolerance=1e-11 if dtype == FP64 else 2e-5)
    assert not any(x.requires_grad for x in out.further.values())
    assert {0.0, 1.0} <= set(out.further["accepted"].tolist())


def test_asking_changes_nothing_else():
    student, teachers = make_teachers()
    out, gradients = ask(student, teachers, "arithmetic", **TOLD, statistics=ALL)
    plain, others = ask(student, teachers, "arithmetic", **TOLD)
    assert torch.equal(out.loss, plain.loss) and plain.further == {} and plain.weights is None
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric"])
def test_of_a_mixture_they_are_the_mixture_s(mixture):
    student, teachers = make_teachers()
    out, _ = ask(student, teachers, mixture, **TOLD, statistics=ALL, mixture_weights=WEIGHTS)
    assert_textbook(out.further, student.logits(T).softmax(-1), mixed(probs_of(teachers), WEIGHTS, mixture))


def test_of_a_sum_of_losses_they_are_means():
    student, teachers = make_teachers()
    out, _ = ask(student, teachers, "loss_sum", **TOLD, statistics=ALL, mixture_weights=WEIGHTS)
    alone = [ask(student, [t], "loss_sum", **TOLD, statistics=ALL)[0].further for t in teachers]
    for name in ALL:
        expected = sum(w * further[name] for w, further in zip(WEIGHTS, alone, strict=True))
        torch.testing.assert_close(out.further[name], expected, rtol=1e-12, atol=1e-13)


def list_of(probs, k, padding=0):
    """The top k with their log-probs, in no order, with padding at the end."""
    values, ids = probs.topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    ids, values = ids[:, order], values[:, order].log()
    ids = torch.cat([ids, ids.new_full((len(ids), padding), -1)], dim=-1)
    return ids, torch.cat([values, values.new_zeros(len(values), padding)], dim=-1)


def ask_list(student, topk, **told):
    return fused_linear_divergence(
        student.hidden, student.weight, student_bias=student.bias, student_logit_scale=student.scale,
        student_softcap=student.softcap, teacher_topk=topk, temperature=T, **TOLD | told,
    )  # fmt: skip


@pytest.mark.parametrize("padding", [0, 3])
def test_of_a_list_that_holds_everything_they_are_those_of_the_dense_teacher(padding):
    student, teachers = make_teachers()
    s, t = student.logits(T).softmax(-1).detach(), probs_of(teachers[:1])[0]
    out = ask_list(student, list_of(t, V, padding), statistics=IN_LISTS)
    assert_textbook(out.further, s, t, IN_LISTS)


def test_of_a_short_list():
    student, teachers = make_teachers()
    s, t = student.logits(T).softmax(-1).detach(), probs_of(teachers[:1])[0]
    k = 6
    ids, logprobs = list_of(t, k, 2)
    ids[4] = -1  # a row about which nothing is known
    out = ask_list(student, (ids, logprobs), statistics=IN_LISTS | {"accepted": k}).further
    for i in range(N):
        row = textbook(s[i], t[i], int(TARGETS[i]), accepted=k)
        listed = dict(zip(ids[i].tolist(), logprobs[i].tolist(), strict=True))
        top = s[i].argsort(descending=True)[:4].tolist()
        known = sorted((listed.get(v, min(listed.values())) for v in top), reverse=True)
        expected = {
            "accepted": row["accepted"],
            "teacher_margin": known[0] - known[1],
            "teacher_rank": row["teacher_rank"] if int(TARGETS[i]) in listed else k + 1,
            "student_rank": row["student_rank"],
            "teacher_max_logprob": row["teacher_max_logprob"],
        }
        if i == 4:
            expected = dict.fromkeys(expected, 0) | {"student_rank": row["student_rank"]}
        for name, value in expected.items():
            assert float(out[name][i]) == pytest.approx(value if MASK[i] else 0.0, rel=1e-10, abs=1e-12), (name, i)
    assert (out["teacher_rank"] == k + 1).any() and (out["teacher_rank"][MASK] <= k).any()


def test_without_a_teacher_the_student_s_rank():
    student, _ = make_teachers()
    arguments = {"student_bias": student.bias, "student_logit_scale": 1.2, "student_softcap": 5.0}
    told = {"target_ids": TARGETS, "statistics": {"student_rank": None}, "per_token_grad": True}
    out = fused_linear_divergence(student.hidden, student.weight, **arguments, **told)
    s = student.logits()
    expected = (s > s.gather(1, TARGETS[:, None])).sum(-1) + 1
    assert torch.equal(out.further["student_rank"], expected.double())


def rows_of(student, teacher):
    shard = VocabShard((student.shape[1],))
    return make_rows(*normalize(shard, student.clone(), teacher.clone()), shard)


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_distances_of_models_that_almost_agree_keep_their_digits_in_fp32(scale):
    a = logits_of(0, 4, 5000)
    b = (a + scale * logits_of(1, 4, 5000)).float()
    a = a.float()
    rows = rows_of(a, b)
    s, t = a.double().softmax(-1), b.double().softmax(-1)
    expected = ((s.sqrt() - t.sqrt()).square().sum(-1) / 2).sqrt()
    torch.testing.assert_close(statistics.hellinger(rows).double(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(statistics.total_variation(rows).double(), (s - t).abs().sum(-1) / 2, rtol=1e-3, atol=0)


def test_distances_of_models_that_share_nothing_are_1_and_of_equal_ones_0():
    a = torch.full((1, 6), -1e4, dtype=FP64)
    b = a.clone()
    a[:, :3], b[:, 3:] = 0.0, 0.0
    for function in (statistics.hellinger, statistics.total_variation):
        assert float(function(rows_of(a, b))) == pytest.approx(1.0) == float(function(rows_of(b, a)))
        assert float(function(rows_of(a, a))) == 0.0


def test_a_broken_teacher_shows():
    z = logits_of(1)
    z[2, 1] = torch.nan
    rows = rows_of(logits_of(0), z)
    target = torch.zeros(5).long()
    values = [f(rows) for f in (statistics.hellinger, statistics.total_variation, statistics.teacher_max_logprob)]
    for value in [*values, statistics.teacher_rank(rows, target)]:
        assert value[2].isnan() and value[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 7, 50])
def test_accepted_within_k(k):
    s, z = logits_of(0, 40), logits_of(1, 40)
    eye = torch.eye(40, dtype=FP64)
    out = fused_linear_divergence(
        eye, s.T.contiguous(), eye, z.T.contiguous(), statistics={"accepted": k, "teacher_margin": max(k, 2)}
    )
    expected = [int(a.argmax()) in b.topk(min(k, 7)).indices.tolist() for a, b in zip(s, z, strict=True)]
    assert out.further["accepted"].tolist() == expected
    assert k < 7 or all(expected)
    best = z.gather(1, s.topk(min(max(k, 2), 7)).indices).topk(2).values
    torch.testing.assert_close(out.further["teacher_margin"], best[:, 0] - best[:, 1], rtol=1e-10, atol=1e-12)


def test_of_a_target_they_are_the_first_teacher_s():
    s, z, r = (logits_of(i) for i in range(3))
    out, _ = on_logits(s, z, r, mixture="affine", mixture_weights=[2.0, -1.0], statistics={"hellinger": None})
    plain, _ = on_logits(s, z, statistics={"hellinger": None})
    assert torch.equal(out.further["hellinger"], plain.further["hellinger"])


LISTED = {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
TOPK = (torch.arange(3).expand(N, 3), torch.full((N, 3), -1.5, dtype=FP64))
REFUSED = [
    ({"statistics": {"helinger": None}}, "statistics must have known names, got 'helinger'. Did you mean 'hellinger'"),
    ({"statistics": {"hellinger": 3}}, r"statistics\['hellinger'\] must be None, got 3"),
    ({"statistics": {"accepted": None}}, "'accepted'.* must be a whole number of at least 1, got None"),
    ({"statistics": {"accepted": 0}}, "must be a whole number of at least 1, got 0"),
    ({"statistics": {"accepted": True}}, "must be a whole number of at least 1, got True"),
    ({"statistics": {"teacher_margin": 1}}, "must be a whole number of at least 2, got 1"),
    ({"statistics": {"teacher_rank": None}, "target_ids": None}, "'teacher_rank'.* needs target_ids"),
    ({"statistics": {"hellinger": None}, "teacher_topk": TOPK} | LISTED, "'hellinger'.* needs a teacher that gives"),
    ({"statistics": {"accepted": 4}, "teacher_topk": TOPK} | LISTED, "'accepted'.* must be at most 3, the length"),
    ({"statistics": {"accepted": 4}, "per_token_grad": True} | LISTED, "'accepted'.* needs a teacher, and this call"),
    ({"statistics": {"accepted": 4}, "backend": "triton"}, r"do not find out statistics=\['accepted'\]"),
    ({"statistics": {"accepted": 4}, "backend": "liger"}, "liger"),
]


@pytest.mark.parametrize(("told", "message"), REFUSED)
def test_bad_requests(told, message):
    student, teacher = make_sides(N, V)
    arguments = {
        "student_bias": student.bias,
        "teacher_hidden": teacher.hidden,
        "teacher_weight": teacher.weight,
        "teacher_bias": teacher.bias,
        "target_ids": TARGETS,
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(student.hidden, student.weight, **arguments | told)
