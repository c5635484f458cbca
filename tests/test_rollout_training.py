"""Off-policy completions in training: each run against the same by hand, or against one without them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from rollout_runs import (
    COMPLETIONS,
    EOS,
    EXPECTED,
    PROMPTS,
    TOKENIZER,
    X,
    build,
    ids_of,
    pairs,
    student,
    teacher,
    train,
    without_times,
)
from steps import check, forward_kl, record
from tiny import make_model, make_prompts
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from trl_opd.teachers import TeacherScoreError


def assert_same_run(one, other):
    assert without_times(one.state.log_history) == without_times(other.state.log_history)
    theirs = other.model.state_dict()
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


class NoSources:
    """What the trainer would be without sources."""

    def begin(self, rows):
        return rows

    def generate(self, prompt_ids, sample):
        return sample()

    def take_rewards(self):
        return None

    def mark(self, output):
        pass

    save_state = load_state = mark


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_generations": 2, "num_iterations": 2, "rewards": lambda completions, **_: [len(c) for c in completions]},
    ],
)
def test_a_run_of_the_student_alone_is_bit_equal_to_one_without_sources(tmp_path, fields):
    ours = train(tmp_path / "ours", student_fraction=1.0, **fields).trainer
    bare = build(tmp_path / "bare", **fields)
    bare._rollouts = NoSources()
    bare.train()
    assert not any(key.startswith("rollout/") for line in ours.state.log_history for key in line)
    assert_same_run(ours, bare)


def test_without_samples_of_the_student_it_is_supervised_distillation(tmp_path):
    """GKD with λ = 0: the forward KL on the dataset's completions, by hand in float64."""
    step = train(tmp_path, student_fraction=0.0, divergence="forward_kl", max_steps=1)
    (inputs,) = step.batches
    assert set(pairs(inputs)) <= EXPECTED and len(set(pairs(inputs))) > 2
    assert not inputs["on_policy"].any()
    check(step, forward_kl, model=student(), teacher=teacher())
    assert step.logs["rollout/student_share"] == 0


def test_conversations_are_completed_from_the_dataset(tmp_path):
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": COMPLETIONS[p]}] for p in PROMPTS]
    rows = Dataset.from_dict({"prompt": prompts, "completion": completions})
    step = train(tmp_path, rows=rows, student_fraction=0.0, max_steps=1, max_completion_length=12)
    ends = student().generation_config.eos_token_id
    rendered = [TOKENIZER.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    for prompt, completion in pairs(step.batches[0]):
        name = PROMPTS[rendered.index(list(prompt))]
        whole = [*ids_of(COMPLETIONS[name]), TOKENIZER.convert_tokens_to_ids("<|im_end|>")]
        end = next(i for i, token in enumerate(whole) if token in ends)
        assert list(completion) == whole[: end + 1]


def test_a_share_of_the_batches_is_the_students(tmp_path):
    step = train(tmp_path, student_fraction=0.5, max_steps=8)
    origins = [bool(inputs["on_policy"].all()) for inputs in step.batches]
    assert 0 < sum(origins) < 8
    for inputs, own in zip(step.batches, origins, strict=True):
        assert own == (not set(pairs(inputs)) <= EXPECTED) and own == bool(inputs["on_policy"].any())
    shares = [line["rollout/student_share"] for line in step.trainer.state.log_history if "loss" in line]
    assert shares == [float(own) for own in origins]
    assert [int(inputs["sampled_step"][0]) for inputs in step.batches] == list(range(8))


def test_evaluation_samples_from_the_student(tmp_path):
    trainer = build(tmp_path, student_fraction=0.0)
    seen = []
    generate = trainer._generate

    def spy(prompts):
        rollouts = generate(prompts)
        seen.append(rollouts[1])
        return rollouts

    trainer._generate = spy
    torch.manual_seed(3)
    trainer.evaluate()
    plain = build(tmp_path)
    plain.model.load_state_dict(trainer.model.state_dict())
    plain._generate, generate = spy, plain._generate
    torch.manual_seed(3)
    plain.evaluate()
    assert seen[0] == seen[1]


# Replay


REPLAY = {"student_fraction": 0.5, "replay_fraction": 0.5, "replay_size": 8, "num_generations": 2, "max_steps": 10}


def numbered(inputs):
    return [tuple(pairs(inputs)[i : i + 2]) for i in range(0, len(inputs["prompt_ids"]), 2)]


def test_replayed_batches_are_the_students_former_ones(tmp_path):
    step = train(tmp_path, **REPLAY)
    written_at, replays = {}, 0
    for now, inputs in enumerate(step.batches):
        assert inputs["on_policy"].all() or not inputs["on_policy"].any()
        for i, pair in enumerate(pairs(inputs)):
            if inputs["on_policy"][i]:
                written_at.setdefault(pair, set()).add(now)
                assert inputs["sampled_step"][i] == now
            else:
                replays += 1
                then = int(inputs["sampled_step"][i])
                assert then < now and then in written_at[pair]
    assert replays >= 8
    lines = [line for line in step.trainer.state.log_history if "loss" in line]
    for inputs, line in zip(step.batches, lines, strict=True):
        assert (
            line["rollout/replayed_share"] == 1 - line["rollout/student_share"] == float(not inputs["on_policy"].any())
        )
    assert lines[-1]["rollout/replay_size"] == 8  # of at least three batches of four


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    "fields",
    [REPLAY, {**REPLAY, "sample_weighting": "freshness"}, {"student_fraction": 0.5, "max_steps": 10}],
    ids=["replay", "drift", "dataset"],
)
def test_a_resumed_run_draws_as_the_uninterrupted_one(tmp_path, fields):
    fields = {**fields, "save_strategy": "steps", "save_steps": 5}
    whole = record(build(tmp_path / "whole", **fields))
    whole.trainer.train()
    stopped = build(tmp_path / "stopped", callbacks=[StopAfter(5)], **fields)
    stopped.train()
    torch.manual_seed(99)
    resumed = record(build(tmp_path / "stopped", **fields))
    resumed.trainer.train(resume_from_checkpoint=True)
    later = whole.batches[5:]
    assert 0 < sum(bool(inputs["on_policy"].any()) for inputs in later) < 5
    assert [pairs(inputs) for inputs in resumed.batches] == [pairs(inputs) for inputs in later]
    assert [x["sampled_step"].tolist() for x in resumed.batches] == [x["sampled_step"].tolist() for x in later]
    assert_same_run(resumed.trainer, whole.trainer)


