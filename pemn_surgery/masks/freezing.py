"""One call for how a model with masks serves: what of its weights is in memory.

*dense*: every effective weight, made once. *lean*: the weight of one layer at a time. *packed*:
lean, and linear layers whose rows share numbers of the bank multiply a few inputs without any
weight, from bits and bank (`kernels.look_up`).
"""

import copy
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pemn_surgery.errors import ConfigError
from pemn_surgery.kernels import library
from pemn_surgery.kernels.look_up import Packed, count_phases, pack
from pemn_surgery.masks import in_force
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.masked_weight import MaskedWeight, keep_weights

ModeName = Literal["packed", "lean", "dense"]
_MODES = ("packed", "lean", "dense")

FEW = 8  # inputs for which a look-up is taken; with more the weight is made, which all of them use


def freeze(model: nn.Module, mode: ModeName = "packed") -> dict[str, ModeName]:
    """Choose what of a model's effective weights is in memory; ``freeze(model, "dense")`` undoes.

    Outputs are the same in all modes; those of a look-up up to the rounding of float32 sums, in
    layers of any type. Adapters are switched, trained, saved and merged as ever: a layer that
    trains, mixes adapters, or is asked for more than a few inputs at once makes its weight. So does
    ``torch.compile``. Packed are
    ``nn.Linear`` on a CPU whose bank repeats after whole rows (``bank="rp", aligned=True``), where
    compiled kernels are; all others are lean.

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
        is_packed = mode == "packed" and _can_look_up(child)
        if is_packed:
            child.owner.__dict__["forward"] = LookUp(child)
        found[child.target] = mode if mode != "packed" else "packed" if is_packed else "lean"
    return found


def _thaw(layer: nn.Module) -> None:
    if isinstance(layer.__dict__.get("forward"), LookUp):
        del layer.__dict__["forward"]


def _can_look_up(child: MaskedWeight) -> bool:
    """Tell whether a layer multiplies only, by a weight whose rows share numbers of a bank."""
    layer: Any = child.owner
    plain = type(layer).forward is nn.Linear.forward and "forward" not in layer.__dict__
    if not plain or child.parameter != "weight" or child.bank is None or child.shared_with:
        return False
    count, columns = child.shape
    period = child.bank.layout.period(child.shape)
    return library.kernels() is not None and count_phases(count, columns, period) is not None


class LookUp:
    """The forward of a linear layer whose weight stays packed, for a few inputs at a time.

    Attributes:
        child: What makes the layer's weight otherwise.
    """

    def __init__(self, child: MaskedWeight) -> None:
        self.child = child
        self._packed: dict[str, tuple[Any, Packed]] = {}

    def __call__(self, input: Tensor) -> Tensor:
        """Return what the layer returns."""
        layer = cast("nn.Linear", self.child.owner)
        packed = self._now(input)
        if packed is None:
            return nn.Linear.forward(layer, input)
        flat = input.reshape(-1, input.shape[-1]).float()
        made = packed(flat).view(*input.shape[:-1], packed.count)
        bias = layer.bias
        made = made if bias is None else made + bias
        return made.to(_type_of_result(input))

    def __deepcopy__(self, memo: dict[int, Any]) -> "LookUp":
        """Serve the copied layer."""
        return LookUp(copy.deepcopy(self.child, memo))

    def _now(self, inputs: Tensor) -> Packed | None:
        """Return the packed weight in force, if it serves these inputs."""
        if torch.compiler.is_compiling() or not _serves(self.child, inputs):
            return None
        state = in_force.read(self.child)
        if state.merged_weight is not None or state.mixture is not None or len(state.names) != 1:
            return None
        name = state.names[0]
        mask = cast("AdapterMask", self.child.pemn_masks[name])
        bank = self.child.bank
        is_longer = self.child.count_rows() != self.child.shape[0]  # added tokens
        if bank is None or not _is_plain(mask) or is_longer:
            return None
        bits = cast("Tensor", mask.bits)
        seen = tuple((id(t), t.data_ptr(), _version(t)) for t in (bits, bank.values))
        held = self._packed.get(name)
        if held is None or held[0] != seen:
            period = bank.period(self.child.shape, self.child.drawn_dtype)
            held = seen, cast("Packed", pack(mask.mask(), period))
            there = {one: kept for one, kept in self._packed.items() if self.child.holds(one)}
            self._packed = {**there, name: held}
        return held[1]


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
