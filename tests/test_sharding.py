"""
A student and teacher that are sharded by FSDP2, or copied by DDP, have the loss and gradients of whole ones.

Accelerate shards on accelerators only: the trainer's runs here tell it that the CPU is one.
"""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from processes import leave, run_two
from tiny import VOCAB_SIZE, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import FAILURES, RUNS, fail_and_resume, one_process, train

from trl_opd.collators import TeacherBatch
from trl_opd.heads import HeadCall, add_head_branch
from trl_opd.kernels import fused_linear_divergence
from trl_opd.teachers import LocalTeacher

NUM_PROMPT_TOKENS, NUM_TOKENS = 3, 6
CASES = {
    "fsdp": {"shard": "fsdp"},
    "fsdp, tied": {"shard": "fsdp", "tied": True},
    "fsdp, lora": {"shard": "fsdp", "peft": True},
    "fsdp, checkpointing": {"shard": "fsdp", "checkpointing": True},
    "fsdp, per-token gradient": {"shard": "fsdp", "per_token_grad": True},
    "ddp": {"shard": "ddp"},
    "ddp, lora": {"shard": "ddp", "peft": True},
}

# Runs of the trainer with everything sharded
TRAINER_RUNS = ("dapo", "policy gradient, dapo", "lora", "lora, base teacher", "gradient checkpointing", "evaluation")
# By the failure: the run that it goes on as, and what the first process says (a teacher's shards are gathered by both)
FAILING_RUNS = {"nan": ("top-k teacher", "another process"), "local": ("dapo", "nan at completion token")}
# Torch cannot load a sharded optimizer without state, so not SGD; the large epsilon keeps the update nearly linear
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1.0}
FSDP = {
    "use_cpu": False,
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


def make_student(tied, peft, checkpointing):
    student = make_model(tie_word_embeddings=tied)
    add_head_branch(student)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if peft:
        student = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return student


def make_batch():
    """Four sequences of different lengths, padded on both sides."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, VOCAB_SIZE, (4, NUM_PROMPT_TOKENS + NUM_TOKENS), generator=generator)
    positions = torch.arange(NUM_PROMPT_TOKENS + NUM_TOKENS)
    start, end = torch.tensor([[0], [1], [2], [0]]), torch.tensor([[5], [9], [6], [8]])
    return ids, ((positions >= start) & (positions < end)).long()


def distill(student, teacher, rows, world, per_token_grad=False):
    """The rows' share of the reverse KL's mean over all tokens, scaled as gradients are averaged over processes."""
    ids, attention = make_batch()
    mask = attention[:, NUM_PROMPT_TOKENS:].bool()
    weights = (mask / mask.sum() * world)[rows]
    ids, attention, mask = ids[rows], attention[rows], mask[rows]
    completion_ids = ids[:, NUM_PROMPT_TOKENS:]
    scores = LocalTeacher(teacher)(TeacherBatch(ids, attention, attention.cumsum(-1) - 1, completion_ids, mask))

    def call(hidden_states, head, aux_loss):
        assert not isinstance(head.weight, DTensor) and not isinstance(scores.head.weight, DTensor)
        return fused_linear_divergence(
            hidden_states[:, -NUM_TOKENS - 1 : -1].flatten(0, 1),
            head.weight,
            scores.hidden_states.flatten(0, 1),
            scores.head.weight,
            token_weights=weights.flatten(),
            per_token_grad=per_token_grad,
        ).loss

    loss = student(input_ids=ids, attention_mask=attention, head_call=HeadCall(call))
    loss.backward()
    return loss.detach()


def gradients(model):
    model = model.module if isinstance(model, DistributedDataParallel) else model
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def wrap(model, shard):
    if shard == "ddp":
        return DistributedDataParallel(model) if any(p.requires_grad for p in model.parameters()) else model
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers:
        fully_shard(layer, mesh=mesh)
    # As TRL wraps a model that is only read: nothing stays gathered when the forward is over
    reshard = True if not any(p.requires_grad for p in model.parameters()) else None
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def make_teacher():
    teacher = make_model(hidden_size=24, seed=1).requires_grad_(False).eval()
    add_head_branch(teacher)
    return teacher


def take_the_cpu_for_an_accelerator():
    def set_device(state):
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


def run_two_processes(output_dir):
    take_the_cpu_for_an_accelerator()
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name in TRAINER_RUNS:
        run_dir = output_dir / name.replace(" ", "_")
        result = train(run_dir, 2, **RUNS[name], **FSDP)
        torch.save(result, output_dir / f"trainer, {name}.{rank}.pt")
    for name in FAILING_RUNS:
        result = fail_and_resume(output_dir / f"failure_{name}", 2, **FAILURES[name], **FSDP, **ADAM)
        torch.save(result, output_dir / f"failure, {name}.{rank}.pt")
    for name, case in CASES.items():
        options = {"tied": False, "peft": False, "checkpointing": False, "per_token_grad": False, **case}
        shard, per_token_grad = options.pop("shard"), options.pop("per_token_grad")
        student, teacher = wrap(make_student(**options), shard), wrap(make_teacher(), shard)
        rows = slice(2 * rank, 2 * rank + 2)
        loss = distill(student, teacher, rows, 2, per_token_grad)
        torch.distributed.all_reduce(loss)
        torch.save({"loss": loss / 2, "gradients": gradients(student)}, output_dir / f"{name}.{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("sharding")
    run_two(__file__, output_dir)
    return {path.stem: torch.load(path) for path in output_dir.glob("*.pt")}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_whole_models(results, name):
    case = CASES[name]
    student, teacher = make_student(case.get("tied", False), case.get("peft", False), False), make_teacher()
    # The truth: full logits, plain autograd
    ids, attention = make_batch()
    mask = attention[:, NUM_PROMPT_TOKENS:].bool()
    student_logprobs, teacher_logprobs = (
        model(input_ids=ids, attention_mask=attention).logits[:, NUM_PROMPT_TOKENS - 1 : -1].double().log_softmax(-1)
        for model in (student, teacher)
    )
    divergence = (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)
    loss = divergence[mask].mean()
    loss.backward()
    for rank in (0, 1):
        result = results[f"{name}.{rank}"]
        assert result["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        expected = gradients(student)
        assert result["gradients"].keys() == expected.keys()
        for key, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(result["gradients"][key], gradient, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.distributed
@pytest.mark.parametrize("name", TRAINER_RUNS)
def test_a_sharded_run_of_the_trainer_equals_one_process(results, name):
    alone = one_process(name)
    for rank in (0, 1):
        result = results[f"trainer, {name}.{rank}"]
        assert result["weights"].keys() == alone["weights"].keys()
        for key, expected in alone["weights"].items():
            torch.testing.assert_close(result["weights"][key], expected, rtol=1e-6, atol=1e-6)
        for line, expected in zip(result["logs"], alone["logs"], strict=True):
            for key in expected:
                if ("distill/" in key and "per_second" not in key) or key in ("loss", "grad_norm", "eval_loss"):
                    assert line[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "healthy", "elsewhere"), [(k, *v) for k, v in FAILING_RUNS.items()])
def test_a_failing_teacher_leaves_a_sharded_student_whole(results, tmp_path, name, healthy, elsewhere):
    alone = train(tmp_path, **RUNS[healthy], **ADAM)
    good, bad = results[f"failure, {name}.0"], results[f"failure, {name}.1"]
    assert elsewhere in good["message"] and "nan at completion token" in bad["message"]
    for result in (good, bad):
        assert result["checkpoints"] == ["checkpoint-1"]
        for key, weight in result["before"].items():
            assert torch.equal(result["saved"][key], weight)
        for key, expected in alone["weights"].items():
            torch.testing.assert_close(result["weights"][key], expected, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two_processes(Path(sys.argv[1]))
