"""A plan's candidates: the parameters that a mask could lie on by their shape, and what each is.

A *candidate* is one name of such a parameter. `planner` decides on all names of one tensor together
and makes of them a `Target` of those that are masked, a `Left` of each that stays.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pemn_surgery.masks.attached import held_masks
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.models.forward import Trace
from pemn_surgery.models.graph_modules import GraphUse
from pemn_surgery.numbers.bank import Shape
from pemn_surgery.planning.request import Request
from pemn_surgery.planning.roles import (
    base_modules,
    full_name,
    is_container,
    is_embedding,
    is_norm,
    is_weight,
    scripted_modules,
)


@dataclass(frozen=True)
class Candidate:
    """One name of a parameter that a plan has to say something about.

    Attributes:
        path: Path of its module.
        parameter: Its name on the module.
        module: The module.
        shape: Shape of its values.
        identity: What all names of one tensor have in common.
        problem: Why it cannot be masked, or "".
        maskable: Whether it is a weight, that is counts in the share of masked ones.
        operator: What a graph does with it, where the module's class does not say.
        fan_in: Inputs that one output sums over; 0: as the module's class says.
        is_embedding: Whether it is a table of rows that was not asked for.
        is_open: Whether nobody has seen what a forward does with it.
    """

    path: str
    parameter: str
    module: nn.Module
    shape: Shape
    identity: int
    problem: str
    maskable: bool
    operator: str = ""
    fan_in: int = 0
    is_embedding: bool = False
    is_open: bool = False

    @property
    def name(self) -> str:
        """The parameter's name in the model's state dict."""
        return full_name(self.path, self.parameter)


def candidates(
    model: nn.Module, request: Request, uses: Mapping[int, GraphUse]
) -> Iterator[Candidate]:
    """Yield every parameter of two or more dimensions, masked ones included."""
    for path, module in base_modules(model):
        yield from _packed_elsewhere(path, module, request)
        held = held_masks(module)
        for parameter, tensor in list(module._parameters.items()):
            if parameter in held:
                yield _masked(path, parameter, module, held[parameter], tensor)
            elif tensor is not None:
                use = uses.get(id(tensor), GraphUse())
                known = _Known(path, parameter, module, tensor, request, use)
                yield from _candidate(known)
    yield from _scripted(model, request)


def _packed_elsewhere(path: str, module: Any, request: Request) -> Iterator[Candidate]:
    """Yield a quantised weight that no parameter holds: GPTQ and others pack it into buffers."""
    problem = request.quantised.get(full_name(path, "weight"))
    if problem is not None and module._parameters.get("weight") is None:
        shape = (module.out_features, module.in_features)
        yield Candidate(path, "weight", module, shape, id(module), problem, maskable=True)


def _scripted(model: nn.Module, request: Request) -> Iterator[Candidate]:
    """Yield the weights of modules whose code ``torch.jit`` has compiled."""
    problem = "is in a module that torch.jit has compiled, where no mask can act; pemnify first"
    for outer, scripted in scripted_modules(model):
        for inner, tensor in scripted.named_parameters():
            name = full_name(outer, inner)
            path, _, parameter = name.rpartition(".")
            if tensor.dim() >= 2:
                maskable = request.trace is None or request.trace.multiplies(name)
                shape = tuple(tensor.shape)
                yield Candidate(path, parameter, scripted, shape, id(tensor), problem, maskable)


def _masked(
    path: str, parameter: str, module: nn.Module, child: MaskedWeight, tensor: Tensor | None
) -> Candidate:
    """Return a weight that has masks already; a bank has taken its tensor away."""
    identity, fan_in = id(child if tensor is None else tensor), child.fan_in
    return Candidate(path, parameter, module, child.shape, identity, "", True, fan_in=fan_in)


@dataclass(frozen=True)
class _Known:
    """A parameter without masks, what is asked for, and what graphs do with it."""

    path: str
    parameter: str
    module: nn.Module
    tensor: Tensor
    request: Request
    use: GraphUse

    @property
    def name(self) -> str:
        return full_name(self.path, self.parameter)

    @property
    def is_asked_for(self) -> bool:
        """Whether its own name was given, by the user or by who followed a forward."""
        return is_named(self.name, self.request) or self.name in self.request.functional

    @property
    def is_table(self) -> bool:
        return is_embedding(self.module, self.parameter, self.use)

    @property
    def is_weight_of_layer(self) -> bool:
        return is_weight(self.module, self.parameter)

    @property
    def is_weight_of_graph(self) -> bool:
        """Whether nothing but a graph says that it is a weight."""
        return bool(self.use.operator) and not self.use.is_embedding and not self.is_weight_of_layer

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be masked, unless something prevents it."""
        asked = self.is_asked_for or (self.is_table and self.request.is_named(self.path))
        return asked or self.is_weight_of_layer or self.is_weight_of_graph

    @property
    def shape(self) -> Shape:
        """Shape of its values, without rows that are new; packed ones are stored in another."""
        if self.name in self.request.quantised:
            layer: Any = self.module
            return (layer.out_features, layer.in_features)
        new = self.request.new_rows.get(self.name)
        shape = tuple(self.tensor.shape)
        return shape if new is None else (new.first, *shape[1:])


