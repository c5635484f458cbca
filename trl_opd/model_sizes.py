# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""How large models, adapters and optimizer states are, counted on the meta device: no weight is loaded."""

import copy
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

INT8, BNB_8BIT, BNB_4BIT, BNB_4BIT_PLAIN = "int8", "bnb_8bit", "bnb_4bit", "bnb_4bit without nested quantization"
_BLOCK, _NESTED_BLOCK = 64, 256  # numbers that share one scale in bitsandbytes' 4-bit weights, and scales of scales


@dataclass
class ModelSize:
    """
    A model on the meta device.

    Args:
        model (`torch.nn.Module`): With shapes and no data; or a real model.
        dtype (`torch.dtype`): Of its weights.
        quantization (`str`, *optional*): Of its linear layers: `"int8"`, `"bnb_8bit"` or `"bnb_4bit"`.
    """

    model: Any
    dtype: torch.dtype
    quantization: str | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_trained(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p, _ in self.trained)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held, without those of a LoRA adapter."""
        return sum(self._bytes_of(name, p) for name, p in self.model.named_parameters() if not _is_adapter(name))

    @property
    def adapter_bytes(self) -> int:
        """Bytes of a LoRA adapter's weights."""
        return sum(p.numel() * self._itemsize(n) for n, p in self.model.named_parameters() if _is_adapter(n))

    @property
    def trained(self) -> list[tuple[Tensor, int]]:
        """Parameters that are trained, each with the bytes of one of its numbers."""
        return [(p, self._itemsize(name)) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def trained_bytes(self) -> int:
        """Bytes of the parameters that are trained, and so of their gradients."""
        return sum(p.numel() * itemsize for p, itemsize in self.trained)

    def _itemsize(self, name: str) -> int:
        """PEFT keeps the adapters of half-precision models in float32; of quantized ones, TRL follows QLoRA."""
        if "lora_" in name and (not self.quantization or "lora_magnitude_vector" in name):
            return max(4, self.dtype.itemsize)
        return 2 if self.quantization and _is_adapter(name) else self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest decoder layer: what sharded or lent weights gather at a time."""
        names = set(getattr(self.model, "_no_split_modules", None) or ())
        sizes: list[int] = [
            sum(self._bytes_of(f"{name}.{inner}", p) for inner, p in module.named_parameters())
            for name, module in self.model.named_modules()
            if type(module).__name__ in names
        ]
        return max(sizes, default=self.weight_bytes)

    @property
    def resident_bytes(self) -> int:
        """Bytes outside the decoder layers: embeddings, norm and head."""
        names = set(getattr(self.model, "_no_split_modules", None) or ())
        inside = {
            id(p) for module in self.model.modules() if type(module).__name__ in names for p in module.parameters()
        }
        return sum(self._bytes_of(n, p) for n, p in self.model.named_parameters() if id(p) not in inside)

    def _bytes_of(self, name: str, parameter: Tensor) -> int:
        if self.quantization is None or id(parameter) not in self._quantized:
            return parameter.numel() * self.dtype.itemsize
        numbers, rows = parameter.numel(), parameter.shape[0]
        if self.quantization == INT8:
            return numbers + rows * self.dtype.itemsize
        if self.quantization == BNB_8BIT:
            return numbers + rows * 4
        blocks = math.ceil(numbers / _BLOCK)
        nested = self.quantization == BNB_4BIT
        scales = blocks + math.ceil(blocks / _NESTED_BLOCK) * 4 + 256 * 4 + 4 if nested else blocks * 4
        return math.ceil(numbers / 2) + scales + 16 * 4

    @property
    def _quantized(self) -> set[int]:
        """`id` of the weights that are quantized: of linear layers, but the head."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head = getattr(base, "get_output_embeddings", lambda: None)()
        kept = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        linear = [m for m in base.modules() if isinstance(m, nn.Linear)]
        names = {id(p): name for name, p in base.named_parameters()}
        return {
            id(m.weight) for m in linear if id(m.weight) not in kept and not _is_adapter(names.get(id(m.weight), ""))
        }


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def build_on_meta(config: Any, *, peft_config: Any = None, trust_remote_code: bool = False) -> nn.Module:
    """
    The model of a config, with shapes and no data.

    Args:
        config ([`~transformers.PretrainedConfig`]): Of the model.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapter to train instead of the model.
        trust_remote_code (`bool`): Allow the model's own code.
    """
    architecture = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers has changed, which PEFT uses
        if architecture is not None:
            model = architecture(copy.deepcopy(config))
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return model if peft_config is None else get_peft_model(model, copy.deepcopy(peft_config))


def dtype_of(given: Any, config: Any, path: Any = None, default: torch.dtype = torch.float32) -> torch.dtype:
    """
    The dtype in which a model is loaded.

    Args:
        given: `dtype` of `from_pretrained`: a name, a dtype, `"auto"` (the checkpoint's own) or `None` (`default`).
        config ([`~transformers.PretrainedConfig`]): The model's; says what the checkpoint is in.
        path (`str`, *optional*): Folder of the checkpoint, whose files are asked if the config does not say it.
        default (`torch.dtype`): Where nothing is known.
    """
    if isinstance(given, str) and given != "auto":
        given = getattr(torch, given)
    if isinstance(given, torch.dtype):
        return given
    if given is None:
        return default
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return own or _dtype_in_files(path) or default


def _dtype_in_files(path: Any) -> torch.dtype | None:
    file = os.path.join(os.path.expanduser(str(path)), "model.safetensors")
    if not os.path.isfile(file):
        return None
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        dtypes = {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
    kinds = (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16))
    return next((dtype for name, dtype in kinds if name in dtypes), None)


def quantization_of(given: Any) -> str | None:
    """The name of a `quantization_config` (a dict or a transformers object), for [`ModelSize`]."""
    if given is None:
        return None
    known = given if isinstance(given, dict) else {k: getattr(given, k, None) for k in vars(given)}
    four = known.get("load_in_4bit", known.get("_load_in_4bit"))
    eight = known.get("load_in_8bit", known.get("_load_in_8bit"))
    if four:
        return BNB_4BIT if known.get("bnb_4bit_use_double_quant") else BNB_4BIT_PLAIN
    if eight:
        return BNB_8BIT
    bits = known.get("bits", known.get("num_bits"))
    return BNB_4BIT_PLAIN if bits == 4 else INT8


# Numbers that an optimizer keeps for each trained one
_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}


