"""The table of operators against torch's own schemas."""

import torch

from pemn_surgery.models import operators

TABLE = operators._OPERATORS


def schemas(name):
    """What ATen's overloads of an operator are called with, those with ``out`` left out."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, item) for item in packet.overloads()]
    named = [[argument.name for argument in item._schema.arguments] for item in overloads]
    return [names for names in named if "out" not in names]


def test_every_operator_stands_in_one_family():
    named = [name for names, _ in operators._FAMILIES for name in names.split()]
    assert len(named) > 100
    assert sorted(named) == sorted(TABLE)


def test_weights_stand_where_torch_has_them():
    checked = []
    for name, operator in TABLE.items():
        for positions in (operator.weights, operator.right):
            keywords = {item for item in positions if isinstance(item, str)}
            numbers = [item for item in positions if isinstance(item, int)]
            for arguments in schemas(name) if keywords else ():
                there = {arguments[number] for number in numbers if number < len(arguments)}
                assert there & keywords, (name, arguments)
                checked.append(name)
    assert {"linear", "conv2d", "convolution", "lstm", "gru_cell", "mm", "addmm"} <= set(checked)


def test_only_layers_and_products_have_weights():
    found = {operator.kind for operator in TABLE.values() if operator.weights or operator.right}
    assert found == {"layer", "product"}


def test_what_is_not_in_the_table_is_arithmetic():
    assert operators.look_up("add") == operators.Operator("arithmetic")


def test_items_of_lists_are_found_where_the_list_stands():
    wanted, other = torch.ones(1), torch.ones(1)
    assert operators.stands_at((other, [wanted]), {}, wanted, (1, "weight"))
    assert operators.stands_at((other,), {"weight": wanted}, wanted, (1, "weight"))
    assert not operators.stands_at((wanted, other), {"bias": wanted}, wanted, (1, "weight"))
    assert not operators.stands_at((), {}, wanted, (1, "weight"))
