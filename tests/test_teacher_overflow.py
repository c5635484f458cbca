"""Samples that are too long for the teacher are never truncated, and what cannot be a prompt stops the run."""

import pytest
import torch
from alone import (
    TEACHER_PROMPTS,
    Sample,
    logprobs_alone,
    loss_alone,
    make_gpt2,
    make_rows,
    policy_gradient,
    reverse_kl,
    samples,
    train_one_step,
)
from datasets import Dataset
from safetensors.torch import load_file
from steps import assert_same_gradient, build, gradient_of, student, take_step
from test_trainer_features import make_processor, make_vlm
from tiny import VOCAB_SIZE, make_model, make_prompts, make_tokenizer
from transformers import PreTrainedModel
from trl import GRPOTrainer

from trl_opd.teachers import TeacherScoreError

SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
LIMIT = 30  # fewer than the long teacher_prompt has, more than any other with its completion


def qwen():
    return make_model(hidden_size=24, seed=1).double()


def short_gpt2():
    """Of no more positions than its limit: one token more and it fails."""
    return make_gpt2(n_positions=LIMIT)


def without_too_long(rows, limit):
    fits = [len(row.teacher_prompt) + len(row.completion) <= limit for row in rows]
    return [
        Sample(row.prompt, row.teacher_prompt if fit else None, row.completion, row.advantage)
        for row, fit in zip(rows, fits, strict=True)
    ]


SKIPS = {
    "local": (qwen, TEACHER_PROMPTS, {"teacher_max_length": LIMIT}, LIMIT),
    "local, without a column": (qwen, None, {"teacher_max_length": 13}, 13),
    "its own limit": (short_gpt2, TEACHER_PROMPTS, {}, LIMIT),
    "policy gradient": (qwen, TEACHER_PROMPTS, {"teacher_max_length": LIMIT, **SAMPLED}, LIMIT),
}


@pytest.mark.parametrize(("make_teacher", "prompts", "fields", "limit"), SKIPS.values(), ids=SKIPS.keys())
def test_a_sample_that_is_too_long_leaves_the_loss(tmp_path, make_teacher, prompts, fields, limit):
    step = train_one_step(tmp_path, teacher=make_teacher(), rows=make_rows(prompts), teacher_overflow="skip", **fields)
    column = dict.fromkeys(TEACHER_PROMPTS) if prompts is None else prompts
    rows = without_too_long([sample for inputs in step.batches for sample in samples(inputs, column)], limit)
    left_out = sum(row.teacher_prompt is None for row in rows)
    assert 0 < left_out < len(rows)
    assert step.logs["distill/skipped_overflow"] == left_out
    model, teacher = student(), make_teacher()

    def score(prompt, completion):
        return logprobs_alone(teacher, prompt, completion)

    loss = loss_alone(model, score, rows, policy_gradient if "credit" in fields else reverse_kl)
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-7)
    assert_same_gradient(step.gradient, gradient_of(model, loss), tolerance=2e-6)


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
@pytest.mark.parametrize("make_teacher", [qwen, lambda: make_gpt2(n_positions=2)], ids=["local", "its own limit"])
def test_a_step_whose_samples_are_all_too_long_trains_nothing(tmp_path, make_teacher, credit):
    if make_teacher is qwen:
        credit = {**credit, "teacher_max_length": 2}
    rows = make_rows({prompt: f"{prompt} x" for prompt in TEACHER_PROMPTS})
    step = train_one_step(tmp_path, teacher=make_teacher(), rows=rows, teacher_overflow="skip", **credit)
    assert [loss.item() for loss in step.losses] == [0.0, 0.0]
    assert step.logs["distill/skipped_overflow"] == 8
    before = student().state_dict()
    for key, weight in step.trainer.model.state_dict().items():
        assert torch.equal(weight, before[key]), key


