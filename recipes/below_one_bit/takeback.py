"""Flips taken back after training: accuracy against bits from one trained mask.

Many flips do little. Those that matter least go back to the initial bit, which context coding
expects, as many ones as zeros; then norms and biases are trained for a short while.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from pemn_surgery import take_back_flips
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.recipe import Recipe, load

RUN: Any = load(Path(__file__).resolve().parent).module("run")

BATCHES, IMAGES = 60, 64  # whose losses tell by="loss" what matters
STEPS = 100  # of training norms and biases after flips were taken back
SLOWER = 0.3  # their learning rate then, in parts of the rule's


def take_back(
    recipe: Recipe, run: Any, by: str, share: float, work: Path, source: str = ""
) -> dict[str, Any]:
    """Take a trained run's flips back; keep its masks like `run.train`, under its `label`.

    Args:
        recipe: This recipe.
        run: A `run.Run` whose checkpoint lies under ``work``.
        by: What flips are ordered by: "loss" over all weights (`take_back_flips`), "size" or
            "margin" within each (`importance`).
        share: Share of the flips to take back; with 0, only norms and biases settle.
        work: Folder of masks, checkpoints and decoded data.
        source: Folder or hub id in place of the recipe's.

    Returns:
        What `run.train` returns, with ``by`` and ``share``, and the last epoch alone.
    """
    images, model = RUN.data(recipe, run, work, source), RUN.network(recipe, run)
    initial = {layer.target: layer.mask_of("default").mask() for layer in RUN.layers(model)}
    model.load_state_dict(torch.load(work / f"{run.label}.pt", weights_only=True), strict=False)
    if by == "loss":
        take_back_flips(model.eval(), losses(model, images), share)
    for layer in RUN.layers(model) if by != "loss" else ():
        mask = layer.mask_of("default").mask()
        fix(layer, taken_back(initial[layer.target], mask, importance(by, layer), share))
    settle(model, images, recipe.case(run.case).rule)
    row = {"epoch": run.epochs, "accuracy": RUN.accuracy(model, images)}
    masks = {f"{run.epochs}/{name}": mask for name, mask in RUN.packed_masks(model).items()}
    np.savez(work / f"{label(run, by, share)}.npz", **cast("Any", masks))
    again = {"by": by, "share": share, "history": [row], "shapes": RUN.shapes(model)}
    return asdict(run) | again


def label(run: Any, by: str, share: float) -> str:
    """Name of the files of a run with flips taken back."""
    return f"{run.label}-{by}{share:g}"


def losses(model: PeftModel, images: Any) -> Iterator[Tensor]:
    """Yield the losses of some augmented training batches, the same every time."""
    for batch, labels in _batches(images, IMAGES, BATCHES):
        yield F.cross_entropy(RUN.logits(model, images.batch(batch)), labels)


def importance(by: str, layer: PemnLayer) -> Tensor:
    """Return how much a layer's mask bits matter, a float tensor of the weight's shape.

    "size" is that of the frozen number, which a flip brings in or takes out; "margin" is how far
    the score's size is from the cut.
    """
    if by == "size":
        return layer.fill().abs()
    mask = layer.mask_of("default")
    sizes, ones = cast("Tensor", mask.scores).detach().abs(), mask.mask()
    return (sizes - (sizes[ones].min() + sizes[~ones].max()) / 2).abs()


def taken_back(initial: Tensor, mask: Tensor, importance: Tensor, share: float) -> Tensor:
    """Return a mask whose least important flips are undone, as many ones as zeros.

    Args:
        initial: Bool tensor, the mask before training.
        mask: Bool tensor of its shape, with as many ones.
        importance: Float tensor of its shape; that of bits that did not flip is not looked at.
        share: Share of flips to undo, 0 to 1; the count of each kind is rounded down.

    Returns:
        Bool tensor of its shape, with as many ones.
    """
    found, before = mask.flatten().clone(), initial.flatten()
    flips = found != before
    count = int(share * (int(flips.sum()) // 2))
    for bit in (False, True):
        places = (flips & (before != bit)).nonzero().squeeze(1)
        least = importance.flatten()[places].argsort(stable=True)[:count]
        found[places[least]] = not bit
    return found.view(mask.shape)


@torch.no_grad()
def fix(layer: PemnLayer, mask: Tensor) -> None:
    """Make a layer's scores zeros and ones, so that top-k chooses this mask; train them no more."""
    scores = cast("nn.Parameter", layer.mask_of("default").scores)
    scores.copy_(mask.float())
    scores.requires_grad = False


def settle(model: PeftModel, images: Any, rule: dict[str, Any]) -> None:
    """Train what is not fixed for a few steps, slower and slower."""
    model.train()
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = RUN.optimizer(rule["optimizer"], rest, SLOWER * rule["lr"], 0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for batch, labels in _batches(images, rule["batch"], STEPS):
        loss = F.cross_entropy(RUN.logits(model, images.batch(batch)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _batches(images: Any, size: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented training batches in the same order every time."""
    pixels, labels = images.train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order.repeat(-(-size * count // len(order)))[: size * count]
    yield from zip(
        images.augment(pixels[order]).split(size), labels[order].split(size), strict=True
    )
