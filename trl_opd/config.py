# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The configuration: every field of TRL's `GRPOConfig`, and those of the distillation."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

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
            `"alpha_beta_divergence"`, `"todi"`, `"adaptive_kl"`; formulas in `trl_opd.losses`.
        divergence_kwargs (`dict[str, float]` or `str`, *optional*):
            Parameters of the divergence, e.g. `{"beta": 0.5}` of the generalized JSD (0 is the forward KL, 1 the
            reverse KL).
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
            per-token advantage teacher − student log-prob of the sampled token, through GRPO's surrogate.
        discount (`float`, *optional*, defaults to `0.0`):
            With `credit="policy_gradient"`, weight of later tokens' gaps in a token's advantage, in [0, 1].
        advantage_clip (`float`, *optional*):
            With `credit="policy_gradient"`, bound on the absolute value of the distillation advantage, in nats.
        distill_temperature (`float`, *optional*):
            Temperature of both distributions in the divergence. Defaults to `temperature`, at which the student
            samples.

        > Parameters that control which tokens count

        special_token_masking (`list[str]`, *optional*):
            Tokens that leave the distillation loss: names or ids of single tokens (e.g. `["<|im_end|>", "<think>"]`),
            and the groups `"special"` (the tokenizer's special tokens) and `"added"` (all its added tokens).

        > Parameters that control the mix with rewards

        distill_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the distillation term.
        reward_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of GRPO's policy term where `reward_funcs` are given (it scales the advantages; `beta` and
            `entropy_coef` keep their own scale). `0.0` logs the rewards and trains on the teacher alone.

        > Parameters that control the computation

        loss_backend (`str`, *optional*, defaults to `"auto"`):
            Implementation of the fused divergence: `"torch"` (chunked reference), `"triton"` (CUDA devices),
            `"liger"`, or `"auto"`, which takes Triton where it runs.
        loss_chunk_mib (`int`, *optional*):
            Memory in MiB for the logits of one chunk of tokens. Defaults to 512 on an accelerator and 128 on a CPU.
        overlap_top_k (`int`, *optional*, defaults to `16`):
            Size of the student's and teacher's top sets whose overlap is logged; `0` turns the metric off. It costs
            two partial sorts of the vocabulary per token, so it is measured on the steps that are logged.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "teacher_chat_template_kwargs",
        "divergence_kwargs",
    ]

    # Parameters whose default values are overridden from GRPOConfig
    num_generations: int | None = field(
        default=1,
        metadata={
            "help": "Number of completions to sample per prompt. 1 is enough for distillation; training on rewards "
            "needs at least 2. The effective batch size must be divisible by it."
        },
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
            "'alpha_beta_divergence', 'todi' or 'adaptive_kl'."
        },
    )
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the divergence, e.g. '{\"beta\": 0.5}'."}
    )
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
            "(per-token advantages through GRPO's surrogate)."
        },
    )
    discount: float = field(
        default=0.0,
        metadata={"help": "Weight of later tokens in a token's advantage (credit='policy_gradient'), in [0, 1]."},
    )
    advantage_clip: float | None = field(
        default=None,
        metadata={"help": "Bound on the absolute distillation advantage in nats (credit='policy_gradient')."},
    )
    distill_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of both distributions in the divergence. Defaults to `temperature`."},
    )

    # Parameters that control which tokens count
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

    def __post_init__(self) -> None:
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
        self.validate_distillation()

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
