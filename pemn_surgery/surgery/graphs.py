"""Graph modules whose graphs call what makes a tensor where they read the tensor."""

from typing import cast

from torch import nn
from torch.fx import GraphModule, Node

from pemn_surgery.masks.attached import find_masked, find_owned
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.models import graph_modules


def rewrite_graphs(model: nn.Module) -> None:
    """Let every graph call what makes a tensor where it reads the tensor.

    The graph then says itself that a weight is computed. Reading through the property would give
    the same values, but pickle traces a graph module's code anew, and a property's value would be
    frozen into the new graph as a constant.
    """
    for module in graph_modules.graph_modules(model):
        paths = {id(child): path for path, child in module.named_modules()}
        for node in list(module.graph.find_nodes(op="get_attr")):
            path, _, name = node.target.rpartition(".")
            owner = graph_modules.module_at(module, path)
            child = None if owner is None else _maker(owner, name)
            if child is not None and id(child) in paths:
                node.meta[graph_modules.READ] = node.target
                node.op, node.target = "call_module", paths[id(child)]
                if isinstance(child, TaskTensors):
                    node.args = (name,)
        module.recompile()


def graph_reads(model: nn.Module) -> list[tuple[Node, str]]:
    """Return the nodes that `rewrite_graphs` has changed, and what each read before."""
    return [
        (node, name)
        for module in graph_modules.graph_modules(model)
        for node, name in graph_modules.reads(module)
        if node.op == "call_module"
    ]


def restore_graphs(reads: list[tuple[Node, str]]) -> None:
    """Let graphs read again what they read before: the nodes and names of `graph_reads`."""
    for node, name in reads:
        node.meta.pop(graph_modules.READ, None)
        node.op, node.target, node.args = "get_attr", name, ()
    for module in {node.graph.owning_module for node, _ in reads}:
        cast("GraphModule", module).recompile()


def _maker(owner: nn.Module, name: str) -> MaskedWeight | TaskTensors | None:
    """Return the child that makes a module's tensor, or None where it is a plain one."""
    masked, owned = find_masked(owner, name), find_owned(owner, name)
    if masked is not None or owned is None:
        return masked
    child, source = owned
    return child if source == name else None  # a node's argument is the name that it reads
