"""A teacher's answers stay what they are with its own micro-batches, its own positions, and weights that wait."""

import pytest
import torch
from datasets import Dataset
from memory_cases import logprobs, make_batch, prepared
from steps import assert_same_gradient, build, record, student
from test_trainer_features import make_processor, make_vlm
from tiny import make_model, make_prompts
from torch.multiprocessing.reductions import StorageWeakRef

from trl_opd import LocalTeacher
from trl_opd.teachers import memory
from trl_opd.teachers.memory import WaitingWeights, weight_bytes

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


# Weights that wait in CPU memory


class Device:
    """Another memory: weights must be copied there, and are seen until nothing holds them any more."""

    def __init__(self):
        self.copies: list[tuple[StorageWeakRef, int]] = []
        self.most = 0

    def copy(self, weights: WaitingWeights, part: torch.Tensor) -> torch.Tensor:
        copied = part.clone()
        self.copies.append((StorageWeakRef(copied.untyped_storage()), copied.nbytes))
        self.most = max(self.most, self.bytes)
        return copied

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.copies if not storage.expired())


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setattr(WaitingWeights, "_to_device", lambda self, part: found.copy(self, part))
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("offload", ["model", "layers"])
def test_waiting_weights_answer_as_resident_ones_and_leave(device, offload, tied):
    batch = make_batch(True)
    model = make_model(hidden_size=24, seed=1, tie_word_embeddings=tied)
    expected = prepared(LocalTeacher(model))(batch)
    total, head = weight_bytes(model), model.lm_head.weight.nbytes
    layer, outside = weight_bytes(model.model.layers[0]), weight_bytes(model.model.norm)
    teacher = prepared(LocalTeacher(model, offload=offload))
    for _ in range(2):
        answer = teacher(batch)
        assert torch.equal(answer.hidden_states, expected.hidden_states)
        assert torch.equal(answer.head.weight, expected.head.weight)
        assert answer.head.weight is model.lm_head.weight
        assert device.bytes == 0
    buffers = sum(b.nbytes for b in model.buffers())
    expected_most = layer if offload == "layers" else total - head - buffers
    assert device.most == expected_most
    assert device.most == (layer if offload == "layers" else 2 * layer + outside + (0 if tied else head))
    assert weight_bytes(model) == total
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_shared_layer_travels_once_and_stays_shared(device):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    expected = prepared(LocalTeacher(model))(make_batch()).hidden_states
    teacher = prepared(LocalTeacher(model, offload="model"))
    assert torch.equal(teacher(make_batch()).hidden_states, expected)
    assert model.model.layers[1].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert device.most == weight_bytes(model) - model.lm_head.weight.nbytes - sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("offload", ["model", "layers"])
def test_weights_leave_when_a_forward_fails(device, offload):
    model = make_model()
    teacher = prepared(LocalTeacher(model, offload=offload))
    good = teacher(make_batch()).hidden_states

    def fail(*args):
        raise RuntimeError("broken")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        teacher(make_batch())
    handle.remove()
    assert device.bytes == 0
    assert torch.equal(teacher(make_batch()).hidden_states, good)


@pytest.mark.parametrize("request_", [{}, {"support": "sampled"}], ids=["hidden states", "sampled"])
@pytest.mark.parametrize(("offload", "size", "trips"), [("model", None, 1), ("layers", None, 3), ("layers", 5, 1)])
def test_a_generation_batch_pays_for_the_journey_once(device, offload, size, trips, request_):
    batch = make_batch(True, **request_)
    base = prepared(LocalTeacher(make_model(hidden_size=24, seed=1)))
    model = make_model(hidden_size=24, seed=1)
    teacher = prepared(LocalTeacher(model, offload=offload, batch_size=size))
    pending = teacher.submit(batch)
    travelled = list(model.model.layers.parameters())
    if offload == "model":
        travelled = [p for p in model.parameters() if p is not model.lm_head.weight]
    assert len(device.copies) == trips * len(travelled)
    for rows in (torch.tensor([3, 0]), torch.tensor([4, 2, 1]), torch.tensor([3, 0])):
        part = batch.select(rows)
        expected, answer = base(part), pending.collect(rows, part)
        if request_:
            mask = part.completion_mask
            torch.testing.assert_close(answer.sampled_logprobs[mask], expected.sampled_logprobs[mask], **TOLERANCE)
            continue
        assert answer.hidden_states.shape == expected.hidden_states.shape
        torch.testing.assert_close(logprobs(answer, part), logprobs(expected, part), **TOLERANCE)
    assert len(device.copies) == trips * len(travelled)


def test_only_a_teacher_that_waits_is_asked_early():
    assert not hasattr(LocalTeacher(make_model(), batch_size=2), "submit")
    assert not hasattr(LocalTeacher(make_model()), "submit")


def test_a_model_that_does_not_name_its_layers_cannot_send_them(monkeypatch):
    model = make_model()
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(ValueError, match="must be 'model' for a Qwen3ForCausalLM, got 'layers'"):
        prepared(LocalTeacher(model, offload="layers"))


def test_a_peft_teacher_may_wait(device):
    from peft import LoraConfig, get_peft_model

    def build():
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(make_model(), lora)

    expected = prepared(LocalTeacher(build()))(make_batch()).hidden_states
    for offload in ("model", "layers"):
        answer = prepared(LocalTeacher(build(), offload=offload))(make_batch()).hidden_states
        assert torch.equal(answer, expected)
        assert device.bytes == 0
        assert len(device.copies) > 0


# Another device


