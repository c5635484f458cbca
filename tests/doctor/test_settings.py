"""Faults of settings and prompts, each planted in a clean run."""

import logging
import time

import pytest
import torch
from datasets import Dataset, IterableDataset
from run_facts import (
    CHAT,
    EOS,
    IM_END,
    chats,
    facts_of,
    found,
    infos,
    make_run,
    model_of,
    problems,
    save_config,
    texts,
    the,
    tokenizer_of,
)
from tiny import trainer_config
from transformers import GenerationConfig

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.doctor import check_facts, gather, preflight
from trl_opd.doctor.settings import check_memory
from trl_opd.memory_estimate import MemoryEstimate

# Sampling


@pytest.mark.parametrize("field", [{"no_repeat_ngram_size": 3}, {"min_p": 0.1}, {"suppress_tokens": [7]}])
def test_what_generate_takes_from_the_models_own_config(tmp_path, field):
    student = model_of()
    for name, value in field.items():
        setattr(student.generation_config, name, value)
    findings = found(student=student)
    assert problems(findings) == [("generation_config", "warning")]
    assert f"{next(iter(field))}={next(iter(field.values()))!r}" in the(findings, "generation_config").seen
    # Truth: what generate() makes of GRPOTrainer's settings
    args = OnPolicyDistillConfig(**trainer_config(tmp_path))
    trainer = OnPolicyDistillTrainer(
        student, "self", args=args, train_dataset=texts(), processing_class=tokenizer_of()
    )
    used, _ = trainer.model._prepare_generation_config(trainer.generation_config)
    assert {name: getattr(used, name) for name in field} == field


def test_what_the_trainer_sets_itself_is_worth_knowing():
    student, teacher = model_of(), model_of(seed=1)
    student.generation_config.update(temperature=0.6, top_p=0.95, top_k=20, do_sample=True)
    findings = found(student=student, teacher=teacher)
    assert problems(findings) == []
    assert infos(findings) == ["generation_config"]
    assert "temperature=0.6, top_p=0.95, top_k=20" in the(findings, "generation_config").seen


def test_min_p_of_the_run_wins():
    student = model_of()
    student.generation_config.min_p = 0.1
    assert problems(found(student=student, min_p=0.05)) == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"generation_kwargs": {"temperature": 0.6}}, "samples with {'temperature': 0.6}"),
        ({"generation_kwargs": {"eos_token_id": 5}}, "eos_token_id=5"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
        ({"top_p": 0.9, "credit": "policy_gradient", "support": "sampled"}, "top_p=0.9"),
    ],
)
def test_completions_of_another_distribution(fields, says):
    findings = found(**fields)
    assert problems(findings) == [("generation_config", "warning")]
    assert says in the(findings, "generation_config").seen


@pytest.mark.parametrize("fields", [{"top_p": 0.9}, {"top_k": 1}, {"distill_temperature": 2.0}])
def test_sampling_that_is_worth_knowing(fields):
    findings = found(**fields)
    assert problems(findings) == [] and infos(findings) == ["generation_config"]


# Learning rate, loss


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"learning_rate": 1e-6}, False),
        ({"learning_rate": 2e-5}, False),
        ({"learning_rate": 4e-5}, True),
        ({"learning_rate": 1e-3}, True),
        ({"learning_rate": 1e-9}, True),
        ({"learning_rate": 0.0}, True),
        ({"learning_rate": 1e-4, "lora": True}, False),
        ({"learning_rate": 2e-6, "lora": True}, True),
        ({"lora": True}, True),
        ({"learning_rate": 5e-3, "lora": True}, True),
    ],
)
def test_learning_rates(tmp_path, fields, wrong):
    student = save_config(tmp_path / "student")
    findings = found(student=student, **fields)
    assert problems(findings) == ([("learning_rate", "warning")] if wrong else [])
    if fields == {"lora": True}:
        assert "1e-06, GRPOConfig's default, with LoRA" in the(findings, "learning_rate").seen
        assert "learning_rate=1e-4" in the(findings, "learning_rate").do


def test_nothing_is_said_of_the_rate_of_a_tiny_model():
    assert problems(found(learning_rate=1e-2)) == []


def test_an_optimizer_of_another_kind_is_worth_knowing(tmp_path):
    findings = found(student=save_config(tmp_path / "student"), optim="sgd")
    assert problems(findings) == [] and infos(findings) == ["learning_rate"]


