"""Training from stored scores: the same steps as with the teacher itself, and refusals where they would not be."""

import json
import shutil

import datasets
import pytest
import torch
from caches import TEACHER, make_rows, save_teacher, score_arguments
from datasets import Dataset
from tiny import CHARACTERS, make_model, make_tokenizer, trainer_config
from transformers import AutoModelForCausalLM

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer, TeacherScores
from trl_opd.score import ScoreArguments, score_dataset
from trl_opd.teachers import CachedTeacher, TeacherScoreError, resolve_teacher


@pytest.fixture(autouse=True)
def no_shared_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def make_cache(tmp_path):
    """Score the twelve rows with a teacher of float64 and throw it away."""

    def make(**fields):
        save_teacher(tmp_path / "teacher")
        make_model(**TEACHER).double().save_pretrained(tmp_path / "teacher")
        score_dataset(ScoreArguments(**score_arguments(tmp_path, **fields)), progress=False)
        shutil.rmtree(tmp_path / "teacher")
        return str(tmp_path / "scores")

    return make


def student():
    return make_model().double()


def build(output_dir, teacher, rows=None, model=None, arguments=None, **fields):
    defaults = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "support": "teacher_top_k"}
    rows = make_rows() if rows is None else rows
    return OnPolicyDistillTrainer(
        model=student() if model is None else model,
        teacher_model=teacher,
        args=OnPolicyDistillConfig(**trainer_config(output_dir, **{**defaults, "support_size": 5, **fields})),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=make_tokenizer(),
        **(arguments or {}),
    )


class LiveTeacher:
    """The top k of the teacher's full logits in float64."""

    def __init__(self, k):
        self.model, self.k = make_model(**TEACHER).double(), k

    def __call__(self, batch):
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logprobs = (logits[:, -batch.num_completion_tokens - 1 : -1] / batch.temperature).log_softmax(-1)
        values, ids = logprobs.topk(self.k, -1)
        sampled = logprobs.gather(-1, batch.completion_ids[..., None])[..., 0]
        return TeacherScores(topk_ids=ids, topk_logprobs=values, sampled_logprobs=sampled)


class FixedRollouts:
    """The rows' completions, one after the other, by the text of their prompts."""

    def __init__(self, rows):
        self.completions, self.seen = {}, {}
        for row in rows:
            self.completions.setdefault(row["prompt"], []).append(row["completion"] + "<eos>")

    def __call__(self, prompts, trainer):
        tokenizer, texts = trainer.processing_class, []
        for prompt in prompts:
            n = self.seen[prompt] = self.seen.get(prompt, -1) + 1
            texts.append(self.completions[prompt][n % len(self.completions[prompt])])
        ids = [tokenizer(text=x)["input_ids"] for x in (prompts, texts)]
        return {"prompt_ids": ids[0], "completion_ids": ids[1], "logprobs": None}


def train(trainer):
    start = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    return {name: weight - start[name] for name, weight in trainer.model.state_dict().items()}


def assert_same_steps(ours, theirs, tolerance):
    scale = max(step.abs().max().item() for step in theirs.values())
    assert scale > 1e-3
    for name, step in theirs.items():
        assert (ours[name] - step).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize(
    ("dtype", "compression", "tolerance"),
    [("float32", "none", 1e-5), ("float32", "zstd", 1e-5), ("float16", "none", 3e-3)],
)
def test_three_steps_from_a_cache_are_those_with_the_teacher(tmp_path, make_cache, dtype, compression, tolerance):
    fields = {"temperature": 0.8}
    cache = make_cache(logprob_dtype=dtype, compression=compression, **fields)
    trainer = build(tmp_path / "cached", f"cache:{cache}", **fields)
    assert isinstance(trainer.teacher, CachedTeacher)
    ours = train(trainer)
    live = build(tmp_path / "live", LiveTeacher(5), arguments={"rollout_func": FixedRollouts(make_rows())}, **fields)
    theirs = train(live)
    assert_same_steps(ours, theirs, tolerance)
    assert trainer.state.global_step == 3
    for one, other in zip(trainer.state.log_history[:3], live.state.log_history[:3], strict=True):
        assert one["completions/mean_length"] == other["completions/mean_length"]
        for name in ("distill/loss", "distill/teacher_student_gap", "distill/teacher_entropy"):
            assert one[name] == pytest.approx(other[name], abs=tolerance)


