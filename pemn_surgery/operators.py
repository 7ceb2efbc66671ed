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
}

# Matrix products: either factor may be a weight; the places of the left and of the right one.
PRODUCTS: dict[str, tuple[Places, Places]] = {
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), ((0, "self"), (1, "mat2", "other"))),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), ((1, "mat1", "batch1"), (2, "mat2", "batch2"))),
}

# Further products, of which some argument may be a weight.
_OTHER_PRODUCTS = {
    *("einsum", "tensordot", "bilinear", "inner", "mv", "addmv", "__rmatmul__"),
    *("_grouped_mm", "grouped_mm", "chain_matmul", "multi_dot"),
    *("multi_head_attention_forward", "_transformer_encoder_layer_fwd"),
}

# What joins tensors to one.
JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}


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
