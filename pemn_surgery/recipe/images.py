"""Data sets of images as uint8 tensors in memory, and the two augmentations of the PEMN paper."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.classification import Classification, Split

CHUNK = 256


@dataclass(frozen=True)
class ImageData:
    """A row of a recipe's ``[data]``.

    Attributes:
        source: Hub id, or folder for ``datasets.load_dataset``.
        image: Name of the image column.
        label: Name of the label column.
        mean: Of each channel of pixels in 0..1, as the networks expect it.
        std: Standard deviation of each channel.
    """

    source: str
    image: str
    label: str
    mean: Sequence[float]
    std: Sequence[float]

    def load(self, work: Path, source: str = "") -> dict[str, Split]:
        """Return both splits as `load` does; ``source`` stands in place of the row's own."""
        return load(source or self.source, work, self.image, self.label)

    def task(self, splits: Mapping[str, Split]) -> Classification:
        """Return what the runner trains on: these splits, this normalisation and augmentation."""
        return Classification(splits["train"], splits["test"], self.normalise, self.augment)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[n, 3, h, w]`` -> float32 of zero mean and unit deviation, channels last.

        Channels last is how convolutions were measured to be faster.
        """
        shape = (len(self.mean), 1, 1)
        mean, std = (
            torch.tensor(v, device=images.device).view(shape) for v in (self.mean, self.std)
        )
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def augment(self, name: str, images: Tensor) -> Iterator[Tensor]:
        """Augment one epoch's images, in their order, with torch's global generator.

        Args:
            name: ``"convmixer"``, ``"resnet"`` or ``"none"``.
            images: uint8 ``[n, 3, 32, 32]``.

        Returns:
            uint8 ``[<=256, 3, 32, 32]``, chunk by chunk, so that a caller can show progress.

        Raises:
            RecipeError: If ``name`` is none of the three.
        """
        if name not in AUGMENTATIONS:
            message = f"augmentation {name!r} is unknown; give one of {sorted(AUGMENTATIONS)}"
            raise RecipeError(message)
        return map(AUGMENTATIONS[name](self.mean), images.split(CHUNK))


def load(source: str, work: Path, image: str, label: str) -> dict[str, Split]:
    """Decode a data set once and keep it under ``work``.

    Args:
        source: Hub id or folder for ``datasets.load_dataset``.
        work: Folder for the decoded copy (180 MB for CIFAR-10) and the hub's cache.
        image: Name of the image column.
        label: Name of the label column.

    Returns:
        ``{"train": (images, labels), "test": ...}``: uint8 ``[n, 3, 32, 32]``, int64 ``[n]``.

    Raises:
        RecipeError: If a split or a column is missing; the message names those there are.
    """
    place = str(Path(source).resolve()) if Path(source).exists() else source
    key = hashlib.sha256(f"{place}|{image}|{label}".encode()).hexdigest()[:12]
    file = work / f"decoded-{key}.pt"
    if not file.exists():
        decoded = _decode(place, work, image, label)
        partial = file.with_suffix(".partial")
        torch.save(decoded, partial)
        partial.replace(file)
    return torch.load(file, weights_only=True)


def _decode(source: str, work: Path, image: str, label: str) -> dict[str, Split]:
    import datasets

    given = datasets.load_dataset(source, cache_dir=str(work / "datasets"))
    splits: dict[str, Split] = {}
    for name in ("train", "test"):
        if name not in given:
            message = f"{source} has the splits {sorted(given)}; train and test are needed"
            raise RecipeError(message)
        missing = {image, label} - set(given[name].column_names)
        if missing:
            there = given[name].column_names
            message = f"{source} lacks the columns {sorted(missing)}; it has {there}"
            raise RecipeError(message)
        splits[name] = _tensors(given[name], image, label)
    return splits


def _tensors(rows, image: str, label: str) -> Split:  # noqa: ANN001 - a datasets.Dataset
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in rows[image]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows[label])


def _convmixer(mean: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """RandAugment(2, 12), ColorJitter .2, RandomErasing .2 after a flip, drawn for each image.

    The paper's RandomResizedCrop(32, scale=(1, 1)) is the identity on 32x32 images and left
    out. Erasing writes the mean colour, which is the zero of the normalised image.
    """
    from torchvision.transforms import v2

    grey = [round(255 * m) for m in mean]
    steps = [v2.RandomHorizontalFlip(), v2.RandAugment(2, 12), v2.ColorJitter(0.2, 0.2, 0.2)]
    erase = v2.RandomErasing(0.2, value=grey)  # pyright: ignore[reportArgumentType] - its docs allow a sequence
    transform = v2.Compose([*steps, erase])
    return lambda images: torch.stack([transform(picture) for picture in images])


def crop_and_flip(images: Tensor, pad: int = 4) -> Tensor:
    """Crop at random out of the image padded with ``pad`` black pixels, flip half of them.

    Args:
        images: uint8 ``[n, 3, h, w]``.
        pad: Pixels added on each side, before normalisation (torchvision's RandomCrop).

    Returns:
        uint8 ``[n, 3, h, w]``.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, n, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    n_index = torch.arange(n).view(n, 1, 1)
    picked = padded.permute(0, 2, 3, 1)[n_index, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


# By name: from the mean colour to what augments a chunk.
AUGMENTATIONS: dict[str, Callable[[Sequence[float]], Callable[[Tensor], Tensor]]] = {
    "convmixer": _convmixer,
    "resnet": lambda _: crop_and_flip,
    "none": lambda _: lambda images: images,
}
