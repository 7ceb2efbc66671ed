"""Which tensor a name is: for who reads, writes, exports or saves it, or moves what is stored.

A *place* is a module and a name under which it stores a tensor, in its tables of parameters and
buffers; a tied tensor has several. Where adapters make or choose the tensor, whoever looks into the
tables without asking finds what is stored, and the active adapter has another one for the name.

* Who reads ``module.name`` gets what is in force (the properties of a swapped class).
* Who writes ``module.name = value``, by ``register_parameter`` or ``register_buffer`` too, writes
  what they would read: the active adapter's tensor, else the stored one (its methods).
* Who exports - ``named_parameters`` and ``state_dict``, under the base's names - finds what is
  stored: the base; while adapters are merged what is in force, and the base is set `Aside`.
* Who saves an adapter gets what the adapter holds.
* Who moves what is stored, reads and writes that (`moves_stored`).
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

# Where a module whose tensor is tied keeps the child of the first module, by the name here.
SHARED_MASKS = "_pemn_shared_masks"  # the MaskedWeight
SHARED_TENSORS = "_pemn_shared_tensors"  # the TaskTensors and the tensor's name there

# Python modules that shard, copy or load what is stored, by the beginning of their names.
FSDP = "torch.distributed.fsdp"
_MOVERS = (FSDP, "torch.nn.parallel.replicate", "torch.nn.modules.module")

Place = tuple[nn.Module, str]


def moves_stored(caller: str) -> bool:
    """Tell whether a Python module shards, copies or loads what is stored."""
    return caller.startswith(_MOVERS)


def stored(module: nn.Module, name: str) -> Tensor | None:
    """Return what a module stores under a name; None where that is nothing.

    FSDP1 and torch's replicas hold plain tensors as attributes.
    """
    for table in _tables(module):
        tensor = table.get(name)
        if tensor is not None:
            return tensor
    return None


def has_place(module: nn.Module, name: str) -> bool:
    """Tell whether a module stores something under a name, if only that there is nothing."""
    parameters, buffers, attributes = _tables(module)
    return name in parameters or name in buffers or name in attributes


def store(place: Place, tensor: Tensor | None) -> None:
    """Store a tensor where a module stores the one of this name now."""
    module, name = place
    table = next((table for table in _tables(module) if name in table), module.__dict__)
    table[name] = tensor


def as_stored(value: Tensor, like: Tensor | None) -> Tensor:
    """Return a copy of a tensor of the kind, parameter or not, of what is stored now."""
    values = value.detach().clone()
    is_parameter = like is None or isinstance(like, nn.Parameter)
    return nn.Parameter(values, requires_grad=False) if is_parameter else values


class Aside:
    """What is stored in places, while something else is shown to whoever exports."""

    def __init__(self) -> None:
        self._held: list[tuple[Place, Tensor | None]] = []

    def __bool__(self) -> bool:
        return bool(self._held)

    def show(self, places: Iterable[Place], tensor: Tensor) -> None:
        """Store a tensor in all places of one name; what was stored there is set aside once."""
        known = [place for place, _ in self._held]
        for place in places:
            if place not in known:
                self._held.append((place, stored(*place)))
            store(place, tensor)

    def original(self, module: nn.Module, name: str) -> Tensor | None:
        """Return what is stored in a place, whatever is shown there."""
        for place, tensor in self._held:
            if place == (module, name):
                return tensor
        return stored(module, name)

    def put_back(self) -> None:
        """Store everything where it was."""
        for place, tensor in self._held:
            store(place, tensor)
        self._held.clear()

    def cast(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do to what is set aside what ``nn.Module._apply`` does to what is stored."""
        done: dict[int, Any] = {}
        for index, (place, tensor) in enumerate(self._held):
            if tensor is not None and id(tensor) not in done:
                done[id(tensor)] = _cast(tensor, fn)
            self._held[index] = place, None if tensor is None else done[id(tensor)]


def _cast(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a buffer's new value, or a parameter that has one: it stays the same object."""
    if not isinstance(tensor, nn.Parameter):
        return fn(tensor)
    tensor.data = fn(tensor.data)
    return tensor


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    parameters: Any = module._parameters
    return parameters, module._buffers, module.__dict__
