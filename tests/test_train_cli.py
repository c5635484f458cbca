"""`trl-opd train`: a YAML file, a local dataset, and models on disk, end to end."""

import json
import sys

import datasets
import pytest
import torch
import yaml
from tiny import make_model, make_tokenizer, trainer_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opd import OnPolicyDistillTrainer
from trl_opd.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Files of a run, and a function that starts it with more YAML fields and arguments."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, seed in (("student", 0), ("teacher", 1)):
        make_model(hidden_size=16 + 8 * seed, seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": text, "answer": text[::-1]} for text in ("abc", "hello", "x y z", "42")] * 4
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    fields = {
        **trainer_config(tmp_path / "out"),
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model": str(tmp_path / "teacher"),
        "datasets": [{"path": "json", "data_files": str(tmp_path / "data.jsonl")}],
        "dtype": "float32",
    }
    trainers = []
    train = OnPolicyDistillTrainer.train

    def keep(self, *args, **kwargs):
        trainers.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(OnPolicyDistillTrainer, "train", keep)

    def run(*arguments, **more):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**fields, **more}))
        assert main(["train", "--config", str(tmp_path / "run.yaml"), *arguments]) == 0
        return trainers[-1]

    return run


def test_a_yaml_trains_and_saves_a_student_that_loads(run, tmp_path):
    trainer = run(divergence="generalized_jsd", divergence_kwargs={"beta": 0.3})
    assert trainer.state.global_step == 3
    assert trainer.args.divergence_kwargs == {"beta": 0.3}
    assert trainer.teacher.name == str(tmp_path / "teacher")
    assert trainer.state.log_history[0]["distill/loss"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 51


def test_the_command_line_wins_over_the_yaml(run):
    trainer = run(
        "--max_steps", "1", "--divergence", "forward_kl", "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}'
    )
    assert trainer.state.global_step == 1
    assert trainer.args.divergence == "forward_kl"
    assert trainer.teacher.model.dtype == torch.bfloat16


def test_lora_with_its_base_as_the_teacher(run, tmp_path):
    trainer = run(use_peft=True, lora_r=4, lora_target_modules="all-linear", teacher_model="base", max_steps=2)
    assert trainer.teacher.name == "base"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_rewards_are_named_and_mixed_in(run, tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_cli.py").write_text(
        "def answer(completions, answer, **kwargs):\n"
        "    return [float(a in c) + len(c) for c, a in zip(completions, answer)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    trainer = run(reward_funcs=["my_rewards_of_cli.answer"], num_generations=2, max_steps=1)
    assert "rewards/answer/mean" in trainer.state.log_history[0]
    assert "distill/loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("form", ["yaml", "json", "argument"])
def test_each_sample_to_its_own_teacher(run, tmp_path, form):
    teachers = {"easy": str(tmp_path / "teacher"), "hard": str(tmp_path / "student")}
    rows = [{"prompt": text, "teacher": name} for text, name in (("abc", "easy"), ("x y z", "hard"))] * 8
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    if form == "argument":
        trainer = run("--teacher_model", json.dumps(teachers))
    else:
        trainer = run(teacher_model=teachers if form == "yaml" else json.dumps(teachers))
    assert trainer.teacher.names == ["easy", "hard"]
    assert [member.name for member in trainer.teacher.members] == list(teachers.values())
    assert trainer.state.log_history[0]["distill/loss"] > 0


def test_the_student_as_its_own_teacher_with_a_view_by_its_import_path(run, tmp_path, monkeypatch):
    (tmp_path / "my_views.py").write_text(
        "def reverse(example, completion, reward, group):\n    return example['answer']"
    )
    monkeypatch.chdir(tmp_path)
    trainer = run(teacher_model="self", teacher_view="my_views.reverse", teacher_sync="ema")
    assert trainer.teacher.sync == "ema"
    assert trainer.state.log_history[0]["distill/reverse_kl"] > 0


def test_evaluation_uses_the_test_split(run):
    trainer = run(test_split_size=0.25, eval_strategy="steps", eval_steps=2, max_steps=2)
    assert len(trainer.eval_dataset) == 4
    assert any("eval_distill/loss" in line for line in trainer.state.log_history)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["--divergense", "forward_kl"], {}, "divergense"),
        ([], {"divergense": "forward_kl"}, "divergense"),
        (["--divergence", "forward_k"], {}, "Did you mean 'forward_kl'"),
        ([], {"datasets": []}, "dataset_name or datasets must be given"),
        ([], {"reward_funcs": ["accurracy_reward"], "num_generations": 2}, "'accurracy_reward'"),
        ([], {"reward_funcs": ["no_such_module.reward"], "num_generations": 2}, "no_such_module"),
        ([], {"teacher_model": None}, "teacher_model or reward_funcs must be given"),
        ([], {"model_name_or_path": None}, "model_name_or_path must be given"),
    ],
)
def test_mistakes_are_named(run, arguments, more, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        run(*arguments, **more)
    assert message in str(error.value) + capsys.readouterr().err


def test_help_lists_the_fields_of_the_distillation(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in ("--teacher_model", "--divergence", "--support_tail", "--special_token_masking", "--num_generations"):
        assert name in out
