"""Masks between a model and a file: scores packed to bits, bits checked and put in place."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.base import (
    base_sizes,
    check_named_base,
    fingerprint_now,
    guides_of,
    masked_layers,
    warn_of_trained_draws,
)
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import is_reading
from pemn_surgery.adapters.files.contents import (
    BANK_KEY,
    FINGERPRINT,
    KEY_PREFIX,
    MASKS,
    is_fingerprint_key,
    is_mask_key,
    mask_key,
)
from pemn_surgery.adapters.injection.layer_checks import check_is_plain
from pemn_surgery.adapters.layer import PemnLayer, initial_scores
from pemn_surgery.adapters.within import set_within
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.header import UNKNOWN_BASE, StoredMask, inspect, refuse
from pemn_surgery.errors import ArchitectureError, PemnWarning, TrainingWarning
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.overall import settled_selectors
from pemn_surgery.masks.selector import Selector, check_finite
from pemn_surgery.masks.sign_delta import SignDelta
from pemn_surgery.numbers import fingerprint as fingerprints
from pemn_surgery.surgery.layer_groups import base_name
from pemn_surgery.transforms import gathered

StateDict = dict[str, Tensor]

_BYTE = torch.uint8
# Whether the Trainer writes a checkpoint.
_is_checkpoint: ContextVar[bool] = ContextVar("is_checkpoint", default=False)


def pack_for_file(
    entries: Mapping[str, Tensor],
    model: nn.Module,
    config: PemnConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
) -> StateDict:
    """Return an adapter's entries as they are saved: scores as bits, unless they are kept.

    The values come from the given entries, not from the modules: FSDP and ZeRO pass gathered
    tensors, while the modules hold shards. The base is named as it is now.

    Raises:
        NonFiniteScoresError: If scores contain NaN or infinity.
    """
    layers = _layers_by_key(model, adapter_name)
    masks = {path: layer.mask_of(adapter_name) for path, layer in layers.items()}
    warn_of_trained_draws(model, adapter_name)
    config.fingerprint = fingerprint_now(model, adapter_name, state_dict)
    base = fingerprints.short_form(config.fingerprint)
    bank = _stored_bank(layers.values())
    config.digest = None  # that of an earlier file, if the adapter was loaded
    if config.modules_to_save is not None:  # PEFT adds a task's heads again at each load
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    saved: StateDict = {}
    for key, value in entries.items():
        path, _, kind = key.rpartition(".")
        mask = masks.get(path)
        whole = gathered(value)
        if mask is None:
            saved[key] = whole
        elif kind == "row_scale":
            saved[key] = whole * unit_in(mask)
        elif kind == "bits":
            saved[key] = _on_base(whole, base, is_stored=bank is not None)
        elif are_scores_kept(config):
            saved |= {key: whole, f"{path}.{FINGERPRINT}": torch.tensor(list(base), dtype=_BYTE)}
        else:
            check_finite(whole, mask.target)
            saved[f"{path}.bits"] = bits.pack(mask.selector.mask(whole), base)
    _warn_of_ones(saved, masks)
    if bank is not None:
        saved[BANK_KEY] = bank
    coded = _coded(saved, layers, masks, config) if config.coding != "bits" else saved
    return AdapterEntries(coded, config.rows_by_name)


def _warn_of_ones(saved: Mapping[str, Tensor], masks: Mapping[str, AdapterMask]) -> None:
    """Say that an adapter changes nothing: no score of any mask was trained past its threshold."""
    stored = {
        path: saved.get(f"{path}.bits")
        for path, mask in masks.items()
        if mask.scores is not None and mask.selector.has_threshold
    }
    found = [value for value in stored.values() if value is not None]
    if found and len(found) == len(masks) and all(map(_is_all_ones, found)):
        warnings.warn(
            f"All {len(found)} masks keep every weight as it is: no score was trained past its "
            "threshold, so the saved adapter leaves the base's weights unchanged. Raise the "
            "learning rate of the scores; PemnCallback says while training what it should be.",
            TrainingWarning,
            stacklevel=3,
        )


def _is_all_ones(stored: Tensor) -> bool:
    return bits.count_ones(stored) == inspect(stored, "the mask").weights


class AdapterEntries(dict[str, Tensor]):
    """An adapter's entries, to which PEFT adds: modules that are saved whole, and embeddings.

    Where tokens were added it adds every tensor below the embeddings and the head as it is in the
    model, scores and copies of adapters too. What the adapter has already is not taken again, nor
    a tensor of which it has the new rows.
    """

    def __init__(self, entries: Mapping[str, Tensor], grown: Iterable[str] = ()) -> None:
        super().__init__(entries)
        self._grown = {*grown, *(KEY_PREFIX + name for name in grown)}

    def update(self, added: Mapping[str, Tensor]) -> None:  # pyright: ignore
        """Take what the adapter has in no form yet, under the name that it has in the base."""
        held = {*self._grown, *(base_name(key) for key in self)}
        for key, value in added.items():
            name = base_name(key)
            if name not in held:
                whole = gathered(value)
                check_is_plain(name, whole)
                self[name] = whole


def prepare_for_model(
    state_dict: Mapping[str, Tensor], model: nn.Module, config: PemnConfig, adapter_name: str
) -> StateDict:
    """Check every mask of a file, and turn bits into scores or scores into bits where needed.

    Returns:
        The tensors under the same keys, but that ".bits" or ".scores" is what the model holds.

    Raises:
        MaskFormatError: If a mask is damaged.
        ArchitectureError: If masks and weights do not fit.
        FingerprintError: If the masks were trained on another base.
    """
    layers = {layer.target: layer for layer in _layers_by_key(model, adapter_name).values()}
    masks = {
        mask_key(mask.target, kind): (mask, kind)
        for mask in (layer.mask_of(adapter_name) for layer in layers.values())
        for kind in _kinds(mask)
    }
    given = {_with_prefix(key): value for key, value in state_dict.items()}
    given.pop(BANK_KEY, None)  # the model has it since masks were put on it; each mask names it
    named = {key: given.pop(key) for key in [*given] if is_fingerprint_key(key)}
    _check_fit(masks, given)
    actual = fingerprint_now(model, adapter_name)
    headers = _check_masks(masks, given, actual)
    _check_scores(masks, given, named, actual)
    selectors = _selectors(masks, given)
    loaded: StateDict = {}
    lossy = 0
    for key, value in given.items():
        if key not in masks:
            loaded[key] = value
            continue
        mask, kind = masks[key]
        _make_wide_enough(mask, value)
        if kind == "bits" and headers[key].coding != "bits":
            numbers = partial(base_sizes, layers[mask.target], mask.places)
            value = codec.decode(value, key, numbers)
        if kind == "row_scale":
            loaded[key] = value / unit_in(mask)
            continue
        held = "scores" if mask.scores is not None else "bits"
        lossy += held == "scores" and kind == "bits"
        loaded[mask_key(mask.target, held)] = _converted(
            value, kind, held, mask, config, actual, selectors
        )
    if lossy:
        warn_of_bits(lossy)
    return loaded


def _selectors(
    masks: Mapping[str, tuple[AdapterMask, str]], given: Mapping[str, Tensor]
) -> dict[str, Selector]:
    """Return how masks are chosen from the scores of a state dict, by weight."""
    found = {
        masks[key][0].target: (masks[key][0].selector, value)
        for key, value in given.items()
        if key in masks and masks[key][1] == "scores"
    }
    scores = {target: value for target, (_, value) in found.items()}
    return settled_selectors({target: one for target, (one, _) in found.items()}, scores)


def warn_of_bits(count: int) -> None:
    """Say that training cannot go on exactly from masks that are bits."""
    warnings.warn(
        f"The file holds bits, not scores, for {count} masks: training starts from scores made "
        "from the bits, so earlier magnitudes are lost.",
        PemnWarning,
        stacklevel=3,
    )


def scores_from_mask(chosen: Tensor, mask: AdapterMask, config: PemnConfig) -> Tensor:
    """Return scores that choose exactly this mask, to train on from a file of bits.

    Where the largest are kept the ones lie just above the largest initial magnitude, in the order
    of their own initial ones, and the zeros keep their initial scores: either side's nearest change
    soonest. With "threshold" every score lies one initial margin above or below it.
    """
    shape = mask.shape
    fan_in = max(math.prod(shape) // max(shape[0], 1), 1) if shape else 1
    start = initial_scores(config, mask.target, mask.mask_shape, fan_in).to(chosen.device)
    if mask.selector.is_overall:  # ones lie above the zeros of all other masks, too
        near = start / max(1.0, float(start.abs().max()) if start.numel() else 0.0)
        return torch.where(chosen, near + torch.where(near < 0, -1.01, 1.01), near)
    if not mask.selector.has_threshold:
        # drawn scores reach 1 / sqrt(fan_in), others as far as they do
        reach = max(1.01 * fan_in**-0.5, 1.01 * float(start.abs().max()) if start.numel() else 0.0)
        by_size = mask.selector.uses_magnitude
        away = reach * (torch.where(start < 0, -1.0, 1.0) if by_size else 2.0)
        return torch.where(chosen, start + away, start)
    threshold = mask.selector.threshold
    margin = (start - threshold).abs().clamp(min=1e-3)
    return torch.where(chosen, threshold + margin, threshold - margin)


def are_scores_kept(config: PemnConfig) -> bool:
    """Tell whether saving an adapter writes its scores."""
    return config.keep_scores or _is_checkpoint.get()


def with_scores(write: Callable[..., Any]) -> Callable[..., Any]:
    """Let a ``Trainer``'s checkpoints hold scores: a run that goes on from bits is another run.

    A checkpoint and a final save are the same call of ``save_pretrained``; only the method that
    writes checkpoints knows which it is, whatever module the adapters are in.
    """

    @functools.wraps(write)
    def _save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with set_within(_is_checkpoint, True):
            return write(*args, **kwargs)

    return _save_checkpoint


def _coded(
    saved: StateDict,
    layers: Mapping[str, PemnLayer],
    masks: Mapping[str, AdapterMask],
    config: PemnConfig,
) -> StateDict:
    """Return the entries with masks coded; a place that was never loaded stays as it is."""
    coded = dict(saved)
    for key, value in saved.items():
        path = key.removesuffix(".bits")
        if path in layers and bits.is_loaded(value):
            places = masks[path].places
            kernel = layers[path].shape[2:] if places is None else ()
            coded[key] = codec.encode(value, guides_of(layers[path], config, places), kernel)
    return coded


def _kinds(mask: AdapterMask) -> tuple[str, ...]:
    """Return what a file may hold of a mask: bits or scores, or signs alone, and scales."""
    is_fixed = isinstance(mask, SignDelta) and not mask.learns
    chosen_by = ("bits",) if is_fixed else ("bits", "scores")
    return chosen_by if mask.row_scale is None else (*chosen_by, "row_scale")


def _layers_by_key(model: nn.Module, adapter_name: str) -> dict[str, PemnLayer]:
    """Return the layers with an adapter's mask, by its place in the model's state dict."""
    layers = masked_layers(model, adapter_name)
    return {f"{path}.{MASKS}.{adapter_name}": layer for path, layer in layers.items()}


def _stored_bank(layers: Iterable[PemnLayer]) -> Tensor | None:
    """Return the numbers under masks that are saved with them, or None."""
    bank = next((layer.bank for layer in layers if layer.spec.init == "stored"), None)
    return None if bank is None else bank.values.detach().clone()


def _on_base(stored: Tensor, base: bytes, *, is_stored: bool) -> Tensor:
    """Return a mask that was loaded as one of the base that it lies on, if that has changed.

    A bank that is saved beside it has the digits of its present type alone: what a cast rounded
    away is in no file.
    """
    if not bits.is_loaded(stored):
        return stored
    if is_stored:
        return bits.with_base(stored, base)
    known = fingerprints.from_short_form(inspect(stored, "the mask").base)
    now = fingerprints.from_short_form(base)
    stays = not now or fingerprints.agree(known, now)
    return stored if stays else bits.with_base(stored, base)


def _with_prefix(key: str) -> str:
    return key if key.startswith("base_model.") else KEY_PREFIX + key


def _check_fit(
    masks: Mapping[str, tuple[AdapterMask, str]], state_dict: Mapping[str, Tensor]
) -> None:
    stray = [key for key in state_dict if is_mask_key(key) and key not in masks]
    targets = {mask.target for mask, _ in masks.values()}
    chosen = (masks[key] for key in state_dict if key in masks)
    given = {mask.target for mask, kind in chosen if kind != "row_scale"}
    unscaled = {
        mask.target
        for key, (mask, kind) in masks.items()
        if kind == "row_scale" and key not in state_dict
    }
    missing = sorted((targets - given) | unscaled)
    if stray or missing:
        message = (
            f"The adapter's masks do not fit: {len(missing)} of the model's {len(targets)} masked "
            f"weights have none in the file (first: {missing[:1]}), {len(stray)} masks have no "
            f"place (first: {stray[:1]}). Build the model that the adapter was trained for."
        )
        raise ArchitectureError(message)


def _check_masks(
    masks: Mapping[str, tuple[AdapterMask, str]],
    given: Mapping[str, Tensor],
    actual: fingerprints.Fingerprint,
) -> dict[str, StoredMask]:
    """Refuse masks that are damaged, of other sizes or of another base; return their headers."""
    placed = {key: masks[key] for key in given if key in masks}
    headers = {key: inspect(given[key], key) for key in placed if placed[key][1] == "bits"}
    for key, (mask, kind) in placed.items():
        count = headers[key].weights if key in headers else given[key].numel()
        _check_size(key, kind, count, mask)
    for header in headers.values():
        check_named_base(header.base, actual)
    return headers


def _check_scores(
    masks: Mapping[str, tuple[AdapterMask, str]],
    given: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
    actual: fingerprints.Fingerprint,
) -> None:
    """Refuse scores of another base, which is named beside each."""
    for key, value in named.items():
        if value.dtype != _BYTE or value.numel() != len(UNKNOWN_BASE):
            shown = f"{value.dtype} of shape {tuple(value.shape)}"
            refuse(key, f"is {shown}; a base's fingerprint is {len(UNKNOWN_BASE)} bytes")
        check_named_base(bytes(value.tolist()), actual)
    scores = [key for key in given if key in masks and masks[key][1] == "scores"]
    unnamed = [k for k in scores if f"{k.removesuffix('scores')}{FINGERPRINT}" not in named]
    if unnamed and not is_reading():  # a file's configuration names the base, too
        warnings.warn(
            f"{len(unnamed)} masks' scores do not say on which base they were trained (first: "
            f"{unnamed[0]}), so it could not be checked; get_peft_model_state_dict gives it with "
            "them.",
            PemnWarning,
            stacklevel=4,
        )


def _check_size(key: str, kind: str, count: int, mask: AdapterMask) -> None:
    if mask.rows is not None and kind == "row_scale":
        wanted, made = mask.rows.count, "made"
        given, own = f"holds {count} scales", f"room for {wanted}"
    else:
        wanted, made = mask.weights, "trained"
        given, own = f"masks {count} weights", f"{wanted} weights"
    if count != wanted:
        message = (
            f"{key} {given}, but {mask.target} has {own} (shape {mask.mask_shape}). Build the "
            f"model that the adapter was {made} for. Nothing was loaded."
        )
        raise ArchitectureError(message)


def unit_in(mask: AdapterMask) -> float:
    """Return what a mask's scales are multiples of while they train; files hold the scales.

    It is a power of two, so that nothing is rounded on the way.
    """
    return mask.unit if isinstance(mask, SignDelta) else 1.0


def _make_wide_enough(mask: AdapterMask, value: Tensor) -> None:
    """Let a place hold scores or scales as they are: rounded ones would be another mask."""
    held = next(mask.parameters(), None)
    if held is None or not value.is_floating_point():
        return
    wide = torch.promote_types(held.dtype, value.dtype)
    if wide != held.dtype:
        mask.set_type(wide)


def _converted(
    value: Tensor,
    kind: str,
    held: str,
    mask: AdapterMask,
    config: PemnConfig,
    actual: fingerprints.Fingerprint,
    selectors: Mapping[str, Selector],
) -> Tensor:
    if kind == held:
        return value
    if held == "bits":
        check_finite(value, mask.target)
        chosen = selectors[mask.target].mask(value)
        return bits.pack(chosen, fingerprints.short_form(actual))
    return scores_from_mask(bits.unpack(value, mask.mask_shape), mask, config)
