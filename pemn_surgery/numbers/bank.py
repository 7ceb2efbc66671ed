"""The one store of frozen numbers that every masked layer draws from.

A *prototype* is the numbers as the papers write them: the vector of max-layer padding (MP) and
random vector padding (RP), or one layer's weight (one-layer). A *fill* is the prototype spread over
one weight's shape. All prototypes of a model lie in one buffer of one `Bank`, which every masked
layer shares.

The methods are those of Bai et al., *Parameter-Efficient Masking Networks*, NeurIPS 2022, section
3.2; with ``bank="own"`` every weight is its own prototype (edge-popup, Piggyback, Self-Masking
Networks, and the row "Mask" of PEMN's tables).
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from pemn_surgery.numbers import rng

BankName = Literal["mp", "rp", "one_layer", "own"]
InitName = Literal[
    "kaiming_normal",
    "kaiming_uniform",
    "xavier_normal",
    "signed_constant",
    "unsigned_constant",
    "xavier_constant",
    "model",
    "stored",
]
FanMode = Literal["fan_in", "fan_out"]

# Drawn numbers that are all of one size.
CONSTANT: frozenset[str] = frozenset({"signed_constant", "unsigned_constant", "xavier_constant"})
# Drawn numbers whose variance is by inputs and outputs (Glorot and Bengio, 2010).
XAVIER: frozenset[str] = frozenset({"xavier_normal", "xavier_constant"})

Shape = tuple[int, ...]

# Fields of `BankSpec` that came later: fingerprints of what was before have none of them.
_LATER = {"fan_mode": "fan_in", "aligned": False}


@dataclass(frozen=True)
class BankSpec:
    """Everything that decides a bank's numbers, but the model.

    Attributes:
        bank: "mp", "rp", "one_layer" or "own".
        init: Where prototypes come from: drawn from ``seed``, the model's own weights, or given
            ("stored": they lie in the adapter's file).
        seed: Seed of the drawn numbers.
        ratio: For "rp", the prototype's length as a share of the largest layer's.
        length: For "rp", the prototype's length itself; wins over ``ratio``.
        permute: For "rp", whether the tiled vector is permuted once.
        aligned: For "rp", whether numbers repeat after whole rows of a weight, or a whole number of
            times in each (`aligned_period`).
        scale_fan: Whether the variance is divided by ``density`` (edge-popup).
        fan_mode: What the variance of drawn numbers is divided by: inputs that an output sums over,
            or outputs that an input goes to.
        density: Share of ones, read only with ``scale_fan``.
    """

    bank: BankName
    init: InitName
    seed: int = 0
    ratio: float | None = None
    length: int | None = None
    permute: bool = False
    scale_fan: bool = False
    density: float = 0.5
    fan_mode: FanMode = "fan_in"
    aligned: bool = False

    def fan(self, fan_in: int, fan_out: int) -> int:
        """Return what a prototype's variance is divided by, of the weight that it comes from."""
        if self.init in XAVIER:
            return fan_in + fan_out
        return fan_in if self.fan_mode == "fan_in" else fan_out

    def as_dict(self) -> dict[str, object]:
        """Return the fields in plain values; one that came later only where it says something."""
        made = asdict(self)
        for name, default in _LATER.items():
            if made[name] == default:
                del made[name]
        return made

    @property
    def generated(self) -> bool:
        """Whether the numbers are others than the model's own, so that it needs none."""
        return self.init != "model"

    @property
    def drawn(self) -> bool:
        """Whether the seed makes the numbers."""
        return self.init not in ("model", "stored")


@dataclass(frozen=True)
class Prototype:
    """Where one prototype comes from and where it lies.

    Attributes:
        source: Name of the weight whose fan (and, with ``init="model"``, whose values) it has.
        fan: What the variance of drawn numbers is divided by, see `BankSpec.fan`.
        period: Number of different values drawn.
        length: Number of values stored.
        offset: Place of the first value in the bank's buffer.
    """

    source: str
    fan: int
    period: int
    length: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """The prototypes of one bank, before any number exists.

    Attributes:
        spec: What decides the numbers.
        by_shape: The prototype of each weight shape; the key ``()`` serves every shape.
    """

    spec: BankSpec
    by_shape: tuple[tuple[Shape, Prototype], ...]

    @property
    def floats(self) -> int:
        """Number of values that the bank stores."""
        return sum(prototype.length for _, prototype in self.by_shape)

    def find(self, shape: Shape) -> Prototype | None:
        """Return the prototype that fills this shape, or None where there is none."""
        prototype = next((found for key, found in self.by_shape if key in ((), shape)), None)
        if prototype is None or (not self._tiles and math.prod(shape) > prototype.length):
            return None
        return prototype

    def period(self, shape: Shape) -> int:
        """Return after how many numbers this shape's fill begins anew, or its size if it does not.

        Raises:
            LookupError: If no prototype fills it.
        """
        prototype = self.find(shape)
        if prototype is None:  # the plan refuses such a weight before anything is built
            message = f"The bank has no prototype for shape {tuple(shape)}."
            raise LookupError(message)
        if self.spec.aligned:
            return aligned_period(shape, prototype.length)
        return min(prototype.length, math.prod(shape))

    def stream(self, shape: Shape) -> tuple[str, int] | None:
        """Return the stream that fills this shape, and after how many numbers it begins anew.

        None where the numbers are not drawn, or not in the stream's order (``permute``).
        """
        prototype = self.find(shape)
        if prototype is None or not self.spec.drawn or prototype.length > prototype.period:
            return None
        period = self.period(shape) if self.spec.aligned else prototype.period
        return _stream(() if () in dict(self.by_shape) else shape), period

    def renamed(self, names: Mapping[str, str]) -> "Layout":
        """Return the layout of the same weights under other names."""
        made = ((s, replace(p, source=names.get(p.source, p.source))) for s, p in self.by_shape)
        return Layout(self.spec, tuple(made))

    def as_dict(self) -> dict[str, object]:
        """Return the layout in plain values, for fingerprints and messages."""
        return {"spec": self.spec.as_dict(), "by_shape": [[s, _told(p)] for s, p in self.by_shape]}

    @property
    def _tiles(self) -> bool:
        return self.spec.bank == "rp" and not self.spec.permute


def lay_out(spec: BankSpec, weights: Sequence[tuple[str, Shape, int]]) -> Layout:
    """Decide the prototypes for a model's weights.

    Args:
        spec: What decides the numbers; its ``bank`` is not "own".
        weights: (name, shape, fan) of every weight to fill, in the model's order; not empty.

    Returns:
        The layout: one vector for "mp" and "rp", one prototype a shape for "one_layer".
    """
    if spec.bank == "one_layer":
        return Layout(spec, _one_layer_prototypes(weights))
    name, shape, fan = max(weights, key=lambda weight: math.prod(weight[1]))
    largest = math.prod(shape)
    period = largest if spec.bank == "mp" else rp_length(spec, largest)
    length = largest if spec.permute else period
    return Layout(spec, (((), Prototype(name, fan, period, length, 0)),))


def aligned_period(shape: Shape, length: int) -> int:
    """Return after how many of a vector's numbers an aligned weight begins anew.

    All of the weight where the vector is as long; else as many whole rows as it has; else the
    largest divisor of a row that it has. Rows that begin at the same number have products with an
    input in common.

    Args:
        shape: Shape of the weight; a row is what lies behind its first dimension.
        length: Length of the vector, at least 1.
    """
    weights, row = math.prod(shape), math.prod(shape[1:])
    if length >= weights:
        return weights
    if length >= row:
        return length // row * row
    return next(divisor for divisor in range(length, 0, -1) if row % divisor == 0)


def rp_length(spec: BankSpec, largest: int) -> int:
    """Return the number of different values of "rp": ``int(N * ratio) + 1``, at most N."""
    wanted = spec.length if spec.length is not None else int(largest * (spec.ratio or 0.0)) + 1
    return min(wanted, largest)


def draw(spec: BankSpec, stream: str, fan: int, count: int) -> np.ndarray:
    """Draw the first values of a prototype from the seed.

    Standard deviation std = sqrt(2 / fan) (He et al. 2015, for ReLU; Glorot and Bengio 2010 where
    the fan is the sum of inputs and outputs) for every ``init``: "kaiming_normal",
    "xavier_normal", "kaiming_uniform", "signed_constant" and "xavier_constant" = +-std (Ramanujan
    et al. 2020, section 4.4). "unsigned_constant" is std itself, which nothing draws.

    Args:
        spec: What decides the numbers; they are drawn.
        stream: Name of the sequence.
        fan: What `BankSpec.fan` returned.
        count: How many values.

    Returns:
        Float32 array of shape (count,).
    """
    std = math.sqrt(2.0 / (fan * spec.density if spec.scale_fan else fan))
    if spec.init in ("kaiming_normal", "xavier_normal"):
        return rng.normal(spec.seed, stream, count, std)
    if spec.init == "kaiming_uniform":
        return rng.uniform(spec.seed, stream, count, math.sqrt(3.0) * std)
    if spec.init == "unsigned_constant":
        return np.full(count, std, dtype=np.float32)
    return rng.signs(spec.seed, stream, count, std)


def build(
    layout: Layout, weight_of: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device
) -> "Bank":
    """Make a bank's numbers, drawn or taken from weights; given ones make a `Bank` at once.

    Returns:
        The bank.
    """
    values = [
        _values(layout.spec, shape, prototype, weight_of) for shape, prototype in layout.by_shape
    ]
    return Bank(layout, torch.cat(values).to(device=device, dtype=dtype))


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that holds the values of all of these exactly."""
    return functools.reduce(torch.promote_types, dtypes)


class Bank(nn.Module):
    """The numbers themselves, in one non-persistent buffer.

    Layers may have different types (a float32 head on a bfloat16 body). The bank has the one that
    holds the values of all of them, so that each fill is rounded once, to its layer's type, and is
    what it would be in a model of that type alone. Casts of a part of the model leave the bank as
    it is; it follows when no layer needs its type any more.

    Attributes:
        layout: The prototypes.
        values: Float tensor of shape (layout.floats,): all prototypes, one behind the other.
    """

    values: Tensor

    def __init__(self, layout: Layout, values: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self._drawn_by: Counter[torch.dtype] = Counter()  # how many layers of each type
        self._is_listed = False
        self.register_buffer("values", values, persistent=False)

    def add_layer(self, dtype: torch.dtype) -> None:
        """Note that a layer of this type draws its fill from here."""
        self._drawn_by[dtype] += 1

    def recast_layer(self, before: torch.dtype, after: torch.dtype) -> None:
        """Note that a layer has been cast; take on the type that all layers now need."""
        self._drawn_by[before] -= 1
        self._drawn_by[after] += 1
        self.values = self.values.to(common_dtype(+self._drawn_by))

    def _apply(self, fn: Any, recurse: bool = True) -> "Bank":
        """Move, but leave the type to `recast_layer`: one layer's cast is not that of all.

        Nor are the numbers given up (``to_empty``): no state dict would bring them back.
        """
        before = self.values
        super()._apply(fn, recurse)
        if self._drawn_by and self.values.dtype != before.dtype:
            self.values = before.to(self.values.device)
        elif self.values is not before and not before.is_meta and not self.values.is_meta:
            self.values.copy_(before)
        return self

    def forward(self, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """Return the fill of a weight: the prototype, tiled where it is shorter, cut to n values.

        Args:
            shape: Shape of the weight.
            dtype: Type that the values are rounded to; None leaves them as they are.

        Returns:
            Tensor of that shape; a view of the bank unless it had to be tiled or rounded.
        """
        values, weights = self.period(shape, dtype), math.prod(shape)
        period = self.layout.period(tuple(shape))  # whoever traces takes sizes of tensors for data
        if weights > period:
            values = values.repeat(-(-weights // period))
        return values[:weights].view(shape)

    def period(self, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """Return the numbers of a fill as one row, each but once: they repeat in the weight.

        Returns:
            Tensor of shape (n,), or shorter; a view of the bank unless it had to be rounded.
        """
        count = self.layout.period(tuple(shape))
        prototype = cast("Prototype", self.layout.find(tuple(shape)))
        values = self.values.narrow(0, prototype.offset, count)
        return values if dtype in (None, values.dtype) else values.to(dtype)

    def prototypes(self, dtype_of: Callable[[str], torch.dtype]) -> Iterator[Tensor]:
        """Yield the values of each prototype, in the type of the weight that they come from."""
        for _, prototype in self.layout.by_shape:
            values = self.values[prototype.offset : prototype.offset + prototype.length]
            yield values.to(dtype_of(prototype.source))

    def take_place_in_list(self) -> bool:
        """Tell the first layer that holds the bank, and no other, that it is the first."""
        first, self._is_listed = not self._is_listed, True
        return first

    def makes(self, shape: Shape, dtype: torch.dtype | None) -> bool:
        """Tell whether a weight's fill is a new tensor: the prototype is shorter, or rounded."""
        is_tiled = math.prod(shape) > self.layout.period(tuple(shape))
        return is_tiled or dtype != self.values.dtype

    def extra_repr(self) -> str:
        """Show what the bank holds."""
        spec = self.layout.spec
        return f"{spec.bank}, {spec.init}, seed={spec.seed}, floats={self.layout.floats}"


def _one_layer_prototypes(
    weights: Sequence[tuple[str, Shape, int]],
) -> tuple[tuple[Shape, Prototype], ...]:
    """One prototype a shape: the first weight of that shape."""
    prototypes: dict[Shape, Prototype] = {}
    offset = 0
    for name, shape, fan in weights:
        if shape not in prototypes:
            count = math.prod(shape)
            prototypes[shape] = Prototype(name, fan, count, count, offset)
            offset += count
    return tuple(prototypes.items())


def _told(prototype: Prototype) -> dict[str, object]:
    """Return a prototype in plain values; its fan has the name that fingerprints know it by."""
    made = asdict(prototype)
    return {"fan_in": made.pop("fan"), **made}


def _stream(shape: Shape) -> str:
    """MP and RP read one stream: the vector of RP is the beginning of MP's, as in the paper."""
    return "bank" if not shape else "bank/" + "x".join(map(str, shape))


def _values(
    spec: BankSpec, shape: Shape, prototype: Prototype, weight_of: Callable[[str], Tensor]
) -> Tensor:
    if spec.drawn:
        drawn = draw(spec, _stream(shape), prototype.fan, prototype.period)
        values = torch.from_numpy(drawn)
    else:
        values = weight_of(prototype.source).detach().reshape(-1)[: prototype.period].clone()
    if prototype.length > prototype.period:
        order = torch.from_numpy(rng.permutation(spec.seed, "permutation", prototype.length))
        values = values.repeat(-(-prototype.length // prototype.period))[: prototype.length]
        values = values[order.to(values.device)]
    return values
