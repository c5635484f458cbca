"""Policy-gradient credit, and the distillation beside GRPO's own terms, held against stock GRPOTrainers."""

import pytest
import torch
from steps import (
    assert_same_gradient,
    build,
    full_logprobs,
    gradient_of,
    loss_mask,
    reduce,
    sampled,
    student,
    take_step,
)
from tiny import make_model
from trl import GRPOTrainer

TEACHER = {"hidden_size": 24, "seed": 1}
SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
LOSS_TYPES = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]


def teacher():
    return make_model(**TEACHER).double()


def reward(completions, **kwargs):
    return [len(completion) + 0.3 * completion.count("e") for completion in completions]


def zero_reward(completions, **kwargs):
    return [0.0] * len(completions)


def keep_advantages(trainer, monkeypatch):
    """The per-token advantages that reach GRPO's surrogate, micro-batch by micro-batch."""
    kept = []
    compute_loss = GRPOTrainer._compute_loss

    def keep(self, model, inputs):
        loss = compute_loss(self, model, inputs)
        if self is trainer:
            kept.append(inputs["advantages"])
        return loss

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", keep)
    return kept


def log_ratios(inputs, temperature):
    """Teacher minus student log-prob of the sampled tokens, in float64."""
    with torch.no_grad():
        pair = [sampled(full_logprobs(m, inputs, temperature), inputs) for m in (student(), teacher())]
    return (pair[1] - pair[0]) * loss_mask(inputs)


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({}, 1.0),
        ({"discount": 0.6}, 1.0),
        ({"discount": 1.0, "advantage_clip": 1.5}, 1.0),
        ({"temperature": 0.7}, 0.7),
    ],
)
def test_the_advantage_is_the_discounted_log_ratio(tmp_path, monkeypatch, fields, temperature):
    kept = {}
    step = take_step(
        tmp_path,
        prepare=lambda trainer: kept.update(advantages=keep_advantages(trainer, monkeypatch)),
        teacher=teacher(),
        **SAMPLED,
        **fields,
    )
    (inputs,), (advantages,) = step.batches, kept["advantages"]
    gap = log_ratios(inputs, temperature)
    num_tokens = gap.shape[1]
    later = torch.arange(num_tokens)[None, :] - torch.arange(num_tokens)[:, None]
    discount = fields.get("discount", 0.0)
    powers = torch.where(later >= 0, torch.tensor(discount).double() ** later.clamp(min=0), 0.0)
    expected = (gap @ powers.T) * loss_mask(inputs)
    bound = fields.get("advantage_clip", 1e9)
    assert expected.abs().max() > 1.5
    assert torch.allclose(advantages, expected.clamp(-bound, bound), atol=1e-5)
    # One step on its own rollouts: the gradient is that of −Σ A log π over the mean of the tokens
    model = student()
    logprobs = sampled(full_logprobs(model, inputs, temperature), inputs)
    surrogate = -(logprobs * expected.clamp(-bound, bound) * loss_mask(inputs)).sum() / loss_mask(inputs).sum()
    assert_same_gradient(step.gradient, gradient_of(model, surrogate), tolerance=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_takes_the_advantages_as_grpo_would(tmp_path, monkeypatch, loss_type):
    kept = {}
    fields = {"loss_type": loss_type, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    step = take_step(
        tmp_path / "ours",
        prepare=lambda trainer: kept.update(advantages=keep_advantages(trainer, monkeypatch)),
        teacher=teacher(),
        discount=0.5,
        **SAMPLED,
        **fields,
    )
    stock = build(
        tmp_path / "stock",
        grpo=True,
        num_generations=2,
        arguments={"reward_funcs": zero_reward},
        **fields,
    )
    stock.current_gradient_accumulation_steps = 2
    stock.model.train()
    losses = []
    for inputs, advantages in zip(step.batches, kept["advantages"], strict=True):
        losses.append(stock._compute_loss(stock.model, {**inputs, "advantages": advantages}))
    total = torch.stack(losses).sum()
    assert step.loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert_same_gradient(step.gradient, gradient_of(stock.model, total))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_tokens_leave_the_policy_gradient_and_its_count(tmp_path, loss_type):
    """On its own rollouts the gradient of every surrogate is that of −A log π, over the tokens that are left."""
    masked = [1, *range(6, 26)]  # <eos> and the letters a to t
    step = take_step(
        tmp_path,
        teacher=teacher(),
        loss_type=loss_type,
        epsilon_high=2.0,  # CISPO clamps the ratio itself
        special_token_masking=masked,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        arguments={"rollout_func": some_masked},
        **SAMPLED,
    )
    model, values, masks = student(), [], []
    for inputs in step.batches:
        logprobs = sampled(full_logprobs(model, inputs), inputs)
        values.append(-log_ratios(inputs, 1.0) * logprobs)
        masks.append(loss_mask(inputs) * ~torch.isin(inputs["completion_ids"], torch.tensor(masked)))
    assert len({int(mask.sum()) for mask in masks}) == 2
    assert_same_gradient(step.gradient, gradient_of(model, reduce(values, masks, loss_type)), tolerance=1e-5)


def some_masked(prompts, trainer):
    """Completions in which each sample has tokens that stay and tokens that leave."""
    ids = [trainer.processing_class(text=prompt)["input_ids"] for prompt in prompts]
    completions = [[30, 8, 31], [7, 32, 33, 34, 9], [35, 36, 12, 37, 1], [38, 10, 11]]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def test_the_policy_gradient_logs_the_gap_and_a_reverse_kl_that_is_never_negative(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), **SAMPLED)
    (inputs,) = step.batches
    gap = log_ratios(inputs, 1.0)[loss_mask(inputs).bool()]
    assert step.logs["distill/teacher_student_gap"] == pytest.approx(gap.mean().item(), rel=1e-5)
    assert step.logs["distill/reverse_kl"] == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=1e-5)
    assert step.logs["distill/loss"] == pytest.approx(-gap.mean().item(), rel=1e-5)


