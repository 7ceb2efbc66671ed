"""Torch's operators by name: where their weights stand, and what they do to their arguments.

The names are those of torch.nn.functional, torch, operator and torch.ops.aten; the places are the
same in all of them. `graph` meets them while a forward runs, `graph_modules` in a graph's nodes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Places = tuple[int | str, ...]

# Layers: the places, by number and by keyword, of what they multiply their input with. A recurrent
# operator on packed sequences has one more argument in front.
LAYERS: dict[str, Places] = {
    "linear": (1, "weight"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), (1, "weight")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (1, "weight")),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (2, 3, "params")),
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), (2, 3, "w_ih", "w_hh")
    ),
    "bilinear": (2, "weight"),
    "deform_conv2d": (1, "weight"),
    "multi_head_attention_forward": (
        *(5, 11, "in_proj_weight", "out_proj_weight"),
        *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
    "_native_multi_head_attention": (5, 7, "qkv_weight", "proj_weight"),
    "_transformer_encoder_layer_fwd": (3, 5, 14, 16),
}

# Matrix products: either factor may be a weight; the places of the left and of the right one.
PRODUCTS: dict[str, tuple[Places, Places]] = {
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), ((0, "self"), (1, "mat2", "other"))),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), ((1, "mat1", "batch1"), (2, "mat2", "batch2"))),
}

# Further products, of which some argument may be a weight.
_OTHER_PRODUCTS = {
    *("einsum", "tensordot", "inner", "dot", "mv", "addmv", "__rmatmul__"),
    *("_grouped_mm", "grouped_mm", "chain_matmul", "multi_dot"),
}

# What joins tensors to one.
JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}

# What looks rows up by the ids in an input.
LOOKUPS = {"embedding", "embedding_bag"}

# What chooses by the values of an input.
CHOICES = {"topk", "argmax", "argmin", "sort", "argsort", "msort", "multinomial", "gumbel_softmax"}

# What takes parts of its first tensor, by places that may come from the input.
TAKES_PARTS = {"__getitem__", "index", "index_select", "gather", "take_along_dim", "select"}

# What takes from its second tensor only the form.
TAKES_FORM = {"expand_as", "view_as", "reshape_as", "type_as", "to"}

# Factories: they take from a tensor only the form.
FACTORIES = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
}


def is_product(operator: str) -> bool:
    """Tell whether an operator multiplies an input with a weight."""
    return operator in LAYERS or operator in PRODUCTS or operator in _OTHER_PRODUCTS


def is_in_place(operator: str) -> bool:
    """Tell whether an operator writes into its first argument, by its name."""
    augmented = operator.startswith("__i") and operator.endswith("__")
    return (
        operator in ("__setitem__", "setitem")
        or (augmented and operator not in ("__int__", "__index__", "__invert__"))
        or (operator.endswith("_") and not operator.endswith("__"))
    )


def is_at(args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Any, places: Places) -> bool:
    """Tell whether an argument, or an item of a list that is one, stands at one of some places.

    Args:
        args: Arguments by place.
        kwargs: Arguments by keyword.
        wanted: The very object that is looked for.
        places: Places and keywords.
    """
    for place, value in [*enumerate(args), *kwargs.items()]:
        values = value if isinstance(value, (list, tuple)) else (value,)
        if place in places and any(item is wanted for item in values):
            return True
    return False
