"""The modules of a model, and what a tensor is to the one that holds it: a weight, a table, a gain.

Which parameters of a layer are weights, and where the outputs lie in them, says one table,
`_KINDS`, read from the top: a module is of the first kind that fits it. Layers of other libraries
are told by their class's name, without an import.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.jit import ScriptModule

from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.rows import Rows
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.models.graph_modules import GraphUse
from pemn_surgery.numbers.bank import Shape

# Layers that look rows up.
TABLES = (nn.Embedding, nn.EmbeddingBag)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's own modules with their paths, each once, without what was added.

    That is what surgery added, and PEFT's copies of modules that adapters save whole. Scripted ones
    (`scripted_modules`) are not among them: nothing of them can be changed.
    """
    for path, module in _modules(model):
        if not isinstance(module, ScriptModule):
            yield path, module


def scripted_modules(model: nn.Module) -> Iterator[tuple[str, ScriptModule]]:
    """Yield the outermost modules that ``torch.jit`` has made, with their paths."""
    for path, module in _modules(model):
        if isinstance(module, ScriptModule):
            yield path, module


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen or isinstance(module, (MaskedWeight, TaskTensors)):
            return
        seen.add(id(module))
        yield path, module
        for name, child in () if isinstance(module, ScriptModule) else module.named_children():
            if name == "original_module" or not is_saved_by_peft(module):
                yield from walk(full_name(path, name), child)

    return walk("", model)


def full_name(path: str, name: str) -> str:
    """Return the name in the whole model of what the module at a path calls by a name."""
    return f"{path}.{name}" if path else name


def is_saved_by_peft(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's wrapper around one that adapters save whole."""
    return any(base.__name__ == "AuxiliaryTrainingWrapper" for base in type(module).__mro__)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises activations: by its class's name or running statistics."""
    return "norm" in type(module).__name__.lower() or "running_mean" in module._buffers


def is_embedding(module: nn.Module, parameter: str, use: GraphUse) -> bool:
    """Tell whether a parameter is looked up by rows: by its module's class, or by its graph."""
    return use.is_embedding or (parameter == "weight" and is_table(module))


def is_table(module: nn.Module) -> bool:
    """Tell whether a module looks rows up, by its class."""
    return isinstance(module, TABLES) or "Embedding" in type(module).__name__


def is_container(module: nn.Module) -> bool:
    """Tell whether a module only holds tensors, as all those of an exported graph do."""
    return type(module).forward is nn.Module.forward


class LayerKind(NamedTuple):
    """One kind of layer.

    Attributes:
        fits: Tells whether a module is one.
        is_weight: Tells, by name and tensor (None where a bank took it), whether a parameter is
            what the layer multiplies (or convolves) its input with.
        rows: Returns where the outputs lie in a weight of two or more dimensions.
    """

    fits: Callable[[nn.Module], bool]
    is_weight: Callable[[str, Tensor | None], bool]
    rows: Callable[[Any, Shape], Rows]


def is_weight(module: nn.Module, parameter: str) -> bool:
    """Tell whether a parameter is what a layer multiplies (or convolves) its input with."""
    return _kind_of(module).is_weight(parameter, module._parameters.get(parameter))


def rows_of(module: nn.Module, shape: Shape) -> Rows:
    """Return where a layer's outputs lie in a weight; a vector's numbers are one output's."""
    if len(shape) < 2:
        return Rows(1, 1, 1, math.prod(shape))
    return _kind_of(module).rows(module, shape)


def scale_rows_of(module: nn.Module, shape: Shape, *, one_a_matrix: bool) -> Rows:
    """Return which numbers of a weight share a scale: an output's, or those of a whole matrix.

    A layer's weight is one matrix; experts are one each.
    """
    if not one_a_matrix or len(shape) < 2:
        return rows_of(module, shape)
    kind = _kind_of(module).rows
    if kind is _flat_experts or (kind is _by_dimensions and len(shape) == 3):
        return Rows(shape[0], math.prod(shape[1:-1]), 1, shape[-1])
    return Rows(1, shape[0], 1, math.prod(shape[1:]))


def fan_in_of(module: nn.Module, shape: Shape) -> int:
    """Return how many inputs one output sums over, as `torch.nn.init` counts them."""
    if len(shape) < 2 or isinstance(module, _TRANSPOSED_CONVOLUTIONS):
        return max(math.prod(shape[1:]), 1)  # torch takes every convolution for (out, in, ...)
    rows = rows_of(module, shape)
    return max(rows.summed * rows.inner, 1)


def fan_out_of(module: nn.Module, shape: Shape, fan_in: int) -> int:
    """Return how many outputs one input goes to, as `torch.nn.init` counts them.

    Of a convolution times the places of its kernel, and whatever its groups are; of experts in one.
    """
    is_convolution = isinstance(module, nn.modules.conv._ConvNd) or len(shape) > 3
    places = math.prod(shape[2:]) if is_convolution else 1
    matrices = scale_rows_of(module, shape, one_a_matrix=True).count if len(shape) > 1 else 1
    return max(math.prod(shape) // (fan_in * matrices) * places, 1)


def _kind_of(module: nn.Module) -> LayerKind:
    return next(kind for kind in _KINDS if kind.fits(module))


def _is_a(*classes: type) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, classes)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )


