"""`trl-opd bench topk`: its cosines beside gradients from full logits, and the command from end to end."""

import argparse
import json

import pytest
import torch
from tiny import VOCAB_SIZE, make_model

from trl_opd.bench import topk


def textbook(teacher, student, ids, prompt_length, k=None, tail=None):
    """Gradient of the mean reverse KL in all of the student's parameters, by autograd through full logits."""
    student.zero_grad()
    s = student(input_ids=ids).logits[0, prompt_length - 1 : -1].double().log_softmax(-1)
    with torch.no_grad():
        t = teacher(input_ids=ids).logits[0, prompt_length - 1 : -1].double().log_softmax(-1)
    if k is not None:
        top = t.topk(k, dim=-1).indices
        rest_s, rest_t = ((1 - x.gather(-1, top).exp().sum(-1, keepdim=True)).log() for x in (s, t))
        s, t = s.gather(-1, top), t.gather(-1, top)
        if tail == "bucket":
            s, t = torch.cat([s, rest_s], -1), torch.cat([t, rest_t], -1)
        elif tail == "renormalize":
            s, t = s.log_softmax(-1), t.log_softmax(-1)
    value = (s.exp() * (s - t)).sum(-1).mean()
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def test_cosines_and_ratios_are_those_of_full_logits():
    teacher, student = make_model(seed=0), make_model(seed=1)
    ids = torch.randint(6, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(2))
    value, full = textbook(teacher, student, ids, 5)
    expected = {}
    for tail, k in [("bucket", 1), ("bucket", 8), ("renormalize", 8), ("none", 8)]:
        at_k, grads = textbook(teacher, student, ids, 5, k, tail)
        expected[tail, k] = (
            torch.cosine_similarity(grads, full, dim=0).item(),
            grads.norm() / full.norm(),
            at_k / value,
        )
    student.zero_grad()
    rows = topk.measure(teacher, student, [(ids, 5)], argparse.Namespace(k=[1, 8, VOCAB_SIZE]))
    found = {(r["tail"], r["k"]): r for r in rows if r["divergence"] == "reverse_kl"}
    for key, (cosine, norm, ratio) in expected.items():
        assert found[key]["cosine"] == pytest.approx(cosine, abs=1e-4)
        assert found[key]["norm_ratio"] == pytest.approx(float(norm), rel=1e-3)
        assert found[key]["value_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert ("renormalize", 1) not in found  # identically zero
    assert not any(k == VOCAB_SIZE for _, k in found)  # all entries are the full divergence


def test_the_sampled_row_is_the_policy_gradient():
    teacher, student = make_model(seed=0), make_model(seed=1)
    ids = torch.randint(6, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(2))
    _, full = textbook(teacher, student, ids, 5)
    student.zero_grad()
    at = (torch.arange(4, 19), ids[0, 5:])
    logprobs = student(input_ids=ids).logits[0].double().log_softmax(-1)[at]
    with torch.no_grad():
        advantage = teacher(input_ids=ids).logits[0].double().log_softmax(-1)[at] - logprobs
    (-(advantage * logprobs).mean()).backward()
    grads = torch.cat([p.grad.flatten() for p in student.parameters()])
    student.zero_grad()
    rows = topk.measure(teacher, student, [(ids, 5)], argparse.Namespace(k=[1]))
    (row,) = [r for r in rows if r["tail"] == "sampled"]
    assert row["cosine"] == pytest.approx(torch.cosine_similarity(grads, full, dim=0).item(), abs=1e-4)


def test_the_command_trains_a_pair_and_keeps_its_figures(tmp_path, capsys):
    kept, drawn = tmp_path / "topk.json", tmp_path / "topk.png"
    small = ["--minutes", "0.01", "--vocab", "300", "--characters", "20000", "--prompts-num", "2", "--completion", "4"]
    topk.main([*small, "--k", "1", "16", "--device", "cpu", "--json", str(kept), "--png", str(drawn)])
    result = json.loads(kept.read_text())
    assert result["tokens"] == 8
    assert {row["k"] for row in result["rows"]} == {1, 16}
    assert drawn.stat().st_size > 0
    assert "reverse_kl" in capsys.readouterr().out


def test_models_of_ones_own_come_with_prompts(capsys):
    with pytest.raises(SystemExit):
        topk.main(["--student", "somewhere"])
    assert "go together" in capsys.readouterr().err
