"""One call for how a model with masks serves: what of its weights is in memory.

*dense*: every effective weight, made once. *lean*: the weight of one layer at a time. *packed*:
lean, and linear layers of a bank multiply a few inputs without any weight, from bits and bank.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.errors import ConfigError
from pemn_surgery.kernels import library
from pemn_surgery.kernels.bit_rows import bit_rows
from pemn_surgery.kernels.look_up import count_phases, pack
from pemn_surgery.masks import in_force
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.masked_weight import MaskedWeight, keep_weights
from pemn_surgery.numbers.bank import Bank
from pemn_surgery.transforms import is_transformed

ModeName = Literal["packed", "lean", "dense"]
_MODES = ("packed", "lean", "dense")

FEW = 8  # inputs that are multiplied without a weight; more of them all use one that is made


def freeze(model: nn.Module, mode: ModeName = "packed") -> dict[str, ModeName]:
    """Choose what of a model's effective weights is in memory; ``freeze(model, "dense")`` undoes.

    Outputs are the same in all modes; those of packed layers up to the rounding of float32 sums, in
    layers of any type. Adapters are switched, trained, saved and merged as ever: a layer that
    trains, mixes adapters, or is asked for more than a few inputs at once makes its weight, and so
    does one that torch transforms or records (``torch.compile``).

    Packed are ``nn.Linear`` on a CPU under a bank, where compiled kernels are: of an aligned one
    (``bank="rp", aligned=True``) by sums that are looked up, of others in float32 number by number.
    All others are lean.

    Args:
        model: A model with masks.
        mode: "packed", "lean" or "dense".

    Returns:
        What each masked weight is in from now on, by its name.

    Raises:
        ConfigError: If there is no such mode.
    """
    if mode not in _MODES:
        message = f"freeze got mode={mode!r}; it needs one of {', '.join(_MODES)}."
        raise ConfigError(message)
    keep_weights(model, mode == "dense")
    found: dict[str, ModeName] = {}
    for child in [one for one in model.modules() if isinstance(one, MaskedWeight)]:
        _thaw(child.owner)
        is_packed = mode == "packed" and _can_be_packed(child)
        if is_packed:
            child.owner.__dict__["forward"] = PackedForward(child)
        found[child.target] = mode if mode != "packed" else "packed" if is_packed else "lean"
    return found


def _thaw(layer: nn.Module) -> None:
    if isinstance(layer.__dict__.get("forward"), PackedForward):
        del layer.__dict__["forward"]


def _can_be_packed(child: MaskedWeight) -> bool:
    """Tell whether a layer only multiplies, by a weight that a bank fills."""
    layer: Any = child.owner
    plain = type(layer).forward is nn.Linear.forward and "forward" not in layer.__dict__
    if not plain or child.parameter != "weight" or child.bank is None or child.shared_with:
        return False
    if library.kernels() is None or not all(child.shape):
        return False
    return _shares_rows(child, child.bank) or _goes_by_numbers(child, child.bank)


def _goes_by_numbers(child: MaskedWeight, bank: Bank) -> bool:
    """Tell whether numbers are multiplied one by one: in vectors, without a copy of the bank."""
    kernels = library.kernels()
    in_vectors = kernels is not None and kernels.instructions != "base"
    return in_vectors and child.drawn_dtype == bank.values.dtype == torch.float32


def _shares_rows(child: MaskedWeight, bank: Bank) -> bool:
    """Tell whether enough rows begin at the same number for sums to be looked up."""
    count, columns = child.shape
    return count_phases(count, columns, bank.layout.period(child.shape)) is not None


class PackedForward:
    """The forward of a linear layer whose weight stays packed, for a few inputs at a time.

    Attributes:
        child: What makes the layer's weight otherwise.
        packed: By adapter what multiplies in place of its weight, beside what it was made from.
    """

    def __init__(self, child: MaskedWeight) -> None:
        self.child = child
        self.packed: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {}

    def __call__(self, input: Tensor) -> Tensor:
        """Return what the layer returns."""
        layer = cast("nn.Linear", self.child.owner)
        multiply = self._now(input)
        if multiply is None:
            return nn.Linear.forward(layer, input)
        flat = input.reshape(-1, input.shape[-1]).float()
        made = multiply(flat).view(*input.shape[:-1], -1)
        bias = layer.bias
        made = made if bias is None else made + bias
        return made.to(_type_of_result(input))

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedForward":
        """Serve the copied layer."""
        return PackedForward(copy.deepcopy(self.child, memo))

    def _now(self, inputs: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return what multiplies these inputs in place of the weight in force, if anything may."""
        if is_transformed() or not _serves(self.child, inputs):
            return None
        state, bank = in_force.read(self.child), self.child.bank
        if state.merged_weight is not None or state.mixture is not None or len(state.names) != 1:
            return None
        mask = cast("AdapterMask", self.child.pemn_masks[state.names[0]])
        is_longer = self.child.count_rows() != self.child.shape[0]  # added tokens
        if bank is None or is_longer or not _is_plain(mask):
            return None
        return self._of(state.names[0], mask, bank)

    def _of(self, name: str, mask: AdapterMask, bank: Bank) -> Callable[[Tensor], Tensor] | None:
        """Return what was made of an adapter's bits and the bank, as these are now."""
        stored = cast("Tensor", mask.bits)
        seen = tuple((id(t), t.data_ptr(), _version(t)) for t in (stored, bank.values))
        held = self.packed.get(name)
        if held is None or held[0] != seen:
            made = _made(self.child, mask, stored, bank)
            if made is None:
                return None
            held = seen, made
            there = {one: kept for one, kept in self.packed.items() if self.child.holds(one)}
            self.packed = {**there, name: held}
        return held[1]


def _made(
    child: MaskedWeight, mask: AdapterMask, stored: Tensor, bank: Bank
) -> Callable[[Tensor], Tensor] | None:
    count, columns = child.shape
    period = bank.period(child.shape, child.drawn_dtype)
    if _shares_rows(child, bank):
        return pack(mask.mask(), period)
    if not _goes_by_numbers(child, bank):  # it was cast, or kernels went, since it was frozen
        return None
    mask.as_bits()  # which checks them
    return bit_rows(stored[HEADER_BYTES:], period, count, columns)


def _serves(child: MaskedWeight, inputs: Tensor) -> bool:
    """Tell whether inputs are few, on the CPU, of the layer's type, and nobody wants gradients."""
    if inputs.device.type != "cpu" or not inputs.is_floating_point() or inputs.dim() == 0:
        return False
    fits = inputs.shape[-1] == child.shape[1] and 0 < inputs.numel() <= FEW * child.shape[1]
    typed = inputs.dtype == child.drawn_dtype or torch.is_autocast_enabled("cpu")
    if not fits or not typed or not library.is_in_memory(inputs.detach().contiguous()):
        return False
    return not (torch.is_grad_enabled() and inputs.requires_grad)


def _is_plain(mask: AdapterMask) -> bool:
    """Tell whether a mask keeps or drops all of a weight, and holds bits."""
    is_product = type(mask) is AdapterMask and not mask.scaled and mask.row_scale is None
    return is_product and mask.bits is not None and mask.places is None and mask.others is None


def _type_of_result(inputs: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
