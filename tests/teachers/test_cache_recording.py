"""A teacher in front of a cache is asked everything once, and what it answered outlives the run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from caches import TEACHER, full_logprobs, make_rows
from datasets import Dataset
from tiny import make_model, make_prompts, make_tokenizer, trainer_config

import trl_opd
from trl_opd import LocalTeacher, OnPolicyDistillConfig, OnPolicyDistillTrainer, TeacherScores
from trl_opd.teachers import CachedTeacher, RecordingTeacher, SelfTeacher, TeacherScoreError
from trl_opd.teachers.cache import CacheReader, Question, prompt_hash
from trl_opd.teachers.keeping import make_question

FIELDS = {"support": "teacher_top_k", "support_size": 5, "seed": 3}


class Counting:
    """The top k of the teacher's logits; counts the sequences that it was asked about."""

    name = "counting"

    def __init__(self, k=5, fail_after=None):
        self.model, self.k, self.asked, self.fail_after = make_model(**TEACHER).double(), k, 0, fail_after

    def __call__(self, batch):
        self.asked += len(batch.input_ids)
        if self.fail_after is not None and self.asked > self.fail_after:
            os.kill(os.getpid(), signal.SIGKILL)
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logprobs = (logits[:, -batch.num_completion_tokens - 1 : -1] / batch.temperature).log_softmax(-1)
        sampled = logprobs.gather(-1, batch.completion_ids[..., None])[..., 0]
        if batch.support == "sampled":
            return sampled
        values, ids = logprobs.topk(self.k, -1)
        return TeacherScores(topk_ids=ids, topk_logprobs=values, sampled_logprobs=sampled)


class Late(Counting):
    """The same, asynchronously."""

    asynchronous = True

    def submit(self, batch):
        self.pending = batch
        return self

    def collect(self, rows, batch):
        return self(self.pending).select(rows)


def build(output_dir, teacher, dataset=None, **fields):
    return OnPolicyDistillTrainer(
        model=make_model().double(),
        teacher_model=teacher,
        args=OnPolicyDistillConfig(**trainer_config(output_dir, **{**FIELDS, **fields})),
        train_dataset=make_prompts() if dataset is None else dataset,
        processing_class=make_tokenizer(),
    )


def train(*args, **kwargs):
    trainer = build(*args, **kwargs)
    trainer.train()
    return trainer


def assert_same_weights(one, other, tolerance=0.0):
    theirs = other.model.state_dict()
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [Counting, Late])
@pytest.mark.parametrize(
    "fields", [{}, {"gradient_accumulation_steps": 2, "num_iterations": 2}], ids=["plain", "more"]
)
def test_recording_does_not_change_the_run(tmp_path, kind, fields):
    teacher = kind()
    recorded = train(tmp_path / "a", RecordingTeacher(teacher, tmp_path / "cache"), **fields)
    plain = train(tmp_path / "b", Counting(), **fields)
    assert_same_weights(recorded, plain, 1e-6)  # float32 of the teacher's float64 log-probs
    assert teacher.asked == len(CacheReader(tmp_path / "cache"))


def test_the_same_run_again_asks_nothing(tmp_path):
    first = train(tmp_path / "a", RecordingTeacher(Counting(), tmp_path / "cache"))
    files = sorted((tmp_path / "cache").glob("*.arrow"))
    again = Counting()
    second = train(tmp_path / "b", RecordingTeacher(again, tmp_path / "cache"))
    assert again.asked == 0
    assert sorted((tmp_path / "cache").glob("*.arrow")) == files
    assert_same_weights(first, second)


