# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What `trl-opd bench head` compares: the inputs, and every implementation as a function of them that returns the loss.

Shapes: N tokens, H hidden, V vocabulary, K support.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import fused_linear_divergence
from ..kernels.dispatch import BACKENDS
from ..losses import DIVERGENCES

# Names that TRL and Liger have too, as the β of their generalized JSD; `jsd` stands for β = ½
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
# Liger's dispatch prefers, where it can, a kernel that gives NaN where both probabilities underflow
os.environ.setdefault("LIGER_KERNEL_IMPL_JSD_LOSS_AND_GRAD", "nvidia-triton")


@dataclass(frozen=True)
class Cell:
    """One problem of the benchmark."""

    student_hidden: int
    teacher_hidden: int
    vocab: int
    tokens: int
    divergence: str = "reverse_kl"
    frozen_head: bool = False
    teacher: str = "full"  # or "top64", "top16" and so on
    dtype: str = "float32"
    gap: float = 0.5

    @property
    def support(self) -> int:
        """K of a top-k teacher, 0 for a dense one."""
        return 0 if self.teacher == "full" else int(self.teacher.removeprefix("top"))

    @property
    def num_gemms(self) -> int:
        """Products that no exact implementation can avoid: two projections, ∂hidden, ∂head."""
        return 4 - self.frozen_head - (self.support > 0)

    @property
    def flops(self) -> float:
        """Operations of those products."""
        teacher = 0 if self.support else self.teacher_hidden
        student = self.student_hidden * (2 if self.frozen_head else 3)
        return 2.0 * self.tokens * self.vocab * (student + teacher)

    def __str__(self) -> str:
        head = "frozen head" if self.frozen_head else "trained head"
        width = f"H {self.student_hidden}"
        if not self.support and self.teacher_hidden != self.student_hidden:
            width += f"/{self.teacher_hidden}"
        shape = f"{width}, V {self.vocab}, N {self.tokens}, {self.dtype}"
        return f"{self.divergence}, {shape}, {head}, {self.teacher} teacher"


