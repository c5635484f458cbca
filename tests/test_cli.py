"""The command line for people: helps in 80 columns, nearest names, exit codes, files as people write them."""

import argparse
import json
import re
import subprocess
import sys

import pytest
from trl import DatasetMixtureConfig, ModelConfig

import trl_opd
from trl_opd.all_fields import all_fields
from trl_opd.cli import COMMANDS, fit, main
from trl_opd.config import OnPolicyDistillConfig
from trl_opd.config_file import coerce, near_file, read_config
from trl_opd.progress import one_line
from trl_opd.score import ScoreArguments
from trl_opd.train import OnPolicyDistillScriptArguments, make_parser

CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--output_dir", "out"]


def run(capsys, *argv):
    """Exit code and what was printed."""
    try:
        code = main(list(argv))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Help


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert code == 0 and not err
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE), name
    assert "Exit codes" in out and "trl-opd train --config run.yaml" in out


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--help-all"],
        ["recipes", "--help"],
        ["demo", "--help"],
        ["bench", "--help"],
        ["bench", "head", "--help"],
        ["bench", "step", "--help"],
        ["bench", "methods", "--help"],
        ["score", "--help"],
        ["doctor", "--help"],
        ["report", "--help"],
    ],
)
def test_helps_fit_80_columns(capsys, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, *argv)
    assert code == 0 and out.count("\n") > 5
    assert [line for line in out.split("\n") if len(line) > 80] == []


def test_the_help_of_train_explains_what_newcomers_need(capsys):
    _, out, _ = run(capsys, "train", "--help")
    fields = set(make_parser()._fields)
    named = re.findall(r"^  (\w+(?:, \w+)*)  ", out.partition("The fields to know")[2], re.MULTILINE)
    known = [name for names in named for name in names.split(", ")]
    assert {"model_name_or_path", "teacher_model", "dataset_name", "output_dir", "recipe", "learning_rate"} <= set(
        known
    )
    assert set(known) <= fields
    for option in ("--config", "--dry-run", "--resume", "--traceback", "--help-all"):
        assert option in out
    assert out.count("\n") < 70


def test_the_help_of_score_names_its_fields(capsys):
    _, out, _ = run(capsys, "score", "--help")
    for name in ScoreArguments.__dataclass_fields__:
        assert f"--{name}" in out, name


def test_text_is_fitted_to_the_terminal():
    text = (
        "usage: x [-h]\n         [--long]\n\nOne sentence of prose that\ngoes on.\n\n    code "
        + "w " * 20
        + "\n\nend:\n  -h\n"
    )
    assert fit(text, 30).split("\n") == [
        *["usage: x [-h]", "         [--long]", "", "One sentence of prose that", "goes on.", ""],
        *["    code w w w w w w w w w w w", "        w w w w w w w w w", "", "end:", "  -h", "", ""],
    ]


