# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a run will need of a device's memory, by part, before anything is loaded.

Weights, gradients, optimizer states, adapters and the cache of keys and values are counted exactly, from the models'
shapes on the meta device. Activations are an estimate:

    kept   = layers x tokens x hidden x bytes of the residual stream        (with gradient checkpointing)
    a layer = tokens x (4 hidden + 2 queries + 2 keys + 3 intermediate) x bytes of the computation

where all layers are kept without gradient checkpointing and one is recomputed with it, as in Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), for attention that does not keep
its scores. CUDA's context (about half a GiB), the allocator's unused blocks and the images of a vision-language model
are not in it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .checks import Run
from .model_sizes import (
    ModelSize,
    build_on_meta,
    cache_bytes,
    dtype_of,
    optimizer_bytes,
    quantization_of,
)
from .preflight import config_of, student_kwargs, student_tokenizer
from .teachers import LocalTeacher, SelfTeacher
from .teachers.base import leaves, teacher_name
from .teachers.target import TargetTeacher

_ALWAYS, _SAMPLING, _SCORING, _TRAINING = "always", "sampling", "scoring", "training"
_PROMPT_TOKENS = 512  # where prompts cannot be counted
_PROMPTS_READ = 64


@dataclass
class MemoryEstimate:
    """
    Bytes that one process needs on the student's device.

    Attributes:
        parts (`dict[str, int]`): By what needs them.
        phases (`dict[str, str]`): When: `"always"`, or only while `"sampling"`, `"scoring"` or `"training"`.
        elsewhere (`dict[str, int]`): What is held on other devices or in CPU memory.
        device_total (`int`, *optional*): Memory of the device; `None` on a CPU.
        assumptions (`list[str]`): What the figures rest on.
        student, teachers: The models on the meta device, the teachers by their names.
    """

    parts: dict[str, int] = field(default_factory=dict)
    phases: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, int] = field(default_factory=dict)
    device_total: int | None = None
    assumptions: list[str] = field(default_factory=list)
    student: ModelSize | None = None
    teachers: dict[str, ModelSize] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The peak: what is there always, and the largest of sampling, scoring and training."""
        sums = dict.fromkeys((_ALWAYS, _SAMPLING, _SCORING, _TRAINING), 0)
        for name, size in self.parts.items():
            sums[self.phases[name]] += size
        return sums.pop(_ALWAYS) + max(sums.values())

    def add(self, name: str, size: int | float, phase: str = _ALWAYS) -> None:
        """Count a part, if there is anything of it."""
        if size > 0:
            self.parts[name] = self.parts.get(name, 0) + int(size)
            self.phases[name] = phase


@dataclass
class Sharding:
    """Among how many processes weights, gradients and optimizer states are split, and by what."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    name: str = ""