def optimizer_bytes(optim: str, trained: Iterable[tuple[Tensor, int]], *, momentum: bool = False) -> int | None:
    """
    Bytes of an optimizer's states.

    Args:
        optim (`str`): `args.optim`.
        trained (`Iterable[tuple[torch.Tensor, int]]`):
            What is trained, each with the bytes of one number: PyTorch's own optimizers keep states in that dtype.
        momentum (`bool`): Whether SGD has a momentum.

    Returns:
        `int`, or `None` if nothing is known of this optimizer.
    """
    optim = optim.removeprefix("paged_")
    parameters = [(tuple(p.shape), p.numel(), itemsize) for p, itemsize in trained]
    if optim == "adafactor":  # sums of the rows and of the columns, vectors in full, and a mean
        return sum(4 + 4 * (n // s[-1] + n // s[-2] if len(s) > 1 else n) for s, n, _ in parameters)
    kind = next((k for k in ("ademamix", "adamw", "lion", "rmsprop", "adagrad", "sgd") if k in optim), None)
    if kind is None or any(x in optim for x in ("galore", "apollo", "lomo", "grok", "schedule_free")):
        return None
    count = 1 if kind == "sgd" and momentum else _STATES[kind]
    if "4bit" in optim:
        return sum(count * (n // 2 + 4 * math.ceil(n / 128)) for _, n, _ in parameters)
    if "8bit" in optim:  # small tensors stay in float32; a scale for each block of 256
        return sum(count * (4 * n if n < 4096 else n + 4 * math.ceil(n / 256)) for _, n, _ in parameters)
    if "bnb" in optim or "lion" in optim or "32bit" in optim:
        return sum(count * 4 * n for _, n, _ in parameters)
    counter = 4 if kind in ("adamw", "adagrad", "rmsprop") else 0  # of steps, for each tensor
    return sum(count * n * itemsize + counter for _, n, itemsize in parameters)


def cache_bytes(config: Any, num_sequences: int, length: int, itemsize: int) -> int:
    """
    Bytes of the keys and values of sequences while they are sampled.

    Args:
        config ([`~transformers.PretrainedConfig`]): The model's.
        num_sequences (`int`): Sampled at a time.
        length (`int`): Tokens of the longest, prompt and completion.
        itemsize (`int`): Bytes of a number.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or length + 1  # of which the newest token is not kept
    lengths = {"full_attention": length, "sliding_attention": min(length, window - 1)}
    return sum(lengths.get(kind, 0) for kind in layers) * 2 * heads * head_dim * num_sequences * itemsize
