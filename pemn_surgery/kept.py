"""When an effective weight that was made may serve the next read."""

from torch import Tensor, nn


class Sources:
    """What one effective weight was made from. It holds the tensors, so that no id is reused."""

    def __init__(
        self, names: tuple[str, ...], mode: tuple[bool, bool], tensors: list[Tensor]
    ) -> None:
        # The aliases keep replaced data from being freed and its address from being used again.
        self.tensors = [(tensor, tensor.detach()) for tensor in tensors]
        versions = [(id(t), t._version, t.data_ptr(), t.dtype, t.requires_grad) for t in tensors]
        self.state = (names, mode, versions)


class Kept:
    """The kept effective weight; never copied or pickled with its layer.

    It goes when a gradient passes through it: whatever then changes the scores, it is made anew.
    Weight and sources are one value, so that another thread finds both or neither.
    """

    def __init__(self) -> None:
        self._held: tuple[Sources, Tensor] | None = None

    @property
    def weight(self) -> Tensor | None:
        """The kept weight, or None."""
        held = self._held
        return None if held is None else held[1]

    @property
    def sources(self) -> Sources | None:
        """What it was made from, or None."""
        held = self._held
        return None if held is None else held[0]

    def serve(self, sources: Sources) -> Tensor | None:
        """Return the kept weight if it was made from exactly these sources, or None."""
        held = self._held
        return held[1] if held is not None and held[0].state == sources.state else None

    def keep(self, weight: Tensor, sources: Sources) -> None:
        """Keep a weight until its sources change or its gradient is computed."""
        self._held = (sources, weight)
        if weight.requires_grad and not weight.is_leaf:
            weight.register_hook(self._gradient_passed)

    def clear(self) -> None:
        """Forget the kept weight."""
        self._held = None

    def _gradient_passed(self, _grad: Tensor) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


def is_untracked(tensor: Tensor) -> bool:
    """Whether changes of a tensor cannot be seen: no versions, no values, or a subclass."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return not plain or tensor.is_meta or tensor.is_inference()
