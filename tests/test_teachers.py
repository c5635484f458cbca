"""Teachers in this process: how they are loaded, that they stay as they are, and what their answers must look like."""

import copy
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from steps import (
    assert_same_gradient,
    build,
    check,
    full_logprobs,
    gradient_of,
    loss_mask,
    record,
    reverse_kl,
    sampled,
    student,
    take_step,
)
from tiny import CHARACTERS, VOCAB_SIZE, make_model, make_tokenizer, trainer_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_opd import AdapterTeacher, LocalTeacher, OnPolicyDistillConfig, OnPolicyDistillTrainer, TeacherScores
from trl_opd.kernels.projection import Head
from trl_opd.teachers import TeacherScoreError

TEACHER = {"hidden_size": 24, "seed": 1}
SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A teacher saved in float64, with its tokenizer."""
    path = tmp_path_factory.mktemp("teacher")
    make_model(**TEACHER).double().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_path_is_loaded_in_the_dtype_of_its_checkpoint(tmp_path, path):
    step = take_step(tmp_path, teacher=path)
    assert isinstance(step.trainer.teacher, LocalTeacher)
    assert step.trainer.teacher.model.dtype == torch.float64
    check(step, reverse_kl)


def test_init_kwargs_reach_from_pretrained(tmp_path, path, monkeypatch):
    seen = []
    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        seen.append(kwargs)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    trainer = build(
        tmp_path,
        teacher=path,
        teacher_model_init_kwargs={"dtype": "bfloat16", "revision": "v2", "use_safetensors": True},
    )
    assert trainer.teacher.model.dtype == torch.bfloat16
    (kwargs,) = seen
    assert kwargs["revision"] == "v2"
    assert kwargs["use_safetensors"] is True


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
def test_a_teacher_is_never_trained_nor_saved(tmp_path, credit):
    teacher = make_model(**TEACHER).train()
    teacher.config.attention_dropout = 0.5
    before = weights_of(teacher)
    trainer = build(tmp_path, teacher=teacher, max_steps=3, model=make_model(), **credit)
    record(trainer)
    trainer.train()
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, before[name]), name
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters()}
    trainer.save_model(str(tmp_path / "saved"))
    files = {name for name in os.listdir(tmp_path / "saved") if name.endswith((".safetensors", ".bin"))}
    assert files - {"training_args.bin"} == {"model.safetensors"}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.config.hidden_size == 16
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name]), name


def lora_student():
    """A student whose base and two adapters all differ."""
    torch.manual_seed(3)
    model = get_peft_model(student(), LoraConfig(**LORA), autocast_adapter_dtype=False)
    model.add_adapter("old", LoraConfig(**LORA), autocast_adapter_dtype=False)
    return model


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
@pytest.mark.parametrize("name", ["base", "adapter:old"])
def test_an_adapter_teacher_answers_as_a_separate_copy_would(tmp_path, name, credit):
    if name == "base":
        separate = student()
    else:
        other = lora_student()
        other.set_adapter("old")
        separate = other.merge_and_unload(adapter_names=["old"])
    ours = take_step(tmp_path / "ours", model=lora_student(), teacher=name, **credit)
    copied = take_step(tmp_path / "copy", model=lora_student(), teacher=separate, **credit)
    assert torch.equal(ours.batches[0]["completion_ids"], copied.batches[0]["completion_ids"])
    assert ours.loss.item() == pytest.approx(copied.loss.item(), rel=1e-6)
    assert ours.loss.item() != 0.0
    assert all(".default." in key for key in ours.gradient)
    assert_same_gradient(ours.gradient, copied.gradient)


def test_a_peft_model_may_be_the_teacher_of_another_student(tmp_path):
    step = take_step(tmp_path, teacher=lora_student())
    check(step, reverse_kl, teacher=lora_student().merge_and_unload())


@pytest.mark.parametrize("name", ["base", "adapter:old"])
def test_an_adapter_teacher_holds_no_weights_and_leaves_the_students_as_they_are(tmp_path, name):
    model = lora_student()
    count, before = sum(p.numel() for p in model.parameters()), weights_of(model)
    step = take_step(tmp_path, model=model, teacher=name)
    assert isinstance(step.trainer.teacher, AdapterTeacher)
    assert sum(p.numel() for p in step.trainer.model.parameters()) == count
    assert step.trainer.model.active_adapters == ["default"]
    assert step.trainer.model.training
    after = step.trainer.model.state_dict()
    changed = {key for key, weight in after.items() if not torch.equal(weight, before[key])}
    assert changed == {key for key in after if ".default." in key}


def test_a_new_adapter_starts_as_its_own_base(tmp_path):
    step = take_step(
        tmp_path,
        model=make_model(),
        teacher="base",
        arguments={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
    )
    assert step.loss.item() == 0.0
    assert isinstance(step.trainer.model, PeftModel)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter:new", r"names the adapter 'new', but the student has \['default', 'old'\]. Load it with"),
        ("adapter:default", "names the adapter 'default', which is the one being trained"),
    ],
)
def test_a_wrong_adapter_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, model=lora_student(), teacher=name)


def test_an_adapter_to_come_is_known_by_its_name(tmp_path):
    arguments = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    with pytest.raises(ValueError, match="names the adapter 'default', which is the one being trained"):
        build(tmp_path, teacher="adapter:default", arguments=arguments)
    with pytest.raises(ValueError, match=r"names the adapter 'old', but the student has \['default'\]"):
        build(tmp_path, teacher="adapter:old", arguments=arguments)


class ModelTeacher:
    """A person's own teacher: a model of which only log-probs are known."""

    def __init__(self, answer):
        self.model, self.answer, self.batches = make_model(**TEACHER).double(), answer, []

    def __call__(self, batch):
        self.batches.append(batch)
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logprobs = (logits[:, -batch.num_completion_tokens - 1 : -1] / batch.temperature).log_softmax(-1)
        return self.answer(batch, logprobs)


