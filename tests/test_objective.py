"""The slots composed: one optimizer step of the trainer beside plain autograd over full float64 logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from steps import (
    Step,
    assert_same_gradient,
    forward_kl,
    full_logprobs,
    gradient_of,
    loss_mask,
    reverse_kl,
    sampled,
    student,
    take_step,
)
from tiny import make_model
from torch import Tensor

from trl_opd import OnPolicyDistillConfig
from trl_opd.surrogate import leave_one_out
from trl_opd.teachers.answers import TeacherScoreError

SAMPLED = {"credit": "policy_gradient", "support": "sampled"}


def teacher() -> Any:
    return make_model(hidden_size=24, seed=1).double()


def reference(seed: int = 7) -> Any:
    return make_model(hidden_size=20, seed=seed).double()


def reward(completions, **kwargs):
    return [float(len(text) % 3) for text in completions]


def by_hand(step: Step, values: Callable[..., Tensor], *models: Any) -> Tensor:
    """Mean over the step's tokens of `values(s, inputs, *others)`, the log-probs (B, T, V) of student and others."""
    model, total, count = student(), 0.0, 0.0
    for inputs in step.batches:
        mask = loss_mask(inputs)
        with torch.no_grad():
            others = [full_logprobs(m, inputs) for m in models]
        per_token = values(full_logprobs(model, inputs), inputs, *others)
        total, count = total + (per_token * mask).sum(), count + mask.sum()
    by_hand.model = model
    return total / count


def check(step: Step, values: Callable[..., Tensor], *models: Any, tolerance: float = 1e-6) -> None:
    """The step's gradient is that of `by_hand`."""
    loss = by_hand(step, values, *models)
    assert_same_gradient(step.gradient, gradient_of(by_hand.model, loss), tolerance)