@pytest.mark.parametrize(
    ("fields", "severity"),
    [
        ({"loss_type": "cispo", "credit": "policy_gradient", "support": "sampled"}, "warning"),
        ({"loss_type": "cispo", "credit": "policy_gradient", "support": "sampled", "epsilon_high": 0.28}, "warning"),
        ({"loss_type": "cispo", "credit": "policy_gradient", "support": "sampled", "epsilon_high": 5.0}, "ok"),
        ({"loss_type": "cispo"}, "ok"),
        ({"loss_type": "cispo", "has_rewards": True, "num_generations": 4}, "warning"),
        ({"loss_type": "bnpo", "gradient_accumulation_steps": 2}, "warning"),
        ({"loss_type": "bnpo", "gradient_accumulation_steps": 1}, "ok"),
        ({"loss_type": "luspo"}, "info"),
        ({"loss_type": "grpo"}, "info"),
        ({"loss_type": "dapo"}, "ok"),
    ],
)
def test_loss_types(fields, severity):
    findings = found(dataset=chats(CHAT * 4), **{"gradient_accumulation_steps": 1, **fields})
    assert the(findings, "loss_type").severity == severity
    assert problems(findings) == ([("loss_type", "warning")] if severity == "warning" else [])


# Memory


@pytest.mark.parametrize(("total", "severity"), [(0.95, "warning"), (0.5, "ok"), (None, "info")])
def test_memory(monkeypatch, total, severity):
    device = None if total is None else 80 * 2**30
    used = int((total or 1) * 80 * 2**30)
    estimate = make_estimate(used, device)
    monkeypatch.setattr("trl_opd.memory_estimate.estimate_memory", lambda run, **kwargs: estimate)
    findings = check_memory(facts_of())
    assert [f.severity for f in findings] == [severity]
    if severity == "warning":
        assert "76 GiB of 80 GiB" in findings[0].seen and "teacher_offload" in findings[0].do


def make_estimate(used, device):
    """An estimate of two parts."""

    class Estimate:
        parts, total, device_total = {"student weights": used - 2**30, "optimizer": 2**30}, used, device

    assert all(hasattr(MemoryEstimate, name) or name in MemoryEstimate.__annotations__ for name in ("parts", "total"))
    return Estimate()


# Prompts


def test_too_few_prompts():
    findings = found(dataset=chats(CHAT[:3]))
    assert problems(findings) == [("dataset", "error")]
    assert "3 prompts, and a generation batch takes" in the(findings, "dataset").seen


@pytest.mark.parametrize("empty", [[{"role": "user", "content": " "}]])
def test_empty_prompts(empty):
    findings = found(dataset=chats([*CHAT, empty]))
    assert problems(findings) == [("dataset", "warning")]
    assert "1 of 9 prompts are empty (rows 8)" in the(findings, "dataset").seen


def test_empty_text():
    findings = found(dataset=chats(["abc"] * 9 + [""]))
    assert problems(findings) == [("dataset", "warning")]


def test_prompts_of_two_kinds():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"prompt": CHAT[i] if i % 2 else "text"}

    findings = found(dataset=Rows())
    assert problems(findings) == [("dataset", "error")]
    assert "4 of 8 prompts are text" in the(findings, "dataset").seen


def test_prompts_that_end_with_an_answer():
    closed = [[*messages, {"role": "assistant", "content": "yes"}] for messages in CHAT]
    findings = found(dataset=chats(closed))
    assert problems(findings) == [("dataset", "warning")]
    assert "message of the assistant" in the(findings, "dataset").seen


def test_messages_that_were_rendered_before():
    twice = [[{"role": "user", "content": "<|im_start|>user\nhi<|im_end|>"}]] * 8
    findings = found(dataset=chats(twice))
    assert problems(findings) == [("dataset", "warning")]
    assert "'<|im_end|>', a token of the chat template" in the(findings, "dataset").seen


def test_repeated_prompts():
    findings = found(dataset=chats(CHAT * 10))
    assert problems(findings) == [("dataset", "warning")]
    assert "90% of the first 80 prompts" in the(findings, "dataset").seen
    different = [[{"role": "user", "content": f"number {i}"}] for i in range(80)]
    assert problems(found(dataset=chats(different))) == []


@pytest.mark.parametrize(
    ("limits", "fields", "expected"),
    [
        ({"student": 40}, {}, [("prompt_length", "warning")]),
        ({"teacher": 40}, {}, [("prompt_length", "error")]),
        ({"teacher": 40}, {"teacher_overflow": "skip"}, [("prompt_length", "warning")]),
        ({}, {"teacher_max_length": 40}, [("prompt_length", "error")]),
        ({"student": 64}, {}, []),
    ],
)
def test_lengths(limits, fields, expected):
    models = {
        name: model_of(seed, max_position_embeddings=limits.get(name, 4096))
        for seed, name in enumerate(("student", "teacher"))
    }
    findings = found(**models, **fields, max_completion_length=16)
    assert problems(findings) == expected
    if expected:
        assert "a prompt of 28 tokens and a completion of up to 16 are 44;" in the(findings, "prompt_length").seen
        assert the(findings, "prompt_length").seen.endswith("takes 40")