def test_float16_is_not_bit_for_bit(tmp_path, make_cache):
    """The tolerance above is needed: what it allows for is there."""
    ours = train(build(tmp_path / "one", f"cache:{make_cache(logprob_dtype='float16')}"))
    live = build(tmp_path / "live", LiveTeacher(5), arguments={"rollout_func": FixedRollouts(make_rows())})
    with pytest.raises(AssertionError):
        assert_same_steps(ours, train(live), 1e-6)


def test_with_every_entry_stored_it_is_the_full_divergence(tmp_path, make_cache):
    cache = make_cache(support_size=51)
    ours = train(build(tmp_path / "cached", f"cache:{cache}", support_size=51))
    teacher = make_model(**TEACHER).double()
    live = build(tmp_path / "live", teacher, support="full", arguments={"rollout_func": FixedRollouts(make_rows())})
    assert_same_steps(ours, train(live), 1e-5)


def test_a_smaller_k_than_the_stored_one_is_that_teachers(tmp_path, make_cache):
    ours = train(build(tmp_path / "cached", f"cache:{make_cache(support_size=20)}"))
    live = build(tmp_path / "live", LiveTeacher(5), arguments={"rollout_func": FixedRollouts(make_rows())})
    assert_same_steps(ours, train(live), 1e-5)


def test_accumulation_and_special_tokens_change_nothing_of_the_questions(tmp_path, make_cache):
    fields = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "special_token_masking": ["<eos>"],
        "num_iterations": 2,
    }
    ours = train(build(tmp_path / "cached", f"cache:{make_cache()}", **fields))
    live = build(tmp_path / "live", LiveTeacher(5), arguments={"rollout_func": FixedRollouts(make_rows())}, **fields)
    assert_same_steps(ours, train(live), 1e-5)


@pytest.mark.parametrize("no_think", [False, True])
def test_conversations_are_rendered_as_the_trainer_renders_them(tmp_path, make_cache, no_think):
    block, kwargs = ("<think></think>", {"no_think": True}) if no_think else ("", {})
    rows = [
        {
            "prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": block + row["completion"]}],
        }
        for row in make_rows()
    ]
    cache = make_cache(rows=rows, chat_template_kwargs=json.dumps(kwargs))
    fields = {"rows": rows, "max_completion_length": 16}
    trainer = build(tmp_path / "out", f"cache:{cache}", chat_template_kwargs=kwargs, **fields)
    seen = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or compute(model, inputs)
    train(trainer)

    def texts(name):
        return {trainer.processing_class.decode(ids[ids != 0]) for inputs in seen for ids in inputs[name]}

    tokenizer = trainer.processing_class
    assert texts("completion_ids") <= {
        tokenizer.decode(tokenizer(f"{r['completion']}<|im_end|>").input_ids) for r in make_rows()
    }
    end = tokenizer.decode(tokenizer(f"assistant\n{block}").input_ids)
    assert all(prompt.endswith(end) for prompt in texts("prompt_ids"))
    with pytest.raises(ValueError, match=r"must have stored completions in .* The student's prompts must be those"):
        build(
            tmp_path / "out", f"cache:{cache}", chat_template_kwargs={} if no_think else {"no_think": True}, **fields
        )


def test_a_teachers_own_prompt_is_scored_and_found(tmp_path, make_cache):
    rows = [{**row, "teacher_prompt": f"hint {row['completion']} {row['prompt']}"} for row in make_rows()]
    cache = CachedTeacher(make_cache(rows=rows))
    teacher, tokenizer = make_model(**TEACHER).double(), make_tokenizer()
    for row in rows:
        ids = [tokenizer(text=text)["input_ids"] for text in (row["teacher_prompt"], row["completion"] + "<eos>")]
        stored = cache.reader[cache.meta.key(*ids)]
        assert stored.prompt_ids.tolist() == tokenizer(text=row["prompt"])["input_ids"]
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([ids[0] + ids[1]])).logits[0].double()
        expected = logits[len(ids[0]) - 1 : -1].log_softmax(-1).topk(5, -1)
        assert stored.answer.topk_ids.tolist() == expected.indices.tolist()
        torch.testing.assert_close(
            torch.from_numpy(stored.answer.topk_logprobs.copy()), expected.values.float(), rtol=0, atol=1e-6
        )


