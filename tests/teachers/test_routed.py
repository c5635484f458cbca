"""Each sample goes to its own teacher: losses, gradients and metrics are those of samples taken one teacher a time."""

import functools

import pytest
import steps
import torch
from datasets import Dataset
from routed_runs import (
    advantage_of,
    against,
    against_topk,
    by_hand,
    is_of,
    routed_prompts,
    routed_value,
    topk_teacher,
    wide,
    wider,
)
from self_runs import PG, adapted, run, trained
from steps import assert_same_gradient, full_logprobs, gradient_of, loss_mask, reduce, sampled, student, take_step

from trl_opd.collators import TeacherScores
from trl_opd.teachers import RoutedTeacher

DIVERGENCES = {
    "forward_kl": (steps.forward_kl, {}),
    "reverse_kl": (steps.reverse_kl, {}),
    "generalized_jsd": (functools.partial(steps.jsd, beta=0.3), {"divergence_kwargs": {"beta": 0.3}}),
}
# The teachers, and what each is by hand
PAIRS = {
    "two models": (lambda: {"a": wide(), "b": wider()}, {"a": wide, "b": wider}, student),
    "the same model": (lambda: dict.fromkeys("ab", wide()), {"a": wide, "b": wide}, student),
    "model and top-k": (lambda: {"a": wide(), "b": topk_teacher}, {"a": wide, "b": topk_teacher}, student),
    "top-k and model": (lambda: {"a": topk_teacher, "b": wide()}, {"a": topk_teacher, "b": wide}, student),
    "two top-k": (lambda: dict.fromkeys("ab", topk_teacher), dict.fromkeys("ab", topk_teacher), student),
    "model and base": (lambda: {"a": wide(), "b": "base"}, {"a": wide, "b": student}, adapted),
    "self and model": (lambda: {"a": "self", "b": wide()}, {"a": student, "b": wide}, student),
}
# In batches of four: mixed ones, and of one teacher alone
DATASETS = {
    "mixed": routed_prompts,
    "all to one": lambda: routed_prompts(only="b"),
    "one after the other": lambda: Dataset.from_dict(
        {k: [*routed_prompts(4, "a")[k], *routed_prompts(28, "b")[k]] for k in ("prompt", "teacher")}
    ),
}
CIRCUMSTANCES = {
    "plain": {},
    "two steps per generation": {"steps_per_generation": 2},
    "two iterations": {"num_iterations": 2},
    "four generations": {"num_generations": 4, "per_device_train_batch_size": 8},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
}


def values_of(theirs, divergence):
    return {
        name: against_topk(divergence) if make is topk_teacher else against(make(), divergence)
        for name, make in theirs.items()
    }


def assert_as_by_hand(tmp_path, teachers, value, make=student, prompts=routed_prompts, **fields):
    datasets = {"train_dataset": prompts(), "eval_dataset": prompts()}
    defaults = {"loss_type": "bnpo", "max_steps": 3, "shuffle_dataset": False}
    trainer, events = run(
        tmp_path,
        make(),
        teacher=teachers,
        **{**defaults, **fields, "arguments": datasets | fields.get("arguments", {})},
    )
    losses, theta = by_hand(events, make(), value)
    assert [event.loss for event in events] == pytest.approx(losses, rel=1e-5)
    for name, weight in theta.items():
        torch.testing.assert_close(trained(trainer.model)[name], weight, rtol=0, atol=2e-6)
    return trainer, events


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("pair", PAIRS)
def test_each_sample_learns_from_its_own_teacher(tmp_path, pair, divergence):
    ours, theirs, make = PAIRS[pair]
    formula, fields = DIVERGENCES[divergence]
    value = routed_value(values_of(theirs, formula))
    _, events = assert_as_by_hand(tmp_path, ours(), value, make, divergence=divergence, **fields)
    assert all(0 < int(is_of("a", event.inputs).sum()) < 4 for event in events[:1])


@pytest.mark.parametrize("fields", CIRCUMSTANCES.values(), ids=CIRCUMSTANCES.keys())
@pytest.mark.parametrize("prompts", DATASETS.values(), ids=DATASETS.keys())
@pytest.mark.parametrize("pair", ["two models", "model and top-k"])
def test_however_the_samples_come(tmp_path, pair, prompts, fields):
    ours, theirs, make = PAIRS[pair]
    value = routed_value(values_of(theirs, steps.reverse_kl))
    assert_as_by_hand(tmp_path, ours(), value, make, prompts, **fields)


@pytest.mark.parametrize("prompts", DATASETS.values(), ids=DATASETS.keys())
@pytest.mark.parametrize("pair", ["two models", "model and top-k", "top-k and model", "self and model"])
def test_the_policy_gradient_of_each_samples_teacher(tmp_path, pair, prompts):
    ours, theirs, make = PAIRS[pair]
    value = routed_value({n: advantage_of(t if t is topk_teacher else t()) for n, t in theirs.items()})
    assert_as_by_hand(tmp_path, ours(), value, make, prompts, **PG)


