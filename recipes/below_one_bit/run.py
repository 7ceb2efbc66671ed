"""Train masks with scores at a learning rate of their own; keep masks and accuracy of every epoch.

Only the scores' learning rate decides how many mask bits leave the initial mask, so it is swept
while everything else that is trained keeps its own. Masks are kept as they are, so that ways to
code them can be compared without training again (`measure`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from pemn_surgery import pemnify
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.commands import quickstart_run as quickstart
from pemn_surgery.recipe import Recipe, load

LARGE = 1e3  # a score that stays among the largest
CIFAR = Path(__file__).resolve().parents[1] / "cifar10_rp"

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """One training: what is swept, beside what the recipe says.

    Attributes:
        case: "digits" or "cifar10".
        optimizer: Of the scores: "adamw" or "sgd" (momentum .9).
        lr: The scores' largest learning rate (one cycle).
        seed: Of bank, scores, and order of the images.
        epochs: Passes over the training images.
        task: For digits, "digit" or "parity".
        pull: How far scores go back toward where they began after every step, in learning rates.
        held: Share of each layer's weights, the smallest, whose mask bits stay as they began.
    """

    case: str
    optimizer: str
    lr: float
    seed: int
    epochs: int
    task: str = "digit"
    pull: float = 0.0
    held: float = 0.0

    @property
    def label(self) -> str:
        """Name of the run's file."""
        parts = (self.case, self.task, self.optimizer, f"{self.lr:g}", f"p{self.pull:g}")
        parts += (f"h{self.held:g}",) if self.held else ()
        return "-".join((*parts, f"e{self.epochs}", f"s{self.seed}"))


def run_of(settings: dict[str, Any]) -> Run:
    """Return the run that `train` returned these settings of."""
    return Run(**{field.name: settings[field.name] for field in fields(Run)})


@dataclass(frozen=True)
class Data:
    """Images of both splits, how they become a batch, and how they are augmented each epoch."""

    train: Split
    test: Split
    batch: Callable[[Tensor], Tensor]
    augment: Callable[[Tensor], Tensor]


def digits(task: str) -> Data:
    """Return the quickstart's digits."""
    train, test = quickstart.load_digits()
    splits = [(split.images, split.labels[task]) for split in (train, test)]
    return Data(splits[0], splits[1], lambda images: images, lambda images: images)


def cifar10(source: str, work: Path, recipe: Recipe) -> Data:
    """Return CIFAR-10, cropped and flipped while training."""
    pipeline = load(CIFAR).module("data")
    given = recipe.data
    splits = pipeline.load(source or given["source"], work, given["image"], given["label"])

    def batch(images: Tensor) -> Tensor:
        return pipeline.normalise(images).contiguous(memory_format=torch.channels_last)

    def augment(images: Tensor) -> Tensor:
        return torch.cat(list(pipeline.augment("resnet", images)))

    return Data(splits["train"], splits["test"], batch, augment)


def data(recipe: Recipe, run: Run, work: Path, source: str) -> Data:
    """Return a run's images; ``work`` keeps decoded ones, ``source`` replaces the recipe's."""
    return digits(run.task) if run.case == "digits" else cifar10(source, work, recipe)


def network(recipe: Recipe, run: Run) -> PeftModel:
    """Return the case's network with fresh masks."""
    torch.manual_seed(run.seed)
    case = recipe.case(run.case)
    base = quickstart.network(run.seed) if case.factory == "digits" else resnet(**case.arguments)
    return pemnify(base, seed=run.seed, **recipe.arms["masks"])


