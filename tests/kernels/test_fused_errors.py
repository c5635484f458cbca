"""What `fused_linear_divergence` refuses, and what it says."""

import pytest
import torch
from textbook import fused_arguments, make_sides

from trl_opd import fused_linear_divergence

N, V = 6, 11


@pytest.fixture
def arguments() -> dict:
    return fused_arguments(*make_sides(N, V))


def top_k(rows: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, 3, dtype=torch.long), torch.zeros(rows, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"divergence": "reversekl"}, "divergence must be .* got 'reversekl'. Did you mean 'reverse_kl'"),
        ({"divergence_kwargs": {"beta": 0.5}}, "reverse_kl takes no parameters"),
        ({"support": "top_k"}, "support must be .* got 'top_k'. Did you mean 'union_top_k'"),
        ({"support": "sampled"}, "support must be a vocabulary support, got 'sampled'.*Valid: full, teacher_top_k"),
        ({"tail": "buckets"}, "tail must be .* got 'buckets'. Did you mean 'bucket'"),
        ({"backend": "ligar"}, "backend must be .* got 'ligar'. Did you mean 'liger'"),
        ({"support": "teacher_top_k"}, "support_size must be at least 1 for support='teacher_top_k', got None"),
        ({"support": "student_top_k", "support_size": 0}, "support_size must be at least 1 .* got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"teacher_hidden": None}, "teacher_hidden and teacher_weight go together"),
        ({"teacher_weight": None}, "teacher_hidden and teacher_weight go together"),
        ({"teacher_hidden": None, "teacher_weight": None}, "A teacher is required: pass teacher_hidden"),
        ({"teacher_topk": top_k()}, "teacher_topk replaces teacher_hidden and teacher_weight"),
        ({"teacher_hidden": torch.zeros(N + 1, 9)}, r"one row per student row \(6\), got 7"),
        ({"token_weights": torch.ones(N + 1)}, r"token_weights must have one row per token \(6\), got shape \(7,\)"),
        ({"mask": torch.ones(N - 1).bool()}, r"mask must have one row per token \(6\), got shape \(5,\)"),
        ({"target_ids": torch.zeros(1).long()}, r"target_ids must have one row per token \(6\), got shape \(1,\)"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, changed, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(**arguments | changed)


@pytest.mark.parametrize(("part", "wrong"), [(0, "ids"), (1, "log-probs")])
def test_a_top_k_teacher_of_the_wrong_length_is_refused(arguments, part, wrong):
    topk = list(top_k())
    topk[part] = topk[part][:-1]
    changed = {"teacher_hidden": None, "teacher_weight": None, "teacher_topk": tuple(topk)}
    with pytest.raises(
        ValueError, match=rf"teacher_topk {wrong} must have one row per token \(6\), got shape \(5, 3\)"
    ):
        fused_linear_divergence(**arguments | changed)
