"""The only place where a model's modules are changed.

A layer keeps being the same object: its class becomes a subclass of its own class with a property
in place of each tensor that adapters decide (`swapped` puts it on). Why not a wrapper, a
parametrization or a replaced layer: people read ``layer.weight``, subclass ``forward``, keep
modules in plain lists, test ``isinstance``, name state-dict keys. A property on the class serves
all of them, and base state-dict keys stay what they were (``docs/mechanism.md`` compares the four
ways).
"""

import copy
from typing import cast

from torch import Tensor, nn

from pemn_surgery.masks.attached import names_owned
from pemn_surgery.masks.masked_weight import MaskedWeight, masked_child_name
from pemn_surgery.masks.places import SHARED_MASKS, SHARED_TENSORS
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors
from pemn_surgery.surgery.swapped import swap, unswap


def mask_parameter(child: MaskedWeight) -> None:
    """Put a property in place of a parameter.

    With a bank the layer's own weight is dropped, so that its memory is freed.
    """
    layer, parameter = child.owner, child.parameter
    layer.add_module(masked_child_name(parameter), child)
    if child.bank is not None:
        child.marks = dict(vars(layer._parameters[parameter]))
        layer._parameters[parameter] = None
    swap(layer, masks=(parameter,))


def untie_parameter(child: MaskedWeight) -> None:
    """Give a layer its own copy of a parameter that it shares with a module that stays."""
    shared = cast("nn.Parameter", child.owner._parameters[child.parameter])
    child.untied.append(shared)
    if child.bank is None:
        copied = copy.deepcopy(shared)  # with what a quantised one carries beside its values
        copied.requires_grad = False
        vars(copied).update({**vars(shared), **vars(copied)})
        child.owner._parameters[child.parameter] = copied


def share_mask(module: nn.Module, parameter: str, child: MaskedWeight) -> None:
    """Let a second module whose weight is tied read the first one's effective weight."""
    module.__dict__.setdefault(SHARED_MASKS, {})[parameter] = child
    child.shared_with.append((module, parameter))
    if child.bank is not None:
        module._parameters[parameter] = None
    swap(module, masks=(parameter,))


def own_tensors(child: TaskTensors, names: tuple[str, ...]) -> None:
    """Put properties in place of tensors that tasks own."""
    child.owner.add_module(TASK_CHILD, child)
    swap(child.owner, tensors=names)


def share_tensor(module: nn.Module, name: str, child: TaskTensors, source: str) -> None:
    """Let a second module that is tied to an owned tensor, ``source``, read the owner's copy."""
    shared = module.__dict__.setdefault(SHARED_TENSORS, {})
    if name not in shared:
        shared[name] = (child, source)
        child.shared_with.append((module, name))
        swap(module, tensors=(name,))


def restore_parameter(child: MaskedWeight, weight: Tensor | None) -> None:
    """Leave a plain parameter again: with these values, or with the layer's own if None."""
    layer, parameter = child.owner, child.parameter
    own = layer._parameters.get(parameter)
    if weight is None and child.untied:
        own = child.untied[0]
    elif own is None:
        values = weight if weight is not None else child.bare().clone()
        own = nn.Parameter(values.contiguous(), requires_grad=False)
        vars(own).update(child.marks)
    elif weight is not None:
        own.data = weight.data
    layer._parameters[parameter] = own
    del layer._modules[masked_child_name(parameter)]
    unswap(layer, (parameter,))
    for module, name in child.shared_with:
        module._parameters[name] = own
        _release(module, name, SHARED_MASKS)


def restore_tensors(child: TaskTensors, *, keep_active: bool) -> None:
    """Leave plain tensors again: the active adapter's values (``keep_active``), or the base's."""
    module = child.owner
    names = names_owned(module)
    for name in names:
        value = child.active_tensor(name) if keep_active else None
        base = child.base(name)
        if value is not None and base is not None:
            base.data = value.detach().to(base.dtype).clone()
    del module._modules[TASK_CHILD]
    unswap(module, names)
    for second, name in child.shared_with:
        _release(second, name, SHARED_TENSORS)


def _release(module: nn.Module, name: str, kind: str) -> None:
    """Let a tied second module read its own, equal, tensor again."""
    shared = module.__dict__[kind]
    del shared[name]
    if not shared:
        del module.__dict__[kind]
    unswap(module, (name,))
