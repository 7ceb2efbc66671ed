"""Trained masks nearer to their seed: flips that matter least are taken back.

A flip is a mask bit that differs from the initial mask. ``coding="context"`` knows the initial mask
and the size of each frozen number, so that few flips, and none of small numbers, make a short file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.base import is_guessed, masked_layers
from pemn_surgery.adapters.checks import adapter_configs, check_adapters_exist
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.layer import PemnLayer, initial_scores
from pemn_surgery.adapters.state import scores_from_mask
from pemn_surgery.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class Flips:
    """How far one mask is from its initial mask.

    Attributes:
        name: The masked parameter.
        weights: Number of its weights.
        before: Bits that differed before flips were taken back.
        after: Bits that differ now.
    """

    name: str
    weights: int
    before: int
    after: int


@dataclass(frozen=True)
class _Pairs:
    """A mask's flips, a lost weight beside a gained one, the least important first.

    Attributes:
        initial: Bool tensor, the mask that training began with.
        mask: Bool tensor, the trained mask.
        positions: Where they lie in the flat weight, int64 of shape (2, pairs).
        cost: What taking each pair back is expected to add to the loss, float32 of shape (pairs,).
    """

    initial: Tensor
    mask: Tensor
    positions: Tensor
    cost: Tensor

    def taken_back(self, count: int) -> Tensor:
        """Return the mask without the first ``count`` pairs of flips."""
        found, positions = self.mask.flatten(), self.positions[:, :count].flatten()
        found = found.scatter(0, positions, self.initial.flatten()[positions])
        return found.view(self.mask.shape)


def take_back_flips(
    model: nn.Module, losses: Iterable[Tensor], share: float, adapter_name: str = "default"
) -> list[Flips]:
    """Take a share of a trained adapter's flips back, those that the loss feels least.

    Flips are compared over all masks by what they are expected to add to the loss when they are
    taken back: the frozen number's square, times the weight's mean squared gradient over the layer
    (Optimal Brain Damage, LeCun et al. 1990, eq. 5, with the empirical Fisher information for the
    second derivative, one mean for a layer). In each mask as many ones go as zeros, so that its
    density stays exact. The masks' scores then stand still (``requires_grad`` is False, until the
    adapter is activated again); their earlier magnitudes are gone. Norms, biases and heads can
    settle in a short further training.

    Args:
        model: A model with masks; the adapter is active, has scores, "topk" masks, and initial
            scores from its seed.
        losses: Losses of some training batches, tensors of no dimensions; a generator holds one
            batch's memory at a time. Statistics of norms are updated as the model's mode says.
        share: Share of all flips to take back, 0 to 1.
        adapter_name: The adapter.

    Returns:
        What became of each mask, in the model's order.

    Raises:
        ConfigError: If the share is not from 0 to 1.
        AdapterError: If there is no such adapter, or its masks are not as above, or a loss does not
            depend on them, or is not finite, or there is none. Nothing has changed then.
    """
    if not 0 <= share <= 1:
        message = f"share={share}: a share of the flips is from 0 to 1."
        raise ConfigError(message)
    config, layers = _masks_of(model, adapter_name)
    scores = [cast("nn.Parameter", layer.mask_of(adapter_name).scores) for layer in layers]
    squares = _squared_gradients(losses, scores, adapter_name)
    pairs = [
        _pairs(layer, adapter_name, config, square)
        for layer, square in zip(layers, squares, strict=True)
    ]
    found = []
    for layer, one, count in zip(layers, pairs, _least(pairs, share), strict=True):
        mask = layer.mask_of(adapter_name)
        chosen = one.taken_back(count)
        held = cast("nn.Parameter", mask.scores).requires_grad_(False)
        held.copy_(scores_from_mask(chosen, mask, config))
        flips = [int((now != one.initial).sum()) for now in (one.mask, chosen)]
        found.append(Flips(layer.target, chosen.numel(), *flips))
    return found


def _masks_of(model: nn.Module, adapter_name: str) -> tuple[PemnConfig, list[PemnLayer]]:
    """Return an adapter's configuration and masked layers, if it has flips to take back."""
    configs: Mapping[str, PemnConfig] = adapter_configs(model)
    check_adapters_exist(configs, [adapter_name])
    config = configs[adapter_name]
    layers = list(masked_layers(model, adapter_name).values())
    is_whole = config.form == "product" and config.support is None and config.selector == "topk"
    if not is_whole or not all(is_guessed(layer, config) for layer in layers):
        message = (
            f"The adapter {adapter_name!r} has selector={config.selector!r}, form={config.form!r} "
            f"and support={config.support!r}; only whole masks of the largest scores "
            '(selector="topk", form="product") begin with a seed\'s, and so have flips.'
        )
        raise AdapterError(message)
    without = [layer.target for layer in layers if layer.mask_of(adapter_name).scores is None]
    if without:
        message = (
            f"{len(without)} masks of the adapter {adapter_name!r} are bits, first {without[0]!r}; "
            "call to_trainable(model) first, and activate the adapter."
        )
        raise AdapterError(message)
    sharded = [layer.target for layer in layers if not _is_whole(layer, adapter_name)]
    if sharded:
        message = (
            f"The scores of {len(sharded)} masks are sharded, first those of {sharded[0]!r}; flips "
            "are compared over whole masks. Load the trained adapter into a model of one process."
        )
        raise AdapterError(message)
    return config, layers


