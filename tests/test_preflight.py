"""Bad arguments of the trainer stop it before any weight is loaded, with a message that says what to do."""

import copy
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CHARACTERS, make_model, make_prompts, make_tokenizer, trainer_config
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.kernels import triton_backend


class WeightsLoadedError(Exception):
    """The checks let the arguments pass."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Paths of a student, a teacher of the same tokenizer, and a teacher of another one."""
    root = tmp_path_factory.mktemp("models")
    for name, characters in (("student", CHARACTERS), ("teacher", CHARACTERS), ("other", CHARACTERS[::-1])):
        make_model().save_pretrained(root / name)
        make_tokenizer(characters).save_pretrained(root / name)
    make_model(vocab_size=4096).save_pretrained(root / "large")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def build(saved, tmp_path, monkeypatch):
    """Builds a trainer until the moment when weights would be loaded."""

    def loaded(*args, **kwargs):
        raise WeightsLoadedError

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    monkeypatch.setattr(GRPOTrainer, "__init__", loaded)

    def build(fields: dict[str, Any] | None = None, **kwargs: Any) -> OnPolicyDistillTrainer:
        args = OnPolicyDistillConfig(**trainer_config(tmp_path, **(fields or {})))
        defaults = {
            "model": str(saved / "student"),
            "teacher_model": str(saved / "teacher"),
            "args": args,
            "train_dataset": make_prompts(),
        }
        return OnPolicyDistillTrainer(**{**defaults, **kwargs})

    return build


def error_of(build, fields=None, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        build(fields, **kwargs)
    return str(error.value)


def reward(completions, **kwargs):
    return [0.0] * len(completions)


def test_good_arguments_reach_the_weights(build):
    with pytest.raises(WeightsLoadedError):
        build()
    with pytest.raises(WeightsLoadedError):
        build({"num_generations": 2}, reward_funcs=reward)


def test_a_teacher_or_a_reward_is_required(build):
    for rewards in (None, []):
        message = error_of(build, teacher_model=None, reward_funcs=rewards)
        assert "teacher_model or reward_funcs must be given, got neither" in message
        assert "Pass teacher_model= to distil" in message


def test_rewards_beside_a_teacher_need_two_completions(build):
    message = error_of(build, reward_funcs=reward)
    assert "num_generations must be at least 2 with rewards, got 1" in message
    assert "reward_coef=0" in message
    with pytest.raises(WeightsLoadedError):
        build({"reward_coef": 0.0}, reward_funcs=reward)


@pytest.mark.parametrize("wrong", ["missing", "no/such/folder", "org/missing", "./missing", "empty"])
def test_a_teacher_path_that_is_no_model_is_refused(build, saved, monkeypatch, wrong):
    monkeypatch.chdir(saved)
    message = error_of(build, teacher_model=wrong)
    assert "teacher_model must be a model's folder or a hub id" in message
    assert repr(wrong) in message
    assert "Check the path" in message


def test_an_absolute_teacher_path_that_does_not_exist_is_refused(build, saved):
    message = error_of(build, teacher_model=str(saved / "gone"))
    assert "teacher_model must be a model's folder" in message
    assert "does not exist" in message


def test_a_student_path_that_does_not_exist_is_refused(build, saved):
    message = error_of(build, model=str(saved / "gone"))
    assert "model must be a model's folder or a hub id" in message
    assert "does not exist" in message


@pytest.mark.parametrize(
    ("fields", "teacher", "message"),
    [
        ({"teacher_sync": "ema"}, "teacher", "teacher_sync must be 'frozen' unless teacher_model='self', got 'ema'"),
        ({"teacher_offload": "layers"}, "self", "teacher_offload must be unset"),
        ({"teacher_batch_size": 2}, lambda batch: None, "teacher_batch_size must be unset"),
    ],
)
def test_fields_of_another_kind_of_teacher_are_refused(build, saved, fields, teacher, message):
    teacher = str(saved / teacher) if teacher == "teacher" else teacher
    assert message in error_of(build, fields, teacher_model=teacher)


@pytest.mark.parametrize("teachers", [{"a": "self"}, {"a": lambda batch: None, "b": "self"}])
def test_fields_of_one_of_several_teachers_are_accepted(build, teachers):
    data = make_prompts().add_column("teacher", ["a"] * 16)
    with pytest.raises(WeightsLoadedError):
        build({"teacher_sync": "every_n", "teacher_sync_steps": 5}, teacher_model=teachers, train_dataset=data)


def test_a_list_of_teachers_that_are_not_servers_is_refused_with_the_way_out(build):
    message = error_of(build, teacher_model=["http://localhost:8000", "some/model"])
    assert "teacher_model as a list must hold URLs" in message
    assert "'some/model'" in message
    assert "MixtureTeacher" in message


def test_a_teacher_that_is_none_of_the_kinds_is_refused(build):
    with pytest.raises(TypeError, match=r"teacher_model must be a path.*got int"):
        build(teacher_model=3)


def test_a_teacher_of_another_tokenizer_is_refused_naming_both(build, saved):
    message = error_of(build, teacher_model=str(saved / "other"))
    assert str(saved / "student") in message
    assert str(saved / "other") in message
    assert "disagree: id 6 is 'a' to the student and '\\n' to the teacher" in message
    assert "GOLDTrainer" in message


def test_a_teacher_of_another_tokenizer_is_refused_as_an_instance(build):
    teacher = make_model(seed=1)
    message = error_of(build, teacher_model=teacher, teacher_processing_class=make_tokenizer(CHARACTERS[::-1]))
    assert "id 6 is 'a' to the student" in message


def test_a_much_larger_head_without_a_tokenizer_is_refused_naming_both_sizes(build, saved):
    message = error_of(build, teacher_model=str(saved / "large"))
    assert "vocab_size 51" in message
    assert "4096" in message
    assert "teacher_processing_class=" in message


@pytest.mark.parametrize("wrap", [list, lambda d: DatasetDict({"test": d}), lambda d: d.to_iterable_dataset()])
def test_a_missing_prompt_column_is_refused(build, wrap):
    rows = Dataset.from_dict({"question": ["a", "b"], "answer": ["c", "d"]})
    if wrap is not list:
        message = error_of(build, eval_dataset=wrap(rows))
        assert "eval_dataset" in message
    message = error_of(build, train_dataset=rows)
    assert "train_dataset must have a 'prompt' column, got ['question', 'answer']" in message
    assert "rename_column" in message


def test_a_stream_without_known_columns_is_let_through(build):
    with pytest.raises(WeightsLoadedError):
        build(train_dataset=IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])))


