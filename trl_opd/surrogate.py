# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What GRPO's own surrogate is given: advantages of tokens, and the policy that its ratio divides by.

The order: gap → floor → f or power → returns → baseline → clip → whitening → factors and token weights → coefficient →
rewards → whitening of the sum → importance weight. GRPO then multiplies by its ratio, clips and reduces.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import OnPolicyDistillConfig
from .credit import (
    anchored_logprobs,
    importance_weights,
    mean_and_std,
    moment_sums,
    sampled_advantages,
    shaping_weights,
    telescoped_returns,
    whitened,
)
from .rewards import multiply_sign_preserving, resolve_reward_mix
from .student import MicroBatch

if TYPE_CHECKING:
    from .objective import Objective


class Surrogate:
    """
    Args:
        objective ([`Objective`]): Whose part it is.
    """

    def __init__(self, objective: "Objective"):
        self.objective, self.trainer = objective, objective.trainer

    @property
    def args(self) -> OnPolicyDistillConfig:
        return self.trainer.args

    def set_inputs(self, batch: MicroBatch, logps: Tensor, teacher: Tensor | None, weights: Tensor | None) -> None:
        """
        Put the advantages and the log-probs of the ratio's denominator into `batch.inputs`.

        Args:
            batch ([`MicroBatch`]): Scored, and with the student's output where distributions are compared.
            logps (`torch.Tensor`): The student's log-probs of the sampled tokens, `(B, T)`.
            teacher (`torch.Tensor`, *optional*): Those of the distribution aimed at, `(B, T)`.
            weights (`torch.Tensor`, *optional*): Weights of the distillation's advantages, `(B, T)`.
        """
        args, inputs, trainer = self.args, batch.inputs, self.trainer
        rewards: Tensor | float = 0.0
        if trainer.has_rewards:
            rewards = inputs["advantages"][:, None]
            if "on_policy" in inputs and args.injected_shaping is not None:
                shaping = shaping_weights(logps, args.injected_shaping)
                rewards = torch.where(inputs["on_policy"][:, None], rewards, rewards * shaping)
        if self.objective.target.reward_coef and "rewards" in inputs:
            rewards = rewards + self.objective.target.reward_coef * leave_one_out(inputs)[:, None]
        advantages: Tensor | float = rewards
        if args.reward_mix == "multiply":
            assert teacher is not None
            _, mix = resolve_reward_mix("multiply", args.reward_mix_kwargs)  # type: ignore[arg-type]
            gap = teacher - _sampled_by(inputs, logps)
            advantages = multiply_sign_preserving(
                torch.as_tensor(rewards), gap, float(mix["strength"]), float(mix["clip"]), batch.distill_mask
            )
        elif args.credit in ("policy_gradient", "combined"):
            assert teacher is not None
            batch.advantages = self._distill_advantages(batch, logps, teacher, weights)
            advantages = args.distill_coef * self._mask_ratio(batch) * batch.advantages + rewards
        if isinstance(advantages, Tensor):
            if args.advantage_whitening == "mixed":
                advantages = self._whiten(advantages.expand(logps.shape), batch.loss_mask)
            # Without a policy gradient GRPO's own (B,) advantages stay as they are
            inputs["advantages"] = advantages if advantages.shape[1] > 1 else advantages[:, 0]
        self._set_ratio(batch, logps, teacher)

    def _distill_advantages(self, batch: MicroBatch, logps: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        args, mask = self.args, batch.distill_mask
        student = _sampled_by(batch.inputs, logps)
        output = batch.output
        if args.advantage_signal == "teacher_q":
            assert output is not None and output.teacher_logsumexp is not None
            assert output.teacher_max_logprob is not None
            values = teacher + output.teacher_logsumexp
            best = output.teacher_max_logprob + output.teacher_logsumexp
            advantages = telescoped_returns(values, best, mask, args.return_horizon or 1)
            if args.advantage_clip is not None:
                advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
        else:
            baseline = None
            if args.advantage_baseline == "kl":
                assert output is not None and output.reverse_kl is not None
                baseline = -output.reverse_kl.detach()
            advantages = sampled_advantages(
                student,
                teacher,
                mask,
                args.discount,
                args.advantage_clip,
                divergence="reverse_kl" if args.credit == "combined" else args.divergence,
                divergence_params=None if args.credit == "combined" else args.divergence_kwargs,  # type: ignore[arg-type]
                power=args.advantage_power,
                floor=args.advantage_floor,
                baseline=baseline,
                horizon=args.return_horizon,
                normalize_length=args.return_normalization,
                from_next=args.return_from_next,
            )
        if args.advantage_whitening == "distill":
            advantages = self._whiten(advantages, mask)
        if batch.factors is not None:
            advantages = advantages * batch.factors[:, None]
        return advantages if weights is None else advantages * weights

    def _whiten(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean 0 and deviation 1 over the masked tokens of all processes' micro-batches."""
        sums = self.trainer.accelerator.reduce(moment_sums(values, mask), reduction="sum")
        return whitened(values, mask, moments=mean_and_std(sums))

    def _set_ratio(self, batch: MicroBatch, logps: Tensor, teacher: Tensor | None) -> None:
        """What GRPO divides the student's probabilities by."""
        args, inputs = self.args, batch.inputs
        now, old = logps.detach(), inputs.get("old_per_token_logps")
        if args.importance_weighting != "clip":
            sampler = sampler_logprobs(inputs)
            if sampler is not None:
                weights = importance_weights(
                    (now - sampler).masked_fill(~batch.loss_mask, 0.0),
                    args.importance_weighting,
                    args.importance_low,
                    args.importance_high,
                )
                if "on_policy" in inputs:  # what another policy wrote has no ratio to this one
                    weights = torch.where(inputs["on_policy"][:, None], weights, 1.0)
                batch.importance = weights
                advantages = inputs["advantages"]
                inputs["advantages"] = (advantages[:, None] if advantages.dim() == 1 else advantages) * weights
            old = None
            inputs.pop("old_per_token_logps", None)
        if args.ratio_anchor != 1.0:
            assert teacher is not None
            anchored = anchored_logprobs(now if old is None else old, teacher, args.ratio_anchor)
            old = torch.where(batch.distill_mask, anchored, now if old is None else old)
        if "on_policy" in inputs and old is not None:  # such a token's ratio would compare with a policy it is not of
            old = torch.where(inputs["on_policy"][:, None], old, now)
        if old is not None:
            inputs["old_per_token_logps"] = old

    def _mask_ratio(self, batch: MicroBatch) -> Tensor | float:
        """GRPO's surrogate divides by all of its tokens: what brings it to a mean over those that are distilled."""
        if not self.trainer.may_mask:
            return 1.0
        ours = self.objective.reduction_weights(batch.distill_mask, batch.inputs["num_distill_tokens"])
        return ours / self.objective.reduction_weights(batch.loss_mask, batch.inputs["num_items_in_batch"]).clamp(
            min=1e-30
        )


def leave_one_out(inputs: Mapping[str, Any]) -> Tensor:
    """
    Each completion's reward less the mean of its group's others, `(B,)`: a baseline that leaves the mean gradient as
    it is. The reward itself of a group of one; 0 where there is none.
    """
    own: Tensor = inputs["rewards"]
    group: Tensor = inputs["group_rewards"]
    scored = ~group.isnan()
    others = scored.sum(1) - (~own.isnan()).long()
    mean = (group.nansum(1) - own.nan_to_num()) / others.clamp(min=1)
    return (own - mean).nan_to_num()


def sampler_logprobs(inputs: Mapping[str, Any]) -> Tensor | None:
    """Log-probs of the sampled tokens under the policy that sampled them, if that is not the student as it is."""
    return inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))


def _sampled_by(inputs: Mapping[str, Any], logps: Tensor) -> Tensor:
    """The student's log-probs at the time of sampling, as far as they are known, `(B, T)`."""
    return inputs.get("old_per_token_logps", logps.detach())
