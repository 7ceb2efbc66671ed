"""Weights that a library stores quantised: which of them can be masked, and their values.

PEFT knows the libraries. What it can dequantise is masked on its dequantised values, which are made
when they are needed; the stored tensor stays where it is, as it is.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import torch
from peft.utils.quantization_utils import (
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from pemn_surgery.errors import UnsupportedModelError
from pemn_surgery.masks.attached import find_masked
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.numbers.bank import BankSpec
from pemn_surgery.planning.roles import base_modules, full_name

Requantiser = Callable[[], Any]


def quantised_weights(model: nn.Module, spec: BankSpec) -> dict[str, str]:
    """Return why each weight that a library stores quantised cannot be masked, "" where it can."""
    found = {}
    for path, module in base_modules(model):
        backend = None if find_masked(module, "weight") else resolve_backend(module)
        if backend is not None:
            found[full_name(path, "weight")] = _problem(module, backend, spec)
    return found


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is plain floats, without asking any library."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()


def _problem(module: Any, backend: QuantizationBackend, spec: BankSpec) -> str:
    stored = f"is stored as {backend.backend_name} (quantised)"
    if not backend.supports_merge:
        return f"{stored}, which PEFT cannot dequantise"
    if module._parameters.get("weight") is None:
        return f"{stored}, and not in a parameter of that name"
    if _waits_for_its_device(module.weight, backend):
        return f"is not yet quantised ({backend.backend_name}); move the model to its device first"
    if spec.bank != "own" or spec.generated:
        return f'{stored}, which only bank="own" with bank_init="model" can mask'
    return ""


def _waits_for_its_device(weight: Any, backend: QuantizationBackend) -> bool:
    """Tell whether bitsandbytes has yet to quantise a weight, which it does on the first move."""
    is_packed = getattr(weight, "quant_state", None) is not None or not weight.is_floating_point()
    return backend.backend_name.startswith("bnb") and not is_packed


def resolve_backend(
    module: nn.Module, requantiser: Requantiser | None = None
) -> QuantizationBackend | None:
    """Return PEFT's way to read and write a layer's quantised weight, or None if it is plain."""
    weight = module._parameters.get("weight")
    is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    if not is_linear or (weight is not None and is_plain(weight)):
        return None
    chosen = requantiser or _unknown
    return resolve_quantization_backend(module, get_apply_tensor_subclass=chosen)


def find_requantiser(model: nn.Module) -> Requantiser | None:
    """Return what a transformers model says that torchao's weights are quantised with, or None."""
    return get_quantization_kwargs(model).get("get_apply_tensor_subclass")


def _unknown() -> NoReturn:
    message = "The model does not say how its torchao weights were quantised."
    raise UnsupportedModelError(message)


def dequantised(backend: QuantizationBackend, module: nn.Module, stored: Tensor) -> Tensor:
    """Return the values of a quantised weight, a new float tensor of the layer's own shape.

    Raises:
        UnsupportedModelError: If the library cannot dequantise this kind.
    """
    state = getattr(stored, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return _from_cpu_layout(stored)
    if state is not None and type(stored) is nn.Parameter:  # what pickle makes of a Params4bit
        return _dequantise_4bit(stored, state)
    scales = getattr(stored, "SCB", None)
    if scales is None:  # bitsandbytes' own forward has moved them to the layer
        scales = getattr(getattr(module, "state", None), "SCB", None)
    # Stands for the layer, whose own `weight` is the masked one.
    layer: Any = SimpleNamespace(weight=stored, state=SimpleNamespace(SCB=scales))
    try:
        with torch.no_grad():
            return backend.get_base_weight(layer)
    except NotImplementedError as error:
        message = (
            f"A weight is stored as {type(stored).__name__}, which {backend.backend_name} cannot "
            "dequantise, so masks cannot lie on its values. Leave it out (exclude_modules), or "
            "load the model unquantised. Nothing was changed."
        )
        raise UnsupportedModelError(message) from error


def _from_cpu_layout(stored: Any) -> Tensor:
    """Dequantise 4-bit weights that bitsandbytes has laid out anew for its CPU kernels.

    It does so at the first forward in eval mode; neither it nor PEFT dequantises that layout.
    """
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    state = copy.copy(stored.quant_state)
    state.original_nested = False  # the scales in `absmax` are plain in this layout
    values, state = functional._convert_weight_packed_for_cpu_inverse(stored.data, state)
    state.absmax = stored.quant_state.absmax.T.reshape(-1).float()
    return _dequantise_4bit(values, state)


def _dequantise_4bit(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    return cast("Tensor", functional.dequantize_4bit(packed.data, state))


def store(backend: QuantizationBackend, module: nn.Module, weight: Tensor) -> None:
    """Quantise a weight as the layer's was, and put it in its place."""
    layer: Any = SimpleNamespace(get_base_layer=lambda: module)
    backend.set_base_weight(layer, weight)


def check_can_store(model: nn.Module) -> None:
    """Refuse to merge into what cannot be quantised again (`UnsupportedModelError`)."""
    names = [
        module.target
        for module in model.modules()
        if isinstance(module, MaskedWeight)
        and getattr(getattr(module, "quantization_backend", None), "get_apply_tensor_subclass", 0)
        is _unknown
    ]
    if names:
        message = (
            f"{len(names)} masked weights are quantised by torchao (first: {names[0]}), and the "
            "model does not say how, so that merged ones could not be quantised again: load it "
            "with transformers' TorchAoConfig. merge_adapter() works without. Nothing was changed."
        )
        raise UnsupportedModelError(message)
