"""`torch.compile` around `fused_linear_divergence`: the graph breaks there, and the numbers stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from textbook import make_sides, reverse_kl

import trl_opd
from trl_opd import fused_linear_divergence

N, V = 7, 19
WEIGHTS = torch.linspace(0.5, 2.0, N).double()
WEIGHTS[2] = 0.0
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]

pytestmark = [
    # After any graph break Dynamo looks at the `.grad` of intermediate results, and would hide this warning of it
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Torch's compiler imports what torch itself has deprecated
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Student(torch.nn.Module):
    """A backbone and a head, with work for the compiler before and after the op."""

    def __init__(self, op=fused_linear_divergence, **arguments):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.layer = torch.nn.Linear(6, 6, dtype=torch.float64)
        self.head = torch.nn.Linear(6, V, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.op, self.arguments = op, arguments

    def forward(self, x, teacher):
        hidden = self.layer(x).tanh() + x
        if self.op is None:
            s = self.head(hidden).softmax(-1)
            divergence = reverse_kl(s, teacher.probs())
            return (divergence * WEIGHTS).sum() / N, divergence
        out = self.op(
            hidden,
            self.head.weight,
            teacher.hidden,
            teacher.weight,
            student_bias=self.head.bias,
            teacher_bias=teacher.bias,
            token_weights=WEIGHTS,
            **self.arguments,
        )
        return out.loss / N, out.divergence * 1.0


def loss_and_gradients(module, forward):
    side, teacher = make_sides(N, V)
    loss, divergence = forward(side.hidden, teacher)
    gradients = torch.autograd.grad(loss, [side.hidden, *module.parameters()])
    return [loss.detach(), divergence.detach()[WEIGHTS > 0], *gradients]


@pytest.mark.parametrize("arguments", [{}, {"per_token_grad": True}], ids=["gradient in forward", "per token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_module_has_the_loss_and_gradients_of_full_logits(backend, arguments):
    module, dense = Student(**arguments), Student(op=None)
    compiled = torch.compile(module, backend=backend)
    for _ in range(2):
        for ours, theirs in zip(loss_and_gradients(module, compiled), loss_and_gradients(dense, dense), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_compiled_call_of_the_op_itself():
    side, teacher = make_sides(N, V)
    compiled = torch.compile(fused_linear_divergence, backend="eager")
    loss = compiled(side.hidden, side.weight, teacher.hidden, teacher.weight).loss
    torch.testing.assert_close(loss, fused_linear_divergence(*side.leaves[:2], *teacher.leaves[:2]).loss)


@pytest.mark.parametrize("arguments", [{}, {"per_token_grad": True}], ids=["gradient in forward", "per token"])
def test_the_graph_breaks_around_the_op_and_nothing_of_it_is_traced(arguments):
    traced = []

    def record(graph_module, example_inputs):
        nodes = [node for node in graph_module.graph.nodes if node.op.startswith("call_")]
        traced.append([getattr(node.target, "__name__", node.target) for node in nodes])
        return graph_module.forward

    module = Student(**arguments)
    compiled = torch.compile(module, backend=record)
    for _ in range(3):
        loss_and_gradients(module, compiled)
    assert traced[0] == ["linear", "tanh", "add"]
    assert traced[1:] in ([], [["truediv", "mul"]])


SCRIPT = """
import sys, time, torch
import trl_opd.kernels
assert "torch._dynamo" not in sys.modules, "importing the kernels imports the compiler"
assert "torch.distributed.tensor" not in sys.modules, "importing the kernels imports DTensor"
op = trl_opd.kernels.fused_linear_divergence
tensors = [torch.arange(12.0).view(3, 4).sin().requires_grad_(), torch.arange(20.0).view(5, 4).cos(),
           torch.ones(3, 4), torch.arange(20.0).view(5, 4).sin()]
expected = None
if sys.argv[1] == "called before":
    expected = op(*tensors).loss.item()
    assert "torch._dynamo" not in sys.modules, "calling the op imports the compiler"
compiled = torch.compile(lambda *tensors: op(*(x * 1.0 for x in tensors)).loss * 2, backend="eager")
for _ in range(2):
    loss = compiled(*tensors)
    loss.backward()
if expected is None:
    expected = op(*tensors).loss.item()
assert abs(loss.item() / 2 - expected) < 1e-6 * expected
"""


@pytest.mark.parametrize("when", ["called before", "never called before"])
def test_the_compiler_is_imported_by_nobody_but_its_users(when):
    path = os.pathsep.join([str(Path(trl_opd.__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, when], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