@dataclass
class Inputs:
    """The tensors of a problem. A top-k teacher has ids and log-probs instead of hidden states and a head."""

    student_hidden: Tensor  # (N, H_s)
    student_weight: Tensor  # (V, H_s)
    teacher_hidden: Tensor | None  # (N, H_t)
    teacher_weight: Tensor | None  # (V, H_t)
    topk: tuple[Tensor, Tensor] | None = None  # (N, K) ids and log-probs

    @property
    def device(self) -> torch.device:
        return self.student_hidden.device

    @property
    def dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both sides' hidden states and heads."""
        assert self.teacher_hidden is not None and self.teacher_weight is not None
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    def first(self, num_tokens: int) -> "Inputs":
        """The problem of the first tokens alone, with gradients of its own."""
        return Inputs(
            self.student_hidden[:num_tokens].detach().requires_grad_(),
            self.student_weight.detach().requires_grad_(self.student_weight.requires_grad),
            None if self.teacher_hidden is None else self.teacher_hidden[:num_tokens],
            self.teacher_weight,
            None if self.topk is None else (self.topk[0][:num_tokens], self.topk[1][:num_tokens]),
        )

    def forget_gradients(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients that a backward pass leaves."""
        leaves = (self.student_hidden, self.student_weight)
        return sum(x.numel() * x.element_size() for x in leaves if x.requires_grad)


@torch.no_grad()
def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """
    A student whose logits have a standard deviation of 3, and a teacher whose logits are the student's plus noise of
    `cell.gap`, as far as the narrower of the two hidden sizes can tell.
    """
    g = torch.Generator(device).manual_seed(0)
    dtype, n, hs, ht = getattr(torch, cell.dtype), cell.tokens, cell.student_hidden, cell.teacher_hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype)

    shared = min(hs, ht)
    student_hidden, student_weight = normal(n, hs), normal(cell.vocab, hs).mul_(3 * hs**-0.5)
    teacher_hidden, teacher_weight = normal(n, ht), normal(cell.vocab, ht).mul_(cell.gap * ht**-0.5)
    teacher_hidden[:, :shared] = student_hidden[:, :shared]
    teacher_weight[:, :shared] += student_weight[:, :shared]
    student_hidden.requires_grad_()
    student_weight.requires_grad_(not cell.frozen_head)
    if not cell.support:
        return Inputs(student_hidden, student_weight, teacher_hidden, teacher_weight)
    found = []
    for rows in teacher_hidden.split(max(1, (256 << 20) // (8 * cell.vocab))):
        logprobs = (rows @ teacher_weight.t()).float().log_softmax(-1)
        found.append(logprobs.topk(min(cell.support, cell.vocab - 1), dim=-1))
    topk = (torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))
    return Inputs(student_hidden, student_weight, None, None, topk)


def objective(student_logits: Tensor, teacher: Tensor | tuple[Tensor, Tensor], divergence: str) -> Tensor:
    """
    The loss by its textbook: mean divergence of `(N, V)` student logits from the teacher's logits, or from its top-k
    ids and log-probs with one bucket for the rest. In the dtype of the student's logits.
    """
    name = "generalized_jsd" if divergence == "jsd" else divergence
    student = student_logits.log_softmax(-1)
    if isinstance(teacher, Tensor):
        with torch.no_grad():
            logprobs = teacher.log_softmax(-1)
        return DIVERGENCES[name](student, logprobs).mean()
    ids, known = teacher[0], teacher[1].to(student.dtype)
    rest = student.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    unknown = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps).log()
    logprobs = torch.cat([known, unknown], dim=-1)
    logprobs = logprobs - logprobs.logsumexp(-1, keepdim=True)
    return DIVERGENCES[name](torch.cat([student.gather(-1, ids), rest], dim=-1), logprobs).mean()


Implementation = Callable[[Inputs, str], Tensor]


def ours(backend: str) -> Implementation:
    """`fused_linear_divergence` as the trainer calls it, with a mask and weights."""

    def call(x: Inputs, divergence: str) -> Tensor:
        n = x.student_hidden.shape[0]
        weights = torch.full((n,), 1 / n, device=x.device)
        return fused_linear_divergence(
            x.student_hidden,
            x.student_weight,
            x.teacher_hidden,
            x.teacher_weight,
            divergence="generalized_jsd" if divergence == "jsd" else divergence,
            teacher_topk=x.topk,
            token_weights=weights,
            mask=weights > 0,
            backend=backend,
        ).loss

    return call


def trl(x: Inputs, divergence: str) -> Tensor:
    """What TRL's DistillationTrainer calls, on positions that are compacted already."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    s, w, t, v = x.dense
    return ChunkedDivergenceFunction.apply(s, w, None, t, v, None, PEER_BETA[divergence])[0].mean()


def liger_triton(x: Inputs, divergence: str) -> Tensor:
    """Liger's fused linear JSD in Triton, with its own defaults."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    s, w, t, v = x.dense
    return LigerFusedLinearJSDFunction.apply(s, w, t, v, None, PEER_BETA[divergence], -100, 1.0)


def liger_chunked(x: Inputs, divergence: str) -> Tensor:
    """Liger's chunked JSD; compiled on CUDA, which is its default."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    s, w, t, v = x.dense
    labels = torch.zeros(s.shape[0], dtype=torch.long, device=x.device)
    return LigerFusedLinearJSDFunction.apply(
        s, w, t, v, labels, None, None, 0.0, 1.0, PEER_BETA[divergence], -100, 1.0, s.is_cuda
    )


def full_logits(x: Inputs, divergence: str) -> Tensor:
    """Autograd through all logits at once, with an fp32 softmax."""
    student = (x.student_hidden @ x.student_weight.t()).float()
    if x.topk is not None:
        return objective(student, x.topk, divergence)
    _, _, t, v = x.dense
    with torch.no_grad():
        teacher = (t @ v.t()).float()
    return objective(student, teacher, divergence)


def candidates(device: torch.device) -> dict[str, Implementation]:
    """Every implementation by its name in the table."""
    found = {"ours": ours("auto")}
    if device.type == "cuda":
        found |= {f"ours_{name}": ours(name) for name in BACKENDS if name not in ("auto", "liger")}
    return found | {
        "trl": trl,
        "liger_triton": liger_triton,
        "liger_chunked": liger_chunked,
        "full_logits": full_logits,
    }


def why_absent(name: str, cell: Cell, device: torch.device) -> str | None:
    """The reason why an implementation has no figure for a problem, if it has none."""
    peer = name == "trl" or name.startswith("liger")
    if peer and cell.support:
        return "takes a dense teacher only"
    if peer and cell.divergence not in PEER_BETA:
        return "has forward KL, reverse KL and the generalized JSD only"
    if name == "liger_triton" and device.type != "cuda":
        return "needs CUDA"
    available = bytes_free(device)
    needed = estimated_bytes(name, cell)
    if available is not None and needed > available:
        return f"does not fit: about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB free"
    return None


def bytes_free(device: torch.device) -> int | None:
    """
    What a call may take. On CUDA nothing is guessed: a call that does not fit says so at once, and harms nobody.
    """
    from .measure import available_bytes

    return available_bytes() if device.type == "cpu" else None


def estimated_bytes(name: str, cell: Cell) -> float:
    """
    Main memory that a call takes on a CPU, from peaks measured at 1024 × 32,000 and a third on top. The inputs are
    counted too: the process in which the peak is measured makes them again.
    """
    n, v, size = cell.tokens, cell.vocab, getattr(torch, cell.dtype).itemsize
    inputs = float(size * (n + v) * (cell.student_hidden + cell.teacher_hidden))
    base = inputs + 4.0 * v * cell.student_hidden * (2 if size < 4 else 1)
    if name == "full_logits":
        return 18 * 4.0 * n * v + base
    if name == "trl":
        return 18 * 4.0 * min(n, 4096) * min(v, 32768) + base
    if name == "liger_chunked":
        return 24 * 4.0 * min(n, 2047) * v + base
    return (512 << 20) + base
