"""When an effective weight that was made may serve the next read.

What it is made of can be written without a trace: ``parameter.data.mul_(.5)`` changes neither the
parameter nor its version. So a weight outlasts the forward that made it only where nobody trains -
in eval mode, frozen numbers under bits, or under scores while no gradient is asked for -, and then
it is served after a look at a sample of those numbers and scores, some of every row and of every
column of each tensor (`spaced`), and at the masks' headers. A step of any of torch's optimizers
ends what scores made. Everything else is made anew for each forward, and the forward keeps it, so
that a layer that runs twelve times in one is masked once. Outside of forwards nothing else is kept.
"""

import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pemn_surgery.coding.header import HEADER_BYTES

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_STEPS = itertools.count(1)
_steps_taken = 0


def _count_step(*_: object) -> None:
    global _steps_taken
    _steps_taken = next(_STEPS)


register_optimizer_step_post_hook(_count_step)


def steps_taken() -> int:
    """Return how many steps torch's optimizers have taken in this process, on whatever model.

    Some write through ``.data``, which no version counts.
    """
    return _steps_taken


class Sources:
    """What one effective weight is made from, and what tells these tensors from others."""

    def __init__(
        self, names: tuple[str, ...], mode: tuple[object, ...], tensors: list[Tensor]
    ) -> None:
        self.tensors = tensors
        versions = [(id(t), t._version, t.data_ptr(), t.dtype, t.requires_grad) for t in tensors]
        self.state = (names, mode, versions)


class _Held(NamedTuple):
    """A kept weight and all about it: one value, so that another thread finds all or nothing.

    Attributes:
        sources: What it was made from; held, so that no id is used again.
        aliases: Of what these held then, so that no address is used again.
        weight: The weight.
        version: How often it had been written to.
    """

    sources: Sources
    aliases: list[Tensor]
    weight: Tensor
    version: int


class Kept:
    """The kept effective weight; never copied or pickled with its layer."""

    def __init__(self) -> None:
        self._held: _Held | None = None

    @property
    def weight(self) -> Tensor | None:
        """The kept weight, or None."""
        held = self._held
        return None if held is None else held.weight

    @property
    def sources(self) -> Sources | None:
        """What it was made from, or None."""
        held = self._held
        return None if held is None else held.sources

    def serve(self, sources: Sources) -> Tensor | None:
        """Return the kept weight if it was made from exactly these sources, or None.

        Nor is it served after somebody has written into it in place.
        """
        held = self._held
        if held is None or held.sources.state != sources.state:
            return None
        return held.weight if held.version == _version(held.weight) else None

    def keep(self, weight: Tensor, sources: Sources) -> None:
        """Keep a weight until its sources change."""
        aliases = [tensor.detach() for tensor in sources.tensors]
        self._held = _Held(sources, aliases, weight, _version(weight))

    def clear(self) -> None:
        """Forget the kept weight."""
        self._held = None

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return type(self), ()


class _Sample(NamedTuple):
    """Numbers of a tensor where they lie, and as they were."""

    there: Tensor
    then: Tensor


