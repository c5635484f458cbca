"""A teacher with prompts of its own: losses, gradients and weights are those of each sample scored alone."""

import copy

import pytest
import torch
from alone import (
    TEACHER_PROMPTS,
    bucketed_reverse_kl,
    ids_of,
    logprobs_alone,
    loss_alone,
    make_gpt2,
    make_rows,
    policy_gradient,
    reverse_kl,
    samples,
    train_one_step,
)
from peft import LoraConfig, get_peft_model
from steps import assert_same_gradient, build, gradient_of, record, student
from tiny import make_model

from trl_opd.collators import TeacherScores

SAMPLED = {"credit": "policy_gradient", "support": "sampled"}


def qwen():
    return make_model(hidden_size=24, seed=1).double()


def lora_student():
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(student(), config, autocast_adapter_dtype=False)


class AloneTeacher:
    """Answers at generation time with the likeliest entries of a model, each sequence alone; keeps its questions."""

    def __init__(self, k=5):
        self.model, self.k, self.questions = qwen(), k, []

    def __call__(self, batch):
        self.questions.append(batch)
        shape = batch.completion_ids.shape
        scores = TeacherScores(
            topk_ids=torch.full((*shape, self.k), -1),
            topk_logprobs=torch.zeros(*shape, self.k, dtype=torch.float64),
            sampled_logprobs=torch.zeros(*shape, dtype=torch.float64),
        )
        for i, (prompt, completion) in enumerate(batch.sequences()):
            if not completion:
                continue
            logprobs, n = logprobs_alone(self.model, prompt, completion), len(completion)
            top = logprobs.topk(self.k)
            scores.topk_ids[i, :n], scores.topk_logprobs[i, :n] = top.indices, top.values
            scores.sampled_logprobs[i, :n] = logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        return scores


def score_of(model, adapter=True):
    def score(prompt, completion):
        if adapter:
            return logprobs_alone(model, prompt, completion)
        with model.disable_adapter():
            return logprobs_alone(model, prompt, completion)

    return score


def truth_of(name):
    """Of a teacher: the `teacher=` argument, the student's model, and its log-probs for a sequence alone."""
    if name == "base":
        return "base", lora_student, score_of(lora_student(), adapter=False)
    if name == "self":
        return "self", student, score_of(student())
    if name == "callable":
        return AloneTeacher(), student, score_of(qwen())
    make = {"local": qwen, "absolute positions": make_gpt2}[name]
    return make(), student, score_of(make())


TEACHERS = ["local", "absolute positions", "base", "self", "callable"]


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
@pytest.mark.parametrize("name", TEACHERS)
def test_loss_gradient_and_weights_are_those_of_each_sample_alone(tmp_path, name, credit):
    teacher, make_student, score = truth_of(name)
    step = train_one_step(tmp_path, teacher=teacher, model=make_student(), **credit)
    rows = [sample for inputs in step.batches for sample in samples(inputs)]
    assert len(rows) == 8
    assert len({len(row.completion) for row in rows}) > 2
    assert len({len(row.teacher_prompt) - len(row.prompt) for row in rows}) > 2
    model = make_student()
    gap = policy_gradient if credit else bucketed_reverse_kl(5) if name == "callable" else reverse_kl
    loss = loss_alone(model, score, rows, gap)
    # RMSNorm computes in float32 in these models, and GRPO's own advantages are in float32
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-7)
    gradient = gradient_of(model, loss)
    assert_same_gradient(step.gradient, gradient, tolerance=2e-6)
    trained = dict(step.trainer.model.named_parameters())
    scale = max(g.abs().max().item() for g in gradient.values())
    for key, weight in model.named_parameters():
        if key in gradient:
            moved = (weight - trained[key]) / 0.1
            assert torch.allclose(moved, gradient[key], rtol=0, atol=2e-6 * scale), key


