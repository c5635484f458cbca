"""Two gloo processes equal one on the same global batches, and both equal the textbook."""

import pytest
import torch
from tiny import make_tokenizer
from two_processes import (
    FAILURES,
    LEARNING_RATE,
    MASKED_PROMPTS,
    PROMPTS,
    RUNS,
    THINK,
    complete,
    make_student,
    make_teacher,
    one_process,
    result_of,
)

pytestmark = pytest.mark.distributed

NOT_OF_THE_TRAINING = ("runtime", "per_second", "step_time", "total_flos")


def numbers(name, history):
    # GRPO's own entropy is a mean over micro-batches, which are others when there are more processes
    left_out = (*NOT_OF_THE_TRAINING, *(["entropy"] if "accumulation" in name else []))
    kept = [[k for k in line if not k.endswith(left_out) or "distill" in k] for line in history]
    kept = [[k for k in keys if "wait" not in k and "tokens_per_second" not in k] for keys in kept]
    return [{k: line[k] for k in keys} for keys, line in zip(kept, history, strict=True)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name):
    first, second = result_of(name)
    alone = one_process(name)
    for weights in (first["weights"], second["weights"]):
        assert weights.keys() == alone["weights"].keys()
        for key, expected in alone["weights"].items():
            torch.testing.assert_close(weights[key], expected, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    ours, theirs = numbers(name, first["logs"]), numbers(name, alone["logs"])
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-6, abs=1e-6)


def textbook_run(prompts, credit, loss_type):
    """Losses and weights of two steps of SGD, one unpadded sequence at a time, from full logits."""
    student, teacher, tokenizer = make_student(), make_teacher(), make_tokenizer()
    losses = []
    for batch in (prompts[:4], prompts[4:]):
        sums, counts = [], []
        for prompt in batch:
            prompt_ids, completion = tokenizer(prompt)["input_ids"], torch.tensor(complete(prompt))
            ids = torch.tensor([prompt_ids + completion.tolist()])
            ls, lt = (m(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1) for m in (student, teacher))
            if credit == "direct":
                values = (ls.exp() * (ls - lt.detach())).sum(-1)
            else:
                ls, lt = (x.gather(1, completion[:, None])[:, 0] for x in (ls, lt.detach()))
                values = -(lt - ls.detach()) * (ls - ls.detach() + 1)
            keep = completion != THINK
            sums.append(values[keep].sum())
            counts.append(int(keep.sum()))
        if loss_type == "dapo":
            loss = sum(sums) / sum(counts)
        else:
            loss = sum(s / max(n, 1) for s, n in zip(sums, counts, strict=True)) / len(sums)
        losses.append(loss.item())
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= LEARNING_RATE * p.grad
    return losses, dict(student.named_parameters())


@pytest.mark.parametrize(
    ("name", "prompts", "credit", "loss_type"),
    [
        ("dapo", PROMPTS, "direct", "dapo"),
        ("grpo", PROMPTS, "direct", "grpo"),
        ("policy gradient, dapo", PROMPTS, "policy_gradient", "dapo"),
        ("masked rank, dapo", MASKED_PROMPTS, "direct", "dapo"),
        ("masked rank, grpo", MASKED_PROMPTS, "direct", "grpo"),
        ("masked rank, policy gradient", MASKED_PROMPTS, "policy_gradient", "dapo"),
        ("tool rank, dapo", MASKED_PROMPTS, "direct", "dapo"),
        ("tool rank, grpo", MASKED_PROMPTS, "direct", "grpo"),
        ("tool rank, policy gradient", MASKED_PROMPTS, "policy_gradient", "dapo"),
    ],
)
def test_two_processes_equal_the_textbook(name, prompts, credit, loss_type):
    losses, weights = textbook_run(prompts, credit, loss_type)
    for result in result_of(name):
        for key, expected in weights.items():
            torch.testing.assert_close(result["weights"][key], expected.detach(), rtol=1e-6, atol=1e-6)
    lines = result_of(name)[0]["logs"][:2]
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-6)
    assert [line["distill/loss"] for line in lines] == pytest.approx(losses, abs=1e-6)


