"""The task's other tensors: norms, their running statistics, biases, a position embedding.

Beside its masks an adapter owns some unmasked tensors of the model. Each module that has such
tensors carries one child, `TaskTensors`, with one `TensorSet` per adapter; the module's own tensors
stay as they are and serve while adapters are disabled.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.errors import AdapterError
from pemn_surgery.masks import in_force, places
from pemn_surgery.masks.in_force import InForce
from pemn_surgery.masks.mixture import Mixture
from pemn_surgery.masks.places import SHARED_TENSORS, Aside, Place

# The attribute that holds a module's `TaskTensors`.
TASK_CHILD = "task_tensors"


class TensorSet(nn.Module):
    """One adapter's copies of one module's tensors, under the same names.

    Trained tensors are parameters; tensors that only move (statistics) or only have to be saved
    are buffers, so that nothing ever asks them for a gradient.

    Attributes:
        keeps_eval: Whether the module stays in eval mode while this adapter trains.
        first_rows: Of tables with new rows (added tokens), by name: how many rows before those that
            the adapter has are the module's own; 0 where the adapter has all.
    """

    def __init__(self, *, keeps_eval: bool) -> None:
        super().__init__()
        self.keeps_eval = keeps_eval
        self.first_rows: dict[str, int] = {}

    def add(
        self,
        name: str,
        base: Tensor,
        *,
        trained: bool,
        saved: bool,
        shared: bool = False,
        first_row: int | None = None,
    ) -> None:
        """Take a copy of one of the module's tensors, or of its last rows.

        Args:
            name: Its name on the module.
            base: Its value, of shape (rows, ...); of last rows these alone.
            trained: Whether it becomes a parameter.
            saved: Whether it is part of the state dict.
            shared: Whether to take the tensor itself instead, so that its memory is needed once.
            first_row: Of a table with new rows the number of rows before these that stay the
                module's own.
        """
        if first_row is not None:
            self.first_rows[name] = first_row
        value = base.detach() if shared else base.detach().clone()
        if not trained:
            self.register_buffer(name, value, persistent=saved)
        elif shared and isinstance(base, nn.Parameter):
            self.register_parameter(name, base)  # the same object: .to() keeps it one tensor
        else:
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, name: str) -> Tensor | None:
        """Return the tensor of this name, or None where this adapter has none.

        Reading is a call, so that hooks which bring offloaded tensors in (accelerate) run.
        """
        return places.stored(self, name) if self.holds(name) else None

    def holds(self, name: str) -> bool:
        """Tell whether this adapter has a tensor of this name; torch's replicas have no tables."""
        in_replica = self.__dict__.get("_former_parameters", ())
        return name in self._parameters or name in self._buffers or name in in_replica

    def replace(self, name: str, value: Tensor) -> None:
        """Take a tensor in place of the one of this name, as trained or not as that was."""
        trained = name in self._parameters
        own = value if trained or not isinstance(value, nn.Parameter) else value.detach()
        places.store((self, name), own)


