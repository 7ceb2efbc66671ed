"""Who uses which weight: a forward on shapes alone, watched operator by operator.

A weight that a model reads without calling its layer (``F.linear(x, self.qkv.weight, bias)``), a
raw parameter that it multiplies with (experts, XLNet's projections), a weight that is used twice,
never, or written in place: none of that can be seen from the modules alone. So a copy of the model
whose parameters have shapes but no values is run once. torch.fx's symbolic tracing fails on nearly
every transformers model and ``torch.export`` takes seconds to minutes; watching operator calls
finds the same uses (``tests/test_graph.py`` compares the three) at the price of one forward on the
meta device.

Values that the forward asks for although there are none (``if mask.all()``, ``nonzero`` in a
mixture of experts) are made up: ones, and in a second try zeros.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pemn_surgery.errors import TraceError
from pemn_surgery.inputs import example_inputs

# Operators that multiply an input with a weight, and where the weight stands; None: anywhere.
_WEIGHT_PLACE: dict[str, int | None] = {
    "linear": 1,
    **{f"conv{n}d": 1 for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": 1 for n in (1, 2, 3)},
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot")),
    **dict.fromkeys(("bilinear", "_grouped_mm", "grouped_mm", "chain_matmul", "multi_dot")),
    **dict.fromkeys(("__matmul__", "__rmatmul__", "mv", "addmv", "inner")),
    **dict.fromkeys(("multi_head_attention_forward", "_transformer_encoder_layer_fwd")),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu")),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")),
}

# What takes one of its parts from a tensor, by places that may come from the input.
_PARTS = ("__getitem__", "index_select", "gather", "take_along_dim", "select")

# What takes from its second tensor only the form, so that the first keeps its values.
_AS = ("expand_as", "view_as", "reshape_as", "type_as", "to")

_JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")

# Factories whose values are known although they were asked for on the meta device.
_LIKE = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor")

_LONGEST_PROBLEM = 300

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

    def of(self, name: str) -> tuple[Use, ...]:
        """Return the uses of one parameter."""
        return tuple(use for use in self.uses if use.name == name)

    def by_name(self) -> dict[str, list[Use]]:
        """Return the uses by parameter."""
        found: dict[str, list[Use]] = defaultdict(list)
        for use in self.uses:
            found[use.name].append(use)
        return found


@dataclass(frozen=True)
class Block:
    """Modules of the same class and shapes that stand beside each other.

    Attributes:
        pattern: Their path, with ``*`` for the number.
        kind: Their class.
        count: How many there are.
    """

    pattern: str
    kind: str
    count: int


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Trace:
    """Find every use of every parameter of two or more dimensions in one forward.

    Nothing of the model is touched or computed: its parameters take part by their shapes alone.

    Args:
        model: Any model, also one on the meta device.
        inputs: Keyword arguments of its forward; tensors of any device. None makes them from the
            model's configuration (`example_inputs`).

    Returns:
        The uses.

    Raises:
        TraceError: If the model cannot be copied, has no example inputs, or its forward does not
            run on shapes alone.
    """
    problems = []
    for made_up in (1, 0):  # other values may lead the forward to another turn
        try:
            return _trace(model, inputs, made_up)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    message = f"The forward of {type(model).__name__} could not be followed: {problems[0]}"
    raise TraceError(message[:_LONGEST_PROBLEM])


def repeated_blocks(model: nn.Module) -> list[Block]:
    """Find the repeated blocks of a model: siblings of equal class and equal parameter shapes.

    Args:
        model: Any model.

    Returns:
        The outermost repeated blocks; a block within a repeated block is not listed again.
    """
    return list(_blocks("", model, {}))


def _blocks(path: str, module: nn.Module, forms: dict[int, Any]) -> Iterator[Block]:
    alike: dict[Any, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, child in module.named_children():
        key = _form(child, forms) if name.isdigit() else name
        alike[key].append((name, child))
    for members in alike.values():
        name, child = members[0]
        inner = f"{path}.{name}" if path else name
        if len(members) > 1 and next(child.parameters(), None) is not None:
            pattern = f"{path}.*" if path else "*"
            yield Block(pattern, type(child).__name__, len(members))
        else:
            yield from _blocks(inner, child, forms)


def _form(module: nn.Module, forms: dict[int, Any]) -> Any:
    """Return what two modules have in common if they are built alike."""
    if id(module) not in forms:
        shapes = tuple(
            (name, tuple(parameter.shape))
            for name, parameter in module._parameters.items()
            if parameter is not None and not _is_lazy(parameter)
        )
        children = tuple((name, _form(child, forms)) for name, child in module.named_children())
        forms[id(module)] = (type(module), shapes, children)
    return forms[id(module)]


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def _trace(model: nn.Module, inputs: Mapping[str, Any] | None, made_up: int) -> Trace:
    shapes = _without_values(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if inputs is None:
            with _Watcher(shapes, made_up):  # it may have to run a part of the model
                inputs = example_inputs(shapes)
        values = pytree.tree_map_only(Tensor, _on_cpu, dict(inputs))
        watcher = _Watcher(shapes, made_up)
        watcher.follow_calls(shapes)
        with watcher:
            shapes(**values)
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
            self._note(name, args, tensors, sources, carried)
        result = _Call(func, name, args, kwargs, self.made_up).run()
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
        tensors: list[Tensor],
        sources: list[tuple[str, ...]],
        carried: tuple[str, ...],
    ) -> None:
        """Count the call for every parameter that does not merely pass through it."""
        if _is_in_place(operator) and sources[0]:
            for name in sources[0]:
                self.written.setdefault(name, _caller())
        derived = all(sources)
        for tensor, names in zip(tensors, sources, strict=True):
            multiplies = self._multiplies(operator, args, tensor, derived)
            for name in names:
                if multiplies or name not in carried:
                    self._count(name, operator, multiplies)

    def _multiplies(self, operator: str, args: tuple, tensor: Tensor, derived: bool) -> bool:
        if operator not in _WEIGHT_PLACE:
            return False
        place = _WEIGHT_PLACE[operator]
        if place is None:
            return not derived
        return len(args) <= place or args[place] is tensor

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
        if operator in _WEIGHT_PLACE or not sources or not sources[0]:
            return ()
        if operator in _PARTS:
            return sources[0]
        if not all(sources):
            return ()
        largest = max(tensor.numel() for tensor in tensors)
        kept = [
            names
            for tensor, names in zip(tensors, sources, strict=True)
            if operator in _JOINS or tensor.numel() == largest
        ]
        return tuple(dict.fromkeys(name for names in kept for name in names))

    def _leave(self) -> None:
        if self._stack:
            self._stack.pop()


class _Call:
    """One operator call on tensors of which some have values and some only shapes.

    Tensors that do not depend on a weight (ids, masks, positions) keep their values on the CPU, so
    that the forward can decide by them; everything that meets a weight has a shape only.
    """

    def __init__(self, func: Any, name: str, args: tuple, kwargs: dict, made_up: int) -> None:
        self.func, self.name, self.made_up = func, name, made_up
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.on_meta = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in self.leaves)

    def run(self) -> Any:
        """Return the operator's result."""
        if not self.on_meta or self.name in _LIKE:
            return self._call(self._move(_device_cpu))
        if self._has_values() and _is_in_place(self.name):
            return self.leaves[0]  # what it would write has a shape only
        if self._has_values() and self.name in _AS:
            return self._call(self._as_zeros())
        problems = []
        for prepare in (self._as_shapes, self._as_given, self._as_made_up, self._as_zeros):
            try:
                return self._call(prepare())
            except (RuntimeError, NotImplementedError, IndexError, ValueError) as error:
                problems.append(error)
        if _is_in_place(self.name):
            return self.leaves[0]
        raise problems[0]

    def _as_shapes(self) -> list[Any]:
        return self._move(_device_meta, _to_meta)

    def _as_given(self) -> list[Any]:
        return self.leaves

    def _as_made_up(self) -> list[Any]:
        return self._move(_device_cpu, self._make_up)

    def _as_zeros(self) -> list[Any]:
        return self._move(_device_cpu, _zeros_for_shapes)

    def _call(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        if self.name in _LIKE:
            kwargs = {**kwargs, "device": "cpu"}
        return self.func(*args, **kwargs)

    def _move(
        self, device: Callable[[Any], Any], tensor: Callable[[Tensor], Tensor] | None = None
    ) -> list[Any]:
        moved = []
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                moved.append(tensor(leaf) if tensor is not None else leaf)
            else:
                moved.append(device(leaf))
        return moved

    def _make_up(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.full(tensor.shape, self.made_up, dtype=tensor.dtype, device="cpu")

    def _has_values(self) -> bool:
        first = self.leaves[0]
        return isinstance(first, Tensor) and not first.is_meta


def _zeros_for_shapes(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _device_cpu(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _device_meta(leaf: Any) -> Any:
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _name_of(func: Any) -> str:
    if _is_getter(func):
        return getattr(func.__self__, "__name__", "")
    return getattr(func, "__name__", str(func))


def _is_getter(func: Any) -> bool:
    """Tell whether a call reads an attribute: ``.shape``, ``.dtype``, ``.T``."""
    return getattr(func, "__name__", "") == "__get__"


def _is_in_place(name: str) -> bool:
    return (
        name == "__setitem__"
        or (name.startswith("__i") and name.endswith("__") and name not in ("__int__", "__index__"))
        or (name.endswith("_") and not name.endswith("__"))
    )


def _caller() -> str:
    """Return file and line of the innermost frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_TORCH):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