@pytest.mark.parametrize("name", ["local", "callable"])
def test_the_teacher_sees_its_prompts_and_the_students_completions(tmp_path, name):
    teacher = AloneTeacher() if name == "callable" else qwen()
    seen, students = [], []

    def watch(trainer):
        def hook(where):
            def keep(module, args, kwargs):
                ids, mask = kwargs["input_ids"], kwargs["attention_mask"].bool()
                if ids.shape == mask.shape:  # else it is a step of the generation
                    where.append([row[real].tolist() for row, real in zip(ids, mask, strict=True)])

            return keep

        if name == "local":
            trainer.teacher.model.model.register_forward_pre_hook(hook(seen), with_kwargs=True)
        trainer.model.model.register_forward_pre_hook(hook(students), with_kwargs=True)

    step = train_one_step(tmp_path, teacher=teacher, prepare=watch)
    expected = [[row.teacher_prompt + row.completion for row in samples(inputs)] for inputs in step.batches]
    ours = [[row.prompt + row.completion for row in samples(inputs)] for inputs in step.batches]
    assert students[-2:] == ours
    if name == "local":
        assert seen == expected
        return
    (question,) = teacher.questions  # in the order of the dataset's rows, before the batch is shuffled and split
    assert question.own_prompt
    asked = [prompt + completion for prompt, completion in question.sequences()]
    assert sorted(asked) == sorted(ids for batch in expected for ids in batch)
    for example, (prompt, _) in zip(question.examples, question.sequences(), strict=True):
        theirs = TEACHER_PROMPTS[example["prompt"]]
        assert prompt == ids_of(example["prompt"] if theirs is None else theirs)


def test_the_students_side_is_untouched(tmp_path):
    """Rollouts and the student's tensors are those of a run without the column."""
    plain, viewed = (
        train_one_step(tmp_path / str(i), teacher=qwen(), rows=make_rows(prompts))
        for i, prompts in enumerate((None, TEACHER_PROMPTS))
    )
    for inputs, expected in zip(viewed.batches, plain.batches, strict=True):
        assert inputs.keys() - expected.keys() == {"teacher_prompt_ids", "teacher_prompt_mask"}
        for key, value in expected.items():
            assert torch.equal(inputs[key], value) if isinstance(value, torch.Tensor) else inputs[key] == value, key
    assert viewed.loss.item() != pytest.approx(plain.loss.item(), rel=1e-2)


MANY = {
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "two steps per generation": {"steps_per_generation": 2, "max_steps": 4},
    "both, accumulated": {
        "steps_per_generation": 4,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
    },
    "two generations": {"num_generations": 2, "steps_per_generation": 2, "max_steps": 4},
}


@pytest.mark.parametrize("fields", MANY.values(), ids=MANY.keys())
@pytest.mark.parametrize("name", ["local", "callable", "self"])
def test_rows_stay_with_their_prompts_where_a_rollout_is_used_in_several_steps(tmp_path, name, fields):
    """The buffered batch is shuffled and split: each micro-batch's loss is that of its rows at the current weights."""
    teacher, _, score = truth_of(name)
    trainer = build(
        tmp_path,
        teacher=teacher,
        arguments={"train_dataset": make_rows()},
        **{"per_device_train_batch_size": 2, "learning_rate": 1e-2, **fields},
    )
    step, weights, compute_loss = record(trainer), [], trainer._compute_loss

    def keep(model, inputs):
        weights.append(copy.deepcopy(model.state_dict()))
        return compute_loss(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    window, gap = fields.get("steps_per_generation", 1), bucketed_reverse_kl(5) if name == "callable" else reverse_kl
    accumulation = fields.get("gradient_accumulation_steps", 1)
    assert len(step.batches) == 4 * accumulation
    for start in range(0, len(step.batches), window):
        batches = [samples(inputs) for inputs in step.batches[start : start + window]]
        tokens = sum(len(row.completion) for rows in batches for row in rows)
        for i, rows in enumerate(batches, start):
            model = student()
            model.load_state_dict(weights[i])
            with torch.no_grad():
                expected = loss_alone(model, score, rows, gap, tokens=tokens / window * accumulation)
            assert step.losses[i].item() == pytest.approx(expected.item(), rel=2e-6, abs=2e-7)
    if name == "callable":
        assert len(teacher.questions) == len(step.batches) // window // fields.get("num_iterations", 1)


def reward_length(completion_ids, teacher_prompt, **kwargs):
    """Reward functions see the column as they see any other."""
    assert all(prompt in TEACHER_PROMPTS.values() for prompt in teacher_prompt)
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
@pytest.mark.parametrize("name", ["local", "callable"])
def test_rewards_beside_it_are_those_of_grpo(tmp_path, name, credit):
    teacher, _, score = truth_of(name)
    fields = {"num_generations": 2, "reward_coef": 0.5, "distill_coef": 0.7, **credit}
    step = train_one_step(tmp_path, teacher=teacher, arguments={"reward_funcs": reward_length}, **fields)
    rows = [sample for inputs in step.batches for sample in samples(inputs)]
    assert any(row.advantage for row in rows)
    model = student()
    gap = policy_gradient if credit else bucketed_reverse_kl(5) if name == "callable" else reverse_kl
    loss = 0.7 * loss_alone(model, score, rows, gap)
    tokens = sum(len(row.completion) for row in rows)
    for row in rows:  # the advantages have their coefficient already
        ids = torch.tensor(row.completion)[:, None]
        logprobs = logprobs_alone(model, row.prompt, row.completion).gather(-1, ids)
        loss = loss - row.advantage * (logprobs - logprobs.detach() + 1).sum() / tokens
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-7)
    assert_same_gradient(step.gradient, gradient_of(model, loss), tolerance=2e-6)


