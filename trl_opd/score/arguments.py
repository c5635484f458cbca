# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Arguments of `trl-opd score`, and the teacher that they name."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from transformers import AutoTokenizer

from ..config import OnPolicyDistillConfig
from ..preflight import check_path
from ..teachers.base import teacher_name
from ..teachers.cache.format import CACHED_SUPPORTS, COMPRESSIONS, LOGPROB_DTYPES
from ..teachers.resolve import resolve_teacher
from ..vocabulary import check_tokenizers


@dataclass
class ScoreArguments:
    """
    Arguments of `trl-opd score`.

    Args:
        teacher (`str`): Path, hub id, or URL (several separated by commas) of the teacher.
        dataset (`str`): A `.jsonl`, `.json` or `.parquet` file, a folder of `save_to_disk`, or a dataset of the hub.
        output (`str`): The cache; continued if it is there.
        dataset_config (`str`, *optional*), dataset_split (`str`, *optional*, defaults to `"train"`): Which part of it.
        support (`str`, *optional*, defaults to `"teacher_top_k"`): That, or `"sampled"`: the tokens' own log-probs.
        support_size (`int`, *optional*, defaults to `64`): Log-probs a token.
        temperature (`float`, *optional*, defaults to `1.0`): Of the log-probs.
        batch_size (`int`, *optional*, defaults to `8`): Samples of a forward pass.
        max_length (`int`, *optional*): Longest prompt and completion; by default what the teacher takes.
        overflow (`str`, *optional*, defaults to `"error"`): What becomes of longer ones: `"error"` or `"skip"`.
        logprob_dtype (`str`, *optional*, defaults to `"float32"`):
            Of the stored top-k log-probs: `"float32"`, as the teacher gave them, or `"float16"`.
        compression (`str`, *optional*, defaults to `"none"`): `"zstd"` for smaller files.
        shard_tokens (`int`, *optional*, defaults to `65536`): Completion tokens of a file.
        tokenizer (`str`, *optional*):
            Path of the student's tokenizer, which renders prompts and completions. By default the teacher's.
        teacher_chat_template (`str`, *optional*, defaults to `"own"`):
            Who renders conversations for the teacher: `"own"` (its own template) or `"student"`.
        chat_template_kwargs (`dict` or `str`, *optional*): As in [`~trl.GRPOConfig`].
        teacher_chat_template_kwargs (`dict` or `str`, *optional*): As in [`OnPolicyDistillConfig`].
        append_eos (`bool`, *optional*, defaults to `True`): Whether text completions end in the end-of-sequence token.
        teacher_model_init_kwargs, teacher_quantization, teacher_device, trust_remote_code:
            As in [`OnPolicyDistillConfig`].
    """

    teacher: str | None = field(default=None, metadata={"help": "Path, hub id or URL of the teacher."})
    dataset: str | None = field(
        default=None, metadata={"help": "A .jsonl, .json or .parquet file, a saved dataset's folder, or a hub name."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder of the cache; continued if it is there."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    support: str = field(default="teacher_top_k", metadata={"help": "'teacher_top_k' or 'sampled'."})
    support_size: int = field(default=64, metadata={"help": "Log-probs a token."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the log-probs."})
    batch_size: int = field(default=8, metadata={"help": "Samples of a forward pass."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and completion in tokens. Default: what the teacher takes."}
    )
    overflow: str = field(default="error", metadata={"help": "What becomes of longer samples: 'error' or 'skip'."})
    logprob_dtype: str = field(
        default="float32", metadata={"help": "Of the stored top-k log-probs: 'float32' or 'float16'."}
    )
    compression: str = field(default="none", metadata={"help": "'none' or 'zstd'."})
    shard_tokens: int = field(default=65536, metadata={"help": "Completion tokens of a file."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Path of the student's tokenizer. Default: the teacher's."}
    )
    teacher_chat_template: str = field(
        default="own", metadata={"help": "Who renders conversations for the teacher: 'own' or 'student'."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as in training."}
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the teacher's rendering. Default: `chat_template_kwargs`."}
    )
    append_eos: bool = field(
        default=True, metadata={"help": "Whether text completions end in the end-of-sequence token."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained`, or for the client of a URL."}
    )
    teacher_quantization: str | None = field(default=None, metadata={"help": "As in `trl-opd train`."})
    teacher_device: str | None = field(default=None, metadata={"help": "Device of the teacher."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the hub."})

    def __post_init__(self) -> None:
        for name, breaks in (
            ("teacher", "Nobody would score"),
            ("dataset", "There is nothing to score"),
            ("output", "The scores would go nowhere"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}. {breaks}.")
        for name, valid in (
            ("support", CACHED_SUPPORTS),
            ("overflow", ("error", "skip")),
            ("logprob_dtype", LOGPROB_DTYPES),
            ("compression", COMPRESSIONS),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {list(valid)}, got {getattr(self, name)!r}.")
        for name in ("support_size", "batch_size", "shard_tokens", "max_length"):
            value = getattr(self, name)
            if not (value is None and name == "max_length") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


class ScoringRun:
    """
    What a teacher needs to see of a trainer, without one.

    Args:
        arguments ([`ScoreArguments`]): The command's arguments.

    Attributes:
        teacher: The teacher, ready to be asked.
        tokenizer, teacher_tokenizer: The student's, and the teacher's own where it is known.
    """

    is_deepspeed_enabled = is_fsdp_enabled = False
    tools = environments = None

    def __init__(self, arguments: ScoreArguments):
        sampled = arguments.support == "sampled"
        self.args = OnPolicyDistillConfig(
            output_dir=str(arguments.output),
            bf16=False,  # the teacher runs in the dtype of its weights
            report_to="none",
            max_completion_length=1,  # whether a sample fits is looked at one by one
            per_device_train_batch_size=arguments.batch_size,
            credit="policy_gradient" if sampled else "direct",
            support=arguments.support,
            support_size=arguments.support_size,
            temperature=arguments.temperature,
            teacher_chat_template=arguments.teacher_chat_template,
            chat_template_kwargs=arguments.chat_template_kwargs,
            teacher_chat_template_kwargs=arguments.teacher_chat_template_kwargs,
            teacher_model_init_kwargs=arguments.teacher_model_init_kwargs,
            teacher_quantization=arguments.teacher_quantization,
            teacher_device=arguments.teacher_device,
            trust_remote_code=arguments.trust_remote_code,
        )
        self.accelerator = Accelerator(
            cpu=self.args.device.type == "cpu"
        )  # after the arguments, which reset its state
        self.teacher: Any = resolve_teacher(
            arguments.teacher,
            self.args.teacher_model_init_kwargs,  # type: ignore[arg-type]
            self.args.trust_remote_code,
            memory=self.args.teacher_memory,
        )
        path = teacher_name(self.teacher)
        local = getattr(self.teacher, "scores_in_loss", False)
        if local:
            if not hasattr(self.teacher, "model"):
                raise ValueError(
                    f"teacher must be a path, a hub id or a URL, got {arguments.teacher!r}. It is made of a student, "
                    "which scoring does not have. Give the path of its weights."
                )
            check_path(path, "teacher")
        self.teacher_tokenizer = self._load_tokenizer(path) if local else None
        self.tokenizer: Any = self.teacher_tokenizer
        if arguments.tokenizer:
            self.tokenizer = self._load_tokenizer(arguments.tokenizer)
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer must be given with a teacher that is not a folder with a tokenizer, got None. Prompts and "
                "completions are rendered with it. Give the student's path."
            )
        if self.teacher_tokenizer is not None and self.tokenizer is not self.teacher_tokenizer:
            check_tokenizers(self.tokenizer, self.teacher_tokenizer)
        self.processing_class = self._tokenizer = self.tokenizer
        self.chat_template = None
        self.chat_template_kwargs = self.args.chat_template_kwargs or {}
        self.model = SimpleNamespace(training=False)

    def _load_tokenizer(self, path: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=self.args.trust_remote_code)
        except (OSError, ValueError, KeyError):
            return None

    def prepare(self) -> None:
        """Load the teacher."""
        if hasattr(self.teacher, "prepare"):
            self.teacher.prepare(self)

    def add_callback(self, callback: Any) -> None:
        """There are no steps to follow."""
