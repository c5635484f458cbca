# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The distributions that a student can be led to instead of its teacher's: logits Σ_k a_k z_k + c · sg(z_student).

A target is a name and a few numbers, resolved anew whenever it is used, so that each of the numbers can be scheduled.
z_k are final logits (after scale, softcap and temperature) of the teacher, then of the references in the order in
which `reference_model=` names them; the student's own term carries no gradient (sg). The identity is
`target="teacher"`.

A divergence from the target is the fused op's (`trl_opd.kernels`). A policy gradient needs only the sampled token's
Σ_k a_k log p_k + c · log p_student ([`Target.sampled`]): the target's normaliser is one number a prefix, a baseline
that leaves the mean gradient as it is.

This file needs torch only.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import nearest_name


@dataclass(frozen=True)
class Target:
    """
    What a target makes of the models' logits.

    Args:
        weights (`tuple[float, ...]`): Coefficients a_k of the teacher and of each reference; none for `"contrast"`.
        student_coef (`float`, *optional*, defaults to `0.0`): c, the coefficient of the student's own logits.
        mixture (`str`, *optional*, defaults to `"affine"`): `"affine"`, or `"contrast"` (see [`contrast`]).
        contrast_scale (`float`, *optional*, defaults to `15.0`): Of a `"contrast"` target.
        contrast_floor (`float`, *optional*, defaults to `1e-3`): Of a `"contrast"` target.
        reward_coef (`float`, *optional*, defaults to `0.0`): Coefficient of the reward in the advantage, 1/β of
            [`reward_tilt`].
    """

    weights: tuple[float, ...]
    student_coef: float = 0.0
    mixture: str = "affine"
    contrast_scale: float = 15.0
    contrast_floor: float = 1e-3
    reward_coef: float = 0.0

    @property
    def is_teacher(self) -> bool:
        """Whether the teacher's answer is the target as it stands: there is nothing beside it."""
        return self.mixture == "affine" and self.weights == (1.0,) and self.student_coef == 0

    def sampled(self, teacher_logprobs: Sequence[Tensor], student_logprobs: Tensor) -> Tensor:
        """
        Log-probs of the sampled tokens under the target, up to its normaliser: Σ_k a_k log p_k + c · log p_student.

        Less the student's log-prob this is the advantage of the reverse KL to the target, up to a constant of the
        prefix. Detached. Terms of coefficient 0 are left out, whatever they hold.

        Args:
            teacher_logprobs (`Sequence[torch.Tensor]`): Of the teacher, then of the references, `(B, T)` each.
            student_logprobs (`torch.Tensor`): Of the sampling policy, `(B, T)`.

        Returns:
            `torch.Tensor` of shape `(B, T)`.

        Raises:
            ValueError: If the target needs whole distributions, or there are not as many teachers as coefficients.
        """
        if self.mixture != "affine":
            raise ValueError(
                f"target={self.mixture!r} needs whole distributions: its coefficient is made of them. Set "
                "credit='direct', or a target that is a combination of log-probs."
            )
        if len(teacher_logprobs) != len(self.weights):
            raise ValueError(
                f"teacher_logprobs must be {len(self.weights)} tensors, the teacher's and one per reference, got "
                f"{len(teacher_logprobs)}."
            )
        terms = [*zip(self.weights, teacher_logprobs, strict=True), (self.student_coef, student_logprobs)]
        parts = [x.detach() if a == 1 else a * x.detach() for a, x in terms if a != 0]
        if not parts:
            return torch.zeros_like(student_logprobs)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def teacher() -> Target:
    """The teacher itself, z_T: what distillation aims at without a target."""
    return Target((1.0,))


def taid(t: float) -> Target:
    r"""
    Temporally adaptive interpolated distillation: (1 − t) · sg(z) + t · z_T, from the student itself (t = 0: no
    gradient) to the teacher (t = 1).

    Interpolates logits, as the paper and its code do. Meant for the forward KL, whose gradient in the logits is
    s − p_t. The paper raises t over training (0.4 to 1), adaptively by the loss; schedule `target_kwargs.t`.

    Paper: [TAID](https://huggingface.co/papers/2501.16937); default 0.4 from its code. Read in its code.
    """
    return Target((t,), 1 - t)


