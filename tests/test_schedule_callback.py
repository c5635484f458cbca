"""Scheduled fields reach what they move, and a resumed run has the same numbers."""

import itertools
import json
import math
import os
import sys

import pytest
import torch
from datasets import Dataset
from processes import leave, run_two
from tiny import make_model, make_prompts, make_tokenizer, trainer_config
from transformers import TrainerCallback
from two_processes import GLOBAL_BATCH, PROMPTS, make_student, make_teacher, rollouts

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer

PG = {"credit": "policy_gradient", "support": "sampled"}
LINE = {"type": "linear", "start": 0.0, "end": 1.0}
TIMES = ("runtime", "per_second", "step_time", "total_flos", "train_loss")


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def make_trainer(output_dir, schedules, callbacks=None, prompts=None, teacher=None, **fields):
    return OnPolicyDistillTrainer(
        model=make_model(),
        teacher_model=teacher or make_model(hidden_size=24, seed=1),
        args=OnPolicyDistillConfig(**trainer_config(output_dir, max_steps=4, schedules=schedules) | fields),
        train_dataset=prompts or make_prompts(),
        eval_dataset=make_prompts(4),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def one_prompt():
    return Dataset.from_dict({"prompt": ["abc"] * 16})


# Values reach what they move


def test_the_loss_has_the_scheduled_coefficient(tmp_path):
    """With a learning rate of 0 all runs visit the same completions: the loss is linear in the coefficient."""
    scheduled = make_trainer(tmp_path, {"distill_coef": LINE}, learning_rate=0.0)
    scheduled.train()
    assert logged(scheduled, "schedule/distill_coef") == [0.0, 0.25, 0.5, 0.75]
    plain = make_trainer(tmp_path, {"discount": 0.0}, learning_rate=0.0)
    plain.train()
    expected = [loss * coef for loss, coef in zip(logged(plain, "loss"), (0.0, 0.25, 0.5, 0.75), strict=True)]
    assert logged(scheduled, "loss") == pytest.approx(expected, rel=1e-6)
    assert logged(scheduled, "distill/loss") == pytest.approx(logged(plain, "distill/loss"), rel=1e-6)
    gradients = [norm * coef for norm, coef in zip(logged(plain, "grad_norm"), (0.0, 0.25, 0.5, 0.75), strict=True)]
    assert logged(scheduled, "grad_norm") == pytest.approx(gradients, rel=1e-5)


def test_a_number_inside_a_dict_and_a_second_field(tmp_path):
    """Each step's loss is that of a run with this step's numbers."""
    schedules = {
        "divergence_kwargs.beta": {"type": "piecewise", "points": [[0, 0.2], [1, 0.8]], "unit": "steps"},
        "distill_coef": {"type": "linear", "start": 1.0, "end": 3.0},
    }
    fields = {"divergence": "generalized_jsd", "max_steps": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, schedules, **fields)
    trainer.train()
    assert logged(trainer, "schedule/divergence_kwargs.beta") == [0.2, 0.8]
    assert trainer.args.divergence_kwargs == {"beta": 0.8}
    for step, (beta, coef) in enumerate([(0.2, 1.0), (0.8, 2.0)]):
        alone = make_trainer(
            tmp_path, {"discount": 0.0}, divergence_kwargs={"beta": beta}, distill_coef=coef, **fields
        )
        alone.train()
        assert logged(trainer, "loss")[step] == pytest.approx(logged(alone, "loss")[step], rel=1e-6)


def test_completions_are_generated_with_the_steps_values(tmp_path):
    """`on_step_begin` comes before the step's first batch is generated."""
    schedules = {
        "max_completion_length": {"type": "linear", "start": 2.0, "end": 10.0},
        "top_k": {"type": "piecewise", "points": [[0, 1], [2, 0]], "interpolate": False, "unit": "steps"},
    }
    trainer = make_trainer(tmp_path, schedules, prompts=one_prompt(), learning_rate=0.0)
    seen = []
    generate = trainer._generate_and_score_completions

    def note(inputs):
        batch = generate(inputs)
        seen.append(batch["completion_ids"])
        return batch

    trainer._generate_and_score_completions = note
    trainer.train()
    assert [ids.shape[1] for ids in seen] == [2, 4, 6, 8]
    assert logged(trainer, "schedule/max_completion_length") == [2, 4, 6, 8]
    greedy = [bool((ids == ids[:1]).all()) for ids in seen]  # all prompts are the same
    assert greedy == [True, True, False, False]


@pytest.mark.parametrize("credit", [{}, PG], ids=["direct", "policy gradient"])
def test_the_temperature_of_everything(tmp_path, credit):
    """Sampling, both models and GRPO's own log-probs follow: a run at one temperature from the start has the same."""
    fields = {**credit, "max_steps": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    scheduled = make_trainer(tmp_path, {"temperature": 0.6}, **fields)
    scheduled.train()
    assert logged(scheduled, "schedule/temperature") == [0.6, 0.6]
    plain = make_trainer(tmp_path, {"top_p": 1.0}, temperature=0.6, **fields)
    plain.train()
    for name in ("loss", "entropy", "grad_norm", "distill/reverse_kl"):
        assert logged(scheduled, name) == logged(plain, name), name


def test_grpo_copies_of_fields(tmp_path):
    def reward(completions, **kwargs):
        return [float(len(c)) for c in completions]

    model = make_model()
    model.save_pretrained(tmp_path / "model")
    ends = {
        "beta": (0.2, 0.1),
        "epsilon": (0.4, 0.2),
        "entropy_coef": (0.02, 0.01),
        "top_entropy_quantile": (1.0, 0.8),
        "delta": (4.0, 2.0),
        "temperature": (1.0, 0.5),
        "top_p": (1.0, 0.5),
        "repetition_penalty": (1.0, 1.1),
    }
    schedules = {name: {"type": "linear", "start": a, "end": b} for name, (a, b) in ends.items()}
    fields = {"max_steps": 2, "num_generations": 2, "beta": 0.5, "entropy_coef": 0.5, "schedules": schedules}
    args = OnPolicyDistillConfig(**trainer_config(tmp_path, **fields))
    trainer = OnPolicyDistillTrainer(
        model=str(tmp_path / "model"),
        teacher_model=make_model(hidden_size=24, seed=1),
        reward_funcs=reward,
        args=args,
        train_dataset=make_prompts(),
        processing_class=make_tokenizer(),
    )
    assert len(trainer._schedule._temperatures) == 2  # the student's and the reference model's
    trainer.train()
    now = {name: pytest.approx((a + b) / 2) for name, (a, b) in ends.items()}
    for name in ("beta", "entropy_coef", "top_entropy_quantile", "temperature", "top_p", "repetition_penalty"):
        assert getattr(trainer, name) == now[name] == getattr(trainer.args, name), name
    assert trainer.args.delta == now["delta"]
    assert trainer.epsilon_low == trainer.epsilon_high == now["epsilon"]
    assert args.beta == 0.5
    for name in ("temperature", "top_p", "repetition_penalty"):
        assert getattr(trainer.generation_config, name) == trainer.generation_kwargs[name] == now[name]
    assert [cell.cell_contents for cell in trainer._schedule._temperatures] == [now["temperature"]] * 2


def test_an_ema_teacher_follows_its_rate(tmp_path):
    schedules = {
        "teacher_sync_rate": {"type": "linear", "start": 1.0, "end": 0.5},
        "teacher_sync_steps": {"type": "linear", "start": 1.0, "end": 4.0},
    }
    trainer = make_trainer(tmp_path, schedules, teacher="self", teacher_sync="ema", max_steps=2)
    trainer.train()
    assert (trainer.teacher.rate, trainer.teacher.steps) == (0.75, 3)  # 2.5 is rounded up


def test_a_batch_keeps_the_values_it_was_generated_with(tmp_path):
    """Two optimizer steps are made of each batch; what concerns the loss alone moves in every step."""
    schedules = {
        "max_completion_length": {"type": "linear", "start": 2.0, "end": 10.0},
        "temperature": {"type": "linear", "start": 1.0, "end": 0.2},
        "distill_coef": LINE,
    }
    trainer = make_trainer(tmp_path, schedules, num_iterations=2)
    trainer.train()
    assert logged(trainer, "schedule/max_completion_length") == [2, 2, 6, 6]
    assert logged(trainer, "schedule/temperature") == pytest.approx([1.0, 1.0, 0.6, 0.6])
    assert logged(trainer, "schedule/distill_coef") == [0.0, 0.25, 0.5, 0.75]


def test_all_micro_batches_of_a_step_have_one_value(tmp_path):
    fields = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, {"distill_coef": LINE}, **fields)
    seen = []
    compute = trainer._compute_loss

    def note(model, inputs):
        seen.append(trainer.args.distill_coef)
        return compute(model, inputs)

    trainer._compute_loss = note
    trainer.train()
    assert seen == [0.0, 0.0, 0.5, 0.5]


# Metrics


def test_a_metric_is_that_of_each_step_however_rarely_it_is_logged(tmp_path):
    schedules = {"distill_coef": {"type": "taid", "start": 0.1, "alpha": 1.0, "momentum": 0.0}}
    often = make_trainer(tmp_path, schedules, max_steps=5)
    often.train()
    losses, values = logged(often, "distill/loss"), logged(often, "schedule/distill_coef")
    t, previous, expected = 0.1, None, [0.1]  # the course by hand
    for step, loss in enumerate(losses[:-1], start=1):
        if previous is not None:
            t += (1 - t) / (1 + math.exp((loss - previous) / previous))
        t, previous = max(t, 0.1 + 0.9 * step / 5), loss
        expected.append(t)
    assert values == pytest.approx(expected, rel=1e-9)
    assert values[2] > 0.1 + 0.9 * 2 / 5
    rarely = make_trainer(tmp_path, schedules, logging_steps=3, max_steps=5)
    rarely.train()
    assert len(logged(rarely, "distill/loss")) < len(losses) == 5
    assert logged(rarely, "schedule/distill_coef") == pytest.approx([values[2], values[4]], rel=1e-9)


def test_metrics_of_grpo_and_of_the_log(tmp_path):
    """All are above −1 in every step; grad_norm is only known when it is logged, after every other one."""
    fields = {"distill_coef": "entropy", "epsilon": "distill/student_entropy", "delta": "loss", "top_k": "grad_norm"}
    spec = {"type": "entropy_gated", "threshold": -1.0, "start": 2.0, "change": 1.0, "maximum": 9.0}
    schedules = {name: {**spec, "metric": metric} for name, metric in fields.items()}
    schedules["max_grad_norm"] = {**spec, "threshold": 1e9}
    trainer = make_trainer(tmp_path, schedules, logging_steps=2)
    trainer.train()
    for name in ("distill_coef", "epsilon", "delta"):
        assert logged(trainer, f"schedule/{name}") == [3.0, 5.0], name
    assert logged(trainer, "schedule/top_k") == [2.0, 3.0]
    assert logged(trainer, "schedule/max_grad_norm") == [2.0, 2.0]


def test_an_evaluation_metric(tmp_path):
    spec = {"type": "metric", "metric": "eval_loss", "by": 1.0, "start": 1.0, "change": 1.0, "maximum": 9.0}
    fields = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 5}
    trainer = make_trainer(tmp_path, {"distill_coef": spec}, **fields)
    losses = iter([1.0, 3.0, 2.0, 3.5])  # before the first step, after 2, 4 and 5
    evaluation = trainer.evaluation_loop

    def loop(*args, **kwargs):
        output = evaluation(*args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    trainer.evaluation_loop = loop
    trainer.train()
    assert logged(trainer, "schedule/distill_coef") == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert trainer._schedule.metrics["eval_loss"] == 3.5
    state = trainer._schedule.schedules["distill_coef"].state_dict()
    losses = iter([100.0])
    trainer.evaluate()  # after training: nobody's business
    assert trainer._schedule.schedules["distill_coef"].state_dict() == state


def test_an_unknown_metric_is_told(tmp_path):
    spec = {"type": "adakd", "metric": "distill/los"}
    trainer = make_trainer(tmp_path, {"distill_coef": spec}, max_steps=2)
    with pytest.warns(UserWarning, match=r"'distill/los', which this run has not measured.*'distill/loss'") as caught:
        trainer.train()
    assert len([w for w in caught if "distill/los'" in str(w.message)]) == 1


def test_what_a_function_is_told(tmp_path):
    seen = []

    def function(state):
        seen.append(state)
        return 1.0 + state.step

    trainer = make_trainer(tmp_path, {"distill_coef": function}, max_steps=3)
    trainer.train()
    losses, terms, last = logged(trainer, "loss"), logged(trainer, "distill/loss"), seen[-1]
    assert last.metrics["distill/reverse_kl"] == logged(trainer, "distill/reverse_kl")[1]

    # What is followed is of the last step, whatever the log line before it was a mean of
    follows = {
        "type": "entropy_gated",
        "metric": "distill/loss",
        "threshold": 0,
        "start": 1,
        "change": 1,
        "maximum": 9,
    }
    schedules = {"distill_coef": function, "epsilon": follows}
    trainer = make_trainer(tmp_path, schedules, max_steps=3, logging_steps=2)
    seen.clear()
    trainer.train()
    assert [s.step for s in seen] == [0, 1, 2]
    assert [s.max_steps for s in seen] == [3] * 3
    assert [s.value for s in seen] == [1.0, 1.0, 2.0]
    assert seen[0].metrics == {}
    assert seen[0].loss is None
    assert [s.metrics["distill/loss"] for s in seen[1:]] == pytest.approx(terms[:2], rel=1e-9)
    assert [s.loss for s in seen[1:]] == pytest.approx(losses[:2], rel=1e-6)


def test_a_function_that_leaves_the_range_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, {"distill_coef": lambda s: -1.0 if s.metrics else 1.0})
    with pytest.raises(ValueError, match="at step 1: distill_coef must be"):
        trainer.train()


