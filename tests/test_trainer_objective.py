"""One step of direct credit: loss, gradient and metrics equal those of plain autograd over the full logits."""

import math

import pytest
import torch
from steps import (
    assert_same_gradient,
    check,
    forward_kl,
    full_logprobs,
    jsd,
    loss_mask,
    reverse_kl,
    sampled,
    student,
    take_step,
)
from tiny import make_model, make_prompts
from torch import Tensor

from trl_opd import TeacherScores

TEACHER = {"hidden_size": 24, "seed": 1}


def entropy(x: Tensor) -> Tensor:
    return -(x.exp() * x).sum(-1)


def bucketed(x: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of the support and of all the rest."""
    inside = x.gather(-1, ids)
    return torch.cat([inside, (1 - inside.exp().sum(-1, keepdim=True)).log()], -1)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"])
def test_each_loss_type_keeps_its_reduction_over_micro_batches(tmp_path, loss_type):
    step = take_step(
        tmp_path,
        teacher=make_model(**TEACHER).double(),
        loss_type=loss_type,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    assert len(step.batches) == 3
    check(step, reverse_kl, loss_type)


@pytest.mark.parametrize(
    ("fields", "divergence"),
    [
        ({"divergence": "forward_kl"}, forward_kl),
        ({"divergence": "generalized_jsd", "divergence_kwargs": {"beta": 0.3}}, lambda s, t: jsd(s, t, 0.3)),
        ({"divergence": "total_variation"}, lambda s, t: (s.exp() - t.exp()).abs().sum(-1) / 2),
        (
            {"divergence": "skew_forward_kl", "divergence_kwargs": {"skew": 0.2}},
            lambda s, t: forward_kl((0.2 * t.exp() + 0.8 * s.exp()).log(), t),
        ),
    ],
    ids=lambda x: x["divergence"] if isinstance(x, dict) else "",
)
def test_each_divergence_has_the_gradient_of_its_formula(tmp_path, fields, divergence):
    check(take_step(tmp_path, teacher=make_model(**TEACHER).double(), **fields), divergence)


@pytest.mark.parametrize(
    ("support", "choose"),
    [
        ("teacher_top_k", lambda s, t: t.topk(5, -1).indices),
        ("student_top_k", lambda s, t: s.topk(5, -1).indices),
    ],
)
def test_a_top_k_support_is_compared_with_one_bucket_for_the_rest(tmp_path, support, choose):
    def divergence(s, t):
        ids = choose(s, t)
        return reverse_kl(bucketed(s, ids), bucketed(t, ids))

    step = take_step(tmp_path, teacher=make_model(**TEACHER).double(), support=support, support_size=5)
    check(step, divergence)


@pytest.mark.parametrize("fields", [{"temperature": 0.7}, {"temperature": 1.3, "distill_temperature": 0.7}])
def test_both_models_are_compared_at_the_temperature_of_the_divergence(tmp_path, fields):
    check(take_step(tmp_path, teacher=make_model(**TEACHER).double(), **fields), reverse_kl, temperature=0.7)


def test_the_distillation_coefficient_scales_the_loss(tmp_path):
    step = take_step(tmp_path, teacher=make_model(**TEACHER).double(), distill_coef=0.3)
    check(step, lambda s, t: 0.3 * reverse_kl(s, t))
    assert step.logs["distill/loss"] == pytest.approx(step.loss.item() / 0.3, rel=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_the_micro_batching_changes_nothing(tmp_path, loss_type):
    steps = [
        take_step(
            tmp_path,
            teacher=make_model(**TEACHER).double(),
            loss_type=loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        for size in (4, 2, 1)
    ]
    whole = steps[0]
    for step in steps[1:]:
        rollouts = {tuple(row[m.bool()].tolist()) for b in step.batches for row, m in pairs(b)}
        assert rollouts == {tuple(row[m.bool()].tolist()) for row, m in pairs(whole.batches[0])}
        assert step.loss.item() == pytest.approx(whole.loss.item(), rel=2e-7)
        assert_same_gradient(step.gradient, whole.gradient)
        for name, value in whole.logs.items():
            if name.startswith("distill/") and not name.endswith("per_second"):
                assert step.logs[name] == pytest.approx(value, rel=2e-7), name


def pairs(inputs):
    return zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)


def test_the_chunk_size_changes_nothing(tmp_path):
    teacher = {"hidden_size": 24, "seed": 1, "vocab_size": 20000}
    steps = [
        take_step(
            tmp_path,
            model=make_model(vocab_size=20000).double(),
            teacher=make_model(**teacher).double(),
            loss_chunk_mib=mib,
            max_completion_length=6,
        )
        for mib in (1, 512)
    ]
    assert steps[0].loss.item() == pytest.approx(steps[1].loss.item(), rel=1e-10)
    assert_same_gradient(steps[0].gradient, steps[1].gradient)


@pytest.mark.parametrize(
    "fields",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "forward_kl"},
        {"divergence": "total_variation"},
    ],
)
def test_a_student_that_is_its_own_teacher_gets_exactly_nothing(tmp_path, fields):
    step = take_step(tmp_path, teacher=make_model(), model=make_model(), **fields)
    assert step.loss.item() == 0.0
    assert all(not gradient.any() for gradient in step.gradient.values())


@pytest.mark.parametrize("fields", [{"support": "union_top_k", "support_size": 4}, {"divergence": "todi"}])
def test_a_student_that_is_its_own_teacher_gets_only_rounding(tmp_path, fields):
    step = take_step(tmp_path, teacher=student(), model=student(), **fields)
    assert abs(step.loss.item()) < 1e-15
    assert all(gradient.abs().max() < 1e-12 for gradient in step.gradient.values())


def test_masked_special_tokens_leave_the_loss_and_its_count(tmp_path):
    masked = [1, *range(6, 26)]  # <eos> and the letters a to t
    step = take_step(tmp_path, teacher=make_model(**TEACHER).double(), special_token_masking=["<eos>", *masked[1:]])
    kept = [loss_mask(inputs) * ~torch.isin(inputs["completion_ids"], torch.tensor(masked)) for inputs in step.batches]
    assert 0 < kept[0].sum() < loss_mask(step.batches[0]).sum()
    check(step, reverse_kl, masks=kept)


def tool_rollout(prompts, trainer):
    """Two written tokens, three from outside, one written; the last sample is cut short."""
    ids = [trainer.processing_class(text=prompt)["input_ids"] for prompt in prompts]
    completions = [[7 + i, 8, 20, 21, 22, 1] for i in range(len(prompts))]
    masks = [[1, 1, 0, 0, 0, 1] for _ in prompts]
    completions[-1], masks[-1] = [9, 10, 20], [1, 1, 0]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}


class TableTeacher:
    """Answers with the top 12 of a fixed random table, spoilt where the mask it was given does not hold."""

    def __init__(self, spoil: float | None = None):
        self.spoil = spoil

    def __call__(self, batch):
        generator = torch.Generator().manual_seed(3)
        shape = (*batch.completion_ids.shape, 51)
        logprobs, ids = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1).topk(12, -1)
        sampled_logprobs = logprobs[..., 3].clone()
        if self.spoil is not None:
            logprobs[~batch.completion_mask] = self.spoil
            sampled_logprobs[~batch.completion_mask] = self.spoil
        return TeacherScores(topk_ids=ids, topk_logprobs=logprobs, sampled_logprobs=sampled_logprobs)


@pytest.mark.parametrize("credit", [{}, {"credit": "policy_gradient", "support": "sampled", "discount": 0.5}])
@pytest.mark.parametrize("spoil", [-3.0, math.nan, -math.inf])
def test_scores_of_tool_pad_and_masked_tokens_change_nothing(tmp_path, credit, spoil):
    steps = [
        take_step(
            tmp_path,
            teacher=TableTeacher(value),
            special_token_masking=["<eos>"],
            arguments={"rollout_func": tool_rollout},
            **credit,
        )
        for value in (None, spoil)
    ]
    assert any(gradient.any() for gradient in steps[0].gradient.values())
    assert torch.equal(steps[0].loss, steps[1].loss)
    for name, gradient in steps[0].gradient.items():
        assert torch.equal(gradient, steps[1].gradient[name]), name


def test_truncated_completions_may_leave_the_loss(tmp_path):
    step = take_step(tmp_path, teacher=make_model(**TEACHER).double(), mask_truncated_completions=True)
    lengths = loss_mask(step.batches[0]).sum(1).tolist()
    assert 0 in lengths
    assert any(0 < length < 8 for length in lengths)
    check(step, reverse_kl)


@pytest.mark.parametrize("fields", [{}, {"support": "student_top_k", "support_size": 4}], ids=["full", "top-k"])
def test_the_triton_backend_gives_the_same_step(tmp_path, fields):
    steps = [
        take_step(tmp_path / name, model=make_model(), teacher=make_model(**TEACHER), loss_backend=name, **fields)
        for name in ("torch", "triton")
    ]
    assert_same_gradient(steps[1].gradient, steps[0].gradient, tolerance=1e-5)
    assert steps[0].logs.keys() == steps[1].logs.keys()
    for name in steps[0].logs:
        if name.startswith("distill/") and not name.endswith("per_second"):
            assert steps[1].logs[name] == pytest.approx(steps[0].logs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("fields", [{}, {"special_token_masking": ["<eos>", *range(6, 26)]}], ids=["all", "masked"])
def test_the_liger_backend_gives_the_same_step(tmp_path, fields):
    steps = [
        take_step(tmp_path / name, model=make_model(), teacher=make_model(**TEACHER), loss_backend=name, **fields)
        for name in ("torch", "liger")
    ]
    assert steps[1].loss.item() == pytest.approx(steps[0].loss.item(), rel=1e-5)
    assert_same_gradient(steps[1].gradient, steps[0].gradient, tolerance=1e-5)
    # It returns the scalar only: what was not computed is not logged
    names = {name for name in steps[1].logs if name.startswith("distill/")}
    assert names == {"distill/loss", "distill/tokens_per_second"}
    assert "entropy" not in steps[1].logs


def test_tool_tokens_leave_the_loss_and_its_count(tmp_path):
    step = take_step(
        tmp_path, teacher=make_model(**TEACHER).double(), arguments={"rollout_func": tool_rollout}, loss_type="grpo"
    )
    assert loss_mask(step.batches[0]).sum() == 3 * 3 + 2
    check(step, reverse_kl, "grpo")


def test_metrics_are_the_token_means_of_the_full_distributions(tmp_path):
    step = take_step(
        tmp_path,
        teacher=make_model(**TEACHER).double(),
        divergence="forward_kl",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        overlap_top_k=4,
    )
    rows: dict[str, list[Tensor]] = {}
    for inputs in step.batches:
        with torch.no_grad():
            s, t = (full_logprobs(m.double(), inputs) for m in (make_model(), make_model(**TEACHER)))
        tops = [torch.zeros_like(x).scatter(-1, x.topk(4, -1).indices, 1.0) for x in (s, t)]
        values = {
            "reverse_kl": reverse_kl(s, t),
            "forward_kl": forward_kl(s, t),
            "student_entropy": entropy(s),
            "teacher_entropy": entropy(t),
            "teacher_student_gap": sampled(t, inputs) - sampled(s, inputs),
            "overlap": (tops[0] * tops[1]).sum(-1) / 4,
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value[loss_mask(inputs).bool()])
    for name, parts in rows.items():
        assert step.logs[f"distill/{name}"] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5), name
    assert step.logs["distill/loss"] == pytest.approx(torch.cat(rows["forward_kl"]).mean().item(), rel=1e-5)
    assert step.logs["loss"] == pytest.approx(step.logs["distill/loss"], abs=1e-4)  # TRL rounds it
    # TRL's own metric is the mean of the micro-batches' means
    means = torch.stack([part.mean() for part in rows["student_entropy"]])
    assert step.logs["entropy"] == pytest.approx(means.mean().item(), rel=1e-5)


def count_forwards(trainer):
    """Runs of the student's and the teacher's backbones outside generation."""
    counts = {"student": 0, "teacher": 0, "generating": False}
    generate = trainer._generate_single_turn

    def generating(*args, **kwargs):
        counts["generating"] = True
        try:
            return generate(*args, **kwargs)
        finally:
            counts["generating"] = False

    trainer._generate_single_turn = generating

    def hook(name):
        def add(*args):
            counts[name] += not counts["generating"]

        return add

    trainer.model.model.register_forward_pre_hook(hook("student"))
    trainer.teacher.model.model.register_forward_pre_hook(hook("teacher"))
    return counts


@pytest.mark.parametrize(
    "fields",
    [{}, {"entropy_coef": 0.1}, {"credit": "policy_gradient", "support": "sampled"}, {"num_generations": 2}],
    ids=["direct", "entropy bonus", "policy gradient", "rewards"],
)
def test_student_and_teacher_run_once_for_each_micro_batch(tmp_path, fields):
    counts = {}

    def reward(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    take_step(
        tmp_path,
        prepare=lambda trainer: counts.update(counter=count_forwards(trainer)),
        teacher=make_model(**TEACHER).double(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        arguments={"reward_funcs": reward} if "num_generations" in fields else {"train_dataset": make_prompts(4)},
        **fields,
    )
    assert counts["counter"] == {"student": 2, "teacher": 2, "generating": False}
