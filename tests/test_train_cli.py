"""`trl-opd train`: a YAML file, a local dataset, and models on disk, end to end."""

import json
import sys

import datasets
import pytest
import torch
import yaml
from tiny import make_model, make_tokenizer, trainer_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_opd import OnPolicyDistillTrainer
from trl_opd.cli import main
from trl_opd.train import load_reward, make_parser, parse_teacher


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


def test_each_sample_to_its_own_teacher(run, tmp_path):
    teachers = {"easy": str(tmp_path / "teacher"), "hard": str(tmp_path / "student")}
    rows = [{"prompt": text, "teacher": name} for text, name in (("abc", "easy"), ("x y z", "hard"))] * 8
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    trainer = run(teacher_model=teachers, max_steps=1)
    assert trainer.teacher.names == ["easy", "hard"]
    assert [member.name for member in trainer.teacher.members] == list(teachers.values())
    assert trainer.state.log_history[0]["distill/loss"] > 0


@pytest.mark.parametrize("form", ["yaml", "json", "argument"])
def test_teachers_by_name_in_every_form(tmp_path, form):
    teachers = {"easy": "path/one", "hard": "http://localhost:1"}
    given = teachers if form == "yaml" else json.dumps(teachers)
    fields = {"use_cpu": True, "bf16": False, "output_dir": str(tmp_path), "report_to": "none"}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(fields | ({} if form == "argument" else {"teacher_model": given}))
    )
    argv = ["--config", str(tmp_path / "run.yaml"), *(["--teacher_model", given] if form == "argument" else [])]
    script_args, *_ = make_parser().parse_args_and_config(argv)
    assert parse_teacher(script_args.teacher_model) == teachers


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
        (["--divergense", "forward_kl"], {}, "Did you mean 'divergence'"),
        (["--confg", "run.yaml"], {}, "Did you mean 'config'"),
        ([], {"divergense": "forward_kl"}, "Did you mean 'divergence'"),
        (["--divergence", "forward_k"], {}, "Did you mean 'forward_kl'"),
        ([], {"datasets": []}, "dataset_name or datasets must be given"),
        ([], {"reward_funcs": ["accurracy_reward"], "num_generations": 2}, "'accurracy_reward'"),
        ([], {"reward_funcs": ["no_such_module.reward"], "num_generations": 2}, "no_such_module"),
        ([], {"teacher_model": None}, "teacher_model or reward_funcs must be given"),
        ([], {"model_name_or_path": None}, "model_name_or_path must be given"),
        ([], {"model_name_or_path": "./nothing/here"}, "model must be a model's folder or a hub id"),
        ([], {"load_in_4bit": True}, "use_peft must be true with load_in_4bit"),
        ([], {"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "8 bit and 4 bit"),
        ([], {"recipe": "gdk"}, "recipe must be a known name"),
        ([], {"resume_from_checkpoint": "out/checkpoint-3"}, "resume_from_checkpoint must be a checkpoint's folder"),
    ],
)
def test_mistakes_are_named_without_a_traceback(run, arguments, more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **more)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and "trl-opd train: error: " in err
    assert "Traceback" not in err


def test_the_traceback_is_shown_on_demand(run):
    with pytest.raises(ValueError, match="model_name_or_path must be given"):
        run("--traceback", model_name_or_path=None)


def test_failures_in_training_are_not_taken_for_mistakes(run, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def fail(completions, **kwargs):\n    raise ValueError('in here')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="in here"):
        run(reward_funcs=["broken_rewards.fail"], num_generations=2)


def test_a_prepared_reward_is_as_trl_has_it():
    function = load_reward("get_soft_overlong_punishment")
    assert function(completion_ids=[[1] * 10, [1] * 1280]) == [0, -1]
    assert load_reward("think_format_reward").__name__ == "think_format_reward"


