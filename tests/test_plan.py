"""The plan: what it says of models, steps and the start, beside the trainer's own counts; and in 80 columns."""

import math

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model, make_prompts, make_tokenizer, trainer_config

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.checks import Run
from trl_opd.data import Splits
from trl_opd.findings import Finding
from trl_opd.memory_estimate import estimate_memory
from trl_opd.plan import completions_per_step, make_plan, num_steps, size_text
from trl_opd.resume import Start
from trl_opd.teachers import RoutedTeacher, resolve_teacher


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, size in (("student", 16), ("teacher", 24)):
        make_model(hidden_size=size).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def plan_of(models, teacher="teacher", peft_config=None, start=None, rewards=(), splits=None, more=None, **fields):
    args = OnPolicyDistillConfig(**trainer_config(models / "out", **fields))
    if isinstance(teacher, str) and not teacher.startswith(("base", "self", "http")):
        teacher = str(models / teacher)
    if teacher is not None and not callable(teacher):
        teacher = resolve_teacher(teacher, memory=args.teacher_memory, sync=args.teacher_syncing)
    dataset = make_prompts()
    run = Run(args, str(models / "student"), teacher, bool(rewards), {"train_dataset": dataset})
    run.peft_config = peft_config
    estimate = estimate_memory(run)
    return make_plan(
        run,
        estimate,
        splits or Splits(dataset),
        start or Start(),
        dataset="data.jsonl",
        rewards=rewards,
        **(more or {}),
    )


def section(plan, label):
    return " ".join(plan.sections[label])


def test_models(models):
    plan = plan_of(models)
    student, teacher = make_model(), make_model(hidden_size=24)
    assert f"{student.num_parameters() / 1000:.3g}k parameters in float32" in section(plan, "Student")
    assert "All of them are trained" in section(plan, "Student")
    assert f"{teacher.num_parameters() / 1000:.3g}k parameters in float32" in section(plan, "Teacher")
    assert str(models / "teacher") in section(plan, "Teacher")


def test_an_adapter_and_the_base_as_its_teacher(models):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    plan = plan_of(models, teacher="base", peft_config=config)
    trained, whole = 2 * 2 * (16 + 16), make_model().num_parameters()
    assert f"LoRA of rank 2: {trained} parameters are trained, {trained / whole:.2%}" in section(plan, "Student")
    assert f"{whole / 1000:.3g}k parameters" in section(plan, "Student")
    assert "no second model" in section(plan, "Teacher")


def test_teachers_of_other_kinds(models):
    assert "behind a server" in section(plan_of(models, teacher="http://localhost:1"), "Teacher")
    assert "weights of the start" in section(plan_of(models, teacher="self"), "Teacher")
    assert "follow it (ema)" in section(plan_of(models, teacher="self", teacher_sync="ema"), "Teacher")
    offloaded = plan_of(models, teacher_offload="layers")
    assert "layer by layer" in section(offloaded, "Teacher")
    assert "not on this device" in section(offloaded, "Memory")
    routed = resolve_teacher({"easy": str(models / "teacher"), "hard": str(models / "student")})
    assert isinstance(routed, RoutedTeacher)
    lines = plan_of(models, teacher=routed).sections["Teacher"]
    assert lines[0].startswith("easy: ") and lines[1].startswith("hard: ")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["reverse_kl over the whole vocabulary", "credit: direct", "temperature 1"]),
        (
            {"divergence": "generalized_jsd", "divergence_kwargs": {"beta": 0.3}, "temperature": 0.7},
            ["generalized_jsd {beta: 0.3}", "temperature 0.7"],
        ),
        ({"support": "teacher_top_k", "support_size": 9}, ["teacher_top_k (K = 9, tail: bucket)"]),
        ({"credit": "policy_gradient", "support": "sampled"}, ["at the sampled token", "policy_gradient"]),
        ({"token_weighting": "idft"}, ["token_weighting: idft"]),
        ({"target": "veto", "divergence": "forward_kl"}, ["to the target veto"]),
    ],
)
def test_the_objective(models, fields, words):
    text = section(plan_of(models, **fields), "Objective")
    assert all(word in text for word in words), text


def test_the_objective_with_rewards(models):
    text = section(plan_of(models, rewards=("length",), num_generations=2, reward_coef=0.5), "Objective")
    assert "plus 0.5 x rewards (length)" in text
    alone = plan_of(models, teacher=None, rewards=("length",), num_generations=2)
    assert "GRPO" in section(alone, "Objective") and "rewards alone" in section(alone, "Teacher")


