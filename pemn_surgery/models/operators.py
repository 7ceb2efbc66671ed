"""Torch's operators by name: one table of what each does with its arguments.

The names are those of torch.nn.functional, torch, operator and torch.ops.aten; arguments stand at
the same positions in all of them. A forward that is followed meets the operators while it runs
(`origins`, `watcher`, `shapes`), a graph has them as nodes (`graph_modules`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# Positions of arguments: by number and by keyword.
Positions = tuple[int | str, ...]

# What an operator makes of its tensors.
Kind = Literal[
    "layer",  # multiplies an input with what stands at `weights`: (outputs, inputs, ...)
    "product",  # multiplies two factors, of which either may be a weight
    "lookup",  # looks rows up by the ids in an input
    "norm",  # normalises; a parameter scales or shifts
    "choice",  # chooses by the values of an input
    "join",  # joins tensors to one
    "part",  # takes a part of its first tensor, from where an input may say
    "form",  # takes its first tensor, and of the second one only the form
    "filled",  # takes only the form of a tensor; the result's values are known
    "unfilled",  # takes only the form of a tensor
    "arithmetic",  # works element by element, or moves elements: all others
]


class Operator(NamedTuple):
    """What is known of an operator. Tensors that stand nowhere named are inputs or biases.

    Attributes:
        kind: What it makes of its tensors.
        weights: Where weights stand; with a product where the left factor does. A product with
            positions of neither factor takes a weight anywhere.
        right: Where the right factor of a product stands: (..., inputs, outputs).
        passes: In what shape a graph passes a weight on behind it: its "own", a "new" one that
            the operator gives it, or that of the "whole" parameter, which it gets back; "" where
            the weight's way through a graph ends, so that its use is here.
        shape: Returns an empty result for its arguments; None where torch has to be asked.
    """

    kind: Kind = "arithmetic"
    weights: Positions = ()
    right: Positions = ()
    passes: Literal["", "own", "new", "whole"] = ""
    shape: Callable[..., Tensor | None] | None = None


# Results whose shape is clear from the arguments: empty, on the meta device. Torch finds a shape in
# Python, at up to a millisecond a call, most of what a forward on shapes takes. None: torch shall
# say what is wrong with the arguments.


def _like(x: Tensor, *_: Any, **options: Any) -> Tensor:
    """Return a result like the first argument, its strides included."""
    return torch.empty_like(x)


def _normalised(x: Tensor, *_: Any, **options: Any) -> Tensor:
    """Return a contiguous result of the first argument's shape and dtype."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return the result (..., out) of a linear map of (..., in) by (out, in)."""
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        return None
    same = x.dtype == weight.dtype and (bias is None or bias.shape == weight.shape[:1])
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if same else None


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor | None:
    """Return the result (..., queries, width) of attention to values (..., keys, width)."""
    same = query.dim() == key.dim() == value.dim() and key.shape[-2] == value.shape[-2]
    if not same or query.shape[:-2] != value.shape[:-2] or query.shape[-1] != key.shape[-1]:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


# fmt: off
_FAMILIES: tuple[tuple[str, Operator], ...] = (
    # Layers. A recurrent operator on packed sequences has one more argument in front.
    ("linear", Operator("layer", (1, "weight"), shape=_projected)),
    ("conv1d conv2d conv3d convolution _convolution", Operator("layer", (1, "weight"))),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", Operator("layer", (1, "weight"))),
    ("deform_conv2d", Operator("layer", (1, "weight"))),
    ("bilinear", Operator("layer", (2, "weight"))),
    ("lstm gru rnn_tanh rnn_relu", Operator("layer", (2, 3, "params"))),
    ("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", Operator("layer", (2, 3, "w_ih", "w_hh"))),
    ("multi_head_attention_forward", Operator("layer", (
        *(5, 11, "in_proj_weight", "out_proj_weight"),
        *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ))),
    ("_native_multi_head_attention", Operator("layer", (5, 7, "qkv_weight", "proj_weight"))),
    ("_transformer_encoder_layer_fwd", Operator("layer", (3, 5, 14, 16))),
    # Products.
    ("matmul __matmul__ mm bmm", Operator("product", (0, "self"), (1, "mat2", "other"))),
    ("addmm baddbmm addbmm", Operator("product", (1, "mat1", "batch1"), (2, "mat2", "batch2"))),
    ("einsum tensordot inner dot mv addmv __rmatmul__", Operator("product")),
    ("_grouped_mm grouped_mm chain_matmul multi_dot", Operator("product")),
    ("scaled_dot_product_attention", Operator(shape=_attended)),
    # Rows, norms, choices.
    ("embedding embedding_bag", Operator("lookup")),
    ("layer_norm rms_norm group_norm", Operator("norm", shape=_normalised)),
    ("instance_norm native_layer_norm", Operator("norm")),
    ("batch_norm", Operator("norm", passes="own", shape=_like)),
    ("topk argmax argmin sort argsort msort multinomial gumbel_softmax", Operator("choice")),
    # Joins, parts, forms. Weight standardisation and fusing have their weights in these.
    ("cat", Operator("join", passes="own")),
    ("concat concatenate stack hstack vstack", Operator("join")),
    ("select", Operator("part", passes="new")),
    ("__getitem__ index index_select gather take_along_dim", Operator("part")),
    ("view_as reshape_as", Operator("form", passes="whole")),
    ("type_as to", Operator("form", passes="own")),
    ("expand_as", Operator("form")),
    ("zeros_like ones_like full_like new_zeros new_ones new_full new_tensor", Operator("filled")),
    ("empty_like rand_like randn_like new_empty", Operator("unfilled")),
    # Casts, copies, other views.
    ("_to_copy float half bfloat16 double type", Operator(passes="own")),
    ("contiguous clone detach alias", Operator(passes="own")),
    ("t transpose permute swapaxes movedim T mT numpy_T flatten unflatten", Operator(passes="new")),
    ("view _unsafe_view reshape squeeze unsqueeze expand", Operator(passes="new")),
    ("slice narrow chunk split split_with_sizes unbind getitem", Operator(passes="new")),
    ("gelu", Operator(shape=_like)),
)
# fmt: on

_OPERATORS = {name: operator for names, operator in _FAMILIES for name in names.split()}

_OTHER = Operator()


def look_up(name: str) -> Operator:
    """Return what is known of an operator by its bare name."""
    return _OPERATORS.get(name, _OTHER)


def is_in_place(name: str) -> bool:
    """Tell whether an operator writes into its first argument, by its name."""
    augmented = name.startswith("__i") and name.endswith("__")
    return (
        name in ("__setitem__", "setitem")
        or (augmented and name not in ("__int__", "__index__", "__invert__"))
        or (name.endswith("_") and not name.endswith("__"))
    )


def stands_at(
    args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Any, positions: Positions
) -> bool:
    """Tell whether this very object is an argument, or in a list that is one, at some positions."""
    for position, value in [*enumerate(args), *kwargs.items()]:
        values = value if isinstance(value, (list, tuple)) else (value,)
        if position in positions and any(item is wanted for item in values):
            return True
    return False