def test_what_is_left_out_anyway_is_not_too_long(tmp_path):
    """A sample without a view is not the teacher's, however long."""

    def view(example, completion, reward, group):
        return None if example["prompt"] == "the quick brown fox" else "x"

    fields = {"teacher_max_length": 13, "arguments": {"teacher_view": view}}
    step = train_one_step(tmp_path, teacher=qwen(), rows=make_rows(None), **fields)
    assert step.logs["distill/skipped_view"] >= 1
    assert step.logs["distill/skipped_overflow"] == 0


def stop(tmp_path, match, **kwargs):
    """Train until the second step fails; what is saved and what is left are the weights of the first."""
    prompts = ["x"] * 4 + ["abc"] * 4
    rows = Dataset.from_dict({"prompt": prompts, **kwargs.pop("columns", {})})
    trainer = build(
        tmp_path,
        teacher=kwargs.pop("teacher", None) or qwen(),
        max_steps=2,
        shuffle_dataset=False,
        arguments={"train_dataset": rows, **kwargs.pop("arguments", {})},
        **kwargs,
    )
    with pytest.raises(TeacherScoreError, match=match) as caught:
        trainer.train()
    assert "No step was taken" in str(caught.value)
    assert f"A checkpoint of step 1 is in {tmp_path}" in str(caught.value)
    assert trainer.state.global_step == 1
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    moved = False
    before = student().state_dict()
    for key, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, saved[key]), key
        moved = moved or not torch.equal(weight, before[key])
    assert moved
    return str(caught.value)


def test_too_long_a_sample_is_an_error_that_names_the_numbers(tmp_path):
    columns = {"teacher_prompt": [None] * 4 + ["a" * 50] * 4}
    message = stop(
        tmp_path,
        r"has 5[1-8] tokens \(50 of them in the teacher's prompt\)",
        columns=columns,
        **{"teacher_max_length": 40},
    )
    assert "it takes 40" in message
    assert "'Qwen3ForCausalLM'" in message
    assert "teacher_overflow='skip'" in message


def test_the_teacher_says_itself_how_long_a_sample_may_be(tmp_path):
    columns = {"teacher_prompt": [None] * 4 + ["a" * LIMIT] * 4}
    assert f"it takes {LIMIT}" in stop(tmp_path, "has 3[1-8] tokens", columns=columns, teacher=short_gpt2())


def test_a_view_that_raises_stops_with_a_checkpoint(tmp_path):
    def view(example, completion, reward, group):
        return example["answers"] + "x" if example["prompt"] == "abc" else "x"

    message = stop(tmp_path, r"teacher_view failed with KeyError\('answers'\)", arguments={"teacher_view": view})
    assert "for the prompt 'abc'" in message
    assert "Teacher '" not in message  # who is not to blame


def test_a_view_that_returns_no_prompt_stops_with_a_checkpoint(tmp_path):
    def view(example, completion, reward, group):
        return 42 if example["prompt"] == "abc" else "x"

    stop(tmp_path, "cannot be rendered for the teacher: teacher_prompt must be text", arguments={"teacher_view": view})


def test_a_template_that_refuses_stops_with_a_checkpoint(tmp_path):
    refusing = make_tokenizer()
    refusing.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be concise"}
    columns = {"teacher_prompt": [[user]] * 4 + [[system, user]] * 4}
    arguments = {"teacher_processing_class": refusing}
    stop(tmp_path, "cannot be rendered for the teacher: no system role", columns=columns, arguments=arguments)


