# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What the weights of a teacher in this process cost in memory: their form, and where they wait."""

import importlib.util
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BitsAndBytesConfig, TorchAoConfig

_PACKAGES = {"int8": "torchao", "bnb_8bit": "bitsandbytes", "bnb_4bit": "bitsandbytes"}


# The form of the weights


def check_quantization(name: str) -> None:
    """
    Check that the library of a quantization is installed.

    Raises:
        ImportError: If it is not.
    """
    package = _PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"teacher_quantization={name!r} needs {package}, which is not installed. The teacher's weights would not "
            "be quantized. Install 'trl-opd[quant]', or leave teacher_quantization unset."
        )


def quantization_config(name: str) -> TorchAoConfig | BitsAndBytesConfig:
    """
    The configuration for `from_pretrained`. Linear layers are quantized; embeddings and head stay as they are.

    Args:
        name (`str`):
            `"int8"`: 8-bit integers with one scale for each output channel (torchao; any device). `"bnb_8bit"`:
            LLM.int8() of bitsandbytes, activations too. `"bnb_4bit"`: NF4 with quantized scales, computed in bf16.
    """
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    # Its 8-bit product warns at every call that activations are cast, as they must be
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_once)
    if name == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


_said: set[str] = set()


def _once(record: logging.LogRecord) -> bool:
    """A logging filter that lets each sentence through once."""
    message = record.getMessage()
    new = message not in _said
    _said.add(message)
    return new


def _is_composed(tensor: Any) -> bool:
    """Whether a tensor is a wrapper around others, as those of torchao are."""
    return is_traceable_wrapper_subclass(tensor)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held in integers."""
    return _is_composed(weight) or not weight.is_floating_point()


def weight_bytes(model: nn.Module, device_type: str | None = None) -> int:
    """
    Bytes that a model's parameters and buffers hold, those of quantized weights as they are stored.

    Args:
        model (`torch.nn.Module`): Any.
        device_type (`str`, *optional*): Count those on such devices only.
    """
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for owner in (*model.parameters(), *(getattr(module, "state", None) for module in model.modules())):
        tensors += _statistics(owner)
    held: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        for part in _parts(tensor):
            if part.device.type == (device_type or part.device.type):
                held[part.device, part.data_ptr()] = part.nbytes
    return sum(held.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    if not _is_composed(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))


def _statistics(owner: Any) -> list[Tensor]:
    """Scales that bitsandbytes keeps beside a weight, or in the state of its layer."""
    found, state = [getattr(owner, "SCB", None)], getattr(owner, "quant_state", None)
    while state is not None:
        found += [getattr(state, name, None) for name in ("absmax", "code", "offset")]
        state = getattr(state, "state2", None)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


# Where the weights wait


def map_parts(tensor: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor made of `function` of its plain parts."""
    if not _is_composed(tensor):
        return function(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: map_parts(getattr(tensor, name), function) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


class WaitingWeights:
    """
    Frozen weights of a module that wait in CPU memory, pinned where that helps, and are on a device inside `with`.

    Nothing is copied back, because nothing changes them.

    Args:
        module (`torch.nn.Module`): Whose weights.
        device (`torch.device`): Where they are used.
        resident (`Collection[int]`): `id` of parameters that stay where they are.
    """

    def __init__(self, module: nn.Module, device: torch.device, resident: Collection[int] = ()):
        self.device = device
        self._slots: list[tuple[dict[str, Any], str, int]] = []  # every place of a parameter, for tied ones several
        self._waiting: dict[int, nn.Parameter] = {}
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is None or id(parameter) in resident:
                    continue
                self._slots.append((owner._parameters, name, id(parameter)))
                if id(parameter) not in self._waiting:
                    _check_movable(parameter)
                    self._waiting[id(parameter)] = _frozen(map_parts(parameter.data, self._to_cpu))
        self._put(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes that wait, and that travel each time."""
        return sum(part.nbytes for p in self._waiting.values() for part in _parts(p.data))

    def _to_cpu(self, part: Tensor) -> Tensor:
        part = part.to("cpu")
        return part.pin_memory() if self.device.type == "cuda" else part

    def _to_device(self, part: Tensor) -> Tensor:
        return part.to(self.device, non_blocking=True)

    def _put(self, parameters: dict[int, nn.Parameter]) -> None:
        for owner, name, key in self._slots:
            owner[name] = parameters[key]

    def __enter__(self) -> "WaitingWeights":
        self._put({key: _frozen(map_parts(p.data, self._to_device)) for key, p in self._waiting.items()})
        return self

    def __exit__(self, *exc: object) -> None:
        self._put(self._waiting)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _check_movable(parameter: nn.Parameter) -> None:
    if type(parameter).__module__.startswith("bitsandbytes"):
        raise ValueError(
            "teacher_offload must be unset for a teacher with bitsandbytes weights. They keep scales beside their "
            "tensors, which would not move with them. Set teacher_quantization='int8' to have both."
        )


def lend_layers(model: nn.Module, device: torch.device, resident: Collection[int] = ()) -> list[WaitingWeights]:
    """
    Let each decoder layer's weights wait, to be on `device` during its own forward only.

    Args:
        model (`torch.nn.Module`): A transformers model, which names its layers' classes in `_no_split_modules`.
        device (`torch.device`): Where it runs.
        resident (`Collection[int]`): `id` of parameters that stay where they are.

    Raises:
        ValueError: If the model does not name its layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    waiting: list[WaitingWeights] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or type(module).__name__ not in names:
            continue
        inside.update(module.modules())
        layer = WaitingWeights(module, device, resident)
        module.register_forward_pre_hook(_enter(layer))
        module.register_forward_hook(_leave(layer), always_call=True)
        waiting.append(layer)
    if not waiting:
        raise ValueError(
            f"teacher_offload must be 'model' for a {type(model).__name__}, got 'layers'. It does not name its layers "
            "(_no_split_modules), so they cannot be moved one by one. Set teacher_offload='model'."
        )
    return waiting


def _enter(layer: WaitingWeights) -> Callable[..., None]:
    def hook(*_: object) -> None:
        layer.__enter__()

    return hook


def _leave(layer: WaitingWeights) -> Callable[..., None]:
    def hook(*_: object) -> None:
        layer.__exit__()

    return hook


def settle(model: nn.Module, device: torch.device, waiting: Iterable[WaitingWeights]) -> None:
    """Bring to `device` what does not wait: the other parameters, and all buffers."""
    waits = {id(p) for weights in waiting for p in weights._waiting.values()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in waits:
                continue
            if _is_composed(parameter.data):  # whose parts `.data` would not exchange
                module._parameters[name] = _frozen(map_parts(parameter.data, lambda part: part.to(device)))
            else:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
