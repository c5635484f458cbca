"""A teacher that fails stops the run with a checkpoint of the last good step, and nothing is trained on its answer."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, make_tokenizer
from transformers import TrainerCallback
from two_processes import (
    PG,
    PROMPTS,
    RememberWeights,
    complete,
    make_teacher,
    make_trainer,
    topk_teacher,
    train,
)

from trl_opd.collators import TeacherScores
from trl_opd.teachers import TeacherScoreError


def sampled_teacher(batch):
    return TeacherScores(sampled_logprobs=torch.full(batch.completion_ids.shape, -2.0))


class ScriptedTeacher:
    """A healthy teacher whose answer to one call is spoilt."""

    name = "the-scripted-one"

    def __init__(self, healthy, spoil, call):
        self.healthy, self.spoil, self.call, self.calls = healthy, spoil, call, 0

    def __call__(self, batch):
        self.calls += 1
        scores = self.healthy(batch)
        return self.spoil(scores, batch) if self.calls == self.call else scores


def put(key, value, row=1, token=0):
    def spoil(scores, batch):
        tensor = getattr(scores, key).clone()
        tensor[row, token] = value
        setattr(scores, key, tensor)
        return scores

    return spoil


def cut(key, *index):
    def spoil(scores, batch):
        setattr(scores, key, getattr(scores, key)[index])
        return scores

    return spoil


def drop(key):
    def spoil(scores, batch):
        setattr(scores, key, None)
        return scores

    return spoil


def refuse(scores, batch):
    raise ConnectionError("the server is gone")


ALL = slice(None)
# Third batch: PROMPTS[:4] again, of which row 1 is "hello world"
BAD_SCORES = {
    "sampled nan": ("policy_gradient", put("sampled_logprobs", math.nan), "nan at completion token 0 of batch row 1"),
    "sampled inf": ("policy_gradient", put("sampled_logprobs", math.inf), "inf at completion token 0 of batch row 1"),
    "sampled -inf": ("policy_gradient", put("sampled_logprobs", -math.inf, 2), "-inf at completion token 0 .* row 2"),
    "top-k nan": ("direct", put("topk_logprobs", math.nan), "nan at completion token 0 of batch row 1"),
    "top-k inf": ("direct", put("topk_logprobs", math.inf), "inf at completion token 0 of batch row 1"),
    "top-k -inf": ("direct", put("topk_logprobs", -math.inf), "-inf at completion token 0 of batch row 1"),
}
BROKEN_ANSWERS = {
    "a row too few": ("policy_gradient", cut("sampled_logprobs", slice(1, None)), r"shape \(3, 7\) .* \(4, 7\)"),
    "a token too few": ("policy_gradient", cut("sampled_logprobs", ALL, slice(1, None)), r"\(4, 6\) .* \(4, 7\)"),
    "a vector": ("policy_gradient", cut("sampled_logprobs", ALL, 0), r"shape \(4,\)"),
    "without k": ("direct", cut("topk_logprobs", ALL, ALL, 0), r"topk_logprobs of shape \(4, 7\)"),
    "ids of other k": ("direct", cut("topk_ids", ALL, ALL, slice(1)), r"topk_ids .*\(4, 7, 1\).*\(4, 7, 2\)"),
    "ids alone": ("direct", drop("topk_logprobs"), "topk_ids and topk_logprobs together"),
    "no entries": ("direct", put("topk_ids", -1), "some token has none"),
    "nothing": ("policy_gradient", drop("sampled_logprobs"), "must return scores, got none"),
    "no sampled scores": (
        "policy_gradient",
        lambda scores, batch: topk_teacher(batch),
        "must return sampled_logprobs",
    ),
    "probabilities": ("policy_gradient", put("sampled_logprobs", 0.5), "logarithm of a probability is at most 0"),
    "None": ("direct", lambda scores, batch: None, "must return TeacherScores or a tensor, got NoneType"),
    "an exception": ("direct", refuse, r"failed: ConnectionError\('the server is gone'\)"),
}


def stop(tmp_path, step, match, **fields):
    """Train until the teacher fails after `step` steps; check what is left behind."""
    memory = RememberWeights()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[memory, *fields.pop("callbacks", [])], **fields)
    with pytest.raises(TeacherScoreError, match=match) as caught:
        trainer.train()
    assert "No step was taken" in str(caught.value) or "no step was taken" in str(caught.value)
    assert f"A checkpoint of step {step} is in {tmp_path}" in str(caught.value)
    assert trainer.state.global_step == step
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert saved.keys() == memory.after[step].keys()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(saved[name], memory.after[step][name])
        assert torch.equal(weight, memory.after[step][name])
    return str(caught.value)


def assert_goes_on(tmp_path, **fields):
    """Resumed with a healthy teacher, the run ends as if the teacher had never failed."""
    resumed = train(tmp_path, resume=True, max_steps=4, **fields)
    whole = train(tmp_path / "whole", max_steps=4, **fields)
    # GRPO shuffles the rows of a batch, which rounds differently
    for name, weight in resumed["weights"].items():
        torch.testing.assert_close(weight, whole["weights"][name], rtol=1e-6, atol=1e-6)
    losses = [[line["distill/loss"] for line in run["logs"][:4]] for run in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def objective(credit):
    return (PG, sampled_teacher) if credit == "policy_gradient" else ({}, topk_teacher)


@pytest.mark.parametrize(("credit", "spoil", "match"), BAD_SCORES.values(), ids=BAD_SCORES.keys())
def test_a_bad_score_stops_with_a_checkpoint_that_goes_on(tmp_path, credit, spoil, match):
    fields, healthy = objective(credit)
    message = stop(tmp_path, 2, match, teacher=ScriptedTeacher(healthy, spoil, call=3), **fields)
    assert "'the-scripted-one'" in message
    prompt = PROMPTS[2 if "row 2" in message else 1]
    tokenizer = make_tokenizer()
    assert f"whose prompt ends in {tokenizer.decode(tokenizer(prompt)['input_ids'])!r}" in message
    assert_goes_on(tmp_path, teacher=healthy, **fields)


@pytest.mark.parametrize(("credit", "spoil", "match"), BROKEN_ANSWERS.values(), ids=BROKEN_ANSWERS.keys())
def test_a_broken_answer_stops_with_a_checkpoint(tmp_path, credit, spoil, match):
    fields, healthy = objective(credit)
    message = stop(tmp_path, 2, match, teacher=ScriptedTeacher(healthy, spoil, call=3), **fields)
    assert "'the-scripted-one'" in message


def test_a_failure_before_the_first_step_leaves_a_checkpoint_that_goes_on(tmp_path):
    teacher = ScriptedTeacher(topk_teacher, put("topk_logprobs", math.nan), call=1)
    with pytest.raises(TeacherScoreError, match="A checkpoint of step 0"):
        make_trainer(tmp_path, max_steps=4, teacher=teacher).train()
    assert_goes_on(tmp_path, teacher=topk_teacher)


class Spoil(TrainerCallback):
    """After two steps, call `spoil`."""

    def __init__(self, spoil):
        self.spoil = spoil

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.spoil()


LOCAL = {
    "nan in the head": (lambda model: model.lm_head.weight[7], math.nan),
    "inf in the head": (lambda model: model.lm_head.weight[7], math.inf),
    "nan in the hidden states": (lambda model: model.model.norm.weight, math.nan),
}


@pytest.mark.parametrize(
    "fields",
    [{}, PG, {"loss_backend": "liger", "dtype": torch.float32}],
    ids=["direct", "policy gradient", "liger"],
)
@pytest.mark.parametrize(("weights", "value"), LOCAL.values(), ids=LOCAL.keys())
def test_a_local_teacher_that_overflows_stops_with_a_checkpoint(tmp_path, weights, value, fields):
    teacher = make_teacher().to(fields.get("dtype", torch.float64))
    spoil = Spoil(lambda: weights(teacher).data.fill_(value))
    message = stop(tmp_path, 2, "not finite", teacher=teacher, callbacks=[spoil], **fields)
    assert "'Qwen3ForCausalLM'" in message


def test_the_second_micro_batch_of_a_step_stops_the_whole_step(tmp_path):
    # Row 6 is in the second micro-batch of the first step after two
    teacher = ScriptedTeacher(topk_teacher, put("topk_logprobs", math.nan, 6), call=3)
    stop(tmp_path, 2, "row 6", teacher=teacher, gradient_accumulation_steps=2)


def test_bad_scores_in_evaluation_stop_with_a_checkpoint(tmp_path):
    # Two training batches, then two of the evaluation
    teacher = ScriptedTeacher(topk_teacher, put("topk_logprobs", math.nan), call=3)
    stop(tmp_path, 2, "nan at completion token 0 of batch row 1", teacher=teacher, eval_strategy="steps", eval_steps=2)


def test_bad_scores_in_an_evaluation_alone_save_nothing(tmp_path):
    trainer = make_trainer(tmp_path, teacher=ScriptedTeacher(topk_teacher, put("topk_logprobs", math.nan), call=1))
    with pytest.raises(TeacherScoreError, match="nan at completion token 0 of batch row 1") as caught:
        trainer.evaluate()
    assert "checkpoint" not in str(caught.value)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("masking", [None, [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]])
@pytest.mark.parametrize("credit", ["direct", "policy_gradient"])
def test_scores_outside_of_the_loss_are_ignored(tmp_path, credit, masking):
    fields, healthy = objective(credit)
    if masking:
        fields = {**fields, "special_token_masking": masking}
        assert any(token in masking for prompt in PROMPTS for token in complete(prompt))

    def careless(batch):
        scores = healthy(batch)
        outside = ~batch.completion_mask
        assert outside.any()
        for key in ("sampled_logprobs", "topk_logprobs", "topk_ids"):
            value = getattr(scores, key)
            if value is not None:
                where = outside if value.dim() == 2 else outside[..., None]
                setattr(scores, key, value.masked_fill(where, 10 * VOCAB_SIZE if key == "topk_ids" else math.nan))
        return scores

    run, expected = (train(tmp_path, teacher=teacher, **fields) for teacher in (careless, healthy))
    for name, weight in run["weights"].items():
        assert torch.equal(weight, expected["weights"][name])
    for line, other in zip(run["logs"][:2], expected["logs"][:2], strict=True):
        names = [k for k in line if "distill" in k and not k.endswith(("wait", "per_second"))]
        ours, theirs = ({k: x[k] for k in names} for x in (line, other))
        assert ours == theirs
