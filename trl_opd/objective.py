# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
The objective of a micro-batch: the slots of the configuration, composed.

The distillation enters the loss in up to two ways, each Σ over tokens of reduction weight · factor · token weight ·
something: the divergence itself (`credit="direct"`, `"combined"`; half the squared log-ratio for `"k2"`), and the
advantages of GRPO's own surrogate (`"policy_gradient"`, `"combined"`). Factors are per completion: where it came from,
its sample weight, and the gate of its reward. What needs nothing but a token's own statistics is weighted inside the
fused divergence; what needs the whole micro-batch takes its differentiable per-token values.

Fields of the configuration are read anew for every micro-batch: schedules change them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import OnPolicyDistillConfig
from .credit import k2_loss
from .preflight import needs_per_token_grad
from .rewards import resolve_reward_mix, reward_gate
from .sample_weights import SampleStats, resolve_sample_weighting, sample_weights
from .student import MicroBatch, sampled_answer
from .surrogate import Surrogate, sampler_logprobs
from .targets import Target, resolve_target
from .teachers.answers import TeacherScoreError
from .token_weights import (
    ResolvedWeighting,
    TokenStats,
    resolve_token_weighting,
    rollout_only,
    step_index_from_tool_mask,
    token_weights,
)
from .weighting import reduction_weights as token_reduction_weights

if TYPE_CHECKING:
    from .trainer import OnPolicyDistillTrainer


