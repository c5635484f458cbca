"""A student that teaches itself: nothing to learn from the same view, and from another one what a copy would teach."""

import pytest
import torch
from self_runs import PG, SGD, STUDENTS, adapted, by_hand, run, trained, weights_of
from steps import student, take_step
from textbook import CASES

from trl_opd.losses import DIVERGENCES
from trl_opd.teachers import LocalTeacher

OBJECTIVES = {name: {"divergence": name, "divergence_kwargs": kwargs} for name, (_, kwargs) in CASES.items()}
OBJECTIVES["policy gradient"] = PG


def assert_nothing_is_learnt(tmp_path, model, **fields):
    """No loss, no gradient, and not a bit of the weights moves."""
    start = {}

    def remember(trainer):
        start.update({name: w.clone() for name, w in trainer.model.state_dict().items()})

    defaults = {**SGD, "learning_rate": 1.0, "max_steps": 2}
    step = take_step(tmp_path, prepare=remember, teacher="self", model=model, **{**defaults, **fields})
    assert len(step.losses) >= 2 and all(loss.item() == 0.0 for loss in step.losses)
    assert step.gradient.keys() == trained(step.trainer.model).keys()
    assert not any(gradient.any() for gradient in step.gradient.values())
    for name, weight in step.trainer.model.state_dict().items():
        assert torch.equal(weight, start[name]), name


def test_the_objectives_are_all():
    assert DIVERGENCES.keys() == CASES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [student, adapted], ids=["full", "lora"])
