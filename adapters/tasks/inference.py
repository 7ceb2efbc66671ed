"""Which task is this batch of? Asked of a model that carries many and was not told.

SupSup (Wortsman et al., NeurIPS 2020): run the mixture of all k adapters, each with weight 1 / k,
and follow the gradient of the output's entropy H with respect to those weights. The adapter whose
share, if it grew, would lower H most is the one that knows the batch.
"""

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pemn_surgery.adapters.whole_modules import choosing_layers
from pemn_surgery.errors import ConfigError, TaskInferenceError
from pemn_surgery.masks import in_force
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.mixture import Mixture
from pemn_surgery.masks.task_tensors import TaskTensors

MethodName = Literal["one_shot", "binary"]

# How many of so many adapters stay after a round.
_STAYING: dict[str, Callable[[int], int]] = {
    "one_shot": lambda adapters: 1,
    "binary": lambda adapters: math.ceil(adapters / 2),
}


@dataclass(frozen=True)
class TaskGuess:
    """The inferred task and what it was inferred from.

    Attributes:
        name: The adapter to use.
        rounds: For each round dH/dalpha of the adapters that were mixed in it, each with weight
            1 / their number, in the order of the adapters.
    """

    name: str
    rounds: tuple[Mapping[str, float], ...]

    @property
    def steps(self) -> int:
        """How many gradients were taken: 1, or ceil(log2(k)) for "binary"."""
        return len(self.rounds)

    @property
    def gradients(self) -> dict[str, float]:
        """dH/dalpha of every adapter, in the last round that it was mixed in."""
        return {name: value for taken in self.rounds for name, value in taken.items()}


def infer_task(
    model: nn.Module,
    inputs: Any,
    *,
    adapters: Sequence[str] | None = None,
    method: MethodName = "one_shot",
) -> TaskGuess:
    """Infer which adapter a batch of one task belongs to; activate it with ``set_adapter``.

    The model runs in eval mode, once (and backward) a round, with fill x sum of alpha_i (mask x
    scale)_i as every weight. What else tasks own is mixed with the same weights: norms, running
    statistics, biases and the tensors of ``modules_to_save``. The model is left as it was: mode,
    active and merged adapters, gradients, statistics, kept weights. Calls of a `PeftModel` that
    other threads have begun go on as they began; those that they are about to begin wait.

    Args:
        model: Any model that carries adapters of this method, also inside a wrapper. Its forward
            returns logits, a float tensor of shape (..., classes), or something that has them as
            ``logits``.
        inputs: The batch: a tensor, a mapping of keyword arguments, or a tuple of positional ones.
        adapters: The candidates. None takes all that have masks.
        method: "one_shot" takes one gradient and the adapter with the smallest; "binary" drops the
            half with the larger gradients and takes another, until one is left.

    Returns:
        The guess. Of equal gradients the earlier adapter's is taken for smaller.

    Raises:
        ConfigError: If there is no such method.
        TaskInferenceError: If the model has no such adapters, one adds signs, heads differ in
            shape, the forward returns no logits of at least two classes or runs without gradients,
            or a gradient is not finite.
    """
    names = _candidates(model, adapters)
    if method not in _STAYING:
        message = f"infer_task got method={method!r}; it needs one of {', '.join(_STAYING)}."
        raise ConfigError(message)
    _check_forms(model, names)
    _check_heads(model, names)
    _check_rows(model, names)
    rounds: list[Mapping[str, float]] = []
    with _only_looking(model):
        batch = tree_map(_usable, inputs)
        while not rounds or len(names) > 1:
            rounds.append(_entropy_gradients(model, batch, names))
            best = sorted(names, key=rounds[-1].__getitem__)[: _STAYING[method](len(names))]
            names = tuple(name for name in names if name in best)
    return TaskGuess(next(iter(names)), tuple(rounds))


def _candidates(model: nn.Module, adapters: Sequence[str] | None) -> tuple[str, ...]:
    layers = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    held = tuple(dict.fromkeys(name for layer in layers for name in layer.pemn_masks))
    names = held if adapters is None else tuple(adapters)
    unknown = [name for name in names if name not in held]
    if unknown or not names or len(set(names)) < len(names):
        message = (
            f"infer_task got adapters={adapters!r}; it needs one or more, each once, of those that "
            f"have masks in the model: {', '.join(held) or 'there are none'}. Load the tasks with "
            "model.load_adapter first."
        )
        raise TaskInferenceError(message)
    return names


def _check_forms(model: nn.Module, names: Sequence[str]) -> None:
    layers = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    masks = [(name, layer.pemn_masks._modules.get(name)) for layer in layers for name in names]
    adding = list(dict.fromkeys(name for name, mask in masks if getattr(mask, "adds", False)))
    if adding:
        message = (
            f"The adapters {', '.join(adding)} add signs to the weights (form='sign_delta'); only "
            "masks, which multiply them, are mixed. Infer among other adapters (adapters=[...])."
        )
        raise TaskInferenceError(message)


