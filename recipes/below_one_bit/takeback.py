"""Flips taken back after training: accuracy against bits from one trained mask.

Many flips do little. Those that matter least go back to the initial bit, which context coding
expects, as many ones as zeros; then norms and biases are trained for a short while.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from pemn_surgery import take_back_flips
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Recipe, load
from pemn_surgery.recipe.classification import Classification, Split
from pemn_surgery.recipe.options import option
from pemn_surgery.recipe.runner import Runner

HERE = load(Path(__file__).resolve().parent)
RUN: Any = HERE.module("run")
MEASURE: Any = HERE.module("measure")

BATCHES, IMAGES = 60, 64  # whose losses tell by="loss" what matters
STEPS = 100  # of training norms and biases after flips were taken back
SLOWER = 0.3  # their learning rate then, in parts of the rule's


@dataclass(frozen=True, kw_only=True)
class Options(RUN.Sweep):
    """Which runs, and what is taken back."""

    by: str = option("the least first", "loss", ("loss", "size", "margin"))
    share: tuple[float, ...] = option("of flips, 0 to 1")


def run(recipe: Recipe, options: Options, console: Console) -> tuple[()]:
    """Take flips of the runs of a sweep back, shares that are not there yet."""
    wanted = {key: getattr(options, key) for key in ("case", "optimizer", "pull", "held")}
    wanted["epochs"] = RUN.epochs_of(recipe, options)
    for kept in MEASURE.read(options.work):
        job = RUN.job_of(kept.settings)
        asked = job.lr in options.lr and kept.is_as_trained
        asked = asked and wanted.items() <= asdict(job).items()
        for share in options.share if asked else ():
            file = options.work / f"{label(job, options.by, share)}.json"
            if not file.exists():
                found = take_back(recipe, job, share, options)
                file.write_text(json.dumps(found) + "\n", encoding="utf-8")
                console.print(f"{file.stem}: {found['history'][-1]['accuracy']:.2f} %")
    return ()


def take_back(recipe: Recipe, job: Any, share: float, options: Options) -> dict[str, Any]:
    """Take a trained job's flips back; keep its masks like `run.train`, under its `label`.

    Args:
        recipe: This recipe.
        job: A `run.Job` whose checkpoint lies under ``work``.
        share: Share of the flips to take back; with 0, only norms and biases settle.
        options: By what flips are ordered: "loss" over all weights (`take_back_flips`), "size" or
            "margin" within each (`importance`).

    Returns:
        What `run.train` returns, with ``by`` and ``share``, and the last epoch alone.

    Raises:
        RecipeError: If the checkpoint is not there, or not at its end.
    """
    quiet, again = Console(quiet=True), dataclasses.replace(options, resume=True)
    trained, arm = RUN.arm(recipe, job, again, quiet)
    if arm.epoch != job.epochs:
        message = f"{arm.file} has {arm.epoch} of {job.epochs} epochs; run {job.label} again"
        raise RecipeError(message)
    initial = {layer.target: layer.mask_of("default").mask() for layer in _fresh(recipe, job)}

    def build() -> nn.Module:
        if options.by == "loss":
            take_back_flips(arm.model.eval(), losses(trained, arm.model), share)
        for layer in RUN.layers(arm.model) if options.by != "loss" else ():
            mask, order = layer.mask_of("default").mask(), importance(options.by, layer)
            fix(layer, taken_back(initial[layer.target].to(mask.device), mask, order, share))
        return arm.model

    rule = recipe.case(job.case).rule_of("masks", schedule="cosine", weight_decay=0.0)
    rule = dataclasses.replace(rule, lr=SLOWER * rule.lr, momentum=0.9)
    settled = dataclasses.replace(trained.task, train=_repeated(trained.task, rule.batch * STEPS))
    runner = Runner(recipe, dataclasses.replace(again, epochs=1), job.seed, settled, quiet)
    name = label(job, options.by, share)
    one = runner.add(name, build, rule, {"by": options.by, "share": share})
    runner.go()
    RUN.keep_masks(options.work / f"{name}.npz", one.model, job.epochs)
    row = {"epoch": job.epochs, "accuracy": one.history[-1]["test_accuracy"]}
    found = {"by": options.by, "share": share, "history": [row], "shapes": RUN.shapes(one.model)}
    return asdict(job) | found


def _fresh(recipe: Recipe, job: Any) -> Iterator[PemnLayer]:
    return RUN.layers(RUN.network(recipe, job))


def label(job: Any, by: str, share: float) -> str:
    """Name of the files of a job with flips taken back."""
    return f"{job.label}-{by}{share:g}"


def losses(runner: Runner, model: nn.Module) -> Iterator[Tensor]:
    """Yield the losses of some augmented training batches, the same every time."""
    images, labels = _repeated(runner.task, BATCHES * IMAGES)
    augmentation = runner.arms[0].rules["optimizer"].augmentation
    images = torch.cat(list(runner.task.augment(augmentation, images)))
    for batch in zip(images.split(IMAGES), labels.split(IMAGES), strict=True):
        yield runner.task.loss(runner.forward(model), batch)


def _repeated(task: Classification, count: int) -> Split:
    """Return so many training images, the same every time, each as often as any other."""
    images, labels = task.train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order.repeat(-(-count // len(order)))[:count]
    return images[order], labels[order]


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