def resnet(widths: Sequence[int], classes: int = 10) -> nn.Sequential:
    """Return a ResNet of one block a width, for images of 32 x 32, whose stem halves them.

    Args:
        widths: Channels of the blocks; the sides are 16, 8, 4, ...
        classes: Number of outputs.
    """
    block = load(CIFAR).module("models").BasicBlock
    first = widths[0]
    stem = [nn.Conv2d(3, first, 3, 2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    blocks = [block(*pair) for pair in zip((first, *widths), widths, strict=False)]
    head = nn.Linear(widths[-1], classes, bias=False)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def train(recipe: Recipe, run: Run, work: Path, source: str, console: Console) -> dict[str, Any]:
    """Train once; keep packed masks by epoch and weight, and all that was trained.

    They are ``<label>.npz`` and ``<label>.pt`` under ``work``.

    Args:
        recipe: This recipe.
        run: What is trained.
        work: Folder of masks and decoded data.
        source: Folder or hub id in place of the recipe's; "" for that.
        console: Where every epoch is shown.

    Returns:
        The run's settings, accuracy in percent and seconds by epoch.
    """
    images, model = data(recipe, run, work, source), network(recipe, run)
    fitting = _Fitting(recipe.case(run.case).rule, model, images, run)
    masks: dict[str, np.ndarray] = {}
    history = []
    for epoch in range(1, run.epochs + 1):
        row = {"epoch": epoch, **fitting.epoch(), "accuracy": accuracy(model, images)}
        history.append(row)
        masks |= {f"{epoch}/{name}": mask for name, mask in packed_masks(model).items()}
        shown = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
        console.print(f"{run.label}: {shown}", highlight=False)
    np.savez(work / f"{run.label}.npz", **cast("Any", masks))
    torch.save(trained(model), work / f"{run.label}.pt")
    return {**asdict(run), "history": history, "shapes": shapes(model)}


def trained(model: PeftModel) -> dict[str, Tensor]:
    """Return scores, norms, biases and the norms' running statistics by their names."""
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


class _Fitting:
    """Optimizers and schedules of one run: scores apart from everything else."""

    def __init__(self, rule: dict[str, Any], model: PeftModel, data: Data, run: Run) -> None:
        self.model, self.data, self.run, self.rule = model, data, run, rule
        if run.held:
            for layer in layers(model):
                hold(layer, run.held)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        scores = [p for name, p in named if ".pemn_masks." in name]
        rest = [p for name, p in named if ".pemn_masks." not in name]
        self.scores = [(score, score.detach().clone()) for score in scores]
        steps = run.epochs * (len(data.train[1]) // rule["batch"])
        self.optimizers = [
            optimizer(run.optimizer, scores, run.lr, 0.0),
            optimizer(rule["optimizer"], rest, rule["lr"], rule["weight_decay"]),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(one, lr, total_steps=steps, cycle_momentum=False)
            for one, lr in zip(self.optimizers, (run.lr, rule["lr"]), strict=True)
        ]
        self.order = torch.Generator().manual_seed(run.seed)

    def epoch(self) -> dict[str, float]:
        """Train for one epoch; return its mean loss and seconds."""
        started, total, steps = time.perf_counter(), 0.0, 0
        self.model.train()
        for images, labels in self._batches():
            loss = F.cross_entropy(logits(self.model, self.data.batch(images)), labels)
            for one in self.optimizers:
                one.zero_grad()
            loss.backward()
            for one in self.optimizers:
                one.step()
            if self.run.pull:
                self._pull()
            for schedule in self.schedules:
                schedule.step()
            total, steps = total + loss.item(), steps + 1
        return {"loss": total / steps, "seconds": time.perf_counter() - started}

    @torch.no_grad()
    def _pull(self) -> None:
        """Move scores toward where they began, by as much wherever they are, not beyond it."""
        by = self.run.pull * self.optimizers[0].param_groups[0]["lr"]
        for score, start in self.scores:
            score.copy_(start + F.softshrink(score - start, by))

    def _batches(self) -> Iterator[Split]:
        images, labels = self.data.train
        order = torch.randperm(len(labels), generator=self.order)
        size = self.rule["batch"]
        order = order[: len(labels) // size * size]
        images, labels = self.data.augment(images[order]), labels[order]
        yield from zip(images.split(size), labels.split(size), strict=True)


def optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, decay: float
) -> torch.optim.Optimizer:
    """Return an optimizer by its name in the recipe."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=decay)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return a model's outputs in float32; convolutions on CIFAR-10 are made in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=images.shape[1] == 3):
        return model(images).float()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test images that a model gets right, in percent."""
    model.eval()
    images, labels = data.test
    pairs = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((logits(model, data.batch(x)).argmax(1) == y).sum()) for x, y in pairs)
    return 100 * right / len(labels)


def layers(model: PeftModel) -> Iterator[PemnLayer]:
    """Yield the masked layers of a model."""
    return (module for module in model.modules() if isinstance(module, PemnLayer))


@torch.no_grad()
def hold(layer: PemnLayer, share: float) -> None:
    """Keep the mask bits of a layer's smallest frozen numbers as they are, whatever is trained.

    Their scores go to both ends of the order and get no gradient.
    """
    scores, sizes = cast("nn.Parameter", layer.mask_of("default").scores), layer.fill().abs()
    held = torch.zeros_like(sizes, dtype=torch.bool)
    held.view(-1)[sizes.flatten().argsort(stable=True)[: int(share * sizes.numel())]] = True
    ends = torch.where(layer.mask_of("default").mask(), LARGE, 0.0)
    scores.copy_(torch.where(held, ends, scores))
    scores.register_hook(lambda gradient: gradient.masked_fill(held, 0.0))


@torch.no_grad()
def packed_masks(model: PeftModel) -> dict[str, np.ndarray]:
    """Return every mask by its weight's name, eight weights a byte, the first lowest."""
    return {
        layer.target: np.packbits(layer.mask_of("default").mask().numpy(), bitorder="little")
        for layer in layers(model)
    }


def shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every masked weight."""
    return {layer.target: tuple(layer.shape) for layer in layers(model)}
