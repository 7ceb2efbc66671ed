"""Values for what a bank does not replace, on a model built under ``torch.device("meta")``.

A model that does not fit into memory is built on the meta device, where tensors have shapes and no
values. The weights that a bank replaces never need any; everything else - norms, biases,
embeddings, computed buffers - gets memory here and the values that its module starts with.

How: every tensor to be filled becomes a real one full of NaN, every other tensor of the model is
(or for the moment becomes) a meta tensor, and the modules' own initialisers run. Writing into a
meta tensor costs nothing and changes nothing, so no initialiser can touch a masked weight or a
value that was there before. What is NaN afterwards has no initialiser: the model is put back as it
was and the error names it.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.errors import MetaTensorError
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.roles import base_modules, full_name
from pemn_surgery.surgery.undo import undone_on_error

_LAZY = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
_NAMES_SHOWN = 5

# In this order: what a layer draws for itself, what timm computes, what a model sets over both.
_INITIALISERS = (
    "reset_parameters",
    "_reset_parameters",
    "init_non_persistent_buffers",
    "init_weights",
)
# Transformers' mark on modules and tensors that its initialisers shall pass by.
_INITIALISED = "_is_hf_initialized"

# What to do about tensors that would stay without values.
_HOW_TO_FILL = (
    "Give them values first, model.load_state_dict(values, assign=True, strict=False), or "
    "build the model on a real device. Nothing was changed."
)


@dataclass(frozen=True)
class Supply:
    """Which values an adapter brings to a model on the meta device.

    Attributes:
        loading: Whether an adapter is about to be loaded: then no random value is invented that
            its file does not replace.
        carried: Names of the tensors that its file has to hold.
        verified: Whether the file has been read and does hold them.
    """

    loading: bool
    carried: Set[str]
    verified: bool


def is_on_meta(model: nn.Module, plan: Plan) -> bool:
    """Tell whether a masked weight has no values: the model was built on the meta device.

    A weight that accelerate has moved away is on that device too, but comes back for each call.
    """
    return bool(_masked_on_meta(model, plan))


def check_own_weights(model: nn.Module, plan: Plan) -> None:
    """Refuse masks on weights of the meta device, which have no values (`MetaTensorError`)."""
    names = _masked_on_meta(model, plan)
    if names:
        message = (
            f'bank="own" and bank_init="model" need the model\'s own weights, but {len(names)} of '
            f"the {len(plan.targets)} to mask are on the meta device and have no values "
            f"({_listed(names)}). Load the weights first, or draw the numbers from a seed: "
            'bank="mp", "rp" or "one_layer" without bank_init="model". Nothing was changed.'
        )
        raise MetaTensorError(message)


def check_device(device: torch.device) -> None:
    """Refuse masks on a default device where they would have no values (`MetaTensorError`)."""
    if device.type == "meta":
        message = (
            'pemnify was called inside `with torch.device("meta")`, where masks would have no '
            "values. Build the model inside it and call pemnify outside. Nothing was changed."
        )
        raise MetaTensorError(message)


def fill_in(model: nn.Module, plan: Plan, device: torch.device, supply: Supply) -> None:
    """Give every unmasked tensor on the meta device memory and the value its module starts with.

    Random values come from torch's global generator, as they do when a model is built.

    Args:
        model: The model; weights to be masked stay on the meta device.
        plan: What will be masked.
        device: Where the tensors shall lie.
        supply: What an adapter file brings.

    Raises:
        MetaTensorError: If a tensor would stay without values. The model is then as it was.
    """
    masked = {name for target in plan.targets for name in (target.name, *target.tied)}
    missing, others = [], []
    for entry in _entries(model):
        is_missing = entry.tensor.is_meta and entry.name not in masked
        (missing if is_missing else others).append(entry)
    if supply.loading:
        _check_nothing_is_invented(missing, supply.carried)
    with undone_on_error(model):
        _allocate(missing, device)
        with _hidden(others):
            _initialise(model, {id(entry.module) for entry in missing}, device)
        _check_filled(model, missing, supply.carried if supply.verified else set())


@dataclass(frozen=True)
class _Entry:
    """A tensor as it was at first, in a table of a module: its parameters or its buffers."""

    name: str
    module: nn.Module
    table: dict[str, Tensor | None]
    key: str
    tensor: Tensor

    @property
    def is_stored(self) -> bool:
        """Whether state dicts hold the tensor; others are computed when the module is built."""
        return self.key not in self.module._non_persistent_buffers_set

    def has_values(self) -> bool:
        """Tell whether an initialiser has written here since `_allocate`."""
        held = self.table.get(self.key)
        if held is None or held.is_meta or held.shape != self.tensor.shape:
            return False
        if held.is_floating_point() or held.is_complex():
            return not bool(held.isnan().any())
        return held._version > 0 or held.numel() == 0


def _entries(model: nn.Module) -> Iterator[_Entry]:
    for path, module in base_modules(model):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and not isinstance(tensor, _LAZY):
                    yield _Entry(full_name(path, key), module, cast("Any", table), key, tensor)


def _masked_on_meta(model: nn.Module, plan: Plan) -> Sequence[str]:
    modules = dict(base_modules(model))
    weights = ((t, modules[t.path]._parameters.get(t.parameter)) for t in plan.targets)
    return [
        target.name
        for target, weight in weights
        if weight is not None and weight.is_meta and "_hf_hook" not in vars(modules[target.path])
    ]


def _check_nothing_is_invented(missing: Sequence[_Entry], carried: Set[str]) -> None:
    """Refuse to draw what the adapter was trained with and its file does not hold."""
    names = [
        entry.name
        for entry in missing
        if entry.is_stored and entry.tensor.is_floating_point() and entry.name not in carried
    ]
    if names:
        message = (
            f"The adapter's file does not hold {len(names)} tensors that the model has on the meta "
            f"device ({_listed(names)}): frozen embeddings stay with the base. Load them from the "
            "base that the adapter was trained on, model.load_state_dict(values, assign=True, "
            "strict=False), then load the adapter. Nothing was changed."
        )
        raise MetaTensorError(message)


def _allocate(missing: Sequence[_Entry], device: torch.device) -> None:
    """Put a real tensor into every entry: NaN where its type has one; ties stay ties."""
    made: dict[int, Tensor] = {}
    for entry in missing:
        old = entry.tensor
        if id(old) not in made:
            made[id(old)] = _like(old, device)
            for key, value in vars(old).items():  # marks that a library has put on the tensor
                if key != _INITIALISED:
                    setattr(made[id(old)], key, value)
        entry.table[entry.key] = made[id(old)]


def _like(old: Tensor, device: torch.device) -> Tensor:
    has_nan = old.is_floating_point() or old.is_complex()
    start = float("nan") if has_nan else 0
    new = torch.full(old.shape, start, dtype=old.dtype, device=device)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextmanager
def _hidden(others: Sequence[_Entry]) -> Iterator[None]:
    """Hold meta tensors instead of these for a while, so that writing changes nothing."""
    for entry in others:
        if not entry.tensor.is_meta and type(entry.tensor) in (Tensor, nn.Parameter):
            empty = torch.empty_like(entry.tensor, device="meta")
            is_parameter = isinstance(entry.tensor, nn.Parameter)
            entry.table[entry.key] = nn.Parameter(empty, False) if is_parameter else empty
    try:
        yield
    finally:
        for entry in others:
            entry.table[entry.key] = entry.tensor


def _initialise(model: nn.Module, lacking: Set[int], device: torch.device) -> None:
    """Run the initialisers of all modules that lack values (``id`` of each), children first."""
    modules = list(base_modules(model))
    with torch.inference_mode(mode=False), torch.no_grad(), device:
        for path, module in reversed(modules):
            if any(id(inner) in lacking for inner in module.modules()):
                for method in _initialisers(module):
                    _call(path, module, method)
        for _, module in modules:
            module.__dict__.pop(_INITIALISED, None)
        for path, module in modules:
            if _is_transformers(module):
                _call(path, module, cast("Any", type(module)).initialize_weights)
        for _, module in modules:
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # torch's second list of the same parameters


def _initialisers(module: nn.Module) -> Iterator[Callable[[nn.Module], Any]]:
    for name in _INITIALISERS:
        method = getattr(type(module), name, None)
        again = name == "init_weights" and _is_transformers(module)
        if method is not None and not again and _takes_nothing(method):
            yield method


def _is_transformers(module: nn.Module) -> bool:
    """Tell whether a module is a transformers model, without importing transformers."""
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _takes_nothing(method: Callable[..., Any]) -> bool:
    """Tell whether a method can be called with nothing but its module."""
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    return True


def _call(path: str, module: nn.Module, method: Callable[[nn.Module], Any]) -> None:
    try:
        method(module)
    except Exception as error:
        message = (
            f"{type(module).__name__}.{method.__name__} of {path or 'the model'!r} could not "
            "compute initial values for tensors on the meta device: "
            f"{type(error).__name__}: {error}. {_HOW_TO_FILL}"
        )
        raise MetaTensorError(message) from error


def _check_filled(model: nn.Module, missing: Sequence[_Entry], given: Set[str]) -> None:
    """Refuse a model with a tensor that no initialiser wrote and no file brings."""
    names = [p.name for p in missing if p.name not in given and not p.has_values()]
    for path, module in base_modules(model):
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.is_meta:
                names.append(full_name(path, key))
    if names:
        message = (
            f"{len(names)} tensors of the model are on the meta device and no initialiser of their "
            f"modules (reset_parameters, init_weights) gives them values: {_listed(names)}. "
            f"{_HOW_TO_FILL}"
        )
        raise MetaTensorError(message)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + ", ..." * (len(names) > _NAMES_SHOWN)
