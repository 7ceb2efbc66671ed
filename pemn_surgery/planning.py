"""The plan: every weight of a model, what will happen to it and why. Nothing is touched.

A plan is a value. It lists the *targets* (weights that will be masked), everything of two or more
dimensions that is left alone with the reason, and the tensors that each task owns beside its masks;
it prints as a table and turns into JSON.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table
from torch import Tensor, nn

from pemn_surgery import bank as banks
from pemn_surgery import bits, report
from pemn_surgery.bank import BankSpec, Layout, Shape
from pemn_surgery.masked import MaskedWeight
from pemn_surgery.task import TaskTensors

# Below this share of masked weights a plan says so loudly.
_LOW_COVERAGE = 0.9

RestName = Literal["train", "norms", "stats", "freeze"]


@dataclass(frozen=True)
class Target:
    """One weight that will be masked.

    Attributes:
        path: Path of its module within the model.
        parameter: Name of the parameter on the module.
        kind: Class of the module.
        shape: Shape of the weight.
        fan_in: Inputs that one output sums over.
        tied: Other modules (as "path.parameter") that hold the same tensor and share the mask.
    """

    path: str
    parameter: str
    kind: str
    shape: Shape
    fan_in: int
    tied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The weight's name in the model's state dict."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Left:
    """One tensor of two or more dimensions that stays as it is, and why.

    Attributes:
        name: Its name in the model's state dict.
        kind: Class of its module.
        shape: Its shape.
        maskable: Whether it is the weight of a layer that could be masked.
        reason: Why it stays.
    """

    name: str
    kind: str
    shape: Shape
    maskable: bool
    reason: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Owned:
    """One unmasked tensor that every task has its own copy of.

    Attributes:
        path: Path of its module.
        tensor: Its name on the module.
        floats: Number of elements.
        nbytes: Size of one copy in bytes.
        trained: Whether it is trained; otherwise it moves (statistics) or is only saved.
        saved: Whether it is in the task's file: not a batch counter that nothing reads.
        tied_to: Name of the owned tensor that it is the same tensor as, or "".
    """

    path: str
    tensor: str
    floats: int
    nbytes: int
    trained: bool
    saved: bool = True
    tied_to: str = ""

    @property
    def name(self) -> str:
        """The tensor's name in the model's state dict."""
        return f"{self.path}.{self.tensor}" if self.path else self.tensor


@dataclass(frozen=True)
class Plan:
    """What `pemnify` would do.

    Attributes:
        spec: What decides the bank's numbers.
        layout: The bank's prototypes; None where every weight keeps its own numbers.
        targets: Weights that will be masked, in the model's order.
        left: Tensors of two or more dimensions that stay, with reasons.
        owned: Unmasked tensors that each task has its own copy of.
        frozen_norms: Modules that stay in eval mode while the task trains.
        parameters: Number of elements of all parameters of the model.
    """

    spec: BankSpec
    layout: Layout | None
    targets: tuple[Target, ...]
    left: tuple[Left, ...]
    owned: tuple[Owned, ...]
    frozen_norms: tuple[str, ...]
    parameters: int

    @property
    def masked_weights(self) -> int:
        """Number of weights under masks."""
        return sum(target.weights for target in self.targets)

    @property
    def maskable_weights(self) -> int:
        """Number of weights of all layers that could be masked."""
        return self.masked_weights + sum(item.weights for item in self.left if item.maskable)

    @property
    def coverage(self) -> float:
        """Masked share of the maskable weights."""
        return self.masked_weights / self.maskable_weights if self.maskable_weights else 0.0

    @property
    def mask_bytes(self) -> int:
        """Bytes of one task's stored masks."""
        return sum(bits.packed_bytes(target.weights) for target in self.targets)

    @property
    def other_bytes(self) -> int:
        """Bytes of one task's other tensors."""
        return sum(item.nbytes for item in self.owned if item.saved and not item.tied_to)

    @property
    def bank_floats(self) -> int:
        """Numbers that the bank stores (0 where every weight keeps its own)."""
        return self.layout.floats if self.layout else 0

    def ratio(self, bytes_per_float: int = 4) -> float:
        """Return the size of the dense model over the size of one task's file.

        Args:
            bytes_per_float: 4 for a float32 model, 2 for a 16-bit one.
        """
        dense = self.parameters * bytes_per_float
        return dense / max(self.mask_bytes + self.other_bytes, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in plain values for JSON, totals included."""
        totals = {
            "parameters": self.parameters,
            "masked_weights": self.masked_weights,
            "maskable_weights": self.maskable_weights,
            "coverage": self.coverage,
            "bank_floats": self.bank_floats,
            "mask_bytes": self.mask_bytes,
            "other_bytes": self.other_bytes,
            "ratio_fp32": self.ratio(4),
            "ratio_fp16": self.ratio(2),
        }
        return {**asdict(self), "totals": totals}

    def groups(self) -> list[dict[str, Any]]:
        """Return one row for each group of like tensors: repeated blocks become one row."""
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        items = [*((item, "mask", "") for item in self.targets)]
        for item, action, reason in [*items, *((item, "leave", item.reason) for item in self.left)]:
            key = (group_pattern(item.name), item.kind, item.shape, action, group_pattern(reason))
            row = rows.setdefault(key, _row(key))
            row["count"] += 1
            row["weights"] += item.weights
        return list(rows.values())

    def table(self) -> Table:
        """Return the plan as a table for people."""
        table = report.table(
            f"{self.masked_weights:,} of {self.maskable_weights:,} maskable weights masked "
            f"({self.coverage:.1%}), bank {self.spec.bank}",
            ("tensor", "class", "shape", "count", "weights", "action", "reason"),
            ([str(value) for value in row.values()] for row in self.groups()),
        )
        table.caption = (
            f"bank {self.bank_floats:,} numbers; a task {self.mask_bytes:,} bytes of masks + "
            f"{self.other_bytes:,} of other tensors; "
            f"{self.ratio(4):.1f} x smaller than float32, {self.ratio(2):.1f} x than 16 bits"
        )
        return table

    def __str__(self) -> str:
        """Return the plan as a table in plain text, with a warning where much stays unmasked."""
        text = report.as_text(self.table())
        if self.coverage < _LOW_COVERAGE:
            unmasked = self.maskable_weights - self.masked_weights
            text += f"WARNING: {unmasked:,} maskable weights stay unmasked; see the reasons above.\n"
        return text


def _row(key: tuple[Any, ...]) -> dict[str, Any]:
    names = ("tensor", "class", "shape", "count", "weights", "action", "reason")
    pattern, kind, shape, action, reason = key
    shown = "x".join(map(str, shape))
    return dict(zip(names, (pattern, kind, shown, 0, 0, action, reason), strict=True))


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        spec: What decides the bank's numbers.
        rest: What happens to the tensors that are not masked.
        reason_to_leave: Gives, for a module path, why its weight stays, or "" to mask it.
        is_saved_whole: Tells whether a module is trained and saved as a whole by PEFT.
        parameters: Suffixes of further parameters to mask, whatever their module.
    """

    spec: BankSpec
    rest: RestName
    reason_to_leave: Callable[[str], str] = field(default=lambda path: "")
    is_saved_whole: Callable[[str], bool] = field(default=lambda path: False)
    parameters: Sequence[str] = ()


def make_plan(model: nn.Module, request: Request) -> Plan:
    """Decide what happens to every tensor of a model.

    Args:
        model: Any module; one that carries masks already is planned as if it did not.
        request: What is asked for.

    Returns:
        The plan.
    """
    slots = list(_weight_slots(model, request))
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
        owned=tuple(_owned(model, request, masked)),
        frozen_norms=tuple(_frozen_norms(model, request)),
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

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


def _weight_slots(model: nn.Module, request: Request) -> Iterator[_Slot]:
    """Yield every parameter of two or more dimensions, masked ones included."""
    for path, module in base_modules(model):
        held = _held_masks(module)
        for parameter, tensor in list(module._parameters.items()):
            child = held.get(parameter)
            if tensor is None and child is None:
                continue
            identity = id(child) if tensor is None else id(tensor)
            if child is not None:
                yield _Slot(path, parameter, module, child.shape, identity, "", maskable=True)
            elif tensor is not None:
                slot = _describe(path, parameter, module, tensor, request)
                if slot is not None:
                    yield slot


def _held_masks(module: nn.Module) -> dict[str, MaskedWeight]:
    children = [*module._modules.values(), *module.__dict__.get("_pemn_shared", {}).values()]
    return {child.parameter: child for child in children if isinstance(child, MaskedWeight)}


def _describe(
    path: str, parameter: str, module: nn.Module, tensor: Tensor, request: Request
) -> _Slot | None:
    name = f"{path}.{parameter}" if path else parameter
    asked = any(name == item or name.endswith(f".{item}") for item in request.parameters)
    maskable = asked or (parameter == "weight" and _is_matmul(module))
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return _Slot(path, parameter, module, (), id(tensor), "has no shape yet (lazy)", maskable)
    if tensor.dim() < 2 and not maskable:
        return None
    shape = tuple(tensor.shape)
    problem = "" if maskable else _why_not(module, parameter)
    if maskable and not tensor.is_floating_point():
        problem = f"is stored as {tensor.dtype} (quantised)"
    elif maskable and tensor.numel() == 0:
        problem = "has no elements"
    return _Slot(path, parameter, module, shape, id(tensor), problem, maskable)


def _is_matmul(module: nn.Module) -> bool:
    convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, (nn.Linear, *convs)) or _is_transposed_linear(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    """Tell whether a module is (a subclass of) transformers' ``Conv1D``, without importing it."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )


def _why_not(module: nn.Module, parameter: str) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding"
    if parameter == "weight" or parameter.startswith("weight_"):
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
            why = reason or f"tied to {group[first].name}, which {reasons[first]}"
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
    first = group[0]
    return Target(
        path=first.path,
        parameter=first.parameter,
        kind=type(first.module).__name__,
        shape=first.shape,
        fan_in=fan_in_of(first.module, first.shape),
        tied=tuple(slot.name for slot in group[1:]),
    )


def _owned(model: nn.Module, request: Request, masked: set[str]) -> Iterator[Owned]:
    """Yield the unmasked tensors that each task has its own copy of."""
    seen: dict[int, str] = {}
    for path, module in base_modules(model):
        if request.is_saved_whole(path):
            continue
        for name, tensor in _unmasked_tensors(path, module, masked):
            can_train = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            trained = can_train and _is_trained(module, request)
            if not (trained or _is_carried(module, name, tensor, request)):
                continue
            full = f"{path}.{name}" if path else name
            first = seen.setdefault(id(tensor), full)
            size = tensor.numel() * tensor.element_size()
            tied_to = "" if first == full else first
            saved = not _is_idle_counter(module, name)
            yield Owned(path, name, tensor.numel(), size, trained, saved, tied_to)


def _unmasked_tensors(
    path: str, module: nn.Module, masked: set[str]
) -> Iterator[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        full = f"{path}.{name}" if path else name
        if tensor is not None and full not in masked and name not in hidden:
            yield name, tensor


def _is_trained(module: nn.Module, request: Request) -> bool:
    return request.rest == "train" or (request.rest == "norms" and is_norm(module))


def _is_carried(module: nn.Module, name: str, tensor: Tensor, request: Request) -> bool:
    """Tell whether a tensor that is not trained has to be saved with the task.

    Running statistics move while the task trains. With a generated bank the model is nothing but a
    seed and this file, so everything random travels; frozen embeddings stay with the base.
    """
    if "running_mean" in module._buffers and name in module._buffers:
        return request.rest != "freeze" or request.spec.generated
    if not request.spec.generated or not tensor.is_floating_point():
        return False
    return not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _is_idle_counter(module: nn.Module, name: str) -> bool:
    """Tell whether a tensor is BatchNorm's batch counter, which is read only without a momentum."""
    return name == "num_batches_tracked" and getattr(module, "momentum", None) is not None


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


def group_pattern(name: str) -> str:
    """Return a name with every number replaced by ``*``: what repeated blocks have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
