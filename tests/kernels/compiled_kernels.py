"""
Compiles the Triton kernels for a GPU that need not be there, and prints what ptxas says of each.

Run by test_triton_compiles.py in a process of its own, with `TRITON_INTERPRET=0`. The launches are the backend's own:
the op runs on the CPU, its launches compile and do no more, so that what it computes is arbitrary.

Arguments: compute capability (80, 90), and the names of the calls in `CALLS`.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompilationError
from triton.runtime import driver

from trl_opd import fused_linear_divergence
from trl_opd.kernels import fused, triton_backend
from trl_opd.kernels.projection import Projector
from trl_opd.kernels.rows import TORCH_ONLY
from trl_opd.losses import DIVERGENCES

N, V, H, K = 3, 5001, 8, 4
SOFTCAPS = {"student_softcap": 30.0, "teacher_softcap": 50.0, "temperature": 0.7}
BIASES = {"student_bias": torch.zeros(V), "teacher_bias": torch.zeros(V)}
WATCHED = {"overlap_top_k": 64, "statistics": {"teacher_rank": None}}
CALLS = {name: {"divergence": name} for name in DIVERGENCES if name not in TORCH_ONLY}
for divergence in ("reverse_kl", "generalized_jsd"):
    CALLS |= {
        f"{divergence}, {what}": {"divergence": divergence, **told}
        for what, told in {
            "no gradient": {"no_grad": True},
            "fp32 gradient": {"fp32": True},
            "everything": SOFTCAPS | BIASES | WATCHED | {"fp32": True},
            "per token": {"per_token_grad": True},
            "per token, everything": SOFTCAPS | BIASES | WATCHED | {"per_token_grad": True},
        }.items()
    }
CALLS |= {
    "bare": {"token_weights": None, "target_ids": None},
    "a student's bias": {"student_bias": torch.zeros(V)},
    "overlap": {"overlap_top_k": 64},
    "a rank": {"statistics": {"teacher_rank": None}},
}
KERNELS = ("dense_kernel", "partial_kernel", "softmax_kernel")
TOP_K = torch.arange(K).expand(N, K), torch.zeros(N, K)
SPARSE = {"teacher_hidden": None, "teacher_weight": None, "teacher_topk": TOP_K}
CALLS |= {
    "support": {"support": "teacher_top_k", "support_size": K},
    "support, per token": {"support": "union_top_k", "support_size": K, "per_token_grad": True} | SOFTCAPS | BIASES,
    "sparse": SPARSE,
    "sparse, fp32 gradient": SPARSE | {"fp32": True},
    "sparse, softcap": SPARSE | {"student_softcap": 30.0, "student_bias": torch.zeros(V)},
    "sparse, per token": SPARSE | {"student_softcap": 30.0, "per_token_grad": True},
}


class AbsentDevice:
    """As much of a driver as compilation asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In the place of a kernel: a launch compiles it."""

    def __init__(self, kernel):
        self.kernel, self.results = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.results.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return launch


class Bf16Gradients(Projector):
    """As on the device."""

    def __init__(self, *args):
        super().__init__(*args)
        self.grad_dtype = torch.bfloat16

    def add_gradients(self, *args):
        pass


def usage(compiled) -> dict:
    """Registers, and bytes of memory that a thread needs because it has too few."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    ptx = compiled.asm["ptx"]
    result = {
        "kernel": compiled.metadata.name,
        "loads": len(re.findall(r"ld\.global", ptx)),
        "wide loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
        "f64": len(re.findall(r"\.f64", ptx)),
    }
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
        result |= dict(zip(("registers", "stack", "shared", "local"), map(int, numbers.groups()), strict=True))
    return result


def call(name: str) -> list[dict]:
    """The kernels that a call launches, each once."""
    kernels = {k: Compiled(getattr(triton_backend.kernels, k)) for k in KERNELS}
    given = dict(CALLS[name])
    no_grad, fp32 = given.pop("no_grad", False), given.pop("fp32", False)
    fused.Projector = Projector if fp32 else Bf16Gradients
    hidden = torch.zeros(N, H).requires_grad_()
    weight = torch.zeros(V, H).requires_grad_()
    arguments = {
        "teacher_hidden": torch.zeros(N, H), "teacher_weight": torch.zeros(V, H),
        "target_ids": torch.arange(N), "token_weights": torch.ones(N),
    } | given  # fmt: skip
    originals = {k: compiled.kernel for k, compiled in kernels.items()}
    try:
        for k, compiled in kernels.items():
            setattr(triton_backend.kernels, k, compiled)
        with torch.no_grad() if no_grad else nullcontext():
            out = fused_linear_divergence(hidden, weight, **arguments, backend="triton")
        if given.get("per_token_grad"):
            (out.divergence.sum() + out.student_logprobs.sum() + out.student_entropy.sum()).backward()
    finally:
        for k, original in originals.items():
            setattr(triton_backend.kernels, k, original)
    different = {id(x): x for compiled in kernels.values() for x in compiled.results}
    return [usage(x) for x in different.values()]


def attempt(name: str) -> list[dict]:
    try:
        return call(name)
    except CompilationError as error:
        return [{"error": str(error)}]


if __name__ == "__main__":
    warnings.simplefilter("error")
    driver.set_active(AbsentDevice(int(sys.argv[1])))
    triton_backend.unusable = lambda *args: None
    triton_backend._around = lambda x: nullcontext()
    print(json.dumps({name: attempt(name) for name in sys.argv[2:] or CALLS}))