def test_a_length_near_the_limit_is_worth_knowing():
    findings = found(student=model_of(max_position_embeddings=46), max_completion_length=16)
    assert problems(findings) == [] and infos(findings) == ["prompt_length"]


def test_a_long_prompt_behind_the_rendered_ones():
    rows = [*CHAT, [{"role": "user", "content": "x" * 100}]]
    assert problems(found(dataset=chats(rows), student=model_of(max_position_embeddings=100))) == [
        ("prompt_length", "warning")
    ]


# The automatic preflight


def faulty(**fields):
    return make_run(student=model_of(eos=(EOS,)), tokenizer=tokenizer_of(eos_token="<eos>"), **fields)


def test_a_problem_is_logged_once_and_readably(caplog):
    caplog.set_level(logging.WARNING, "trl_opd")
    findings = preflight(*faulty())
    assert problems(findings) == [("eos", "error")]
    assert [record.name for record in caplog.records] == ["trl_opd"]
    message = caplog.records[0].getMessage()
    assert (
        "\n- [error] eos: the teacher ends an answer with '<|im_end|>'" in message and "preflight='strict'" in message
    )


def test_other_processes_say_nothing(caplog, monkeypatch):
    run, tokenizers = faulty()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert problems(preflight(run, tokenizers)) == [("eos", "error")]
    assert not caplog.records


def test_a_clean_run_says_nothing(caplog):
    assert problems(preflight(*make_run())) == []
    assert not caplog.records


def test_strict_does_not_load_weights(tmp_path):
    student = save_config(tmp_path / "s", tokenizer_of(eos_token="<eos>"), eos_token_id=EOS)
    teacher = save_config(tmp_path / "t")
    args = OnPolicyDistillConfig(**trainer_config(tmp_path / "out", preflight="strict", learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"preflight='strict'") as raised:  # there are no weights to load
        OnPolicyDistillTrainer(student, teacher, args=args, train_dataset=chats())
    assert "[error] eos:" in str(raised.value) and "[warning] learning_rate:" in str(raised.value)


def test_off_does_not_look(caplog):
    assert preflight(*faulty(preflight="off")) == []
    assert not caplog.records


def test_a_check_that_fails_is_no_failure(monkeypatch):
    def broken(facts):
        raise RuntimeError("no idea")

    monkeypatch.setattr("trl_opd.doctor.tokens.check_pad", broken)
    findings = preflight(*make_run(preflight="strict"))
    assert the(findings, "pad").severity == "info"
    assert "RuntimeError: no idea" in the(findings, "pad").seen


def test_a_stream_is_not_read():
    read = []

    def rows():
        for row in CHAT * 2:
            read.append(row)
            yield {"prompt": row}

    stream = IterableDataset.from_generator(rows)
    run, tokenizers = make_run(dataset=stream)
    assert problems(preflight(run, tokenizers)) == [] and read == []
    facts = gather(run, tokenizers, num_samples=3, num_scanned=3, read_streams=True)
    assert len(facts.prompts) == 3
    assert problems(check_facts(facts, memory=False)) == []


def test_it_takes_little_time():
    run, tokenizers = make_run(dataset=Dataset.from_dict({"prompt": CHAT * 1000}))
    preflight(run, tokenizers)
    started = time.perf_counter()
    findings = preflight(run, tokenizers)
    assert time.perf_counter() - started < 0.5
    assert "8 of them looked at" in the(findings, "dataset").seen


def test_the_trainer_keeps_the_findings(tmp_path):
    args = OnPolicyDistillConfig(**trainer_config(tmp_path))
    trainer = OnPolicyDistillTrainer(
        model_of(eos=(EOS,)),
        model_of(1),
        args=args,
        train_dataset=chats(),
        processing_class=tokenizer_of(eos_token="<eos>"),
        teacher_processing_class=tokenizer_of(),
    )
    assert problems(trainer.findings) == [("eos", "error")]


def test_generation_config_from_a_file_and_without(tmp_path):
    folder = save_config(tmp_path / "s")
    assert facts_of(student=folder).student.generation_config.eos_token_id == IM_END
    GenerationConfig(eos_token_id=[IM_END, EOS]).save_pretrained(folder)
    assert facts_of(student=folder).student.generation_config.eos_token_id == [IM_END, EOS]
