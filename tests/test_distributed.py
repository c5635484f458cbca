"""Two gloo processes equal one on the same global batches, and both equal the textbook."""

import pytest
import torch
from tiny import make_tokenizer
from two_processes import (
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
    return [{k: line[k] for k in keys if "wait" not in k} for keys, line in zip(kept, history, strict=True)]


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