def sharding_of(args: Any) -> Sharding:
    """How this launch splits a model, from the arguments and from what `accelerate launch` has set."""
    size = max(1, args.world_size)
    env = os.environ.get
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None or env("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = int(plugin.zero_stage if plugin is not None else env("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        weights, gradients, optimizer = (size if stage >= least else 1 for least in (3, 2, 1))
        return Sharding(weights, gradients, optimizer, f"DeepSpeed ZeRO-{stage} over {size}")
    if args.fsdp or env("ACCELERATE_USE_FSDP") == "true":
        strategy = env("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
        if strategy in ("NO_SHARD", "3"):
            return Sharding(name="FSDP without sharding")
        return Sharding(size, size, size, f"FSDP over {size}")
    return Sharding(name=f"a copy on each of {size} processes" if size > 1 else "")


def estimate_memory(
    run: Run,
    *,
    student_config: Any = None,
    teacher_configs: Sequence[Any] | None = None,
    quantization_config: Any = None,
    prompt_length: int | None = None,
) -> MemoryEstimate:
    """
    Estimate the memory of a run.

    Args:
        run ([`Run`]): The trainer's arguments, the teacher resolved.
        student_config ([`~transformers.PretrainedConfig`], *optional*): Read from the student's path if not given.
        teacher_configs (`Sequence`, *optional*):
            One for each [`LocalTeacher`] among the teacher's leaves, in their order. Read from their paths by default.
        quantization_config (*optional*): The student's, as `from_pretrained` takes it.
        prompt_length (`int`, *optional*): Tokens of the longest prompt; by default of the dataset's first ones.

    Returns:
        [`MemoryEstimate`]
    """
    estimate, args = MemoryEstimate(), run.args
    if args.device.type == "cuda":
        estimate.device_total = torch.cuda.get_device_properties(args.device).total_memory
    student_config = student_config or config_of(run.model, student_kwargs(args))
    if student_config is None:
        raise ValueError(
            f"model must have a config.json for an estimate of the memory, got {run.model!r}. Its size is not known. "
            "Check the path or id, and your access to the hub."
        )
    if prompt_length is None:
        prompt_length = _longest_prompt(run, estimate)
    length = prompt_length + args.max_completion_length
    student = _student(run, student_config, quantization_config or getattr(run, "quantization_config", None))
    estimate.student = student
    shards = sharding_of(args)
    if shards.name:
        estimate.assumptions.append(f"{shards.name[0].upper()}{shards.name[1:]}.")
    _add_student(estimate, student, args, shards)
    _add_sampling(estimate, student_config, args, length, student.dtype)
    _add_training(estimate, student, student_config, args, length)
    _add_teachers(estimate, run, teacher_configs, shards, length)
    if args.beta != 0.0 and student.adapter_bytes == 0:
        estimate.add("GRPO's reference model", student.weight_bytes / shards.weights)
    return estimate


def _student(run: Run, config: Any, quantization_config: Any) -> ModelSize:
    if isinstance(run.model, torch.nn.Module):
        weight = next(p for p in run.model.parameters() if p.is_floating_point())
        return ModelSize(run.model, weight.dtype)
    kwargs = student_kwargs(run.args)
    model = build_on_meta(config, peft_config=run.peft_config, trust_remote_code=run.args.trust_remote_code)
    given = kwargs.get("quantization_config", quantization_config)
    dtype = dtype_of(kwargs.get("dtype", "float32"), config, run.model)
    return ModelSize(model, dtype, quantization_of(given))


def _add_student(estimate: MemoryEstimate, student: ModelSize, args: Any, shards: Sharding) -> None:
    trained = student.trained_bytes
    estimate.add("student weights", student.weight_bytes / shards.weights)
    estimate.add("LoRA adapter", student.adapter_bytes / shards.weights)
    estimate.add("gradients", trained / shards.gradients, _TRAINING)
    if args.world_size > 1 and shards.weights == 1 and "ZeRO" not in shards.name:
        estimate.add("buckets of data-parallel gradients", trained, _TRAINING)
    optim = str(getattr(args.optim, "value", args.optim))
    states = optimizer_bytes(optim, student.trained, momentum="momentum" in str(args.optim_args))
    if states is None:
        states = 2 * trained
        estimate.assumptions.append(f"The states of {optim} are counted as AdamW's.")
    if "ZeRO" in shards.name and student.dtype.itemsize < 4:
        states += 4 * student.num_trained
        estimate.assumptions.append("DeepSpeed keeps a float32 copy of what is trained with the optimizer.")
    estimate.add("optimizer states", states / shards.optimizer)
    if shards.weights > 1:
        estimate.add("one gathered layer", student.layer_bytes)
        estimate.assumptions.append("Sharded weights are gathered one decoder layer at a time.")


def _computes_in(args: Any, dtype: torch.dtype) -> int:
    return 2 if args.bf16 or args.fp16 else dtype.itemsize


def _add_sampling(estimate: MemoryEstimate, config: Any, args: Any, length: int, dtype: torch.dtype) -> None:
    if args.use_vllm and args.vllm_mode == "colocate":
        if estimate.device_total is not None:
            phase = _SAMPLING if args.vllm_enable_sleep_mode else _ALWAYS
            estimate.add("vLLM", args.vllm_gpu_memory_utilization * estimate.device_total, phase)
        share = f"{args.vllm_gpu_memory_utilization:.0%}"
        estimate.assumptions.append(f"vLLM takes vllm_gpu_memory_utilization of the device, {share}.")
        return
    if args.use_vllm:
        return
    num = args.per_device_train_batch_size * args.steps_per_generation
    estimate.add("cache of keys and values", cache_bytes(config, num, length, _computes_in(args, dtype)), _SAMPLING)
    estimate.assumptions.append(
        f"{num} completions are sampled at a time, up to {length} tokens with their prompts (the longest case)."
    )


def _layer_activations(config: Any, tokens: int, itemsize: int) -> int:
    """What one decoder layer keeps for its backward pass (see above)."""
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    active = getattr(text, "num_experts_per_tok", None) or 0
    inner = active * (getattr(text, "moe_intermediate_size", None) or 0) or getattr(text, "intermediate_size", None)
    return tokens * (4 * hidden + 2 * heads * head_dim + 2 * keys + 3 * (inner or 4 * hidden)) * itemsize


def _add_training(estimate: MemoryEstimate, student: ModelSize, config: Any, args: Any, length: int) -> None:
    text = config.get_text_config()
    tokens = args.per_device_train_batch_size * length
    computed = _computes_in(args, student.dtype)
    layer = _layer_activations(config, tokens, computed)
    stream = tokens * text.hidden_size * student.dtype.itemsize
    checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    kept = text.num_hidden_layers * stream + layer if checkpointing else text.num_hidden_layers * (layer + stream)
    estimate.add("activations (estimate)", kept + 2 * stream, _TRAINING)
    estimate.assumptions.append(
        f"Activations are an estimate for {tokens} tokens in a micro-batch"
        + (", with gradient checkpointing." if checkpointing else ", all kept (gradient_checkpointing is off).")
    )
    if args.bf16 or args.fp16:  # autocast keeps what it has cast of weights that are trained
        matrices = sum(p.numel() for p, itemsize in student.trained if p.ndim > 1 and itemsize > computed)
        estimate.add("half-precision copies of autocast", matrices * computed, _TRAINING)
    estimate.add("logits of a chunk", chunk_mib(args) * 2**20, _TRAINING)


def chunk_mib(args: Any) -> int:
    """MiB for the logits of one chunk of tokens."""
    return int(args.loss_chunk_mib or (128 if args.device.type == "cpu" else 512))


def _add_teachers(
    estimate: MemoryEstimate, run: Run, configs: Sequence[Any] | None, shards: Sharding, length: int
) -> None:
    if run.teacher is None:
        return
    args = run.args
    references = run.teacher.members[1:] if isinstance(run.teacher, TargetTeacher) else []
    local = [leaf for leaf in leaves(run.teacher) if isinstance(leaf, LocalTeacher)]
    given = list(configs) if configs is not None and len(configs) == len(local) else [None] * len(local)
    seen: set[int] = set()
    for leaf, known in zip(local, given, strict=True):
        config = known or config_of(leaf.model, leaf.init_kwargs)
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        if config is None:
            estimate.assumptions.append(f"The size of {teacher_name(leaf)} is not known: it is not counted.")
            continue
        size = _teacher(leaf, config, args)
        estimate.teachers[teacher_name(leaf)] = size
        what = "reference model" if any(leaf is r for r in references) else "teacher"
        _add_local(estimate, leaf, size, config, shards, length, args, what)
    selves = [leaf for leaf in leaves(run.teacher) if isinstance(leaf, SelfTeacher) and leaf.sync != "live"]
    if selves and estimate.student is not None:
        estimate.add("the teacher's copy of the trained weights", estimate.student.trained_bytes)


def _teacher(leaf: LocalTeacher, config: Any, args: Any) -> ModelSize:
    if not isinstance(leaf.model, str):
        return ModelSize(leaf.model, next(p for p in leaf.model.parameters() if p.is_floating_point()).dtype)
    own = leaf.init_kwargs.get("quantization_config", getattr(config, "quantization_config", None))
    model = build_on_meta(config, trust_remote_code=args.trust_remote_code)
    dtype = dtype_of(leaf.init_kwargs.get("dtype"), config, leaf.model)
    return ModelSize(model, dtype, leaf.quantization or quantization_of(own))


def _add_local(
    estimate: MemoryEstimate,
    leaf: LocalTeacher,
    size: ModelSize,
    config: Any,
    shards: Sharding,
    length: int,
    args: Any,
    what: str,
) -> None:
    """A teacher's weights where they are, and what it hands to the loss."""
    weights, hidden = size.weight_bytes / shards.weights, config.get_text_config().hidden_size
    tokens = args.per_device_train_batch_size * length
    answers = tokens * hidden * size.dtype.itemsize
    device = torch.device(leaf.device) if leaf.device is not None else args.device
    if device.type != args.device.type or (device.index or 0) != (args.device.index or 0):
        estimate.elsewhere[f"{what} weights on {leaf.device}"] = int(weights)
        head = config.get_text_config().vocab_size * hidden * size.dtype.itemsize
        estimate.add(f"copy of the {what}'s head", head)
    elif leaf.offload is not None:
        estimate.elsewhere[f"{what} weights in CPU memory"] = int(weights)
        layers = leaf.offload == "layers"
        held = size.resident_bytes + size.layer_bytes if layers else weights
        if layers:
            estimate.add(f"{what} embeddings and head", size.resident_bytes)
            held = size.layer_bytes
        estimate.add(f"{what} weights while it answers", held, _SCORING)
    else:
        estimate.add(f"{what} weights", weights)
    estimate.add(f"{what} hidden states", answers, _TRAINING)
    batch = (leaf.batch_size or args.per_device_train_batch_size) * length
    activations = _layer_activations(config, batch, size.dtype.itemsize)
    estimate.add(f"{what} activations (estimate)", activations, _SCORING if leaf.offload else _TRAINING)


def _longest_prompt(run: Run, estimate: MemoryEstimate) -> int:
    """Tokens of the longest of the dataset's first prompts."""
    dataset = run.datasets.get("train_dataset")
    tokenizer = student_tokenizer(run.model, run.args, run.processing_class)
    lengths: list[int] = []
    if tokenizer is not None and dataset is not None:
        for row in dataset.take(_PROMPTS_READ) if hasattr(dataset, "take") else ():
            prompt = row.get("prompt") if isinstance(row, dict) else None
            text = prompt if isinstance(prompt, str) else "".join(_texts(prompt))
            lengths.append(len(tokenizer(text)["input_ids"]))
    if not lengths:
        estimate.assumptions.append(f"Prompts of {_PROMPT_TOKENS} tokens (they could not be counted).")
        return _PROMPT_TOKENS
    estimate.assumptions.append(f"Prompts of up to {max(lengths)} tokens, the longest of the first {len(lengths)}.")
    return max(lengths)


def _texts(messages: Any) -> list[str]:
    contents = [m.get("content") for m in messages or () if isinstance(m, dict)]
    return [content for content in contents if isinstance(content, str)]