def test_a_local_file_by_its_name(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = run(datasets=[], dataset_name="data.jsonl", eval_strategy="steps", eval_steps=3)
    assert len(trainer.train_dataset) == 15 and len(trainer.eval_dataset) == 1
    out = capsys.readouterr().out
    assert "data.jsonl, train: 15 prompts; evaluation: 1 prompts" in out and "held out" in out
    assert any("eval_distill/loss" in line for line in trainer.state.log_history)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"load_in_4bit": True}, "Linear4bit"), ({"load_in_8bit": True}, "Linear8bitLt")],
)
def test_an_adapter_on_quantized_weights(run, tmp_path, fields, kind):
    trainer = run(use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"], max_steps=1, **fields)
    base = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert type(base).__name__ == kind
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_every_lora_flag_reaches_peft(run):
    trainer = run(
        use_peft=True,
        lora_r=3,
        lora_alpha=6,
        lora_dropout=0.25,
        lora_target_modules="q_proj",
        lora_modules_to_save=["lm_head"],
        use_rslora=True,
        use_dora=True,
        max_steps=1,
    )
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.25)
    assert config.use_rslora and config.use_dora and config.modules_to_save == ["lm_head"]
    assert config.target_modules == {"q_proj"}


def test_the_plan_is_printed_before_training(run, capsys):
    run(max_steps=1)
    out = capsys.readouterr().out
    assert out.index("Student ") < out.index("Teacher ") < out.index("Report ") < out.index("step 1/1")
    assert "All of them are trained" in out and "The model is in" in out
    assert all(len(line) <= 80 or "/" in line for line in out.split("\n"))


# Dry runs


@pytest.fixture
def loads(monkeypatch):
    """The paths from which weights are loaded."""
    loaded = []
    load = PreTrainedModel.from_pretrained.__func__

    def keep(cls, path, *args, **kwargs):
        loaded.append(path)
        return load(cls, path, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(keep))
    return loaded


def dry_run(tmp_path, run, capsys, *arguments, **more):
    """Exit code and output of `--dry-run` on the fixture's files."""
    with pytest.raises(IndexError):  # no trainer
        run("--dry-run", *arguments, **more)
    return capsys.readouterr()


def test_a_dry_run_loads_and_writes_nothing(run, tmp_path, capsys, loads):
    out = dry_run(tmp_path, run, capsys).out
    assert not loads and not (tmp_path / "out").exists()
    assert "18.8k" not in out and f"{make_model().num_parameters() / 1000:.3g}k parameters" in out
    assert "Checks" in out and "This was a dry run" in out and "Activations are an estimate" in out


def test_a_dry_run_without_a_teacher(run, tmp_path, capsys, loads):
    fields = {"teacher_model": None, "reward_funcs": ["think_format_reward"], "num_generations": 2}
    out = dry_run(tmp_path, run, capsys, **fields).out
    assert not loads and "GRPO (dapo) on think_format_reward" in out


@pytest.mark.parametrize(("strict", "code"), [("strict", 1), ("warn", 0), ("off", 0)])
def test_the_exit_code_of_a_dry_run_that_finds_something(run, tmp_path, capsys, strict, code):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises((IndexError, AssertionError)) as end:
        run("--dry-run", preflight=strict)
    assert end.type is (AssertionError if code else IndexError)
    out = capsys.readouterr().out
    assert ("[error]" in out or "[warning]" in out) is (strict != "off")


def test_a_model_that_cannot_be_sized_is_trained_all_the_same(run, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise AttributeError("no such thing")

    monkeypatch.setattr("trl_opd.train.estimate_memory", fail)
    assert run(max_steps=1).state.global_step == 1
    assert "not estimated (AttributeError: no such thing)" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_finds_mistakes_too(run, tmp_path, capsys, loads):
    with pytest.raises(SystemExit) as stop:
        run("--dry-run", datasets=[], dataset_name=str(tmp_path / "dat.jsonl"))
    assert stop.value.code == 2 and "Did you mean 'data.jsonl'" in capsys.readouterr().err and not loads


def test_help_is_short(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("teacher_model", "recipe", "use_peft", "--help-all"):
        assert name in out
