"""Making a plan: every weight of a model, what will happen to it and why. Nothing is touched."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from pemn_surgery import bank as banks
from pemn_surgery.bank import BankSpec, Shape
from pemn_surgery.graph_modules import GraphUse, uses_in_graphs
from pemn_surgery.masked import MaskedWeight
from pemn_surgery.targets import Left, Owned, Plan, Target
from pemn_surgery.task import TaskTensors

RestName = Literal["train", "norms", "stats", "freeze"]


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        spec: What decides the bank's numbers.
        rest: What happens to the tensors that are not masked.
        reason_to_leave: Gives, for a module path, why its weight stays, or "" to mask it.
        is_saved_whole: Tells whether a module is trained and saved as a whole by PEFT.
        is_named: Tells whether a module was asked for by name: embeddings are masked only then.
        parameters: Suffixes of further parameters to mask, whatever their module.
    """

    spec: BankSpec
    rest: RestName
    reason_to_leave: Callable[[str], str] = field(default=lambda path: "")
    is_saved_whole: Callable[[str], bool] = field(default=lambda path: False)
    is_named: Callable[[str], bool] = field(default=lambda path: False)
    parameters: Sequence[str] = ()


def make_plan(model: nn.Module, request: Request) -> Plan:
    """Decide what happens to every tensor of a model.

    Args:
        model: Any module; one that carries masks already is planned as if it did not.
        request: What is asked for.

    Returns:
        The plan.
    """
    uses = uses_in_graphs(model)
    slots = list(_weight_slots(model, request, uses))
    targets, left = _sort_out(slots, request)
    masked = {name for target in targets for name in (target.name, *target.tied)}
    layout = None
    if request.spec.bank != "own" and targets:
        weights = [(target.name, target.shape, target.fan_in) for target in targets]
        layout = banks.lay_out(request.spec, weights)
    return Plan(
        spec=request.spec,
        layout=layout,
        targets=tuple(targets),
        left=tuple(left),
        owned=tuple(_owned(model, request, masked, uses)),
        frozen_norms=tuple(_frozen_norms(model, request)),
        whole=tuple(_whole(model, request)),
        parameters=_count_parameters(model, slots),
    )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's own modules with their paths, each once, without what surgery added."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen or isinstance(module, (MaskedWeight, TaskTensors)):
            return
        seen.add(id(module))
        yield path, module
        for name, child in module.named_children():
            yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises activations: by its class's name or running statistics."""
    return "norm" in type(module).__name__.lower() or "running_mean" in module._buffers


def fan_in_of(module: nn.Module, shape: Shape) -> int:
    """Return how many inputs one output sums over.

    Args:
        module: The layer.
        shape: Shape of its weight: (out, in, ...) but for HF ``Conv1D``, which has (in, out).
    """
    if _is_transposed_linear(module):
        return max(shape[0], 1)
    return max(math.prod(shape[1:]), 1)


@dataclass(frozen=True)
class _Slot:
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

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


def _weight_slots(
    model: nn.Module, request: Request, uses: Mapping[int, GraphUse]
) -> Iterator[_Slot]:
    """Yield every parameter of two or more dimensions, masked ones included."""
    for path, module in base_modules(model):
        held = _held_masks(module)
        for parameter, tensor in list(module._parameters.items()):
            child = held.get(parameter)
            if tensor is None and child is None:
                continue
            identity = id(child) if tensor is None else id(tensor)
            if child is not None:
                fan_in = child.fan_in
                yield _Slot(path, parameter, module, child.shape, identity, "", True, fan_in=fan_in)
            elif tensor is not None:
                use = uses.get(identity, GraphUse())
                slot = _describe(path, parameter, module, tensor, request, use)
                if slot is not None:
                    yield slot


def _held_masks(module: nn.Module) -> dict[str, MaskedWeight]:
    children = [*module._modules.values(), *module.__dict__.get("_pemn_shared", {}).values()]
    return {child.parameter: child for child in children if isinstance(child, MaskedWeight)}