class TaskTensors(nn.Module):
    """Chooses between a module's own tensors and those of the active adapter.

    Attributes:
        target: Path of the module within the model.
        shared_with: Further modules (and tensor names) that hold the same, tied tensor.
        pemn_tensors: The tensor sets by adapter name.
        mixture: While set, tensors are read mixed, and what the forward assigns is not kept.
    """

    def __init__(self, owner: nn.Module, target: str) -> None:
        super().__init__()
        # In a list, so that the owner is not registered as a child of its own child.
        self._owner = [owner]
        self.shared_with: list[tuple[nn.Module, str]] = []
        self.target = target
        self.mixture: Mixture | None = None
        self.aside = Aside()
        self.pemn_tensors = nn.ModuleDict()

    @property
    def owner(self) -> nn.Module:
        """The module whose tensors these replace."""
        return self._owner[0]

    def belong_to(self, owner: nn.Module) -> None:
        """Serve another module: torch's replicas get replicas of their children."""
        self._owner = [owner]

    def active_adapter_names(self) -> Sequence[str]:
        """Return the active adapters; without PEFT every adapter is."""
        return list(self.pemn_tensors.keys())

    def now(self) -> InForce:
        """Return what is in force by the attributes."""
        sets = self._sets()
        names = tuple([name for name in self.active_adapter_names() if name in sets])
        return InForce(names, None, self.mixture)

    def _sets(self) -> dict[str, Any]:
        """Return the sets by adapter name, past torch's slow search for a module's attributes."""
        containers: Any = self._modules
        return containers["pemn_tensors"]._modules

    def holds(self, name: str) -> bool:
        """Tell whether an adapter has tensors of this module."""
        return name in self._sets()

    def parts_of(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield the parameters of adapters' tensor sets."""
        for name in names:
            yield from self._set_of(name).parameters()

    def _set_of(self, adapter: str) -> "TensorSet":
        """Return an adapter's tensors, which a call may have found that somebody has deleted."""
        tensors = self._sets().get(adapter)
        if tensors is not None:
            return tensors
        message = in_force.DELETED.format(f"tensors of {self.target!r}", adapter)
        raise AdapterError(message)

    def base(self, name: str) -> Tensor | None:
        """Return the module's own tensor.

        Raises:
            AttributeError: If the module has none of this name at the moment.
        """
        if places.has_place(self.owner, name):
            return self.aside.original(self.owner, name)
        message = f"{type(self.owner).__name__!r} object has no attribute {name!r}"
        raise AttributeError(message)

    def read(self, name: str) -> Tensor | None:
        """Return the tensor in force: the first active adapter's that has one, else the own one.

        A trained copy may be wider than the base (float32 beside bfloat16); it is read in the
        base's dtype.
        """
        base = self.base(name)
        if base is None or (base.is_meta and self._is_offloaded()):
            return base
        names, _, mixture = in_force.read(self)
        owned = self._first(name, names) if mixture is None else self._mixed(name, base, mixture)
        if owned is None:
            return base
        return owned if owned.dtype == base.dtype else owned.to(base.dtype)

    def forward(self, name: str) -> Tensor | None:
        """Return the tensor in force, for graphs, which call where a module's code would read."""
        return self.read(name)

    def active_tensor(self, name: str) -> Tensor | None:
        """Return the first active adapter's tensor of this name, or None."""
        return self._first(name, in_force.read(self).names)

    def _first(self, name: str, adapters: Iterable[str]) -> Tensor | None:
        """Return the first of these adapters' tensor of this name, or None."""
        for adapter in adapters:
            tensors = self._set_of(adapter)
            if tensors.holds(name):
                return self._whole(tensors, name)
        return None

    def new_rows(self, name: str, adapters: Iterable[str]) -> Tensor | None:
        """Return the rows that the first of some adapters has beside a tensor's own, or None."""
        for adapter in adapters:
            held = self.pemn_tensors._modules.get(adapter)
            if isinstance(held, TensorSet) and name in held.first_rows:
                return held(name)
        return None

    def grown_tensors(self) -> list[str]:
        """Return the names of the tensors that some adapter has new rows of."""
        held = (cast("TensorSet", one).first_rows for one in self.pemn_tensors.values())
        return list(dict.fromkeys(name for rows in held for name in rows))

    def first_rows(self, name: str) -> list[int]:
        """Return, for each adapter with new rows of a tensor, the number of rows before its own."""
        held = (cast("TensorSet", one).first_rows for one in self.pemn_tensors.values())
        return [rows[name] for rows in held if name in rows]

    def _whole(self, tensors: TensorSet, name: str) -> Tensor | None:
        """Return an adapter's tensor; before rows that are new the module's own."""
        value, first = tensors(name), tensors.first_rows.get(name)
        base = self.base(name) if first else None
        if value is None or base is None:
            return value
        return torch.cat([base[:first], value.to(base.dtype)])

    def _mixed(self, name: str, base: Tensor, mixture: Mixture) -> Tensor:
        """Return the mixture; an adapter without such a tensor adds the module's own.

        Only parameters pass gradients on: torch refuses running statistics that ask for one.
        """
        held = [self._tensor_of(adapter, name) for adapter in mixture.names]
        mixed = mixture.of_tensors([base if tensor is None else tensor for tensor in held])
        return mixed if name in self.owner._parameters else mixed.detach()

    def _tensor_of(self, adapter: str, name: str) -> Tensor | None:
        if adapter not in self.pemn_tensors:
            return None
        tensors = cast("TensorSet", self.pemn_tensors[adapter])
        return self._whole(tensors, name) if tensors.holds(name) else None

    def write(self, name: str, value: Tensor | None) -> bool:
        """Replace what a reader gets; return False where that is the module's own tensor.

        What is written to a mixture belongs to no adapter and is dropped.
        """
        names, _, mixture = in_force.read(self)
        for adapter in names if mixture is None else mixture.names:
            held = self.pemn_tensors._modules.get(adapter)
            if value is not None and isinstance(held, TensorSet) and self._takes(held, name, value):
                if mixture is None:
                    held.replace(name, value)
                    self._follow(name, value)
                return True
        return False

    def _takes(self, held: TensorSet, name: str, value: Tensor) -> bool:
        """Tell whether an adapter has a tensor of this name; torch refuses others as parameters."""
        is_parameter = name in held._parameters
        return held.holds(name) and (isinstance(value, nn.Parameter) or not is_parameter)

    def _follow(self, name: str, value: Tensor) -> None:
        """Let the module's own tensor follow to another shape: the former fits the module no more.

        While adapters are merged, what is shown follows too.
        """
        base = self.base(name)
        if base is not None and base.shape != value.shape:
            was_shown = bool(self.aside)
            self.aside.put_back()
            for place in self._places(name):
                places.store(place, places.as_stored(value.to(base.dtype), base))
            if was_shown:
                self.show()
        elif self.aside:
            self.show()

    def show(self) -> None:
        """Store what is in force in the module, where whoever exports finds it."""
        for name in self._names_in_force():
            value, base = self.active_tensor(name), self.base(name)
            if value is not None and base is not None:
                shown = places.as_stored(value.to(base.dtype), base)
                self.aside.show(self._places(name), shown)

    def _names_in_force(self) -> list[str]:
        sets = [self._set_of(adapter) for adapter in self.now().names]
        return list(dict.fromkeys(n for one in sets for n in (*one._parameters, *one._buffers)))

    def _places(self, name: str) -> list[Place]:
        """Return all modules and names under which a tensor is tied to this one."""
        tied = (
            (module, other)
            for module, other in self.shared_with
            if module.__dict__[SHARED_TENSORS][other][1] == name
        )
        return [(self.owner, name), *tied]

    def _apply(self, fn: Any, recurse: bool = True) -> "TaskTensors":
        self.aside.cast(fn)
        super()._apply(fn, recurse)
        return self

    def _is_offloaded(self) -> bool:
        """Whether accelerate has taken the module's tensors out: it reads the place, not values."""
        return "_hf_hook" in self.owner.__dict__

    def keeps_eval(self) -> bool:
        """Tell whether an active adapter wants the module to stay in eval mode."""
        active = self.active_adapter_names()
        return any(
            self.pemn_tensors[name].keeps_eval for name in active if name in self.pemn_tensors
        )

    def extra_repr(self) -> str:
        """Show the owner."""
        return self.target
