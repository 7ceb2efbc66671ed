"""Run a model as a mixture of its adapters, and leave it as it was.

Everything that tasks own is read mixed meanwhile: masks and scales, norms, running statistics,
biases (`pemn_surgery.masks.mixture`), and modules that tasks have whole, which run with their
tensors summed. A mixture of one adapter is that adapter, whatever is active, merged or disabled.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pemn_surgery.adapters.whole_modules import choosing_layers
from pemn_surgery.masks import in_force
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.mixture import Mixture
from pemn_surgery.masks.task_tensors import TaskTensors


@contextmanager
def only_looking(model: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Run in eval mode, with gradients or without; put every module's mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(mode=False), torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def usable(inputs: Any) -> Any:
    """Return inputs with copies that autograd can use of what inference mode made."""
    return tree_map(_usable, inputs)


def _usable(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a mapping of keyword arguments or a tuple of positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def mixed(model: nn.Module, mixture: Mixture) -> Iterator[None]:
    """Let everything that tasks own be read as a mixture, in this thread."""
    with in_force.switching(choosing_layers(model)), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (MaskedWeight, TaskTensors)):
                stack.callback(setattr, module, "mixture", module.mixture)
                module.mixture = mixture
            elif isinstance(module, ModulesToSaveWrapper):
                hook = module.register_forward_hook(_mixing_hook(mixture), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _mixing_hook(mixture: Mixture) -> Callable[..., Any]:
    """Return a hook that replaces a whole module's output by that of its mixed copy."""
    thread = threading.get_ident()

    def run_mixed(
        wrapper: ModulesToSaveWrapper, given: tuple[Any, ...], keywords: dict[str, Any], _: Any
    ) -> Any:
        if threading.get_ident() != thread:
            return None
        heads = heads_of(wrapper, mixture.names)
        return functional_call(_shell(heads[0]), _mixed_tensors(heads, mixture), given, keywords)

    return run_mixed


def heads_of(wrapper: ModulesToSaveWrapper, names: Sequence[str]) -> list[nn.Module]:
    """Return each adapter's copy of a module; one without a copy uses the original."""
    held = wrapper.modules_to_save._modules
    return [cast("nn.Module", held.get(name, wrapper.original_module)) for name in names]


def tensors_of(head: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name."""
    return {**dict(head.named_parameters()), **dict(head.named_buffers())}


def _shell(head: nn.Module) -> nn.Module:
    """Return a copy of a module with the very same tensors.

    ``functional_call`` puts others in their place while it runs, where another thread would see it.
    """
    return copy.deepcopy(head, {id(tensor): tensor for tensor in tensors_of(head).values()})


def _mixed_tensors(heads: Sequence[nn.Module], mixture: Mixture) -> dict[str, Tensor]:
    """Return the mixed tensors of a module; as in `TaskTensors`, buffers pass no gradients on."""
    tables = [tensors_of(head) for head in heads]
    summed = {name: mixture.of_tensors([table[name] for table in tables]) for name in tables[0]}
    parameters = dict(heads[0].named_parameters())
    return {name: m if name in parameters else m.detach() for name, m in summed.items()}