def test_recorded_rollouts_are_replayed_without_the_teacher(tmp_path):
    first = build(tmp_path / "a", RecordingTeacher(Counting(), tmp_path / "cache"))
    batches, compute = [], first._compute_loss
    first._compute_loss = lambda model, inputs: batches.append(inputs) or compute(model, inputs)
    first.train()
    rollouts = {
        tuple(ids[mask.bool()].tolist())
        for x in batches
        for ids, mask in zip(x["completion_ids"], x["completion_mask"], strict=True)
    }
    reader = CacheReader(tmp_path / "cache")
    prompts = list(make_prompts()["prompt"])
    ids = make_tokenizer()(text=prompts)["input_ids"]
    stored = [prompt for prompt, i in zip(prompts, ids, strict=True) if prompt_hash(i) in reader.prompts]
    second = build(
        tmp_path / "b", CachedTeacher(tmp_path / "cache"), Dataset.from_dict({"prompt": stored}), max_steps=6
    )
    batches.clear()
    compute_again = second._compute_loss
    second._compute_loss = lambda model, inputs: batches.append(inputs) or compute_again(model, inputs)
    second.train()
    replayed = {
        tuple(ids[mask.bool()].tolist())
        for x in batches
        for ids, mask in zip(x["completion_ids"], x["completion_mask"], strict=True)
    }
    assert replayed <= rollouts
    assert len(replayed) > 4
    assert second.state.global_step == 6


def test_a_teacher_of_hidden_states_is_reduced_to_its_top_k(tmp_path):
    recorded = train(
        tmp_path / "a", RecordingTeacher(LocalTeacher(make_model(**TEACHER).double()), tmp_path / "cache")
    )
    plain = train(tmp_path / "b", Counting())
    assert_same_weights(recorded, plain, 1e-6)
    reader, model = CacheReader(tmp_path / "cache"), make_model(**TEACHER).double()
    for keys in reader.prompts.values():
        for key in keys:
            row = reader[key]
            logprobs = full_logprobs(model, Question(row.prompt_ids.tolist(), row.completion_ids.tolist()))
            top = torch.from_numpy(logprobs).topk(5, -1)
            assert row.answer.topk_ids.tolist() == top.indices.tolist()
            torch.testing.assert_close(torch.tensor(row.answer.topk_logprobs), top.values.float(), rtol=0, atol=1e-6)


def test_sampled_log_probs_are_recorded_for_the_policy_gradient(tmp_path):
    fields = {"support": "sampled", "credit": "policy_gradient"}
    recorded = train(tmp_path / "a", RecordingTeacher(Counting(), tmp_path / "cache"), **fields)
    assert_same_weights(recorded, train(tmp_path / "b", Counting(), **fields), 1e-6)
    assert CacheReader(tmp_path / "cache").meta.support == "sampled"


