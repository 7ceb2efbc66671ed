"""Readers of masks as others store them: torch's pruning, pruned checkpoints, three papers' code.

Each returns bool masks by the weights' names, as `from_masks` takes them. Formats that hold the
weights beside the masks give them, too: a `MaskedState` is a masked network in two parts.

Layouts and rules were read from the released code of each (hidden-networks, PEMN,
UnsupervisedMasking, piggyback), and the tests write them anew.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pemn_surgery.errors import ForeignMaskError, MovedWeightsError
from pemn_surgery.masks.selector import check_finite, threshold_mask, topk_mask

_SHOWN = 8  # tensors that an error lists


class MaskedState(NamedTuple):
    """A masked network as its masks and what lies under them.

    Attributes:
        masks: Bool masks by the weights' names.
        base: The network's other tensors under the names of the plain model, weights without masks
            among them where the format has them: what ``model.load_state_dict`` takes.
    """

    masks: dict[str, Tensor]
    base: dict[str, Tensor]


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
        _refuse("The model has no parameter that torch.nn.utils.prune has pruned")
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
    held = _plain(state)
    stems = [key.removesuffix("_mask") for key in held if key.endswith("_mask")]
    names = [name for name in stems if f"{name}_orig" in held]
    if not names:
        _refuse_empty(held, "'..._mask' beside '..._orig'")
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


def masks_of_hidden_networks(state: Mapping[str, Tensor], density: float | None) -> MaskedState:
    """Read a state dict of hidden-networks (Ramanujan et al. 2020), or of PEMN's released code.

    Of each layer's scores, ``int((1 - density) * n)`` of the smallest size are dropped, of equal
    ones the first. (The released code leaves the order of equal ones to torch.)

    Args:
        state: It has ``<layer>.scores`` beside ``<layer>.weight``.
        density: Share of weights that are kept; ``--prune-rate`` of hidden-networks' and
            ``--sparsity`` of PEMN's training. None: the scores are masks already
            (``FixedSubnetConv``).

    Returns:
        Masks, and a base of all other tensors.

    Raises:
        ForeignMaskError: If there are no scores, or they fit no weight; without ``density``, if
            they are not zeros and ones.
        NonFiniteScoresError: If scores are NaN or infinite.
    """
    if density is None:
        return _of_scores(state, "scores", as_mask)
    return _of_scores(state, "scores", lambda scores, _: topk_mask(scores, density))


def masks_of_piggyback(state: Mapping[str, Tensor], threshold: float = 5e-3) -> MaskedState:
    """Read a state dict of Piggyback (Mallya et al. 2018): ``<layer>.mask_real``.

    It holds no weights: those are of the pretrained network that the masks were trained on. Names
    begin with ``shared.`` there.

    Args:
        state: State dict of the network within a checkpoint (``checkpoint["model"]``).
        threshold: Scores above it are kept; the released code's default.

    Returns:
        Masks, and a base of all other tensors.

    Raises:
        ForeignMaskError: If there are no such scores.
        NonFiniteScoresError: If scores are NaN or infinite.
    """
    return _of_scores(state, "mask_real", lambda scores, _: threshold_mask(scores, threshold))


def masks_of_piggyback_pack(packed: Mapping[int, Tensor], shared: nn.Module) -> dict[str, Tensor]:
    """Read one data set's masks of a Piggyback pack, which calls layers by number.

    Args:
        packed: ``pack["dataset2masks"][dataset]``: uint8 masks by the number of their layer, in the
            order of ``shared.modules()``.
        shared: The network without its classifier, put together as the released code does: of a
            ResNet ``nn.Sequential(OrderedDict(children))`` of all children but ``fc``.

    Returns:
        Bool masks by the weights' names in ``shared``.

    Raises:
        ForeignMaskError: If a number is no layer's, or a weight has another shape; if the masks are
            ternary (-1 is stored as 255), which turn weights around.
    """
    modules = list(shared.named_modules())
    masks: dict[str, Tensor] = {}
    for number, values in packed.items():
        path, module = modules[number] if number in range(len(modules)) else ("", None)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != values.shape:
            held = "none" if not isinstance(weight, Tensor) else f"shape {tuple(weight.shape)}"
            _refuse(
                f"The mask of module {number} has shape {tuple(values.shape)}, and the weight of "
                f"module {number} of {len(modules)} ({path!r}) has {held}: the network is not put "
                "together as the one that was packed"
            )
        _check_not_ternary(values, number)
        masks[f"{path}.weight"] = as_mask(values, f"{path}.weight")
    return masks


def masks_of_self_masking(state: Mapping[str, Tensor], threshold: float = 0.0) -> MaskedState:
    """Read a state dict of Self-Masking Networks (Warmerdam et al. 2024), a ``SubmaskedModel``.

    Their weights are W * M / sqrt(mean(M)): pass ``scale="sqrt_density"`` to `from_masks`.

    Args:
        state: It has ``model_shell.<name>`` for every tensor, and of masked ones ``scores.<name>``
            and ``data.<name>`` (the weights without masks) with ``_`` in place of every dot.
        threshold: Scores above it are kept: mu, the released code's ``k``.

    Returns:
        Masks, and a base with the weights without masks.

    Raises:
        ForeignMaskError: If there are no scores, or no name, or several, that they can be of.
        NonFiniteScoresError: If scores are NaN or infinite.
    """
    shell, scores, data = (_below(state, f"{part}.") for part in ("model_shell", "scores", "data"))
    if not scores or not shell:
        _refuse_empty(state, "'scores....' beside 'model_shell....'")
    names = {flat: [name for name in shell if name.replace(".", "_") == flat] for flat in scores}
    unclear = [flat for flat, found in names.items() if len(found) != 1]
    if unclear:
        _refuse(f"Scores {unclear[0]!r} could be of {names[unclear[0]] or 'no tensor'}")
    masks, base = {}, shell
    for flat, (name,) in names.items():
        check_finite(scores[flat], name)
        masks[name] = threshold_mask(scores[flat], threshold)
        base[name] = data.get(flat, shell[name])
    return MaskedState(masks, base)


def as_mask(values: Any, name: str) -> Tensor:
    """Return a mask as a bool tensor of its own.

    Raises:
        ForeignMaskError: If it is no tensor of zeros and ones.
    """
    if not isinstance(values, Tensor) or values.is_meta:
        held = "a tensor without values (meta)" if isinstance(values, Tensor) else f"{values!r:.80}"
        _refuse(
            f"The mask of {name!r} is {held}; a tensor of zeros and ones is needed. "
            "Nothing was changed"
        )
    held = values.detach()
    others = held[(held != 0) & (held != 1)]
    if others.numel():
        _refuse(
            f"The mask of {name!r} has {others.numel()} of {held.numel()} values that are neither "
            f"0 nor 1 (first: {others[0].item()}). Scores become a mask by their method's rule "
            "first: scores > threshold, or the largest ones by size. Nothing was changed"
        )
    return held != 0


def _of_scores(
    state: Mapping[str, Tensor], called: str, rule: Callable[[Tensor, str], Tensor]
) -> MaskedState:
    """Read scores that lie beside the weights of their layers."""
    held = _plain(state)
    keys = [key for key in held if key.rpartition(".")[2] == called]
    if not keys:
        _refuse_empty(held, f"'....{called}'")
    base = {key: value for key, value in held.items() if key not in keys}
    masks: dict[str, Tensor] = {}
    for key in keys:
        name = f"{key.removesuffix(called)}weight"
        scores, weight = held[key], base.get(name)
        if weight is not None and weight.shape != scores.shape:
            _refuse(f"{key!r} has shape {tuple(scores.shape)}, but {name!r} {tuple(weight.shape)}")
        check_finite(scores, name)
        masks[name] = rule(scores, name)
    return MaskedState(masks, base)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without what ``DataParallel`` puts before each name."""
    inner = _below(state, "module.")
    return inner if len(inner) == len(state) else dict(state)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _state_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _check_alike(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    lone = sorted(before.keys() ^ after.keys())
    if lone:
        whose = "base" if lone[0] in before else "pruned checkpoint"
        _refuse(f"{len(lone)} tensors are in one of the two alone (first: {lone[0]!r}, {whose})")
    for name, value in after.items():
        if value.shape != before[name].shape:
            _refuse(
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


def _check_not_ternary(values: Tensor, number: int) -> None:
    turned = int(((values == 255) | (values == -1)).sum())
    if turned:
        _refuse(
            f"The mask of module {number} is ternary: it turns {turned} of {values.numel()} "
            "weights around (-1, stored as 255), and a mask only keeps or drops"
        )


def _refuse_empty(state: Mapping[str, Any], needed: str) -> NoReturn:
    _refuse(
        f"Among the {len(state)} names of the state dict none is {needed} (first: "
        f"{[*state][:3]}). Give the state dict itself, which checkpoints often have under "
        "'state_dict' or 'model'"
    )


def _refuse(problem: str) -> NoReturn:
    message = f"{problem}."
    raise ForeignMaskError(message)