def normalized(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


TARGETS = {
    "taid": (
        {"target": "taid", "target_kwargs": {"t": 0.3}, "divergence": "forward_kl"},
        0,
        lambda s, t: (forward_kl, normalized(0.7 * s.detach() + 0.3 * t)),
    ),
    "veto": (
        {"target": "veto", "target_kwargs": {"beta": 0.8}},
        0,
        lambda s, t: (reverse_kl, normalized(t + 0.8 * s.detach())),
    ),
    "extrapolate": (
        {"target": "extrapolate", "target_kwargs": {"scale": 1.25}},
        1,
        lambda s, t, r: (reverse_kl, normalized(1.25 * t - 0.25 * r)),
    ),
    "delta": (
        {"target": "delta", "target_kwargs": {"scale": 0.6}, "divergence": "forward_kl"},
        2,
        lambda s, t, t0, s0: (forward_kl, normalized(s0 + 0.6 * (t - t0))),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_formed_inside_the_head(tmp_path, name):
    fields, count, target = TARGETS[name]
    references = [reference(7 + i) for i in range(count)]
    step = take_step(tmp_path, teacher=teacher(), arguments={"reference_model": references or None}, **fields)

    def values(s, inputs, *others):
        divergence, aimed = target(s, *others)
        return divergence(s, aimed)

    check(step, values, teacher(), *references)
    loss = by_hand(step, values, teacher(), *references)
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_contrast_turns_away_from_the_reference(tmp_path):
    step = take_step(
        tmp_path, teacher=teacher(), target="contrast", arguments={"reference_model": reference()}, distill_coef=2.0
    )

    def values(s, inputs, t, r):
        w = 15 * (t.exp() - r.exp()).abs().sum(-1, keepdim=True) + 1e-3
        return 2.0 * reverse_kl(s, normalized(t + w * (t - r))) / w[..., 0]

    check(step, values, teacher(), reference())


def test_metrics_speak_of_the_teacher_not_of_the_target(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), target="taid", target_kwargs={"t": 0.0}, divergence="forward_kl")
    kl = by_hand(step, lambda s, inputs, t: forward_kl(s, t), teacher())
    assert step.logs["distill/forward_kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert step.logs["distill/divergence"] == pytest.approx(0.0, abs=1e-9)


def test_sampled_tokens_need_only_the_affine_log_probs(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        target="extrapolate",
        target_kwargs={"scale": 1.5},
        arguments={"reference_model": reference()},
        **SAMPLED,
    )

    def values(s, inputs, t, r):
        own = sampled(s, inputs)
        advantage = 1.5 * sampled(t, inputs) - 0.5 * sampled(r, inputs) - own
        return -advantage.detach() * own

    check(step, values, teacher(), reference())


def test_a_combination_of_log_probs_may_be_above_zero(tmp_path):
    """The check of a teacher's log-probs is not for what is made of several."""
    fields = {"target": "extrapolate", "target_kwargs": {"scale": 9.0}, "arguments": {"reference_model": reference()}}
    step = take_step(tmp_path, teacher=teacher(), **fields, **SAMPLED)
    highest = []

    def values(s, inputs, t, r):
        own = sampled(s, inputs)
        aimed = 9.0 * sampled(t, inputs) - 8.0 * sampled(r, inputs)
        highest.append((aimed * loss_mask(inputs)).max().item())
        return -(aimed - own).detach() * own

    check(step, values, teacher(), reference())
    assert max(highest) > 0.1


def test_sampled_tokens_of_an_affine_target_with_the_student_in_it(tmp_path):
    kwargs = {"target": "affine", "target_kwargs": {"teacher": 1.2, "references": [-0.4], "student": 0.3}}
    step = take_step(
        tmp_path,
        teacher=teacher(),
        arguments={"reference_model": reference()},
        divergence="reverse_kl",
        **kwargs,
        **SAMPLED,
    )

    def values(s, inputs, t, r):
        own = sampled(s, inputs)
        return -(1.2 * sampled(t, inputs) - 0.4 * sampled(r, inputs) + 0.3 * own - own).detach() * own

    check(step, values, teacher(), reference())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_veto_of_sampled_tokens(tmp_path, beta):
    kwargs = {"target": "veto", "target_kwargs": {"beta": beta}}
    step = take_step(tmp_path, teacher=teacher(), **kwargs, **SAMPLED)

    def values(s, inputs, t):
        own = sampled(s, inputs)
        return -(sampled(t, inputs) - (1 - beta) * own).detach() * own

    check(step, values, teacher())


# Divergences of sampled tokens: u f'(u) - f(u), less its value at u = 1
ADVANTAGES = {
    "reverse_kl": lambda u: u.log(),
    "forward_kl": lambda u: u - 1,
    "total_variation": lambda u: 0.5 * (u - 1).sign(),
    "generalized_jsd": lambda u: 0.5 * ((1 + u) / 2).log(),
}


@pytest.mark.parametrize("divergence", ADVANTAGES)
def test_the_policy_gradient_of_an_f_divergence(tmp_path, divergence):
    step = take_step(tmp_path, teacher=teacher(), divergence=divergence, **SAMPLED)

    def values(s, inputs, t):
        own = sampled(s, inputs)
        return -ADVANTAGES[divergence]((sampled(t, inputs) - own).exp()).detach() * own

    check(step, values, teacher())


def test_k2_backpropagates_half_the_square(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), credit="k2", support="sampled")
    values = lambda s, inputs, t: 0.5 * (sampled(s, inputs) - sampled(t, inputs)).square()  # noqa: E731
    check(step, values, teacher())
    assert step.loss.item() == pytest.approx(by_hand(step, values, teacher()).item(), rel=1e-6)
    plain = take_step(tmp_path / "plain", teacher=teacher(), **SAMPLED)
    assert_same_gradient(step.gradient, plain.gradient)  # at ratio 1


def test_k2_beside_rewards(tmp_path):
    fields = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    rewards = {"arguments": {"reward_funcs": reward}}
    grpo = take_step(tmp_path / "grpo", grpo=True, **fields, **rewards)
    both = take_step(
        tmp_path, teacher=teacher(), credit="k2", support="sampled", distill_coef=0.01, **fields, **rewards
    )

    def values(s, inputs, t):
        own = sampled(s, inputs)
        return 0.01 * 0.5 * (own - sampled(t, inputs)).square() - inputs["advantages"][:, None] * own

    check(both, values, teacher())
    assert any((batch["advantages"] != 0).any() for batch in grpo.batches)


def test_combined_credit_is_the_sum_of_both(tmp_path):
    """EOPD: the sampled policy gradient, and the forward KL where the teacher is unsure."""
    step = take_step(
        tmp_path,
        teacher=teacher(),
        credit="combined",
        divergence="forward_kl",
        direct_coef=0.7,
        token_weighting={"entropy_gate": {"side": "teacher", "above": 3.2}},
    )
    shares = []

    def values(s, inputs, t):
        own = sampled(s, inputs)
        gate = (-(t.exp() * t).sum(-1) > 3.2).double()
        shares.append(gate.mean().item())
        return -(sampled(t, inputs) - own).detach() * own + 0.7 * gate * forward_kl(s, t)

    check(step, values, teacher())
    assert 0.1 < sum(shares) / len(shares) < 0.9, "the gate is open or shut everywhere"


def test_minillm_is_a_return_from_the_next_token_and_the_divergence_of_this_one(tmp_path):
    step = take_step(
        tmp_path, teacher=teacher(), credit="combined", discount=1.0, return_from_next=True, loss_type="luspo"
    )

    model = student()
    total = 0.0
    for inputs in step.batches:
        mask = loss_mask(inputs)
        with torch.no_grad():
            t = full_logprobs(teacher(), inputs)
        s = full_logprobs(model, inputs)
        own = sampled(s, inputs)
        gap = ((sampled(t, inputs) - own) * mask).detach()
        following = gap.flip(1).cumsum(1).flip(1) - gap
        total = total + ((reverse_kl(s, t) - following * own) * mask).sum(1).mean() / len(step.batches)
    assert_same_gradient(step.gradient, gradient_of(model, total))


def test_the_kl_baseline_is_subtracted(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), credit="policy_gradient", advantage_baseline="kl")

    def values(s, inputs, t):
        own = sampled(s, inputs)
        return -(sampled(t, inputs) - own + reverse_kl(s, t)).detach() * own

    check(step, values, teacher())


def test_the_floor_of_reopold(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), advantage_floor=-0.3, **SAMPLED)

    def values(s, inputs, t):
        own = sampled(s, inputs)
        return -(sampled(t, inputs) - own).detach().clamp(min=-0.3) * own

    check(step, values, teacher())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_local_weights_are_applied_before_the_gradient(tmp_path, accumulation):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        token_weighting="idft",
        gradient_accumulation_steps=accumulation,
        num_generations=1,
    )
    assert not step.trainer.objective.per_token

    def values(s, inputs, t):
        weight = 0.1 + 0.9 * torch.sigmoid(-(sampled(s, inputs) - (s.exp() * s).sum(-1)))
        return weight.detach() * reverse_kl(s, t)

    check(step, values, teacher())
    assert step.loss.item() == pytest.approx(by_hand(step, values, teacher()).item(), rel=1e-6)


