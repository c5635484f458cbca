# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""`OnPolicyDistillTrainer`: wiring between GRPOTrainer, the teacher, and the fused divergence."""

import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, get_config_model_id

from .alarms import AlarmCallback
from .checks import Run, check_run
from .collators import RoutedScores, Scores
from .config import OnPolicyDistillConfig
from .diagnostics import Diagnostics
from .distill_head import distillation_head
from .doctor import preflight
from .empty_steps import SkipEmptySteps
from .groups import Groups
from .heads import add_head_branch
from .metrics import TokenMetrics, add_metrics
from .objective import Objective
from .preflight import check_mix, check_reward_group
from .prompt_order import EpochSampler, PromptOrder
from .recipes import add_to_model_card, paper_of
from .record import RunRecorder
from .rollouts import RolloutSources
from .schedule_callback import ScheduleCallback
from .schedules import resolve_schedules
from .stopping import BadScore, describe, stop_together
from .student import MicroBatch, StudentOutput, find_bad_loss, find_bad_token
from .teacher_preflight import check_references, check_teacher
from .teacher_side import TeacherSide
from .teachers import RoutedTeacher, resolve_teacher
from .teachers.answers import is_dense
from .teachers.base import leaves, teacher_name
from .teachers.target import TargetTeacher
from .token_view import TokenView
from .trackers import TrackerCallback
from .views import TeacherView
from .weighting import mask_token_ids, special_token_ids


def no_reward(completions: list, **kwargs: Any) -> list[float]:
    """Stands where GRPOTrainer requires a reward; its zeros are neither trained on nor logged."""
    return [0.0] * len(completions)


