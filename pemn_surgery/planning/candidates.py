"""The parameters that a plan has to say something about, and what each is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pemn_surgery.masks.attached import held_masks
from pemn_surgery.models.forward import Trace
from pemn_surgery.models.graph_modules import GraphUse
from pemn_surgery.numbers.bank import Shape
from pemn_surgery.planning.request import Request
from pemn_surgery.planning.roles import (
    base_modules,
    is_container,
    is_embedding,
    is_norm,
    is_weight,
    scripted_modules,
)

_NO_WEIGHT = "a raw parameter, not the weight of a layer"


@dataclass(frozen=True)
class Slot:
    """A parameter that a plan has to say something about."""

    path: str
    parameter: str
    module: nn.Module
    shape: Shape
    identity: int
    problem: str
    maskable: bool
    operator: str = ""  # what a graph does with it, where the module's class does not say
    fan_in: int = 0  # 0: as the module's class says
    is_embedding: bool = False  # one that was not asked for
    is_open: bool = False  # whether nobody has seen what a forward does with it

    @property
    def name(self) -> str:
        """The parameter's name in the model's state dict."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


def weight_slots(
    model: nn.Module, request: Request, uses: Mapping[int, GraphUse]
) -> Iterator[Slot]:
    """Yield every parameter of two or more dimensions, masked ones included.

    Args:
        model: Any module.
        request: What is asked for.
        uses: What graphs do with parameters (`uses_in_graphs`).
    """
    for path, module in base_modules(model):
        held = held_masks(module)
        yield from _packed_elsewhere(path, module, request)
        for parameter, tensor in list(module._parameters.items()):
            child = held.get(parameter)
            if tensor is None and child is None:
                continue
            identity = id(child) if tensor is None else id(tensor)
            if child is not None:
                fan_in = child.fan_in
                yield Slot(path, parameter, module, child.shape, identity, "", True, fan_in=fan_in)
            elif tensor is not None:
                use = uses.get(identity, GraphUse())
                slot = _describe(path, parameter, module, tensor, request, use)
                if slot is not None:
                    yield slot
    yield from _scripted(model, request)


def _scripted(model: nn.Module, request: Request) -> Iterator[Slot]:
    """Yield the weights of modules whose code ``torch.jit`` has compiled."""
    problem = "is in a module that torch.jit has compiled, where no mask can act; pemnify first"
    for outer, scripted in scripted_modules(model):
        for inner, tensor in scripted.named_parameters():
            name = f"{outer}.{inner}" if outer else inner
            path, _, parameter = name.rpartition(".")
            seen = request.trace
            maskable = tensor.dim() >= 2 and (seen is None or seen.multiplies(name))
            if tensor.dim() >= 2:
                shape = tuple(tensor.shape)
                yield Slot(path, parameter, scripted, shape, id(tensor), problem, maskable)


def _packed_elsewhere(path: str, module: Any, request: Request) -> Iterator[Slot]:
    """Yield a quantised weight that no parameter holds: GPTQ and others pack it into buffers."""
    problem = request.quantised.get(f"{path}.weight" if path else "weight")
    if problem is not None and module._parameters.get("weight") is None:
        shape = (module.out_features, module.in_features)
        yield Slot(path, "weight", module, shape, id(module), problem, maskable=True)


def _describe(
    path: str, parameter: str, module: nn.Module, tensor: Tensor, request: Request, use: GraphUse
) -> Slot | None:
    name = f"{path}.{parameter}" if path else parameter
    asked = is_named(name, request) or name in request.functional
    table = is_embedding(module, parameter, use)
    of_layer = is_weight(module, parameter)
    in_graph = bool(use.operator) and not use.is_embedding and not of_layer
    maskable = asked or (table and request.is_named(path)) or of_layer or in_graph
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return Slot(path, parameter, module, (0,), id(tensor), "has no shape yet (lazy)", maskable)
    if tensor.dim() < 2 and not maskable:
        return None
    shape = _shape(name, module, tensor, request)
    problem = use.problem if maskable else _why_not(module, parameter, name, request, use)
    unnamed = table and not maskable
    if not maskable and not table:
        maskable = _is_weight_to(request.trace, name)
    if path.endswith(".parametrizations.weight") and not asked:
        maskable, problem = True, "is parametrised (weight norm or the like)"
    packed = _quantised_type(tensor)
    if maskable and name in request.quantised:
        problem = request.quantised[name]
    elif maskable and tensor.is_complex():
        problem = "is complex"
    elif maskable and packed:
        problem = f"is stored as {packed} (quantised)"
    elif maskable and tensor.numel() == 0:
        problem = "has no elements"
    elif maskable and name in request.rewritten:
        problem = "the forward changes it in place, so that a mask would not last"
    operator, fan_in = (use.operator, use.fan_in) if in_graph else ("", 0)
    return Slot(
        path,
        parameter,
        module,
        shape,
        id(tensor),
        problem,
        maskable,
        operator=operator,
        fan_in=fan_in,
        is_embedding=unnamed,
        is_open=not maskable and not table and _is_open(module, request),
    )


def _is_open(module: nn.Module, request: Request) -> bool:
    return request.unseen and not is_norm(module) and not is_container(module)


def _shape(name: str, module: Any, tensor: Tensor, request: Request) -> Shape:
    """Return the shape of a weight's values; packed ones are stored in another."""
    if name in request.quantised:
        return (module.out_features, module.in_features)
    return tuple(tensor.shape)


def _quantised_type(tensor: Tensor) -> str:
    """Return what holds a weight without plain float values, or "".

    torchao's tensors only look like floats; sharded ones (DTensor) are floats.
    """
    is_sharded = type(tensor).__module__.startswith("torch.distributed")
    if is_traceable_wrapper_subclass(tensor) and not is_sharded:
        return type(tensor).__name__
    return "" if tensor.is_floating_point() else str(tensor.dtype)


def is_named(name: str, request: Request) -> bool:
    """Tell whether a parameter was asked for by the end of its own name."""
    return any(name == item or name.endswith(f".{item}") for item in request.parameters)


def _why_not(module: nn.Module, parameter: str, name: str, request: Request, use: GraphUse) -> str:
    if is_embedding(module, parameter, use):
        return "an embedding, masked only if target_modules names it"
    named_so = parameter == "weight" or parameter.startswith("weight_")
    if request.trace is None and named_so and not is_container(module):
        return f"masks for {type(module).__name__} are not available"
    what = _what_it_is(name, request.trace)
    return f"{what}, masked only if target_parameters names it" if what else _NO_WEIGHT


def _what_it_is(name: str, seen: Trace | None) -> str:
    """Return in words what a raw parameter is to a forward, "" if that is nothing to be masked."""
    if seen is None:
        return ""
    if seen.looks_up(name):
        return "a table"
    if name in seen.chosen_by:
        return "a router"
    unknown = seen.unknown_operator(name)
    if unknown:
        return f"goes into {unknown}, which can do anything with it"
    return "a raw parameter" if seen.multiplies(name) else ""


def _is_weight_to(seen: Trace | None, name: str) -> bool:
    """Tell whether a forward multiplies an input with a raw parameter, for all that was seen."""
    if seen is None or seen.looks_up(name):
        return False
    return seen.multiplies(name) or bool(seen.unknown_operator(name))