def test_help_all_has_every_field_once_and_in_its_group():
    text = all_fields(make_parser(), OnPolicyDistillScriptArguments)
    shown = re.findall(r"^  --(\w+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) and set(shown) == set(make_parser()._fields)
    groups = {}
    for line in text.split("\n"):
        if re.match(r"\w", line):
            title = line
        elif line.startswith("  --"):
            groups[line[4:]] = title
    assert groups["divergence"] == "Distillation: the objective"
    assert groups["teacher_offload"] == "Distillation: the teacher's memory (teachers in this process)"
    assert groups["use_vllm"].startswith("TRL (GRPO): generation acceleration powered by vLLM")
    assert groups["learning_rate"].startswith("TRL") or "Learning Rate" in groups["learning_rate"]
    assert groups["lora_r"] == "Student and adapter"
    assert groups["dry_run"] == "This command" and groups["reward_funcs"] == "Data and rewards"
    assert "Other" not in groups.values()


def test_help_is_there_without_torch():
    script = (
        "import sys\nfrom trl_opd.cli import main\n"
        "codes = [main(a) for a in ([], ['--help'], ['--version'], ['train', '--help'], ['trian'])]\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(0 if codes == [0, 0, 0, 0, 2] and not heavy else f'{codes} {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "trl_opd", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"trl-opd {trl_opd.__version__}\n")


@pytest.mark.parametrize(("typo", "meant"), [("trian", "train"), ("recipe", "recipes"), ("docter", "doctor")])
def test_a_mistyped_command(capsys, typo, meant):
    code, out, err = run(capsys, typo)
    assert code == 2 and not out and f"Did you mean '{meant}'" in err and "Commands: demo" in err


def test_what_demo_does_not_know(capsys):
    code, _, err = run(capsys, "demo", "--fats")
    assert code == 2 and "--fats" in err


# Fields


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--divergense", "x"], ["no field 'divergense'", "Did you mean 'divergence'"]),
        (["--learning-rat", "1"], ["no field 'learning_rat'", "Did you mean 'learning_rate'"]),
        (["--max_step=3"], ["no field 'max_step'", "Did you mean 'max_steps'"]),
        (["--max_steps", "ten"], ["--max_steps", "'ten'"]),
        (["--dtype", "float33"], ["--dtype", "float33"]),
        (["--resume", "maybe"], ["--resume", "maybe"]),
        (["run.yaml"], ["Did you mean --config run.yaml"]),
        (["--config"], ["must be followed by"]),
        (["--config", "nowhere.yaml"], ["which does not exist", "Did you mean 'nowhere.yml'"]),
        (["--max_steps", "3", "4"], ["must be named"]),
    ],
)
def test_mistakes_on_the_command_line(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere.yml").write_text("")
    code, out, err = run(capsys, "train", *argv)
    assert code == 2 and not out
    assert all(word in err for word in words), err
    assert "Traceback" not in err and "usage:" not in err and "trl-opd train --help" in err
    assert len(err) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_steps: ten", ["max_steps must be a whole number, got 'ten'"]),
        ("max_steps: [3]", ["max_steps must be a whole number, got [3]"]),
        ("max_steps: 2.5", ["max_steps must be a whole number, got 2.5"]),
        ("max_steps:", ["max_steps must be a whole number, got nothing"]),
        ("max_steps: true", ["max_steps must be a whole number, got True"]),
        ("learning_rate: fast", ["learning_rate must be a number, got 'fast'"]),
        ("use_peft: maybe", ["use_peft must be true or false, got 'maybe'"]),
        ("dtype: float33", ["dtype must be one of", "float32"]),
        ("divergense: reverse_kl", ["run.yaml has no field 'divergense'. Did you mean 'divergence'"]),
        ("datasets: {path: json}", ["datasets must be a list"]),
        ("model_name_or_path: [a, b]", ["model_name_or_path must be a text"]),
        ("seed: 1\nseed: 2", ["seed must be given once, got it in lines 1 and 2"]),
        ("- a\n- b", ["must hold a YAML mapping"]),
        ("a: [1", ["cannot be read", "run.yaml"]),
        ("env: 3", ["env must be a mapping"]),
    ],
)
def test_mistakes_in_the_file(capsys, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    code, _, err = run(capsys, "train", "--config", str(tmp_path / "run.yaml"))
    assert code == 2 and all(word in err for word in words), err


def parse(tmp_path, text, *argv):
    (tmp_path / "run.yaml").write_text(text)
    return make_parser().parse_args_and_config([f"--config={tmp_path / 'run.yaml'}", *CPU, *argv])


def test_values_are_read_as_people_write_them(tmp_path):
    script, args, model, _ = parse(
        tmp_path,
        "learning_rate: 1e-4\nmax_steps: 1e2\neval_strategy: no\npreflight: off\nrun_name: 42\nmodel_revision: 12e5\n"
        "reward_funcs: my.reward\nlora_target_modules: all-linear\nuse_peft: yes\n"
        "divergence: generalized_jsd\ndivergence_kwargs: {beta: 1e-1}\nspecial_token_masking: [7, '<think>']\n"
        "teacher_model: {a: x, b: y}\nlogging_steps: 5\nsave_strategy: 'no'\n",
    )
    assert args.learning_rate == 1e-4 and args.max_steps == 100 and isinstance(args.max_steps, int)
    assert args.eval_strategy == "no" and args.preflight == "off" and args.save_strategy == "no"
    assert args.run_name == "42" and model.model_revision == "12e5"
    assert script.reward_funcs == ["my.reward"] and model.lora_target_modules == "all-linear"
    assert model.use_peft is True and args.divergence_kwargs == {"beta": 0.1}
    assert args.special_token_masking == [7, "<think>"] and script.teacher_model == {"a": "x", "b": "y"}


def test_nested_words_keep_their_truth(tmp_path):
    _, args, _, _ = parse(tmp_path, "chat_template_kwargs: {enable_thinking: no}\nlog_completions: on")
    assert args.chat_template_kwargs == {"enable_thinking": False} and args.log_completions is True


def test_the_command_line_wins_and_both_count_as_given(tmp_path):
    _, args, _, _ = parse(
        tmp_path, "recipe: gkd\ntemperature: 0.5\nseed: 3", "--seed", "4", "--student_fraction", "1.0"
    )
    assert args.seed == 4
    assert args.recipe_changes == {"temperature": [0.9, 0.5], "student_fraction": [0.5, 1.0]}


def test_the_environment_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_OPD_TEST", "0")
    parse(tmp_path, "env: {TRL_OPD_TEST: 7}")
    import os

    assert os.environ["TRL_OPD_TEST"] == "7"


def test_json_is_yaml(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"seed": 5, "divergence_kwargs": None}))
    values, texts = read_config(str(tmp_path / "run.json"))
    assert values == {"seed": 5, "divergence_kwargs": None} and texts["seed"] == "5"
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config(str(tmp_path / "empty.yaml")) == ({}, {})


