"""
`fused_linear_divergence` over heads whose rows are spread over two processes, against the textbook on whole heads.
"""

from dataclasses import replace

import pytest
import torch
from textbook import CASES, divergence, divergence_on, overlap_advantage, support_of
from vocab_parallel_runs import (
    ALL,
    OVERLAP,
    STATISTICS,
    Case,
    K,
    N,
    V,
    call,
    make_inputs,
    near_sides,
    objective,
    run_two_processes,
    shared,
)


def expected_divergence(case: Case, options: dict, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    tail = options.get("tail", "bucket")
    if case.teacher == "top-k":
        entries = [[v for v in ids if 0 <= v < V] for ids in options["teacher_topk"][0].tolist()]
    elif "support" in options:
        entries = [support_of(a, b, options["support"], options["support_size"]) for a, b in zip(s, t, strict=True)]
    elif case.name == "total_variation":
        return divergence(case.name, s, t)
    else:  # of the KLs that are asked for here, an entry that a model gives no mass contributes nothing
        both = [v for v in range(V) if case.has_mass(v)]
        return CASES[case.name][0](s[:, both], t[:, both], **options["divergence_kwargs"])
    return torch.stack([divergence_on(case.name, a, b, e, tail) for a, b, e in zip(s, t, entries, strict=True)])


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def overlap(student_ids: torch.Tensor, teacher_ids: torch.Tensor) -> torch.Tensor:
    pairs = zip(student_ids.tolist(), teacher_ids.tolist(), strict=True)
    return torch.tensor([len({*a} & {*b}) / len(b) for a, b in pairs], dtype=torch.float64)


def truth(case: Case) -> dict:
    """What [`call`] should give, from dense formulas on whole heads."""
    student, teacher, options = make_inputs(case)
    keep = options.get("mask", options["token_weights"] != 0)
    s, t = (shared(side).probs(options.get("temperature", 1.0)) for side in (student, teacher))
    targets = options["target_ids"][:, None]
    out = {"student_entropy": entropy(s), "student_logprobs": s.gather(1, targets)[:, 0].log()}
    if case.teacher != "none":
        out["divergence"] = expected_divergence(case, options, s, t)
    if case.teacher == "dense":
        out |= {"teacher_entropy": entropy(t), "teacher_logprobs": t.gather(1, targets)[:, 0].log()}
        if case.is_finite:
            out |= {"forward_kl": (t * (t / s).log()).sum(-1), "reverse_kl": (s * (s / t).log()).sum(-1)}
            out["overlap"] = overlap(s.topk(OVERLAP).indices, t.topk(OVERLAP).indices)
            out["overlap_advantage"] = overlap_advantage(s, t, OVERLAP)
    if case.teacher == "top-k":
        ids = options["teacher_topk"][0]
        bucketed = {"options": options | {"tail": "bucket"}, "s": s.detach(), "t": t}
        out |= {
            name: expected_divergence(replace(case, name=name), **bucketed) for name in ("forward_kl", "reverse_kl")
        }
        out["overlap"] = overlap(s.topk(K).indices, ids)
        real = ((ids >= 0) & (ids < V)).double()
        listed = torch.zeros_like(t).scatter_add(1, ids.clamp(0, V - 1), real)
        out["overlap_advantage"] = overlap_advantage(s, t * listed, K)
        known = torch.where((ids >= 0) & (ids < V), t.gather(1, ids.clamp(0, V - 1)), 0.0)
        out["teacher_entropy"] = entropy(torch.cat([known, 1 - known.sum(-1, keepdim=True)], dim=-1))
    out = {key: torch.where(keep, x, 0.0) for key, x in out.items()}
    out["loss"] = (out["divergence"] * options["token_weights"]).sum() if case.teacher != "none" else s.sum() * 0
    expected = {key: x.detach() for key, x in out.items()}
    if case.grad:
        leaves = {key: getattr(student, key) for key in ("hidden", "weight", "bias")}
        wanted = {key: x for key, x in leaves.items() if x.requires_grad}
        gradients = torch.autograd.grad(objective(out, case), list(wanted.values()))
        expected |= {f"grad of {key}": g for key, g in zip(wanted, gradients, strict=True)}
    return expected


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="module")
def results():
    return run_two_processes()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ALL)
def test_two_processes_with_half_a_head_each_give_what_a_whole_head_gives(results, name):
    case = ALL[name]
    first, second = (result[name] for result in results)
    expected = truth(case)
    for key, value in expected.items():
        if key in ("grad of weight", "grad of bias"):
            assert_close(key, torch.cat([first[key], second[key]]), value)
        else:
            assert_close(key, first[key], value)
    for key in first:
        if key not in ("grad of weight", "grad of bias") and first[key] is not None:
            assert torch.equal(first[key], second[key]), f"{key} differs between the processes"
    for key in ("grad of hidden", "grad of weight", "grad of bias"):
        assert (first[key] is None) == (key not in expected)


REFUSED = {
    "shards that differ": "must hold the same rows of the first 23, got [9, 14] and [10, 13] rows in rank order",
    "an empty shard": "must hold rows of the head, got [0, 23] rows",
    "rows that differ": "The number of rows must be the same on all processes of vocab_group, got [6, 5]",
    "chunks that differ": "chunk_bytes must be the same on all processes of vocab_group, got [1000, 2000]",
    "a gradient on one": "requires_grad of student_hidden must be the same on all processes of vocab_group, got [0",
    "liger": "loss_backend='liger' cannot compute heads that are spread over processes",
    "triton": "backend='triton' cannot be used: with vocab_group",
}


@pytest.mark.distributed
@pytest.mark.parametrize("what", REFUSED)
def test_what_processes_cannot_share_is_refused_on_both(results, what):
    for result in results:
        assert REFUSED[what] in result["refused"][what]


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_a_nan_is_seen_by_both_processes(results, where):
    expected = torch.arange(N) == 2 if where == "hidden" else torch.ones(N).bool()
    for result in results:
        for key, value in result["nan"][where].items():
            if key in STATISTICS:
                of_the_teacher = key.startswith("teacher")
                assert torch.equal(value.isnan(), expected & (not of_the_teacher)), key
        assert torch.equal(result["nan"][where]["grad of hidden"].isnan().all(-1), expected)


@pytest.mark.distributed
@pytest.mark.parametrize("near", [N - 2, N])
def test_a_small_divergence_is_accurate_in_float32(results, near):
    student, teacher = near_sides(near)
    s, t = student.to(torch.float64).probs(), teacher.to(torch.float64).probs()
    kl = (s * (s / t).log()).sum(-1)
    assert 1e-6 < kl.min() < kl[:near].max() < 1e-5 and (kl[near:] > 0.1).all()
    torch.testing.assert_close(results[0]["near"][near]["divergence"].double(), kl, rtol=1e-5, atol=0)


@pytest.mark.distributed
def test_the_number_of_exchanges_does_not_grow_with_the_tokens(results):
    """Sizes; largest logits, normalisers and KLs of the one chunk; statistics and the hidden states' gradient."""
    for result in results:
        assert result["exchanges"] == {"all_gather": 1, "all_reduce": 5}


@pytest.mark.distributed
def test_a_group_of_one_process_is_no_group(results):
    student, teacher, options = make_inputs(Case())
    alone = call(student, teacher, Case(), options, None)
    for result in results:
        torch.testing.assert_close(result["group of one"], alone, rtol=0, atol=0)
