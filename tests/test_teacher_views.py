"""`teacher_view`: the teacher's prompts depend on the rollout, and a sample without one is left out."""

import pytest
import torch
from alone import (
    TEACHER_PROMPTS,
    Sample,
    ids_of,
    logprobs_alone,
    loss_alone,
    make_rows,
    policy_gradient,
    reverse_kl,
    samples,
    train_one_step,
)
from datasets import Dataset
from steps import assert_same_gradient, gradient_of, student
from tiny import make_model, make_tokenizer

SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
CREDITS = pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])


def qwen():
    return make_model(hidden_size=24, seed=1).double()


def score(prompt, completion):
    return logprobs_alone(qwen(), prompt, completion)


def text_of(ids):
    return make_tokenizer().batch_decode([ids], skip_special_tokens=True)[0]


class View:
    """A `teacher_view` that keeps its calls and answers with `function(example, completion, reward, group)`."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, example, completion, reward, group):
        self.calls.append((example, completion, reward, group))
        return self.function(example, completion, reward, group)


def rows_of(step, view):
    """The samples of a step, with what the view makes of each: the same rollout is given the same prompt."""
    rows = []
    for inputs in step.batches:
        for sample in samples(inputs):
            prompt = text_of(sample.prompt).replace(" ", "")
            example = next(p for p in TEACHER_PROMPTS if p.replace(" ", "") == prompt)
            text = view({"prompt": example}, text_of(sample.completion), None, [])
            theirs = None if text is None else ids_of(text)
            rows.append(Sample(sample.prompt, theirs, sample.completion, sample.advantage))
    return rows


def check_step(step, rows, credit):
    model = student()
    loss = loss_alone(model, score, rows, policy_gradient if credit else reverse_kl)
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-7)
    assert_same_gradient(step.gradient, gradient_of(model, loss), tolerance=2e-6)


def feedback(example, completion, reward, group):
    return f"{example['prompt']}. an attempt was {completion}. now {example['prompt']}"


@CREDITS
def test_the_teacher_reads_what_the_view_makes_of_the_completion(tmp_path, credit):
    view = View(feedback)
    step = train_one_step(tmp_path, teacher=qwen(), rows=make_rows(None), arguments={"teacher_view": view}, **credit)
    check_step(step, rows_of(step, feedback), credit)
    assert len(view.calls) == 8
    written = sorted(text_of(row.completion) for row in rows_of(step, feedback))
    assert sorted(completion for _, completion, _, _ in view.calls) == written
    assert all(example.keys() == {"prompt"} and reward is None for example, _, reward, _ in view.calls)
    assert all(group == [] for *_, group in view.calls)
    assert step.logs["distill/skipped_view"] == 0.0


def only_some(example, completion, reward, group):
    return None if example["prompt"] in ("abc", "what is it") else feedback(example, completion, reward, group)


def nothing(example, completion, reward, group):
    return None


@CREDITS
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_sample_without_a_view_leaves_the_distillation(tmp_path, credit, loss_type):
    """The mean is over what remains; what is left out has no gradient."""
    step = train_one_step(
        tmp_path,
        teacher=qwen(),
        rows=make_rows(None),
        loss_type=loss_type,
        arguments={"teacher_view": only_some},
        **credit,
    )
    rows = rows_of(step, only_some)
    left_out = sum(row.teacher_prompt is None for row in rows)
    assert 0 < left_out < 8
    assert step.logs["distill/skipped_view"] == left_out
    assert "distill/skipped_overflow" in step.logs
    if loss_type == "dapo":
        check_step(step, rows, credit)
        return
    model, gap = student(), policy_gradient if credit else reverse_kl
    kept = [row for row in rows if row.teacher_prompt is not None]  # GRPO's mean over sequences has all of them
    loss = sum(loss_alone(model, score, [row], gap) for row in kept) / len(rows)
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-7)
    assert_same_gradient(step.gradient, gradient_of(model, loss), tolerance=2e-6)


@CREDITS
def test_a_step_without_any_view_trains_nothing(tmp_path, credit):
    step = train_one_step(
        tmp_path, teacher=qwen(), rows=make_rows(None), arguments={"teacher_view": nothing}, **credit
    )
    assert [loss.item() for loss in step.losses] == [0.0, 0.0]
    assert step.logs["distill/skipped_view"] == 8
    before = student().state_dict()
    for key, weight in step.trainer.model.state_dict().items():
        assert torch.equal(weight, before[key]), key


def reward_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def reward_e(completions, **kwargs):
    return [None if "e" not in completion else 1.0 for completion in completions]


def test_the_view_gets_the_weighted_reward_and_the_siblings(tmp_path):
    def successful_sibling(example, completion, reward, group):
        best = max(group, key=lambda sibling: sibling["reward"])
        return f"{best['completion']}. {example['prompt']}"

    view = View(successful_sibling)
    step = train_one_step(
        tmp_path,
        teacher=qwen(),
        rows=make_rows(None),
        num_generations=4,
        reward_weights=[0.5, 3.0],
        arguments={"teacher_view": view, "reward_funcs": [reward_length, reward_e]},
    )
    assert len(view.calls) == 8
    for start in (0, 4):
        calls = view.calls[start : start + 4]
        assert len({example["prompt"] for example, *_ in calls}) == 1
        for i, (_, completion, reward, group) in enumerate(calls):
            others = [call for j, call in enumerate(calls) if j != i]
            assert group == [{"completion": c, "reward": r} for _, c, r, _ in others]
            tokens = 2 * (reward - 3.0 * ("e" in completion))
            assert tokens in (len(ids_of(completion.replace(" ", ""))), len(ids_of(completion.replace(" ", ""))) + 1)
    assert len({reward for _, _, reward, _ in view.calls}) > 2
    # The losses follow: every row's prompt is that of its own call
    asked = {(call[0]["prompt"].replace(" ", ""), call[1]): ids_of(successful_sibling(*call)) for call in view.calls}
    rows = [sample for inputs in step.batches for sample in samples(inputs)]
    for row in rows:
        row.teacher_prompt = asked[text_of(row.prompt).replace(" ", ""), text_of(row.completion)]
    model = student()
    loss = loss_alone(model, score, rows)
    tokens = sum(len(row.completion) for row in rows)
    for row in rows:
        logprobs = logprobs_alone(model, row.prompt, row.completion).gather(-1, torch.tensor(row.completion)[:, None])
        loss = loss - row.advantage * (logprobs - logprobs.detach() + 1).sum() / tokens
    assert_same_gradient(step.gradient, gradient_of(model, loss), tolerance=2e-6)


def test_conversations_are_given_and_returned_as_messages(tmp_path):
    def view(example, completion, reward, group):
        calls.append((example, completion))
        return [*example["prompt"], *completion, {"role": "user", "content": "again"}]

    calls, contents = [], ("hi", "who", "abc", "x y z")
    prompts = [[{"role": "user", "content": content}] for content in contents]
    rows = Dataset.from_dict({"prompt": prompts * 2, "note": [str(i) for i in range(8)]})
    step = train_one_step(tmp_path, teacher=qwen(), rows=rows, arguments={"teacher_view": view})
    expected = []
    for example, completion in calls:
        ((question,), (answer,)) = (example["prompt"], completion)
        assert answer.keys() == {"role", "content"}
        assert example["note"].isdigit()
        turns = [("user", question["content"]), ("assistant", answer["content"]), ("user", "again")]
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns)
        expected.append(ids_of(f"{text}<|im_start|>assistant\n"))
    theirs = [
        ids[mask.bool()].tolist()
        for inputs in step.batches
        for ids, mask in zip(inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"], strict=True)
    ]
    assert sorted(theirs) == sorted(expected)


def test_the_view_is_asked_in_evaluation_too(tmp_path):
    view = View(only_some)
    step = train_one_step(
        tmp_path,
        teacher=qwen(),
        rows=make_rows(None),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=6,
        num_generations_eval=2,
        arguments={"teacher_view": view, "eval_dataset": make_rows(None, num=6)},
    )
    evaluated = view.calls[8:]
    assert sorted(example["prompt"] for example, *_ in evaluated) == sorted(list(TEACHER_PROMPTS) * 2)
    for i, (example, _, _, group) in enumerate(evaluated):
        sibling = evaluated[i ^ 1]
        assert example["prompt"] == sibling[0]["prompt"]
        assert group == [{"completion": sibling[1], "reward": None}]
    (logs,) = [line for line in step.trainer.state.log_history if "eval_loss" in line]
    assert logs["eval_distill/skipped_view"] == 2.0  # 4 of 12, in two batches
    model = step.trainer.model.eval()
    losses = []
    for inputs in step.batches[2:]:
        step.batches = [inputs]
        with torch.no_grad():
            losses.append(loss_alone(model, score, rows_of(step, only_some)).item())
    assert logs["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
