"""Rows with a label each, in memory: what an epoch is, what a step learns from, what is right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.rules import Rule

Split = tuple[Tensor, Tensor]
Forward = Callable[[Tensor], Tensor]
TESTED_AT_ONCE = 500


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of int64 labels ``[n]`` that are right, in percent."""
    return 100 * int((predicted == labels).sum()) / len(labels)


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of int64 labels ``[n]`` times 100: 0 is chance; CoLA's measure."""
    classes = 1 + int(torch.stack([predicted, labels]).max())
    table = torch.bincount(labels * classes + predicted, minlength=classes**2).double()
    table = table.view(classes, classes)
    truly, said, n = table.sum(1), table.sum(0), len(labels)
    spread = (n**2 - truly @ truly) * (n**2 - said @ said)
    return 100 * float((n * table.trace() - truly @ said) / spread.sqrt()) if spread > 0 else 0.0


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    function.__name__: function for function in (accuracy, matthews)
}


def _no_augmentation(name: str, inputs: Tensor) -> Iterator[Tensor]:
    if name != "none":
        message = f"augmentation {name!r} is unknown; this data set has 'none'"
        raise RecipeError(message)
    return iter([inputs])


@dataclass(frozen=True)
class Classification:
    """What the runner trains on and tests with; another kind of training has these methods too.

    Attributes:
        train: Inputs ``[n, ...]`` and labels int64 ``[n]``.
        test: The same of the test split.
        prepare: From a batch of inputs, on its device, to what a network takes.
        augment: From a rule's augmentation and an epoch's inputs to those that are trained on, in
            their order, chunk by chunk, with torch's global generator.
        metric: Key of `METRICS`: what the test split is measured by.
    """

    train: Split
    test: Split
    prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs
    augment: Callable[[str, Tensor], Iterator[Tensor]] = _no_augmentation
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        """Refuse a metric that is in no table."""
        if self.metric not in METRICS:
            message = f"metric {self.metric!r} is unknown; give one of {sorted(METRICS)}"
            raise RecipeError(message)

    def cut(self, limit: int | None) -> "Classification":
        """Return the same with splits of at most ``limit`` rows; None: as they are."""
        train, test = ((x[:limit], y[:limit]) for x, y in (self.train, self.test))
        return replace(self, train=train, test=test)

    def on(self, device: str) -> "Classification":
        """Return the same with both splits on a device, where epochs then are made, too."""
        train, test = ((x.to(device), y.to(device)) for x, y in (self.train, self.test))
        return replace(self, train=train, test=test)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each split."""
        return {"train": len(self.train[1]), "test": len(self.test[1])}

    def rows(self, rule: Rule) -> int:
        """How many rows an epoch has."""
        count = self.sizes["train"]
        return count - count % rule.batch if rule.whole_batches else count

    def batches(self, rule: Rule, advance: Callable[[int], None] = lambda _: None) -> list[Split]:
        """Shuffle and augment an epoch, with torch's global generator; tell the rows of chunks."""
        inputs, labels = self.train
        order = torch.randperm(len(labels))[: self.rows(rule)].to(labels.device)
        ready = []
        for chunk in self.augment(rule.augmentation, inputs[order]):
            ready.append(chunk)
            advance(len(chunk))
        split = torch.cat(ready).split(rule.batch), labels[order].split(rule.batch)
        return list(zip(*split, strict=True))

    def loss(self, forward: Forward, batch: Split) -> Tensor:
        """Mean cross-entropy of a batch; ``forward`` maps inputs to logits ``[b, classes]``."""
        logits = forward(batch[0])
        return F.cross_entropy(logits, batch[1].to(logits.device))

    @torch.no_grad()
    def accuracy(self, forward: Forward) -> float:
        """Measure the labels of the test split's inputs: by default the share right, in percent."""
        inputs, labels = self.test
        found = [forward(x).argmax(1).to(labels.device) for x in inputs.split(TESTED_AT_ONCE)]
        return METRICS[self.metric](torch.cat(found), labels)