SAME = {prompt: prompt for prompt in TEACHER_PROMPTS}


@pytest.mark.parametrize(
    ("name", "prompts", "credit"),
    [
        ("local", SAME, {}),
        ("local", dict.fromkeys(SAME), {}),
        ("local", SAME, SAMPLED),
        ("absolute positions", SAME, {}),
        ("callable", SAME, {}),
    ],
    ids=["local", "local, None", "local, policy gradient", "absolute positions", "callable"],
)
def test_the_students_prompts_as_the_teachers_are_bit_equal_to_no_column(tmp_path, name, prompts, credit):
    steps = [
        train_one_step(tmp_path / str(i), teacher=truth_of(name)[0], rows=make_rows(column), **credit)
        for i, column in enumerate((prompts, None))
    ]
    assert [loss.tolist() for loss in steps[0].losses] == [loss.tolist() for loss in steps[1].losses]
    expected = steps[1].trainer.model.state_dict()
    for key, weight in steps[0].trainer.model.state_dict().items():
        assert torch.equal(weight, expected[key]), key


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
@pytest.mark.parametrize(
    ("sync", "column"),
    [("frozen", SAME), ("frozen", None), ("ema", SAME), ("live", SAME)],
    ids=["frozen", "frozen, no column", "ema", "live"],
)
def test_a_student_that_teaches_itself_the_same_prompts_learns_nothing(tmp_path, sync, credit, column):
    step = train_one_step(tmp_path, teacher="self", teacher_sync=sync, rows=make_rows(column), max_steps=2, **credit)
    assert [loss.item() for loss in step.losses] == [0.0] * 4
    before = student().state_dict()
    for key, weight in step.trainer.model.state_dict().items():
        assert torch.equal(weight, before[key]), key
    assert all(not gradient.any() for gradient in step.gradient.values())


def test_the_column_survives_the_removal_of_unused_columns(tmp_path):
    step = train_one_step(tmp_path, teacher=qwen(), remove_unused_columns=True)
    rows = [sample for inputs in step.batches for sample in samples(inputs)]
    assert step.loss.item() == pytest.approx(loss_alone(student(), score_of(qwen()), rows).item(), rel=2e-6)


def test_an_evaluation_uses_the_column_of_its_own_dataset(tmp_path):
    step = train_one_step(
        tmp_path,
        teacher=qwen(),
        rows=make_rows(None),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=3,
        arguments={"eval_dataset": make_rows(num=6)},
    )
    evaluated = [samples(inputs) for inputs in step.batches[2:]]
    assert [len(rows) for rows in evaluated] == [3, 3]
    with torch.no_grad():
        losses = [loss_alone(step.trainer.model.eval(), score_of(qwen()), rows).item() for rows in evaluated]
    (logs,) = [line for line in step.trainer.state.log_history if "eval_loss" in line]
    assert logs["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    untouched = [sample for inputs in step.batches[:2] for sample in samples(inputs, SAME)]
    assert [loss.item() for loss in step.losses[2:]] == pytest.approx(losses, rel=2e-6)
    loss = loss_alone(student(), score_of(qwen()), untouched)
    assert step.losses[0].item() + step.losses[1].item() == pytest.approx(loss.item(), rel=2e-6)
