"""Masks as the code of papers stores them: hidden-networks, PEMN, Self-Masking Networks, Piggyback.

Layouts and rules were read from the released code of each (hidden-networks, PEMN,
UnsupervisedMasking, piggyback), and the tests write them anew.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pemn_surgery.adapters.foreign.masked_state import (
    MaskedState,
    as_mask,
    below,
    plain,
    refuse,
    refuse_empty,
)
from pemn_surgery.masks.selector import check_finite, threshold_mask, topk_mask


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


def masks_of_self_masking(state: Mapping[str, Tensor], threshold: float = 0.0) -> MaskedState:
    """Read a state dict of Self-Masking Networks (Warmerdam et al. 2024), a ``SubmaskedModel``.

    Their weights are W * M / sqrt(mean(M)): pass ``scale="sqrt_density"`` to `from_masks`.

    Args:
        state: It has ``model_shell.<name>`` for every tensor, and of masked ones ``scores.<name>``
            and ``data.<name>`` (the weights without masks) with ``_`` in place of every dot; all of
            them may begin alike (``model.`` in checkpoints), and what else is there is not read.
        threshold: Scores above it are kept: mu, the released code's ``k``.

    Returns:
        Masks, and a base with the weights without masks.

    Raises:
        ForeignMaskError: If there are no scores, or no name, or several, that they can be of.
        NonFiniteScoresError: If scores are NaN or infinite.
    """
    shells = (key.partition("model_shell.") for key in state)
    outer = next((start for start, found, _ in shells if found), "")
    parts = ("model_shell", "scores", "data")
    shell, scores, data = (below(state, f"{outer}{part}.") for part in parts)
    if not scores or not shell:
        refuse_empty(state, "'scores....' beside 'model_shell....'")
    names = {flat: [name for name in shell if name.replace(".", "_") == flat] for flat in scores}
    unclear = [flat for flat, found in names.items() if len(found) != 1]
    if unclear:
        refuse(f"Scores {unclear[0]!r} could be of {names[unclear[0]] or 'no tensor'}")
    masks, base = {}, shell
    for flat, (name,) in names.items():
        check_finite(scores[flat], name)
        masks[name] = threshold_mask(scores[flat], threshold)
        base[name] = data.get(flat, shell[name])
    return MaskedState(masks, base)


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
            refuse(
                f"The mask of module {number} has shape {tuple(values.shape)}, and the weight of "
                f"module {number} of {len(modules)} ({path!r}) has {held}: the network is not put "
                "together as the one that was packed"
            )
        _check_not_ternary(values, number)
        masks[f"{path}.weight"] = as_mask(values, f"{path}.weight")
    return masks


def _of_scores(
    state: Mapping[str, Tensor], called: str, rule: Callable[[Tensor, str], Tensor]
) -> MaskedState:
    """Read scores that lie beside the weights of their layers."""
    held = plain(state)
    keys = [key for key in held if key.rpartition(".")[2] == called]
    if not keys:
        refuse_empty(held, f"'....{called}'")
    base = {key: value for key, value in held.items() if key not in keys}
    masks: dict[str, Tensor] = {}
    for key in keys:
        name = f"{key.removesuffix(called)}weight"
        scores, weight = held[key], base.get(name)
        if weight is not None and weight.shape != scores.shape:
            refuse(f"{key!r} has shape {tuple(scores.shape)}, but {name!r} {tuple(weight.shape)}")
        check_finite(scores, name)
        masks[name] = rule(scores, name)
    return MaskedState(masks, base)


def _check_not_ternary(values: Tensor, number: int) -> None:
    turned = int(((values == 255) | (values == -1)).sum())
    if turned:
        refuse(
            f"The mask of module {number} is ternary: it turns {turned} of {values.numel()} "
            "weights around (-1, stored as 255), and a mask only keeps or drops"
        )