@pytest.mark.parametrize("problem", ["view", "length"])
def test_in_an_evaluation_alone_they_stop_without_a_checkpoint(tmp_path, problem):
    def view(example, completion, reward, group):
        raise KeyError("answers")

    arguments = {"train_dataset": make_rows(None), "eval_dataset": make_rows(None, num=4)}
    if problem == "view":
        arguments["teacher_view"] = view
    limit = None if problem == "view" else 2
    trainer = build(tmp_path, teacher=qwen(), arguments=arguments, teacher_max_length=limit)
    with pytest.raises(
        TeacherScoreError, match="teacher_view failed" if problem == "view" else "it takes 2"
    ) as caught:
        trainer.evaluate()
    assert "checkpoint" not in str(caught.value)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_view_beside_a_column_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, name):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    monkeypatch.setattr(GRPOTrainer, "__init__", loaded)
    path = str(tmp_path / "model")
    arguments = {"train_dataset": make_prompts(), "teacher_view": lambda *args: "x", name: make_rows()}
    with pytest.raises(ValueError, match=f"{name} must not have a column 'teacher_prompt' beside teacher_view="):
        build(tmp_path, model=path, teacher=path, arguments=arguments)


def vision_step(tmp_path, **columns):
    image = pytest.importorskip("PIL.Image")
    images = [image.new("RGB", (28, 28), (60 * i, 10, 200 - 50 * i)) for i in range(4)]
    prompts = [[{"role": "user", "content": text}] for text in ("what", "is", "this", "one")]
    rows = Dataset.from_dict({"prompt": prompts, "image": images, **columns})
    return take_step(
        tmp_path,
        model=make_vlm(),
        teacher=make_vlm(hidden_size=24, seed=1),
        teacher_overflow="skip",
        arguments={"train_dataset": rows, "processing_class": make_processor()},
    )


def test_images_go_with_the_students_prompt_alone(tmp_path):
    prompts = [None, None, None, [{"role": "user", "content": "a cat"}]]
    with pytest.raises(TeacherScoreError, match="teacher_prompt must not be given for a vision-language student"):
        vision_step(tmp_path / "column", teacher_prompt=prompts)
    steps = [vision_step(tmp_path / "plain"), vision_step(tmp_path / "none", teacher_prompt=[None] * 4)]
    assert steps[0].loss.item() == steps[1].loss.item() > 0


@pytest.mark.parametrize("template", ["own", "student"])
def test_tokens_that_only_the_student_knows_are_not_shown_to_the_teacher(tmp_path, template):
    """As without teacher_prompt, an id beyond the teacher's vocabulary becomes 0 on its side."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<hint>"])
    hinted = {"prompt": ["abc<hint>", "x", "hello<hint>", "what is it"]}
    hinted["teacher_prompt"] = [None, "42 x", None, "what is it<hint>" if template == "student" else "7 it"]
    model = student(vocab_size=VOCAB_SIZE + 1)
    arguments = {
        "train_dataset": Dataset.from_dict(hinted),
        "processing_class": tokenizer,
        "teacher_processing_class": make_tokenizer(),
    }
    step = take_step(tmp_path, model=model, teacher=qwen(), teacher_chat_template=template, arguments=arguments)
    (inputs,) = step.batches
    theirs = {tuple(tokenizer(p)["input_ids"]): t for p, t in zip(*hinted.values(), strict=True)}
    total = tokens = 0
    for i in range(4):
        prompt, completion = (
            inputs[f"{name}_ids"][i][inputs[f"{name}_mask"][i].bool()].tolist() for name in ("prompt", "completion")
        )
        text = theirs[tuple(prompt)]
        teacher_prompt = [min(t, VOCAB_SIZE) % VOCAB_SIZE for t in (tokenizer(text)["input_ids"] if text else prompt)]
        with torch.no_grad():
            t = logprobs_alone(qwen(), teacher_prompt, completion)
            logits = student(vocab_size=VOCAB_SIZE + 1)(torch.tensor([prompt + completion])).logits
            s = logits[0, len(prompt) - 1 : -1, :VOCAB_SIZE].double().log_softmax(-1)
        total, tokens = total + reverse_kl(s, t, torch.tensor(completion)).sum().item(), tokens + len(completion)
    assert step.loss.item() == pytest.approx(total / tokens, rel=2e-6)