def _is_the_weight(name: str, _: Tensor | None) -> bool:
    return name == "weight"


def _is_stack(_: str, tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dim() == 3


def _outputs_first(_: nn.Module, shape: Shape) -> Rows:
    """(out, ...)."""
    return Rows(1, 1, shape[0], math.prod(shape[1:]))


def _inputs_first(_: nn.Module, shape: Shape) -> Rows:
    """(in, out)."""
    return Rows(1, shape[0], shape[1], 1)


def _inputs_by_groups(module: Any, shape: Shape) -> Rows:
    """(in, out of one group, ...), the inputs group by group."""
    return Rows(module.groups, shape[0] // module.groups, shape[1], math.prod(shape[2:]))


def _flat_experts(module: Any, shape: Shape) -> Rows:
    """(experts, everything else)."""
    outputs = shape[0] * module.out_channels
    return Rows(1, 1, outputs, math.prod(shape) // outputs)


def _by_dimensions(module: Any, shape: Shape) -> Rows:
    """(out, ...) but for (experts, out, in), or (experts, in, out) if ``module.is_transposed``."""
    if len(shape) != 3:
        return _outputs_first(module, shape)
    experts, first, second = shape
    if getattr(module, "is_transposed", False):
        return Rows(experts, first, second, 1)
    return Rows(1, 1, experts * first, second)


_TRANSPOSED_CONVOLUTIONS = nn.modules.conv._ConvTransposeNd

# fmt: off
_KINDS = (
    LayerKind(  # its output projection is a Linear of its own
        _is_a(nn.MultiheadAttention), lambda name, _: name.endswith("_proj_weight"), _by_dimensions
    ),
    LayerKind(
        _is_a(nn.RNNBase, nn.RNNCellBase), lambda name, _: name.startswith("weight_"),
        _by_dimensions,
    ),
    LayerKind(lambda module: "Experts" in type(module).__name__, _is_stack, _by_dimensions),
    LayerKind(_is_a(_TRANSPOSED_CONVOLUTIONS), _is_the_weight, _inputs_by_groups),
    LayerKind(_is_a(nn.modules.conv._ConvNd), _is_the_weight, _outputs_first),
    LayerKind(_is_a(nn.Linear), _is_the_weight, _by_dimensions),
    LayerKind(_is_transformers_conv1d, _is_the_weight, _inputs_first),
    LayerKind(  # timm's: what a forward does with it says that it is a weight
        lambda module: type(module).__name__ == "CondConv2d", lambda *_: False, _flat_experts
    ),
    LayerKind(lambda _: True, lambda *_: False, _by_dimensions),
)
# fmt: on
