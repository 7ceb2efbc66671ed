"""Data sets of images, decoded once into uint8 tensors."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import sources
from pemn_surgery.recipe.augmentations import AUGMENTATIONS
from pemn_surgery.recipe.classification import Classification, Split
from pemn_surgery.recipe.options import ImageOptions

CHUNK = 2048  # images that are augmented at once
_TRIAL = {"train": 96, "test": 64}  # images of each split


@dataclass(frozen=True)
class ImageData:
    """A row of a recipe's ``[data]``.

    Attributes:
        source: Hub id, or folder for ``datasets.load_dataset``.
        image: Name of the image column.
        label: Name of the label column.
        mean: Of each channel of pixels in 0..1, as the networks expect it.
        std: Standard deviation of each channel.
        side: Pixels a side; pictures of other sizes are scaled and cut to their middle square.
        test: Name of the split that is tested with.
        validation: Name of one that choices are made by; none: it has none.
        metric: What the test split is measured by.
    """

    source: str
    image: str
    label: str
    mean: Sequence[float]
    std: Sequence[float]
    side: int = 32
    test: str = "test"
    validation: str = ""
    metric: str = "accuracy"

    def load(self, options: ImageOptions) -> dict[str, Split]:
        """Return its splits: the options' source or the row's own, decoded once and kept.

        Returns:
            ``{"train": (images, labels), "test": ...}``: uint8 ``[n, 3, side, side]``, int64
            ``[n]``; for ``smoke`` random ones, of two classes. A RecipeError names what is missing.
        """
        if options.smoke:
            return {name: self._random(n) for name, n in _TRIAL.items()}
        place = sources.place(options.case, options.data, self.source)
        named = "|".join(map(str, (place, self.image, self.label, self.side, self.test)))
        named += f"|{self.validation}" if self.validation else ""
        file = options.work / f"decoded-{hashlib.sha256(named.encode()).hexdigest()[:12]}.pt"
        if not file.exists():
            decoded = decode(self, place, options.work)
            partial = file.with_suffix(".partial")
            torch.save(decoded, partial)
            partial.replace(file)
        return torch.load(file, weights_only=True, mmap=True)

    def _random(self, count: int) -> Split:
        made = torch.Generator().manual_seed(count)
        shape = (count, 3, self.side, self.side)
        pictures = torch.randint(256, shape, dtype=torch.uint8, generator=made)
        return pictures, torch.arange(count) % 2

    @property
    def splits(self) -> dict[str, str]:
        """Names of its splits by what they are for."""
        named = {"train": "train", "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split}

    def task(self, splits: Mapping[str, Split]) -> Classification:
        """Return what the runner trains on: these splits, this normalisation and augmentation."""
        both = splits["train"], splits["test"]
        return Classification(*both, self.normalise, self.augment, self.metric)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[n, 3, h, w]`` -> float32 of zero mean and unit deviation."""
        shape = (len(self.mean), 1, 1)
        mean, std = (
            torch.tensor(v, device=images.device).view(shape) for v in (self.mean, self.std)
        )
        return (images.float() / 255 - mean) / std

    def augment(self, name: str, images: Tensor) -> Iterator[Tensor]:
        """Augment an epoch's images in order, in chunks of 2,048, with torch's global generator.

        ``name`` is a key of `AUGMENTATIONS`, or a RecipeError is raised; images are uint8
        ``[n, 3, h, w]`` before and after.
        """
        if name not in AUGMENTATIONS:
            known = sorted(AUGMENTATIONS)
            message = f"augmentation {name!r} is unknown; give one of {known}"
            raise RecipeError(message)
        return (AUGMENTATIONS[name](chunk, self.mean) for chunk in images.split(CHUNK))


def decode(data: ImageData, source: str, work: Path) -> dict[str, Split]:
    """Read the splits of a hub id or a folder (`sources.read`) and decode their pictures."""
    given = sources.read(source, data.splits, (data.image, data.label), work)
    return {
        name: (_stacked(data, columns[data.image]), torch.tensor([*columns[data.label]]))
        for name, columns in given.items()
    }


def _stacked(data: ImageData, pictures: Iterable[Any]) -> Tensor:
    """uint8 ``[n, 3, side, side]`` of PIL's pictures, or of the bytes of their files."""
    square = (data.side, data.side)
    read = (Image.open(io.BytesIO(p["bytes"])) if isinstance(p, dict) else p for p in pictures)
    fitted = (p if p.size == square else ImageOps.fit(p, square) for p in read)
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in fitted])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
