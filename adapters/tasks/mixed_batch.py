"""Batches whose samples belong to different adapters: ``model(x, adapter_names=[...])``.

PEFT's own methods split such a batch in every layer. Masks are also read where no layer is called
(``layer.weight`` in a parent's forward, experts, recurrent layers), and every task has norms and
statistics of its own, so here a mixed batch runs group by group through the whole model: a group is
what one adapter has to do. Each group computes exactly what it would compute alone, and the outputs
are put together in the order of the batch. Nothing is lost: no two groups share a weight, so their
matrix products could not be shared either.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.whole_modules import choosing_layers
from pemn_surgery.adapters.within import set_within
from pemn_surgery.errors import AdapterError, MixedBatchError
from pemn_surgery.masks import in_force
from pemn_surgery.masks.in_force import Chosen
from pemn_surgery.masks.kept import one_forward

# PEFT's name for samples that no adapter works on.
BASE = "__base__"

# Methods of a model that take a batch.
_METHODS = ("forward", "generate")
_HELD = "_pemn_held_methods"


@dataclass(frozen=True)
class GroupValues:
    """What each group returned where it cannot be put together, for example its cache.

    Pass it back with the same ``adapter_names`` and every group gets its own.

    Attributes:
        names: The adapter of each sample.
        values: One value a group, in the order in which the adapters first appear.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]


@contextmanager
def mixed_batches(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let a model's forward (and generate) take each sample with its own adapter.

    Every tensor argument whose first dimension is the batch's is split; others go to every group.
    Other calls, of this thread or of others, run as if there were no such batch. A name is an
    adapter's, or "__base__" for none.

    Raises:
        MixedBatchError: If the model trains, is merged, or is compiled where torch does not follow
            context variables, or inputs or outputs cannot be split or joined.
        AdapterError: If there is no adapter of a name.
    """
    _check(model, names)
    layers = frozenset(choosing_layers(model))
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    with set_within(_batch, _Batch(tuple(names), groups, layers)), _splitting(model):
        yield


@dataclass(frozen=True)
class _Batch:
    """What the samples of a call belong to."""

    names: tuple[str, ...]  # the adapter of each sample
    groups: Mapping[str, list[int]]  # the rows of every adapter's samples
    layers: Set[in_force.Layer]  # everything in the model that chooses between adapters


# The batch whose samples the next method of the model has to part; None within a group's run.
_batch: ContextVar[_Batch | None] = ContextVar("pemn_batch", default=None)

_installing = threading.Lock()


@contextmanager
def _splitting(model: nn.Module) -> Iterator[None]:
    """Put methods that split over the model's own, as long as any thread runs such a batch."""
    with _installing:
        held = model.__dict__.setdefault(_HELD, _Held(model))
        held.calls += 1
    try:
        yield
    finally:
        with _installing:
            held.calls -= 1
            if not held.calls:
                held.put_back(model)
                del model.__dict__[_HELD]


class _Held:
    """A model's own methods while others stand in their place."""

    def __init__(self, model: nn.Module) -> None:
        self.calls = 0  # that need those others
        self.own = {name: model.__dict__[name] for name in _METHODS if name in model.__dict__}
        for method in _METHODS:
            if hasattr(model, method):
                model.__dict__[method] = _by_group(model, method)

    def put_back(self, model: nn.Module) -> None:
        """Give the model its own methods again."""
        for method in _METHODS:
            model.__dict__.pop(method, None)
        model.__dict__.update(self.own)


def _check(model: nn.Module, names: Sequence[str]) -> None:
    listed = isinstance(names, (list, tuple)) and len(names) > 0
    if not listed or not all(isinstance(name, str) for name in names):
        message = f"adapter_names needs a list of adapter names, one a sample; got {names!r}."
        raise MixedBatchError(message)
    if not in_force.follows_compiled() and _is_compiled(model):
        message = (
            f"torch {torch.__version__} compiles the choice of adapters in, so that adapter_names "
            "would have no effect. Use torch >= 2.14, or the model before torch.compile."
        )
        raise MixedBatchError(message)
    if model.training:
        message = (
            "Cannot pass `adapter_names` when the model is in training mode: each sample would "
            "train another adapter. Call model.eval() first."
        )
        raise MixedBatchError(message)
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    known = {name for layer in layers for name in layer._get_available_adapters()}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        message = (
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has "
            f"{', '.join(sorted(known))}; {BASE!r} stands for none."
        )
        raise AdapterError(message)
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        message = (
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            f"`unmerge_adapter` first (merged: {', '.join(merged)})."
        )
        raise MixedBatchError(message)


def _is_compiled(model: nn.Module) -> bool:
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return compiled or torch.compiler.is_compiling()


def _by_group(model: nn.Module, method: str) -> Callable[..., Any]:
    """Return a model's method that runs once per group where a batch is to be parted."""
    plain = getattr(model, method)

    @functools.wraps(plain)  # transformers' generate reads the forward's signature
    def run(*args: Any, **kwargs: Any) -> Any:
        batch = _batch.get()
        if batch is None:
            return plain(*args, **kwargs)
        names, groups = batch.names, batch.groups
        _check_size((args, kwargs), names)
        parts = []
        for index, (name, rows) in enumerate(groups.items()):
            own_args, own_kwargs = _take((args, kwargs), names, rows, index)
            with _group(name, batch.layers):
                parts.append(plain(*own_args, **own_kwargs))
        padding = _padding(model, kwargs) if method == "generate" else None
        return _Joiner(names, list(groups.values()), padding).join(parts)

    return run


@contextmanager
def _group(name: str, layers: Set[in_force.Layer]) -> Iterator[None]:
    """Run one group: one adapter is in force, and no method parts its samples again."""
    chosen = Chosen(() if name == BASE else (name,), layers)
    with set_within(_batch, None), in_force.use(chosen), one_forward():
        yield


def _check_size(given: Any, names: tuple[str, ...]) -> None:
    sizes = sorted(set(_first_dimensions(given)))
    if len(names) not in sizes:
        message = (
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} names for inputs whose first dimensions are {sizes or 'none'}."
        )
        raise MixedBatchError(message)