# Files and configurations


def test_the_callers_configuration_and_what_is_saved_have_the_base_values(tmp_path):
    schedules = {"distill_coef": lambda state: 2.0, "divergence_kwargs.beta": {**LINE, "start": 0.5}}
    fields = {"divergence": "generalized_jsd", "divergence_kwargs": {"beta": 0.5}, "save_strategy": "steps"}
    trainer = make_trainer(tmp_path, schedules, save_steps=1, max_steps=2, **fields)
    given = trainer.args
    trainer.train()
    trainer.save_model(tmp_path / "end")
    assert (trainer.args.distill_coef, trainer.args.divergence_kwargs) == (2.0, {"beta": 0.75})
    for folder in ("checkpoint-1", "checkpoint-2", "end"):
        saved = torch.load(tmp_path / folder / "training_args.bin", weights_only=False)
        assert (saved.distill_coef, saved.divergence_kwargs) == (1.0, {"beta": 0.5}), folder
        assert saved.schedules["divergence_kwargs.beta"] == {**LINE, "start": 0.5}
        assert saved.schedules["distill_coef"].endswith("<lambda>")
        json.loads(saved.to_json_string())
    assert given is trainer.args


def test_a_configuration_serves_two_trainers(tmp_path):
    args = OnPolicyDistillConfig(**trainer_config(tmp_path, max_steps=2, schedules={"distill_coef": LINE}))
    losses = []
    for _ in range(2):
        trainer = OnPolicyDistillTrainer(
            model=make_model(),
            teacher_model=make_model(hidden_size=24, seed=1),
            args=args,
            train_dataset=make_prompts(),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        assert trainer.args.distill_coef == 0.5
        assert args.distill_coef == 1.0
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_a_second_training_starts_anew(tmp_path):
    schedules = {
        "distill_coef": {"type": "entropy_gated", "threshold": 0.0, "start": 1.0, "change": 1.0, "maximum": 9.0},
        "max_completion_length": lambda s: s.value + 1,
    }
    trainer = make_trainer(tmp_path, schedules, max_steps=2, num_iterations=1)
    for _ in range(2):
        trainer.train()
        assert trainer._schedule.values["distill_coef"] == 2.0
    assert logged(trainer, "schedule/distill_coef") == [1.0, 2.0]  # the log of the second
    assert trainer._schedule.values["max_completion_length"] == 10  # from 8, once more


# Resuming


def without_times(history):
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in history]