class Objective:
    """
    What a trainer's loss is made of.

    Args:
        trainer ([`OnPolicyDistillTrainer`]): The run.
        num_references (`int`): Number of models in `reference_model=`.
    """

    def __init__(self, trainer: "OnPolicyDistillTrainer", num_references: int = 0):
        self.trainer, self.num_references = trainer, num_references
        self._surrogate = Surrogate(self)
        self._weight_sum: Tensor | None = None  # of the optimizer step that is being made

    @property
    def args(self) -> OnPolicyDistillConfig:
        return self.trainer.args

    # What the pass over the student must give

    @property
    def uses_distributions(self) -> bool:
        """Whether the teacher's distribution is compared, and not its log-probs of the sampled tokens alone."""
        return self.args.support != "sampled"

    @property
    def policy_gradient(self) -> bool:
        """Whether the gap enters the advantages."""
        return self.args.credit in ("policy_gradient", "combined")

    @property
    def surrogate(self) -> bool:
        """Whether GRPO's part of the loss has a gradient."""
        trained = self.policy_gradient or self.args.reward_mix == "multiply"
        return trained or needs_per_token_grad(self.args, self.trainer.has_rewards)

    @property
    def per_token(self) -> bool:
        """Whether the fused divergence must give differentiable values per token."""
        return self.surrogate or self.args.credit != "direct" or not self._weighs_locally

    @property
    def _weighs_locally(self) -> bool:
        """Whether all weights of tokens are known before the gradient is formed."""
        weightings = resolve_token_weighting(self.args.token_weighting)
        # The op knows the teacher's log-probs of the sampled tokens only if it knows all of its distribution
        local = all(w.local and "teacher_logprobs" not in w.needs for w in weightings)
        return (local or rollout_only(weightings)) and not self._weighs_drift

    @property
    def _weighs_drift(self) -> bool:
        return any("drift" in w.needs for w in resolve_sample_weighting(self.args.sample_weighting))

    @property
    def may_be_empty(self) -> bool:
        """Whether a step may have no gradient at all because the weights of all its tokens are 0."""
        args = self.args
        weighs = bool(args.token_weighting or args.sample_weighting) or args.reward_mix == "gate"
        return weighs and args.credit != "combined" and not needs_per_token_grad(args, self.trainer.has_rewards)

    def is_empty(self) -> bool:
        """
        Whether the optimizer step that is being made has no token of a weight other than 0, on all processes. Ends
        the step's count; all must call it together.
        """
        total, self._weight_sum = self._weight_sum, None
        if total is None:
            return False
        return bool(self.trainer.accelerator.reduce(total, reduction="sum") == 0)

    @property
    def target(self) -> Target:
        """The distribution aimed at."""
        return resolve_target(self.args.target, self.args.target_kwargs, self.num_references)  # type: ignore[arg-type]

    def head_options(self) -> dict[str, Any]:
        """Arguments of [`distillation_head`]."""
        weightings = resolve_token_weighting(self.args.token_weighting)
        statistics: dict[str, int | None] = {}
        for weighting in weightings:
            statistics |= weighting.statistics
        if self.args.advantage_signal == "teacher_q":
            statistics["teacher_max_logprob"] = None
        options = {"target": self.target, "statistics": statistics, "per_token_grad": self.per_token}
        if weightings and not self.per_token and not rollout_only(weightings):
            progress, size = self._progress, self.trainer.shared_vocab_size

            def weigh(rows: Mapping[str, Tensor]) -> Tensor:
                values = {name: x for name, x in rows.items() if name in TokenStats.__dataclass_fields__}
                mask = torch.ones_like(values["student_entropy"], dtype=torch.bool)
                stats = TokenStats(mask=mask, progress=progress, vocab_size=size, **values)
                return token_weights(weightings, stats, check=False)

            options["token_weighting"] = weigh
        return options

    @property
    def _progress(self) -> float:
        state = self.trainer.state
        return min(state.global_step / state.max_steps, 1.0) if state.max_steps > 0 else 0.0

    # The micro-batch before the student runs

    def make_batch(self, inputs: dict[str, Any]) -> MicroBatch:
        """Masks and weights of a micro-batch, and a copy of its inputs that may be changed."""
        trainer, args = self.trainer, self.args
        mask, loss_mask = trainer.distill_mask(inputs), trainer.loss_mask(inputs)
        weights = self.reduction_weights(mask, inputs["num_distill_tokens"])
        ratio = inputs.get("importance_sampling_ratio")
        if ratio is not None:
            weights = weights * ratio
        factors = self._factors(inputs)
        weightings = resolve_token_weighting(args.token_weighting)
        token_weight = None
        if weightings and rollout_only(weightings) and not self.per_token:
            token_weight = token_weights(weightings, self._rollout_stats(inputs, mask), check=False)
        old_logprobs = inputs.get("old_per_token_logps")
        # A copy: the policy gradient puts its advantages there, and the buffered batch is used again
        inputs = dict(inputs)
        if self.uses_distributions and "old_per_token_logps" in inputs:
            # The head leaves the log-probs of tokens outside the loss at 0: a ratio to their old ones would overflow
            inputs["old_per_token_logps"] = inputs["old_per_token_logps"].masked_fill(~loss_mask, 0.0)
            if not self.surrogate and not self.per_token:  # neither a ratio nor a weighting reads them
                del inputs["old_per_token_logps"]
        if ratio is not None and args.importance_weighting != "clip":  # this one has the sampler's ratio in it
            inputs["importance_sampling_ratio"] = torch.ones_like(ratio)
        own = weights if factors is None else weights * factors[:, None]
        return MicroBatch(
            inputs,
            loss_mask,
            mask,
            reduction=weights,
            weights=_times(own, token_weight),
            token_weights=token_weight,
            factors=factors,
            old_logprobs=old_logprobs,
            scores=inputs.get("teacher_scores"),
            teachers=trainer.teacher_names,
        )

    def _factors(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Weights of whole completions that are known before the student runs, `(B,)`; `None` if all are 1."""
        args, factors = self.args, None

        def times(x: Tensor) -> None:
            nonlocal factors
            factors = x if factors is None else factors * x

        if "on_policy" in inputs and args.off_policy_weight != 1.0:
            times(torch.where(inputs["on_policy"], 1.0, args.off_policy_weight))
        weightings = resolve_sample_weighting(args.sample_weighting)
        if weightings and not self._weighs_drift:
            times(self._sample_weights(weightings, self._sample_stats(inputs), inputs))
        if args.reward_mix == "gate" and "rewards" in inputs:
            _, mix = resolve_reward_mix("gate", args.reward_mix_kwargs)  # type: ignore[arg-type]
            times(
                reward_gate(
                    str(mix["on"]),
                    inputs["rewards"],
                    inputs["group_rewards"],
                    float(mix["threshold"]),
                    consensus=inputs.get("consensus"),
                )
            )
        return factors

    @staticmethod
    def _sample_weights(weightings: list[ResolvedWeighting], stats: SampleStats, inputs: Mapping[str, Any]) -> Tensor:
        mask: Tensor = inputs["completion_mask"]
        return sample_weights(weightings, stats, len(mask), mask.device)

    def _sample_stats(self, inputs: Mapping[str, Any], drift: Tensor | None = None) -> SampleStats:
        return SampleStats(
            pass_rate=inputs.get("pass_rate"),
            rewards=inputs.get("rewards"),
            group_rewards=inputs.get("group_rewards"),
            drift=drift,
            on_policy=inputs.get("on_policy"),
            age=None if "sampled_step" not in inputs else self.trainer.state.global_step - inputs["sampled_step"],
        )

    def reduction_weights(self, mask: Tensor, num_items: Tensor) -> Tensor:
        """Weight of each token of `mask` in the one reduction, `(B, T)`."""
        trainer = self.trainer
        return token_reduction_weights(
            mask,
            trainer.loss_type,
            num_items=num_items,
            num_processes=trainer.accelerator.num_processes,
            max_completion_length=trainer.max_completion_length,
            accumulation=trainer.accumulation,
            steps_per_generation=trainer.args.steps_per_generation if trainer.model.training else 1.0,
        )

    # After the student has run

    def finish(self, batch: MicroBatch, logps: Tensor, entropies: Tensor) -> None:
        """
        Form the direct term in `batch.direct`, and the surrogate's advantages and old log-probs in `batch.inputs`.

        Args:
            batch ([`MicroBatch`]): Scored, and with the student's output where distributions are compared.
            logps (`torch.Tensor`): The student's log-probs of the sampled tokens, `(B, T)`.
            entropies (`torch.Tensor`): Its entropies, `(B, T)`.
        """
        args, output = self.args, batch.output
        sampled = args.credit != "direct" or args.reward_mix == "multiply" or args.ratio_anchor != 1.0
        teacher = self._aimed_logprobs(batch, logps) if sampled else None
        if self.per_token:
            weights = self._token_weights(batch, logps, entropies, teacher)
        else:
            weights = None if output is None else output.token_weights
        batch.token_weights = batch.token_weights if weights is None else weights
        if self.may_be_empty and self.trainer.model.training:
            total = _times(batch.weights, weights).detach().abs().sum()
            self._weight_sum = total if self._weight_sum is None else self._weight_sum + total
        if args.credit == "k2":
            assert teacher is not None
            batch.direct = (k2_loss(logps, teacher) * _times(batch.weights, weights)).sum()
        elif args.credit in ("direct", "combined"):
            assert output is not None and output.loss is not None
            batch.direct = output.loss
            if self.per_token and weights is not None:
                assert output.divergence is not None
                batch.direct = (output.divergence * weights * batch.weights).sum()
            if args.credit == "combined":
                batch.direct = args.direct_coef * batch.direct
        if self.surrogate:
            self._surrogate.set_inputs(batch, logps, teacher, None if args.credit == "combined" else weights)

    def _token_weights(
        self, batch: MicroBatch, logps: Tensor, entropies: Tensor, teacher: Tensor | None
    ) -> Tensor | None:
        """Weights that need the whole micro-batch (or come when the op has no place for them), `(B, T)`."""
        weightings = resolve_token_weighting(self.args.token_weighting)
        samples = resolve_sample_weighting(self.args.sample_weighting) if self._weighs_drift else []
        if not weightings and not samples:
            return None
        problem: Exception | None = None
        weights: Tensor | None = None
        try:
            stats = self._stats(batch, logps.detach(), entropies.detach(), teacher)
            weights = token_weights(weightings, stats) if weightings else None
            if samples:
                sample_stats = self._sample_stats(batch.inputs, self._drift(batch, logps))
                by_sample = self._sample_weights(samples, sample_stats, batch.inputs)
                weights = _times(by_sample[:, None].expand(logps.shape), weights)
        except Exception as error:  # of a user's function, too
            what = str(error) if isinstance(error, ValueError) else f"A weighting failed with {error!r}."
            problem = TeacherScoreError(what)
            problem.__cause__ = error
        self.trainer.stop_on(problem, batch.inputs)
        return weights

    def _stats(self, batch: MicroBatch, logps: Tensor, entropies: Tensor, teacher: Tensor | None) -> TokenStats:
        stats = self._rollout_stats(batch.inputs, batch.distill_mask)
        known: dict[str, Any] = {"student_logprobs": logps, "student_entropy": entropies}
        if batch.output is not None:
            names = TokenStats.__dataclass_fields__
            known |= {k: v.detach() for k, v in batch.output.items() if k in names and isinstance(v, Tensor)}
        if teacher is not None:
            known["teacher_logprobs"] = teacher
        return replace(stats, **known)

    def _rollout_stats(self, inputs: Mapping[str, Any], mask: Tensor) -> TokenStats:
        """What is known of the tokens before the student's forward."""
        known: dict[str, Any] = {}
        if "tool_mask" in inputs:
            known["step_index"] = step_index_from_tool_mask(inputs["tool_mask"], inputs["completion_mask"].bool())
        if self.trainer.has_rewards:
            known["reward_advantages"] = inputs["advantages"][:, None].expand(mask.shape)
        return TokenStats(
            mask=mask,
            completion_ids=inputs["completion_ids"],
            sampler_logprobs=sampler_logprobs(inputs),
            progress=self._progress,
            vocab_size=self.trainer.shared_vocab_size,
            **known,
        )

    def _drift(self, batch: MicroBatch, logps: Tensor) -> Tensor:
        """Mean |log-prob now − log-prob when sampled| of each completion, `(B,)`."""
        sampler, mask = sampler_logprobs(batch.inputs), batch.loss_mask
        if sampler is None:
            return logps.new_zeros(len(logps))
        change = (logps.detach() - sampler).abs().masked_fill(~mask, 0.0)
        return change.sum(-1) / mask.sum(-1).clamp(min=1)

    def _aimed_logprobs(self, batch: MicroBatch, logps: Tensor) -> Tensor:
        """Log-probs of the sampled tokens under the distribution aimed at, up to its normaliser (I5), `(B, T)`."""
        mask, output = batch.distill_mask, batch.output
        if output is not None and output.teacher_logprobs is not None:
            teacher = output.teacher_logprobs.detach()
        else:
            assert batch.scores is not None
            teacher = sampled_answer(batch.scores, mask.shape)
        target = self.target
        if target.is_teacher:
            return teacher
        student = batch.inputs.get("old_per_token_logps", logps.detach())
        if self.num_references:  # the combination of the models came as one answer
            return teacher + target.student_coef * student
        return target.sampled([teacher], student)


def _times(weights: Tensor, others: Tensor | None) -> Tensor:
    return weights if others is None else weights * others