def _is_whole(layer: PemnLayer, adapter_name: str) -> bool:
    scores = cast("Tensor", layer.mask_of(adapter_name).scores)
    return tuple(scores.shape) == tuple(layer.shape) and not hasattr(scores, "full_tensor")


def _squared_gradients(
    losses: Iterable[Tensor], scores: list[nn.Parameter], adapter_name: str
) -> list[Tensor]:
    """Return the sum of squared gradients over losses, float32, for each of the scores.

    A score's gradient is, but for its sign, that of the effective weight times the frozen number.
    """
    sums = [torch.zeros_like(score, dtype=torch.float32) for score in scores]
    count = 0
    for loss in losses:
        count += 1
        gradients = _gradients(loss, scores)
        if all(gradient is None for gradient in gradients):
            message = (
                f"Loss {count} does not depend on the masks of the adapter {adapter_name!r}; "
                f"activate it (model.set_adapter({adapter_name!r})), and compute losses with "
                "gradients."
            )
            raise AdapterError(message)
        if not torch.isfinite(loss):
            message = f"Loss {count} is {loss.item()}, so its gradients mean nothing."
            raise AdapterError(message)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.float() ** 2
    if not count:
        message = "Got no losses; flips are weighed by the gradients of at least one."
        raise AdapterError(message)
    return sums


def _gradients(loss: Tensor, scores: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    trained = [score for score in scores if score.requires_grad]
    if not loss.requires_grad or not trained:
        return (None,) * len(scores)
    found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
    return tuple(next(found) if score.requires_grad else None for score in scores)


def _pairs(layer: PemnLayer, adapter_name: str, config: PemnConfig, squares: Tensor) -> _Pairs:
    held = layer.mask_of(adapter_name)
    mask = held.mask()
    start = initial_scores(config, layer.target, layer.shape, layer.fan_in).to(mask.device)
    initial = held.selector.mask(start)
    sizes = layer.fill().detach().float() ** 2
    cost = (sizes * (squares.sum() / sizes.sum().clamp_min(1e-30))).flatten()
    # Of frozen numbers of one size, the gradients of each tell which matter less.
    order = squares.flatten().argsort(stable=True)
    order = order[cost[order].argsort(stable=True)]
    changed = (mask != initial).flatten()[order]
    lost = order[changed & initial.flatten()[order]]
    gained = order[changed & mask.flatten()[order]]
    return _Pairs(initial, mask, torch.stack([lost, gained]), cost[lost] + cost[gained])


def _least(pairs: list[_Pairs], share: float) -> list[int]:
    """Return how many pairs of each mask are among the least important share of all."""
    costs = torch.cat([one.cost.cpu() for one in pairs])
    owner = torch.repeat_interleave(
        torch.arange(len(pairs)), torch.tensor([len(one.cost) for one in pairs])
    )
    least = costs.argsort(stable=True)[: round(share * len(costs))]
    return torch.bincount(owner[least], minlength=len(pairs)).tolist()
