"""Loss and gradient equal to those of TRL's own chunked divergence, wherever it is right."""

from dataclasses import replace

import pytest
import torch
from textbook import fused_arguments, make_sides
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from trl_opd import fused_linear_divergence

B, T, V = 3, 5, 37
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]])


def trl_loss(student, teacher, beta, temperature, num_items):
    return _chunked_divergence_loss(
        student.hidden.view(B, T, -1),
        teacher.hidden.view(B, T, -1),
        student.weight,
        teacher.weight,
        MASK,
        beta,
        num_items_in_batch=num_items,
        student_lm_head_bias=student.bias,
        teacher_lm_head_bias=teacher.bias,
        student_logit_scale=student.scale,
        teacher_logit_scale=teacher.scale,
        student_final_logit_softcapping=student.softcap,
        teacher_final_logit_softcapping=teacher.softcap,
        temperature=temperature,
    )


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "scale, softcap, temperature"])
@pytest.mark.parametrize("num_items", [None, 23])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_loss_gradient_and_entropy_equal_trl(beta, num_items, plain):
    student, teacher = (side.to(torch.float32, grad=True) for side in make_sides(B * T, V))
    temperature = 1.0
    if not plain:
        student, teacher = replace(student, scale=1.4, softcap=7.0), replace(teacher, scale=0.7, softcap=9.0)
        temperature = 0.6
    theirs, entropy_sum, num_valid = trl_loss(student, teacher, beta, temperature, num_items)
    expected = torch.autograd.grad(theirs, student.leaves)

    weights = MASK.flatten() / (MASK.sum() if num_items is None else num_items)
    out = fused_linear_divergence(
        **fused_arguments(student, teacher),
        divergence="generalized_jsd",
        divergence_kwargs={"beta": beta},
        token_weights=weights,
        temperature=temperature,
    )
    assert out.rows.sum() == num_valid
    torch.testing.assert_close(out.loss, theirs, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.student_entropy.sum(), entropy_sum, rtol=2e-6, atol=0)
    for ours, other in zip(torch.autograd.grad(out.loss, student.leaves), expected, strict=True):
        assert (ours - other).norm() < 3e-6 * other.norm()
