"""Whose running statistics does a batch have? How networks with BatchNorm tell a task.

A task's running statistics are the mean M and the variance V that each channel of a BatchNorm
layer's inputs had while the task trained. Under the task's own adapter a batch of it has nearly the
same, a mean m and a variance v; under another adapter, or of another task, it has not. How far off
it is, is the divergence of one normal distribution from the other,

    KL(N(m, v) || N(M, V)) = (v / V - 1 - log(v / V) + (m - M)^2 / V) / 2    [nats],

averaged over the channels of each layer, then over the layers. It does not change when a channel is
shifted or scaled, so adapters whose activations are large or small compare fairly.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pemn_surgery.adapters.tasks.mixing import call, mixed
from pemn_surgery.errors import TaskInferenceError
from pemn_surgery.masks.attached import find_owned
from pemn_surgery.masks.mixture import Mixture
from pemn_surgery.masks.task_tensors import TensorSet


def divergences(model: nn.Module, inputs: Any, names: Sequence[str]) -> dict[str, float]:
    """Return how far a batch's statistics are from each adapter's running ones, in nats a channel.

    The model runs once an adapter. The layers are those that all adapters own running statistics of
    and that run; one that runs several times counts with the mean of these times.

    Raises:
        TaskInferenceError: If there are no such layers, or a divergence is not finite.
    """
    norms = {name: dict(_own_norms(model, name)) for name in names}
    paths = _common(norms, model)
    seen = {name: _look(model, inputs, name, norms[name], paths) for name in names}
    ran = [path for path in paths if all(seen[name][path] for name in names)]
    _check_ran(ran, paths)
    found = {name: fmean(fmean(map(float, seen[name][path])) for path in ran) for name in names}
    _check_finite(found)
    return found


@dataclass(frozen=True)
class _Norm:
    """A BatchNorm layer with the running statistics of one adapter, tensors of shape [channels]."""

    module: _BatchNorm
    mean: Tensor
    variance: Tensor


def _own_norms(model: nn.Module, adapter: str) -> Iterator[tuple[str, _Norm]]:
    """Yield the layers whose running statistics moved with an adapter's training, by path."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            mean, variance = (
                _moved(module, f"running_{what}", adapter) for what in ("mean", "var")
            )
            if mean is not None and variance is not None:
                yield path, _Norm(module, mean, variance)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for below, layer in module.modules_to_save[adapter].named_modules():
                if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                    variance = cast("Tensor", layer.running_var)
                    yield f"{path}.{below}".strip("."), _Norm(layer, layer.running_mean, variance)


def _moved(module: _BatchNorm, name: str, adapter: str) -> Tensor | None:
    """Return an adapter's copy of a statistic, unless it stood still while the adapter trained."""
    owned = find_owned(module, name)
    held = None if owned is None else owned[0].pemn_tensors._modules.get(adapter)
    if owned is None or not isinstance(held, TensorSet) or held.keeps_eval:
        return None
    return held(owned[1])


def _common(norms: Mapping[str, Mapping[str, _Norm]], model: nn.Module) -> list[str]:
    """Return the layers that every adapter owns running statistics of."""
    without = [name for name, own in norms.items() if not own]
    if without:
        layers = sum(isinstance(module, _BatchNorm) for module in model.modules())
        message = (
            f"method='statistics' needs running statistics that moved while each task trained; "
            f"{', '.join(without)} owns none (BatchNorm layers in the model: {layers}; "
            "rest='freeze' leaves them still). Train tasks with rest='stats', infer among adapters "
            "that own some (adapters=[...]), or use method='one_shot' or 'binary'."
        )
        raise TaskInferenceError(message)
    first, *others = norms.values()
    paths = [path for path in first if all(path in own for own in others)]
    if not paths:
        owned = "; ".join(f"{name}: {', '.join(own)}" for name, own in norms.items())
        message = (
            f"No layer's running statistics are owned by all {len(norms)} adapters ({owned}), so "
            "they cannot be compared. Infer among adapters that own those of the same layers "
            "(adapters=[...]), or use method='one_shot' or 'binary'."
        )
        raise TaskInferenceError(message)
    return paths


def _look(
    model: nn.Module, inputs: Any, adapter: str, norms: Mapping[str, _Norm], paths: Sequence[str]
) -> dict[str, list[Tensor]]:
    """Return an adapter's divergences, one for each time that a layer runs.

    Compiled code would not call hooks that are new to it, so everything runs uncompiled.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    alone = Mixture((adapter,), torch.ones(1))
    with mixed(model, alone), torch.compiler.set_stance("force_eager"), ExitStack() as stack:
        for path in paths:
            hook = _looking(norms[path], seen[path])
            handle = norms[path].module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        call(model, inputs)
    return seen


def _looking(norm: _Norm, seen: list[Tensor]) -> Callable[..., None]:
    """Return a hook that notes the divergence of what a layer gets, in this thread.

    It is a function, and no method: copies of a module that a task has whole are made of it while
    it runs, and a copied function is the same one, which notes in the same list.
    """
    thread = threading.get_ident()

    def look(_: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            inputs = given[0] if given else keywords["input"]
            seen.append(_divergence(inputs.detach(), norm))

    return look


def _divergence(inputs: Tensor, norm: _Norm) -> Tensor:
    """Return KL(batch || running), averaged over channels; inputs of shape [n, channels, ...].

    As BatchNorm has it, eps is added to every variance, and the batch's is that of n - 1. One value
    a channel has no variance: the running one stands in for it, which leaves the mean's term.
    """
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    dims = [dim for dim in range(wide.dim()) if dim != 1]
    mean, variance = norm.mean.to(wide), norm.variance.to(wide)
    if wide.numel() <= wide.shape[1]:
        seen_mean, seen_variance = wide.mean(dims), variance
    else:
        seen_variance, seen_mean = torch.var_mean(wide, dims)
    width = variance + norm.module.eps
    ratio = (seen_variance + norm.module.eps) / width
    return ((ratio - 1 - ratio.log() + (seen_mean - mean).square() / width) / 2).mean()


def _check_ran(ran: Sequence[str], paths: Sequence[str]) -> None:
    if not ran:
        message = (
            f"None of the {len(paths)} BatchNorm layers whose running statistics the adapters own "
            f"was called by the forward (first: {paths[0]}), as in an exported graph, which has "
            "their operations in place of them. Give infer_task the model that was exported, or "
            "use method='one_shot' or 'binary'."
        )
        raise TaskInferenceError(message)


def _check_finite(found: Mapping[str, float]) -> None:
    wrong = {name: value for name, value in found.items() if not abs(value) < float("inf")}
    if wrong:
        message = (
            f"Divergences of the batch's statistics are not finite: {wrong}. Give one sample or "
            "more, and inputs and adapters whose activations and running statistics are finite."
        )
        raise TaskInferenceError(message)
