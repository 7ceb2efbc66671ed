"""The base under an adapter's masks, as it is now: what a save names and every way in asks for.

A base changes after masks were put on it: pretrained weights are loaded late, it is trained with
the scores, a convolution is edited. Version counters do not see all of that (``.data``), so its
fingerprint is taken anew each time, of values that are brought in for that where they are
offloaded, dequantised where they are quantised, and gathered where a save was given them so. What
its numbers say of a mask's bits is used by ``coding="context"`` and "base".
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.layer import PemnLayer, scores_stream, weight_stream, words_of
from pemn_surgery.coding.context import Guide
from pemn_surgery.errors import PemnWarning
from pemn_surgery.numbers import bank as banks
from pemn_surgery.numbers import rng, sizes
from pemn_surgery.numbers.fingerprint import (
    Fingerprint,
    agree,
    check_fingerprint,
    from_short_form,
    make_fingerprint,
    shorten,
)
from pemn_surgery.planning.roles import full_name
from pemn_surgery.transforms import gathered

WRAPPED = ("_fsdp_wrapped_module.", "_orig_mod.")
# Bits of a frozen number's size that are looked at, of a seed's numbers and of a base's own
# (docs/coding.md); of an initial score's, all that there are.
_LOOK_AT_WEIGHTS, _LOOK_AT_BASE = 3, 5


def fingerprint_now(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor] | None = None
) -> Fingerprint:
    """Return what identifies the base under an adapter's masks, digits by dtype.

    The state dict of a save has whole values while the modules hold parts (FSDP, ZeRO). A cast
    leaves fewer types to compare in, so what was known before is added where it agrees; it is all
    there is where nobody has the values (ZeRO-3).
    """
    layers = masked_layers(model, adapter_name)
    if not layers:
        return {}
    for layer in layers.values():
        layer.forget()  # what is kept may be of numbers that were here before
    held = _held(layers, state_dict or {})
    known = next(iter(layers.values())).mask_of(adapter_name).fingerprint
    now = fingerprint_of(list(layers.values()), held)
    if next(iter(layers.values())).spec.init == "stored":
        return now or known  # the file brings the bank as it is now
    return {**known, **now} if not now or agree(known, now) else now


def fingerprint_of(
    layers: Sequence[PemnLayer],
    held: Mapping[str, Tensor] | None = None,
    called: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Return what identifies the frozen numbers under some weights of one model, digits by dtype.

    Whole weights that are held count in place of the layers' own. Weights that are called otherwise
    are identified under those names. It is empty where values are not at hand.
    """
    names = called or {}
    by_name = {names.get(layer.target, layer.target): layer for layer in layers}
    first = layers[0]
    bank, given = first.bank, held or {}
    own = {layer.target: layer for layer in layers}

    def values() -> Iterable[Tensor]:
        if bank is not None:
            return bank.prototypes(lambda name: own[name].dtype)
        found = (by_name[name] for name in sorted(by_name))
        return (frozen_numbers(layer, given.get(layer.target)) for layer in found)

    return make_fingerprint(
        first.spec,
        bank.layout.renamed(names) if bank is not None else None,
        [(name, tuple(layer.shape)) for name, layer in by_name.items()],
        values,
        as_drawn=not any(_is_no_longer_drawn(layer, given) for layer in layers),
    )


def check_named_base(base: bytes, actual: Fingerprint) -> None:
    """Refuse masks of another base than the model's, if both are known (`FingerprintError`)."""
    expected = from_short_form(base)
    if expected and actual:
        check_fingerprint(expected, shorten(actual), "the given model")


def warn_of_trained_draws(model: nn.Module, adapter_name: str) -> None:
    """Say that no seed gives the base back where a seed's numbers have changed."""
    layers = masked_layers(model, adapter_name).values()
    changed = [layer.target for layer in layers if _is_no_longer_drawn(layer, {})]
    if changed:
        spec = next(iter(layers)).spec
        warnings.warn(
            f"{len(changed)} of {len(layers)} weights under the masks of {adapter_name!r} (first: "
            f"{changed[0]!r}) are no longer those that seed {spec.seed} draws: they were trained "
            "or edited, and seed and file do not bring them back. The adapter was saved, and "
            "loading it will be refused; keep model.state_dict() beside it, or merge "
            "(model.merge_and_unload()).",
            PemnWarning,
            stacklevel=2,
        )


def masked_layers(model: nn.Module, adapter_name: str) -> dict[str, PemnLayer]:
    """Return what masks weights for an adapter, by its path as state dicts have it."""
    found: dict[str, PemnLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, PemnLayer) and adapter_name in module.pemn_masks:
            for wrapper in WRAPPED:
                name = name.replace(wrapper, "")
            found[name] = module
    return found


def offloaded(module: nn.Module, parameter: str) -> Tensor | None:
    """Return a parameter that accelerate has moved out, from where it lies; None if it has not."""
    hook: Any = module.__dict__.get("_hf_hook")
    if not getattr(hook, "offload", False) or parameter not in hook.weights_map:
        return None
    return hook.weights_map[parameter]


