# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher whose weights live in this process."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..collators import TeacherBatch, TeacherScores
from ..heads import add_head_branch, head_parameters
from ..kernels.projection import Head
from ..losses import nearest_name
from ..validation import OFFLOADS, QUANTIZATIONS
from .memory import WaitingWeights, check_quantization, is_quantized, lend_layers, quantization_config, settle
from .pieces import KeptScores, assemble, trimmed_pieces
from .scoring import score_with, takes_positions

if TYPE_CHECKING:
    from trl import GRPOTrainer


class LocalTeacher:
    """
    A teacher model in this process: loaded, frozen, sharded like the student, never saved with it.

    Answers with hidden states and head (the trainer projects them chunk by chunk, beside the student's), or with the
    sampled tokens' log-probs where the support is `"sampled"`.

    With `offload`, each generation batch is scored at once, so that the weights travel once for it (`"model"`) or once
    for `batch_size` of its sequences (`"layers"`), not for every micro-batch; the hidden states wait in CPU memory,
    B · T · H numbers. Batches with images are scored micro-batch by micro-batch.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): Path, hub id, or a model.
        quantization (`str`, *optional*):
            Form of the weights of linear layers, if `model` is a path: `"int8"`, `"bnb_8bit"` or `"bnb_4bit"` (see
            [`teachers.memory.quantization_config`]). Embeddings and head are not quantized.
        offload (`str`, *optional*):
            `"model"`: the weights are on the device while the teacher answers, and in CPU memory otherwise.
            `"layers"`: each decoder layer is on the device during its own forward only. The head stays there.
        batch_size (`int`, *optional*):
            Sequences of a forward pass, defaults to the micro-batch. Above it only with `offload`.
        device (`str`, *optional*):
            Where the teacher runs, defaults to the student's device. The student's holds a copy of the head.
        init_kwargs: For `from_pretrained`; `dtype` defaults to `"auto"`.

    Raises:
        ValueError: If arguments are unknown or do not fit together.
        ImportError: If the library of the quantization is not installed.
    """

    scores_in_loss = True
    changes = False

    def __init__(
        self,
        model: "str | PreTrainedModel",
        *,
        quantization: str | None = None,
        offload: str | None = None,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        **init_kwargs: Any,
    ):
        self.model: Any = model
        self.quantization, self.offload, self.batch_size, self.device = quantization, offload, batch_size, device
        self.init_kwargs = {"dtype": "auto", **init_kwargs}
        self._check_arguments()
        self._config: Any = None if isinstance(model, str) else model.config
        self._snapshot: Head | None = None
        self.waiting: list[WaitingWeights] = []
        self._student_device: torch.device | None = None
        self._micro_batch_size = 1
        self._tools = False
        if offload is not None:  # without it there is nothing to gain: let nobody wait for such answers
            self.submit = self._submit

    def _check_arguments(self) -> None:
        for name, value, valid in (
            ("quantization", self.quantization, QUANTIZATIONS),
            ("offload", self.offload, OFFLOADS),
        ):
            if value is not None and value not in valid:
                nearest = nearest_name(str(value), list(valid))
                raise ValueError(f"teacher_{name} must be one of {list(valid)}, got {value!r}.{nearest}")
        size = self.batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                f"teacher_batch_size must be a whole number of at least 1, got {size!r}. It counts the sequences of a "
                "forward pass. Leave it unset for the micro-batch."
            )
        device = None if self.device is None else _known_device(self.device)
        if self.offload is not None and device is not None and device.type == "cpu":
            raise ValueError(
                f"teacher_offload must be unset with teacher_device='cpu', got {self.offload!r}. The weights are in "
                "CPU memory already. Unset one of them."
            )
        if "device_map" in self.init_kwargs and (self.offload is not None or device is not None):
            raise ValueError(
                "teacher_model_init_kwargs must not hold device_map beside teacher_offload or teacher_device, which "
                "say where the weights go. Unset one of them."
            )
        if self.quantization is None:
            return
        if not isinstance(self.model, str):
            raise ValueError(
                f"teacher_quantization must be unset when teacher_model is an instantiated model, got "
                f"{self.quantization!r}. Weights are quantized while they are loaded. Pass the model's path, or load "
                "it with a quantization_config yourself."
            )
        if "quantization_config" in self.init_kwargs:
            raise ValueError(
                f"teacher_quantization must be unset when teacher_model_init_kwargs holds a quantization_config, got "
                f"{self.quantization!r}. They say the same thing twice. Unset one of them."
            )
        if self.quantization != "int8" and self.offload is not None:
            raise ValueError(
                f"teacher_offload must be unset with teacher_quantization={self.quantization!r}, got "
                f"{self.offload!r}. bitsandbytes keeps scales beside its tensors, which would not move with them. Set "
                "teacher_quantization='int8' to have both."
            )
        check_quantization(self.quantization)

    @property
    def name(self) -> str:
        """The path or id of its weights."""
        if isinstance(self.model, str):
            return self.model
        return get_config_model_id(self._config) or type(self.model).__name__

    @property
    def config(self) -> PretrainedConfig:
        """Its model's configuration, read from the path until the model is loaded."""
        if self._config is None:
            known = ("revision", "trust_remote_code", "subfolder", "token", "cache_dir")
            kwargs = {key: self.init_kwargs[key] for key in known if key in self.init_kwargs}
            self._config = self.init_kwargs.get("config") or AutoConfig.from_pretrained(self.model, **kwargs)
        return self._config

    @property
    def vocab_size(self) -> int:
        """Entries of its head."""
        return self.config.get_text_config().vocab_size

    @property
    def max_length(self) -> int | None:
        """Most positions that its configuration allows for, those of a scaled rotary embedding counted."""
        text = self.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or -1  # which is XLNet's word for no limit
        ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        for rope in (ropes, *ropes.values()):  # some models have one for each kind of layer
            if limit > 0 and isinstance(rope, Mapping) and rope.get("rope_type") in ("yarn", "linear", "dynamic"):
                original = rope.get("original_max_position_embeddings") or limit
                limit = max(limit, int(original * (rope.get("factor") or 1.0)))
        return limit if limit > 0 else None

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Load, freeze, and place the weights, or wrap them as accelerate is configured."""
        self._check_sharding(trainer)
        self._student_device = trainer.accelerator.device
        self._micro_batch_size = trainer.args.per_device_train_batch_size
        self._tools = bool(trainer.tools or trainer.environments)
        device = self._student_device if self.device is None else torch.device(self.device)
        if isinstance(self.model, str):
            self.model = self._load(self.model, trainer, device)
        model = self.model
        self._config = model.config
        model.requires_grad_(False)
        model.eval()
        base = model.get_base_model() if is_peft_model(model) else model
        add_head_branch(base, trainer.args.cast_lm_head_to_fp32)
        if trainer.is_deepspeed_enabled:
            self.model = prepare_deepspeed(model, trainer.accelerator)
        elif trainer.is_fsdp_enabled:
            self.model = prepare_fsdp(model, trainer.accelerator)
        else:
            self._place(model, base, device)
            self.model = trainer.accelerator.prepare_model(
                model, device_placement=False if self._is_placed else None, evaluation_mode=True
            )

    def _check_sharding(self, trainer: "GRPOTrainer") -> None:
        """FSDP and DeepSpeed place and shard weights themselves, and know nothing of integers."""
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else None
        for name in ("quantization", "offload", "device"):
            value = getattr(self, name)
            if engine is not None and value is not None:
                raise ValueError(
                    f"teacher_{name} must be unset under {engine}, got {value!r}. {engine} places the teacher's "
                    f"weights itself. Use {engine}'s own offloading, or DDP."
                )

    def _load(self, path: str, trainer: "GRPOTrainer", device: torch.device) -> PreTrainedModel:
        kwargs = dict(self.init_kwargs)
        if self.quantization is not None:
            kwargs["quantization_config"] = quantization_config(self.quantization)
        if "device_map" not in kwargs and self._is_placed:
            kwargs["device_map"] = {"": "cpu" if self.offload is not None else str(device)}
        elif trainer.args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
            kwargs["device_map"] = None
        model = create_model_from_path(path, **kwargs)
        if self.quantization is not None and not any(is_quantized(p) for p in model.parameters()):
            raise ValueError(
                f"teacher_quantization must be unset for {path!r}, got {self.quantization!r}. The "
                f"{type(model).__name__} has no linear layers that it quantizes. Set teacher_offload to save memory."
            )
        return model

    @property
    def _is_placed(self) -> bool:
        """Whether the weights go where the arguments say, rather than where accelerate puts them."""
        return any(value is not None for value in (self.quantization, self.offload, self.device))

    def _place(self, model: Any, base: Any, device: torch.device) -> None:
        if self.offload is not None:
            weight, bias = head_parameters(base.get_output_embeddings())
            resident = {id(weight), id(bias)}
            if self.offload == "model":
                self.waiting = [WaitingWeights(model, device, resident)]
            else:
                self.waiting = lend_layers(base, device, resident)
            settle(model, device, self.waiting)
        elif self.device is not None and any(p.device != device for p in model.parameters()):
            model.to(device)
        if self._is_placed and len(getattr(model, "hf_device_map", None) or {}) == 1:
            # accelerate takes a bitsandbytes model with a device map for one to train, and wants it on its own device
            del model.hf_device_map

    def __call__(self, batch: TeacherBatch) -> TeacherScores:
        rows = len(batch.input_ids)
        if self.batch_size is None or rows <= self.batch_size:
            with self._weights():
                return self._score(batch)
        return assemble(self._pieces(batch, self.batch_size), (rows, batch.num_completion_tokens))

    def _submit(self, batch: TeacherBatch) -> KeptScores | None:
        """Score a generation batch now, so that the weights come to the device once for all of it."""
        if self._has_images(batch):
            return None
        size = self.batch_size or self._micro_batch_size
        shape = (len(batch.input_ids), batch.num_completion_tokens)
        return KeptScores(assemble(self._pieces(batch, size), shape, torch.device("cpu")))

    def _has_images(self, batch: TeacherBatch) -> bool:
        """Whether the samples come, or may come, with model inputs that the whole generation batch is not given."""
        if not hasattr(self.config, "vision_config"):
            return False
        return self._tools or any(example.get(k) for example in batch.examples or () for k in ("image", "images"))

    def _pieces(self, batch: TeacherBatch, size: int) -> Iterator[tuple[Tensor, TeacherScores]]:
        with self._weights():
            for rows, piece in trimmed_pieces(batch, size, takes_positions(self.model)):
                yield rows, self._score(piece)

    def _weights(self) -> AbstractContextManager:
        return self.waiting[0] if self.offload == "model" else nullcontext()

    def _score(self, batch: TeacherBatch) -> TeacherScores:
        return score_with(self.model, batch, self._live_head, self.device)

    def _live_head(self, head: Head) -> Head:
        """
        A head that can still be read when the forward is over, where the student's is. FSDP frees what it gathered, so
        a copy is kept; a head on another device would be copied for every micro-batch.
        """
        sharded = isinstance(self.model, (FullyShardedDataParallel, FSDPModule))
        elsewhere = self._student_device is not None and head.weight.device != self._student_device
        if not sharded and not elsewhere:
            return head
        if self._snapshot is None:
            device = self._student_device if elsewhere else head.weight.device
            bias = None if head.bias is None else head.bias.to(device, copy=True)
            self._snapshot = Head(head.weight.to(device, copy=True), bias, head.logit_scale, head.softcap)
        return self._snapshot


def _known_device(device: str | torch.device) -> torch.device:
    """Raises `ValueError` if there is no such device."""
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"teacher_device must be a device's name, got {device!r}. The teacher would be nowhere. Set e.g. 'cuda:1' "
            "or 'cpu'."
        ) from error
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"teacher_device must be a device of this machine, got {device!r}, but {torch.cuda.device_count()} CUDA "
            "devices are visible. The teacher would be nowhere. Set one of them, or 'cpu'."
        )
    return known