class Lasting(Kept):
    """A kept weight that outlasts forwards, while a sample of its sources stays what it was.

    All that one forward served is looked at together at the beginning of the next: one comparison,
    for which a GPU is waited for once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[_Sample] = []
        self.served_with: tuple[weakref.ref[Lasting], ...] = (weakref.ref(self),)

    def serve(self, sources: Sources) -> Tensor | None:
        """Return the kept weight if it was made from these sources, and they look as they did."""
        weight, forward = super().serve(sources), _FORWARD.get()
        if weight is None or (forward is not None and self in forward.served):
            return weight
        if forward is None:
            _look_at([self])
        else:
            forward.look_at(self)
        return weight if weight is self.weight else None

    def keep(self, weight: Tensor, sources: Sources) -> None:
        """Keep a weight until its sources change, or look as if they had."""
        self.samples = [_take(tensor) for tensor in sources.tensors]
        super().keep(weight, sources)
        forward = _FORWARD.get()
        if forward is not None:
            forward.served.add(self)

    def clear(self) -> None:
        """Forget the kept weight and the samples."""
        super().clear()
        self.samples = []


class _Forward:
    """What the forward that runs has made, and which lasting weights it has served."""

    def __init__(self) -> None:
        self.made: dict[nn.Module, Kept] = {}
        self.served: set[Lasting] = set()
        self._looked_at: set[Lasting] = set()

    def look_at(self, kept: Lasting) -> None:
        """Look at a lasting weight, and whatever was served with it the last time."""
        if kept not in self._looked_at:
            found = {other for ref in kept.served_with if (other := ref()) is not None}
            new = {kept, *found} - self._looked_at - self.served
            _look_at(new)
            self._looked_at |= new
        self.served.add(kept)

    def end(self) -> None:
        """Let what was served be looked at together."""
        together = tuple(map(weakref.ref, self.served))
        for kept in self.served:
            kept.served_with = together


_FORWARD: ContextVar[_Forward | None] = ContextVar("pemn_forward", default=None)


@contextmanager
def one_forward() -> Iterator[None]:
    """Keep every weight that is made inside until the end; within another one nothing changes."""
    if torch.compiler.is_compiling() or _FORWARD.get() is not None:
        yield
        return
    forward = _Forward()
    token = _FORWARD.set(forward)
    try:
        yield
    finally:
        _FORWARD.reset(token)
        forward.end()


@contextmanager
def apart() -> Iterator[None]:
    """Free what a part of a forward makes when it ends: checkpointed, it is made again later."""
    forward = None if torch.compiler.is_compiling() else _FORWARD.get()
    if forward is None:
        yield
        return
    before, forward.made = forward.made, dict(forward.made)
    try:
        yield
    finally:
        forward.made = before


def in_this_forward(layer: nn.Module) -> Kept | None:
    """Return what the forward that runs has kept for a layer; None outside of forwards."""
    forward = _FORWARD.get()
    return None if forward is None else forward.made.setdefault(layer, Kept())


def is_untracked(tensor: Tensor) -> bool:
    """Whether changes of a tensor cannot be seen: no versions, no values, or a subclass.

    Nor is what DeepSpeed gathers for the length of a call (``ds_id``) to be held longer.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and not hasattr(tensor, "ds_id")
    return not plain or tensor.is_meta or tensor.is_inference()


def spaced(tensor: Tensor) -> Tensor:
    """Return numbers of a tensor that lie evenly spaced, as a view of shape (n,).

    Of a matrix there is at least one number of every row and of every column: the stride is no
    larger than either number, and prime to that of the columns; about max(rows, columns) in all.
    What has more axes is a matrix in the order of memory, as nearly square as can be. Of a vector
    of n numbers there is one of every stretch of sqrt(n).
    """
    by_stride = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    ordered = tensor.permute(by_stride)
    if not ordered.is_contiguous():
        return tensor
    rows, columns = _as_matrix(ordered.shape)
    stride = max(min(rows, columns), 1)
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return ordered.reshape(-1)[::stride]


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Return the rows and columns of the most nearly square matrix; of a vector, of any."""
    counts = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    rows, columns = max(counts, key=min, default=(1, 0))
    if min(rows, columns) > 1:
        return rows, columns
    rows = math.isqrt(shape.numel())
    return rows, shape.numel() // max(rows, 1)


def _take(tensor: Tensor) -> _Sample:
    """Return a sample of a tensor, as integers: those compare bit for bit, NaN too.

    Bytes are a stored mask, whose header has the checksum of all of them.
    """
    whole = tensor.detach()
    there = whole[:HEADER_BYTES] if whole.dtype == torch.uint8 else spaced(whole)
    there = there.view(_INTEGERS[there.element_size()])
    return _Sample(there, there.clone())


def _look_at(kept: Iterable[Lasting]) -> None:
    """Forget those weights whose sources are no longer what they were.

    A graph of CUDA operations cannot wait for a comparison while it is recorded, nor ask for one
    when it runs.
    """
    samples = {weight: weight.samples for weight in kept}
    if _is_recorded(samples.values()) or _are_as_they_were(samples.values()):
        return
    for weight, taken in samples.items():
        if not _are_as_they_were([taken]):
            weight.clear()


def _is_recorded(samples: Iterable[list[_Sample]]) -> bool:
    on_cuda = any(sample.there.is_cuda for taken in samples for sample in taken)
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _are_as_they_were(samples: Iterable[list[_Sample]]) -> bool:
    """Tell whether all samples are; what must be waited for is compared at once."""
    waiting: dict[tuple[torch.device, torch.dtype], list[_Sample]] = defaultdict(list)
    for taken in samples:
        for sample in taken:
            there, then = sample
            if _is_waited_for(there):
                waiting[there.device, there.dtype].append(sample)
            elif not torch.equal(there, then):
                return False
    return all(torch.equal(_joined(s.there for s in same), _joined(s.then for s in same))
               for same in waiting.values())  # fmt: skip


def _is_waited_for(tensor: Tensor) -> bool:
    """Tell whether numbers are where asking for an answer waits for all that was begun: a GPU."""
    return not tensor.is_cpu


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _version(weight: Tensor) -> int:
    """Return how often a weight was written to in place; inference tensors do not count it."""
    return 0 if weight.is_inference() else weight._version