class Doubling:
    def __init__(self, now=0.25):
        self.now = now

    def __call__(self, state):
        self.now *= 2
        return self.now

    def state_dict(self):
        return {"now": self.now}

    def load_state_dict(self, state):
        self.now = state["now"]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"divergence": "generalized_jsd"}
    rises = {"type": "metric", "metric": "eval_loss", "start": 0.1, "change": 0.1, "maximum": 9.0}
    schedules = {
        "distill_coef": {"type": "taid", "start": 0.1, "alpha": 1.0, "momentum": 0.5},
        "max_completion_length": {"type": "cosine", "start": 4, "end": 12},
        "divergence_kwargs.beta": {"type": "adakd", "start": 0.9, "epsilon": 1e-4, "momentum": 0.5, "warmup": 0.0},
        "delta": lambda s: s.value * 0.5 + 1.0 + (s.loss or 0.0),
        "epsilon": rises,
    }

    def make(folder, **kwargs):
        made = {**schedules, "max_grad_norm": Doubling()}
        return make_trainer(tmp_path / folder, made, delta=4.0, **fields, **kwargs)

    whole = make("whole")
    whole.train()
    stopped = make("stopped", callbacks=[StopAfter(2)])
    stopped.train()
    assert stopped.state.global_step == 2

    torch.manual_seed(99)
    resumed = make("stopped")
    resumed.train(resume_from_checkpoint=True)
    for name in (*schedules, "max_grad_norm"):
        values = logged(whole, f"schedule/{name}")
        assert logged(resumed, f"schedule/{name}") == values, name
        assert values[2] != values[0] or values[3] != values[0], name
    assert without_times(resumed.state.log_history) == without_times(whole.state.log_history)
    theirs = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_a_checkpoint_made_inside_a_step_resumes_in_that_step(tmp_path):
    """As after a teacher's failure: the step is made again, and its values once more."""
    schedules = {"distill_coef": {"type": "taid", "start": 0.1, "alpha": 1.0, "momentum": 0.5}}
    whole = make_trainer(tmp_path / "whole", schedules)
    whole.train()

    failing = make_trainer(tmp_path / "failing", schedules)
    compute, calls = failing._compute_loss, itertools.count()

    def fail(model, inputs):
        if next(calls) == 2:
            failing._save_checkpoint(failing.model, trial=None)
            raise KeyboardInterrupt
        return compute(model, inputs)

    failing._compute_loss = fail
    with pytest.raises(KeyboardInterrupt):
        failing.train()
    resumed = make_trainer(tmp_path / "failing", schedules)
    resumed.train(resume_from_checkpoint=True)
    values = logged(whole, "schedule/distill_coef")
    assert logged(resumed, "schedule/distill_coef")[:3] == values[:3]
    assert values[2] > 0.1 + 0.9 * 2 / 4


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, {"distill_coef": LINE}, max_steps=2, **fields).train()
    resumed = make_trainer(tmp_path, {"distill_coef": {"type": "taid"}}, **fields)
    with pytest.raises(ValueError, match=r"must hold the state of schedules\['distill_coef'\]|must be that of this"):
        resumed.train(resume_from_checkpoint=True)
    make_trainer(tmp_path, {"reward_coef": 1.0}, **fields).train(resume_from_checkpoint=True)  # needs nothing
    (tmp_path / "checkpoint-2" / "schedules.json").unlink()
    with pytest.raises(ValueError, match=r"must hold the state of schedules\['distill_coef'\]"):
        make_trainer(tmp_path, {"distill_coef": {"type": "taid"}}, **fields).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


