"""The unmasked tensors of a plan: which of them every task has its own copy of."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from pemn_surgery.masks.attached import held_masks
from pemn_surgery.models.graph_modules import GraphUse
from pemn_surgery.planning.plan import Owned
from pemn_surgery.planning.request import NewRows, Request
from pemn_surgery.planning.roles import (
    base_modules,
    full_name,
    is_container,
    is_embedding,
    is_norm,
)


def owned_tensors(
    model: nn.Module, request: Request, masked: set[str], uses: Mapping[int, GraphUse]
) -> Iterator[Owned]:
    """Yield the unmasked tensors that each task has its own copy of."""
    seen: dict[int, str] = {}
    for path, module in base_modules(model):
        if request.is_saved_whole(path):
            continue
        for name, tensor in _unmasked_tensors(path, module, masked):
            has_gradient = tensor.is_floating_point() or tensor.is_complex()
            can_train = isinstance(tensor, nn.Parameter) and has_gradient
            use = uses.get(id(tensor), GraphUse())
            trained = can_train and _is_trained(module, request, use)
            full = full_name(path, name)
            carried = full in request.carried or _is_carried(module, name, tensor, request, use)
            new = request.new_rows.get(full)
            if not (trained or carried or new):
                continue
            first = seen.setdefault(id(tensor), full)
            # PEFT trains 16-bit tensors of its layers in float32, and saves them so.
            element = max(tensor.element_size(), 4 if trained else 0)
            item = _describe_owned(path, name, tensor, element, trained=trained)
            tied_to = "" if first == full else first
            item = replace(item, saved=not is_idle_counter(module, name), tied_to=tied_to)
            yield item if new is None else _with_new_rows(item, new, whole=trained or carried)
    yield from _behind_masks(model, request, masked)


def _with_new_rows(item: Owned, new: NewRows, *, whole: bool) -> Owned:
    """Return a tensor with as many new rows as the task has; where the base's stay, these alone."""
    first = 0 if whole else new.first
    shape = (new.first + new.more - first, *item.shape[1:])
    element = item.nbytes // max(math.prod(item.shape), 1)
    nbytes = math.prod(shape) * (element if whole else max(element, 4))
    trained = item.trained or not whole
    return replace(item, shape=shape, nbytes=nbytes, trained=trained, first_row=first)


def _behind_masks(model: nn.Module, request: Request, masked: set[str]) -> Iterator[Owned]:
    """Yield the new rows of weights whose other rows are masked, of tied weights once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        held = held_masks(module)
        for name, tensor in module._parameters.items():
            full = full_name(path, name)
            new = request.new_rows.get(full)
            made = held.get(name)
            like = tensor if made is None else made
            if new is None or like is None or full not in masked or id(like) in seen:
                continue
            seen.add(id(like))
            shape = (new.more, *like.shape[1:])
            element = 4 if tensor is None else max(tensor.element_size(), 4)
            nbytes = math.prod(shape) * element
            yield Owned(path, name, shape, True, nbytes, trained=True, first_row=new.first)


def whole_tensors(model: nn.Module, request: Request) -> Iterator[Owned]:
    """Yield the tensors of modules that PEFT trains and saves as a whole."""
    for path, module in base_modules(model):
        if path and request.is_saved_whole(path):
            for name, tensor in _unmasked_tensors(path, module, set()):
                yield _describe_owned(path, name, tensor, tensor.element_size(), trained=True)


def frozen_norms(model: nn.Module, request: Request) -> Iterator[str]:
    """Yield the paths of norms that stay in eval mode while the task trains."""
    if request.rest == "freeze":
        for path, module in base_modules(model):
            if "running_mean" in module._buffers and not request.is_saved_whole(path):
                yield path


def _describe_owned(path: str, name: str, tensor: Tensor, element: int, *, trained: bool) -> Owned:
    is_float = tensor.is_floating_point() or tensor.is_complex()
    return Owned(path, name, tuple(tensor.shape), is_float, tensor.numel() * element, trained)


def _unmasked_tensors(
    path: str, module: nn.Module, masked: set[str]
) -> Iterator[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        full = full_name(path, name)
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
    seed and this file, so everything that a state dict holds travels, of any type: a permutation
    that was drawn once is an integer buffer. Frozen embeddings stay with the base.
    """
    if "running_mean" in module._buffers and name in module._buffers:
        return request.rest != "freeze" or request.spec.generated
    return request.spec.generated and not is_embedding(module, name, use)


def is_idle_counter(module: nn.Module, name: str) -> bool:
    """Tell whether a tensor is BatchNorm's batch counter, which is read only without a momentum.

    An exported graph has the momentum as a constant; its modules are plain containers.
    """
    has_momentum = getattr(module, "momentum", None) is not None or is_container(module)
    return name == "num_batches_tracked" and has_momentum