def _describe(
    path: str, parameter: str, module: nn.Module, tensor: Tensor, request: Request, use: GraphUse
) -> _Slot | None:
    name = f"{path}.{parameter}" if path else parameter
    asked = any(name == item or name.endswith(f".{item}") for item in request.parameters)
    wanted = _is_embedding(module, parameter, use) and request.is_named(path)
    of_layer = _is_weight(module, parameter)
    in_graph = bool(use.operator) and not use.is_embedding and not of_layer
    maskable = asked or wanted or of_layer or in_graph
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return _Slot(path, parameter, module, (0,), id(tensor), "has no shape yet (lazy)", maskable)
    if tensor.dim() < 2 and not maskable:
        return None
    shape = tuple(tensor.shape)
    problem = use.problem if maskable else _why_not(module, parameter, use)
    if path.endswith(".parametrizations.weight") and not asked:
        maskable, problem = True, "is parametrised (weight norm or the like)"
    if maskable and not tensor.is_floating_point():
        problem = f"is stored as {tensor.dtype} (quantised)"
    elif maskable and tensor.numel() == 0:
        problem = "has no elements"
    operator, fan_in = (use.operator, use.fan_in) if in_graph else ("", 0)
    return _Slot(path, parameter, module, shape, id(tensor), problem, maskable, operator, fan_in)


def _is_embedding(module: nn.Module, parameter: str, use: GraphUse) -> bool:
    of_class = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and parameter == "weight"
    return of_class or use.is_embedding


def _is_weight(module: nn.Module, parameter: str) -> bool:
    """Tell whether a parameter is what a layer multiplies (or convolves) its input with."""
    if isinstance(module, nn.MultiheadAttention):  # its output projection is a Linear of its own
        return parameter.endswith("_proj_weight")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return parameter.startswith("weight_")
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return parameter == "weight" and (isinstance(module, layers) or _is_transposed_linear(module))


def _is_container(module: nn.Module) -> bool:
    """Tell whether a module only holds tensors, as all those of an exported graph do."""
    return type(module).forward is nn.Module.forward