def test_a_recipe_and_what_was_changed(models):
    text = section(plan_of(models, recipe="gkd", temperature=0.5, student_fraction=1.0), "Recipe")
    assert "gkd" in text and "arxiv.org/abs/2306.13649" in text and "Fidelity: exact" in text
    assert "temperature=0.5 (not 0.9)" in text
    assert "Recipe" not in plan_of(models).sections


@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 3},
        {"num_train_epochs": 1, "gradient_accumulation_steps": 2, "num_generations": 2},
        {"num_train_epochs": 1, "num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 1},
        {"num_train_epochs": 3, "num_generations": 4, "steps_per_generation": 3},
        {"max_steps": 7},
    ],
)
def test_the_number_of_steps_is_the_trainers(tmp_path, fields):
    rows = Dataset.from_dict({"prompt": [f"p{i}" for i in range(37)]})
    args = OnPolicyDistillConfig(**trainer_config(tmp_path, **{"max_steps": -1, **fields}))
    trainer = OnPolicyDistillTrainer(
        model=make_model(),
        teacher_model=lambda batch: None,
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )
    loader = trainer.get_train_dataloader()
    *_, steps = trainer.set_initial_training_values(args, loader)[:7]
    expected = trainer.set_initial_training_values(args, loader)[-1]
    assert num_steps(args, 37) == expected == steps


def test_tokens_of_a_step_and_the_length_of_a_run(models):
    plan = plan_of(
        models,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=2,
        max_completion_length=64,
    )
    text = section(plan, "Step")
    assert "4 prompts x 2 completions of at most 64 tokens: up to 512 tokens a step" in text
    assert "4 in a micro-batch x 2 accumulated x 1 process" in text and "samples 8 completions" in text
    assert "3 steps, 24 completions, 0.75 epochs" in section(plan, "Length")


def test_completions_of_several_processes(tmp_path):
    args = OnPolicyDistillConfig(**trainer_config(tmp_path, gradient_accumulation_steps=3))
    assert completions_per_step(args) == 12
    assert num_steps(args, None) == 3
    args.max_steps = -1
    assert num_steps(args, None) is None


def test_how_it_starts(models):
    assert section(plan_of(models), "Start") == "at step 0."
    start = Start("out/checkpoint-2", 2, messages=["checkpoint-3 is left out: it is cut off."])
    plan = plan_of(models, start=start)
    assert plan.sections["Start"] == ["resumes after step 2 (out/checkpoint-2).", *start.messages]
    assert "nothing to do" in section(plan_of(models, start=Start("x", 3, finished=True)), "Start")


def test_findings_are_counted_and_shown(models):
    found = [
        Finding("eos", "error", "bad", "why", "do"),
        Finding("pad", "ok", "fine"),
        Finding("bos", "warning", "odd"),
    ]
    plan = plan_of(models, more={"findings": found})
    assert "1 error and 1 warning" in section(plan, "Checks")
    assert [finding.check for finding in plan.problems] == ["eos", "bos"]
    assert "[error] eos: bad. why do" in plan.text() and "pad" not in plan.text().split("Report")[1]
    assert "nothing is wrong" in section(plan_of(models, more={"findings": found[1:2]}), "Checks")
    assert "Checks" not in plan_of(models).sections


def test_it_fits_80_columns(models):
    fields = {"divergence": "generalized_jsd", "divergence_kwargs": {"beta": 0.5}, "token_weighting": "idft"}
    found = [Finding("eos", "error", "a long sentence " * 20, "why " * 30, "do this")]
    plan = plan_of(models, recipe="gkd", more={"findings": found, "with_assumptions": True}, **fields)
    text = plan.text(80)
    long = [line for line in text.split("\n") if len(line) > 80 and str(models) not in line]
    assert not long
    for label in (
        "Recipe",
        "Student",
        "Teacher",
        "Objective",
        "Data",
        "Step",
        "Length",
        "Optimizer",
        "Memory",
        "Report",
    ):
        assert f"\n{label}" in f"\n{text}"
    assert "trl-opd report" in text and "An" not in plan.sections


def test_memory_is_listed_by_size_and_phase(models):
    plan = plan_of(models, loss_chunk_mib=2)
    sizes = dict(reversed(line.split("  ", 1)) for line in (x.strip() for x in plan.sections["Memory"][1:]))
    assert sizes["logits of a chunk (while training)"] == "2.0 MiB"
    assert next(iter(sizes)) == "logits of a chunk (while training)"
    assert "(while training)" in section(plan, "Memory") and "(while sampling)" in section(plan, "Memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "0.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**30 * 1.5, "1.5 GiB"), (150 * 2**30, "150 GiB"), (2**30, "1.0 GiB")],
)
def test_sizes_in_words(size, text):
    assert size_text(size) == text
    assert math.isfinite(size)