def test_weights_of_the_rollout_alone_enter_the_reduction(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), token_weighting={"prefix": {"length": 2}})
    assert not step.trainer.objective.per_token

    def values(s, inputs, t):
        first = torch.arange(s.shape[1]) < 2
        return first.double() * reverse_kl(s, t)

    check(step, values, teacher())
    assert 0 < step.logs["distill/weighted_share"] < 1


def test_global_weights_take_the_values_per_token(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), token_weighting={"entropy_top": {"fraction": 0.5}})
    assert step.trainer.objective.per_token

    def values(s, inputs, t):
        mask = loss_mask(inputs).bool()
        entropy = -(s.exp() * s).sum(-1)
        kept = entropy >= entropy[mask].sort(descending=True).values[math.ceil(0.5 * mask.sum().item()) - 1]
        assert 0 < (kept & mask).sum() < mask.sum()
        return kept.double() * reverse_kl(s, t)

    check(step, values, teacher())


@pytest.mark.parametrize("local", [True, False])
def test_weights_of_one_change_nothing_to_the_bit(tmp_path, local):
    plain = take_step(tmp_path / "plain", teacher=teacher())
    spec = {"selectkd": {"beta": 1.0}} if local else {"entropy_top": {"fraction": 1.0}}
    weighed = take_step(tmp_path / "weighed", teacher=teacher(), token_weighting=spec)
    assert torch.equal(plain.loss, weighed.loss) or not local
    for name, gradient in plain.gradient.items():
        if local:
            assert torch.equal(gradient, weighed.gradient[name]), name
        else:
            torch.testing.assert_close(gradient, weighed.gradient[name], rtol=1e-9, atol=1e-12)