class OnPolicyDistillTrainer(GRPOTrainer):
    """
    Trainer for on-policy distillation: the student samples, a teacher scores every token that the student visited, and
    a divergence between the two trains the student.

    A [`~trl.GRPOTrainer`] with a teacher in the place of the reward functions. Without a teacher it is GRPOTrainer.

    Example:

    ```python
    from datasets import load_dataset
    from trl_opd import OnPolicyDistillTrainer

    trainer = OnPolicyDistillTrainer(
        model="Qwen/Qwen3-1.7B",
        teacher_model="Qwen/Qwen3-8B",
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or `Callable`, *optional*):
            The teacher: a path or hub id (loaded with `args.teacher_model_init_kwargs`), an instantiated model,
            `"base"` (the student without its adapter), `"adapter:NAME"` (the student with another of its adapters),
            `"self"` (the student, see `args.teacher_sync`), one or several URLs of vLLM or SGLang servers of one
            model, `"cache:DIR"` (scores that `trl-opd score` wrote), a dict of these by the names in the dataset's
            `teacher` column, or any callable that satisfies [`teachers.Teacher`], such as a
            [`teachers.MixtureTeacher`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            As in [`~trl.GRPOTrainer`]. With a teacher, the loss is `reward_coef` · GRPO's + `distill_coef` ·
            distillation; without one it is GRPO's.
        args ([`OnPolicyDistillConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration. A `GRPOConfig` is promoted, keeping all its fields.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or `dict`, *optional*):
            The teacher's tokenizer or processor, where none lies at the teacher's path: to compare with the student's,
            and to render the teacher's prompts. A dict by the teachers' names where they are a dict.
        teacher_view (`Callable`, *optional*):
            `teacher_view(example, completion, reward, group)` → the prompt that the teacher sees before this
            completion (text or messages), or `None` to leave the sample out of the distillation. Called once a
            rollout with its dataset row, its completion as reward functions get it, its summed reward (`None` without
            reward functions), and `{"completion", "reward"}` of the other completions of its prompt. Without it, the
            dataset's column `teacher_prompt` is used, and where there is none the student's own prompt.
        reference_model (`str`, [`~transformers.PreTrainedModel`], `Callable` or a `list` of these, *optional*):
            Further models that `args.target` is made of, each as in `teacher_model`: for `"extrapolate"` the policy
            from which the student's gain is measured, for `"delta"` the teacher before and the student before their
            tuning, for `"contrast"` the model to turn away from.
        train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
        quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`].

    Raises:
        ValueError: On bad input, before any weight is loaded.
    """

    _tag_names = ["trl", "trl-opd", "on-policy-distillation"]  # noqa: RUF012 (an attribute, as in TRL)
    _name = "on-policy distillation (trl-opd)"
    _paper = {  # noqa: RUF012
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{agarwal2024onpolicy,
                title     = {{On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes}},
                author    = {Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos and Matthieu Geist and Olivier Bachem},
                booktitle = {The Twelfth International Conference on Learning Representations},
                year      = {2024},
                url       = {https://openreview.net/forum?id=3zKtaqxLhW},
            }"""),  # noqa: E501
    }

    args: OnPolicyDistillConfig
    _signature_columns: Any

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        teacher_model: "str | PreTrainedModel | Callable | None" = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict | None" = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None" = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        teacher_processing_class: "PreTrainedTokenizerBase | ProcessorMixin | dict[str, Any] | None" = None,
        teacher_view: TeacherView | None = None,
        reference_model: "str | PreTrainedModel | Callable | list | None" = None,
    ):
        args = self._promote(args, model)
        no_rewards = reward_funcs is None or reward_funcs == []
        teacher = None if teacher_model is None else self._resolve(teacher_model, args)
        listed = reference_model if isinstance(reference_model, (list, tuple)) else [reference_model]
        references = [self._resolve(given, args) for given in listed if given is not None]
        check_references(args, teacher, references)
        if references:
            teacher = TargetTeacher([teacher, *references], args)
        run = Run(
            args=args,
            model=model,
            teacher=teacher,
            has_rewards=not no_rewards,
            datasets={"train_dataset": train_dataset, "eval_dataset": eval_dataset},
            processing_class=processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            teacher_view=teacher_view,
            num_references=len(references),
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        check_run(run)
        self.shared_vocab_size, teacher_tokenizers = check_teacher(
            teacher, model, args, processing_class, teacher_processing_class
        )
        self.findings = [] if teacher is None else preflight(run, teacher_tokenizers)

        self.teacher: Any = teacher
        self.prompt_sampler: Any = None  # of the training prompts, from the first training on
        self._micro_batch: MicroBatch | None = None
        self._token_metrics = {"train": TokenMetrics(), "eval": TokenMetrics()}
        if teacher is None:
            self._name, self._paper, self._tag_names = GRPOTrainer._name, GRPOTrainer._paper, GRPOTrainer._tag_names
        elif args.recipe is not None:
            self._paper = paper_of(args.recipe)
        placeholder = teacher is not None and no_rewards
        super().__init__(
            model=model,
            reward_funcs=[no_reward] if placeholder else reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=None if placeholder else reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        schedules = resolve_schedules(args.schedules, args)  # type: ignore[arg-type]
        self._schedule = ScheduleCallback(self, schedules) if schedules else None
        if self._schedule is not None:  # from here on `args` is not what the run reads
            self.add_callback(self._schedule)
            args = self.args
        if teacher is None:
            return
        if placeholder and len(self.reward_funcs) > 1:  # an environment brought rewards of its own
            for sources in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
                del sources[0]
            self.reward_weights: Tensor = self.reward_weights[1:]
            check_reward_group(args)
        self.has_rewards = self.reward_funcs != [no_reward]
        check_mix(args, self.has_rewards)
        self.objective = Objective(self, num_references=len(references))
        self._groups = Groups(self)
        self._rollouts = RolloutSources(self)
        self._masked_ids = special_token_ids(args.special_token_masking or [], self._tokenizer)
        student = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_head_branch(student, args.cast_lm_head_to_fp32)
        self._suppress_unshared_tokens(student)
        if hasattr(teacher, "prepare"):
            teacher.prepare(self)
        self._teacher_side = TeacherSide(self, teacher, teacher_tokenizers, teacher_view)
        self._diagnostics, self._token_view = Diagnostics(self), TokenView(self)
        self.recorder = RunRecorder(self)
        given = [callback for callback in self.callback_handler.callbacks if isinstance(callback, AlarmCallback)]
        alarms = given or [AlarmCallback(args.on_alarm)]
        for alarm in alarms:
            alarm.bind(self)
        ours = [] if given else alarms
        for callback in (SkipEmptySteps(self), PromptOrder(self), *ours, self.recorder, TrackerCallback(self)):
            self.add_callback(callback)

    @staticmethod
    def _promote(args: GRPOConfig | None, model: Any) -> OnPolicyDistillConfig:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return OnPolicyDistillConfig(f"{name.split('/')[-1]}-OPD")
        if isinstance(args, OnPolicyDistillConfig):
            return args
        return OnPolicyDistillConfig.from_grpo_config(args)

    @staticmethod
    def _resolve(given: Any, args: OnPolicyDistillConfig) -> Any:
        return resolve_teacher(
            given,
            args.teacher_model_init_kwargs,  # type: ignore[arg-type]
            args.trust_remote_code,
            memory=args.teacher_memory,
            sync=args.teacher_syncing,
        )

    def _suppress_unshared_tokens(self, student: PreTrainedModel) -> None:
        """Keep the student from sampling vocabulary padding that the teacher has no entry for."""
        size = student.config.get_text_config().vocab_size
        if self.shared_vocab_size is None or self.shared_vocab_size >= size or self.use_vllm:
            return
        suppressed = [*(self.generation_config.suppress_tokens or []), *range(self.shared_vocab_size, size)]
        self.generation_config.suppress_tokens = suppressed
        self.generation_kwargs["suppress_tokens"] = suppressed

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.teacher is not None:  # what `remove_unused_columns=True` must leave
            columns = [*self._signature_columns, "teacher_prompt", getattr(self.teacher, "column", "teacher")]
            columns += ["completion", "completion_ids", "pass_rate"]
            self._signature_columns = list(dict.fromkeys(columns))

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if self.teacher is not None and type(sampler) is RepeatSampler:
            own = EpochSampler.__new__(EpochSampler)  # the same sampler, its generator included
            own.__dict__.update(vars(sampler))
            self.prompt_sampler = sampler = own
        return sampler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.teacher is None else self.recorder.watch():
            return super().train(*args, **kwargs)

    # Rollouts: GRPO's own, with the teacher's side added to the batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.teacher is None:
            return super()._generate_and_score_completions(inputs)
        inputs = self._rollouts.begin(inputs)
        self._teacher_side.begin(inputs)
        self._groups.begin()
        output = super()._generate_and_score_completions(inputs)
        if self.has_rewards:
            output["advantages"] = output["advantages"] * self.args.reward_coef
        else:
            self._forget_placeholder()
        self._rollouts.mark(output)
        self._groups.finish(output, inputs, self._teacher_side.completions)
        self._teacher_side.finish(output)
        output["num_distill_tokens"] = self.accelerator.gather(self.distill_mask(output).sum()).sum().float()
        for watcher in (self._diagnostics, self._token_view):
            watcher.note_rollouts(output, inputs)
        return output

    def _generate(self, prompts: list) -> tuple:
        rollouts = super()._generate(prompts)
        if self.teacher is not None:
            self._teacher_side.note_rollouts(prompts, rollouts)
        return rollouts

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        def sample() -> tuple:
            return super(OnPolicyDistillTrainer, self)._generate_single_turn(prompt_ids, *args, **kwargs)

        return sample() if self.teacher is None else self._rollouts.generate(prompt_ids, sample)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        known = None if self.teacher is None else self._rollouts.take_rewards()
        rewards_per_func = super()._calculate_rewards(*args, **kwargs) if known is None else known
        if self.teacher is not None:
            self._teacher_side.note_rewards(rewards_per_func)
            self._groups.note_rewards(rewards_per_func)
        return rewards_per_func

    def _forget_placeholder(self) -> None:
        mode = "train" if self.model.training else "eval"
        name = no_reward.__name__
        for key in (f"rewards/{name}/mean", f"rewards/{name}/std", "reward", "reward_std", "frac_reward_zero_std"):
            self._metrics[mode].pop(key, None)
        self._logs["rewards"].pop(name, None)

    def loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        """Tokens of GRPO's loss, without vocabulary padding that an engine may have sampled."""
        mask = inputs["completion_mask"]
        mask = (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()
        return mask if self.shared_vocab_size is None else mask & (inputs["completion_ids"] < self.shared_vocab_size)

    def distill_mask(self, inputs: dict[str, Any]) -> Tensor:
        """Tokens that are distilled: of GRPO's loss, without masked tokens and left-out samples, `(B, T)`."""
        mask = mask_token_ids(
            self.loss_mask(inputs), inputs["completion_ids"], self._masked_ids, self.args.special_token_occurrence
        )
        return mask if "teacher_skipped" not in inputs else mask & (inputs["teacher_skipped"] == 0)[:, None]

    @property
    def student_vocab_size(self) -> int:
        """Ids that the student knows and the teacher may name."""
        size = self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size
        return self.shared_vocab_size or size

    @property
    def teacher_names(self) -> Sequence[str]:
        """Of a [`RoutedTeacher`]'s members."""
        return self.teacher.names if isinstance(self.teacher, RoutedTeacher) else ()

    @property
    def may_mask(self) -> bool:
        """Whether tokens of GRPO's loss may be left out of the distillation, on this process or another."""
        return bool(self._masked_ids) or self.shared_vocab_size is not None or self._teacher_side.may_skip

    # Loss: GRPO's own, around one run of the student through the distillation head

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.teacher is None:
            return super()._compute_loss(model, inputs)
        batch = self.objective.make_batch(inputs)
        self._micro_batch = batch
        try:
            loss = super()._compute_loss(model, batch.inputs)
        finally:
            self._micro_batch = None
        if self.num_iterations > 1 and self.model.training and not getattr(self.teacher, "changes", False):
            inputs["teacher_scores"] = batch.scores  # the buffered batch comes again: the teacher need not
        if not self.objective.surrogate:
            self._forget_surrogate()
        return loss if batch.direct is None else loss + self.args.distill_coef * batch.direct

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        batch = self._micro_batch
        if batch is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        forward = self._head_forward if self.objective.uses_distributions else self._sampled_forward

        # GRPOTrainer builds the model's inputs (images and all) and calls this in the place of the model
        def call(labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> Any:
            return forward(model, batch, model_inputs, labels)

        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            call, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        self.objective.finish(batch, logps, entropies)
        add_metrics(self.mode_metrics, batch, logps, entropies, self.args, self.accumulation)
        for watcher in (self._diagnostics, self._token_view):
            watcher.note_tokens(batch, logps.detach(), entropies.detach())
        return logps, entropies, aux_loss

    def _head_forward(self, model: Any, batch: MicroBatch, model_inputs: dict[str, Any], labels: Tensor) -> Any:
        scores = self._scores(batch, model_inputs)
        options = self.objective.head_options()
        options["statistics"] = self._diagnostics.head_options()["statistics"] | options["statistics"]
        head = distillation_head(
            batch,
            scores,
            self.args,
            vocab_size=self.shared_vocab_size,
            overlap_top_k=self.args.overlap_top_k if self._is_logged else 0,
            **options,
        )
        output: StudentOutput = model(**model_inputs, head_call=head)
        batch.output = output
        # Another process may have hidden states of a teacher that has no sample here
        if is_dense(scores) or isinstance(scores, RoutedScores):
            bad = find_bad_token(output, batch.distill_mask)
            self.stop_on(find_bad_loss(output) if bad is None else bad, batch.inputs)
        log_probs, entropy = output.log_probs, output.entropy
        assert log_probs is not None and entropy is not None
        if not self.objective.surrogate:
            log_probs, entropy = log_probs.detach(), entropy.detach()
        return SimpleNamespace(log_probs=log_probs, entropy=entropy, aux_loss=output.aux_loss)

    def _sampled_forward(self, model: Any, batch: MicroBatch, model_inputs: dict[str, Any], labels: Tensor) -> Any:
        self._scores(batch, model_inputs)
        return model(**model_inputs, labels=labels, fused_lm_head=True)

    def _scores(self, batch: MicroBatch, model_inputs: dict[str, Any]) -> Scores:
        """The teacher's answer, unless it waits from an earlier pass over the buffered batch."""
        if batch.scores is None:
            own = ("input_ids", "attention_mask", "output_router_logits")
            further = {k: v for k, v in model_inputs.items() if k not in own}
            batch.scores = self._teacher_side.answer(batch.inputs, batch.distill_mask, further)
        return batch.scores

    # Alarms and metrics

    def stop_on(self, bad: BadScore | Exception | str | None, inputs: dict[str, Any]) -> None:
        """Stop all processes, with a checkpoint, if one of them has a problem. All must call it together."""
        problem = describe(bad, inputs, self._tokenizer) if isinstance(bad, tuple) else bad
        stop_together(self, teacher_name(self.teacher), problem)

    def add_wait(self, seconds: float, steps: float) -> None:
        """Seconds that `steps` optimizer steps waited for a teacher: `distill/teacher_wait`, a mean over steps."""
        self.mode_metrics.add_sum("distill/teacher_wait", torch.tensor(seconds, dtype=torch.float64), steps)

    def _forget_surrogate(self) -> None:
        """Drop the clip ratios of a surrogate without advantages (and the entropy, where Liger did not compute it)."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        names = ("clip_ratio/", "cispo_clip_ratio", "vespo/")
        for key in [
            k for k in metrics if k.startswith(names) or (k == "entropy" and self.args.loss_backend == "liger")
        ]:
            del metrics[key]

    @property
    def mode_metrics(self) -> TokenMetrics:
        """Those of training or of evaluation, whichever runs."""
        return self._token_metrics["train" if self.model.training else "eval"]

    @property
    def _is_logged(self) -> bool:
        """Whether the optimizer step that is being made ends in a log line."""
        if not self.model.training or self.args.logging_strategy != "steps":
            return True
        step, every = self.state.global_step + 1, self.state.logging_steps
        return step % every == 0 or step == self.state.max_steps or (step == 1 and self.args.logging_first_step)

    @property
    def accumulation(self) -> float:
        """Micro-batches of the optimizer step that is being made; 1 in evaluation."""
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    @property
    def _stateful(self) -> list[Any]:
        """What has a state of its own beside the student's weights."""
        parts = [*leaves(self.teacher), self._schedule]
        if self.teacher is not None:
            parts += [self._groups, self._rollouts]
        return [part for part in parts if hasattr(part, "save_state")]

    def _base_values(self) -> AbstractContextManager[None]:
        """Inside, `args` holds the configuration's own values where a schedule moves them: what files say of a run."""
        return nullcontext() if self._schedule is None else self._schedule.base_values()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        for part in self._stateful:  # before the rest, so that a checkpoint that looks whole has it
            part.save_state(folder)
        with self._base_values():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self._base_values():
            super()._save(output_dir, state_dict)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for part in self._stateful if checkpoint is not None else ():
            part.load_state(checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_model_card(self.args, os.path.join(self.args.output_dir, "README.md"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.teacher is None:
            return super().log(logs, start_time)
        mode = "train" if self.model.training else "eval"
        self._diagnostics.before_log(logs)
        self._metrics[mode].update(self._token_metrics[mode].compute(self.accelerator))
        self._token_view.before_log()
        super().log(logs, start_time)
        self._token_view.after_log()