@pytest.mark.filterwarnings("ignore")
def test_prompt_learning_is_refused(build):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    message = error_of(build, peft_config=config)
    assert "peft_config must adapt weights, got PromptTuningConfig" in message
    assert "LoraConfig" in message
    message = error_of(build, model=get_peft_model(make_model(), config))
    assert "got PromptTuningConfig" in message


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "lm_head", r".*(q_proj|lm_head)", ["base_model.lm_head"]])
def test_lora_on_the_head_is_refused(build, targets):
    message = error_of(build, peft_config=LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    assert "peft_config must not target the language-model head" in message
    assert "lm_head" in message
    assert "modules_to_save=['lm_head']" in message


def test_any_adapter_on_the_head_is_refused(build):
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    assert "must not target the language-model head" in error_of(build, peft_config=config)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*\.(q|v)_proj"])
def test_lora_elsewhere_is_let_through(build, targets):
    with pytest.raises(WeightsLoadedError):
        build(peft_config=LoraConfig(target_modules=targets))


@pytest.mark.parametrize("fields", [{"beta": 0.1}, {"entropy_coef": 0.01}, {"use_adaptive_entropy": True}])
def test_terms_that_share_the_projection_need_one_temperature_and_a_backend_with_logprobs(build, fields):
    message = error_of(build, {**fields, "distill_temperature": 0.5})
    assert "distill_temperature must equal temperature (1.0)" in message
    assert "got 0.5" in message
    message = error_of(build, {**fields, "loss_backend": "liger"})
    assert "loss_backend must be 'auto' or 'torch'" in message
    assert "got 'liger'" in message


def test_a_backend_that_cannot_run_here_is_refused_before_the_weights_load(build, monkeypatch):
    with pytest.raises(WeightsLoadedError):
        build({"loss_backend": "triton"})
    monkeypatch.setattr(triton_backend, "_INTERPRET", False)
    message = error_of(build, {"loss_backend": "triton"})
    assert "loss_backend='triton' cannot be used: it needs a CUDA device, and these tensors are on cpu" in message


def test_rewards_need_one_temperature_and_a_backend_with_logprobs(build):
    fields = {"num_generations": 2}
    assert "distill_temperature" in error_of(build, {**fields, "distill_temperature": 0.5}, reward_funcs=reward)
    assert "loss_backend" in error_of(build, {**fields, "loss_backend": "liger"}, reward_funcs=reward)


def test_a_masked_token_that_is_no_token_is_refused_with_the_nearest(build):
    message = error_of(build, {"special_token_masking": ["<|im_ends|>"]})
    assert "special_token_masking must hold single tokens" in message
    assert "'<|im_ends|>'" in message
    assert "Did you mean '<|im_end|>'?" in message


@pytest.mark.parametrize("masked", [51, -1, "999"])
def test_a_masked_id_outside_the_vocabulary_is_refused(build, masked):
    message = error_of(build, {"special_token_masking": [masked]})
    assert "special_token_masking must hold single tokens" in message
    assert str(masked) in message


def test_the_base_of_a_student_without_an_adapter_is_refused(build):
    for teacher in ("base", "adapter:old"):
        message = error_of(build, teacher_model=teacher)
        assert f"teacher_model={teacher!r} needs a PEFT student" in message
        assert "Pass peft_config=" in message


def test_an_adapter_without_a_name_is_refused(build):
    assert "must name an adapter after 'adapter:'" in error_of(build, teacher_model="adapter:")


def test_init_kwargs_for_an_instance_are_refused(build):
    message = error_of(build, {"teacher_model_init_kwargs": {"dtype": "float32"}}, teacher_model=make_model(seed=1))
    assert "teacher_model_init_kwargs must be unset" in message


def test_a_plain_config_without_completions_is_refused_before_the_weights(build, tmp_path):
    args = GRPOConfig(**trainer_config(tmp_path, max_completion_length=0, num_generations=2))
    assert "max_completion_length must be at least 1, got 0" in error_of(build, args=args)


@pytest.mark.parametrize("lora", [False, True])
def test_a_copy_of_a_trained_model_is_refused_because_it_samples_with_the_original(tmp_path, lora):
    args = OnPolicyDistillConfig(**trainer_config(tmp_path))
    arguments = {"args": args, "train_dataset": make_prompts(), "processing_class": make_tokenizer()}
    peft = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    trainer = OnPolicyDistillTrainer(make_model(), make_model(24, seed=1), **arguments, **peft)
    OnPolicyDistillTrainer(trainer.model, make_model(24, seed=1), **arguments)  # itself, again
    with pytest.raises(ValueError, match="copy of a model that a trainer had patched"):
        OnPolicyDistillTrainer(copy.deepcopy(trainer.model), make_model(24, seed=1), **arguments)
