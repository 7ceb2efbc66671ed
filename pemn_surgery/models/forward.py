"""Who uses which weight: a forward on shapes alone, watched operator by operator.

A weight that a model reads without calling its layer (``F.linear(x, self.qkv.weight, bias)``), a
raw parameter that it multiplies with (experts, XLNet's projections), a weight that is used twice,
never, or written in place: none of that can be seen from the modules alone. So a copy of the model
whose parameters have shapes but no values is run once. torch.fx's symbolic tracing fails on nearly
every transformers model and ``torch.export`` takes seconds to minutes; watching operator calls
finds the same uses (``tests/models/test_forward.py`` compares the three) at the price of one
forward on the meta device.

Values that the forward asks for although there are none are made up (`shapes`): ones, and in a
second try zeros. A few forwards decide by what a weight made (segments of an entropy, predicted
durations) and fit with no made-up values; if such a model is small, a copy of it really runs.
"""

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from pemn_surgery.errors import TraceError
from pemn_surgery.models.inputs.examples import example_inputs
from pemn_surgery.models.watcher import Use, Watcher

_LONGEST_PROBLEM = 300

# Bytes of a model below which a copy of it may be run.
_SMALL = 1 << 30


@dataclass(frozen=True)
class Trace:
    """What one forward does with the parameters of two or more dimensions.

    Attributes:
        uses: Every kind of use, in the order of the forward.
        written: Parameters that the forward changes in place, with file and line.
        chosen_by: Parameters by whose product with an input the forward chooses: routers and
            codebooks.
    """

    uses: tuple[Use, ...]
    written: Mapping[str, str]
    chosen_by: Sequence[str] = ()

    def of(self, name: str) -> Sequence[Use]:
        """Return the uses of one parameter."""
        return self.by_name.get(name, ())

    def multiplies(self, name: str) -> bool:
        """Tell whether an input is multiplied with a parameter."""
        return any(use.role == "product" for use in self.of(name))

    def looks_up(self, name: str) -> bool:
        """Tell whether rows of a parameter are looked up: it is a table, whatever else it is."""
        return any(use.role == "rows" for use in self.of(name))

    def unknown_operator(self, name: str) -> str:
        """Return an operator that takes a parameter and is not torch's, or ""."""
        found = (use.operator for use in self.of(name) if use.role == "unknown")
        return next(found, "")

    @functools.cached_property
    def by_name(self) -> Mapping[str, Sequence[Use]]:
        """The uses by parameter."""
        found: dict[str, list[Use]] = defaultdict(list)
        for use in self.uses:
            found[use.name].append(use)
        return dict(found)


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Trace:
    """Find every use of every parameter of two or more dimensions in one forward.

    Nothing of the model is touched; its parameters take part by their shapes alone. Only where that
    cannot work, and the model takes less than 1 GiB, is a copy with its values run.

    Args:
        model: Any model, also one on the meta device.
        inputs: Keyword arguments of its forward; tensors of any device. None makes them from the
            model's configuration (`example_inputs`).

    Returns:
        The uses.

    Raises:
        TraceError: If the model cannot be copied, has no example inputs, or its forward does not
            run.
    """
    problems = []
    ways = [(_on_meta, 1), (_on_meta, 0)]  # another value, perhaps another turn
    if _can_really_run(model):
        ways.append((_on_cpu, 0))
    for way, made_up in ways:
        try:
            return _trace(_copy(model, way), inputs, made_up)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    message = f"The forward of {type(model).__name__} could not be followed: {problems[0]}"
    raise TraceError(message[:_LONGEST_PROBLEM])


def _trace(copied: nn.Module, inputs: Mapping[str, Any] | None, made_up: int) -> Trace:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if inputs is None:
            with Watcher(copied, made_up):  # it may have to run a part of the model
                inputs = example_inputs(copied)
        values = pytree.tree_map_only(Tensor, _on_cpu, dict(inputs))
        watcher = Watcher(copied, made_up)
        watcher.watch(copied, values)
    return Trace(watcher.uses(), watcher.written, tuple(watcher.chosen_by))


def _copy(model: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy in eval mode whose parameters a function has made."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(copied(parameter), requires_grad=False)
    for tensor in (*model.buffers(), *_computed(model)):
        memo[id(tensor)] = _on_cpu(tensor)
    return copy.deepcopy(model, memo).eval()


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Yield what hooks leave on modules, which torch does not copy: a pruned weight."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value


def _can_really_run(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        return False
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) < _SMALL


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, or on the meta device if the tensor is there."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu().clone()
