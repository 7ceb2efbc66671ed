"""Making a plan: every weight of a model, what will happen to it and why. Nothing is touched."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from pemn_surgery import bank as banks
from pemn_surgery.bank import BankSpec, Shape
from pemn_surgery.graph import Trace, Use, repeated_blocks
from pemn_surgery.graph_modules import GraphUse, uses_in_graphs
from pemn_surgery.masked import MaskedWeight
from pemn_surgery.targets import Left, Owned, Plan, Target
from pemn_surgery.task import TaskTensors

RestName = Literal["train", "norms", "stats", "freeze"]
TiedName = Literal["leave", "untie", "both"]

# Raw parameters of these names are tables of positions, tokens or queries that a forward multiplies
# with as it would with activations; masks have no meaning there.
_TABLES = re.compile(
    r"pos|tok|embed|quer|probe|latent|bias|table|cls|prompt|prototype|codebook|_rel$"
)
_ROUTER = re.compile(r"router|gate$|gating", re.IGNORECASE)


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
        functional: Names of raw parameters that the forward uses as weights (`functional_weights`).
        rewritten: Names of weights that the forward changes in place (`rewritten_weights`).
        tied: What happens to a weight that is tied to an embedding.
        trace: What a forward does with every parameter, or None where none was followed.
        untraced: Why there is no trace.
    """

    spec: BankSpec
    rest: RestName
    reason_to_leave: Callable[[str], str] = field(default=lambda path: "")
    is_saved_whole: Callable[[str], bool] = field(default=lambda path: False)
    is_named: Callable[[str], bool] = field(default=lambda path: False)
    parameters: Sequence[str] = ()
    functional: Collection[str] = ()
    rewritten: Collection[str] = ()
    tied: TiedName = "leave"
    trace: Trace | None = None
    untraced: str = ""


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
        blocks=tuple(repeated_blocks(model)),
        untraced=request.untraced,
    )


def functional_weights(model: nn.Module, trace: Trace) -> list[str]:
    """Return the raw parameters that a forward multiplies its input with: experts, projections.

    Not among them: weights of layers, which are masked anyway, embeddings, tables of positions or
    tokens, and routers.

    Args:
        model: The model.
        trace: Its trace.
    """
    modules = dict(base_modules(model))
    found = []
    for name, uses in trace.by_name().items():
        path, _, parameter = name.rpartition(".")
        module = modules.get(path)
        if module is None or not any(use.multiplies for use in uses):
            continue
        known = _is_weight(module, parameter) or _is_table(module) or _is_router(path, module)
        if not known and not (parameter != "weight" and _TABLES.search(parameter)):
            found.append(name)
    return found


def rewritten_weights(model: nn.Module, trace: Trace) -> list[str]:
    """Return the weights that a forward changes in place: what it writes would miss the mask.

    Args:
        model: The model.
        trace: Its trace.
    """
    modules = dict(base_modules(model))
    names = [name for name in trace.written if name.rpartition(".")[0] in modules]
    return [name for name in names if not is_norm(modules[name.rpartition(".")[0]])]


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
        shape: Shape of its weight: (out, in, ...) but for HF ``Conv1D``, which has (in, out), for
            experts, which have (experts, out, in) or, if ``module.is_transposed``, (experts, in,
            out), and for timm's ``CondConv2d``, which has (experts, everything else).
    """
    if _is_transposed_linear(module):
        return max(shape[0], 1)
    if type(module).__name__ == "CondConv2d":
        return max(math.prod(shape[1:]) // max(cast("Any", module).out_channels, 1), 1)
    if len(shape) == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return max(shape[1 if getattr(module, "is_transposed", False) else 2], 1)
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
    is_embedding: bool = False  # one that was not asked for

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
    asked = _is_asked(name, request)
    table = _is_embedding(module, parameter, use)
    of_layer = _is_weight(module, parameter)
    in_graph = bool(use.operator) and not use.is_embedding and not of_layer
    maskable = asked or (table and request.is_named(path)) or of_layer or in_graph
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return _Slot(path, parameter, module, (0,), id(tensor), "has no shape yet (lazy)", maskable)
    if tensor.dim() < 2 and not maskable:
        return None
    shape = tuple(tensor.shape)
    problem = use.problem if maskable else _why_not(module, parameter, name, request, use)
    unnamed = table and not maskable
    if not maskable and not table and _multiplies(name, request):
        maskable = not _TABLES.search(parameter)
    if path.endswith(".parametrizations.weight") and not asked:
        maskable, problem = True, "is parametrised (weight norm or the like)"
    if maskable and not tensor.is_floating_point():
        problem = f"is stored as {tensor.dtype} (quantised)"
    elif maskable and tensor.numel() == 0:
        problem = "has no elements"
    elif maskable and name in request.rewritten:
        problem = "the forward changes it in place, so that a mask would not last"
    operator, fan_in = (use.operator, use.fan_in) if in_graph else ("", 0)
    return _Slot(
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
    )


def _is_asked(name: str, request: Request) -> bool:
    """Tell whether a parameter was asked for by its own name, or found to be used as a weight."""
    wanted = any(name == item or name.endswith(f".{item}") for item in request.parameters)
    return wanted or name in request.functional


def _is_embedding(module: nn.Module, parameter: str, use: GraphUse) -> bool:
    return use.is_embedding or (parameter == "weight" and _is_table(module))


def _is_table(module: nn.Module) -> bool:
    """Tell whether a module looks rows up, by its class."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, tables) or "Embedding" in type(module).__name__