IDENTITIES = {
    "target": {"target": "veto", "target_kwargs": {"beta": 0.0}},
    "target_affine": {"target": "affine"},
    "token_weighting": {"token_weighting": {"idft": {"low": 1.0, "high": 1.0}}},
    "divergence": {"divergence": "convex_mix", "divergence_kwargs": {"reverse_kl": 1.0}},
    "divergence_gate": {"divergence": "entropy_gated_kl", "divergence_kwargs": {"threshold": math.inf}},
    "temperature": {"distill_temperature": 1.0},
    "rollout": {"off_policy_source": "teacher", "replay_size": 17},
}


@pytest.mark.parametrize("slot", IDENTITIES)
def test_the_identity_of_each_slot_is_bit_equal(tmp_path, slot):
    plain = take_step(tmp_path / "plain", teacher=teacher())
    same = take_step(tmp_path / "same", teacher=teacher(), **IDENTITIES[slot])
    assert torch.equal(plain.loss, same.loss)
    for name, gradient in plain.gradient.items():
        assert torch.equal(gradient, same.gradient[name]), name


SAMPLED_IDENTITIES = {
    "floor": {"advantage_floor": -1e9},
    "anchor": {"ratio_anchor": 1.0},
    "truncate": {"importance_weighting": "truncate", "importance_high": 5.0},
    "band": {"importance_weighting": "band", "importance_low": 0.5, "importance_high": 2.0},
    "target": {"target": "veto", "target_kwargs": {"beta": 0.0}},
    "weight": {"token_weighting": {"importance": {"gamma": 0.0}}},
}


@pytest.mark.parametrize("slot", SAMPLED_IDENTITIES)
def test_the_identity_of_each_slot_of_sampled_tokens_is_bit_equal(tmp_path, slot):
    plain = take_step(tmp_path / "plain", teacher=teacher(), **SAMPLED)
    same = take_step(tmp_path / "same", teacher=teacher(), **SAMPLED, **SAMPLED_IDENTITIES[slot])
    assert torch.equal(plain.loss, same.loss)
    for name, gradient in plain.gradient.items():
        assert torch.equal(gradient, same.gradient[name]), name


GROUPS = {"num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def test_the_gate_distils_what_failed(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        reward_mix="gate",
        reward_mix_kwargs={"on": "failure", "threshold": 1.0},
        reward_coef=0.0,
        arguments={"reward_funcs": reward},
        **GROUPS,
    )
    kept = [batch["rewards"] < 1 for batch in step.batches]
    assert 0 < sum(int(k.sum()) for k in kept) < sum(len(k) for k in kept)
    check(step, lambda s, inputs, t: (inputs["rewards"] < 1).double()[:, None] * reverse_kl(s, t), teacher())


def test_the_product_keeps_the_sign_of_the_reward(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        reward_mix="multiply",
        reward_mix_kwargs={"strength": 0.5, "clip": 0.2},
        arguments={"reward_funcs": reward},
        **GROUPS,
        **SAMPLED,
    )

    def values(s, inputs, t):
        own = sampled(s, inputs)
        a = inputs["advantages"][:, None]
        factor = 0.5 + 0.5 * (a.sign() * (sampled(t, inputs) - own)).exp().clamp(0.8, 1.2)
        return -(a * factor).detach() * own

    check(step, values, teacher())


