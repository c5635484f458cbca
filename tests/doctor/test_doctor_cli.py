"""The command: what it prints, for people and for programs, and its exit codes."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import yaml
from run_facts import CHAT, EOS, IM_END, model_of, save_config, save_model, tokenizer_of, write_rows
from tiny import CHAT_TEMPLATE, make_tokenizer

from trl_opd.doctor import models
from trl_opd.doctor.cli import main, not_started
from trl_opd.doctor.show import ORDER, closing, show
from trl_opd.findings import Finding

SPACE = CHAT_TEMPLATE.replace("assistant\n", "assistant\n{{ ' ' }}")
CPU = ["--use_cpu", "true", "--bf16", "false", "--max_completion_length", "8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path):
    """A clean run: folders without weights, and prompts."""

    def options(*more, student=None, teacher=None):
        student = student or save_config(tmp_path / "student")
        teacher = teacher or save_config(tmp_path / "teacher")
        rows = [{"prompt": messages} for messages in CHAT]
        data = write_rows(tmp_path / "data.jsonl", rows)
        return ["--student", student, "--teacher", teacher, "--dataset", data, *CPU, *more]

    return options


@pytest.fixture
def doctor(capsys):
    def run(*arguments):
        code = main([*arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_clean_pair(doctor, files):
    code, out, err = doctor(*files("--no-weights"))
    assert code == 0
    assert out.startswith("trl-opd doctor\n")
    assert "Nothing is wrong with this run, as far as was looked" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out and "comparing tokens" in err
    assert "Prompt 0, as both read it" in out


def test_a_fault_is_seen_explained_and_mended(doctor, files, tmp_path):
    teacher = save_config(tmp_path / "other", tokenizer_of(chat_template=SPACE))
    code, out, _ = doctor(*files("--no-weights", teacher=teacher))
    assert code == 1
    text = " ".join(out.split())
    assert "! warning chat_template prompt 0 differs at token 20" in text
    assert "! warning: chat_template seen prompt 0" in text
    assert "why The teacher scores" in text and "do Set teacher_chat_template='student'" in text
    assert "side by side" in text and "»(its end)" in text and "»␣" in text
    assert text.endswith("1 warning (14 checks, none with weights): it can start; read the warnings first.")
    assert max(map(len, out.splitlines())) <= 80
    code, _, _ = doctor(*files("--no-weights", "--teacher_chat_template", "student", teacher=teacher))
    assert code == 0


def test_json(doctor, files, tmp_path):
    teacher = save_config(tmp_path / "other", tokenizer_of(chat_template=SPACE))
    code, out, _ = doctor(*files("--no-weights", "--json", teacher=teacher))
    found = json.loads(out)
    assert code == found["exit_code"] == 1
    assert [(f["check"], f["severity"]) for f in found["findings"]] == [("chat_template", "warning")]
    assert set(found["findings"][0]) == {"check", "severity", "seen", "why", "do"}
    assert {f["check"] for f in found["checks"]} >= {"eos", "pad", "bos", "memory", "dataset"}
    assert found["counts"]["warning"] == 1 and found["weights"] is False
    assert found["teacher"] == teacher
    assert found["prompts"][0]["differs_at"] == 20 and found["prompts"][0]["teacher_token"] == " "


def test_exit_codes(doctor, files, tmp_path):
    warned = ["--no-weights", "--learning_rate", "1e-3"]
    assert doctor(*files(*warned))[0] == 1
    assert doctor(*files(*warned, "--fail-on", "error"))[0] == 0
    unending = save_config(tmp_path / "base", tokenizer_of(eos_token="<eos>"), eos_token_id=EOS)
    assert doctor(*files("--no-weights", "--fail-on", "error", student=unending))[0] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--samples", "0"], "whole number of at least 1"),
        (["--fail-on", "info"], "invalid choice"),
        (["--no_such_field", "1"], "no_such_field"),
    ],
)
def test_bad_options(doctor, files, arguments, says):
    code, out, err = doctor(*files("--no-weights", *arguments))
    assert code == 2 and out == "" and says in err


def test_nothing_to_look_at(doctor, tmp_path):
    assert doctor()[0] == 2
    code, _, err = doctor("--student", save_config(tmp_path / "s"), "--dataset", "d.jsonl", *CPU)
    assert code == 2 and "--teacher must be given" in err


def test_help_is_for_people(doctor):
    code, out, _ = doctor("--help")
    assert code == 0 and "Exit code" in out and "--no-weights" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_yaml_of_a_run(doctor, files, tmp_path):
    options = files()
    fields = {
        "model_name_or_path": options[1],
        "teacher_model": options[3],
        "dataset_name": options[5],
        "use_cpu": True,
        "bf16": False,
        "max_completion_length": 8,
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 1e-3,
        "preflight": "strict",
        "report_to": "tensorboard",
        "push_to_hub": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    code, out, _ = doctor("--config", str(tmp_path / "run.yaml"), "--no-weights", "--json")
    assert code == 1
    assert [f["check"] for f in json.loads(out)["findings"]] == ["learning_rate"]
    assert not (tmp_path / "out").exists()
    code, _, _ = doctor("--config", str(tmp_path / "run.yaml"), "--no-weights", "--learning_rate", "1e-6")
    assert code == 0  # the command line wins


def test_a_machine_without_accelerator(doctor, files, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    options = files("--no-weights")
    for name in ("--use_cpu", "--bf16"):
        at = options.index(name)
        del options[at : at + 2]
    code, _, err = doctor(*options)
    assert code == 0 and "looking on the CPU" in err


def test_output(doctor, files, tmp_path):
    report, data = tmp_path / "report.txt", tmp_path / "report.json"
    _, out, _ = doctor(*files("--no-weights", "--output", str(report)))
    assert report.read_text() == out
    doctor(*files("--no-weights", "--output", str(data)))
    assert json.loads(data.read_text())["exit_code"] == 0


def test_another_vocabulary_is_a_finding(doctor, files, tmp_path):
    other = make_tokenizer("zyxwvutsrqponmlkjihgfedcba0123456789 .<>|_:/\n")
    code, out, _ = doctor(*files("--no-weights", "--json", teacher=save_config(tmp_path / "other", other)))
    assert code == 1
    findings = json.loads(out)["findings"]
    assert [(f["check"], f["severity"]) for f in findings] == [("vocabulary", "error")]
    assert "id 6 is 'a' to the student and 'z' to the teacher" in findings[0]["seen"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--divergence", "reverse_lk"], "reverse_kl"),
        (["--teacher", "/no/such/folder"], "does not exist"),
        (["--support", "sampled"], "credit"),
    ],
)
def test_a_run_that_cannot_start_is_a_finding(doctor, files, arguments, says):
    code, out, _ = doctor(*files("--no-weights", "--json", *arguments))
    assert code == 1
    findings = json.loads(out)["findings"]
    assert [(f["check"], f["severity"]) for f in findings] == [("start", "error")]
    assert says in findings[0]["seen"]


def test_weights_that_are_not_there_are_a_finding_beside_the_others(doctor, files):
    code, out, _ = doctor(*files("--json"))
    found = json.loads(out)
    assert code == 1 and [f["check"] for f in found["findings"]] == ["start"]
    assert "OSError" in found["findings"][0]["seen"]
    assert {"eos", "chat_template"} <= {f["check"] for f in found["checks"]}


def test_with_weights(doctor, files, tmp_path, monkeypatch):
    asked = {}

    def check_models(trainer, *, num_samples, progress):
        asked.update(trainer=trainer, num_samples=num_samples)
        progress("sampling")
        print("a library speaks")
        return [Finding("self_kl", "ok", "0"), Finding("determinism", "warning", "differs", "noise", "fix it")]

    monkeypatch.setattr(models, "check_models", check_models)
    student, teacher = save_model(tmp_path / "a"), save_model(tmp_path / "b", seed=1)
    code, out, err = doctor(*files("--json", "--samples", "3", student=student, teacher=teacher))
    found = json.loads(out)
    assert code == 1 and [f["check"] for f in found["findings"]] == ["determinism"]
    assert asked["num_samples"] == 3 and len(found["prompts"]) == 3 and found["weights"]
    assert asked["trainer"].args.preflight == "off" and asked["trainer"].state.global_step == 0
    assert "trl-opd doctor: sampling" in err


def test_a_failure_of_the_checks_with_weights_keeps_the_others(doctor, files, tmp_path, monkeypatch):
    def broken(trainer, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(models, "check_models", broken)
    student, teacher = save_model(tmp_path / "a"), save_model(tmp_path / "b", seed=1)
    code, out, _ = doctor(*files("--json", student=student, teacher=teacher))
    assert code == 1
    assert [f["seen"] for f in json.loads(out)["findings"]] == ["RuntimeError: out of memory"]


@pytest.mark.slow
def test_standard_output_is_json_alone(files, tmp_path):
    """In a process of its own, with weights, their progress bars, and a library that writes to file number 1."""
    student, teacher = save_model(tmp_path / "a"), save_model(tmp_path / "b", seed=1)
    script = (
        "import os, sys\n"
        "from trl_opd.doctor import cli\n"
        "progress = cli.progress\n"
        "def noise(text):\n    os.write(1, b'noise'); print('chatter'); progress(text)\n"
        "cli.progress = noise\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *files("--json", student=student, teacher=teacher)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"]
    assert {"self_kl", "determinism", "truncation"} <= {f["check"] for f in found["checks"]}
    assert "noise" in done.stderr and "chatter" in done.stderr


# What is shown


def test_severities_have_words_and_marks(tmp_path):
    findings = [
        Finding(name, severity, "x" * 100)
        for name, severity in zip(ORDER, ("ok", "info", "warning", "error"), strict=False)
    ]
    for encoding, marks in (("utf-8", "✓·!✗"), ("ascii", "+.!x")):
        with open(tmp_path / encoding, "w", encoding=encoding, errors="replace") as f:
            show(findings, {}, f)
        lines = (tmp_path / encoding).read_text(encoding=encoding).splitlines()[2:6]
        assert sorted(line.split()[0] for line in lines) == sorted(marks)
        assert [line.split()[1] for line in lines] == ["ok", "info", "warning", "error"]
        assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("severities", "says"),
    [
        (["ok", "info"], "Nothing is wrong"),
        (["warning", "warning"], "2 warnings (2 checks): it can start"),
        (["error", "warning"], "1 error and 1 warning (2 checks): mend the errors"),
    ],
)
def test_the_closing_sentence(severities, says):
    assert says in closing([Finding("eos", severity, "") for severity in severities], {})


def test_markup_in_a_prompt_is_shown_as_it_is(tmp_path):
    prompts = [
        {
            "prompt": 0,
            "teacher": "the teacher",
            "student_text": "[bold]a[/]",
            "teacher_text": "[bold]b",
            "differs_at": 1,
        }
    ]
    with open(tmp_path / "out", "w") as f:
        show([Finding("eos", "warning", "[red]x[/red]")], {"prompts": prompts}, f)
    text = (tmp_path / "out").read_text()
    assert "[bold]»a[/]" in text and "[red]x[/red]" in text


def test_what_kept_the_trainer_from_being_built():
    assert not_started(ValueError("args must be x.")).seen == "args must be x."
    assert not_started(OSError("gone")).seen == "OSError: gone"
    assert model_of().generation_config.eos_token_id == [IM_END]