# Several processes


def train_on_fixed_rollouts(output_dir, world=1):
    """Completions that depend on their prompts alone, with schedules that follow what they measure."""
    rises = {"change": 1.0, "maximum": 9.0}
    schedules = {
        "distill_coef": {"type": "taid", "start": 0.1, "alpha": 1.0, "momentum": 0.5},
        "delta": lambda state: 2.0 + (state.loss or 0.0),
        "epsilon": {"type": "metric", "metric": "loss", "start": 0.1, **rises},
        "max_grad_norm": {"type": "entropy_gated", "metric": "entropy", "threshold": 2.9, "start": 1.0, **rises},
    }
    fields = {"max_steps": 4, "per_device_train_batch_size": GLOBAL_BATCH // world, "optim": "sgd"}
    args = OnPolicyDistillConfig(
        **trainer_config(output_dir, shuffle_dataset=False, delta=4.0, schedules=schedules, **fields)
    )
    trainer = OnPolicyDistillTrainer(
        model=make_student(),
        teacher_model=make_teacher(),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
        processing_class=make_tokenizer(),
        rollout_func=rollouts,
    )
    assert trainer.accelerator.num_processes == world
    trainer.train()
    return [{k: v for k, v in line.items() if "schedule" in k or k == "loss"} for line in trainer.state.log_history]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_have_the_values_of_one(tmp_path):
    run_two(__file__, tmp_path)
    alone = train_on_fixed_rollouts(tmp_path)
    for rank in range(2):
        with open(tmp_path / f"{rank}.json") as f:
            lines = json.load(f)
        assert len(lines) == len(alone)
        for line, expected in zip(lines, alone, strict=True):
            assert line == pytest.approx(expected, rel=1e-6)
    for name in alone[0].keys() - {"loss"}:
        assert alone[3][name] != alone[1][name], name


if __name__ == "__main__":
    torch.set_num_threads(1)
    history = train_on_fixed_rollouts(sys.argv[1], world=2)
    with open(os.path.join(sys.argv[1], f"{os.environ['RANK']}.json"), "w") as result:
        json.dump(history, result)
    leave()
