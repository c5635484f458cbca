# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The floor: the matrix products that no exact implementation can avoid, and nothing else.

Operands in the dtype of the inputs, logits in fp32, the head's gradient accumulated in fp32, as exactness requires.
They go by chunks of tokens into buffers that exist already; how long the chunk is decides how fast they are, so a few
lengths are tried. `rounded` products write the inputs' dtype instead: what an inexact implementation could reach.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .candidates import Cell, Inputs
from .measure import release, take_turns

_CHUNK_BYTES = {"cuda": (256 << 20, 1 << 30, 4 << 30), "cpu": (32 << 20, 128 << 20, 512 << 20)}


class BareGemms:
    """Callable: one forward and backward of nothing but GEMMs. Buffers are allocated once, outside of the timing."""

    def __init__(self, x: Inputs, cell: Cell, rows: int, rounded: bool = False):
        self.rows, self.trained = rows, not cell.frozen_head
        student, teacher = x.student_hidden.detach(), x.teacher_hidden
        weight, teacher_weight = x.student_weight.detach(), x.teacher_weight
        low = student.dtype in (torch.bfloat16, torch.float16)
        self.native = low and student.is_cuda and not rounded
        if low and not self.native and not rounded:  # no fp32 results from half operands here: widen them beforehand
            student, weight = student.float(), weight.float()
            teacher = None if teacher is None else teacher.float()
            teacher_weight = None if teacher_weight is None else teacher_weight.float()
        self.student, self.weight, self.teacher, self.teacher_weight = student, weight, teacher, teacher_weight
        out_dtype = torch.float32 if self.native else student.dtype
        v, h = weight.shape
        self.logits = torch.empty(rows, v, device=x.device, dtype=out_dtype)
        # Not zeros: a GPU multiplies those faster
        self.grad = torch.randn(rows, v, device=x.device, dtype=student.dtype).mul_(1e-3)
        self.grad_hidden = torch.empty(rows, h, device=x.device, dtype=out_dtype)
        self.grad_weight = torch.empty(v, h, device=x.device, dtype=out_dtype) if self.trained else None

    def __call__(self) -> None:
        n = self.student.shape[0]
        for i in range(0, n, self.rows):
            hidden = self.student[i : i + self.rows]
            k = hidden.shape[0]
            self._mm(hidden, self.weight.t(), self.logits[:k])
            if self.teacher is not None and self.teacher_weight is not None:
                self._mm(self.teacher[i : i + self.rows], self.teacher_weight.t(), self.logits[:k])
            self._mm(self.grad[:k], self.weight, self.grad_hidden[:k])
            if self.grad_weight is not None:
                self._mm(self.grad[:k].t(), hidden, self.grad_weight, accumulate=i > 0)

    def _mm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        kwargs = {"out_dtype": torch.float32} if self.native else {}
        if accumulate:
            torch.addmm(out, a, b, out=out, **kwargs)  # type: ignore[call-overload]
        else:
            torch.mm(a, b, out=out, **kwargs)


def fastest_gemms(x: Inputs, cell: Cell, rounded: bool = False) -> tuple[Callable[[], None], int]:
    """
    The bare GEMMs at the fastest of a few chunk lengths, and that length in rows.

    Raises:
        RuntimeError: If none of them fits.
    """
    row_bytes = 4 * cell.vocab
    lengths = sorted({max(1, min(cell.tokens, size // row_bytes)) for size in _CHUNK_BYTES[x.device.type]})
    best: tuple[float, int] | None = None
    problem = ""
    for rows in lengths:
        try:
            gemms = BareGemms(x, cell, rows, rounded)
        except torch.OutOfMemoryError as error:
            problem = str(error)
            continue
        times, problems = take_turns({"gemms": gemms}, 2, x.device)
        del gemms
        release(x.device)
        if times:
            best = min(best or (float("inf"), 0), (min(times["gemms"]), rows))
        problem = problems.get("gemms", problem)
    if best is None:
        raise RuntimeError(problem or "no chunk length fits")
    return BareGemms(x, cell, best[1], rounded), best[1]
