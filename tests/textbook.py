"""
The truth that floors 0 and 1 are tested against: formulas over probabilities, dense projections, autograd.

Nothing here uses trl_opd. Shapes: N tokens, V vocabulary, H hidden. `s` is the student's distribution, `t` the
teacher's, both `(..., V)` and positive; the value is `(...)`. What a method detaches is detached here too.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def forward_kl(s: Tensor, t: Tensor) -> Tensor:
    return (t * (t / s).log()).sum(-1)


def reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return (s * (s / t).log()).sum(-1)


def generalized_jsd(s: Tensor, t: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return forward_kl(s, t) if beta == 0.0 else reverse_kl(s, t)
    m = beta * t + (1 - beta) * s
    return beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (s * (s / m).log()).sum(-1)


def skew_forward_kl(s: Tensor, t: Tensor, skew: float) -> Tensor:
    return (t * (t / (skew * t + (1 - skew) * s)).log()).sum(-1)


def skew_reverse_kl(s: Tensor, t: Tensor, skew: float, detached: float = 0) -> Tensor:
    m = skew * (s.detach() if detached else s) + (1 - skew) * t
    return (s * (s / m).log()).sum(-1)


def total_variation(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).abs().sum(-1) / 2


def alpha_divergence(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    return (1 - (t**alpha * s ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))


def alpha_beta_divergence(s: Tensor, t: Tensor, alpha: float, beta: float) -> Tensor:
    c = alpha + beta
    return -(t**alpha * s**beta - alpha / c * t**c - beta / c * s**c).sum(-1) / (alpha * beta)


def todi(s: Tensor, t: Tensor, scale: float) -> Tensor:
    w = (1 / (1 + (s / t) ** scale)).detach()
    return (w * t * (t / s).log() + (1 - w) * s * (s / t).log()).sum(-1)


def overlap_advantage(s: Tensor, t: Tensor, k: int) -> Tensor:
    """Row by row: both renormalised on the entries in both top k, where ties for the last place all are."""

    def top(p: list[float]) -> set[int]:
        least = sorted(p, reverse=True)[min(k, len(p)) - 1]
        return {v for v, x in enumerate(p) if x >= least and x > 0}

    values = []
    for a, b in zip(s.tolist(), t.tolist(), strict=True):
        common = top(a) & top(b)
        own, other = sum(a[v] for v in common), sum(b[v] for v in common)
        terms = [a[v] / own * (math.log(b[v] / other) - math.log(a[v] / own)) for v in common]
        values.append(sum(terms) / len(terms) if terms else 0.0)
    return torch.tensor(values, dtype=torch.float64)


def head_entries(t: list[float], head_mass: float) -> set[int]:
    """Walk down the teacher's entries, adding each whose predecessors hold less than `head_mass`."""
    head, mass = set(), 0.0
    for v in sorted(range(len(t)), key=lambda v: -t[v]):
        if mass >= head_mass:
            break
        head.add(v)
        mass += t[v]
    return head


def adaptive_kl(s: Tensor, t: Tensor, head_mass: float) -> Tensor:
    V = s.shape[-1]
    weights = []
    for s_V, t_V in zip(s.reshape(-1, V).tolist(), t.reshape(-1, V).tolist(), strict=True):
        head = head_entries(t_V, head_mass)
        gap = [abs(a - b) for a, b in zip(s_V, t_V, strict=True)]
        head_gap = sum(gap[v] for v in head)
        weights.append(head_gap / sum(gap) if sum(gap) else 0.5)
    w = torch.tensor(weights, dtype=s.dtype).view(s.shape[:-1])
    return w * forward_kl(s, t) + (1 - w) * reverse_kl(s, t)


def entry_weights(s: Tensor, t: Tensor, weighting: str) -> Tensor:
    return {"student": s.detach(), "teacher": t, "uniform": torch.full_like(t, 1 / t.shape[-1])}[weighting]


def concrete_score(s: Tensor, t: Tensor, first: str, second: str) -> Tensor:
    """½ Σ_xy w(y) w'(x) (Δ_x − Δ_y)² multiplied out, so that it takes no V² numbers."""
    gap, w, u = (s / t).log(), entry_weights(s, t, first), entry_weights(s, t, second)
    squares = w.sum(-1) * (u * gap**2).sum(-1) + u.sum(-1) * (w * gap**2).sum(-1)
    return squares / 2 - (u * gap).sum(-1) * (w * gap).sum(-1)


def entropy_gated_kl(s: Tensor, t: Tensor, threshold: float = 0.8, coef: float = 1.0) -> Tensor:
    gate = (-(t * t.log()).sum(-1) > threshold).to(t.dtype)
    return reverse_kl(s, t) + coef * gate * forward_kl(s, t)


def convex_mix(s: Tensor, t: Tensor, **components: dict) -> Tensor:
    """Every component with its weight written out."""
    given = {name: x if isinstance(x, dict) else {"weight": x} for name, x in components.items()}
    return sum(
        x["weight"] * CASES[name][0](s, t, **{key: value for key, value in x.items() if key != "weight"})
        for name, x in given.items()
    )


