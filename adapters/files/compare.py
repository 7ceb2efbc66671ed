"""What two tasks have in common: their masks, weight by weight, from the files alone."""

from dataclasses import dataclass
from pathlib import Path

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import one_reading, read_decoded
from pemn_surgery.adapters.files.contents import mask_key
from pemn_surgery.adapters.files.file_checks import check_without_base
from pemn_surgery.adapters.files.opening import open_adapter
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.errors import AdapterFileError, ArchitectureError

_Masks = dict[str, tuple[int, int]]  # by parameter: weights, and the mask as one whole number


@dataclass(frozen=True)
class Overlap:
    """Two masks of the same parameter.

    Attributes:
        name: The parameter, or "all" for the sum.
        weights: Number of its weights.
        first: Ones of the first task's mask.
        second: Ones of the second's.
        both: Weights that both keep.
    """

    name: str
    weights: int
    first: int
    second: int
    both: int

    @property
    def either(self) -> int:
        """Weights that at least one of them keeps."""
        return self.first + self.second - self.both

    @property
    def jaccard(self) -> float:
        """Share of the weights that either keeps which both keep; 1 where neither keeps any."""
        return self.both / self.either if self.either else 1.0

    @property
    def chance(self) -> float:
        """The Jaccard index expected of independent masks of these densities."""
        both = self.first * self.second / max(self.weights, 1)
        either = self.first + self.second - both
        return both / either if either else 1.0

    @property
    def agreement(self) -> float:
        """Share of the weights that both treat alike."""
        return 1 - (self.either - self.both) / max(self.weights, 1)


@dataclass(frozen=True)
class Comparison:
    """Two adapters' masks side by side.

    Attributes:
        overlaps: Parameters that both mask, in the first file's order.
        only_first: Parameters that the first alone masks.
        only_second: Parameters that the second alone masks.
        same_base: Whether both were trained on the same frozen numbers.
    """

    overlaps: tuple[Overlap, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    same_base: bool

    @property
    def total(self) -> Overlap:
        """All parameters together."""
        kinds = ("weights", "first", "second", "both")
        sums = (sum(getattr(overlap, kind) for overlap in self.overlaps) for kind in kinds)
        return Overlap("all", *sums)


def compare_adapters(first: str | Path, second: str | Path) -> Comparison:
    """Compare the masks of two adapters.

    Args:
        first: Folder of an adapter.
        second: Folder of another one, of the same architecture.

    Returns:
        The overlap of every parameter that both mask.

    Raises:
        AdapterFileError: If a folder has no masks as bits, or a file is truncated or altered.
        ArchitectureError: If no parameter is masked by both, or one has two sizes.
    """
    (our_config, ours), (their_config, theirs) = _read(first), _read(second)
    shared = [name for name in ours if name in theirs]
    _check_sizes(ours, theirs, shared, (str(first), str(second)))
    return Comparison(
        tuple(_overlap(name, *ours[name], theirs[name][1]) for name in shared),
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
        our_config.fingerprint == their_config.fingerprint,
    )


def _read(folder: str | Path) -> tuple[PemnConfig, _Masks]:
    with one_reading():
        config, file = open_adapter(folder)
        if not file.headers:
            message = (
                f"{str(folder)!r} holds no masks as bits. Give the folder of an adapter that "
                "save_pretrained made; a Trainer's checkpoint holds scores."
            )
            raise AdapterFileError(message)
        check_without_base(file)
        tensors = read_decoded(file.path).tensors
    masks = {}
    for name, weights in file.sizes.items():
        payload = tensors[mask_key(name, "bits")].numpy()[HEADER_BYTES:].tobytes()
        masks[name] = (weights, int.from_bytes(payload, "little"))
    return config, masks


def _overlap(name: str, weights: int, ours: int, theirs: int) -> Overlap:
    both = (ours & theirs).bit_count()
    return Overlap(name, weights, ours.bit_count(), theirs.bit_count(), both)


def _check_sizes(
    ours: _Masks,
    theirs: _Masks,
    shared: list[str],
    folders: tuple[str, str],
) -> None:
    if not shared:
        message = (
            f"No parameter is masked by both {folders[0]!r} ({len(ours)} masks) and "
            f"{folders[1]!r} ({len(theirs)} masks). Give two adapters of one architecture."
        )
        raise ArchitectureError(message)
    for name in shared:
        if ours[name][0] != theirs[name][0]:
            message = (
                f"The mask of {name!r} has {ours[name][0]} weights in {folders[0]!r} and "
                f"{theirs[name][0]} in {folders[1]!r}. Give two adapters of one architecture."
            )
            raise ArchitectureError(message)
