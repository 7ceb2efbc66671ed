"""The tasks that the pretrained CIFAR-10 networks are adapted to, as uint8 tensors in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load as load_recipe

CIFAR10 = load_recipe(Path(__file__).resolve().parents[1] / "cifar10_rp").module("data")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those the weights were trained with
SIDE = 16

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """Where CIFAR-10 comes from and goes to: `load` of the recipe cifar10_rp explains them."""

    place: str
    work: Path
    image: str
    label: str

    def load(self, split: str, count: int) -> Split:
        """The first images of a split, uint8 ``[n, 3, 32, 32]``, and their ten classes ``[n]``."""
        images, labels = CIFAR10.load(self.place, self.work, self.image, self.label)[split]
        return images[:count], labels[:count]


@dataclass(frozen=True)
class Task:
    """A task: its number of classes, how long it is trained, how its two splits are made."""

    classes: int
    epochs: int
    splits: Callable[[Source], tuple[Split, Split]]


def digits(_: Source) -> tuple[Split, Split]:
    """scikit-learn's digits, 8x8 grey, enlarged to 16x16 in three equal channels; 450 test."""
    from sklearn.datasets import load_digits

    given, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    grey = (given.float() / 16).view(-1, 1, 8, 8)
    large = F.interpolate(grey, size=SIDE, mode="bilinear", align_corners=False)
    images = (255 * large).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:-450], labels[:-450]), (images[-450:], labels[-450:])


def rotation(source: Source) -> tuple[Split, Split]:
    """By how many quarters is a CIFAR-10 image turned? (RotNet, Gidaris et al., 2018).

    The same images, turned alike, for every seed.
    """
    train, test = source.load("train", TRAIN)[0], source.load("test", TEST)[0]
    return _turned(train, seed=0), _turned(test, seed=1)


def _turned(images: Tensor, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    quarters = torch.randint(4, (len(images),), generator=generator)
    turned = images.clone()
    for number in range(1, 4):
        turned[quarters == number] = images[quarters == number].rot90(number, (2, 3))
    return turned, quarters


TRAIN, TEST = 4_000, 1_000
TASKS = {
    "digits": Task(10, 8, digits),
    "rotation": Task(4, 3, rotation),
}


def task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        RecipeError: If there is no such task; the message lists those there are.
    """
    if name not in TASKS:
        message = f"task {name!r} is unknown; give one of {sorted(TASKS)}"
        raise RecipeError(message)
    return TASKS[name]


def normalise(images: Tensor) -> Tensor:
    """uint8 ``[n, 3, h, w]`` -> float32 as the pretrained networks expect it."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(name: str, images: Tensor) -> Iterator[Tensor]:
    """As the recipe cifar10_rp does; the tasks here take "none", as flips change a rotation."""
    return CIFAR10.augment(name, images)
