"""The tasks that the pretrained CIFAR-10 networks are adapted to, as uint8 tensors in memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.classification import Split

SIDE = 16
Load = Callable[[], dict[str, Split]]  # both splits of CIFAR-10


@dataclass(frozen=True)
class Task:
    """A task: its number of classes, how long it is trained, how its two splits are made."""

    classes: int
    epochs: int
    splits: Callable[[Load], dict[str, Split]]


def digits(_: Load) -> dict[str, Split]:
    """scikit-learn's digits, 8x8 grey, enlarged to 16x16 in three equal channels; 450 test."""
    from sklearn.datasets import load_digits

    given, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    grey = (given.float() / 16).view(-1, 1, 8, 8)
    large = F.interpolate(grey, size=SIDE, mode="bilinear", align_corners=False)
    images = (255 * large).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    parts = {"train": slice(-450), "test": slice(-450, None)}
    return {split: (images[part], labels[part]) for split, part in parts.items()}


def rotation(load: Load) -> dict[str, Split]:
    """By how many quarters is a CIFAR-10 image turned? (RotNet, Gidaris et al., 2018).

    The same images, turned alike, for every seed.
    """
    splits = load()
    train, test = splits["train"][0][:TRAIN], splits["test"][0][:TEST]
    return {"train": _turned(train, seed=0), "test": _turned(test, seed=1)}


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