def sampled_logprobs(batch, logprobs):
    return logprobs.gather(-1, batch.completion_ids[..., None])[..., 0]


def every_token(batch, logprobs):
    values, ids = logprobs.topk(51, -1)
    return TeacherScores(topk_ids=ids, topk_logprobs=values)


def top_five(batch, logprobs):
    values, ids = logprobs.topk(5, -1)
    return TeacherScores(topk_ids=ids, topk_logprobs=values, sampled_logprobs=sampled_logprobs(batch, logprobs))


def test_a_callable_that_returns_a_tensor_is_a_teacher(tmp_path):
    fields = {"temperature": 0.8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **SAMPLED}
    teacher = ModelTeacher(sampled_logprobs)
    ours = take_step(tmp_path / "ours", teacher=teacher, **fields)
    local = take_step(tmp_path / "local", teacher=make_model(**TEACHER).double(), **fields)
    assert ours.loss.item() == pytest.approx(local.loss.item(), rel=1e-6)
    assert_same_gradient(ours.gradient, local.gradient)
    (batch,) = teacher.batches  # asked once for the whole generation batch
    assert batch.temperature == 0.8
    assert batch.support == "sampled"
    assert [example["prompt"] for example in batch.examples] == list(ours.trainer._logs["prompt"])


def test_the_top_k_of_a_callable_reaches_the_divergence(tmp_path):
    check(take_step(tmp_path / "all", teacher=ModelTeacher(every_token)), reverse_kl)

    def bucketed(s, t):
        ids = t.topk(5, -1).indices
        pair = []
        for x in (s, t):
            inside = x.gather(-1, ids)
            pair.append(torch.cat([inside, (1 - inside.exp().sum(-1, keepdim=True)).log()], -1))
        return reverse_kl(*pair)

    step = take_step(tmp_path / "five", teacher=ModelTeacher(top_five))
    check(step, bucketed)
    (inputs,) = step.batches
    with torch.no_grad():
        pair = [sampled(full_logprobs(m, inputs), inputs) for m in (student(), make_model(**TEACHER).double())]
    gap = (pair[1] - pair[0])[inputs["completion_mask"].bool()].mean()
    assert step.logs["distill/teacher_student_gap"] == pytest.approx(gap.item(), rel=1e-5)


def wrong(answer):
    def teacher(batch):
        return answer(*batch.completion_ids.shape)

    return teacher