# One setting of each divergence, none of them symmetric or a special case
CASES = {
    "forward_kl": (forward_kl, {}),
    "reverse_kl": (reverse_kl, {}),
    "generalized_jsd": (generalized_jsd, {"beta": 0.3}),
    "skew_forward_kl": (skew_forward_kl, {"skew": 0.2}),
    "skew_reverse_kl": (skew_reverse_kl, {"skew": 0.3, "detached": 0}),
    "total_variation": (total_variation, {}),
    "alpha_divergence": (alpha_divergence, {"alpha": 0.3}),
    "alpha_beta_divergence": (alpha_beta_divergence, {"alpha": 0.4, "beta": 0.5}),
    "todi": (todi, {"scale": 1.3}),
    "adaptive_kl": (adaptive_kl, {"head_mass": 0.6}),
    "concrete_score": (concrete_score, {"first": "student", "second": "teacher"}),
    "entropy_gated_kl": (entropy_gated_kl, {"threshold": 1.5, "coef": 0.7}),
    "convex_mix": (
        convex_mix,
        {"forward_kl": 0.3, "reverse_kl": 0.25, "generalized_jsd": {"weight": 0.45, "beta": 0.9}},
    ),
}
# Divergences of the form Σ t f(s/t), which no merging of entries can raise
F_DIVERGENCES = list(CASES)[:7]
# Divergences at these settings that are infinite where the teacher, or the student, lacks an entry that the other has;
# for want of the student's entry the gated one only where its gate is open
INFINITE = {
    "teacher": ("reverse_kl", "todi", "adaptive_kl", "concrete_score", "entropy_gated_kl", "convex_mix"),
    "student": ("forward_kl", "todi", "adaptive_kl", "concrete_score", "entropy_gated_kl", "convex_mix"),
}
# Those with detached weights, whose gradient is not that of their value
DETACHED = ("todi", "adaptive_kl", "concrete_score")


def divergence(name: str, s: Tensor, t: Tensor) -> Tensor:
    """The divergence `name` at its setting in `CASES`."""
    formula, params = CASES[name]
    return formula(s, t, **params)


def support_of(s: Tensor, t: Tensor, support: str, size: int) -> list[int]:
    """Entries of the support of one row `(V,)`."""
    student, teacher = (set(sorted(range(len(x)), key=lambda v: -float(x[v]))[:size]) for x in (s.detach(), t))
    sets = {"teacher_top_k": teacher, "student_top_k": student}
    return sorted({**sets, "union_top_k": student | teacher, "intersection_top_k": student & teacher}[support])


def divergence_on(name: str, s: Tensor, t: Tensor, entries: list[int], tail: str) -> Tensor:
    """One row's divergence on `entries`; 0 where there are none, whatever the formula makes of an empty sum."""
    if not entries:
        return 0.0 * s.sum()
    s_K, t_K = s[entries], t[entries]
    if tail == "renormalize":
        s_K, t_K = s_K / s_K.sum(), t_K / t_K.sum()
    if tail == "bucket" and len(entries) < len(s):
        rest = [v for v in range(len(s)) if v not in entries]
        s_K, t_K = torch.cat([s_K, s[rest].sum()[None]]), torch.cat([t_K, t[rest].sum()[None]])
    return divergence(name, s_K, t_K)


@dataclass
class Side:
    """One model's last hidden states and head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, temperature: float = 1.0) -> Tensor:
        z = self.hidden @ self.weight.T
        if self.bias is not None:
            z = z + self.bias
        z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / temperature

    def probs(self, temperature: float = 1.0) -> Tensor:
        return self.logits(temperature).softmax(-1)

    def to(self, dtype: torch.dtype, grad: bool = False) -> "Side":
        """Fresh leaves of another dtype."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        leaves = {k: v.detach().to(dtype).requires_grad_(grad) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **leaves)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]


def make_sides(N: int = 11, V: int = 23, H: tuple[int, int] = (6, 9), bias: bool = True, seed: int = 0) -> list[Side]:
    """A student (with gradient) and a teacher in float64, whose distributions are far from uniform and from equal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sides = [Side(normal(N, h), normal(V, h) / h**0.5 * 1.5, normal(V) * 0.3 if bias else None) for h in H]
    return [sides[0].to(torch.float64, grad=True), sides[1]]


def fused_arguments(student: Side, teacher: Side) -> dict:
    """The two sides as arguments of `fused_linear_divergence`."""
    return {
        "student_hidden": student.hidden,
        "student_weight": student.weight,
        "student_bias": student.bias,
        "student_logit_scale": student.scale,
        "student_softcap": student.softcap,
        "teacher_hidden": teacher.hidden,
        "teacher_weight": teacher.weight,
        "teacher_bias": teacher.bias,
        "teacher_logit_scale": teacher.scale,
        "teacher_softcap": teacher.softcap,
    }


class CountGemms(TorchDispatchMode):
    """Operations in matrix products, in units of 2·rows·H·V; one with a single row or column is a dot, not counted."""

    def __init__(self, rows: int, H: int, V: int):
        super().__init__()
        self.unit, self.total = rows * H * V, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if name in ("bmm", "baddbmm", "addbmm"):
                assert 1 in (a.shape[-2], b.shape[-1]), "a batched product that is no dot"
            elif b.dim() == 2 and a.dim() == 2 and 1 not in (a.shape[0], b.shape[1]):
                self.total += a.shape[0] * a.shape[1] * b.shape[1] / self.unit
        return func(*args, **kwargs or {})
