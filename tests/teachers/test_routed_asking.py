"""Whom a routed teacher loads and asks, when, and about which samples; and what it refuses."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from routed_runs import Recorder, against_topk, by_hand, routed_prompts, routed_value, topk_teacher, wide, wider
from self_runs import run, trained
from steps import build, reverse_kl, student
from tiny import make_tokenizer
from transformers import TrainerCallback

from trl_opd.teachers import RoutedTeacher, TeacherScoreError
from trl_opd.teachers import local as local_module


@pytest.fixture
def paths(tmp_path):
    """Two teachers on disk."""
    for name, make in {"wide": wide, "wider": wider}.items():
        make().save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return {"a": str(tmp_path / "wide"), "b": str(tmp_path / "wider")}


@pytest.fixture
def loaded(monkeypatch):
    """The paths that weights were loaded from."""
    seen = []
    load = local_module.create_model_from_path

    def note(path, **kwargs):
        seen.append(path)
        return load(path, **kwargs)

    monkeypatch.setattr(local_module, "create_model_from_path", note)
    return seen


class CountLoads(TrainerCallback):
    def __init__(self, loaded):
        self.loaded, self.after = loaded, []

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(len(self.loaded))


def one_after_the_other():
    first, then = routed_prompts(8, "a"), routed_prompts(24, "b")
    return Dataset.from_dict({key: [*first[key], *then[key]] for key in ("prompt", "teacher")})


def train(tmp_path, teachers, prompts=None, callbacks=None, **fields):
    arguments = {"train_dataset": prompts or routed_prompts(), "eval_dataset": None, "callbacks": callbacks}
    defaults = {"loss_type": "bnpo", "max_steps": 3, "shuffle_dataset": False}
    return run(tmp_path / "run", student(), teacher=teachers, arguments=arguments, **{**defaults, **fields})


def test_a_path_is_loaded_at_its_first_sample(tmp_path, paths, loaded):
    count = CountLoads(loaded)
    train(tmp_path, paths, one_after_the_other(), [count])
    assert count.after == [1, 1, 2]
    assert loaded == [paths["a"], paths["b"]]


def test_a_path_without_samples_is_never_loaded(tmp_path, paths, loaded):
    train(tmp_path, paths, routed_prompts(only="b"))
    assert loaded == [paths["b"]]


@pytest.mark.parametrize("credit", [{}, {"credit": "policy_gradient", "support": "sampled"}], ids=["direct", "pg"])
def test_paths_are_the_models_that_lie_there(tmp_path, paths, credit):
    ours, events = train(tmp_path, paths, **credit)
    theirs, others = train(tmp_path, {"a": wide(), "b": wider()}, **credit)
    for event, other in zip(events, others, strict=True):
        # Loading draws no random numbers, so the rollouts are the same
        assert torch.equal(event.inputs["completion_ids"], other.inputs["completion_ids"])
        assert event.loss == pytest.approx(other.loss, rel=1e-6)
    for name, weight in trained(ours.model).items():
        torch.testing.assert_close(weight, trained(theirs.model)[name], rtol=0, atol=1e-8)


def test_two_names_of_one_path_share_a_model(tmp_path, paths, loaded):
    trainer, _ = train(tmp_path, {"a": paths["a"], "b": paths["a"]})
    assert loaded == [paths["a"]]
    first, second = trainer.teacher.members
    assert first is second


def test_two_names_of_one_self_share_its_weights(tmp_path):
    trainer, _ = train(tmp_path, {"a": "self", "b": "self"})
    assert trainer.teacher.members[0] is trainer.teacher.members[1]


class Later(Recorder):
    """Answers when it is asked for the answer."""

    def __init__(self, asynchronous):
        super().__init__()
        self.asynchronous, self.collected = asynchronous, []

    def submit(self, batch):
        self.asked.append(batch)
        whole = topk_teacher(batch)
        teacher = self

        class Pending:
            def collect(self, rows, batch):
                teacher.collected.append((rows, batch))
                return whole.select(rows)

        return Pending()

    def __call__(self, batch):
        raise AssertionError("asked twice")


TIMES = {"called": Recorder, "waiting": lambda: Later(False), "asynchronous": lambda: Later(True)}


@pytest.mark.parametrize("fields", [{"num_iterations": 2}, {"gradient_accumulation_steps": 1}, {}], ids=str)
@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("beside", [lambda: wide(), lambda: topk_teacher], ids=["model", "callable"])
def test_each_is_asked_once_about_its_own_samples(tmp_path, kind, beside, fields):
    teacher, other = TIMES[kind](), beside()
    train(tmp_path, {"a": teacher, "b": other}, steps_per_generation=2, max_steps=4, **fields)
    generations = 4 // (2 * fields.get("num_iterations", 1))
    assert len(teacher.asked) == generations
    prompts = routed_prompts(32)
    ids = [(tuple(make_tokenizer()(row["prompt"])["input_ids"]), row["teacher"]) for row in prompts]
    for i, batch in enumerate(teacher.asked):
        expected = [prompt for prompt, name in ids[8 * i : 8 * i + 8] if name == "a"]
        assert [tuple(prompt) for prompt, _ in batch.sequences()] == expected
        assert [example["teacher"] for example in batch.examples] == ["a"] * len(expected)
    if kind == "called" or other is topk_teacher:
        return
    # The micro-batches are shuffled, and an answer belongs to the sequence that was asked about
    assert any(rows.tolist() != sorted(rows.tolist()) for rows, _ in teacher.collected)
    for rows, batch in teacher.collected:
        assert any(
            torch.equal(asked.completion_ids[rows], batch.completion_ids)
            for asked in teacher.asked
            if len(asked.completion_ids) > int(rows.max())
        )


@pytest.mark.parametrize("kind", TIMES)
def test_answers_come_back_to_the_right_samples(tmp_path, kind):
    """The scores depend on the sampled tokens, so that those of another sample would train something else."""
    value = against_topk(reverse_kl)
    fields = {"steps_per_generation": 2, "max_steps": 4}
    trainer, events = train(tmp_path, {"a": TIMES[kind](), "b": TIMES[kind]()}, **fields)
    losses, theta = by_hand(events, student(), routed_value({"a": value, "b": value}))
    assert [event.loss for event in events] == pytest.approx(losses, rel=1e-5)
    for name, weight in theta.items():
        torch.testing.assert_close(trained(trainer.model)[name], weight, rtol=0, atol=2e-6)


def test_it_is_asynchronous_if_all_that_answer_early_are():
    def asynchronous(*teachers):
        return RoutedTeacher(dict(zip("abc", teachers, strict=False))).asynchronous

    model = local_module.LocalTeacher(wide())
    assert asynchronous(Later(True), Later(True), model)
    assert not asynchronous(Later(True), Later(False))
    assert not asynchronous(Later(True), topk_teacher)
    assert not asynchronous(model, model)


REFUSED = {
    "unknown name": (
        {"teacher": ["matt", "code"] * 8},
        r"must name one of .*\['math', 'code'\], got \['matt'\].*'math'",
    ),
    "no name": ({"teacher": [None, "code"] * 8}, r"must name one of .*\['math', 'code'\], got \['None'\]"),
    "no column": ({}, r"train_dataset must have a column 'teacher' .* one of \['math', 'code'\]"),
}


@pytest.mark.parametrize(("columns", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_column_that_leads_nowhere_is_refused_before_weights_load(tmp_path, paths, loaded, columns, message):
    dataset = Dataset.from_dict({"prompt": ["abc", "x"] * 8, **columns})
    with pytest.raises(ValueError, match=message):
        build(tmp_path, teacher={"math": paths["a"], "code": paths["b"]}, arguments={"train_dataset": dataset})
    good = Dataset.from_dict({"prompt": ["abc"] * 8, "teacher": ["math"] * 8})
    for evaluated, name in ((dataset, "eval_dataset"), ({"first": dataset}, r"eval_dataset\['first'\]")):
        arguments = {"train_dataset": good, "eval_dataset": evaluated}
        with pytest.raises(ValueError, match=message.replace("train_dataset", name)):
            build(tmp_path, teacher={"math": paths["a"], "code": paths["b"]}, arguments=arguments)
    assert not loaded


def test_an_iterable_dataset_is_refused_when_the_sample_comes(tmp_path):
    def rows():
        for i in range(32):
            yield {"prompt": "abc", "teacher": "matt" if i == 6 else "math"}

    trainer = build(
        tmp_path,
        teacher={"math": wide(), "code": topk_teacher},
        max_steps=4,
        shuffle_dataset=False,
        arguments={"train_dataset": IterableDataset.from_generator(rows)},
    )
    with pytest.raises(TeacherScoreError, match=r"got 'matt'.*Did you mean 'math'\? .*A checkpoint of step 1"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({}, r"must have a teacher for each name, got the names \[\]"),
        ({1: topk_teacher}, r"must have a teacher for each name, got the names \[1\]"),
        ({"": topk_teacher}, "must have a teacher for each name"),
        ({"a": {"b": topk_teacher}}, r"teacher_model\['a'\] must not be a dict itself"),
        ({"a": RoutedTeacher({"b": topk_teacher})}, r"teacher_model\['a'\] must not be a dict itself"),
        ({"a": topk_teacher, "b": "/nowhere/at/all"}, "must be a model's folder .* '/nowhere/at/all'"),
    ],
)
def test_teachers_that_are_none_are_refused(tmp_path, teachers, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, teacher=teachers, arguments={"train_dataset": routed_prompts()})


def test_a_tokenizer_for_nobody_is_refused(tmp_path):
    arguments = {"train_dataset": routed_prompts(), "teacher_processing_class": {"c": make_tokenizer()}}
    with pytest.raises(ValueError, match=r"must be keyed by the teachers' names, got \['c'\]"):
        build(tmp_path, teacher={"a": topk_teacher, "b": topk_teacher}, arguments=arguments)


def test_a_failing_teacher_is_named(tmp_path):
    def failing(batch):
        raise ConnectionError("gone")

    trainer = build(tmp_path, teacher={"a": wide(), "b": failing}, arguments={"train_dataset": routed_prompts()})
    with pytest.raises(TeacherScoreError, match=r"failing.*ConnectionError\('gone'\)"):
        trainer.train()
