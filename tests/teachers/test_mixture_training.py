"""Students of several teachers at once: losses, weights and metrics are those of full logits mixed by hand."""

import functools

import pytest
import steps
import torch
from mixture_training import (
    WEIGHTS,
    advantage_of_mixture,
    assert_as_by_hand,
    mixed_value,
    of_model,
    of_topk,
    other_topk_teacher,
)
from routed_runs import is_of, routed_prompts, routed_value, topk_teacher, wide, wider
from self_runs import PG, adapted, run, trained
from steps import assert_same_gradient, full_logprobs, gradient_of, loss_mask, reduce, sampled, student, take_step

from trl_opd.teachers import MixtureTeacher, TeacherScoreError

MIXTURES = ("arithmetic", "geometric", "loss_sum")
DIVERGENCES = {
    "forward_kl": (steps.forward_kl, {}),
    "reverse_kl": (steps.reverse_kl, {}),
    "generalized_jsd": (functools.partial(steps.jsd, beta=0.3), {"divergence_kwargs": {"beta": 0.3}}),
}


def two_models(mixture="arithmetic"):
    return MixtureTeacher([wide(), wider()], WEIGHTS, mixture)


def by_hand_of(mixture, divergence=steps.reverse_kl):
    return mixed_value([of_model(wide()), of_model(wider())], mixture, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_student_learns_from_the_mixture(tmp_path, mixture, divergence):
    formula, fields = DIVERGENCES[divergence]
    assert_as_by_hand(tmp_path, two_models(mixture), by_hand_of(mixture, formula), divergence=divergence, **fields)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_adapter_learns_from_it(tmp_path, mixture):
    assert_as_by_hand(tmp_path, two_models(mixture), by_hand_of(mixture), adapted)


TOPK_PAIRS = {
    "model and top-k": (lambda: [wide(), topk_teacher], lambda: [of_model(wide()), of_topk(topk_teacher)]),
    "top-k and model": (lambda: [topk_teacher, wide()], lambda: [of_topk(topk_teacher), of_model(wide())]),
    "two top-k": (
        lambda: [topk_teacher, other_topk_teacher],
        lambda: [of_topk(topk_teacher), of_topk(other_topk_teacher)],
    ),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("pair", TOPK_PAIRS)
def test_lists_are_summed_up(tmp_path, pair, divergence):
    ours, theirs = TOPK_PAIRS[pair]
    formula, fields = DIVERGENCES[divergence]
    teacher = MixtureTeacher(ours(), WEIGHTS, "loss_sum")
    value = mixed_value(theirs(), "loss_sum", formula)
    assert_as_by_hand(tmp_path, teacher, value, divergence=divergence, **fields)


@pytest.mark.parametrize("second", ["model", "top-k"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_sampled_tokens(tmp_path, mixture, second):
    members = [wide(), wider() if second == "model" else other_topk_teacher]
    assert_as_by_hand(
        tmp_path, MixtureTeacher(members, WEIGHTS, mixture), advantage_of_mixture(members, mixture), **PG
    )


CIRCUMSTANCES = {
    "two steps per generation, shuffled": {"steps_per_generation": 2, "shuffle_dataset": True},
    "two iterations": {"num_iterations": 2},
    "four generations": {"num_generations": 4, "per_device_train_batch_size": 8},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.parametrize("fields", CIRCUMSTANCES.values(), ids=CIRCUMSTANCES.keys())
@pytest.mark.parametrize("kind", ["arithmetic", "model and top-k", "two top-k", "sampled"])
def test_however_the_samples_come(tmp_path, kind, fields):
    if kind == "sampled":
        members = [wide(), other_topk_teacher]
        teacher, value = MixtureTeacher(members, WEIGHTS, "loss_sum"), advantage_of_mixture(members, "loss_sum")
        fields = fields | PG
    elif kind == "arithmetic":
        teacher, value = two_models(), by_hand_of("arithmetic")
    else:
        ours, theirs = TOPK_PAIRS[kind]
        teacher = MixtureTeacher(ours(), WEIGHTS, "loss_sum")
        value = mixed_value(theirs(), "loss_sum", steps.reverse_kl)
    assert_as_by_hand(tmp_path, teacher, value, **fields)


def reward(completions, **kwargs):
    return [len(completion) + 0.3 * completion.count("e") for completion in completions]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_beside_rewards_the_gradient_is_the_sum(tmp_path, mixture):
    arguments = {"reward_funcs": reward}
    both = take_step(tmp_path, teacher=two_models(mixture), distill_coef=0.7, num_generations=2, arguments=arguments)
    alone = take_step(tmp_path, grpo=True, num_generations=2, arguments=arguments)
    (inputs,) = both.batches
    assert torch.equal(inputs["completion_ids"], alone.batches[0]["completion_ids"])
    model = student()
    value = by_hand_of(mixture)(model, inputs)
    gradient = gradient_of(model, 0.7 * reduce([value], [loss_mask(inputs)], "dapo"))
    assert_same_gradient(both.gradient, {name: gradient[name] + g for name, g in alone.gradient.items()})


@pytest.mark.parametrize("mixture", MIXTURES)
def test_metrics_are_those_of_the_mixture(tmp_path, mixture):
    step = take_step(tmp_path, teacher=two_models(mixture))
    (inputs,), logs = step.batches, step.logs
    s = full_logprobs(student(), inputs).detach()
    models = [of_model(wide()), of_model(wider())]

    def mean(per_token):
        value = mixed_value(models, mixture, per_token)(student(), inputs).detach()
        return ((value * loss_mask(inputs)).sum() / loss_mask(inputs).sum()).item()

    expected = {
        "loss": mean(steps.reverse_kl),
        "reverse_kl": mean(steps.reverse_kl),
        "forward_kl": mean(steps.forward_kl),
        "student_entropy": mean(lambda s, t: -(s.exp() * s).sum(-1)),
        "teacher_entropy": mean(lambda s, t: -(t.exp() * t).sum(-1)),
        "teacher_student_gap": mean(lambda s, t: sampled(t - s, inputs)),
    }
    assert s.dtype == torch.float64
    for name, value in expected.items():
        assert logs[f"distill/{name}"] == pytest.approx(value, rel=1e-5), name
    assert 0 < logs["distill/overlap"] < 1


def final_weights(tmp_path, teacher, **fields):
    trainer, _ = run(tmp_path, student(), teacher=teacher, **{"max_steps": 3, **fields})
    return trained(trainer.model)


@pytest.mark.parametrize("fields", [{}, PG], ids=["direct", "policy gradient"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_equal_teachers_are_one(tmp_path, mixture, fields):
    one = final_weights(tmp_path, wide(), **fields)
    mixed = final_weights(tmp_path, MixtureTeacher([wide(), wide(), wide()], [0.2, 0.5, 0.3], mixture), **fields)
    for name, weight in one.items():
        torch.testing.assert_close(mixed[name], weight, rtol=0, atol=1e-6)


def test_lists_cannot_be_mixed_otherwise_and_the_first_batch_says_so(tmp_path):
    trainer = steps.build(tmp_path, teacher=MixtureTeacher([wide(), other_topk_teacher]))
    match = r"\['other_topk_teacher'\].*hidden_states.*mixture='loss_sum'.*No step was taken.*checkpoint of step 0"
    with pytest.raises(TeacherScoreError, match=match):
        trainer.train()
    assert (tmp_path / "checkpoint-0" / "model.safetensors").exists()


def test_a_geometric_mixture_has_no_discounted_advantage(tmp_path):
    with pytest.raises(ValueError, match="discount must be 0"):
        steps.build(tmp_path, teacher=two_models("geometric"), discount=0.9, **PG)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_within_a_dict(tmp_path, mixture):
    teacher = {"a": two_models(mixture), "b": wide()}
    value = routed_value({"a": by_hand_of(mixture), "b": mixed_value([of_model(wide())], mixture, steps.reverse_kl)})
    _, events = assert_as_by_hand(tmp_path, teacher, value, prompts=routed_prompts)
    assert 0 < int(is_of("a", events[0].inputs).sum()) < 4


def test_a_dict_of_lists_and_models(tmp_path):
    ours, theirs = TOPK_PAIRS["model and top-k"]
    teacher = {"a": MixtureTeacher(ours(), WEIGHTS, "loss_sum"), "b": topk_teacher}
    value = routed_value(
        {
            "a": mixed_value(theirs(), "loss_sum", steps.reverse_kl),
            "b": mixed_value([of_topk(topk_teacher)], "loss_sum", steps.reverse_kl),
        }
    )
    assert_as_by_hand(tmp_path, teacher, value, prompts=routed_prompts, steps_per_generation=2)
    teacher = {"a": MixtureTeacher([wide(), topk_teacher], WEIGHTS), "b": wider()}
    value = routed_value(
        {
            "a": advantage_of_mixture([wide(), topk_teacher], "arithmetic"),
            "b": advantage_of_mixture([wider()], "arithmetic"),
        }
    )
    assert_as_by_hand(tmp_path, teacher, value, prompts=routed_prompts, **PG)
