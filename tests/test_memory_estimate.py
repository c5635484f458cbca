"""The memory estimate beside real models: weights, gradients, optimizer states, adapters and the cache are exact."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_prompts, make_tokenizer, trainer_config
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.optimization import Adafactor

from trl_opd import OnPolicyDistillConfig
from trl_opd.checks import Run
from trl_opd.memory_estimate import chunk_mib, estimate_memory, sharding_of
from trl_opd.model_sizes import (
    BNB_4BIT,
    BNB_4BIT_PLAIN,
    BNB_8BIT,
    INT8,
    ModelSize,
    build_on_meta,
    cache_bytes,
    dtype_of,
    optimizer_bytes,
    quantization_of,
)
from trl_opd.teachers import LocalTeacher, MixtureTeacher, SelfTeacher
from trl_opd.teachers.memory import quantization_config, weight_bytes


def lora(**fields):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_model(tied, dtype):
    model = make_model(tie_word_embeddings=tied).to(dtype)
    size = ModelSize(build_on_meta(model.config), dtype)
    assert size.num_parameters == model.num_parameters()
    assert size.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert all(p.device.type == "meta" for p in size.model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert size.layer_bytes == layer and size.resident_bytes == size.weight_bytes - 2 * layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [lora(), lora(target_modules=["q_proj"]), lora(use_dora=True), lora(modules_to_save=["lm_head"])]
)
def test_an_adapter(config, dtype):
    real = get_peft_model(make_model().to(dtype), config)
    size = ModelSize(build_on_meta(make_model().config, peft_config=config), dtype)
    trained = [p for p in real.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p, _ in size.trained] == [tuple(p.shape) for p in trained]
    assert [itemsize for _, itemsize in size.trained] == [p.itemsize for p in trained]
    assert size.adapter_bytes == size.trained_bytes == sum(p.nbytes for p in trained)
    assert size.weight_bytes == sum(p.nbytes for p in real.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("sgd with momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
        ("adafactor", lambda p: Adafactor(p, lr=0.1, relative_step=False)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_an_optimizer(optim, make, dtype):
    if optim == "adafactor" and dtype == torch.bfloat16:
        pytest.skip("its states stay in float32, and it keeps others beside them")
    model = make_model().to(dtype)
    optimizer = make(list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if isinstance(s, torch.Tensor)]
    trained = ModelSize(build_on_meta(model.config), dtype).trained
    name, momentum = optim.partition(" ")[0], "momentum" in optim
    assert optimizer_bytes(name, trained, momentum=momentum) == sum(s.nbytes for s in states)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "lion_8bit", "paged_adamw_8bit", "adamw_torch_4bit"])
def test_states_in_8_bits_are_a_quarter_and_small_tensors_stay(optim):
    large, small = torch.empty(4096, 4096, device="meta"), torch.empty(100, device="meta")
    count = 1 if "lion" in optim else 2
    if "4bit" in optim:
        assert optimizer_bytes(optim, [(large, 4)]) == pytest.approx(count * 4096**2 / 2, rel=0.07)
        return
    assert optimizer_bytes(optim, [(large, 4)]) == pytest.approx(count * 4096**2, rel=0.02)
    assert optimizer_bytes(optim, [(small, 4)]) == count * 400


def test_an_optimizer_of_which_nothing_is_known():
    assert optimizer_bytes("galore_adamw", [(torch.empty(8), 4)]) is None
    assert optimizer_bytes("lomo", [(torch.empty(8), 4)]) is None


@pytest.mark.parametrize(("name", "expected"), [("int8", INT8), ("bnb_8bit", BNB_8BIT), ("bnb_4bit", BNB_4BIT)])
def test_quantized_weights(tmp_path, name, expected):
    make_model(hidden_size=128).save_pretrained(tmp_path)
    config = quantization_config(name)
    real = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    size = ModelSize(build_on_meta(real.config), torch.float32, expected)
    buffers = sum(b.nbytes for b in make_model(hidden_size=128).buffers())
    if name != "int8":
        assert quantization_of(config) == expected
    assert size.weight_bytes == pytest.approx(weight_bytes(real) - buffers, rel=0.01)
    assert size.weight_bytes < 0.75 * ModelSize(build_on_meta(real.config), torch.float32).weight_bytes


def test_which_quantization_a_config_asks_for():
    assert quantization_of({"load_in_4bit": True}) == BNB_4BIT_PLAIN
    assert quantization_of({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}) == BNB_4BIT
    assert quantization_of({"load_in_8bit": True}) == BNB_8BIT
    assert quantization_of({"quant_method": "awq", "bits": 4}) == BNB_4BIT_PLAIN
    assert quantization_of(None) is None


@pytest.mark.parametrize("window", [None, 5, 20])
def test_the_cache_of_keys_and_values(window):
    kinds = {"layer_types": ["full_attention", "full_attention"]}
    if window:
        kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": window}
        kinds |= {"use_sliding_window": True, "max_window_layers": 1}
    model = make_model(**kinds)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(6, 40, (3, 12)), past_key_values=cache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, 3, 12, 4) == real


def test_the_dtype_of_a_checkpoint(tmp_path):
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert dtype_of("auto", model.config) == torch.bfloat16
    assert dtype_of("float16", model.config) == dtype_of(torch.float16, model.config) == torch.float16
    assert dtype_of(None, model.config) == torch.float32
    silent = SimpleNamespace(dtype=None, get_text_config=lambda: SimpleNamespace())
    assert dtype_of("auto", silent, tmp_path) == torch.bfloat16


# Of a whole run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, size in (("student", 16), ("teacher", 24)):
        make_model(hidden_size=size).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def estimate(models, teacher="teacher", peft_config=None, **fields):
    args = OnPolicyDistillConfig(**trainer_config(models / "out", **fields))
    if isinstance(teacher, str):
        teacher = LocalTeacher(str(models / teacher))
    run = Run(
        args, str(models / "student"), teacher, False, {"train_dataset": make_prompts()}, peft_config=peft_config
    )
    return estimate_memory(run)


def test_parts_of_a_run(models):
    result = estimate(models, loss_chunk_mib=3, per_device_train_batch_size=2, steps_per_generation=3)
    student, teacher = make_model(), make_model(hidden_size=24)
    weights = sum(p.nbytes for p in student.parameters())
    parts = result.parts
    assert parts["student weights"] == parts["gradients"] == weights
    assert parts["optimizer states"] == 2 * weights + 4 * len(list(student.parameters()))
    assert parts["teacher weights"] == sum(p.nbytes for p in teacher.parameters())
    assert parts["logits of a chunk"] == 3 * 2**20
    # 19 characters of the longest prompt and 8 of a completion; two layers of one head of 8
    assert parts["cache of keys and values"] == 2 * 2 * 8 * (19 + 8) * 6 * 4
    assert parts["teacher hidden states"] == 2 * (19 + 8) * 24 * 4
    assert "LoRA adapter" not in parts and result.device_total is None
    assert any("19 tokens" in line for line in result.assumptions)


def test_the_peak_is_of_the_largest_phase(models):
    result = estimate(models, loss_chunk_mib=1)
    always = sum(size for name, size in result.parts.items() if result.phases[name] == "always")
    training = sum(size for name, size in result.parts.items() if result.phases[name] == "training")
    assert result.total == always + training < sum(result.parts.values())
    longer = estimate(models, loss_chunk_mib=1, max_completion_length=4096, gradient_checkpointing=True)
    assert longer.phases["cache of keys and values"] == "sampling"
    assert longer.total > result.total


def test_only_an_adapter_has_gradients_and_states(models):
    full, part = estimate(models), estimate(models, peft_config=lora())
    trained = part.parts["LoRA adapter"]
    assert part.parts["gradients"] == trained < full.parts["gradients"]
    assert part.parts["optimizer states"] == 2 * trained + 4 * len(part.student.trained)
    assert part.parts["student weights"] == full.parts["student weights"]


def test_activations_shrink_with_checkpointing_and_grow_with_tokens(models):
    name = "activations (estimate)"
    kept, dropped = (estimate(models, gradient_checkpointing=on).parts[name] for on in (False, True))
    assert dropped < kept
    twice = estimate(models, per_device_train_batch_size=8).parts[name]
    assert twice == 2 * kept


def test_half_precision(models):
    half = estimate(models, bf16=True)
    whole = estimate(models)
    name = "cache of keys and values"
    assert half.parts[name] * 2 == whole.parts[name]
    matrices = sum(p.numel() for p in make_model().parameters() if p.ndim > 1)
    assert half.parts["half-precision copies of autocast"] == 2 * matrices
    assert half.parts["student weights"] == whole.parts["student weights"]


def test_where_a_teacher_is(models):
    path = str(models / "teacher")
    plain = estimate(models).parts["teacher weights"]
    away = estimate(models, teacher=LocalTeacher(path, device="meta"))
    assert away.elsewhere == {"teacher weights on meta": plain} and "teacher weights" not in away.parts
    waiting = estimate(models, teacher=LocalTeacher(path, offload="model"))
    assert waiting.elsewhere == {"teacher weights in CPU memory": plain}
    assert waiting.phases["teacher weights while it answers"] == "scoring"
    layers = estimate(models, teacher=LocalTeacher(path, offload="layers"))
    layer = sum(p.nbytes for p in make_model(hidden_size=24).model.layers[0].parameters())
    assert layers.parts["teacher weights while it answers"] == layer
    assert layers.parts["teacher embeddings and head"] == plain - 2 * layer


def test_several_teachers_and_none(models):
    one, two = LocalTeacher(str(models / "teacher")), LocalTeacher(str(models / "student"))
    both = estimate(models, teacher=MixtureTeacher([one, two]))
    assert both.parts["teacher weights"] == sum(
        p.nbytes for size in (16, 24) for p in make_model(hidden_size=size).parameters()
    )
    assert not any("teacher" in name for name in estimate(models, teacher=None, num_generations=2).parts)
    follows = estimate(models, teacher=SelfTeacher(sync="ema"))
    assert follows.parts["the teacher's copy of the trained weights"] == follows.parts["student weights"]


def test_grpos_reference_is_a_second_student_unless_there_is_an_adapter(models):
    name = "GRPO's reference model"
    assert estimate(models, beta=0.1).parts[name] == estimate(models).parts["student weights"]
    assert name not in estimate(models, beta=0.1, peft_config=lora()).parts


@pytest.mark.parametrize(
    ("environment", "plugin", "fsdp", "expected"),
    [
        ({}, None, None, (1, 1, 1)),
        ({"ACCELERATE_USE_FSDP": "true"}, None, None, (4, 4, 4)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, None, None, (1, 1, 1)),
        ({}, None, ["full_shard"], (4, 4, 4)),
        ({}, 1, None, (1, 1, 4)),
        ({}, 2, None, (1, 4, 4)),
        ({}, 3, None, (4, 4, 4)),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None, None, (4, 4, 4)),
    ],
)
def test_sharding(monkeypatch, environment, plugin, fsdp, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = plugin and SimpleNamespace(zero_stage=plugin)
    shards = sharding_of(SimpleNamespace(world_size=4, deepspeed_plugin=plugin, fsdp=fsdp))
    assert (shards.weights, shards.gradients, shards.optimizer) == expected


def test_chunks_have_the_documented_size():
    cpu, cuda = SimpleNamespace(type="cpu"), SimpleNamespace(type="cuda")
    assert chunk_mib(SimpleNamespace(loss_chunk_mib=None, device=cpu)) == 128
    assert chunk_mib(SimpleNamespace(loss_chunk_mib=None, device=cuda)) == 512
    assert chunk_mib(SimpleNamespace(loss_chunk_mib=7, device=cuda)) == 7


def test_a_student_that_cannot_be_found(models):
    args = OnPolicyDistillConfig(**trainer_config(models / "out"))
    with pytest.raises(ValueError, match=r"model must have a config\.json"):
        estimate_memory(Run(args, str(models / "nothing"), None, False, {}))