def _check_heads(model: nn.Module, names: Sequence[str]) -> None:
    for path, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        heads = [_tensors(head) for head in _heads(wrapper, names)]
        shapes = [{name: tuple(one.shape) for name, one in head.items()} for head in heads]
        for name, found in _others(names, shapes):
            message = (
                f"{path} of adapter {name!r} has the shapes {found}, that of {names[0]!r} "
                f"{shapes[0]}: their logits cannot be mixed. Infer among adapters with equal "
                "heads (adapters=[...]), or give all tasks one head of the largest size."
            )
            raise TaskInferenceError(message)


def _check_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters with rows for different numbers of added tokens."""
    for module in (one for one in model.modules() if isinstance(one, TaskTensors)):
        for tensor in module.grown_tensors():
            held = [module.new_rows(tensor, (name,)) for name in names]
            counts = [0 if rows is None else len(rows) for rows in held]
            for name, count in _others(names, counts):
                message = (
                    f"Adapter {name!r} has {count} new rows of {tensor!r} in {module.target!r} "
                    f"(added tokens), {names[0]!r} has {counts[0]}: their logits cannot be mixed. "
                    "Infer among adapters with equal numbers of tokens (adapters=[...])."
                )
                raise TaskInferenceError(message)


def _others(names: Sequence[str], found: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Return the adapters for which something else was found than for the first."""
    return ((name, one) for name, one in zip(names, found, strict=True) if one != found[0])


def _heads(wrapper: ModulesToSaveWrapper, names: Sequence[str]) -> list[nn.Module]:
    """Return each adapter's copy of a module; one without a copy uses the original."""
    held = wrapper.modules_to_save._modules
    return [cast("nn.Module", held.get(name, wrapper.original_module)) for name in names]


def _tensors(head: nn.Module) -> dict[str, Tensor]:
    return {**dict(head.named_parameters()), **dict(head.named_buffers())}


@contextmanager
def _only_looking(model: nn.Module) -> Iterator[None]:
    """Run in eval mode with gradients; put every module's mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _usable(value: Any) -> Any:
    """Return an input as it is, or a copy that autograd can use where inference mode made it."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _entropy_gradients(model: nn.Module, inputs: Any, names: tuple[str, ...]) -> dict[str, float]:
    """Return dH/dalpha by adapter, where all have the weight 1 / their number."""
    alphas = torch.full((len(names),), 1 / len(names), requires_grad=True)
    with _mixed(model, Mixture(names, alphas)):
        entropy = _entropy(_logits(_call(model, inputs)))
        found = _gradient(entropy, alphas)
    if not bool(torch.isfinite(found).all()):
        message = (
            f"The entropy of the mixture of {len(names)} adapters has a gradient that is not finite"
            f" (entropy {entropy.item()}). Give inputs and adapters whose logits are finite."
        )
        raise TaskInferenceError(message)
    return dict(zip(names, found.tolist(), strict=True))


@contextmanager
def _mixed(model: nn.Module, mixture: Mixture) -> Iterator[None]:
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
        heads = _heads(wrapper, mixture.names)
        return functional_call(_shell(heads[0]), _mixed_tensors(heads, mixture), given, keywords)

    return run_mixed


def _shell(head: nn.Module) -> nn.Module:
    """Return a copy of a module with the very same tensors.

    ``functional_call`` puts others in their place while it runs, where another thread would see it.
    """
    return copy.deepcopy(head, {id(tensor): tensor for tensor in _tensors(head).values()})


def _mixed_tensors(heads: Sequence[nn.Module], mixture: Mixture) -> dict[str, Tensor]:
    """Return the mixed tensors of a module; as in `TaskTensors`, buffers pass no gradients on."""
    tables = [_tensors(head) for head in heads]
    mixed = {name: mixture.of_tensors([table[name] for table in tables]) for name in tables[0]}
    parameters = dict(heads[0].named_parameters())
    return {name: m if name in parameters else m.detach() for name, m in mixed.items()}


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() == 0 or logits.shape[-1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        message = (
            f"The model returned {found}; infer_task needs logits of shape (..., classes) with two "
            "classes or more, as a tensor or as .logits of what is returned."
        )
        raise TaskInferenceError(message)
    return logits


def _entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax in nats, averaged over everything but the classes."""
    chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(chances.exp() * chances).sum(-1).mean()


def _gradient(entropy: Tensor, alphas: Tensor) -> Tensor:
    found = None
    if entropy.requires_grad:
        (found,) = torch.autograd.grad(entropy, alphas, allow_unused=True)
    if found is None:
        message = (
            "The logits have no gradient with respect to the masks: the forward turns gradients "
            "off (torch.no_grad) or detaches. Give infer_task the model without that."
        )
        raise TaskInferenceError(message)
    return found