def test_rlad_anchors_the_ratio(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        ratio_anchor=0.6,
        distill_coef=0.0,
        epsilon=1e9,
        epsilon_high=1e9,
        arguments={"reward_funcs": reward},
        **GROUPS,
        **SAMPLED,
    )

    def values(s, inputs, t):
        own = sampled(s, inputs)
        ratio = (own - 0.6 * own.detach() - 0.4 * sampled(t, inputs)).exp()
        return -ratio * inputs["advantages"][:, None]

    check(step, values, teacher())


@pytest.mark.parametrize("mode", ["truncate", "band"])
def test_importance_weights_replace_the_clipped_ratio(tmp_path, mode):
    """In the second iteration over a batch: detached weights of the ratio, and no ratio inside the surrogate."""
    bounds = {"importance_high": 1.01} | ({"importance_low": 0.97} if mode == "band" else {})
    seen = []

    def watch(trainer):
        set_inputs = trainer.objective._surrogate.set_inputs

        def keep(batch, logps, *others):
            old = batch.inputs["old_per_token_logps"]
            set_inputs(batch, logps, *others)
            seen.append((batch, logps.detach(), old))

        trainer.objective._surrogate.set_inputs = keep

    step = take_step(
        tmp_path,
        prepare=watch,
        teacher=teacher(),
        importance_weighting=mode,
        num_iterations=2,
        max_steps=2,
        learning_rate=3e-3,
        **bounds,
        **SAMPLED,
    )
    assert step.trainer.state.log_history[0]["distill/importance_weight"] == pytest.approx(1.0)
    batch, now, old = seen[-1]
    mask = batch.loss_mask
    ratio = (now - old).exp()
    weights = ratio.clamp(max=1.01) if mode == "truncate" else ratio * ((ratio >= 0.97) & (ratio <= 1.01))
    assert (weights != ratio)[mask].any(), "no ratio is out of its bounds"
    torch.testing.assert_close(batch.inputs["advantages"][mask], (batch.advantages * weights)[mask])
    assert "old_per_token_logps" not in batch.inputs


def test_the_beta_kernel_weighs_completions(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        sample_weighting={"beta_kernel": {"scale": 4.0}},
        reward_coef=0.0,
        arguments={"reward_funcs": lambda completions, **kwargs: [float(len(text) % 2) for text in completions]},
        **{**GROUPS, "per_device_train_batch_size": 8},
    )
    rates = [batch["pass_rate"] for batch in step.batches]
    assert len({r.item() for rate in rates for r in rate}) > 1

    def values(s, inputs, t):
        p = inputs["pass_rate"].double()
        return (4 * p * (1 - p))[:, None] * reverse_kl(s, t)

    check(step, values, teacher())


def nothing(stats):
    return torch.zeros_like(stats.student_entropy)


def test_a_step_without_weights_is_skipped_and_counted(tmp_path):
    before = {name: p.clone() for name, p in student().named_parameters()}
    step = take_step(tmp_path, teacher=teacher(), token_weighting=f"{__name__}.nothing", weight_decay=0.5)
    for name, p in step.trainer.model.named_parameters():
        assert torch.equal(p, before[name].to(p)), name
    assert step.logs["distill/skipped_steps"] == 1.0
    assert step.logs["distill/loss"] == 0.0


def bad(stats):
    weights = torch.ones_like(stats.student_entropy)
    weights[0, 0] = math.nan
    return weights


def negative(stats):
    return -torch.ones_like(stats.student_entropy)


@pytest.mark.parametrize(("name", "words"), [("bad", "finite weights"), ("negative", "at least 0")])
def test_weights_that_are_not_weights_stop_the_run(tmp_path, name, words):
    with pytest.raises(TeacherScoreError, match=words) as error:
        take_step(tmp_path, teacher=teacher(), token_weighting=f"{__name__}.{name}")
    assert str(error.value).startswith(f"token_weighting '{__name__}.{name}'")
    assert "No step was taken. A checkpoint of step 0" in str(error.value)