def test_values_that_fit_are_left_alone():
    action = argparse.ArgumentParser().add_argument("--x", type=str, choices=None)
    for value, hint in ((None, str | None), ({"a": 1}, dict | str | None), ([1], list[int]), (2, float), (True, bool)):
        assert coerce("x", value, None, hint, action) == value


def test_the_nearest_file(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    assert near_file(str(tmp_path / "dat.jsonl")) == " Did you mean 'data.jsonl'?"
    assert near_file(str(tmp_path / "zzz")) == ""
    assert "Its folder" in near_file(str(tmp_path / "none" / "x"))


def test_every_field_of_the_command_is_documented():
    for cls in (OnPolicyDistillScriptArguments, OnPolicyDistillConfig, ModelConfig, DatasetMixtureConfig):
        for name, f in cls.__dataclass_fields__.items():
            assert name.startswith("_") or not f.init or f.metadata.get("help"), name


# Log lines


class State:
    global_step, max_steps = 12345, 20000


def test_log_lines_fit_80_columns():
    logs = {
        "loss": 1.23456e-5,
        "distill/reverse_kl": 123.456,
        "distill/overlap": 0.123,
        "reward": -1.234,
        "completions/mean_length": 12345.6,
        "completions/clipped_ratio": 0.5,
        "grad_norm": 1.2345e-7,
        "learning_rate": 1e-6,
    }
    line = one_line(logs, State())
    assert len(line) <= 80 and line.startswith("step 12345/20000  loss 1.235e-05  KL 123.5  overlap 0.12")
    short = one_line({"loss": 0.5, "distill/overlap": 0.25, "completions/clipped_ratio": 0.1}, State())
    assert short == "step 12345/20000  loss 0.5  overlap 0.25  cut 10%"
    assert one_line({"eval_loss": 0.5, "eval_distill/reverse_kl": 2.0}, State()) == (
        "step 12345/20000 evaluation  loss 0.5  KL 2"
    )
    assert one_line({"train_runtime": 12.34}, State()) == "12345 steps in 12.3 s"
    assert one_line({"train_runtime": 7260}, State()) == "12345 steps in 2 h 01 min"
