"""Quantized teachers: what is quantized, what it costs in nats and saves in bytes, and that they train."""

import logging

import pytest
import torch
from memory_cases import kl, logprobs, make_batch, make_gpt2, prepared
from steps import build, record
from tiny import make_model
from torch import nn
from transformers import Qwen3ForCausalLM

from trl_opd import LocalTeacher
from trl_opd.teachers import memory
from trl_opd.teachers.memory import WaitingWeights, quantization_config, weight_bytes

# What each may cost in nats a token (mean KL of the unquantized teacher to it; measured on the models below: int8
# 2e-4 to 8e-4, bnb_8bit 6e-4 to 2e-3, bnb_4bit 0.04 to 0.12), and what its layers may weigh beside float32.
COST = {"int8": (2e-3, 0.28), "bnb_8bit": (4e-3, 0.28), "bnb_4bit": (0.25, 0.15)}
# bitsandbytes' 4-bit product on a CPU takes multiples of 32 outputs
SHAPES = {
    "tiny": {"hidden_size": 64, "head_dim": 32, "initializer_range": 0.2},
    "wide": {"hidden_size": 256, "head_dim": 32, "initializer_range": 0.05, "vocab_size": 1000},
}


def save_teacher(path, shape, tied):
    config = make_model(hidden_size=SHAPES[shape]["hidden_size"], tie_word_embeddings=tied).config
    for name, value in SHAPES[shape].items():
        setattr(config, name, value)
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(path)
    return model, str(path)


@pytest.fixture(scope="module", params=[(s, t) for s in SHAPES for t in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def saved(request, tmp_path_factory):
    """A float32 teacher, its head tied or not, and where it was saved."""
    return save_teacher(tmp_path_factory.mktemp("teacher"), *request.param)


def linears(model):
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("quantization", COST)
def test_what_a_quantization_costs_and_saves(saved, quantization):
    model, path = saved
    batch = make_batch(vocab=model.config.vocab_size)
    expected = logprobs(prepared(LocalTeacher(model))(batch), batch)
    teacher = prepared(LocalTeacher(path, quantization=quantization))
    answer = teacher(batch)
    assert 0 < kl(expected, logprobs(answer, batch), batch) < COST[quantization][0]
    assert weight_bytes(teacher.model.model.layers) < COST[quantization][1] * weight_bytes(model.model.layers)
    # Head and embedding are what they were
    assert torch.equal(answer.head.weight, model.lm_head.weight)
    assert type(answer.head.weight) is nn.Parameter
    assert torch.equal(teacher.model.model.embed_tokens.weight, model.model.embed_tokens.weight)
    tied = model.config.tie_word_embeddings
    assert (teacher.model.lm_head.weight is teacher.model.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_int8_rounds_each_output_channel_to_a_255th_of_its_range(saved):
    model, path = saved
    teacher = prepared(LocalTeacher(path, quantization="int8"))
    assert len(linears(model)) == 14
    for ours, theirs in zip(linears(teacher.model), linears(model), strict=True):
        error = (ours.weight.dequantize() - theirs.weight).abs().amax(1)
        step = theirs.weight.abs().amax(1) / 127
        assert (error <= step).all()
        assert error.max() > 0
    rounded = Qwen3ForCausalLM.from_pretrained(path)
    for module, quantized in zip(linears(rounded), linears(teacher.model), strict=True):
        module.weight.data = quantized.weight.dequantize()
    batch = make_batch(vocab=model.config.vocab_size)
    expected = logprobs(prepared(LocalTeacher(rounded))(batch), batch)
    torch.testing.assert_close(logprobs(teacher(batch), batch), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_int8_computes_in_the_dtypes_of_training(saved, dtype, autocast):
    model, path = saved
    batch = make_batch(vocab=model.config.vocab_size)
    teacher = prepared(LocalTeacher(path, quantization="int8", dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        answer = teacher(batch)
    base = prepared(LocalTeacher(path, dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = base(batch)
    assert answer.hidden_states.dtype == expected.hidden_states.dtype
    assert kl(logprobs(expected, batch), logprobs(answer, batch), batch) < 5 * COST["int8"][0]


@pytest.mark.parametrize("offload", ["model", "layers"])
def test_int8_weights_may_wait(saved, offload, monkeypatch):
    model, path = saved
    batch = make_batch(vocab=model.config.vocab_size)
    expected = prepared(LocalTeacher(path, quantization="int8"))(batch)
    copied = []

    def to_device(self, part):
        copied.append((part.dtype, part.dim() == 2 and part.shape[1] > 1))
        return part.clone()

    monkeypatch.setattr(WaitingWeights, "_to_device", to_device)
    teacher = prepared(LocalTeacher(path, quantization="int8", offload=offload))
    resident = weight_bytes(teacher.model)
    assert torch.equal(teacher(batch).hidden_states, expected.hidden_states)
    assert torch.equal(teacher(batch).hidden_states, expected.hidden_states)
    assert copied.count((torch.int8, True)) == 2 * 14  # matrices travel as integers
    assert weight_bytes(teacher.model) == resident


def test_bitsandbytes_weights_may_not(saved):
    from transformers import AutoModelForCausalLM

    _, path = saved
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization_config("bnb_8bit"))
    with pytest.raises(ValueError, match="teacher_offload must be unset for a teacher with bitsandbytes weights"):
        prepared(LocalTeacher(model, offload="layers"))


def test_a_quantized_model_may_be_passed(saved):
    from transformers import AutoModelForCausalLM

    _, path = saved
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization_config("int8"))
    batch = make_batch(vocab=model.config.vocab_size)
    expected = prepared(LocalTeacher(path, quantization="int8"))(batch)
    assert torch.equal(prepared(LocalTeacher(model))(batch).hidden_states, expected.hidden_states)


def test_a_model_without_linear_layers_is_refused(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The GPT2LMHeadModel has no linear layers that it quantizes"):
        prepared(LocalTeacher(str(tmp_path), quantization="int8"))


def test_bitsandbytes_says_a_thing_once(monkeypatch, caplog):
    monkeypatch.setattr(memory, "_said", set())
    quantization_config("bnb_8bit")
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for i in (1, 1, 2, 1):
        logger.warning("inputs will be cast from %s", i)
    assert [record.getMessage()[-1] for record in caplog.records] == ["1", "2"]


@pytest.fixture(scope="module")
def unquantized_losses(tmp_path_factory):
    """Where the tiny teacher was saved, and the losses of three steps with it."""
    _, path = save_teacher(tmp_path_factory.mktemp("teacher"), "tiny", False)
    return path, train(tmp_path_factory.mktemp("run"), path)


def train(output_dir, path, **fields):
    trainer = build(output_dir, teacher=path, model=make_model(), max_steps=3, **fields)
    step = record(trainer)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    return torch.stack(step.losses)


@pytest.mark.parametrize("quantization", COST)
def test_three_steps_with_a_quantized_teacher(tmp_path, unquantized_losses, quantization):
    path, expected = unquantized_losses
    losses = train(tmp_path, path, teacher_quantization=quantization)
    # The losses differ by E_s log(t/t'), of the order of the root of the KL between the two teachers at most
    bound = COST[quantization][0] ** 0.5
    assert 0 < (losses - expected).abs().max() < bound
    assert expected.min() > 2 * bound