def veto(beta: float) -> Target:
    r"""
    z_T + β · sg(z), the distribution ∝ p_T · p_student^β: what neither of the two finds likely is left out.

    β = 0 is the teacher. With the reverse KL the advantage is log p_T − (1 − β) log p_student, whose fixed point for
    β < 1 is ∝ p_T^(1/(1 − β)). The paper lets β fall to 0 over training; schedule `target_kwargs.beta`.

    Paper: [Veto](https://huggingface.co/papers/2601.07155); default 0.8 (its reasoning runs). From notes on the paper,
    which has not been read.
    """
    return Target((1.0,), beta)


def extrapolate(scale: float) -> Target:
    r"""
    λ z_T + (1 − λ) z_R with one reference, the distribution ∝ p_R^(1 − λ) · p_T^λ.

    λ = 1 is the teacher whatever the reference, λ < 1 lies between the two, λ > 1 goes beyond the teacher, away from
    the reference (the student before its training, or the teacher before its own). With the reverse KL and sampled
    tokens the advantage is −[log p_student − log p_R − λ (log p_T − log p_R)].

    Far above 1 the student loses its format where the teacher is all but sure (the "extrapolation cliff" of
    [ListOPD](https://huggingface.co/papers/2605.08737), whose bound on λ is not built in).

    Paper: [G-OPD](https://huggingface.co/papers/2602.12125); default 1.25 (ExOPD) from its code. Read in its code.
    """
    return Target((scale, 1 - scale))


def delta(scale: float) -> Target:
    r"""
    z_S0 + α (z_T − z_T0): the raw student (S0) moved by what tuning moved the teacher from its raw version (T0).

    Two references: the raw teacher, then the raw student. With raw models that agree and α = 1 it is the tuned
    teacher; with a teacher that was not tuned it is the raw student.

    Paper: [Delta-KD](https://huggingface.co/papers/2509.14526). This is the plain shift; the paper's other operators
    and its value of α are not built in (the form is recalled, not read), nor is its added cross-entropy.
    """
    return Target((scale, -scale, 1.0))


def contrast(scale: float, floor: float) -> Target:
    r"""
    z_T + w (z_T − z_R) with one reference, the reversed teacher, and w = scale · Σ_v |p_T − p_R| + floor at each
    token; the divergence at the token is divided by w.

    Teachers that agree are the target themselves. Needs distributions, hence `credit="direct"`.

    Paper: [AlignDistil](https://huggingface.co/papers/2503.02832): its loss is (β/w) · KL(student‖target), so set
    `distill_coef` to its β; defaults 15 (on-policy; 10 off-policy) and 1e-3 from its code. Read in its code.
    """
    return Target((), mixture="contrast", contrast_scale=scale, contrast_floor=floor)


def reward_tilt(beta: float) -> Target:
    r"""
    The teacher tilted by the reward, ∝ p_T · e^(r/β), over whole completions.

    The reverse KL to it is that to the teacher less E[r]/β: the logits are the teacher's, and r/β (`reward_coef` times
    the reward, less the mean reward of the prompt's other completions) joins the advantages. The default is this
    library's choice.

    Paper: of no paper alone; the identity behind KL-regularised reinforcement learning.
    """
    return Target((1.0,), reward_coef=1 / beta)


class _Parameter(NamedTuple):
    default: float
    rule: str
    valid: Callable[[float], bool]


class TargetRule(NamedTuple):
    """How a target is made, of how many references and which numbers."""

    make: Callable[..., Target]
    num_references: int
    references: str  # what they are
    parameters: Mapping[str, _Parameter]


_FINITE = ("a finite number", math.isfinite)
_AT_LEAST_0 = ("a finite number, at least 0", lambda x: math.isfinite(x) and x >= 0)
_ABOVE_0 = ("a finite number above 0", lambda x: math.isfinite(x) and x > 0)

