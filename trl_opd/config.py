# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The configuration: every field of TRL's `GRPOConfig`, and those of the distillation."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

from .recipes import apply_recipe, explain_conflict, passed_fields
from .schedules import resolve_schedules
from .validation import SYNC_RATE, check_combinations, check_names, check_ranges


class _OneGeneration(int):
    """A 1 that passes GRPO's `num_generations < 2` test, so that the checks behind that test run unchanged."""

    def __lt__(self, other: object) -> bool:
        return False if other == 2 else int(self) < other  # type: ignore[operator]


@dataclass
class OnPolicyDistillConfig(GRPOConfig):
    r"""
    Configuration class for the [`OnPolicyDistillTrainer`].

    It includes only the parameters of on-policy distillation. For the others see [`~trl.GRPOConfig`] (generation,
    vLLM, tools, clipping, `loss_type`, `beta`) and [`~transformers.TrainingArguments`]. Defaults that differ from
    theirs: `num_generations=1`.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        recipe (`str`, *optional*):
            Name of a method (`trl-opd recipes` lists them): its fields become defaults, and those given explicitly
            win.
        recipe_changes (`dict[str, list]`, *optional*):
            Set by the configuration itself: fields of the recipe that were given otherwise, each with the recipe's
            value and the one used.

        > Parameters that control whose tokens are trained on

        student_fraction (`float`, *optional*, defaults to `1.0`):
            Probability that a generation batch is sampled from the student (GKD's λ). The others come from the replay
            buffer or from `off_policy_source`.
        replay_fraction (`float`, *optional*, defaults to `0.0`):
            Probability that a generation batch is drawn from the student's earlier completions.
        replay_size (`int`, *optional*, defaults to `1000`):
            Completions that each process keeps for that.
        off_policy_source (`str`, *optional*, defaults to `"dataset"`):
            Where completions come from that the student did not sample: `"dataset"` (column `completion`) or
            `"teacher"` (sampled from it).
        off_policy_weight (`float`, *optional*, defaults to `1.0`):
            Loss weight of completions that the current student did not sample.
        off_policy_divergence (`str`, *optional*):
            Divergence on those completions. Defaults to `divergence`.
        off_policy_divergence_kwargs (`dict[str, float]` or `str`, *optional*):
            Its parameters.
        injected_completions (`int`, *optional*, defaults to `0`):
            Members of each group of `num_generations` that `off_policy_source` gives in the student's place.
        injected_when (`str`, *optional*, defaults to `"always"`):
            When: `"always"`, or `"group_failure"` (no completion of the group has a reward above 0).
        injected_shaping (`float`, *optional*):
            γ of LUFFY's shaping f(p) = p / (p + γ), in the place of the ratio, for the rewards of those members.

        > Parameters that control the teacher

        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for `from_pretrained` when `teacher_model` is a path or hub id: `revision`, `dtype`
            (default `"auto"`, the checkpoint's own), `quantization_config`, `attn_implementation`, `device_map`, ...
            For URLs, those of [`teachers.RemoteTeacher`] (`api_key_env`, `timeout`, `max_in_flight`, ...).
        teacher_sync (`str`, *optional*, defaults to `"frozen"`):
            Which weights `teacher_model="self"` answers with: `"frozen"` (the student's at the start), `"ema"` (their
            moving average), `"every_n"` (a copy from time to time) or `"live"` (the student's own of this moment).
        teacher_sync_steps (`int`, *optional*, defaults to `1`):
            Optimizer steps between two updates of `"ema"` or `"every_n"`.
        teacher_sync_rate (`float`, *optional*, defaults to `0.05`):
            Share of the student in an update of `"ema"`, in (0, 1].
        teacher_chat_template (`str`, *optional*, defaults to `"own"`):
            Who renders conversational prompts for the teacher. `"own"`: the teacher's own chat template, where its
            tokenizer is known and has one; `"student"`: the student's.
        teacher_chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the teacher's rendering, e.g. `{"enable_thinking": false}`. Defaults to
            `chat_template_kwargs`.
        teacher_max_length (`int`, *optional*):
            Longest prompt and completion that the teacher is given, in tokens. Defaults to what it says of itself.
        teacher_overflow (`str`, *optional*, defaults to `"error"`):
            What becomes of a sample that is longer: `"error"`, or `"skip"` (it leaves the distillation loss and is
            counted in `distill/skipped_overflow`). It is never truncated.

        > Parameters that control the teacher's memory (teachers in this process)

        teacher_quantization (`str`, *optional*):
            Weights of a teacher that is loaded from a path: `"int8"` (weight only, runs anywhere), `"bnb_8bit"` or
            `"bnb_4bit"` (bitsandbytes).
        teacher_offload (`str`, *optional*):
            Where its weights wait: `"model"` keeps them in CPU memory while the student trains, `"layers"` brings one
            decoder layer at a time to the device.
        teacher_batch_size (`int`, *optional*):
            Sequences of a teacher's forward pass. Defaults to the micro-batch.
        teacher_device (`str`, *optional*):
            Device of the teacher, e.g. `"cuda:1"` or `"cpu"`. Defaults to the student's.

        > Parameters that control the objective

        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            How the gap between student and teacher is measured at each token. One of `"forward_kl"`, `"reverse_kl"`,
            `"generalized_jsd"`, `"skew_forward_kl"`, `"skew_reverse_kl"`, `"total_variation"`, `"alpha_divergence"`,
            `"alpha_beta_divergence"`, `"todi"`, `"adaptive_kl"`, `"concrete_score"`, `"entropy_gated_kl"`,
            `"convex_mix"`; formulas in `trl_opd.losses`.
        divergence_kwargs (`dict[str, Any]` or `str`, *optional*):
            Parameters of the divergence, e.g. `{"beta": 0.5}` of the generalized JSD (0 is the forward KL, 1 the
            reverse KL), or `{"forward_kl": 0.3, "reverse_kl": None}` of `"convex_mix"` (`None` is the rest).
        target (`str`, *optional*, defaults to `"teacher"`):
            Distribution to aim at: `"teacher"`, or one made of the teacher, the models of `reference_model=` and the
            student as it is: `"taid"`, `"veto"`, `"extrapolate"`, `"delta"`, `"contrast"`, `"affine"`,
            `"reward_tilt"`; formulas in `trl_opd.targets`.
        target_kwargs (`dict[str, float]` or `str`, *optional*):
            Parameters of the target, e.g. `{"scale": 1.25}` of the extrapolation.
        support (`str`, *optional*, defaults to `"full"`):
            Vocabulary entries to compare: `"full"`, `"teacher_top_k"`, `"student_top_k"`, `"union_top_k"`,
            `"intersection_top_k"` (a token whose two top sets have nothing in common is not trained), or `"sampled"`
            (the sampled token alone; needs `credit="policy_gradient"`).
        support_size (`int`, *optional*, defaults to `64`):
            K of the top-k supports.
        support_tail (`str`, *optional*, defaults to `"bucket"`):
            What becomes of the entries outside a top-k support: `"bucket"` (one entry holds the rest),
            `"renormalize"` or `"none"` (raw sum; with reverse KL it pushes mass out of the support).
        credit (`str`, *optional*, defaults to `"direct"`):
            How the gap becomes a gradient. `"direct"`: backpropagation through the divergence. `"policy_gradient"`:
            per-token advantage teacher − student log-prob of the sampled token (of other divergences than the reverse
            KL, their own function of it), through GRPO's surrogate. `"combined"`: both, the divergence times
            `direct_coef`. `"k2"`: backpropagation through half the square of the sampled token's log-ratio.
        direct_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the divergence in `credit="combined"`.
        discount (`float`, *optional*, defaults to `0.0`):
            With a policy gradient, weight of later tokens' gaps in a token's advantage, in [0, 1].
        return_horizon (`int`, *optional*):
            Number of tokens whose gaps a token's advantage sums, itself included. Defaults to all later ones.
        return_from_next (`bool`, *optional*, defaults to `False`):
            Whether that sum leaves out the token's own gap (which `credit="combined"` trains exactly).
        return_normalization (`bool`, *optional*, defaults to `False`):
            Whether the sum is divided by its number of tokens.
        advantage_signal (`str`, *optional*, defaults to `"log_ratio"`):
            What the advantage sums: `"log_ratio"` (teacher − student) or `"teacher_q"` (the teacher's logits as values
            of a Bellman equation, with `return_horizon` as its number of steps).
        advantage_power (`float`, *optional*, defaults to `0.0`):
            Exponent α of tᵅ − sᵅ in the place of the log-ratio; 0 is the log-ratio.
        advantage_baseline (`str`, *optional*, defaults to `"none"`):
            What is subtracted from each gap: `"none"`, or `"kl"` (its mean −KL(s‖t), which needs the distributions).
        advantage_floor (`float`, *optional*):
            Lower bound of each gap, in nats.
        advantage_clip (`float`, *optional*):
            Bound on the absolute value of the distillation advantage, in nats.
        advantage_whitening (`str`, *optional*, defaults to `"none"`):
            What is brought to mean 0 and deviation 1 over the tokens of a micro-batch, over all processes:
            `"none"`, `"distill"` (the distillation's advantages, before rewards are added) or `"mixed"` (the sum).
        importance_weighting (`str`, *optional*, defaults to `"clip"`):
            What the ratio ρ of the student to the policy that sampled does: `"clip"` (GRPO's clipped surrogate),
            `"truncate"` (weight min(ρ, `importance_high`), detached) or `"band"` (weight ρ inside
            [`importance_low`, `importance_high`], else 0).
        importance_low (`float`, *optional*), importance_high (`float`, *optional*):
            The bounds of those.
        ratio_anchor (`float`, *optional*, defaults to `1.0`):
            α of the denominator s_oldᵅ · t¹⁻ᵅ in GRPO's ratio; 1 is GRPO's own.
        distill_temperature (`float`, *optional*):
            Temperature of both distributions in the divergence. Defaults to `temperature`, at which the student
            samples.
        temperature_adaptation (`float`, *optional*, defaults to `0.0`):
            c of AdaKD's temperature of each token, τ = exp(−c · tanh(log(h / median h))) with the Hellinger distance
            h, times that one; the token's loss is multiplied by τ². It costs a second projection.

        > Parameters that control which tokens count

        token_weighting (`str` or `dict[str, dict]`, *optional*):
            Weights of tokens in the distillation: a name of `trl_opd.token_weights`, a dict of names to parameters
            (whose weights are multiplied), or the import path of a function of [`TokenStats`].
        sample_weighting (`str` or `dict[str, dict]`, *optional*):
            Weights of whole completions, likewise (`trl_opd.sample_weights`).
        special_token_occurrence (`str`, *optional*, defaults to `"all"`):
            Which occurrences of those tokens in a completion leave the loss: `"all"` or the `"first"`.
        special_token_masking (`list[str]`, *optional*):
            Tokens that leave the distillation loss: names or ids of single tokens (e.g. `["<|im_end|>", "<think>"]`),
            and the groups `"special"` (the tokenizer's special tokens) and `"added"` (all its added tokens).

        > Parameters that control the mix with rewards

        distill_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the distillation term.
        reward_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of GRPO's policy term where `reward_funcs` are given (it scales the advantages; `beta` and
            `entropy_coef` keep their own scale). `0.0` logs the rewards and trains on the teacher alone.
        reward_mix (`str`, *optional*, defaults to `"add"`):
            How the two meet: `"add"` (the sum), `"multiply"` (the distillation scales the reward's advantages and
            keeps their sign) or `"gate"` (the reward decides which completions are distilled).
        reward_mix_kwargs (`dict[str, Any]` or `str`, *optional*):
            Parameters of the mix, e.g. `{"on": "failure"}` of the gate (`trl_opd.rewards`).

        > Parameters that change during training

        schedules (`dict[str, dict]` or `str`, *optional*):
            Fields that change, by their name or `field.key`, e.g.
            `{"target_kwargs.t": {"type": "linear", "start": 0.4, "end": 1.0}}` (`trl_opd.schedules`).

        > Parameters that control the computation

        loss_backend (`str`, *optional*, defaults to `"auto"`):
            Implementation of the fused divergence: `"torch"` (chunked reference), `"triton"` (CUDA devices),
            `"liger"`, or `"auto"`, which takes Triton where it runs.
        loss_chunk_mib (`int`, *optional*):
            Memory in MiB for the logits of one chunk of tokens. Defaults to 512 on an accelerator and 128 on a CPU.
        overlap_top_k (`int`, *optional*, defaults to `16`):
            Size of the student's and teacher's top sets whose overlap is logged; `0` turns the metric off. It costs
            two partial sorts of the vocabulary per token, so it is measured on the steps that are logged.

        > Parameters that control the checks, diagnostics and alarms

        preflight (`str`, *optional*, defaults to `"warn"`):
            The cheap checks of `trl-opd doctor` (tokens, templates, settings) before any weight is loaded: `"warn"`
            prints what they find, `"strict"` does not start a run with which something is wrong, `"off"`.
        diagnostics (`bool`, *optional*, defaults to `True`):
            Whether the metrics of `trl_opd.diagnostics` are logged beside the objective's own.
        token_view (`int`, *optional*, defaults to `4`):
            Completions whose tokens are kept at each log line, with both models' log-probs, in
            `output_dir/_opd/completions`; with `log_completions` all of them, in TRL's `output_dir/completions`. `0`
            keeps none.
        on_alarm (`str`, *optional*, defaults to `"warn"`):
            What the alarms of `trl_opd.alarms` do: `"warn"`, `"stop"` (with a checkpoint), `"off"`, or the import path
            of a function of the [`alarms.Alarm`].
        alarm_thresholds (`dict[str, float]` or `str`, *optional*):
            Thresholds that differ from those of `trl_opd.alarms`, by name.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "teacher_chat_template_kwargs",
        "divergence_kwargs",
        "off_policy_divergence_kwargs",
        "target_kwargs",
        "token_weighting",
        "sample_weighting",
        "reward_mix_kwargs",
        "schedules",
        "recipe_changes",
        "alarm_thresholds",
    ]

    # Parameters whose default values are overridden from GRPOConfig
    num_generations: int | None = field(
        default=1,
        metadata={
            "help": "Number of completions to sample per prompt. 1 is enough for distillation; training on rewards "
            "needs at least 2. The effective batch size must be divisible by it."
        },
    )

    recipe: str | None = field(
        default=None, metadata={"help": "Name of a method; `trl-opd recipes` lists them. Explicit fields win."}
    )

    recipe_changes: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Set by the configuration itself: what was given otherwise than in the recipe."},
    )

    # Parameters that control whose tokens are trained on
    student_fraction: float = field(
        default=1.0, metadata={"help": "Probability that a generation batch is sampled from the student."}
    )
    replay_fraction: float = field(
        default=0.0, metadata={"help": "Probability that it is drawn from the student's earlier completions."}
    )
    replay_size: int = field(
        default=1000, metadata={"help": "Completions that each process keeps for `replay_fraction`."}
    )
    off_policy_source: str = field(
        default="dataset",
        metadata={
            "help": "Completions that the student did not sample: 'dataset' (column `completion`) or 'teacher'."
        },
    )
    off_policy_weight: float = field(
        default=1.0, metadata={"help": "Loss weight of completions that the current student did not sample."}
    )
    off_policy_divergence: str | None = field(
        default=None,
        metadata={"help": "Divergence on completions that the student did not sample. Default: `divergence`."},
    )
    off_policy_divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of `off_policy_divergence`."}
    )
    injected_completions: int = field(
        default=0, metadata={"help": "Members of each group that `off_policy_source` gives in the student's place."}
    )
    injected_when: str = field(
        default="always", metadata={"help": "When they are injected: 'always' or 'group_failure'."}
    )
    injected_shaping: float | None = field(
        default=None, metadata={"help": "Gamma of LUFFY's shaping p / (p + gamma) of their reward term."}
    )

    # Parameters that control the teacher
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` when `teacher_model` is a path or hub id (`revision`, "
            "`dtype`, `quantization_config`, ...; `dtype` defaults to 'auto', the checkpoint's own), or for the "
            "client when it is a URL (`api_key_env`, `timeout`, ...)."
        },
    )
    teacher_sync: str = field(
        default="frozen",
        metadata={
            "help": "Weights of teacher_model='self': 'frozen' (those of the start), 'ema' (moving average), "
            "'every_n' (copied every `teacher_sync_steps` steps) or 'live'."
        },
    )
    teacher_sync_steps: int = field(
        default=1, metadata={"help": "Optimizer steps between two updates of teacher_sync='ema' or 'every_n'."}
    )
    teacher_sync_rate: float = field(
        default=SYNC_RATE, metadata={"help": "Share of the student in an update of teacher_sync='ema', in (0, 1]."}
    )
    teacher_chat_template: str = field(
        default="own",
        metadata={
            "help": "Who renders conversational prompts for the teacher: 'own' (its own chat template, where it has "
            "one) or 'student'."
        },
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the teacher's rendering. Defaults to `chat_template_kwargs`."},
    )
    teacher_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt and completion for the teacher, in tokens. Default: what it says itself."},
    )
    teacher_overflow: str = field(
        default="error",
        metadata={"help": "What becomes of a sample that is too long for the teacher: 'error' or 'skip'."},
    )

    # Parameters that control the teacher's memory
    teacher_quantization: str | None = field(
        default=None, metadata={"help": "Weights of a loaded teacher: 'int8', 'bnb_8bit' or 'bnb_4bit'."}
    )
    teacher_offload: str | None = field(
        default=None,
        metadata={
            "help": "Where the teacher's weights wait: 'model' (in CPU memory while the student trains) or 'layers' "
            "(one decoder layer at a time on the device)."
        },
    )
    teacher_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences of a teacher's forward pass. Default: the micro-batch."}
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Device of the teacher, e.g. 'cuda:1' or 'cpu'. Default: the student's."}
    )

    # Parameters that control the objective
    divergence: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence between student and teacher at each token: 'forward_kl', 'reverse_kl', "
            "'generalized_jsd', 'skew_forward_kl', 'skew_reverse_kl', 'total_variation', 'alpha_divergence', "
            "'alpha_beta_divergence', 'todi', 'adaptive_kl', 'concrete_score', 'entropy_gated_kl' or 'convex_mix'."
        },
    )
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the divergence, e.g. '{\"beta\": 0.5}'."}
    )
    target: str = field(
        default="teacher",
        metadata={
            "help": "Distribution to aim at: 'teacher', 'taid', 'veto', 'extrapolate', 'delta', 'contrast', "
            "'affine' or 'reward_tilt'."
        },
    )
    target_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Parameters of the target."})
    support: str = field(
        default="full",
        metadata={
            "help": "Vocabulary entries to compare: 'full', 'teacher_top_k', 'student_top_k', 'union_top_k', "
            "'intersection_top_k' or 'sampled' (with credit='policy_gradient')."
        },
    )
    support_size: int = field(default=64, metadata={"help": "K of the top-k supports."})
    support_tail: str = field(
        default="bucket",
        metadata={"help": "Entries outside a top-k support: 'bucket', 'renormalize' or 'none'."},
    )
    credit: str = field(
        default="direct",
        metadata={
            "help": "How the gap becomes a gradient: 'direct' (through the divergence) or 'policy_gradient' "
            "(per-token advantages through GRPO's surrogate), 'combined' (both) or 'k2' (half the squared log-ratio)."
        },
    )
    direct_coef: float = field(default=1.0, metadata={"help": "Coefficient of the divergence in credit='combined'."})
    discount: float = field(
        default=0.0,
        metadata={"help": "Weight of later tokens in a token's advantage (policy gradients), in [0, 1]."},
    )
    return_horizon: int | None = field(
        default=None,
        metadata={"help": "Tokens whose gaps an advantage sums, itself included. Default: all later ones."},
    )
    return_from_next: bool = field(default=False, metadata={"help": "Leave the token's own gap out of its advantage."})
    return_normalization: bool = field(
        default=False, metadata={"help": "Divide an advantage by the number of tokens it sums."}
    )
    advantage_signal: str = field(
        default="log_ratio", metadata={"help": "What the advantage sums: 'log_ratio' or 'teacher_q'."}
    )
    advantage_power: float = field(
        default=0.0,
        metadata={"help": "Exponent of the probabilities whose difference is the gap; 0 is the log-ratio."},
    )
    advantage_baseline: str = field(
        default="none", metadata={"help": "What is subtracted from each gap: 'none' or 'kl'."}
    )
    advantage_floor: float | None = field(default=None, metadata={"help": "Lower bound of each gap, in nats."})
    advantage_clip: float | None = field(
        default=None,
        metadata={"help": "Bound on the absolute distillation advantage in nats (policy gradients)."},
    )
    advantage_whitening: str = field(
        default="none", metadata={"help": "What is whitened over the micro-batch: 'none', 'distill' or 'mixed'."}
    )
    importance_weighting: str = field(
        default="clip", metadata={"help": "What the ratio to the sampling policy does: 'clip', 'truncate' or 'band'."}
    )
    importance_low: float | None = field(
        default=None, metadata={"help": "Lower bound of importance_weighting='band'."}
    )
    importance_high: float | None = field(
        default=None, metadata={"help": "Upper bound of importance_weighting='truncate' or 'band'."}
    )
    ratio_anchor: float = field(
        default=1.0, metadata={"help": "Alpha of the denominator old**alpha * teacher**(1 - alpha) in GRPO's ratio."}
    )
    distill_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of both distributions in the divergence. Defaults to `temperature`."},
    )
    temperature_adaptation: float = field(
        default=0.0, metadata={"help": "Strength of AdaKD's temperature per token (credit='direct'); 0 for none."}
    )

    # Parameters that control which tokens count
    token_weighting: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weights of tokens: a name, a dict of names to parameters, or an import path."}
    )
    sample_weighting: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Weights of completions: a name, a dict of names to parameters, or an import path."},
    )
    special_token_occurrence: str = field(
        default="all", metadata={"help": "Which occurrences of masked tokens leave the loss: 'all' or 'first'."}
    )
    special_token_masking: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens that leave the distillation loss: single tokens, or the groups 'special' and 'added'."
        },
    )

    # Parameters that control the mix with rewards
    distill_coef: float = field(default=1.0, metadata={"help": "Coefficient of the distillation term."})
    reward_coef: float = field(
        default=1.0,
        metadata={"help": "Coefficient of GRPO's policy term where `reward_funcs` are given. 0 only logs rewards."},
    )

    reward_mix: str = field(
        default="add", metadata={"help": "How rewards and distillation meet: 'add', 'multiply' or 'gate'."}
    )
    reward_mix_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of `reward_mix`."}
    )

    # Parameters that change during training
    schedules: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields that change during training, by name or `field.key`, each with its schedule."},
    )

    # Parameters that control the computation
    loss_backend: str = field(
        default="auto",
        metadata={"help": "Implementation of the fused divergence: 'auto', 'torch', 'triton' or 'liger'."},
    )
    loss_chunk_mib: int | None = field(
        default=None,
        metadata={"help": "Memory in MiB for the logits of one chunk. Default: 512 on an accelerator, 128 on a CPU."},
    )
    overlap_top_k: int = field(
        default=16, metadata={"help": "Size of the top sets whose overlap is logged; 0 turns the metric off."}
    )

    # Parameters that control the checks, diagnostics and alarms
    preflight: str = field(
        default="warn",
        metadata={"help": "The doctor's cheap checks before the start: 'warn', 'strict' (refuse to start) or 'off'."},
    )
    diagnostics: bool = field(
        default=True, metadata={"help": "Log further diagnostics beside the metrics of the objective."}
    )
    token_view: int = field(
        default=4, metadata={"help": "Completions kept with their tokens' log-probs at each log line; 0 for none."}
    )
    on_alarm: str = field(
        default="warn", metadata={"help": "What alarms do: 'warn', 'stop', 'off' or the import path of a function."}
    )
    alarm_thresholds: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Thresholds of alarms by name, where they differ from the defaults."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> "OnPolicyDistillConfig":
        config = super().__new__(cls)
        config.__dict__["_passed_fields"] = passed_fields(cls, args, kwargs)  # which ones win over a recipe's
        return config

    def __post_init__(self) -> None:
        apply_recipe(self)
        try:
            self._check_as_grpo()
            self.validate_distillation()
        except ValueError as error:
            explained = explain_conflict(error, self)
            if explained is error:
                raise
            raise explained from error

    def _check_as_grpo(self) -> None:
        """All that GRPOConfig checks, with one completion a prompt allowed."""
        generations: Any = self.num_generations
        if not isinstance(generations, int) or isinstance(generations, bool) or generations < 1:
            raise ValueError(
                f"num_generations must be a whole number of at least 1, got {generations!r}. It is the number of "
                "completions sampled per prompt. Set 1 to distil, 2 or more to train on rewards."
            )
        one = self.num_generations == 1
        if one:
            self.num_generations = _OneGeneration(1)
        super().__post_init__()
        if one:
            self.num_generations = 1

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "OnPolicyDistillConfig":
        """
        Promote a `GRPOConfig`: every field keeps its value, and the fields of the distillation get their defaults.

        Args:
            config ([`~trl.GRPOConfig`]): The configuration of a GRPO script.

        Returns:
            [`OnPolicyDistillConfig`]
        """
        # Not through `__init__`: the given config is checked already, and holds derived fields that exclude each other
        promoted = cls.__new__(cls)
        promoted.__dict__.update(vars(config))
        for f in fields(cls):
            if f.name not in promoted.__dict__:
                setattr(promoted, f.name, f.default)
        promoted.validate_distillation()
        return promoted

    @property
    def divergence_temperature(self) -> float:
        """Temperature at which both models are compared."""
        return self.temperature if self.distill_temperature is None else self.distill_temperature

    @property
    def teacher_memory(self) -> dict[str, Any]:
        """How a teacher in this process fits: arguments of [`teachers.LocalTeacher`]."""
        return {name: getattr(self, f"teacher_{name}") for name in ("quantization", "offload", "batch_size", "device")}

    @property
    def teacher_syncing(self) -> dict[str, Any]:
        """How the student teaches itself: arguments of [`teachers.SelfTeacher`]."""
        return {
            "sync": self.teacher_sync,
            "steps": self.teacher_sync_steps,
            "rate": self.teacher_sync_rate,
        }

    def validate_distillation(self) -> None:
        """
        Check the fields of the distillation and how they combine.

        Raises:
            ValueError: Naming the field, its rule, the value, what breaks and what to set.
        """
        masking: Any = self.special_token_masking
        if isinstance(masking, str):
            self.special_token_masking = [masking]
        check_names(self)
        check_ranges(self)
        check_combinations(self)
        resolve_schedules(self.schedules, self)  # type: ignore[arg-type]
