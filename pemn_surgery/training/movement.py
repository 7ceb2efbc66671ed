"""How masks move while they train: shares of ones, changed bits, and when something is wrong."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import HEADER_BYTES, inspect
from pemn_surgery.masks.adapter_mask import AdapterMask

Masks = dict[str, Tensor]

# A look every so many steps; the first that may find fault with masks that stand still is later.
EVERY, _STANDSTILL = 100, 200

# Below this share of the ones at the start training has dropped what the model was.
_LEFT = 0.25

# From this share on, flipped signs are more noise than change.
_FLIPPED = 0.4

_LISTED = 3


def packed_masks(model: nn.Module) -> Masks:
    """Return the masks in use, a bit a weight (see `bits`), by weight and adapter."""
    return {name: bits.pack(mask) for name, _, mask in _active_masks(model)}


def _active_masks(model: nn.Module) -> Iterator[tuple[str, AdapterMask, Tensor]]:
    """Yield name, holder and bool mask of every mask in use."""
    for module in model.modules():
        if isinstance(module, PemnLayer):
            for name in module.names_in_use():
                held = module.mask_of(name)
                with torch.no_grad(), _gathered(held.store):
                    yield f"{module.target}/{name}", held, held.mask()


def _gathered(store: Tensor) -> AbstractContextManager[Any]:
    """Bring the parts of a tensor together that DeepSpeed's ZeRO-3 has spread over processes."""
    if not hasattr(store, "ds_id"):
        return nullcontext()
    from deepspeed import zero  # type: ignore[import-not-found]

    return zero.GatheredParameters([store])


def density(masks: Masks) -> float:
    """Return the share of ones of all masks together; 0 without masks."""
    weights = sum(inspect(mask, name).weights for name, mask in masks.items())
    return sum(map(bits.count_ones, masks.values())) / max(weights, 1)


def flips(before: Masks, now: Masks) -> int:
    """Return how many bits differ, of the masks that are in both."""
    pairs = ((_unpacked(before[name]), _unpacked(now[name])) for name in now if name in before)
    return sum(int((first != second).sum()) for first, second in pairs)


def _unpacked(mask: Tensor) -> Tensor:
    return bits.unpack(mask, (8 * (mask.numel() - HEADER_BYTES),))


class MovementWatch:
    """Looks at the masks now and then, and says once what is wrong with how they move.

    Args:
        model: The model before its first step, or before that with which it goes on.
        step: Number of steps before that.
    """

    def __init__(self, model: nn.Module, step: int = 0) -> None:
        self._step = step
        self._first = packed_masks(model)
        self._ones = {name: bits.count_ones(mask) for name, mask in self._first.items()}
        # What zeros do: signs that are added (None) are neither kept nor lost.
        self._drops = {
            name: None if held.adds else held.drops for name, held, _ in _active_masks(model)
        }
        self._has_moved = False
        self._said: set[str] = set()

    def look(self, model: nn.Module, step: int, *, is_last: bool = False) -> list[str]:
        """Return what is wrong after a step, in sentences; each kind of fault once."""
        steps = step - self._step
        if not self._first or steps <= 0:
            return []
        now = packed_masks(model)
        self._has_moved = self._has_moved or flips(self._first, now) > 0
        is_late = is_last or steps >= _STANDSTILL
        found = {
            "lost": self._lost({name: bits.count_ones(mask) for name, mask in now.items()}),
            "still": self._still(steps) if is_late and not self._has_moved else "",
        }
        new = {kind: said for kind, said in found.items() if said and kind not in self._said}
        self._said |= set(new)
        return list(new.values())

    def _still(self, steps: int) -> str:
        weights = sum(inspect(mask, name).weights for name, mask in self._first.items())
        return (
            f"Not one of {weights:,} mask bits has changed in {steps:,} steps, so that the adapter "
            "does nothing yet. Raise the learning rate of the scores (param_groups), or let them "
            "begin nearer to the threshold (score_init)."
        )

    def _lost(self, ones: Mapping[str, int]) -> str:
        empty = [
            name for name in self._like(ones, drops=True) if self._ones[name] and not ones[name]
        ]
        if empty:
            more = f" and {len(empty) - _LISTED} more" if len(empty) > _LISTED else ""
            return (
                f"{len(empty)} of {len(ones)} masks drop every weight: "
                f"{', '.join(empty[:_LISTED])}{more}. Go back to an earlier checkpoint, and lower "
                "the learning rate of the scores or begin further from the threshold (score_init)."
            )
        for drops, least in ((True, _LEFT), (False, 1 - _FLIPPED)):
            names = self._like(ones, drops=drops)
            before, left = (sum(of[name] for name in names) for of in (self._ones, ones))
            if left < least * before:
                what = "are dropped" if drops else "have another sign"
                return (
                    f"{1 - left / before:.0%} of the weights that were kept as they are when "
                    f"training began {what} now: little is left of the model. Lower the learning "
                    "rate of the scores, or begin further from the threshold (score_init)."
                )
        return ""

    def _like(self, ones: Mapping[str, int], *, drops: bool) -> list[str]:
        """Return the masks in use since the beginning whose zeros drop weights, or flip signs."""
        return [name for name in ones if self._drops.get(name) is drops]