def _first_dimensions(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor) and value.dim():
        yield value.shape[0]
    elif isinstance(value, GroupValues):
        yield len(value.names)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _first_dimensions(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _first_dimensions(item)


def _take(value: Any, names: tuple[str, ...], rows: list[int], index: int) -> Any:
    """Return a group's part of the inputs."""
    if isinstance(value, Tensor):
        is_batch = value.dim() > 0 and value.shape[0] == len(names)
        return value[torch.tensor(rows, device=value.device)] if is_batch else value
    if isinstance(value, GroupValues):
        if value.names != names:
            message = (
                f"Values of a mixed batch came back with other adapter_names: {names} instead of "
                f"{value.names}. Keep the order of the samples between calls."
            )
            raise MixedBatchError(message)
        return value.values[index]
    if isinstance(value, Mapping):
        return {key: _take(item, names, rows, index) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(item, names, rows, index) for item in value)
    return value


def _padding(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """Return the token that fills up shorter generated sequences, chosen as transformers does."""
    config = getattr(model, "generation_config", None)
    for name in ("pad_token_id", "eos_token_id"):
        token = kwargs.get(name, getattr(config, name, None))
        token = token[0] if isinstance(token, (list, tuple)) else token
        if token is not None:
            return int(token)
    return 0


class _Joiner:
    """Puts the outputs of groups together in the order of the batch.

    Shorter sequences are filled up with the padding; where it is None none may be shorter.
    """

    def __init__(self, names: tuple[str, ...], rows: list[list[int]], padding: int | None) -> None:
        self.names, self.rows, self.padding = names, rows, padding
        order = [index for group in rows for index in group]
        self.order = sorted(range(len(order)), key=order.__getitem__)

    def join(self, parts: Sequence[Any]) -> Any:
        """Return one value for the batch."""
        first = parts[0]
        if isinstance(first, Tensor):
            return self._tensors(parts)
        if isinstance(first, Mapping):
            if any(part.keys() != first.keys() for part in parts):
                self._refuse("Adapters gave different outputs", parts, list)
            joined = {key: self.join([part[key] for part in parts]) for key in first}
            return joined if type(first) is dict else type(first)(**joined)
        if isinstance(first, (list, tuple)):
            if any(len(part) != len(first) for part in parts):
                self._refuse("Adapters gave lists of different lengths", parts, len)
            items = [self.join(column) for column in zip(*parts, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if all(part is first or part == first for part in parts):
            return first
        return GroupValues(self.names, tuple(parts))

    def _tensors(self, parts: Sequence[Tensor]) -> Tensor:
        if parts[0].dim() == 0:
            return self._mean(parts)
        per_sample = {
            part.shape[0] / len(rows) for part, rows in zip(parts, self.rows, strict=True)
        }
        if len(per_sample) > 1 or not next(iter(per_sample)).is_integer():
            return self._same(parts)
        parts = self._padded(parts)
        if len({part.shape[1:] for part in parts}) > 1:
            self._refuse("Adapters gave outputs of different shapes", parts, _shape)
        each = int(next(iter(per_sample)))
        if not each:
            return torch.cat(list(parts))
        samples = [sample for part in parts for sample in part.split(each)]
        return torch.cat([samples[index] for index in self.order])

    def _padded(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        is_tokens = all(part.dim() == 2 and not part.is_floating_point() for part in parts)
        if self.padding is None or not is_tokens:
            return parts
        longest = max(part.shape[1] for part in parts)
        pad = nn.functional.pad
        return [pad(part, (0, longest - part.shape[1]), value=self.padding) for part in parts]

    def _mean(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the mean over samples of what is a number per group, such as a loss."""
        if not parts[0].is_floating_point():
            return self._same(parts)
        shares = [len(rows) / len(self.names) for rows in self.rows]
        return torch.stack([part * n for part, n in zip(parts, shares, strict=True)]).sum()

    def _same(self, parts: Sequence[Tensor]) -> Tensor:
        """Return a tensor without samples, which has to be the same in every group."""
        first = parts[0]
        if not all(part.shape == first.shape and torch.equal(part, first) for part in parts):
            self._refuse("An output has no first dimension of samples and differs", parts, _shape)
        return first

    def _refuse(
        self, problem: str, parts: Sequence[Any], shown: Callable[[Any], object]
    ) -> NoReturn:
        named = zip((self.names[rows[0]] for rows in self.rows), map(shown, parts), strict=True)
        listed = ", ".join(f"{name}: {part}" for name, part in named)
        message = f"{problem} ({listed}). Run these samples in calls of their own, one per adapter."
        raise MixedBatchError(message)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
