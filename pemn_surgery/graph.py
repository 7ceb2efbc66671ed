"""Who uses which weight: a forward on shapes alone, watched operator by operator.

A weight that a model reads without calling its layer (``F.linear(x, self.qkv.weight, bias)``), a
raw parameter that it multiplies with (experts, XLNet's projections), a weight that is used twice,
never, or written in place: none of that can be seen from the modules alone. So a copy of the model
whose parameters have shapes but no values is run once. torch.fx's symbolic tracing fails on nearly
every transformers model and ``torch.export`` takes seconds to minutes; watching operator calls
finds the same uses (``tests/test_graph.py`` compares the three) at the price of one forward on the
meta device.

Values that the forward asks for although there are none are made up (`shapes`): ones, and in a
second try zeros. A few forwards decide by what a weight made (segments of an entropy, predicted
durations) and fit with no made-up values; if such a model is small, a copy of it really runs.
"""

import copy
import functools
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pemn_surgery.errors import TraceError
from pemn_surgery.inputs import example_inputs
from pemn_surgery.operators import JOINS, LAYERS, is_at, is_in_place, is_product
from pemn_surgery.shapes import Call

# What takes one of its parts from a tensor, by places that may come from the input.
_PARTS = ("__getitem__", "index_select", "gather", "take_along_dim", "select")

_LONGEST_PROBLEM = 300

# Bytes of a model below which a copy of it may be run.
_SMALL = 1 << 30

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Use:
    """One way in which a forward uses one parameter.

    Attributes:
        name: The parameter.
        operator: The torch function that takes it (or a view of it).
        multiplies: Whether it is the weight of a product with an input, not added or looked up.
        module: Path of the module whose forward calls the operator.
        is_own: Whether that is the parameter's own module, or within it.
        where: File and line of the call, where it is not the parameter's own module.
        count: How often that happens in one forward.
    """

    name: str
    operator: str
    multiplies: bool
    module: str
    is_own: bool
    where: str = ""
    count: int = 1


@dataclass(frozen=True)
class Trace:
    """What one forward does with the parameters of two or more dimensions.

    Attributes:
        uses: Every kind of use, in the order of the forward.
        written: Parameters that the forward changes in place, with file and line.
    """

    uses: tuple[Use, ...]
    written: Mapping[str, str]

    def of(self, name: str) -> Sequence[Use]:
        """Return the uses of one parameter."""
        return self.by_name.get(name, ())

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
    copies = [(_without_values, 1), (_without_values, 0)]  # another value, perhaps another turn
    if _can_really_run(model):
        copies.append((_with_values, 0))
    for copied, made_up in copies:
        try:
            return _trace(copied(model), inputs, made_up)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    message = f"The forward of {type(model).__name__} could not be followed: {problems[0]}"
    raise TraceError(message[:_LONGEST_PROBLEM])


def _trace(copied: nn.Module, inputs: Mapping[str, Any] | None, made_up: int) -> Trace:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if inputs is None:
            with _Watcher(copied, made_up):  # it may have to run a part of the model
                inputs = example_inputs(copied)
        values = pytree.tree_map_only(Tensor, _on_cpu, dict(inputs))
        watcher = _Watcher(copied, made_up)
        watcher.follow_calls(copied)
        with watcher:
            copied(**values)
    return Trace(uses=watcher.uses(), written=watcher.written)


def _without_values(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose parameters lie on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        bare = parameter.detach().to("meta")
        memo[id(parameter)] = nn.Parameter(bare, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer if buffer.is_meta else buffer.detach().cpu().clone()
    return copy.deepcopy(model, memo).eval()


def _with_values(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode on the CPU."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        values = parameter.detach().cpu().clone()
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().cpu().clone()
    return copy.deepcopy(model, memo).eval()


def _can_really_run(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        return False
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) < _SMALL


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.detach().cpu()


class _Watcher(TorchFunctionMode):
    """Sees every operator call, notes which take parameters, and gets by without values."""

    def __init__(self, model: nn.Module, made_up: int) -> None:
        super().__init__()
        self.made_up = made_up
        self.written: dict[str, str] = {}
        self._found: dict[tuple[Any, ...], int] = {}
        self._stack: list[str] = []
        # By id: the parameters that a tensor was made from alone. The tensors are held, so that
        # no id is used again.
        self._made_from: dict[int, tuple[Tensor, tuple[str, ...]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                self._made_from[id(parameter)] = (parameter, (name,))

    def follow_calls(self, model: nn.Module) -> None:
        """Keep the path of the module whose forward runs."""
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: self._stack.append(path))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def uses(self) -> tuple[Use, ...]:
        """Return what was found."""
        return tuple(Use(*key, count=count) for key, count in self._found.items())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        tensors = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        sources = [self._sources(tensor) for tensor in tensors]
        carried = self._carried(name, tensors, sources)
        if any(sources) and not _is_getter(func):
            self._note(name, args, kwargs, tensors, sources, carried)
        result = Call(func, name, args, kwargs, self.made_up).run()
        for tensor in pytree.tree_leaves(result) if carried else ():
            if isinstance(tensor, Tensor):
                self._made_from.setdefault(id(tensor), (tensor, carried))
        return result

    def _sources(self, tensor: Tensor) -> tuple[str, ...]:
        return self._made_from.get(id(tensor), (None, ()))[1]

    def _note(
        self,
        operator: str,
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        sources: list[tuple[str, ...]],
        carried: tuple[str, ...],
    ) -> None:
        """Count the call for every parameter that does not merely pass through it."""
        if is_in_place(operator) and sources[0]:
            for name in sources[0]:
                self.written.setdefault(name, _caller())
        of_layer, is_derived = operator in LAYERS, all(sources)
        for tensor, names in zip(tensors, sources, strict=True):
            if of_layer:
                multiplies = is_at(args, kwargs, tensor, LAYERS[operator])
            else:
                multiplies = is_product(operator) and not is_derived
            for name in names:
                if multiplies or name not in carried:
                    self._count(name, operator, multiplies)

    def _count(self, name: str, operator: str, multiplies: bool) -> None:
        module = self._stack[-1] if self._stack else ""
        owner = name.rpartition(".")[0]
        is_own = module == owner or (bool(owner) and module.startswith(f"{owner}."))
        key = (name, operator, multiplies, module, is_own, "" if is_own else _caller())
        self._found[key] = self._found.get(key, 0) + 1

    def _carried(
        self, operator: str, tensors: list[Tensor], sources: list[tuple[str, ...]]
    ) -> tuple[str, ...]:
        """Return the parameters that a result is made from, where that is parameters alone.

        A gain that multiplies a weight is not what the result is: the larger of the two is.
        """
        if is_product(operator) or not sources or not sources[0]:
            return ()
        if operator in _PARTS:
            return sources[0]
        if not all(sources):
            return ()
        largest = max(tensor.numel() for tensor in tensors)
        kept = [
            names
            for tensor, names in zip(tensors, sources, strict=True)
            if operator in JOINS or tensor.numel() == largest
        ]
        return tuple(dict.fromkeys(name for names in kept for name in names))

    def _leave(self) -> None:
        if self._stack:
            self._stack.pop()


def _name_of(func: Any) -> str:
    if _is_getter(func):
        return getattr(func.__self__, "__name__", "")
    return getattr(func, "__name__", str(func))


def _is_getter(func: Any) -> bool:
    """Tell whether a call reads an attribute: ``.shape``, ``.dtype``, ``.T``."""
    return getattr(func, "__name__", "") == "__get__"


def _caller() -> str:
    """Return file and line of the innermost frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_TORCH):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
