"""Masks of pruned networks: torch's pruning, and a pruned checkpoint beside its base."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pemn_surgery.adapters.foreign.masked_state import (
    MaskedState,
    as_mask,
    plain,
    refuse,
    refuse_empty,
)
from pemn_surgery.errors import MovedWeightsError

_SHOWN = 8  # tensors that an error lists


def unprune(model: nn.Module) -> dict[str, Tensor]:
    """Take torch's pruning off a model, so that its weights are whole again; return its masks.

    ``weight_orig`` is ``weight`` again, the same parameter with all its numbers, and nothing of
    ``torch.nn.utils.prune`` is left (``prune.remove`` would leave zeros).

    Args:
        model: A model with pruned parameters; changed in place.

    Returns:
        Bool masks by the parameters' names.

    Raises:
        ForeignMaskError: If nothing is pruned, or a mask has other values than zeros and ones.
    """
    pruned = [
        (module, hook._tensor_name, f"{path}.{hook._tensor_name}".lstrip("."))
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    if not pruned:
        refuse("The model has no parameter that torch.nn.utils.prune has pruned")
    masks = {name: as_mask(getattr(one, f"{tensor}_mask"), name) for one, tensor, name in pruned}
    for module, tensor, _ in pruned:
        whole = torch.ones_like(getattr(module, f"{tensor}_mask"))
        setattr(module, f"{tensor}_mask", whole)  # what `remove` leaves is weight times mask
        prune.remove(module, tensor)
    return masks


def masks_of_pruned(state: Mapping[str, Tensor]) -> MaskedState:
    """Read the state dict of a model that ``torch.nn.utils.prune`` has pruned.

    Args:
        state: It has ``<weight>_orig`` and ``<weight>_mask`` for each pruned parameter.

    Returns:
        Masks, and a base with ``<weight>_orig`` as ``<weight>``.

    Raises:
        ForeignMaskError: If there is no such pair, or a mask has other values than zeros and ones.
    """
    held = plain(state)
    stems = [key.removesuffix("_mask") for key in held if key.endswith("_mask")]
    names = [name for name in stems if f"{name}_orig" in held]
    if not names:
        refuse_empty(held, "'..._mask' beside '..._orig'")
    masks = {name: as_mask(held[f"{name}_mask"], name) for name in names}
    called = {f"{name}_orig": name for name in names}
    skipped = {f"{name}_mask" for name in names}
    base = {called.get(key, key): value for key, value in held.items() if key not in skipped}
    return MaskedState(masks, base)


def masks_between(
    base: nn.Module | Mapping[str, Tensor], pruned: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the masks that make a pruned checkpoint of its base, where masks alone do.

    That is, where every tensor is the base's but for numbers that are zero. A weight that is zero
    in both is kept, as in `nearest_mask`. Where other tensors differ, too,
    ``from_finetuned(base, pruned, "mask")`` finds the same masks and carries the rest.

    Args:
        base: The model before pruning, or its state dict.
        pruned: The model after it, with the same names and shapes. Where its types are narrower,
            the base's numbers count as rounded to them.

    Returns:
        Bool masks by the names of the tensors that have a number less.

    Raises:
        ForeignMaskError: If names or shapes differ.
        MovedWeightsError: If a number is neither the base's nor zero.
    """
    before, after = _state_of(base), _state_of(pruned)
    _check_alike(before, after)
    found = {name: _between(before[name], value) for name, value in after.items()}
    moved = {name: count for name, (_, count) in found.items() if count}
    if moved:
        raise MovedWeightsError(_what_moved(moved, after))
    return {name: mask for name, (mask, _) in found.items() if not mask.all()}


def _state_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _check_alike(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    lone = sorted(before.keys() ^ after.keys())
    if lone:
        whose = "base" if lone[0] in before else "pruned checkpoint"
        refuse(f"{len(lone)} tensors are in one of the two alone (first: {lone[0]!r}, {whose})")
    for name, value in after.items():
        if value.shape != before[name].shape:
            refuse(
                f"{name!r} has shape {tuple(value.shape)}, in the base {tuple(before[name].shape)}"
            )


def _between(before: Tensor, after: Tensor) -> tuple[Tensor, int]:
    """Return which numbers are the base's, and how many are neither that nor zero."""
    was, now = before.detach().to(after.device, after.dtype), after.detach()
    kept = (now == was) | (now.isnan() & was.isnan())
    return kept, int((~kept & (now != 0)).sum())


def _what_moved(moved: Mapping[str, int], after: Mapping[str, Tensor]) -> str:
    listed = [f"{name} {count} of {after[name].numel()}" for name, count in moved.items()]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return (
        f"The checkpoint is not its base with weights set to zero: {sum(moved.values())} numbers "
        f"of {len(moved)} tensors moved ({', '.join(listed[:_SHOWN])}{more}). Give the base that "
        'it was pruned from, or call from_finetuned(base, pruned, "mask"), which takes the nearest '
        "masks and carries all other tensors exactly."
    )
