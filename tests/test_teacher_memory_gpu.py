"""On a GPU: weights that wait in pinned memory, quantized ones, and a teacher beside the student's device."""

import pytest
import torch
from accelerate import Accelerator
from memory_cases import kl, logprobs, make_batch, prepared
from steps import build, record
from tiny import make_model
from transformers import Qwen3ForCausalLM

from trl_opd import LocalTeacher
from trl_opd.teachers.memory import weight_bytes

pytestmark = pytest.mark.gpu
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """No TF32, so that the CPU's answers are the GPU's to float tolerance."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def accelerator():
    return Accelerator()


def wide(**kwargs):
    """Four layers, of about 25 MiB each in float32, so that what is resident can be told from what is not."""
    config = make_model(hidden_size=512, **kwargs).config
    config.num_hidden_layers, config.intermediate_size, config.head_dim = 4, 4096, 64
    config.initializer_range, config.layer_types = 0.05, ["full_attention"] * 4
    torch.manual_seed(1)
    return Qwen3ForCausalLM(config).eval()


def on_gpu(batch):
    for name in ("input_ids", "attention_mask", "position_ids", "completion_ids", "completion_mask"):
        setattr(batch, name, getattr(batch, name).cuda())
    return batch


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("offload", ["model", "layers"])
def test_waiting_weights_leave_the_gpu(accelerator, offload, tied):
    batch = on_gpu(make_batch(True))
    expected = prepared(LocalTeacher(wide(tie_word_embeddings=tied)), accelerator)(batch).hidden_states
    model = wide(tie_word_embeddings=tied)
    total, layer = weight_bytes(model), weight_bytes(model.model.layers[0])
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    teacher = prepared(LocalTeacher(model, offload=offload), accelerator)
    assert torch.cuda.memory_allocated() - start < 0.1 * layer + 2**20
    assert all(p.is_pinned() for p in model.model.layers.parameters())
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        answer = teacher(batch)
        assert torch.equal(answer.hidden_states, expected)
        assert answer.head.weight.is_cuda
        used = torch.cuda.max_memory_allocated() - start
        assert used < (2 * layer if offload == "layers" else total + layer)
        assert used >= (layer if offload == "layers" else 4 * layer)
    del answer
    assert torch.cuda.memory_allocated() - start < 0.1 * layer + 2**20
    pending = teacher.submit(batch)
    assert pending._kept.hidden_states.is_pinned()
    rows = torch.tensor([3, 0], device="cuda")
    part = batch.select(rows)
    collected = pending.collect(rows, part)
    assert collected.hidden_states.is_cuda
    torch.testing.assert_close(
        collected.hidden_states[part.completion_mask], expected[rows][part.completion_mask], **TOLERANCE
    )


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 2e-3), ("bnb_8bit", 4e-3), ("bnb_4bit", 0.25)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_on_the_gpu(accelerator, tmp_path, quantization, bound, dtype):
    pytest.importorskip("torchao" if quantization == "int8" else "bitsandbytes")
    model = wide()
    model.save_pretrained(tmp_path)
    batch = on_gpu(make_batch())
    base = prepared(LocalTeacher(model), accelerator)
    expected = logprobs(base(batch), batch)
    teacher = prepared(LocalTeacher(str(tmp_path), quantization=quantization, dtype=dtype), accelerator)
    assert all(p.is_cuda for p in teacher.model.parameters())
    cost = kl(expected, logprobs(teacher(batch), batch), batch)
    assert 0 < cost < bound + (0 if dtype == "float32" else 5e-3)
    layers = teacher.model.model.layers
    assert weight_bytes(layers) < (0.16 if quantization == "bnb_4bit" else 0.28) * weight_bytes(model.model.layers)


def test_int8_weights_wait_in_pinned_memory(accelerator, tmp_path):
    pytest.importorskip("torchao")
    wide().save_pretrained(tmp_path)
    batch = on_gpu(make_batch())
    expected = prepared(LocalTeacher(str(tmp_path), quantization="int8"), accelerator)(batch).hidden_states
    for offload in ("model", "layers"):
        teacher = prepared(LocalTeacher(str(tmp_path), quantization="int8", offload=offload), accelerator)
        assert weight_bytes(teacher.model.model.layers, "cuda") == 0
        torch.testing.assert_close(teacher(batch).hidden_states, expected, **TOLERANCE)
        assert weight_bytes(teacher.model.model.layers, "cuda") == 0


@pytest.mark.parametrize("credit", [{}, {"credit": "policy_gradient", "support": "sampled"}], ids=["direct", "policy"])
@pytest.mark.parametrize(
    "fields",
    [{"teacher_device": "cpu"}, {"teacher_offload": "model"}, {"teacher_offload": "layers", "teacher_batch_size": 8}],
    ids=["cpu", "model", "layers"],
)
def test_a_student_on_the_gpu_learns_the_same(tmp_path, fields, credit):
    losses = []
    for extra in ({}, fields):
        trainer = build(
            tmp_path / str(len(losses)),
            teacher=make_model(hidden_size=24, seed=1).double(),
            use_cpu=False,
            max_steps=3,
            **credit,
            **extra,
        )
        assert trainer.accelerator.device.type == "cuda"
        step = record(trainer)
        trainer.train()
        losses.append(torch.stack(step.losses))
    torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)
    where = {p.device.type for p in trainer.teacher.model.model.layers.parameters()}
    assert where == {"cpu"}
    if credit == {}:
        assert trainer.teacher(on_gpu(make_batch())).head.weight.is_cuda
