"""Stored completions as rollouts: in order, the same for every process and after a resume."""

import datasets
import pytest
import torch
from caches import save_rows, score_arguments
from datasets import Dataset
from tiny import make_model, make_tokenizer, trainer_config

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.score import ScoreArguments, score_dataset
from trl_opd.teachers import CachedTeacher, TeacherScoreError
from trl_opd.teachers.replay import Replay

TEXTS = {"abc": ["one", "two", "three"], "x y": ["four"], "12": ["five", "six"]}
ROWS = [{"prompt": prompt, "completion": text} for prompt, texts in TEXTS.items() for text in texts]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    arguments = score_arguments(tmp_path, rows=ROWS)
    score_dataset(ScoreArguments(**arguments), progress=False)
    return tmp_path / "scores"


def build(output_dir, cache, prompts=("abc", "x y", "12"), **fields):
    arguments = fields.pop("arguments", {})
    return OnPolicyDistillTrainer(
        model=make_model(),
        teacher_model=cache if callable(cache) else f"cache:{cache}",
        args=OnPolicyDistillConfig(
            **trainer_config(
                output_dir,
                **{"support": "teacher_top_k", "support_size": 5, "per_device_train_batch_size": 3, **fields},
            )
        ),
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=make_tokenizer(),
        **arguments,
    )


def watch(trainer):
    """The texts of each generation batch, `(prompt, completion)`."""
    seen, rollout = [], trainer.rollout_func

    def keep(prompts, trainer):
        output = rollout(prompts, trainer)
        decode = trainer.processing_class.decode
        pairs = zip(output["prompt_ids"], output["completion_ids"], strict=True)
        seen.append([tuple("".join(decode(ids).split()).replace("<eos>", "") for ids in pair) for pair in pairs])
        return output

    trainer.rollout_func = keep
    return seen


def by_prompt(batches):
    found = {}
    for prompt, completion in (pair for batch in batches for pair in batch):
        found.setdefault(prompt, []).append(completion)
    return found


def test_each_time_that_a_prompt_comes_up_its_next_completion_is_given(tmp_path, cache):
    trainer = build(tmp_path / "out", cache, max_steps=5)
    seen = watch(trainer)
    trainer.train()
    assert by_prompt(seen) == {
        "abc": ["one", "two", "three", "one", "two"],
        "xy": ["four"] * 5,
        "12": ["five", "six", "five", "six", "five"],
    }


def test_a_group_gets_different_completions(tmp_path, cache):
    trainer = build(tmp_path / "out", cache, num_generations=3, max_steps=3, shuffle_dataset=False)
    seen = watch(trainer)
    trainer.train()
    assert [sorted(batch) for batch in seen] == [
        [("abc", "one"), ("abc", "three"), ("abc", "two")],
        [("xy", "four")] * 3,
        [("12", "five"), ("12", "five"), ("12", "six")],
    ]


def test_rows_of_one_prompt_get_all_its_completions_in_an_epoch(tmp_path, cache):
    trainer = build(
        tmp_path / "out", cache, prompts=[row["prompt"] for row in ROWS], per_device_train_batch_size=2, max_steps=6
    )
    seen = watch(trainer)
    trainer.train()
    first, second = by_prompt(seen[:3]), by_prompt(seen[3:])
    expected = {prompt.replace(" ", ""): texts for prompt, texts in TEXTS.items()}
    assert first == second == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_iterations": 2, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 2},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["plain", "iterations", "two steps of a batch", "evaluation"],
)
def test_a_resumed_run_goes_on_with_the_next_completions(tmp_path, cache, fields):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **fields}
    fields["prompts"] = [*TEXTS] * 6  # one epoch: TRL's sampler shuffles later ones of a resumed run anew
    arguments = {"eval_dataset": Dataset.from_dict({"prompt": ["abc", "12"]})} if "eval_steps" in fields else {}
    whole = build(tmp_path / "whole", cache, arguments=arguments, **fields)
    expected = watch(whole)
    whole.train()
    resumed = build(tmp_path / "whole", cache, arguments=arguments, **fields)
    seen = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert 0 < len(seen) < len(expected)
    assert seen == expected[-len(seen) :]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path, cache):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build(tmp_path / "out", cache, **fields).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / "replay.npy").exists()
    arguments = score_arguments(tmp_path, rows=ROWS[:3], output=str(tmp_path / "smaller"))
    score_dataset(ScoreArguments(**arguments), progress=False)
    other = build(tmp_path / "other", tmp_path / "smaller", prompts=["abc"] * 3, max_steps=4)
    with pytest.raises(ValueError, match=r"belongs to a cache of 3 prompts, but .* has 1"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "replay.npy").unlink()
    with pytest.raises(ValueError, match=r"must hold replay.npy to resume with stored completions"):
        build(tmp_path / "again", cache, max_steps=4).train(resume_from_checkpoint=str(checkpoint))


def test_a_second_training_and_each_evaluation_begin_with_the_first_completions(tmp_path, cache):
    trainer = build(
        tmp_path / "out", cache, max_steps=1, arguments={"eval_dataset": Dataset.from_dict({"prompt": ["abc"]})}
    )
    seen = watch(trainer)
    trainer.train()
    trainer.train()
    assert seen[0] == seen[1]
    trainer.evaluate()
    trainer.evaluate()
    assert seen[2] == seen[3] == [("abc", "one")]


def test_the_tokens_have_no_log_probs_of_a_sampler(tmp_path, cache):
    trainer = build(tmp_path / "out", cache, max_steps=1, steps_per_generation=2)
    seen = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or compute(model, inputs)
    trainer.train()
    assert all("sampling_per_token_logps" not in inputs for inputs in seen)
    assert all("importance_sampling_ratio" not in inputs for inputs in seen)


def test_a_trainer_that_was_given_the_function_is_checked_too(tmp_path, cache):
    teacher = CachedTeacher(cache)
    trainer = build(tmp_path / "out", teacher, max_steps=1, arguments={"rollout_func": teacher.rollout_func})
    seen = watch(trainer)
    trainer.train()
    assert len(seen) == 1
    with pytest.raises(ValueError, match="must have stored completions"):
        build(tmp_path / "out", teacher, prompts=["nothing"] * 3, arguments={"rollout_func": teacher.rollout_func})
    sampling = build(tmp_path / "out", cache, max_steps=1, arguments={"rollout_func": lambda prompts, trainer: {}})
    assert not isinstance(sampling.rollout_func, Replay)


def test_a_prompt_that_comes_up_without_a_completion_stops_the_run_with_a_checkpoint(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("trl_opd.teachers.cached.check_prompts", lambda *args: None)
    trainer = build(tmp_path / "out", cache, prompts=["abc", "x y", "nothing"], max_steps=2)
    with pytest.raises(
        TeacherScoreError, match=r"no completion for 1 of 3 prompts, the first is 'nothing'.*A checkpoint"
    ):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-0").exists()


def test_a_cache_that_has_grown_goes_on_with_its_counts(tmp_path, cache):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build(tmp_path / "out", cache, **fields).train()
    rows = [*ROWS, {"prompt": "new", "completion": "seven"}]
    save_rows(tmp_path / "rows.jsonl", rows)
    score_dataset(ScoreArguments(**score_arguments(tmp_path, rows=rows)), progress=False)
    resumed = build(tmp_path / "out", cache, **{**fields, "max_steps": 3})
    seen = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert by_prompt(seen) == {"abc": ["three"], "xy": ["four"], "12": ["five"]}