def reward(completions, **kwargs):
    return [len(completion) + 0.3 * completion.count("e") for completion in completions]


@pytest.mark.parametrize("pair", ["two models", "model and top-k", "two top-k"])
def test_beside_rewards_the_gradient_is_the_sum(tmp_path, pair):
    ours, theirs, _ = PAIRS[pair]
    arguments = {"train_dataset": routed_prompts(), "reward_funcs": reward}
    fields = {"num_generations": 2, "shuffle_dataset": False}
    both = take_step(tmp_path, teacher=ours(), distill_coef=0.7, arguments=arguments, **fields)
    alone = take_step(tmp_path, grpo=True, arguments=arguments, **fields)
    (inputs,) = both.batches
    assert torch.equal(inputs["completion_ids"], alone.batches[0]["completion_ids"])
    model = student()
    value = routed_value(values_of(theirs, steps.reverse_kl))(model, inputs)
    gradient = gradient_of(model, 0.7 * reduce([value], [loss_mask(inputs)], "dapo"))
    expected = {name: gradient[name] + g for name, g in alone.gradient.items()}
    assert_same_gradient(both.gradient, expected)


def means(value, inputs, name):
    """The mean of a value over a teacher's tokens, and the share of its tokens."""
    mask = loss_mask(inputs)
    mine = mask * is_of(name, inputs)[:, None]
    return ((value * mine).sum() / mine.sum()).item(), (mine.sum() / mask.sum()).item()


def test_metrics_of_each_teacher(tmp_path):
    step = take_step(
        tmp_path,
        teacher={"a": wide(), "b": wider(), "none": topk_teacher},
        arguments={"train_dataset": routed_prompts()},
        divergence="forward_kl",
    )
    (inputs,), logs = step.batches, step.logs
    s = full_logprobs(student(), inputs).detach()
    assert 0 < is_of("a", inputs).sum() < 4
    for name, teacher in {"a": wide(), "b": wider()}.items():
        t = full_logprobs(teacher, inputs).detach()
        values = {
            "forward_kl": steps.forward_kl(s, t),
            "reverse_kl": steps.reverse_kl(s, t),
            "teacher_student_gap": sampled(t, inputs) - sampled(s, inputs),
            "student_entropy": -(s.exp() * s).sum(-1),
            "teacher_entropy": -(t.exp() * t).sum(-1),
        }
        for metric, value in values.items():
            expected, share = means(value, inputs, name)
            assert logs[f"distill/{name}/{metric}"] == pytest.approx(expected, rel=1e-5), metric
        assert logs[f"distill/{name}/share"] == pytest.approx(share)
        assert f"distill/{name}/overlap" in logs
    for metric in ("forward_kl", "reverse_kl", "teacher_student_gap", "student_entropy", "teacher_entropy", "overlap"):
        parts = [logs[f"distill/{n}/share"] * logs[f"distill/{n}/{metric}"] for n in "ab"]
        assert logs[f"distill/{metric}"] == pytest.approx(sum(parts), rel=1e-6)
    assert [key for key in logs if key.startswith("distill/none/")] == ["distill/none/share"]
    assert logs["distill/none/share"] == 0


def test_metrics_of_each_teacher_under_the_policy_gradient(tmp_path):
    arguments = {"train_dataset": routed_prompts()}
    step = take_step(tmp_path, teacher={"a": wide(), "b": topk_teacher}, arguments=arguments, **PG)
    (inputs,), logs = step.batches, step.logs
    s = full_logprobs(student(), inputs).detach()
    log_p = {"a": sampled(full_logprobs(wide(), inputs).detach(), inputs), "b": torch.tensor(0.6).double().log()}
    for name, theirs in log_p.items():
        gap = theirs - sampled(s, inputs)
        for metric, value in {"teacher_student_gap": gap, "reverse_kl": gap.exp() - 1 - gap}.items():
            expected, share = means(value, inputs, name)
            assert logs[f"distill/{name}/{metric}"] == pytest.approx(expected, rel=1e-5)
        assert logs[f"distill/{name}/share"] == pytest.approx(share)


def test_what_one_teacher_does_not_tell_is_a_mean_over_the_others(tmp_path):
    def silent(batch):
        answer = topk_teacher(batch)
        return TeacherScores(topk_ids=answer.topk_ids, topk_logprobs=answer.topk_logprobs)

    step = take_step(tmp_path, teacher={"a": wide(), "b": silent}, arguments={"train_dataset": routed_prompts()})
    logs = step.logs
    assert "distill/b/teacher_student_gap" not in logs
    assert logs["distill/teacher_student_gap"] == logs["distill/a/teacher_student_gap"]


def test_a_teacher_of_teachers_has_their_names():
    teacher = RoutedTeacher({"a": topk_teacher, "b": topk_teacher})
    assert teacher.name == "{a: topk_teacher, b: topk_teacher}"
    assert teacher.names == ["a", "b"]