def test_the_divergence_of_other_completions_is_their_own(tmp_path):
    rows = Dataset.from_dict({"prompt": ["ab", "cd", "ef", "gh"] * 4, "completion": ["hgf", "ed", "cba", "h"] * 4})
    fields = {
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "injected_completions": 1,
        "off_policy_weight": 0.5,
        "off_policy_divergence": "forward_kl",
        "arguments": {"train_dataset": rows},
    }
    step = take_step(tmp_path, teacher=teacher(), **fields)
    assert all(batch["on_policy"].any() and not batch["on_policy"].all() for batch in step.batches)

    def values(s, inputs, t):
        own = inputs["on_policy"][:, None]
        return torch.where(own, reverse_kl(s, t), 0.5 * forward_kl(s, t))

    check(step, values, teacher())


def test_adaptive_temperatures_follow_the_hellinger_distance(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), temperature_adaptation=0.5)

    def values(s, inputs, t):
        mask = loss_mask(inputs).bool()
        h = (0.5 * ((0.5 * s).exp() - (0.5 * t).exp()).square().sum(-1)).sqrt().detach()
        tau = (-0.5 * torch.tanh((h / h[mask].median()).log())).exp()[..., None]
        return tau[..., 0].square() * reverse_kl(normalized(s / tau), normalized(t / tau))

    check(step, values, teacher())


CONFLICTS = [
    ({"credit": "k1"}, ["credit", "k2"]),
    ({"credit": "k2", "support": "full"}, ["support", "sampled"]),
    ({"credit": "combined", "support": "sampled"}, ["support", "combined"]),
    ({**SAMPLED, "advantage_baseline": "kl"}, ["support", "advantage_baseline"]),
    ({**SAMPLED, "token_weighting": {"adakd": {}}}, ["support", "hellinger"]),
    ({"student_fraction": 0.5, **SAMPLED}, ["credit", "direct"]),
    ({"off_policy_weight": 0.5}, ["off_policy_weight", "student_fraction"]),
    ({"injected_completions": 1}, ["injected_completions", "num_generations"]),
    ({"token_weighting": {"direction_adaptive": {}}}, ["advantage_clip", "direction_adaptive"]),
    ({**SAMPLED, "token_weighting": {"direction_adaptive": {}}}, ["advantage_clip"]),
    ({"target": "extrapolate", **SAMPLED, "discount": 0.5}, ["discount", "normaliser"]),
    ({"target": "taid", "target_kwargs": {"tt": 0.5}}, ["target_kwargs", "tt"]),
    ({"reward_mix": "multiply"}, ["credit", "multiply"]),
    ({"importance_weighting": "band", "importance_high": 2.0}, ["importance_low", "band"]),
    ({"importance_high": 2.0}, ["importance_high", "clip"]),
    ({"direct_coef": 0.5}, ["direct_coef", "combined"]),
    ({"advantage_floor": -1.0}, ["advantage_floor", "direct"]),
    ({**SAMPLED, "return_from_next": True}, ["return_from_next", "discount"]),
    ({"special_token_occurrence": "first"}, ["special_token_occurrence", "special_token_masking"]),
    ({"loss_backend": "liger", "token_weighting": "idft"}, ["loss_backend", "token_weighting"]),
    ({**SAMPLED, "temperature_adaptation": 0.5}, ["temperature_adaptation"]),
    ({"student_fraction": 0.8, "replay_fraction": 0.4}, ["student_fraction", "replay_fraction"]),
]


@pytest.mark.parametrize(("fields", "words"), CONFLICTS, ids=["-".join(f) for f, _ in CONFLICTS])
def test_slots_that_exclude_each_other_are_named(tmp_path, fields, words):
    with pytest.raises(ValueError) as error:
        OnPolicyDistillConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)
    for word in words:
        assert word in str(error.value)