def _is_transposed_linear(module: nn.Module) -> bool:
    """Tell whether a module is (a subclass of) transformers' ``Conv1D``, without importing it."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )


def _why_not(module: nn.Module, parameter: str, use: GraphUse) -> str:
    if _is_embedding(module, parameter, use):
        return "an embedding, masked only if target_modules names it"
    named_so = parameter == "weight" or parameter.startswith("weight_")
    if named_so and not _is_container(module):
        return f"masks for {type(module).__name__} are not available"
    return "a raw parameter, not the weight of a layer"


def _sort_out(slots: Sequence[_Slot], request: Request) -> tuple[list[Target], list[Left]]:
    by_identity: dict[int, list[_Slot]] = {}
    for slot in slots:
        by_identity.setdefault(slot.identity, []).append(slot)
    targets, left = [], []
    for group in by_identity.values():
        reasons = [_reason(slot, request) for slot in group]
        if not any(reasons):
            targets.append(_target(group))
            continue
        first = next(place for place, reason in enumerate(reasons) if reason)
        for place, (slot, reason) in enumerate(zip(group, reasons, strict=True)):
            why = reason or f"tied to {group[first].name}, which stays: {reasons[first]}"
            maskable = slot.maskable and place == 0  # a tied tensor counts once
            left.append(Left(slot.name, type(slot.module).__name__, slot.shape, maskable, why))
    return targets, left


def _reason(slot: _Slot, request: Request) -> str:
    if slot.problem:
        return slot.problem
    if any(slot.name == item or slot.name.endswith(f".{item}") for item in request.parameters):
        return ""
    return request.reason_to_leave(slot.path)


def _target(group: Sequence[_Slot]) -> Target:
    first = group[0]  # tied slots share one tensor, hence one use in a graph
    return Target(
        path=first.path,
        parameter=first.parameter,
        kind=first.operator or type(first.module).__name__,
        shape=first.shape,
        fan_in=first.fan_in or fan_in_of(first.module, first.shape),
        tied=tuple(slot.name for slot in group[1:]),
    )


def _owned(
    model: nn.Module, request: Request, masked: set[str], uses: Mapping[int, GraphUse]
) -> Iterator[Owned]:
    """Yield the unmasked tensors that each task has its own copy of."""
    seen: dict[int, str] = {}
    for path, module in base_modules(model):
        if request.is_saved_whole(path):
            continue
        for name, tensor in _unmasked_tensors(path, module, masked):
            can_train = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            use = uses.get(id(tensor), GraphUse())
            trained = can_train and _is_trained(module, request, use)
            if not (trained or _is_carried(module, name, tensor, request, use)):
                continue
            full = f"{path}.{name}" if path else name
            first = seen.setdefault(id(tensor), full)
            tied_to = "" if first == full else first
            saved = not _is_idle_counter(module, name)
            yield _describe_owned(path, name, tensor, trained=trained, saved=saved, tied_to=tied_to)


def _whole(model: nn.Module, request: Request) -> Iterator[Owned]:
    """Yield the tensors of modules that PEFT trains and saves as a whole."""
    for path, module in base_modules(model):
        if path and request.is_saved_whole(path):
            for name, tensor in _unmasked_tensors(path, module, set()):
                yield _describe_owned(path, name, tensor, trained=True)


def _describe_owned(
    path: str, name: str, tensor: Tensor, *, trained: bool, saved: bool = True, tied_to: str = ""
) -> Owned:
    return Owned(
        path=path,
        tensor=name,
        shape=tuple(tensor.shape),
        is_float=tensor.is_floating_point(),
        nbytes=tensor.numel() * tensor.element_size(),
        trained=trained,
        saved=saved,
        tied_to=tied_to,
    )


def _unmasked_tensors(
    path: str, module: nn.Module, masked: set[str]
) -> Iterator[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        full = f"{path}.{name}" if path else name
        if tensor is not None and full not in masked and name not in hidden:
            yield name, tensor


def _is_trained(module: nn.Module, request: Request, use: GraphUse) -> bool:
    norm = is_norm(module) or use.is_norm
    return request.rest == "train" or (request.rest == "norms" and norm)


def _is_carried(
    module: nn.Module, name: str, tensor: Tensor, request: Request, use: GraphUse
) -> bool:
    """Tell whether a tensor that is not trained has to be saved with the task.

    Running statistics move while the task trains. With a generated bank the model is nothing but a
    seed and this file, so everything random travels; frozen embeddings stay with the base.
    """
    if "running_mean" in module._buffers and name in module._buffers:
        return request.rest != "freeze" or request.spec.generated
    if not request.spec.generated or not tensor.is_floating_point():
        return False
    return not _is_embedding(module, name, use)


def _is_idle_counter(module: nn.Module, name: str) -> bool:
    """Tell whether a tensor is BatchNorm's batch counter, which is read only without a momentum.

    An exported graph has the momentum as a constant; its modules are plain containers.
    """
    has_momentum = getattr(module, "momentum", None) is not None or _is_container(module)
    return name == "num_batches_tracked" and has_momentum


def _frozen_norms(model: nn.Module, request: Request) -> Iterator[str]:
    if request.rest == "freeze":
        for path, module in base_modules(model):
            if "running_mean" in module._buffers and not request.is_saved_whole(path):
                yield path


def _count_parameters(model: nn.Module, slots: Sequence[_Slot]) -> int:
    counted = {slot.identity: math.prod(slot.shape) for slot in slots}
    for _, module in base_modules(model):
        for tensor in module._parameters.values():
            if tensor is not None and not isinstance(tensor, nn.parameter.UninitializedParameter):
                counted[id(tensor)] = tensor.numel()
    return sum(counted.values())