def test_a_student_that_is_its_own_teacher_has_no_advantage(tmp_path):
    step = take_step(tmp_path, teacher=student(), **SAMPLED)
    assert abs(step.loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in step.gradient.values())


def combine(parts):
    """Σ coefficient · gradient."""
    names = {name for _, step in parts for name in step.gradient}
    return {name: sum(coef * step.gradient[name] for coef, step in parts if name in step.gradient) for name in names}


def same_rollouts(*steps):
    first = steps[0].batches
    for step in steps[1:]:
        for ours, theirs in zip(first, step.batches, strict=True):
            assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
            assert torch.equal(ours["prompt_ids"], theirs["prompt_ids"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_direct_credit_and_rewards_add_up_with_their_coefficients(tmp_path, loss_type):
    fields = {
        "loss_type": loss_type,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "temperature": 0.8,
    }
    rewards = {"arguments": {"reward_funcs": reward}}
    grpo = take_step(tmp_path / "grpo", grpo=True, **fields, **rewards)
    distill = take_step(tmp_path / "distill", teacher=teacher(), reward_coef=0.0, **fields, **rewards)
    both = take_step(tmp_path / "both", teacher=teacher(), reward_coef=0.7, distill_coef=0.3, **fields, **rewards)
    same_rollouts(grpo, distill, both)
    assert both.loss.item() == pytest.approx(0.7 * grpo.loss.item() + 0.3 * distill.loss.item(), abs=1e-6)
    assert_same_gradient(both.gradient, combine([(0.7, grpo), (0.3, distill)]))
    for name in ("reward", "reward_std", "rewards/reward/mean", "frac_reward_zero_std"):
        assert both.logs[name] == grpo.logs[name]
    assert both.logs["distill/loss"] == pytest.approx(distill.logs["distill/loss"], rel=1e-5)


def test_rewards_join_the_advantages_of_the_policy_gradient(tmp_path):
    # On its own rollouts this surrogate is linear in the advantages
    fields = {"num_generations": 2}
    rewards = {"arguments": {"reward_funcs": reward}}
    grpo = take_step(tmp_path / "grpo", grpo=True, **fields, **rewards)
    distill = take_step(tmp_path / "distill", teacher=teacher(), reward_coef=0.0, **fields, **rewards, **SAMPLED)
    both = take_step(
        tmp_path / "both", teacher=teacher(), reward_coef=0.7, distill_coef=0.3, **fields, **rewards, **SAMPLED
    )
    same_rollouts(grpo, distill, both)
    assert_same_gradient(both.gradient, combine([(0.7, grpo), (0.3, distill)]))
    assert both.loss.item() == pytest.approx(0.7 * grpo.loss.item() + 0.3 * distill.loss.item(), abs=1e-6)


@pytest.mark.parametrize("credit", [{}, SAMPLED], ids=["direct", "policy gradient"])
@pytest.mark.parametrize("fields", [{"beta": 0.5}, {"entropy_coef": 0.2}], ids=lambda f: next(iter(f)))
def test_reference_kl_and_entropy_bonus_keep_their_own_scale(tmp_path, fields, credit):
    # The reference differs from the student: a KL to its own start would have no gradient
    reference = make_model(seed=5).double()
    reference.save_pretrained(tmp_path / "reference")

    def model():
        made = student()
        made.config._name_or_path = str(tmp_path / "reference")
        return made

    grpo = take_step(
        tmp_path / "grpo",
        grpo=True,
        model=model(),
        num_generations=2,
        arguments={"reward_funcs": zero_reward},
        **fields,
    )
    common = {"num_generations": 2, "teacher": teacher(), **credit}
    distill = take_step(tmp_path / "distill", model=model(), **common)
    both = take_step(tmp_path / "both", model=model(), distill_coef=0.3, **common, **fields)
    same_rollouts(grpo, distill, both)
    assert_same_gradient(both.gradient, combine([(1.0, grpo), (0.3, distill)]))
    assert both.loss.item() == pytest.approx(grpo.loss.item() + 0.3 * distill.loss.item(), abs=1e-6)
    if "beta" in fields:
        assert both.logs["kl"] == pytest.approx(grpo.logs["kl"], rel=1e-5)


def test_without_rewards_no_reward_is_logged(tmp_path):
    step = take_step(tmp_path, teacher=teacher())
    assert not [key for key in step.logs if "reward" in key or "clip_ratio/" in key]
    assert not step.trainer._logs["rewards"]


def test_rewards_with_coefficient_zero_are_only_logged(tmp_path):
    plain = take_step(tmp_path / "plain", teacher=teacher())
    logged = take_step(tmp_path / "logged", teacher=teacher(), reward_coef=0.0, arguments={"reward_funcs": reward})
    same_rollouts(plain, logged)
    assert logged.logs["rewards/reward/mean"] > 0
    for name, gradient in plain.gradient.items():
        assert torch.equal(gradient, logged.gradient[name]), name


@pytest.mark.parametrize(
    "credit",
    [{}, {"entropy_coef": 0.01}, {"loss_backend": "liger"}, SAMPLED],
    ids=["direct", "entropy bonus", "liger", "policy gradient"],
)
def test_outside_tokens_that_the_student_finds_impossible_do_no_harm(tmp_path, credit):
    """Their log-probs are not computed, and the ratio to their old ones must not overflow into the loss."""

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(text=prompt)["input_ids"] for prompt in prompts]
        return {
            "prompt_ids": ids,
            "completion_ids": [[7 + i, *range(6, 46), 9] for i in range(len(prompts))],
            "logprobs": None,
            "env_mask": [[1] + [0] * 40 + [1] for _ in prompts],
        }

    model = student().float()
    with torch.no_grad():
        model.lm_head.weight.mul_(200.0)  # log-probs of many hundreds of nats
    step = take_step(
        tmp_path,
        model=model,
        teacher=teacher(),
        num_iterations=2,  # keeps the old log-probs
        max_completion_length=64,
        arguments={"rollout_func": rollout},
        **credit,
    )
    assert step.batches[0]["old_per_token_logps"].min() < -100
    assert torch.isfinite(step.loss)
    assert all(torch.isfinite(gradient).all() for gradient in step.gradient.values())