def _candidate(known: _Known) -> Iterator[Candidate]:
    """Yield what a parameter is to a plan; nothing where it is a vector that was not asked for."""
    names, tensor = (known.path, known.parameter, known.module), known.tensor
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        problem = "has no shape yet (lazy)"
        yield Candidate(*names, (0,), id(tensor), problem, known.is_wanted)
    elif tensor.dim() >= 2 or known.is_wanted:
        maskable, problem = _by_role(known)
        if maskable:
            problem = known.request.quantised.get(known.name, next(_obstacles(known), problem))
        use = known.use if known.is_weight_of_graph else GraphUse(fan_in=0)
        yield Candidate(
            *names,
            known.shape,
            id(tensor),
            problem,
            maskable,
            operator=use.operator,
            fan_in=use.fan_in,
            is_embedding=known.is_table and not known.is_wanted,
            is_open=not maskable and not known.is_table and _is_open(known),
        )


def _is_open(known: _Known) -> bool:
    module = known.module
    return known.request.unseen and not is_norm(module) and not is_container(module)


def _by_role(known: _Known) -> tuple[bool, str]:
    """Return whether a parameter is a weight by what it is, and why it stays, or ""."""
    if known.path.endswith(".parametrizations.weight") and not known.is_asked_for:
        return True, "is parametrised (weight norm or the like)"
    if known.is_wanted:
        return True, known.use.problem
    if known.is_table:
        return False, "an embedding, masked only if target_modules names it"
    trace = known.request.trace
    named_so = known.parameter == "weight" or known.parameter.startswith("weight_")
    if trace is None and named_so and not is_container(known.module):
        return False, f"masks for {type(known.module).__name__} are not available"
    maskable, what = _to_a_forward(known.name, trace)
    offer = f"{what}, masked only if target_parameters names it"
    return maskable, offer if what else "a raw parameter, not the weight of a layer"


def _to_a_forward(name: str, seen: Trace | None) -> tuple[bool, str]:
    """Return whether a raw parameter is a weight to a forward, for all that was seen, and what."""
    if seen is None:
        return False, ""
    if seen.looks_up(name):
        return False, "a table"
    unknown, multiplies = seen.unknown_operator(name), seen.multiplies(name)
    what = "a raw parameter" if multiplies else ""
    if unknown:
        what = f"goes into {unknown}, which can do anything with it"
    if name in seen.chosen_by:
        what = "a router"
    return multiplies or bool(unknown), what


def _obstacles(known: _Known) -> Iterator[str]:
    """Yield why no mask can lie on the numbers of a weight."""
    tensor, packed = known.tensor, _quantised_type(known.tensor)
    if tensor.is_complex():
        yield "is complex"
    if packed:
        yield f"is stored as {packed} (quantised)"
    if tensor.numel() == 0:
        yield "has no elements"
    if known.name in known.request.rewritten:
        yield "the forward changes it in place, so that a mask would not last"


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