def _is_weight(module: nn.Module, parameter: str) -> bool:
    """Tell whether a parameter is what a layer multiplies (or convolves) its input with."""
    if isinstance(module, nn.MultiheadAttention):  # its output projection is a Linear of its own
        return parameter.endswith("_proj_weight")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return parameter.startswith("weight_")
    if "Experts" in type(module).__name__:  # (experts, out, in), or with out and in exchanged
        tensor = module._parameters.get(parameter)
        return tensor is not None and tensor.dim() == 3
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return parameter == "weight" and (isinstance(module, layers) or _is_transposed_linear(module))


def _is_router(path: str, module: nn.Module) -> bool:
    """Tell whether a module chooses experts: a mask there would change who works, not how."""
    names = (path.rpartition(".")[2], type(module).__name__)
    return any(_ROUTER.search(name) for name in names)


def _is_container(module: nn.Module) -> bool:
    """Tell whether a module only holds tensors, as all those of an exported graph do."""
    return type(module).forward is nn.Module.forward


def _is_transposed_linear(module: nn.Module) -> bool:
    """Tell whether a module is (a subclass of) transformers' ``Conv1D``, without importing it."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )


def _why_not(module: nn.Module, parameter: str, name: str, request: Request, use: GraphUse) -> str:
    if _is_embedding(module, parameter, use):
        return "an embedding, masked only if target_modules names it"
    if _multiplies(name, request):
        what = "a router" if _is_router(name.rpartition(".")[0], module) else "a table"
        return f"{what}, masked only if target_parameters names it"
    named_so = parameter == "weight" or parameter.startswith("weight_")
    if request.trace is None and named_so and not _is_container(module):
        return f"masks for {type(module).__name__} are not available"
    return "a raw parameter, not the weight of a layer"


def _multiplies(name: str, request: Request) -> bool:
    return request.trace is not None and any(use.multiplies for use in request.trace.of(name))


def _summary(uses: Sequence[Use]) -> str:
    """Return in a few words what a forward does with a parameter."""
    counts: Counter[str] = Counter()
    for use in uses:
        place = f" at {use.where}" if use.where else ""
        counts[f"{use.operator}{place}"] += use.count
    if not counts:
        return "not reached by the forward"
    return ", ".join(f"{what} x{n}" if n > 1 else what for what, n in counts.items())


def _sort_out(slots: Sequence[_Slot], request: Request) -> tuple[list[Target], list[Left]]:
    by_identity: dict[int, list[_Slot]] = {}
    for slot in slots:
        by_identity.setdefault(slot.identity, []).append(slot)
    targets, left = [], []
    for group in by_identity.values():
        masked, staying = _split(group, request)
        if masked:
            targets.append(_target(group, masked, staying, request))
        left.extend(_left(group, masked, staying, request.trace))
    return targets, left


def _split(group: Sequence[_Slot], request: Request) -> tuple[list[_Slot], list[tuple[_Slot, str]]]:
    """Return which holders of one tensor are masked, and which stay and why."""
    reasons = [_reason(slot, request) for slot in group]
    free = [slot for slot, reason in zip(group, reasons, strict=True) if not reason]
    staying = [(slot, reason) for slot, reason in zip(group, reasons, strict=True) if reason]
    if not staying or not free:
        return free, staying
    embeddings_only = all(slot.is_embedding for slot, _ in staying)
    if request.tied == "both" and embeddings_only:
        return list(group), []
    if request.tied == "untie":
        return free, staying
    first, why = staying[0]
    offer = '; see tied="both" and tied="untie"' if embeddings_only else ""
    tied = [(slot, f"tied to {first.name}, which stays: {why}{offer}") for slot in free]
    return [], [*staying, *tied]


def _left(
    group: Sequence[_Slot],
    masked: Sequence[_Slot],
    staying: Sequence[tuple[_Slot, str]],
    trace: Trace | None,
) -> Iterator[Left]:
    """Yield what stays; a tied tensor counts once as maskable, and not if a copy is masked."""
    counted = bool(masked)
    order = {slot.name: place for place, slot in enumerate(group)}
    for slot, reason in sorted(staying, key=lambda item: order[item[0].name]):
        maskable = slot.maskable and not counted
        counted = counted or maskable
        use = _summary(trace.of(slot.name)) if trace and not slot.is_embedding else ""
        yield Left(slot.name, type(slot.module).__name__, slot.shape, maskable, reason, use)


def _reason(slot: _Slot, request: Request) -> str:
    if slot.problem:
        return slot.problem
    if any(slot.name == item or slot.name.endswith(f".{item}") for item in request.parameters):
        return ""
    if not slot.path and slot.name in request.functional:
        return ""
    return request.reason_to_leave(slot.path)


def _target(
    group: Sequence[_Slot],
    masked: Sequence[_Slot],
    staying: Sequence[tuple[_Slot, str]],
    request: Request,
) -> Target:
    first = masked[0]  # tied slots share one tensor, hence one use in a graph
    traced = request.trace.of if request.trace else lambda name: ()
    uses = [use for slot in group for use in traced(slot.name)]
    return Target(
        path=first.path,
        parameter=first.parameter,
        kind=first.operator or type(first.module).__name__,
        shape=first.shape,
        fan_in=first.fan_in or fan_in_of(first.module, first.shape),
        tied=tuple(slot.name for slot in masked[1:]),
        untied_from=staying[0][0].name if staying else "",
        use=_summary(uses) if request.trace else "",
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
