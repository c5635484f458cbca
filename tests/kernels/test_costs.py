"""What a call of either backend multiplies and holds, and that its gradient is that of its value (gradcheck)."""

import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from backends import FP32, SINGLE, device_of, environment, served, triton_backend
from textbook import CASES, DETACHED, CountGemms, fused_arguments, make_sides
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_opd import fused_linear_divergence
from trl_opd.kernels import fused

N, H, V, K = 6, 8, 37, 4
TARGETS = torch.arange(N)
ROWS = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
DIFFERENTIABLE = [name for name in CASES if name not in DETACHED]


@pytest.mark.parametrize("support", ["full", "teacher_top_k"])
@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, per_token_grad, support):
    student, teacher = make_sides(N=3, V=6, H=(2, 3))
    student = replace(student, scale=1.2, softcap=3.0)
    told = {"support": support, "support_size": 3} if support != "full" else {}
    told |= {"divergence": name, "divergence_kwargs": CASES[name][1], "target_ids": torch.tensor([0, 3, 5])}

    def values(hidden, weight, bias):
        changed = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias, "chunk_bytes": 2 * 2 * 48}
        arguments = fused_arguments(student, teacher) | told | changed
        out = fused_linear_divergence(**arguments, temperature=0.8, per_token_grad=per_token_grad)
        return (out.divergence, out.student_logprobs, out.student_entropy) if per_token_grad else out.loss

    assert torch.autograd.gradcheck(values, student.leaves)


def arguments_of(backend, teacher_kind, name="reverse_kl", frozen=False, tokens=N, size=V):
    device = device_of(backend)
    sides = [side.to(FP32) for side in make_sides(tokens, size, H=(H, H))]
    for side in sides:
        side.hidden, side.weight, side.bias = (x.to(device) for x in side.leaves)
    student, teacher = sides
    student.hidden.requires_grad_()
    for x in (student.weight, student.bias):
        x.requires_grad_(not frozen)
    arguments = fused_arguments(student, teacher)
    arguments |= {"divergence": name, "divergence_kwargs": CASES[name][1], "backend": backend}
    if teacher_kind in ("top-k teacher", "none"):
        arguments = {key: x for key, x in arguments.items() if not key.startswith("teacher")}
    if teacher_kind == "top-k teacher":
        values, ids = teacher.probs().log().topk(K)
        arguments["teacher_topk"] = ids, values
    elif teacher_kind == "union_top_k":
        arguments |= {"support": "union_top_k", "support_size": K}
    return arguments


COUNTS = [
    ({"teacher_kind": "dense"}, {}, (4, 0)),
    ({"teacher_kind": "dense", "frozen": True}, {}, (3, 0)),
    ({"teacher_kind": "union_top_k"}, {}, (4, 0)),
    ({"teacher_kind": "union_top_k", "frozen": True}, {}, (3, 0)),
    ({"teacher_kind": "top-k teacher"}, {}, (3, 0)),
    ({"teacher_kind": "top-k teacher", "frozen": True}, {}, (2, 0)),
    ({"teacher_kind": "dense"}, {"grad": False}, (2, 0)),
    ({"teacher_kind": "top-k teacher"}, {"grad": False}, (1, 0)),
    ({"teacher_kind": "dense"}, {"grad": False, "per_token_grad": True}, (2, 0)),
    ({"teacher_kind": "dense"}, {"mask": ROWS}, (4, 0)),
    ({"teacher_kind": "dense"}, {"mask": torch.zeros(N).bool()}, (0, 0)),
    ({"teacher_kind": "dense"}, {"mask": torch.zeros(N).bool(), "per_token_grad": True}, (0, 0)),
    ({"teacher_kind": "dense"}, {"per_token_grad": True}, (2, 4)),
    ({"teacher_kind": "dense", "frozen": True}, {"per_token_grad": True}, (2, 3)),
    ({"teacher_kind": "dense"}, {"mask": ROWS, "per_token_grad": True}, (2, 4)),
    ({"teacher_kind": "union_top_k"}, {"per_token_grad": True}, (2, 4)),
    ({"teacher_kind": "top-k teacher"}, {"per_token_grad": True}, (1, 3)),
    ({"teacher_kind": "none"}, {"per_token_grad": True}, (1, 3)),
]