def test_masked_micro_batches_leave_the_weights_alone():
    first, second = result_of("all masked")
    initial = dict(make_student().named_parameters())
    for result in (first, second):
        for key, expected in initial.items():
            assert torch.equal(result["weights"][key], expected)
    assert [line["grad_norm"] for line in first["logs"][:2]] == [0.0, 0.0]


def test_a_resumed_run_of_two_processes_equals_an_uninterrupted_one():
    # Each process has a state of its own for sampling
    for result in result_of("resume"):
        whole, resumed = result["whole"], result["resumed"]
        for key, expected in whole["weights"].items():
            assert torch.equal(resumed["weights"][key], expected), key
        lines = [numbers("resume", run["logs"])[:4] for run in (whole, resumed)]
        assert lines[0] == lines[1]


def test_the_gate_of_the_runs_opens_and_shuts():
    shares = [line["distill/sample_weight"] for line in one_process("gate")["logs"] if "distill/sample_weight" in line]
    assert shares == [1.0, 0.5, 0.5, 0.0]
    skipped = [line["distill/skipped_steps"] for line in one_process("gate")["logs"] if "distill/loss" in line]
    assert skipped == [0.0, 0.0, 0.0, 1.0]


def test_the_runs_have_the_diagnostics_that_are_compared():
    def names(run):
        return {key for line in one_process(run)["logs"] for key in line}

    tokens = {"distill/entropy_gap", "distill/teacher_rank", "distill/rejected_share", "distill/gap_at/00000-00007"}
    assert {*tokens, "distill/overlap_advantage", "completions/distinct_share"} <= names("dapo")
    assert {f"eval_{name}" for name in tokens} <= names("evaluation")
    assert "distill/reward_correlation" in names("rewards")
    assert {"distill/effective_sample_size", "distill/loss_share/light"} <= names("local weights")
    assert {"distill/importance_ratio", "distill/importance_ratio_max"} <= names("policy gradient, two iterations")


def test_diagnostics_that_fail_on_one_process_hold_up_none():
    first, second = result_of("unreadable")
    assert len(first["warnings"]) == 1 and not second["warnings"]
    assert "diagnostics of completions failed with UnicodeError('what is this')" in first["warnings"][0]
    whole = one_process("dapo")
    for key, expected in whole["weights"].items():
        torch.testing.assert_close(second["weights"][key], expected, rtol=1e-6, atol=1e-6)
    for line, expected in zip(first["logs"][:2], whole["logs"][:2], strict=True):
        assert line["distill/teacher_rank"] == pytest.approx(expected["distill/teacher_rank"])
        assert line["completions/distinct_share"] == 1  # of the first process's samples
    assert first["logs"][0]["completions/repetition"] != pytest.approx(whole["logs"][0]["completions/repetition"])


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_process_stops_both(name):
    good, bad = result_of(f"failure, {name}")
    telling = {"shape": "of shape", "raises": "the server is gone", "view": "teacher_view failed"}.get(name, "nan at")
    assert telling in bad["message"] and "another process" not in bad["message"]
    assert "another process" in good["message"]
    for result in (good, bad):
        assert "A checkpoint of step 1 is in" in result["message"]
        assert result["checkpoints"] == ["checkpoint-1"]
        for key, weight in result["before"].items():
            assert torch.equal(result["saved"][key], weight)
    healthy_run = {"local": "dapo", "local, policy gradient": "policy gradient, dapo"}.get(name, "top-k teacher")
    assert healthy_run in RUNS
    for result in (good, bad):
        for key, expected in one_process(healthy_run)["weights"].items():
            torch.testing.assert_close(result["weights"][key], expected, rtol=1e-6, atol=1e-6)