REFUSED = {
    "temperature": ({}, {"temperature": 0.7}, "distill_temperature .* must be that of the stored log-probs, 1.0, got"),
    "a larger k": ({}, {"support_size": 6}, "support_size must be at most that of the stored scores, 5, got 6"),
    "the student's k": ({}, {"support": "student_top_k"}, "support must be 'teacher_top_k'"),
    "both": ({}, {"support": "union_top_k"}, "support must be 'teacher_top_k'"),
    "a divergence of sampled": ({"support": "sampled"}, {}, "support must be 'sampled' with the cache"),
    "policy gradient": (
        {"support": "sampled"},
        {"support": "sampled", "credit": "policy_gradient"},
        "credit must be 'direct' with stored completions",
    ),
    "half the square": (
        {"support": "sampled"},
        {"support": "sampled", "credit": "k2"},
        "credit must be 'direct' with stored completions, got 'k2'",
    ),
    "both credits": ({}, {"credit": "combined"}, "credit must be 'direct' with stored completions, got 'combined'"),
    "too short": ({}, {"max_completion_length": 7}, "max_completion_length must be at least .* 8 tokens, got 7"),
}


@pytest.mark.parametrize(("scored", "fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_run_that_the_cache_cannot_answer_is_refused_at_the_start(tmp_path, make_cache, scored, fields, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", f"cache:{make_cache(**scored)}", **fields)


def test_rewards_over_stored_completions_are_logged_but_not_trained_on(tmp_path, make_cache):
    def length(completions, **kwargs):
        return [float(len(text)) for text in completions]

    cache, fields = make_cache(), {"num_generations": 2, "arguments": {"reward_funcs": [length]}}
    with pytest.raises(ValueError, match=r"reward_coef must be 0 with stored completions, got 1.0"):
        build(tmp_path / "out", f"cache:{cache}", **fields)
    trainer = build(tmp_path / "out", f"cache:{cache}", reward_coef=0.0, max_steps=1, **fields)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/length/mean"] > 0


def test_another_vocabulary_is_refused(tmp_path, make_cache):
    cache = make_cache()
    with pytest.raises(ValueError, match="must share the student's tokenizer"):
        OnPolicyDistillTrainer(
            model=make_model(),
            teacher_model=f"cache:{cache}",
            args=OnPolicyDistillConfig(**trainer_config(tmp_path / "out", support="teacher_top_k", support_size=5)),
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=make_tokenizer(CHARACTERS[::-1]),
        )


def test_a_prompt_that_is_not_stored_is_an_error_before_the_run(tmp_path, make_cache):
    cache = make_cache()
    rows = [*make_rows(), {"prompt": "another one"}]
    with pytest.raises(ValueError, match=r"1 of 13 that were looked up have none; row 12 is 'another one'"):
        build(tmp_path / "out", f"cache:{cache}", rows=rows)


def test_what_the_student_samples_is_not_answered(tmp_path, make_cache):
    teacher = CachedTeacher(make_cache(), replay=False)
    trainer = build(tmp_path / "out", teacher)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(TeacherScoreError, match=r"has no scores for 4 of 4 samples.*No step was taken"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_damaged_scores_are_not_trained_on(tmp_path, make_cache):
    cache = make_cache(shard_tokens=1000)
    trainer = build(tmp_path / "out", f"cache:{cache}")
    (path,) = (tmp_path / "scores").glob("*.arrow")
    data = path.read_bytes()
    path.write_bytes(data[:-300] + bytes([data[-300] ^ 1]) + data[-299:])
    with pytest.raises(Exception, match="is not as it was written"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_argument_and_a_saved_student(tmp_path, make_cache):
    cache = make_cache()
    assert resolve_teacher(f"cache:{cache}").name == f"cache:{cache}"
    trainer = build(tmp_path / "out", f"cache:{cache}")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").lm_head.weight, torch.Tensor)
