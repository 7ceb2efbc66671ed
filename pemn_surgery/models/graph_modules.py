"""What a `torch.fx.GraphModule` does with the parameters that its graph reads.

A layer's class says what its ``weight`` is for. A graph may read parameters itself (``get_attr``)
and hand them to ``linear`` or ``conv2d``: their modules are then plain containers, as everywhere in
``torch.export.export(model, ...).module()``, and only the graph says which of them are weights.

Surgery lets a graph call the child that makes a tensor instead of reading the tensor
(`rewrite_graphs` says why). Here both kinds of node count as a read, so that a graph can be planned
again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.models.operators import is_in_place, look_up, stands_at

# Where surgery keeps the name that a node read, in the node's `meta`. Pickles drop it.
READ = "pemn_read"


@dataclass(frozen=True)
class GraphUse:
    """What graphs do with one parameter.

    Attributes:
        operator: The first operator that multiplies its input with the parameter, for example
            "linear"; "" where none does.
        fan_in: Inputs that one output of that operator sums over.
        count: Number of such operators.
        is_embedding: Whether a graph looks up rows of it.
        is_norm: Whether it scales or shifts in a normalisation.
        problem: Why it cannot be masked, or "".
    """

    operator: str = ""
    fan_in: int = 1
    count: int = 0
    is_embedding: bool = False
    is_norm: bool = False
    problem: str = ""

    def beside(self, other: "GraphUse") -> "GraphUse":
        """Return this use and one of the same parameter elsewhere as one."""
        first = self if self.operator else other
        return replace(
            first,
            count=self.count + other.count,
            is_embedding=self.is_embedding or other.is_embedding,
            is_norm=self.is_norm or other.is_norm,
            problem=self.problem or other.problem,
        )


def graph_modules(model: nn.Module) -> list[GraphModule]:
    """Return the model and all of its modules that are graph modules."""
    return [module for module in model.modules() if isinstance(module, GraphModule)]


def uses_in_graphs(model: nn.Module) -> dict[int, GraphUse]:
    """Return what graphs in a model do with parameters, by ``id``: a tied one has one use."""
    found: dict[int, GraphUse] = {}
    for module in graph_modules(model):
        for name, use in uses_in_graph(module).items():
            key = id(parameter_at(module, name))
            found[key] = found[key].beside(use) if key in found else use
    return found


def uses_in_graph(module: GraphModule) -> dict[str, GraphUse]:
    """Return what one graph does with the parameters that it reads itself, by their names in it."""
    fed = _fed(module)
    found: dict[str, GraphUse] = {}
    for node, name in reads(module):
        parameter = parameter_at(module, name)
        if parameter is None:
            continue
        start = torch.empty(parameter.shape, device="meta")
        for use in [GraphUse(), *_uses(node, start, start, fed)]:
            found[name] = found[name].beside(use) if name in found else use
    return found


def reads(module: GraphModule) -> Iterator[tuple[Node, str]]:
    """Yield the nodes that read a tensor, and its name within the module."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            yield node, node.target
        elif node.op == "call_module":
            owner, _, _ = node.target.rpartition(".")
            child = module_at(module, node.target)
            tensor = _made_by(child, node)
            if tensor:
                yield node, node.meta.get(READ) or (f"{owner}.{tensor}" if owner else tensor)


def _made_by(child: nn.Module | None, node: Node) -> str:
    if isinstance(child, MaskedWeight):
        return child.parameter
    return str(node.args[0]) if isinstance(child, TaskTensors) else ""


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, or None."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    return module


def parameter_at(root: nn.Module, name: str) -> Tensor | None:
    """Return the parameter that is registered under a name, or None."""
    path, _, parameter = name.rpartition(".")
    owner = module_at(root, path)
    return None if owner is None else owner._parameters.get(parameter)


def fixed_modes(module: GraphModule, *, training: bool) -> list[str]:
    """Return the nodes that a graph holds in the other mode, whatever mode is asked for.

    Exported graphs have their mode as a constant in dropout, batch norm and recurrent operators.
    """
    return [
        node.name
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and _fixed_mode(_by_argument(node)) == (not training)
    ]