def frozen_numbers(layer: PemnLayer, given: Tensor | None = None) -> Tensor:
    """Return a layer's frozen numbers, whole; a meta tensor where nobody here has them."""
    if given is not None and not given.is_meta and given.numel() == _count(layer):
        return gathered(given)
    value = layer.fill()
    if value.is_meta and layer.quantization_backend is None:
        moved = offloaded(layer.owner, layer.parameter)
        value = value if moved is None else _masked_rows(layer, moved)
    is_whole = value.numel() == _count(layer) and not hasattr(value, "full_tensor")
    return value if is_whole else torch.empty(layer.shape, device="meta")


def guides_of(
    layer: PemnLayer, config: PemnConfig, places: Tensor | None
) -> tuple[Guide, ...] | None:
    """Return what guesses a mask in the configuration's coding: numbers of each masked weight.

    None where the coding goes by the mask's density alone.
    """
    if config.coding == "entropy":
        return None
    found = base_sizes(layer, places) if config.coding == "base" else None
    of_base = () if found is None else (Guide(found, _LOOK_AT_BASE),)
    return (*drawn_guides(layer, config, places), *of_base)


def is_guessed(layer: PemnLayer, config: PemnConfig) -> bool:
    """Tell whether the size of an initial score says anything of an adapter's mask."""
    drawn = config.score_init == "kaiming_uniform" and config.form != "sign_delta"
    return drawn and config.selector_of(None).uses_magnitude


def drawn_guides(layer: PemnLayer, config: PemnConfig, places: Tensor | None) -> tuple[Guide, ...]:
    """Return the seeded numbers that may guess an adapter's mask (``coding="context"``).

    What initial scores are made of, and frozen weights if they are drawn and all masked, as a
    decoder knows streams alone; nothing where the size of an initial score says nothing.
    """
    if not is_guessed(layer, config):
        return ()
    weights = _count(layer) if places is None else places.numel()
    scores = _drawn(config.seed, scores_stream(layer.target), weights, weights)
    fill = _fill_stream(layer, weights)
    if fill is None or places is not None or layer.spec.init in banks.CONSTANT:
        return (scores,)
    of_fill = _drawn(layer.spec.seed, *fill, weights)
    return scores, of_fill._replace(log2=_LOOK_AT_WEIGHTS)


def base_sizes(layer: PemnLayer, places: Tensor | None) -> np.ndarray | None:
    """Return how large the frozen numbers are that no seed draws (``coding="base"``).

    Returns:
        `pemn_surgery.numbers.sizes.base_sizes` of them, uint8, those at the places alone if these
        are given; None where a seed draws them, they are quantised, or not here whole (on the meta
        device, sharded).
    """
    if layer.spec.generated or layer.quantization_backend is not None:
        return None
    values = layer.fill().detach()
    if values.is_meta or values.numel() != _count(layer) or hasattr(values, "full_tensor"):
        return None
    found = sizes.base_sizes(words_of(values))
    return found if places is None else found[places.cpu().numpy()]


def _held(layers: Mapping[str, PemnLayer], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layers' own weights as a state dict has them, by their names in the model.

    While adapters are merged a state dict has what is merged instead.
    """
    found = {}
    for path, layer in layers.items():
        key = full_name(path.rpartition(".")[0], layer.parameter)
        is_own = layer.bank is None and layer.quantization_backend is None and not layer.aside
        if is_own and key in state_dict:
            found[layer.target] = _masked_rows(layer, state_dict[key])
    return found


def _masked_rows(layer: PemnLayer, weight: Tensor) -> Tensor:
    """Return the rows of a layer's weight that masks lie on, without those that are new."""
    is_longer = layer.shape and weight.dim() and weight.shape[0] > layer.shape[0]
    return weight[: layer.shape[0]] if is_longer else weight


def _is_no_longer_drawn(layer: PemnLayer, given: Mapping[str, Tensor]) -> bool:
    """Tell whether a weight that the seed drew has changed by more than a cast."""
    if not layer.spec.generated or layer.bank is not None:
        return False
    value = frozen_numbers(layer, given.get(layer.target)).detach()
    if value.is_meta:
        return False
    stream = weight_stream(layer.target)
    numbers = torch.from_numpy(banks.draw(layer.spec, stream, layer.fan, _count(layer)))
    drawn, value = numbers.view(layer.shape), value.cpu()
    return not any(
        torch.equal(drawn.to(dtype), value.to(dtype))
        for dtype in (value.dtype, torch.bfloat16, torch.float16)
    )


def _count(layer: PemnLayer) -> int:
    return int(torch.Size(layer.shape).numel())


def _drawn(seed: int, stream: str, period: int, weights: int) -> Guide:
    key, period = rng.key_of(seed, stream), max(min(period, weights), 1)
    return Guide(sizes.drawn_sizes(key, period, weights), seed=(key, period))


def _fill_stream(layer: PemnLayer, weights: int) -> tuple[str, int] | None:
    """Return the stream of the frozen numbers, and their period."""
    if layer.bank is not None:
        return layer.bank.layout.stream(layer.shape)
    return (weight_stream(layer.target), weights) if layer.spec.generated else None