WRONG = {
    "one row too few": (lambda b, t: torch.zeros(b - 1, t), "returned sampled_logprobs of shape"),
    "one token too many": (lambda b, t: torch.zeros(b, t + 1), "returned sampled_logprobs of shape"),
    "a vector": (lambda b, t: torch.zeros(b), "returned sampled_logprobs of shape"),
    "flat top k": (
        lambda b, t: TeacherScores(topk_ids=torch.zeros(b, t).long(), topk_logprobs=torch.zeros(b, t)),
        "returned topk_ids of shape",
    ),
    "hidden states outside the loss": (
        lambda b, t: TeacherScores(hidden_states=torch.zeros(b, t, 4), head=Head(torch.zeros(VOCAB_SIZE, 4))),
        "set scores_in_loss = True",
    ),
    "ids alone": (lambda b, t: TeacherScores(topk_ids=torch.arange(2).expand(b, t, 2)), "together"),
    "an id twice": (
        lambda b, t: TeacherScores(topk_ids=torch.full((b, t, 2), 7), topk_logprobs=torch.full((b, t, 2), -1.0)),
        "topk_ids with 7 twice for one token",
    ),
    "ids and log-probs that differ": (
        lambda b, t: TeacherScores(topk_ids=torch.zeros(b, t, 2).long(), topk_logprobs=torch.zeros(b, t, 3)),
        "topk_logprobs",
    ),
    "nothing": (lambda b, t: TeacherScores(), "must return scores, got none"),
    "hidden states alone": (lambda b, t: TeacherScores(hidden_states=torch.zeros(b, t, 3)), "head together"),
    "losses": (
        lambda b, t: TeacherScores(topk_ids=torch.arange(2).expand(b, t, 2), topk_logprobs=torch.ones(b, t, 2)),
        "the logarithm of a probability is at most 0",
    ),
    "a list": (lambda b, t: [[0.0] * t] * b, "must return TeacherScores or a tensor, got list"),
    "sampled log-probs for a divergence": (lambda b, t: torch.zeros(b, t), "credit='direct' cannot use"),
    "ids outside the vocabulary": (
        lambda b, t: TeacherScores(topk_ids=torch.full((b, t, 2), 51), topk_logprobs=torch.full((b, t, 2), -1.0)),
        "(up to 51) of which some token has none in the student's vocabulary of 51",
    ),
}


@pytest.mark.parametrize(("answer", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_answer_stops_the_run_before_a_step(tmp_path, answer, message):
    trainer = build(tmp_path, teacher=wrong(answer), model=make_model())
    before = weights_of(trainer.model)
    with pytest.raises(TeacherScoreError) as error:
        trainer.train()
    assert message in str(error.value)
    assert trainer.state.global_step == 0
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def padded_check(step, student_model, teacher_model):
    """The shared 51 tokens are compared, normalised among themselves."""
    (inputs,) = step.batches
    model = copy.deepcopy(student_model)
    pair = []
    for m in (model, teacher_model):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = m(input_ids=ids, attention_mask=mask).logits[:, inputs["prompt_ids"].shape[1] - 1 : -1, :51]
        pair.append(logits.log_softmax(-1))
    mask = loss_mask(inputs)
    loss = (reverse_kl(pair[0], pair[1].detach()) * mask).sum() / mask.sum()
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-7)
    assert_same_gradient(step.gradient, gradient_of(model, loss))
    assert not step.gradient["lm_head.weight"][51:].any()


@pytest.mark.parametrize(("student_size", "teacher_size"), [(64, 80), (80, 64), (51, 64), (64, 51)])
def test_padded_vocabularies_are_compared_on_their_real_tokens(tmp_path, student_size, teacher_size):
    teacher = make_model(**TEACHER, vocab_size=teacher_size).double()
    with torch.no_grad():
        teacher.lm_head.weight[51:] *= 50.0  # what padding rows hold must not matter
    step = take_step(
        tmp_path,
        model=student(vocab_size=student_size),
        teacher=teacher,
        arguments={"teacher_processing_class": make_tokenizer()},
    )
    assert step.batches[0]["completion_ids"].max() < 51
    padded_check(step, student(vocab_size=student_size), teacher)


def test_padded_vocabularies_work_with_the_policy_gradient(tmp_path):
    step = take_step(
        tmp_path,
        model=student(vocab_size=64),
        teacher=make_model(**TEACHER, vocab_size=80).double(),
        arguments={"teacher_processing_class": make_tokenizer()},
        **SAMPLED,
    )
    assert torch.isfinite(step.loss)
    assert any(gradient.any() for gradient in step.gradient.values())


def test_a_teacher_with_another_tokenizer_is_refused_naming_both(tmp_path, path):
    make_model(**TEACHER).save_pretrained(tmp_path / "other")
    make_tokenizer(CHARACTERS[::-1]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError) as error:
        OnPolicyDistillTrainer(
            model=path,
            teacher_model=str(tmp_path / "other"),
            args=OnPolicyDistillConfig(**trainer_config(tmp_path)),
            train_dataset=build(tmp_path, teacher=path).train_dataset,
        )
    assert path in str(error.value)
    assert str(tmp_path / "other") in str(error.value)


def test_a_teacher_saved_without_a_tokenizer_is_taken_at_its_size(tmp_path):
    make_model(**TEACHER).double().save_pretrained(tmp_path / "bare")
    check(take_step(tmp_path / "out", teacher=str(tmp_path / "bare")), reverse_kl)