def test_a_checkpoint_without_a_buffer_is_refused(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1}
    build(tmp_path, max_steps=1, **fields).train()
    with pytest.raises(ValueError, match=r"must hold replay_buffer_0\.pt to resume with replay_fraction"):
        build(tmp_path, **{**REPLAY, **fields}).train(resume_from_checkpoint=True)


def test_replayed_completions_know_the_logprobs_of_their_student(tmp_path):
    """f-OPD's drift compares with the student that sampled."""
    step = train(tmp_path, sample_weighting="freshness", learning_rate=0.05, **REPLAY)
    known = {}
    model = student()
    drifts = []
    for now, inputs in enumerate(step.batches):
        if inputs["on_policy"].all():
            assert "sampling_per_token_logps" not in inputs
            continue
        mask = inputs["completion_mask"].bool()
        sampler = inputs["sampling_per_token_logps"]
        for i, pair in enumerate(pairs(inputs)):
            row = sampler[i][mask[i]]
            if inputs["sampled_step"][i] == 0:  # of the student that begins
                ids = torch.tensor([[*pair[0], *pair[1]]])
                with torch.no_grad():
                    logps = model(ids).logits[0, len(pair[0]) - 1 : -1].log_softmax(-1)
                expected = logps.gather(-1, ids[0, len(pair[0]) :, None])[:, 0]
                assert torch.allclose(row.double(), expected, atol=1e-5)
                known[pair] = now
            drifts.append(float(row.abs().sum()))
    assert known and min(drifts) > 0


# Completions of the teacher