def test_the_head_is_copied_to_the_students_device_once():
    teacher = prepared(LocalTeacher(make_model(), device="cpu"))
    teacher._student_device = torch.device("meta")
    heads = [teacher(make_batch()).head for _ in range(2)]
    assert heads[0] is heads[1]
    assert heads[0].weight.device.type == "meta"
    assert teacher.model.lm_head.weight.device.type == "cpu"


# Training


TEACHER = {"hidden_size": 24, "seed": 1}
VARIANTS = {
    "batch size": {"teacher_batch_size": 1},
    "model": {"teacher_offload": "model"},
    "model in large pieces": {"teacher_offload": "model", "teacher_batch_size": 8},
    "layers": {"teacher_offload": "layers", "teacher_batch_size": 3},
    "device": {"teacher_device": "cpu"},
}
SAMPLED = {"credit": "policy_gradient", "support": "sampled"}


def train(output_dir, credit, **fields):
    """Four steps of two micro-batches: two generation batches, each trained on twice."""
    trainer = build(
        output_dir,
        teacher=make_model(**TEACHER).double(),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_iterations=2,
        **credit,
        **fields,
    )
    step = record(trainer)
    trainer.train()
    return step


@pytest.fixture(scope="module", params=[{}, SAMPLED], ids=["direct", "policy gradient"])
def baseline(request, tmp_path_factory):
    return request.param, train(tmp_path_factory.mktemp("base"), request.param)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_training_is_the_same_however_the_teacher_fits(tmp_path, device, baseline, fields):
    credit, base = baseline
    step = train(tmp_path, credit, **fields)
    assert torch.stack(step.losses) == pytest.approx(torch.stack(base.losses), rel=1e-5, abs=1e-7)
    assert_same_gradient(step.gradient, base.gradient, tolerance=1e-5)
    after = base.trainer.model.state_dict()
    for name, weight in step.trainer.model.state_dict().items():
        torch.testing.assert_close(weight, after[name], rtol=1e-4, atol=1e-5)
    start = student().state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in after.items())
    assert bool(device.copies) == ("teacher_offload" in fields)
    assert device.bytes == 0


def test_evaluation_with_a_teacher_that_waits(tmp_path, device):
    losses = {}
    for offload in (None, "model"):
        trainer = build(
            tmp_path / str(offload),
            teacher=make_model(**TEACHER).double(),
            teacher_offload=offload,
            arguments={"eval_dataset": make_prompts(4)},
            per_device_eval_batch_size=2,
        )
        torch.manual_seed(0)
        losses[offload] = trainer.evaluate()["eval_loss"]
    assert losses["model"] == pytest.approx(losses[None], rel=1e-5)
    assert device.copies


@pytest.mark.parametrize("images", [True, False], ids=["images", "text alone"])
@pytest.mark.parametrize("offload", ["model", "layers"])
def test_a_vision_language_teacher_may_wait(tmp_path, device, offload, images):
    image = pytest.importorskip("PIL.Image")
    rows = {"prompt": [[{"role": "user", "content": text}] for text in ("what", "is", "this", "one")]}
    if images:
        rows["image"] = [image.new("RGB", (28, 28), (60 * i, 10, 200 - 50 * i)) for i in range(4)]
    losses, asked = {}, []
    for where in (None, offload):
        trainer = build(
            tmp_path / str(where),
            model=make_vlm(),
            teacher=make_vlm(hidden_size=24, seed=1),
            teacher_offload=where,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            arguments={"train_dataset": Dataset.from_dict(rows), "processing_class": make_processor()},
        )
        if where is not None:
            submit = trainer.teacher.submit
            trainer.teacher.submit = lambda batch, submit=submit: asked.append(submit(batch)) or asked[-1]
        step = record(trainer)
        trainer.train()
        losses[where] = torch.stack(step.losses)
    assert losses[offload] == pytest.approx(losses[None], rel=1e-6)
    assert [pending is None for pending in asked] == [images]  # the generation batch has no images to show
    assert device.copies and device.bytes == 0


# What does not fit together


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"quantization": "int4"}, r"teacher_quantization must be one of .*, got 'int4'"),
        ({"offload": "layer"}, r"teacher_offload must be one of .*, got 'layer'.*'layers'"),
        ({"batch_size": 0}, "teacher_batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": True}, "teacher_batch_size must be a whole number of at least 1, got True"),
        ({"device": "gpu7"}, "teacher_device must be a device's name, got 'gpu7'"),
        ({"device": "cuda:99"}, "teacher_device must be a device of this machine, got 'cuda:99'"),
        ({"device": "cpu", "offload": "model"}, "teacher_offload must be unset with teacher_device='cpu'"),
        ({"offload": "model", "device_map": "auto"}, "must not hold device_map"),
        ({"device": "cpu", "device_map": "auto"}, "must not hold device_map"),
        ({"quantization": "int8", "quantization_config": object()}, "say the same thing twice"),
        ({"quantization": "bnb_8bit", "offload": "model"}, "Set teacher_quantization='int8' to have both"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LocalTeacher("somewhere", **kwargs)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs torchao, which is not installed.*Install 'trl-opd\[quant\]'"):
        LocalTeacher("somewhere", quantization="int8")


def test_an_instantiated_model_is_not_quantized():
    with pytest.raises(ValueError, match="must be unset when teacher_model is an instantiated model"):
        LocalTeacher(make_model(), quantization="int8")


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
@pytest.mark.parametrize("kwargs", [{"quantization": "int8"}, {"offload": "layers"}, {"device": "cpu"}])
def test_sharded_weights_are_placed_by_who_shards_them(kwargs, engine):
    flags = {"is_fsdp_enabled": engine == "FSDP", "is_deepspeed_enabled": engine == "DeepSpeed"}
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"teacher_{name} must be unset under {engine}"):
        prepared(LocalTeacher("somewhere", **kwargs), **flags)
