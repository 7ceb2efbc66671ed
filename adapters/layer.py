"""The PEFT tuner layers: the children that surgery hangs on the model's own modules.

PEFT takes everything on a tuner layer for adapter: trained, saved, left out of the base's state
dict. Here that is simply true, because a tuner layer holds masks (or a task's tensors) and nothing
of the base.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from pemn_surgery.adapters import quantised
from pemn_surgery.adapters.config import FROM_WEIGHTS, PemnConfig
from pemn_surgery.coding import bits
from pemn_surgery.errors import ConfigError, NonFiniteScoresError, PemnWarning
from pemn_surgery.masks import in_force
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.binary import BinaryMask
from pemn_surgery.masks.flip import FlipMask
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.overall import Overall
from pemn_surgery.masks.selector import Selector, check_finite
from pemn_surgery.masks.sign_delta import SignDelta, unit_of
from pemn_surgery.numbers import rng
from pemn_surgery.numbers.bank import Bank, BankSpec
from pemn_surgery.numbers.support import Support
from pemn_surgery.planning.plan import Target
from pemn_surgery.planning.roles import rows_of, scale_rows_of
from pemn_surgery.surgery import operate

_INT32 = 2**31  # places below it are held in half the memory

_KINDS: dict[str, type[AdapterMask]] = {
    "product": AdapterMask,
    "flip": FlipMask,
    "binary": BinaryMask,
    "sign_delta": SignDelta,
}


class PemnTunerLayer(BaseTunerLayer):
    """What both kinds of children have in common."""

    def __init__(self) -> None:
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False

    def active_adapter_names(self) -> Sequence[str]:
        """Return the adapters that apply: none while disabled or merged."""
        return [] if self._disable_adapters or self.merged_adapters else self.chosen()

    def chosen(self) -> list[str]:
        """Return the adapters that were activated, whatever a call reads in their place."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters; within a call of the model those that it reads."""
        if torch.compiler.is_compiling() or in_force.current() is None:
            return self.chosen()
        return list(in_force.read(cast("in_force.Layer", self)).names)

    @property
    def weight(self) -> Tensor:
        """A child has no weight of its own (PEFT's default would look for a wrapped layer)."""
        raise AttributeError

    @property
    def bias(self) -> Tensor:
        """A child has no bias of its own."""
        raise AttributeError

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable; disabling unmerges first, as PEFT's layers do in their forward."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def unmerge(self) -> None:
        """Go back to unmerged adapters. The base was never changed, so this is exact."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", PemnWarning, stacklevel=2)
        self.merged_adapters.clear()


class PemnLayer(PemnTunerLayer, MaskedWeight):
    """Masks of one parameter, by adapter.

    Attributes:
        spec: What decided the frozen numbers under the masks.
        fan: What the variance of numbers that are drawn for it is divided by.
        quantization_backend: Reads and writes the layer's weight if it is stored quantised, else
            None. PEFT's name.
    """

    adapter_layer_names = ("pemn_masks",)
    other_param_names = ()

    def __init__(
        self,
        owner: nn.Module,
        target: Target,
        spec: BankSpec,
        bank: Bank | None,
        backend: QuantizationBackend | None = None,
    ) -> None:
        MaskedWeight.__init__(
            self, owner, target.name, target.parameter, target.shape, target.fan_in, bank
        )
        PemnTunerLayer.__init__(self)
        self.spec = spec
        self.fan = spec.fan(target.fan_in, target.fan_out)
        self.quantization_backend = backend

    @property
    def in_features(self) -> int:
        """Inputs that one output sums over."""
        return self.fan_in

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return max(int(torch.Size(self.shape).numel()) // self.fan_in, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the effective weight."""
        return self.drawn_dtype or self.fill().dtype

    def fill(self) -> Tensor:
        """Return the unmasked weight; of a quantised one its values, made for this call."""
        stored = None if self.quantization_backend is None else self.own_weight()
        if self.quantization_backend is None or stored is None:
            return super().fill()
        return quantised.dequantised(self.quantization_backend, self.owner, stored)

    def read(self) -> Tensor:
        """Return the effective weight; a quantised one as it is stored while no adapter applies.

        So the layer's own forward, which reads it, is the base's to the last bit.
        """
        stored = self.own_weight() if self.quantization_backend is not None else None
        return stored if stored is not None and self.is_bare() else super().read()

    def _may_be_kept(self) -> bool:
        """A quantised weight's values are never kept: that they are not is what it is for."""
        return self.quantization_backend is None and super()._may_be_kept()

    def _is_fill_new(self) -> bool:
        return self.quantization_backend is not None or super()._is_fill_new()

    def extra_repr(self) -> str:
        """Show the target, and how it is stored."""
        backend = self.quantization_backend
        stored = f", quantization_backend={backend.backend_name!r}" if backend else ""
        return super().extra_repr() + stored

    def add_mask(
        self,
        adapter_name: str,
        config: PemnConfig,
        fingerprint: Mapping[str, str],
        density: float | None = None,
    ) -> None:
        """Give an adapter its mask of this weight.

        With ``inference_mode`` the mask is bits, unless scores are kept: the place for them where a
        file is about to be read, else the initial mask. Signs of a fine-tuned model's change, and
        their scales, always come later.
        """
        self.pemn_masks[adapter_name] = self._mask(config, fingerprint, config.selector_of(density))
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _mask(
        self, config: PemnConfig, fingerprint: Mapping[str, str], selector: Selector
    ) -> AdapterMask:
        is_final = config.inference_mode and not config.keep_scores
        holds_bits = is_final or config.has_fixed_signs
        loading = config.has_fixed_signs or (is_final and config.origin.file is not None)
        places = self._places(config)
        shape = self.shape if places is None else tuple(places.shape)
        scores = None if loading else self._initial_scores(config, places, shape)
        stored = None
        if holds_bits:
            weights = int(torch.Size(shape).numel())
            start = scores if scores is not None else torch.empty(0)
            stored = bits.empty(weights) if loading else bits.pack(selector.mask(start))
            scores = None
        mask = _KINDS[config.form](
            self.target,
            self.shape,
            selector,
            fingerprint,
            scaled=config.scale == "sqrt_density",
            scores=scores,
            stored=stored,
            places=places,
            others=self._others(config, selector.density),
        )
        if not isinstance(config.score_init, str):
            mask.start = config.score_init
        mask.train(self.owner.training)  # masks that are drawn in training are so from now on
        if isinstance(mask, SignDelta):
            self._scale_signs(mask, config)
        elif config.scale == "row":
            rows = rows_of(self.owner, self.shape)
            mask.take_row_scale(torch.ones(rows.count), rows, is_final=config.inference_mode)
        return mask

    def _scale_signs(self, mask: SignDelta, config: PemnConfig) -> None:
        rows = scale_rows_of(self.owner, self.shape, one_a_matrix=config.scale == "matrix")
        mask.take_row_scale(torch.zeros(rows.count), rows, is_final=config.inference_mode)
        mask.learns = not config.has_fixed_signs
        if mask.scores is not None:
            mask.unit = unit_of(self.fan_in)

    def _initial_scores(
        self, config: PemnConfig, places: Tensor | None, shape: tuple[int, ...]
    ) -> Tensor:
        if config.score_init not in FROM_WEIGHTS:
            return initial_scores(config, self.target, shape, self.fan_in)
        values = self._frozen_numbers(f'score_init="{config.score_init}"', "take a drawn one")
        there = values.reshape(-1) if places is None else values.reshape(-1)[places]
        sizes = there.abs().float().cpu().view(shape)
        return initial_scores(config, self.target, shape, self.fan_in, sizes)

    def _places(self, config: PemnConfig) -> Tensor | None:
        """Return where the weights lie that an adapter masks; None: all of them."""
        support = config.support_in_force
        if support is None:
            return None
        layout = rows_of(self.owner, self.shape).view
        words = words_of(self._told_by(support)) if support.reads_base else None
        places = torch.from_numpy(support.places(self.target, layout, words))
        return places.to(torch.int32) if math.prod(layout) < _INT32 else places

    def _others(self, config: PemnConfig, density: float) -> Tensor | None:
        """Return the mask of the weights that have no bit, packed; None: all ones."""
        support = config.support_in_force
        if support is None or config.support_others == "kept":
            return None
        weights = math.prod(self.shape)
        return bits.pack(torch.from_numpy(support.kept_others(self.target, weights, density)))

    def _told_by(self, support: Support) -> Tensor:
        """Return the frozen numbers that decide which weights are masked."""
        asked, instead = f'support_by="{support.by}"', 'take support_by="seed"'
        values = self._frozen_numbers(asked, instead)
        if values.dtype == torch.float16:
            # float16 rounds numbers otherwise on their way to bfloat16, so places would differ
            self._refuse_numbers(asked, "held in float16", instead)
        return values

    def _frozen_numbers(self, asked: str, instead: str) -> Tensor:
        """Return the numbers under the masks, for an option that reads them."""
        values = self.fill().detach()
        if tuple(values.shape) != tuple(self.shape) or hasattr(values, "full_tensor"):
            self._refuse_numbers(asked, "sharded", instead)
        return values

    def _refuse_numbers(self, asked: str, problem: str, instead: str) -> NoReturn:
        message = (
            f"{asked} reads the numbers of {self.target!r}, which are {problem}; add the adapter "
            f"where they are whole and in float32 or bfloat16, or {instead}. Nothing was changed."
        )
        raise ConfigError(message)

    def mask_of(self, adapter_name: str) -> AdapterMask:
        """Return an adapter's mask of this weight."""
        return cast("AdapterMask", self.pemn_masks[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fix the effective weight of these adapters (default: the active ones).

        Raises:
            NonFiniteScoresError: With ``safe_merge``, if scores or weights are not finite.
        """
        wanted = check_adapters_to_merge(self, adapter_names)
        names = [name for name in wanted if name in self.pemn_masks]
        if not names:
            return
        merged = self._merged(names, safe=safe_merge)
        self.hold_merged(merged, shown=self.quantization_backend is None)
        self.merged_adapters.extend(names)

    def check_mergeable(self, adapter_names: Sequence[str] | None) -> None:
        """Refuse what a safe `merge` would refuse, and merge nothing.

        Raises:
            NonFiniteScoresError: If scores or weights are not finite.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in wanted if n in self.pemn_masks and n not in self.merged_adapters]
        if names:
            self._merged(names, safe=True)

    def _merged(self, names: Sequence[str], *, safe: bool) -> Tensor:
        if safe:
            self._check_scores(names)
        weight = self.merge_names([*self.merged_adapters, *names])
        if safe and not torch.isfinite(weight).all():
            message = f"NaNs detected in the merged weights of {self.target}: adapters {names}."
            raise NonFiniteScoresError(message)
        return weight

    def unmerge(self) -> None:
        """Drop the fixed effective weight."""
        super().unmerge()
        self.drop_merged()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> None:
        """Leave a plain layer behind: PEFT calls this on every tuner layer."""
        with onload_layer(self.owner):
            if merge:
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            merged = self.merged_weight if merge else None
            self.drop_merged()
            if self.quantization_backend is None or merged is None:
                operate.restore_parameter(self, merged)
                return
            operate.restore_parameter(self, None)
            quantised.store(self.quantization_backend, self.owner, merged)
            for module, name in self.shared_with:
                module._parameters[name] = self.owner._parameters[self.parameter]

    def _check_scores(self, names: Sequence[str]) -> None:
        """A NaN score vanishes in a comparison, so the merged weight alone would not show it."""
        for name in names:
            scores = self.mask_of(name).scores
            if scores is None:
                continue
            try:
                check_finite(scores, self.target)
            except NonFiniteScoresError as error:
                message = (
                    "NaNs detected in the merged weights. "
                    f"The adapter {name} seems to be broken: {error}"
                )
                raise NonFiniteScoresError(message) from error

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Masks are not additive, so they have no LoRA form."""
        return False

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        base = self.bank.values if self.bank is not None else self.own_weight()
        where = device if device is not None else (base.device if base is not None else None)
        if where is None or where.type == "meta" or adapter_name not in self.pemn_masks:
            return
        mask = self.mask_of(adapter_name)
        if mask.store.device.type != "meta":
            mask.to(where)


def choose_together(layers: Iterable[PemnLayer], adapter_name: str) -> None:
    """Let an adapter's masks settle among them how many scores each drops, if they are so chosen.

    Args:
        layers: All layers that the adapter masks.
        adapter_name: The adapter.
    """
    masks = [layer.mask_of(adapter_name) for layer in layers]
    if any(mask.last_selector.is_overall for mask in masks):
        together = Overall(masks)
        for mask in masks:
            mask.together = together


def initial_scores(
    config: PemnConfig,
    target: str,
    shape: tuple[int, ...],
    fan_in: int,
    sizes: Tensor | None = None,
) -> Tensor:
    """Return the scores that training starts from, float32, the same on every machine.

    They are a constant; or U(-b, b) with b = 1 / sqrt(fan_in), which is torch's
    ``kaiming_uniform_(a=sqrt(5))`` (PEMN's released code; edge-popup); or from N(mean, std); or the
    frozen numbers' sizes with noise from N(0, std), shuffled first or not. Each weight has a stream
    of its own, by its name.

    Args:
        config: The configuration.
        target: Name of the weight.
        shape: Shape of its mask.
        fan_in: Inputs that one output sums over.
        sizes: Magnitudes of the frozen numbers, float32 of that shape. None, where they are not at
            hand, puts 1 / sqrt(fan_in) in their place.
    """
    init, count, stream = config.score_init, math.prod(shape), scores_stream(target)
    if not isinstance(init, str):
        return torch.full(shape, cast("float", init), dtype=torch.float32)
    if init == "kaiming_uniform":
        return _tensor(rng.uniform(config.seed, stream, count, fan_in**-0.5)).view(shape)
    drawn = _tensor(rng.normal(config.seed, stream, count, config.score_std or 0.0)).view(shape)
    if init == "normal":
        return drawn + cast("float", config.score_mean)
    start = torch.full(shape, fan_in**-0.5) if sizes is None else sizes
    if init == "magnitude_shuffled":
        order = _tensor(rng.permutation(config.seed, f"{stream}/order", count))
        start = start.reshape(-1)[order].view(shape)
    return start + drawn


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(values)


def words_of(values: Tensor) -> np.ndarray:
    """Return frozen numbers in bfloat16, uint16 of shape (weights,); the same from float32."""
    words = values.to(torch.bfloat16).cpu().reshape(-1).view(torch.int16)
    return words.numpy().view(np.uint16)


def weight_stream(target: str) -> str:
    """Return the stream of a weight that has its own drawn numbers (``bank="own"``)."""
    return f"weight/{target}"


def scores_stream(target: str) -> str:
    """Return the stream of a weight's initial scores."""
    return f"scores/{target}"