def parrot(token, padded=None):
    """A teacher that says one token, whatever came before."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=make_model().config.vocab_size, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=False)
    ).double()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 5.0
    return model


@pytest.mark.parametrize("token, completion", [(X, (X,) * 8), (EOS, (EOS,))])
def test_the_teacher_writes_what_it_says(tmp_path, token, completion):
    fields = {"student_fraction": 0.0, "off_policy_source": "teacher"}
    step = train(tmp_path, rows=make_prompts(), teacher_model=parrot(token), max_steps=2, **fields)
    for inputs in step.batches:
        assert {pair[1] for pair in pairs(inputs)} == {completion} and not inputs["on_policy"].any()
        assert {pair[0] for pair in pairs(inputs)} <= {tuple(ids_of(p)) for p in PROMPTS}


class Echo:
    """Writes the prompt that it was given."""

    name = "echo"

    def __init__(self, fail=None):
        self.fail = fail

    def __call__(self, batch):
        return torch.full(batch.completion_ids.shape, -1.0)

    def generate(self, prompt_ids, sampling):
        if self.fail:
            raise self.fail
        return [[*ids[:6], EOS] for ids in prompt_ids]


def test_the_teacher_reads_its_own_prompt_and_the_student_does_not(tmp_path):
    prompts = PROMPTS * 4
    hints = [f"{i} hint" if i % 3 else None for i in range(len(prompts))]
    rows = Dataset.from_dict({"prompt": prompts, "teacher_prompt": hints})
    fields = {"student_fraction": 0.0, "off_policy_source": "teacher"}
    trainer = build(tmp_path, rows=rows, model=student(ends=[EOS]), **fields)
    trainer.teacher.generate = Echo().generate
    step = record(trainer)
    trainer.train()
    seen = set()
    for inputs in step.batches:
        for prompt, completion in pairs(inputs):
            own = [(p, h) for p, h in zip(prompts, hints, strict=True) if tuple(ids_of(p)) == prompt]
            expected = {(*ids_of(h or p)[:6], EOS) for p, h in own}
            assert completion in expected
            seen.add(TOKENIZER.decode(completion).replace(" ", "").endswith("hint<eos>"))
    assert seen == {True, False}


def test_base_weights_write_with_the_adapter_off(tmp_path):
    step = train(
        tmp_path,
        rows=make_prompts(),
        teacher_model="base",
        peft=LoraConfig(r=4, target_modules="all-linear"),
        student_fraction=0.5,
        off_policy_source="teacher",
        max_steps=6,
        temperature=1e-3,
        learning_rate=0.1,
        divergence="forward_kl",
        distill_temperature=1.0,
    )
    off = [inputs for inputs in step.batches if not inputs["on_policy"].any()]
    assert 0 < len(off) < 6
    model = student()
    for inputs in off:
        for prompt, completion in pairs(inputs):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == list(completion)


def test_a_teacher_that_fails_to_write_stops_the_run_with_a_checkpoint(tmp_path):
    trainer = build(tmp_path, student_fraction=0.0, off_policy_source="teacher")
    trainer.teacher.generate = Echo(RuntimeError("out of ink")).generate
    with pytest.raises(TeacherScoreError, match=r"out of ink.*No step was taken\. A checkpoint of step 0"):
        trainer.train()
    assert (tmp_path / "checkpoint-0").exists()


def test_a_row_without_a_completion_stops_the_run(tmp_path):
    rows = Dataset.from_dict({"prompt": PROMPTS, "completion": [None] * 6})
    with pytest.raises(TeacherScoreError, match="has none there"):
        build(tmp_path, rows=rows, student_fraction=0.0).train()


def test_missing_columns_are_named_before_a_weight_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="train_dataset must have a column 'completion'"):
        build(tmp_path, rows=make_prompts(), model="/nowhere/model", student_fraction=0.5)


# The length


def test_completions_grow_and_those_that_are_cut_are_trained_on(tmp_path):
    rows = Dataset.from_dict({"prompt": PROMPTS, "completion": ["a long text"] * 6})
    fields = {"max_steps": 4, "student_fraction": 0.6, "num_generations": 2}
    fields["schedules"] = {"max_completion_length": {"type": "linear", "start": 2, "end": 14}}
    trainer = build(tmp_path, rows=rows, model=student(ends=[EOS]), **fields)
    step = record(trainer)
    trainer.train()
    origins = []
    for now, inputs in enumerate(step.batches):
        limit = 2 + 3 * now
        lengths = inputs["completion_mask"].sum(1)
        cut = [pair for pair in pairs(inputs) if EOS not in pair[1]]
        assert lengths.max() == limit and cut and all(len(pair[1]) == limit for pair in cut)
        assert inputs["num_distill_tokens"] == lengths.sum()  # none of them is masked
        origins.append(bool(inputs["on_policy"].any()))
    assert set(origins) == {True, False}