TARGETS: Mapping[str, TargetRule] = {
    "teacher": TargetRule(teacher, 0, "", {}),
    "taid": TargetRule(taid, 0, "", {"t": _Parameter(0.4, "in [0, 1]", lambda x: 0 <= x <= 1)}),
    "veto": TargetRule(veto, 0, "", {"beta": _Parameter(0.8, *_AT_LEAST_0)}),
    "extrapolate": TargetRule(extrapolate, 1, "the model to extrapolate from", {"scale": _Parameter(1.25, *_FINITE)}),
    "delta": TargetRule(delta, 2, "the raw teacher, then the raw student", {"scale": _Parameter(1.0, *_FINITE)}),
    "contrast": TargetRule(
        contrast,
        1,
        "the model to turn away from",
        {"scale": _Parameter(15.0, *_AT_LEAST_0), "floor": _Parameter(1e-3, *_ABOVE_0)},
    ),
    "reward_tilt": TargetRule(reward_tilt, 0, "", {"beta": _Parameter(1.0, *_ABOVE_0)}),
}
_NAMES = (*TARGETS, "affine")


def affine(num_references: int, kwargs: Mapping[str, object]) -> Target:
    r"""
    Any coefficients: `teacher` · z_T + `reference_1` · z_1 + … + `student` · sg(z), for targets that have no name.

    `teacher` is 1 and the others are 0 by default. `references` may name the references' coefficients as one list;
    numbers of their own can be scheduled.
    """
    given = dict(kwargs)
    names = [f"reference_{i + 1}" for i in range(num_references)]
    if "references" in given:
        listed = given.pop("references")
        if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) != num_references:
            raise ValueError(
                f"target_kwargs['references'] of affine must be a list of {num_references} numbers, one per model of "
                f"reference_model, got {listed!r}."
            )
        given |= dict(zip(names, listed, strict=True))
    rules = {"teacher": _Parameter(1.0, *_FINITE), "student": _Parameter(0.0, *_FINITE)}
    rules |= {name: _Parameter(0.0, *_FINITE) for name in names}
    values = _checked("affine", rules, given)
    return Target((values["teacher"], *(values[name] for name in names)), values["student"])


def resolve_target(name: str, kwargs: Mapping[str, object] | None, num_references: int) -> Target:
    """
    The target of a name, its parameters and as many reference models.

    Args:
        name (`str`): A key of `TARGETS`, or `"affine"`.
        kwargs (`Mapping[str, float]`, *optional*): Its parameters, plain numbers.
        num_references (`int`): How many models `reference_model=` names.

    Returns:
        [`Target`]

    Raises:
        ValueError: If the name or a parameter is unknown, a parameter is out of range, or the references are too few
            or too many.
    """
    if name not in _NAMES:
        raise ValueError(f"target must be a known name, got {name!r}.{nearest_name(name, list(_NAMES))}")
    if name == "affine":
        return affine(num_references, kwargs or {})
    rule = TARGETS[name]
    if num_references != rule.num_references:
        what = f"{rule.num_references} ({rule.references})" if rule.num_references else "none"
        raise ValueError(
            f"reference_model must name as many models as target={name!r} takes, {what}, got {num_references}. The "
            "target's formula has one term for each. Pass reference_model= accordingly, or set another target."
        )
    return rule.make(**_checked(name, rule.parameters, kwargs or {}))


def check_target(name: str, kwargs: Mapping[str, object] | None = None) -> None:
    """
    Check a target's name and parameters where the reference models are not known yet.

    Raises:
        ValueError: If the name or a parameter is unknown, or a parameter is out of range.
    """
    if name in TARGETS:
        resolve_target(name, kwargs, TARGETS[name].num_references)
        return
    listed = (kwargs or {}).get("references")
    numbered = [int(key.removeprefix("reference_")) for key in kwargs or {} if re.fullmatch(r"reference_\d+", key)]
    count = len(listed) if isinstance(listed, Sequence) else max(numbered, default=0)
    resolve_target(name, kwargs, count)


def _checked(name: str, rules: Mapping[str, _Parameter], kwargs: Mapping[str, object]) -> dict[str, float]:
    """The parameters with their defaults filled in."""
    values = {key: rule.default for key, rule in rules.items()}
    for key, value in kwargs.items():
        if key not in rules:
            hint = nearest_name(key, list(rules)) if rules else f" target={name!r} takes none. Remove it."
            raise ValueError(f"target_kwargs must hold parameters of target={name!r}, got {key!r}.{hint}")
        _, rule, valid = rules[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not valid(value):
            raise ValueError(f"target_kwargs[{key!r}] of {name} must be {rule}, got {value!r}.")
        values[key] = float(value)
    return values