@pytest.mark.parametrize("fields", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_the_same_view_teaches_exactly_nothing(tmp_path, fields, make, dtype):
    accumulation = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_generations": 2}
    assert_nothing_is_learnt(tmp_path, make().to(dtype), **accumulation, **fields)


CIRCUMSTANCES = {
    "ema": {"teacher_sync": "ema"},
    "every_n": {"teacher_sync": "every_n"},
    "every_n, before the first copy": {"teacher_sync": "every_n", "teacher_sync_steps": 3},
    "live": {"teacher_sync": "live"},
    "mixed precision": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "two steps per generation": {"steps_per_generation": 2, "max_steps": 4},
    "two iterations, policy gradient": {"num_iterations": 2, "max_steps": 4, **PG},
    "two steps per generation, policy gradient": {"steps_per_generation": 2, "max_steps": 4, **PG},
    "returns": {"discount": 0.9, **PG},
    "another temperature": {"temperature": 0.7, **PG},
}


@pytest.mark.parametrize("make", [student, adapted], ids=["full", "lora"])
@pytest.mark.parametrize("fields", CIRCUMSTANCES.values(), ids=CIRCUMSTANCES.keys())
def test_nor_does_it_in_other_circumstances(tmp_path, fields, make):
    assert_nothing_is_learnt(tmp_path, make().float(), **fields)


@pytest.mark.parametrize("fields", [{}, PG], ids=["direct", "policy gradient"])
def test_the_base_teaches_nothing_to_an_adapter_at_zero(tmp_path, fields):
    step = take_step(tmp_path, teacher="base", model=adapted(True).bfloat16(), **fields)
    assert step.loss.item() == 0.0
    assert not any(gradient.any() for gradient in step.gradient.values())


@pytest.mark.parametrize("make", [student, adapted], ids=["full", "lora"])
def test_live_weights_teach_nothing_that_a_reward_has_moved(tmp_path, make):
    step = take_step(
        tmp_path,
        teacher="self",
        model=make().float(),
        teacher_sync="live",
        num_generations=2,
        max_steps=3,
        arguments={"reward_funcs": lambda completions, **kwargs: [float(len(c)) for c in completions]},
    )
    lines = step.trainer.state.log_history[:3]
    assert any(line["grad_norm"] > 0 for line in lines)
    assert [line["distill/loss"] for line in lines] == [0.0] * 3


EMA = {"sync": "ema", "steps": 2, "rate": 0.4}
COPIES = {"sync": "every_n", "steps": 3}
CASES_OF_SYNC = [
    ({"sync": "frozen"}, "full"),
    ({"sync": "frozen"}, "lora"),
    ({"sync": "frozen"}, "lora and head"),
    ({"sync": "ema", "rate": 0.3}, "full"),
    ({"sync": "ema", "rate": 0.3}, "lora"),
    *((EMA, name) for name in STUDENTS),
    ({"sync": "every_n"}, "full"),
    *((COPIES, name) for name in ("full", "tied", "lora")),
    *(({"sync": "live"}, name) for name in STUDENTS),
]
MOVING = [(sync, name) for sync in ({"sync": "frozen"}, EMA, {"sync": "live"}) for name in ("full", "lora")]


def assert_as_by_hand(trainer, events, make, sync):
    losses, theta, theta_bar = by_hand(events, make, **sync)
    assert max(losses) > 1e-3
    assert [event.loss for event in events] == pytest.approx(losses, rel=1e-5)
    theirs = trained(trainer.model)
    assert theirs.keys() == theta.keys()
    for name, weight in theta.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    return theta, theta_bar


def sync_fields(sync="frozen", steps=1, rate=0.05):
    return {"teacher_sync": sync, "teacher_sync_steps": steps, "teacher_sync_rate": rate}


@pytest.mark.parametrize(("sync", "name"), CASES_OF_SYNC, ids=str)
def test_four_steps_are_those_of_two_models_by_hand(tmp_path, sync, name):
    make = STUDENTS[name]
    trainer, events = run(tmp_path, make(), **sync_fields(**sync))
    theta, theta_bar = assert_as_by_hand(trainer, events, make, sync)
    assert len(events) == 4
    moved = max((theta[name] - weight).abs().max() for name, weight in trained(make()).items())
    assert moved > 1e-2, "the student hardly moves: every teacher would do"
    if sync["sync"] == "live":
        return
    ours = weights_of(trainer)
    assert ours.keys() == theta_bar.keys()
    for name, weight in theta_bar.items():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sync", "name"), MOVING, ids=str)
def test_a_moving_teacher_answers_anew_when_a_batch_comes_again(tmp_path, sync, name):
    make = STUDENTS[name]
    trainer, events = run(tmp_path, make(), num_iterations=2, **sync_fields(**sync))
    assert torch.equal(events[0].inputs["completion_ids"], events[1].inputs["completion_ids"])
    assert_as_by_hand(trainer, events, make, sync)


@pytest.mark.parametrize(("sync", "name"), MOVING, ids=str)
def test_evaluation_uses_the_teacher_of_the_moment(tmp_path, sync, name):
    make = STUDENTS[name]
    trainer, events = run(tmp_path, make(), eval_strategy="steps", eval_steps=1, **sync_fields(**sync))
    assert [event.training for event in events] == [True, False] * 4
    assert_as_by_hand(trainer, events, make, sync)


def test_updates_are_counted_in_optimizer_steps(tmp_path):
    accumulated, _ = run(
        tmp_path, student(), gradient_accumulation_steps=2, max_steps=3, **sync_fields("every_n", steps=2)
    )
    # After three steps of two micro-batches the teacher is the student of step 2
    short, _ = run(tmp_path, student(), gradient_accumulation_steps=2, max_steps=2, **sync_fields("every_n", steps=2))
    for name, weight in trained(short.model).items():
        assert torch.equal(weights_of(accumulated)[name], weight)


@pytest.mark.parametrize("make", [student, adapted], ids=["full", "lora"])
def test_mixed_precision_uses_the_teachers_weights_for_the_teacher_alone(tmp_path, make):
    # Autocast remembers parameters that it has cast, by the parameter
    ours, events = run(tmp_path, make().float(), bf16=True)
    theirs, others = run(
        tmp_path, make().float(), bf16=True, arguments={"teacher_model": LocalTeacher(make().float())}
    )
    assert [event.loss for event in events] == [event.loss for event in others]
    for name, weight in trained(ours.model).items():
        assert torch.equal(trained(theirs.model)[name], weight)
