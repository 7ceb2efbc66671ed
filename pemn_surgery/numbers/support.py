"""Which weights an adapter may change: a share of them, drawn from a seed or told by the base.

Only these have scores while it trains and bits in its file; all others keep their frozen numbers.
The places are no part of a file: seed and name, or the base's own numbers, give them again.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pemn_surgery.numbers import rng

SupportName = Literal["seed", "rows", "largest", "smallest"]
OthersName = Literal["kept", "drawn"]

# A weight as (outer, summed, outputs, inner), see `pemn_surgery.masks.sign_delta.Rows`.
Layout = tuple[int, int, int, int]


@dataclass(frozen=True)
class Support:
    """A share of a weight's numbers.

    Attributes:
        share: The share, 0 < share < 1.
        by: "seed" draws single weights, "rows" whole outputs; "largest" and "smallest" are those of
            the frozen numbers, by their magnitude in bfloat16.
        seed: Draws "seed" and "rows", for each weight by its name.
    """

    share: float
    by: SupportName
    seed: int

    @property
    def reads_base(self) -> bool:
        """Whether the frozen numbers decide."""
        return self.by in ("largest", "smallest")

    def kept_others(self, name: str, weights: int, density: float) -> NDArray[np.bool_]:
        """Return a mask of the whole weight with this density, for the numbers that have no bit.

        Returns:
            bool array of shape (weights,): the ``int((1 - density) * weights)`` smallest numbers of
            a stream of their own are dropped.
        """
        kept = np.ones(weights, np.bool_)
        drawn = rng.integers(self.seed, f"others/{name}", weights)
        kept[_smallest(drawn, int((1 - density) * weights))] = False
        return kept

    def count(self, layout: Layout) -> int:
        """Return how many numbers of a weight have a bit: its share, and one at least."""
        weights = math.prod(layout)
        if self.by != "rows":
            return _share_of(weights, self.share)
        outputs = layout[0] * layout[2]
        return _share_of(outputs, self.share) * (weights // max(outputs, 1))

    def places(self, name: str, layout: Layout, words: NDArray[np.uint16] | None) -> Any:
        """Return where these numbers lie in the flattened weight.

        Args:
            name: Of the weight.
            layout: Of the weight; the product is its number of numbers.
            words: The frozen numbers in bfloat16, uint16 of shape (weights,), where they decide.

        Returns:
            int64 array of shape (``count(layout)``,), ascending.
        """
        weights = math.prod(layout)
        if self.by == "rows":
            return self._in_rows(name, layout)
        if words is None:
            keys: Any = self._drawn(name, weights)
        else:
            magnitudes = words & np.uint16(0x7FFF)
            keys = np.uint16(0x7FFF) - magnitudes if self.by == "largest" else magnitudes
        return _smallest(keys, self.count(layout))

    def _in_rows(self, name: str, layout: Layout) -> Any:
        outer, summed, outputs, inner = layout
        chosen = _smallest(
            self._drawn(name, outer * outputs), _share_of(outer * outputs, self.share)
        )
        each = np.arange(math.prod(layout), dtype=np.int64).reshape(layout)
        by_output = each.transpose(0, 2, 1, 3).reshape(outer * outputs, summed * inner)
        return np.sort(by_output[chosen].reshape(-1))

    def _drawn(self, name: str, count: int) -> NDArray[np.uint32]:
        return rng.integers(self.seed, f"support/{name}", count)


def _share_of(count: int, share: float) -> int:
    """Return a share of some things, rounded half to even, and one at least where there is one."""
    return min(max(round(share * count), 1), count)


def _smallest(keys: NDArray[Any], count: int) -> Any:
    """Return the places of the smallest keys, ascending; of equal ones the first count."""
    if not count:
        return np.empty(0, np.int64)
    border = np.partition(keys, count - 1)[count - 1]
    below, equal = np.flatnonzero(keys < border), np.flatnonzero(keys == border)
    return np.sort(np.concatenate([below, equal[: count - len(below)]]))