def test_whitening_before_and_after_the_rewards_are_two_objectives(tmp_path):
    """`distill` whitens what is added to the rewards, `mixed` the sum."""
    fields = {**GROUPS, **SAMPLED, "scale_rewards": "none", "arguments": {"reward_funcs": reward}}
    separate = take_step(tmp_path / "a", teacher=teacher(), advantage_whitening="distill", **fields)
    together = take_step(tmp_path / "b", teacher=teacher(), advantage_whitening="mixed", **fields)

    def white(x, mask):
        kept = x[mask]
        return (x - kept.mean()) / (kept.std(correction=0) + 1e-4)

    def values(s, inputs, t, mixed):
        own = sampled(s, inputs)
        mask = loss_mask(inputs).bool()
        gap, rewards = (sampled(t, inputs) - own).detach(), inputs["advantages"][:, None]
        advantage = white(gap + rewards, mask) if mixed else white(gap, mask) + rewards
        return -advantage * own

    check(separate, lambda s, inputs, t: values(s, inputs, t, False), teacher())
    check(together, lambda s, inputs, t: values(s, inputs, t, True), teacher())


def test_luffy_shapes_the_rewards_of_what_was_injected(tmp_path):
    rows = Dataset.from_dict({"prompt": ["ab", "cd", "ef", "gh"] * 4, "completion": ["hgf", "ed", "cba", "h"] * 4})
    step = take_step(
        tmp_path,
        teacher=teacher(),
        num_generations=2,
        per_device_train_batch_size=4,
        injected_completions=1,
        injected_shaping=0.1,
        distill_coef=0.0,
        arguments={"train_dataset": rows, "reward_funcs": reward},
    )

    def values(s, inputs, t):
        own = sampled(s, inputs)
        shaped = own.exp() / (own.exp() + 0.1)  # f(p), differentiated
        loss = torch.where(inputs["on_policy"][:, None], (own - own.detach()).exp(), shaped)
        return -inputs["advantages"][:, None] * loss

    check(step, values, teacher())


def test_a_completion_of_another_policy_has_no_ratio_to_the_student(tmp_path):
    """In later iterations over a batch GRPO divides by old log-probs: of injected members by those of this moment."""
    rows = Dataset.from_dict({"prompt": ["ab", "cd", "ef", "gh"] * 4, "completion": ["hgf", "ed", "cba", "h"] * 4})
    seen = []

    def watch(trainer):
        set_inputs = trainer.objective._surrogate.set_inputs

        def keep(batch, logps, *others):
            set_inputs(batch, logps, *others)
            old = batch.inputs.get("old_per_token_logps")
            seen.append((batch.inputs["on_policy"], None if old is None else (old - logps.detach()).abs().sum(1)))

        trainer.objective._surrogate.set_inputs = keep

    take_step(
        tmp_path,
        prepare=watch,
        teacher=teacher(),
        num_generations=2,
        per_device_train_batch_size=4,
        injected_completions=1,
        num_iterations=2,
        max_steps=2,
        arguments={"train_dataset": rows, "reward_funcs": reward},
    )
    on_policy, change = seen[-1]
    assert (change[on_policy] > 0).any()
    assert (change[~on_policy] == 0).all()


def test_the_reward_tilt_adds_the_reward_over_beta(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        target="reward_tilt",
        target_kwargs={"beta": 0.5},
        reward_coef=0.0,
        arguments={"reward_funcs": reward},
        **GROUPS,
        **SAMPLED,
    )

    def values(s, inputs, t):
        own = sampled(s, inputs)
        group = inputs["group_rewards"].double()  # of two: the other one's is the baseline
        tilt = 2 * inputs["rewards"] - group.sum(1)
        return -((sampled(t, inputs) - own).detach() + tilt[:, None] / 0.5) * own

    check(step, values, teacher())


