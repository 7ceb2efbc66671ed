"""What two tasks have in common, and where they conflict: their masks, weight by weight.

Two files are compared from the files alone, two adapters of one model as the model holds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.base import masked_layers
from pemn_surgery.adapters.checks import adapter_configs, check_adapters_exist
from pemn_surgery.adapters.config import FormName, PemnConfig
from pemn_surgery.adapters.files.adapter_file import one_reading, read_decoded
from pemn_surgery.adapters.files.contents import mask_key
from pemn_surgery.adapters.files.file_checks import check_without_base
from pemn_surgery.adapters.files.opening import open_adapter
from pemn_surgery.adapters.identity import others_of
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.errors import AdapterError, AdapterFileError, ArchitectureError
from pemn_surgery.masks.adapter_mask import AdapterMask

_Masks = dict[str, tuple[int, int]]  # by parameter: weights, and the mask as one whole number


@dataclass(frozen=True)
class Overlap:
    """Two masks of the same parameter.

    Attributes:
        name: The parameter, or "all" for the sum.
        weights: Number of its weights; with ``support`` of those that have a bit.
        first: Ones of the first task's mask.
        second: Ones of the second's.
        both: Weights that both keep.
        are_signs: Whether the bits are signs of changes (``form="sign_delta"``), which leave no
            weight as it is.
    """

    name: str
    weights: int
    first: int
    second: int
    both: int
    are_signs: bool = False

    @property
    def either(self) -> int:
        """Weights that at least one of them keeps."""
        return self.first + self.second - self.both

    @property
    def changed_by_both(self) -> int:
        """Weights that both drop, or flip: neither leaves them as they are in the base."""
        return self.weights if self.are_signs else self.weights - self.either

    @property
    def disagreeing(self) -> int:
        """Weights whose bits differ: one of the two changes them, or signs are opposite."""
        return self.either - self.both

    @property
    def jaccard(self) -> float:
        """Share of the weights that either keeps which both keep; 1 where neither keeps any."""
        return self.both / self.either if self.either else 1.0

    @property
    def chance(self) -> float:
        """The Jaccard index expected of independent masks of these densities."""
        both = self.first * self.second / max(self.weights, 1)
        either = self.first + self.second - both
        return both / either if either else 1.0

    @property
    def agreement(self) -> float:
        """Share of the weights that both treat alike."""
        return 1 - self.disagreeing / max(self.weights, 1)


@dataclass(frozen=True)
class Comparison:
    """Two adapters' masks side by side.

    Attributes:
        overlaps: Parameters that both mask, in the first adapter's order.
        only_first: Parameters that the first alone masks.
        only_second: Parameters that the second alone masks.
        same_base: Whether both lie on the same frozen numbers.
        form: What the masks of both do to a weight.
    """

    overlaps: tuple[Overlap, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    same_base: bool
    form: FormName = "product"

    @property
    def total(self) -> Overlap:
        """All parameters together."""
        kinds = ("weights", "first", "second", "both")
        sums = (sum(getattr(overlap, kind) for overlap in self.overlaps) for kind in kinds)
        return Overlap("all", *sums, are_signs=self.form == "sign_delta")


@dataclass(frozen=True)
class _Side:
    """One of the two adapters."""

    name: str
    config: PemnConfig
    masks: _Masks


def compare_adapters(
    first: str | Path, second: str | Path, model: nn.Module | None = None
) -> Comparison:
    """Compare the masks of two adapters: what both keep, what both change, where they disagree.

    Args:
        first: Folder of an adapter; with ``model`` the name of one that the model has.
        second: Folder, or name, of another one, of the same architecture and form.
        model: A model that has both.

    Returns:
        The overlap of every parameter that both mask. Of two adapters of a model that mask
        different weights (``support``) it is of whole parameters, where a weight without a bit
        counts as kept.

    Raises:
        AdapterFileError: If a folder has no masks as bits, or a file is truncated or altered.
        ArchitectureError: If no parameter is masked by both files, one has two sizes, or they mask
            different weights.
        AdapterError: If the model has no such adapter, or the two are of different forms.
        MaskNotLoadedError: If a mask of the model's was never loaded.
    """
    if model is None:
        ours, theirs = _read(first), _read(second)
        same_base = ours.config.fingerprint == theirs.config.fingerprint
        _check_forms(ours, theirs)
        _check_same_weights(ours, theirs, same_base=same_base)
        _check_sizes(ours, theirs)
    else:
        ours, theirs = _held_by(model, [str(first), str(second)])
        same_base = True
        _check_forms(ours, theirs)
    form = ours.config.form
    shared = [name for name in ours.masks if name in theirs.masks]
    return Comparison(
        tuple(_overlap(name, ours.masks[name], theirs.masks[name], form) for name in shared),
        tuple(name for name in ours.masks if name not in theirs.masks),
        tuple(name for name in theirs.masks if name not in ours.masks),
        same_base,
        form,
    )


def _read(folder: str | Path) -> _Side:
    with one_reading():
        config, file = open_adapter(folder)
        if not file.headers:
            message = (
                f"{str(folder)!r} holds no masks as bits. Give the folder of an adapter that "
                "save_pretrained made; a Trainer's checkpoint holds scores."
            )
            raise AdapterFileError(message)
        check_without_base(file)
        tensors = read_decoded(file.path).tensors
    masks = {name: _as_number(tensors[mask_key(name, "bits")]) for name in file.sizes}
    return _Side(str(folder), config, {n: (file.sizes[n], mask) for n, mask in masks.items()})


def _held_by(model: nn.Module, names: Sequence[str]) -> list[_Side]:
    configs = adapter_configs(model)
    check_adapters_exist(configs, names)
    held = [
        {layer.target: layer.mask_of(name) for layer in masked_layers(model, name).values()}
        for name in names
    ]
    shared = [target for target in held[0] if target in held[1]]
    parted = {target for target in shared if not _lie_alike(*(masks[target] for masks in held))}
    return [
        _Side(
            name,
            configs[name],
            {target: _packed(mask, whole=target in parted) for target, mask in masks.items()},
        )
        for name, masks in zip(names, held, strict=True)
    ]


def _lie_alike(first: AdapterMask, second: AdapterMask) -> bool:
    """Tell whether two masks have bits for the same weights, and do the same to all others."""
    pairs = ((first.places, second.places), (first.others, second.others))
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for one, other in pairs
    )


def _packed(mask: AdapterMask, *, whole: bool) -> tuple[int, int]:
    """Return the number of weights and the mask as a number; of the whole weight if asked."""
    stored = mask.as_bits()
    if not whole or mask.places is None:
        return mask.weights, _as_number(stored)
    places = mask.places.cpu().long()
    kept = torch.ones(torch.Size(mask.shape).numel(), dtype=torch.bool)
    if mask.others is not None:
        kept = bits.unpack(mask.others.cpu(), mask.shape).flatten().clone()
    kept[places] = bits.unpack(stored.cpu(), mask.mask_shape)
    return kept.numel(), _as_number(bits.pack(kept))


def _as_number(stored: Tensor) -> int:
    return int.from_bytes(stored.cpu().numpy()[HEADER_BYTES:].tobytes(), "little")


def _overlap(name: str, ours: tuple[int, int], theirs: tuple[int, int], form: FormName) -> Overlap:
    (weights, first), (_, second) = ours, theirs
    both = (first & second).bit_count()
    signs = form == "sign_delta"
    return Overlap(name, weights, first.bit_count(), second.bit_count(), both, signs)


def _check_forms(ours: _Side, theirs: _Side) -> None:
    forms = [side.config.form for side in (ours, theirs)]
    if forms[0] != forms[1]:
        message = (
            f"{ours.name!r} has masks of form={forms[0]!r} and {theirs.name!r} of "
            f"form={forms[1]!r}, whose bits mean different things. Give two adapters of one form."
        )
        raise AdapterError(message)


def _check_same_weights(ours: _Side, theirs: _Side, *, same_base: bool) -> None:
    """Refuse files whose bits are of different weights: which ones, is not in a file."""
    told = [_told(side.config) for side in (ours, theirs)]
    support = ours.config.support_in_force
    by_base = support is not None and support.reads_base and not same_base
    if told[0] != told[1] or by_base:
        _refuse(
            f"The masks in {ours.name!r} and {theirs.name!r} lie on different weights "
            f"({told[0] or 'all'} and {told[1] or 'all'}{', of two bases' * by_base}), and files "
            "do not say which. Load both into one model: compare_adapters(first, second, model)."
        )


def _told(config: PemnConfig) -> tuple[object, ...]:
    """Return what decides which weights have bits, and what all others are; () if all have."""
    support = config.support_in_force
    if support is None:
        return ()
    by_seed = () if support.reads_base else (f"seed {support.seed}",)
    others = others_of(config) if config.support_others == "drawn" else ()
    return (support.share, support.by, *by_seed, *others)


def _check_sizes(ours: _Side, theirs: _Side) -> None:
    shared = [name for name in ours.masks if name in theirs.masks]
    if not shared:
        _refuse(
            f"No parameter is masked by both {ours.name!r} ({len(ours.masks)} masks) and "
            f"{theirs.name!r} ({len(theirs.masks)} masks). Give two adapters of one architecture."
        )
    for name in shared:
        sizes = ours.masks[name][0], theirs.masks[name][0]
        if sizes[0] != sizes[1]:
            _refuse(
                f"The mask of {name!r} has {sizes[0]} weights in {ours.name!r} and {sizes[1]} in "
                f"{theirs.name!r}. Give two adapters of one architecture."
            )


def _refuse(message: str) -> NoReturn:
    raise ArchitectureError(message)
