"""
The divergence head alone, forward and backward: ours beside TRL's, Liger's, full logits and the bare GEMMs.

    python benchmarks/divergence_head.py                                   # 1024 tokens x 32k, hidden 256/512
    python benchmarks/divergence_head.py --tokens 4096 --vocab 152000 --student-hidden 1024 --teacher-hidden 2048
    python benchmarks/divergence_head.py --device cuda --dtype bfloat16 --json head.json

All take turns in one process on the same inputs, and every one of them computes the same loss (its value is printed).
`error` is the largest relative difference of the student's hidden-state gradient from float64 on the first 64 tokens,
relative to that gradient's largest entry. `gemms` are the four products that no exact implementation can avoid (three
with --frozen-head). Memory is the peak above inputs and their gradients, on a CPU measured in a process of its own.
"""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable

import torch
from measure import PeakMemory, compare, machine, summary, write_json
from torch import Tensor

from trl_opd.kernels import fused_linear_divergence
from trl_opd.losses import generalized_jsd


def make_inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    """A student and a teacher of different width that half agree."""
    g = torch.Generator().manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    h, ht = args.student_hidden, args.teacher_hidden
    return {
        "student_hidden": normal(args.tokens, h).requires_grad_(),
        "student_weight": normal(args.vocab, h, scale=h**-0.5).requires_grad_(not args.frozen_head),
        "teacher_hidden": normal(args.tokens, ht),
        "teacher_weight": normal(args.vocab, ht, scale=ht**-0.5),
    }


def ours(x: dict[str, Tensor], beta: float) -> Tensor:
    n = x["student_hidden"].shape[0]
    weights = torch.full((n,), 1 / n, device=x["student_hidden"].device)
    kwargs = {"divergence": "generalized_jsd", "divergence_kwargs": {"beta": beta}, "token_weights": weights}
    return fused_linear_divergence(*x.values(), mask=weights > 0, **kwargs).loss