def test_the_baseline_of_a_tilt_is_the_mean_of_the_others():
    nan = math.nan
    groups = torch.tensor([[1.0, 0.0, 5.0], [2.0, nan, 4.0], [nan, nan, 3.0], [nan, nan, nan]])
    inputs = {"rewards": groups.flatten(), "group_rewards": groups.repeat_interleave(3, 0)}
    expected = [1 - 2.5, 0 - 3.0, 5 - 0.5, 2 - 4.0, 0.0, 4 - 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    assert leave_one_out(inputs).tolist() == expected


@pytest.mark.parametrize("horizon", [1, 2])
def test_ketchup_takes_the_teachers_logits_for_values(tmp_path, horizon):
    step = take_step(
        tmp_path, teacher=teacher(), credit="policy_gradient", advantage_signal="teacher_q", return_horizon=horizon
    )
    model, total, count = student(), 0.0, 0.0
    for inputs in step.batches:
        mask = loss_mask(inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = teacher()(input_ids=ids, attention_mask=attention).logits.double()
        logits = logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]
        q, best = sampled(logits, inputs) * mask, logits.max(-1).values * mask
        returns = torch.zeros_like(q)
        for row in range(len(q)):
            length = int(mask[row].sum())
            for t in range(length):
                for start in range(t, length, horizon):  # blocks of K tokens, telescoped
                    end = start + horizon
                    returns[row, t] += q[row, start] - (best[row, end] if end < length else 0.0)
        own = sampled(full_logprobs(model, inputs), inputs)
        total, count = total - (returns * own * mask).sum(), count + mask.sum()
    assert_same_gradient(step.gradient, gradient_of(model, total / count))


def test_weights_multiply_the_advantages_of_sampled_tokens(tmp_path):
    step = take_step(tmp_path, teacher=teacher(), token_weighting={"prefix": {"length": 2}}, **SAMPLED)

    def values(s, inputs, t):
        own = sampled(s, inputs)
        first = (torch.arange(s.shape[1]) < 2).double()
        return -first * (sampled(t, inputs) - own).detach() * own

    check(step, values, teacher())


def test_the_gate_multiplies_the_advantages_of_the_distillation_alone(tmp_path):
    step = take_step(
        tmp_path,
        teacher=teacher(),
        reward_mix="gate",
        reward_mix_kwargs={"on": "success", "threshold": 1.0},
        arguments={"reward_funcs": reward},
        **GROUPS,
        **SAMPLED,
    )
    kept = torch.cat([batch["rewards"] >= 1 for batch in step.batches])
    assert kept.any() and not kept.all()

    def values(s, inputs, t):
        own = sampled(s, inputs)
        gate = (inputs["rewards"] >= 1).double()[:, None]
        return -(gate * (sampled(t, inputs) - own) + inputs["advantages"][:, None]).detach() * own

    check(step, values, teacher())


@pytest.mark.parametrize("credit", ["direct", "k2", "policy_gradient"])
def test_weights_and_factors_multiply(tmp_path, credit):
    """A token's weight, its completion's factor and its reduction weight, each exactly once."""
    support = {} if credit == "direct" else {"support": "sampled"}
    step = take_step(
        tmp_path,
        teacher=teacher(),
        credit=credit,
        token_weighting="idft",
        sample_weighting={"beta_kernel": {"a": 0.0, "b": 0.0, "scale": 3.0}},
        reward_coef=0.0,
        arguments={"reward_funcs": reward},
        **support,
        **GROUPS,
    )

    def values(s, inputs, t):
        own, other = sampled(s, inputs), sampled(t, inputs)
        weight = 0.1 + 0.9 * torch.sigmoid(-(own - (s.exp() * s).sum(-1))).detach()
        term = {
            "direct": reverse_kl(s, t),
            "k2": 0.5 * (own - other).square(),
            "policy_gradient": -(other - own).detach() * own,
        }[credit]
        return 3 * weight * term

    check(step, values, teacher())


def test_a_reference_that_gives_nan_stops_the_run(tmp_path):
    broken = reference()
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(TeacherScoreError, match="not finite: nan at completion token"):
        take_step(tmp_path, teacher=teacher(), target="extrapolate", arguments={"reference_model": broken})


def test_freshness_sees_the_policy_that_sampled_in_later_iterations(tmp_path):
    """Without a surrogate too, where nothing else reads the old log-probs."""
    fields = {"sample_weighting": {"freshness": {"kappa": 1.0}}, "num_iterations": 2, "max_steps": 2}
    step = take_step(tmp_path, teacher=teacher(), learning_rate=3e-3, **fields)
    weights = [log["distill/token_weight"] for log in step.trainer.state.log_history[:2]]
    assert weights[0] == pytest.approx(1.0)
    assert weights[1] < 0.999