def test_masked_tokens_are_stored_too(tmp_path):
    train(tmp_path / "a", RecordingTeacher(Counting(), tmp_path / "cache"), special_token_masking=["e", "o", "<eos>"])
    teacher = Counting()
    train(tmp_path / "b", RecordingTeacher(teacher, tmp_path / "cache"))
    reader, model = CacheReader(tmp_path / "cache"), make_model(**TEACHER).double()
    for keys in reader.prompts.values():
        row = reader[keys[0]]
        logprobs = full_logprobs(model, Question(row.prompt_ids.tolist(), row.completion_ids.tolist()))
        sampled = logprobs[range(len(row.completion_ids)), row.completion_ids]
        torch.testing.assert_close(torch.tensor(row.answer.sampled_logprobs), torch.tensor(sampled).float())


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import conftest
from test_cache_recording import Counting, RecordingTeacher, train
train({out!r}, RecordingTeacher(Counting(fail_after=8), {cache!r}))
"""


def test_a_killed_run_keeps_what_was_answered(tmp_path):
    here = Path(__file__).parent
    script = KILLED.format(
        tests=str(here.parent), here=str(here), out=str(tmp_path / "killed"), cache=str(tmp_path / "cache")
    )
    path = str(Path(trl_opd.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(CacheReader(tmp_path / "cache")) == 8
    teacher = Counting()
    resumed = train(tmp_path / "again", RecordingTeacher(teacher, tmp_path / "cache"))
    assert teacher.asked == 4  # the same seed: the first two of the three batches are the same
    assert_same_weights(resumed, train(tmp_path / "plain", Counting()), 1e-6)


def test_the_same_sample_twice_in_a_batch_is_asked_once(tmp_path):
    teacher = Counting()
    recording = RecordingTeacher(teacher, tmp_path / "cache")
    build(tmp_path / "a", recording)
    questions = [Question([7, 8], [9, 10]), Question([7, 8], [11]), Question([7, 8], [9, 10])]
    batch = make_question(questions, recording.reader.meta, torch.device("cpu"))
    scores = recording(batch)
    assert teacher.asked == 2
    assert torch.equal(scores.topk_ids[0], scores.topk_ids[2])
    assert torch.equal(recording(batch).topk_logprobs, scores.topk_logprobs)
    assert teacher.asked == 2


class Wrong(Counting):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def __call__(self, batch):
        return self.change(super().__call__(batch))


def with_nan(scores):
    scores.topk_logprobs[1, 0, 2] = torch.nan
    return scores


def too_few(scores):
    return TeacherScores(topk_ids=scores.topk_ids[..., :4], topk_logprobs=scores.topk_logprobs[..., :4])


@pytest.mark.parametrize(
    ("change", "message"), [(with_nan, "not finite: nan at completion token 0"), (too_few, "4 log-probs a token of 5")]
)
def test_a_wrong_answer_is_not_stored(tmp_path, change, message):
    trainer = build(tmp_path / "a", RecordingTeacher(Wrong(change), tmp_path / "cache"))
    with pytest.raises(TeacherScoreError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert len(CacheReader(tmp_path / "cache")) == 0


def test_answers_in_any_order_are_stored_with_the_largest_first(tmp_path):
    def reverse(scores):
        return TeacherScores(topk_ids=scores.topk_ids.flip(-1), topk_logprobs=scores.topk_logprobs.flip(-1))

    recorded = train(tmp_path / "a", RecordingTeacher(Wrong(reverse), tmp_path / "cache"))
    assert_same_weights(recorded, train(tmp_path / "b", Counting()), 1e-6)
    reader = CacheReader(tmp_path / "cache")
    for keys in reader.prompts.values():
        logprobs = reader[keys[0]].answer.topk_logprobs
        assert (logprobs[:, 1:] <= logprobs[:, :-1]).all()


def test_two_runs_may_record_into_one_cache(tmp_path):
    teachers = [Counting(), Counting()]
    trainers = [build(tmp_path / str(i), RecordingTeacher(t, tmp_path / "cache")) for i, t in enumerate(teachers)]
    for trainer in trainers:  # the second was made before the first had recorded
        torch.manual_seed(0)
        trainer.train()
    assert [teacher.asked for teacher in teachers] == [12, 0]
    assert_same_weights(*trainers)


def test_a_teacher_that_moves_and_another_teacher_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not change during the run, got 'self'"):
        RecordingTeacher(SelfTeacher("ema"), tmp_path / "cache")
    train(tmp_path / "a", RecordingTeacher(Counting(), tmp_path / "cache"), max_steps=1)
    other = Counting()
    other.name = "another"
    with pytest.raises(ValueError, match=r"holds other scores.*teacher='counting' there, 'another' now"):
        build(tmp_path / "b", RecordingTeacher(other, tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"holds other scores.*temperature=1.0 there, 0.5 now"):
        build(tmp_path / "c", RecordingTeacher(Counting(), tmp_path / "cache"), temperature=0.5)


def test_a_view_is_stored_under_the_students_prompt(tmp_path):
    rows = [{"prompt": row["prompt"], "teacher_prompt": f"hint {row['prompt']}"} for row in make_rows(4)]
    train(tmp_path / "a", RecordingTeacher(Counting(), tmp_path / "cache"), Dataset.from_list(rows), max_steps=1)
    reader, tokenizer = CacheReader(tmp_path / "cache"), make_tokenizer()
    for row in rows:
        (key,) = reader.prompts[prompt_hash(tokenizer(text=row["prompt"])["input_ids"])]
        assert reader[key].teacher_prompt_ids.tolist() == tokenizer(text=row["teacher_prompt"])["input_ids"]
    trainer = train(tmp_path / "b", CachedTeacher(tmp_path / "cache"), Dataset.from_list(rows), max_steps=2)
    assert trainer.state.global_step == 2