def trl(x: dict[str, Tensor], beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    s, w, t, v = x.values()
    return ChunkedDivergenceFunction.apply(s, w, None, t, v, None, beta)[0].mean()


def liger_chunked(x: dict[str, Tensor], beta: float) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    s, w, t, v = x.values()
    labels = torch.zeros(s.shape[0], dtype=torch.long, device=s.device)
    compiled = s.is_cuda
    return LigerFusedLinearJSDFunction.apply(s, w, t, v, labels, None, None, 0.0, 1.0, beta, -100, 1.0, compiled)


def liger_triton(x: dict[str, Tensor], beta: float) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    s, w, t, v = x.values()
    return LigerFusedLinearJSDFunction.apply(s, w, t, v, None, beta, -100, 1.0)


def full_logits(x: dict[str, Tensor], beta: float) -> Tensor:
    s, w, t, v = x.values()
    student = (s @ w.t()).float().log_softmax(-1)
    with torch.no_grad():
        teacher = (t @ v.t()).float().log_softmax(-1)
    return generalized_jsd(student, teacher, beta).mean()


def bare_gemms(x: dict[str, Tensor]) -> None:
    """Two projections and the gradients of hidden states and head, a chunk at a time, and nothing else."""
    s, w, t, v = (y.detach() for y in x.values())
    rows = max(1, (128 << 20) // (w.shape[0] * 8))
    grad_weight = torch.zeros_like(w)
    for i in range(0, s.shape[0], rows):
        z = s[i : i + rows] @ w.t()
        t[i : i + rows] @ v.t()
        z @ w
        if x["student_weight"].requires_grad:
            grad_weight.addmm_(z.t(), s[i : i + rows])


def gradient_error(function: Callable, x: dict[str, Tensor], beta: float) -> tuple[float, float]:
    """Loss on the first 64 tokens, and the relative error of its gradient against float64."""
    few = {k: (v[:64] if k.endswith("hidden") else v).detach() for k, v in x.items()}
    exact = {k: v.double().requires_grad_(k == "student_hidden") for k, v in few.items()}
    s, w, t, v = exact.values()
    loss = generalized_jsd((s @ w.t()).log_softmax(-1), (t @ v.t()).log_softmax(-1), beta).mean()
    loss.backward()
    few["student_hidden"].requires_grad_()
    few["student_weight"].requires_grad_(x["student_weight"].requires_grad)
    value = function(few, beta)
    value.backward()
    difference = (few["student_hidden"].grad.double() - exact["student_hidden"].grad).abs().max()
    return value.item(), (difference / exact["student_hidden"].grad.abs().max()).item()


def step(function: Callable, x: dict[str, Tensor], beta: float) -> None:
    for y in x.values():
        y.grad = None
    function(x, beta).backward()


def gradient_buffers(x: dict[str, Tensor]) -> None:
    """Allocate the gradients, so that they do not count as an implementation's extra memory."""
    for y in x.values():
        y.grad = torch.zeros_like(y) if y.requires_grad else None


def peak_mib(name: str, x: dict[str, Tensor], beta: float, argv: list[str]) -> float:
    """Peak extra memory of one call. A CPU's allocator keeps what was freed, so there it needs a fresh process."""
    device = x["student_hidden"].device
    if device.type == "cuda":
        gradient_buffers(x)
        with PeakMemory(device) as memory:
            CANDIDATES[name](x, beta).backward()
        return memory.mib
    command = [sys.executable, "-W", "ignore", __file__, *argv, "--memory-of", name, "--betas", str(beta)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> None:
    """The other side of [`peak_mib`]. A call on few tokens first, so that nothing but the call's buffers is new."""
    x = make_inputs(args)
    few = {k: (v[:2] if k.endswith("hidden") else v).detach() for k, v in x.items()}
    few["student_hidden"].requires_grad_()
    CANDIDATES[args.memory_of](few, args.betas[0]).backward()
    gradient_buffers(x)
    with PeakMemory(torch.device("cpu")) as memory:
        CANDIDATES[args.memory_of](x, args.betas[0]).backward()
    print(memory.mib)


CANDIDATES = {
    "ours": ours,
    "trl": trl,
    "liger_chunked": liger_chunked,
    "liger_triton": liger_triton,
    "full_logits": full_logits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--student-hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 0.5], help="1 reverse KL, 0 forward KL")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frozen-head", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak(args)
        return
    device = torch.device(args.device)
    x = make_inputs(args)
    skip = args.skip if device.type == "cuda" else [*args.skip, "liger_triton"]
    candidates = {k: v for k, v in CANDIDATES.items() if k not in skip}
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "skip", "memory_of")}
    result = {"arguments": settings, "machine": machine(device), "rows": []}
    print(result["machine"], settings)
    for beta in args.betas:
        functions = {name: functools.partial(step, f, x, beta) for name, f in candidates.items()}
        functions["gemms"] = functools.partial(bare_gemms, x)
        times = compare(functions, args.repeats, device)
        base = summary(times["ours"])["median_s"]
        print(f"\nbeta={beta}")
        print(f"{'':>14} {'median s':>9} {'min':>8} {'max':>8} {'/ ours':>7} {'MiB':>6}  {'loss':>9}  error")
        for name in functions:
            row = {"beta": beta, "name": name, **summary(times[name])}
            row["ratio_to_ours"] = row["median_s"] / base
            spread = f"{row['median_s']:9.3f} {row['min_s']:8.3f} {row['max_s']:8.3f}"
            line = f"{name:>14} {spread} {row['ratio_to_ours']:7.2f}"
            if name != "gemms":
                row["peak_mib"] = peak_mib(name, x, beta, sys.argv[1:])
                row["loss"], row["gradient_error"] = gradient_error(candidates[name], x, beta)
                line += f" {row['peak_mib']:6.0f}  {row['loss']:9.6f}  {row['gradient_error']:.1e}"
            result["rows"].append(row)
            print(line)
    write_json(args.json, result)


if __name__ == "__main__":
    main()