def _by_argument(node: Node) -> dict[str, Any]:
    """Return the values of an ATen operator's arguments by name."""
    schema: Any = node.target
    arguments = schema._schema.arguments
    values = {item.name: item.default_value for item in arguments if item.has_default_value()}
    names = [item.name for item in arguments]
    return {**values, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _fixed_mode(values: Mapping[str, Any]) -> bool | None:
    """Return the mode that an operator is held in, None where it makes no difference."""
    mode = values.get("training", values.get("train"))
    is_idle = 0 in (values.get("p"), values.get("dropout"))
    is_standardisation = "running_mean" in values and values["running_mean"] is None
    return None if is_idle or is_standardisation else mode


def _fed(module: GraphModule) -> set[Node]:
    """Return the nodes that depend on the graph's inputs."""
    fed: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(before in fed for before in node.all_input_nodes):
            fed.add(node)
    return fed


def _uses(node: Node, view: Any, whole: Tensor, fed: set[Node]) -> Iterator[GraphUse]:
    """Yield every use of what a node gives, also behind nodes that only reshape or cast it."""
    for user in node.users:
        operator = _operator(user)
        if user not in fed and _passes_on(user, operator, node):
            yield from _uses(user, _viewed(user, operator, view, whole), whole, fed)
        else:
            yield _use(user, operator, node, view, whole.dim())


def _operator(node: Node) -> str:
    """Return the bare name of torch's function or method that a node calls, or ""."""
    target: Any = node.target
    if node.op == "call_method":
        return target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    if target is getattr:  # w.T
        return str(node.args[1])
    home = getattr(target, "__module__", None) or "torch"
    is_torchs = home.partition(".")[0] in ("torch", "_operator")
    return getattr(target, "__name__", "") if is_torchs else ""


def _passes_on(user: Node, operator: str, node: Node) -> bool:
    known = look_up(operator)
    if known.kind == "join":
        return bool(known.passes)
    others = [argument for argument in user.all_input_nodes if argument is not node]
    allowed = bool(known.passes) and not (known.passes == "new" and others)
    return allowed and bool(user.args) and user.args[0] is node


def _viewed(user: Node, operator: str, view: Any, whole: Tensor) -> Any:
    """Return what a node that passes a weight on makes of it, on the meta device."""
    passes = look_up(operator).passes
    if passes != "new":
        return whole if passes == "whole" else view
    arguments, options = user.args[1:], user.kwargs
    if user.target is getattr:
        return getattr(view, operator)
    if user.op == "call_method":
        return getattr(view, operator)(*arguments, **options)
    target: Any = user.target
    return target(view, *arguments, **options)


def _use(user: Node, operator: str, node: Node, view: Any, dims: int) -> GraphUse:
    written = is_in_place(operator) and user.args[0] is node
    kind = look_up(operator).kind
    use = GraphUse(
        is_embedding=kind == "lookup",
        is_norm=kind == "norm",
        problem="is written to by its graph" if written else "",
    )
    fan_in = _fan_in(user, operator, node, tuple(view.shape)) if isinstance(view, Tensor) else 0
    is_weight = fan_in > 0 and dims > 1
    return replace(use, operator=operator, fan_in=fan_in, count=1) if is_weight else use


def _fan_in(user: Node, operator: str, node: Node, shape: Sequence[int]) -> int:
    """Return what one output sums over where an operator takes a node as its weight, else 0."""
    if operator == "einsum":
        return _einsum_fan_in(user, node, shape)
    kind, weights, right, *_ = look_up(operator)
    if stands_at(user.args, user.kwargs, node, right):
        return shape[-2] if len(shape) > 1 else shape[-1]
    if not stands_at(user.args, user.kwargs, node, weights):
        return 0
    if kind == "product":
        return shape[-1]
    return max(math.prod(shape[1:]), 1) if len(shape) > 1 else 0


def _einsum_fan_in(user: Node, node: Node, shape: Sequence[int]) -> int:
    """Multiply the sizes of the letters that the result does not have."""
    equation, *operands = user.args
    if operands and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, arrow, result = str(equation).replace(" ", "").partition("->")
    if not arrow:
        result = "".join(letter for letter in inputs if inputs.count(letter) == 1)
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        if operand is node:
            sizes = dict(zip(reversed(letters), reversed(shape), strict=False))
            return math.prod(size for letter, size in sizes.items() if letter not in result + ".")
    return 0