@pytest.mark.parametrize(("problem", "told", "expected"), COUNTS)
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_number_of_matrix_products(backend, dtype, problem, told, expected):
    told = dict(told)
    grad = told.pop("grad", True)
    rows = int(told["mask"].sum()) if "mask" in told else N
    arguments = arguments_of(backend, **problem) | told
    with CountGemms(max(rows, 1), H, V) as forward, nullcontext() if grad else torch.no_grad():
        out = fused_linear_divergence(**arguments, target_ids=TARGETS, chunk_bytes=2 * 2 * V * 4)
    with CountGemms(max(rows, 1), H, V) as backward:
        if grad:
            (out.loss + out.student_logprobs.sum()).backward()
    assert (forward.total, backward.total) == pytest.approx(expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_every_divergence_costs_four_products_or_three_with_a_frozen_head(backend, dtype, frozen, name):
    if name not in served(backend):
        pytest.skip(f"{backend} has no {name}")
    arguments = arguments_of(backend, "dense", name, frozen)
    with CountGemms(N, H, V) as products:
        fused_linear_divergence(**arguments, chunk_bytes=4 * 2 * V * 4).loss.backward()
    assert products.total == pytest.approx(3 if frozen else 4)


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.size = max([self.size, *(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("per_token_grad", [False, True])
@pytest.mark.parametrize("teacher_kind", ["dense", "union_top_k", "top-k teacher"])
@pytest.mark.parametrize(("backend", "dtype"), SINGLE)
def test_no_tensor_of_tokens_times_vocabulary_exists(backend, dtype, teacher_kind, per_token_grad, monkeypatch):
    if triton_backend is not None:
        monkeypatch.setattr(triton_backend, "MAX_BLOCK", 512)
    monkeypatch.setattr(fused, "_workspaces", threading.local())  # an earlier call's may be larger
    tokens, size, rows = 24, 1000, 2
    arguments = arguments_of(backend, teacher_kind, "generalized_jsd", tokens=tokens, size=size)
    with LargestTensor() as largest:
        out = fused_linear_divergence(**arguments, per_token_grad=per_token_grad, chunk_bytes=rows * 2 * size * 4)
        out.loss.backward()
    assert largest.size <= 4 * max(2.2 * 2 * rows * size, H * size)  # rows have room for up to 63 columns more
    assert largest.size < 4 * tokens * size / 2


MEMORY = """
import sys
import torch
from trl_opd import fused_linear_divergence

def held(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

torch.set_num_threads(1)
tokens, per_token_grad, kind = int(sys.argv[1]), sys.argv[2] == "per token", sys.argv[3]
V, H, chunk_bytes = 65536, 8, 8 << 20

def call(n):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    given = {"teacher_hidden": torch.randn(n, H), "teacher_weight": torch.randn(V, H)}
    if kind == "top-k teacher":
        given = {"teacher_topk": (torch.arange(64).expand(n, 64), torch.full((n, 64), -5.0))}
    elif kind != "full":
        given |= {"support": kind, "support_size": 64}
    before = held("VmHWM")
    out = fused_linear_divergence(
        hidden, weight, **given, divergence="generalized_jsd", target_ids=torch.arange(n), overlap_top_k=16,
        per_token_grad=per_token_grad, chunk_bytes=chunk_bytes,
    )
    (out.loss + (out.student_entropy.sum() if per_token_grad else 0)).backward()
    return held("VmHWM") - before

call(1)  # libraries, and the buffers of a row
gradients = 4 * H * (V + tokens)
print((call(tokens) - gradients - chunk_bytes) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("full", "gradient in forward"),
        ("full", "per token"),
    ],
)
def test_memory_stays_within_the_budget_however_many_tokens(kind, mode):
    """MiB above the budget of 8 that a process of its own holds at its peak; the logits of 512 tokens are 128."""
    peaks = []
    for tokens in (128, 512):
        command = [sys.executable, "-c", MEMORY, str(tokens), mode, kind]
        peaks.append(
            float(subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120).stdout)
        )
    assert max(peaks) < 24 and abs(peaks[1] - peaks[0]) < 12, peaks
