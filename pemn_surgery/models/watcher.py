"""Sees every operator call of a forward, notes what takes parameters, and gets by without values.

Calls are seen where Python makes them, by torch's function mode: there ``linear`` is still one
operator. What other code makes - ``torch.jit``, ``vmap`` when it unwraps its tensors, C++ - is seen
one floor below, by the dispatch mode, in smaller operators.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pemn_surgery.models.operators import is_in_place, look_up
from pemn_surgery.models.origins import CONSTANT, FED, Origin, Role, Step, step, unknown_step
from pemn_surgery.models.shapes import Call

# Where a tensor keeps its origin: it lives as long as the tensor, whoever holds that.
_ORIGIN = "_pemn_origin"

_functorch: Any = cast("Any", torch._C)._functorch

_TORCH = str(Path(torch.__file__).parent)

# Namespaces of operators that the table of `operators` is about.
_KNOWN = ("aten", "prims", "torchvision")


@dataclass(frozen=True)
class Use:
    """One way in which a forward uses one parameter.

    Attributes:
        name: The parameter.
        operator: The torch function that takes it, or what was made of it.
        role: What becomes of it there: "product" with an input, "rows" that are looked up,
            "unknown", or "other".
        module: Path of the module whose forward calls the operator.
        is_own: Whether that is the parameter's own module, or within it.
        where: File and line of the call, where it is not the parameter's own module.
        count: How often that happens in one forward.
    """

    name: str
    operator: str
    role: Role
    module: str
    is_own: bool
    where: str = ""
    count: int = 1


class Watcher(TorchFunctionMode):
    """Follows the parameters of two or more dimensions, which it marks, through a copy's forward.

    Values that the forward asks for although there are none are ``made_up``.
    """

    def __init__(self, model: nn.Module, made_up: int) -> None:
        super().__init__()
        self.made_up = made_up
        self.written: dict[str, str] = {}
        self.chosen_by: dict[str, None] = {}
        self._parameters = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
        self._found: dict[tuple[Any, ...], int] = {}
        self._stack: list[str] = []
        self._is_busy = False
        for name, parameter in self._parameters.items():
            setattr(parameter, _ORIGIN, Origin(weights=(name,)))

    def watch(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Run a forward of the copy, on keyword arguments whose tensors are marked."""
        for tensor in pytree.tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                setattr(tensor, _ORIGIN, FED)
        self._follow_calls(model)
        with _Below(self), self:
            model(**inputs)

    def uses(self) -> tuple[Use, ...]:
        """Return what was found."""
        return tuple(Use(*key, count=count) for key, count in self._found.items())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.see(func, args, kwargs or {})

    def see(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Note what an operator takes, run it, and mark what it makes; not one within another."""
        if self._is_busy:
            return func(*args, **kwargs)
        self._is_busy = True
        try:
            operator = _name_of(func)
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            origins = [_origin(tensor) for tensor in tensors]
            taken = _step(func, operator, args, kwargs, tensors, origins)
            writes = bool(tensors) and is_in_place(operator) and not _is_getter(func)
            self._note(operator, taken, origins)
            if writes:
                self._note_written(tensors[0], origins[0])
            result = Call(func, operator, args, kwargs, self.made_up).run()
            if writes and origins[0].weights == ():
                _mark(tensors[0], taken.origin)
            for made in pytree.tree_leaves(result):
                if isinstance(made, Tensor) and not any(made is tensor for tensor in tensors):
                    _mark(made, taken.origin)
            return result
        finally:
            self._is_busy = False

    def _follow_calls(self, model: nn.Module) -> None:
        """Keep the path of the module whose forward runs."""
        scripted: tuple[str, ...] = ()  # what torch.jit has compiled takes no hooks
        for path, module in model.named_modules():
            if isinstance(module, ScriptModule):
                scripted = (*scripted, f"{path}.")
            if isinstance(module, ScriptModule) or path.startswith(scripted):
                continue
            module.register_forward_pre_hook(lambda *_, path=path: self._stack.append(path))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _note(self, operator: str, taken: Step, origins: Sequence[Origin]) -> None:
        for name, role in taken.roles:
            module = self._stack[-1] if self._stack else ""
            owner = name.rpartition(".")[0]
            is_own = module == owner or (bool(owner) and module.startswith(f"{owner}."))
            key = (name, operator, role, module, is_own, "" if is_own else _caller())
            self._found[key] = self._found.get(key, 0) + 1
        if look_up(operator).kind == "choice":
            self.chosen_by.update(dict.fromkeys(n for o in origins for n in o.products))

    def _note_written(self, tensor: Tensor, origin: Origin) -> None:
        for name in origin.weights:
            if _share_memory(tensor, self._parameters[name]):
                self.written.setdefault(name, _caller())

    def _leave(self) -> None:
        if self._stack:
            self._stack.pop()


class _Below(TorchDispatchMode):
    """Hands a watcher the operators that it does not see itself."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.watcher.see(func, args, kwargs or {})


def _step(
    func: Any,
    operator: str,
    args: tuple,
    kwargs: dict,
    tensors: Sequence[Tensor],
    origins: Sequence[Origin],
) -> Step:
    if all(origin is CONSTANT for origin in origins):
        return Step((), CONSTANT)
    if _is_getter(func):
        return Step((), origins[0])
    namespace = getattr(func, "namespace", None) or getattr(func, "_qualified_op_name", "")
    if namespace and namespace.partition("::")[0] not in _KNOWN:
        return unknown_step(origins)
    return step(operator, args, kwargs, tensors, origins)


def _origin(tensor: Tensor) -> Origin:
    """Return what a tensor is made of, or what ``vmap`` and ``grad`` have wrapped."""
    found = getattr(tensor, _ORIGIN, None)
    while found is None and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        found = getattr(tensor, _ORIGIN, None)
    return CONSTANT if found is None else found


def _mark(tensor: Tensor, origin: Origin) -> None:
    setattr(tensor, _ORIGIN, origin)
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        setattr(tensor, _ORIGIN, origin)


def _share_memory(tensor: Tensor, parameter: Tensor) -> bool:
    storages = [x.untyped_storage()._cdata for x in (tensor, parameter)]
    return storages[0] == storages[1]


def _name_of(func: Any) -> str:
    if _is_getter(func):
        return getattr(func.__self__, "__name__", "")
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return schema.name.rpartition("::")[2]
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
