"""Data sets of images, decoded once into uint8 tensors."""

import hashlib
import importlib.util
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from pemn_surgery.errors import RecipeError
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
    """

    source: str
    image: str
    label: str
    mean: Sequence[float]
    std: Sequence[float]
    side: int = 32
    test: str = "test"

    def load(self, options: ImageOptions) -> dict[str, Split]:
        """Return both splits: the options' source or the row's own, decoded once and kept.

        Returns:
            ``{"train": (images, labels), "test": ...}``: uint8 ``[n, 3, side, side]``, int64
            ``[n]``; for ``smoke`` random ones, of two classes. A RecipeError names what is missing.
        """
        if options.smoke:
            return {name: self._random(n) for name, n in _TRIAL.items()}
        source = options.data or self.source
        if not source:
            message = f"the data of {options.case!r} has no source of its own; give --data"
            raise RecipeError(message)
        place = str(Path(source).resolve()) if Path(source).exists() else source
        named = "|".join(map(str, (place, self.image, self.label, self.side, self.test)))
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
        return {"train": "train", "test": self.test}

    def task(self, splits: Mapping[str, Split]) -> Classification:
        """Return what the runner trains on: these splits, this normalisation and augmentation."""
        return Classification(splits["train"], splits["test"], self.normalise, self.augment)

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
    """Read both splits of a hub id or a folder and decode their pictures.

    Without ``datasets``, which caches in ``work``, a folder of parquet files is read, whose names
    begin with their split's. If a split or column is missing, a RecipeError names those there are.
    """
    if importlib.util.find_spec("datasets") is None:
        return {name: _of_parquet(data, source, split) for name, split in data.splits.items()}
    import datasets

    given = datasets.load_dataset(source, cache_dir=str(work / "datasets"))
    missing = sorted({*data.splits.values()} - {*given})
    if missing:
        message = f"{source} has the splits {sorted(given)}; {missing} are needed"
        raise RecipeError(message)
    splits: dict[str, Split] = {}
    for name, split in data.splits.items():
        rows: Any = given[split]
        _check_columns(data, source, rows.column_names)
        pictures = (row[data.image] for row in rows)
        splits[name] = _stacked(data, pictures), torch.tensor(rows[data.label])
    return splits


def _of_parquet(data: ImageData, source: str, split: str) -> Split:
    """Read one split of a folder of parquet files, as the hub writes them, without ``datasets``."""
    files = sorted(Path(source).rglob(f"{split}-*.parquet"))
    if not files:
        message = f"{source} has no {split}-*.parquet; give a folder that has, or install datasets"
        raise RecipeError(message)
    from PIL import Image
    from pyarrow import concat_tables, parquet

    table = concat_tables([parquet.read_table(file) for file in files])
    _check_columns(data, source, table.column_names)
    kept = (picture["bytes"] for picture in table[data.image].to_pylist())
    pictures = (Image.open(io.BytesIO(one)) for one in kept)
    return _stacked(data, pictures), torch.tensor(table[data.label].to_pylist())


def _check_columns(data: ImageData, source: str, there: Sequence[str]) -> None:
    missing = {data.image, data.label} - {*there}
    if missing:
        message = f"{source} lacks the columns {sorted(missing)}; it has {list(there)}"
        raise RecipeError(message)


def _stacked(data: ImageData, pictures: Iterable[Any]) -> Tensor:
    """uint8 ``[n, 3, side, side]`` of PIL's pictures."""
    square = (data.side, data.side)
    fitted = (p if p.size == square else ImageOps.fit(p, square) for p in pictures)
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in fitted])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
