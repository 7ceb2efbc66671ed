"""`cache_salt`: one short name for everything that decides what a model computes with at a moment.

A server that keeps keys and values of a prompt may give them to another request only where the
numbers that made them are the same. So the salt is a digest of the numbers in force: the base's,
and of each active adapter the bits and tensors that stand in the base's place or on it. What no
one reads - an inactive adapter, the base's own norm while a task's is in force, a head that a task
has another of - does not count, so that a model made anew from base and file has the same salt.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.base import frozen_numbers, offloaded
from pemn_surgery.adapters.checks import adapter_configs, check_adapters_exist
from pemn_surgery.adapters.identity import payload_digest, tensor_digest
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.quantised import dequantised, is_plain, resolve_backend
from pemn_surgery.adapters.tasks.mixed_batch import BASE
from pemn_surgery.adapters.whole_modules import WholeModule, choosing_layers, path_in_base
from pemn_surgery.masks import in_force, places
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.attached import find_masked, find_owned, find_task, names_masked
from pemn_surgery.numbers.bank import Bank
from pemn_surgery.numbers.digest import digest_of
from pemn_surgery.planning.owned import is_idle_counter
from pemn_surgery.planning.roles import base_modules, full_name
from pemn_surgery.transforms import gathered

_VERSION = "pemn cache salt 1"
_DIGITS = 32
_ORIGINAL = ".original_module"  # PEFT's name for what a module's copies stand in place of


def cache_salt(model: nn.Module, adapters: str | Sequence[str] | None = None) -> str:
    """Return 32 hexadecimal digits for the key of a cache of what a model computes.

    Two salts are equal if and only if the models have the same numbers in force, in the same types:
    those of the base (parameters and persistent buffers, by name), and the active adapters' masks,
    scales and tensors. Adapters' names, codings of files, and whether an adapter is merged, was
    loaded or was trained in place make no difference. With no adapter in force, it is the base's.

    Every number of the base is read once, so keep the salt until something
    is trained, loaded or switched. What is no number - the architecture, settings like dropped
    layers or the scaling of rotary embeddings - is not in it: have the model's name in the key too.

    Args:
        model: A model with or without masks.
        adapters: The adapters to be in force, one name or several, "__base__" for none, as in a
            mixed batch (``adapter_names``). Default: what is in force now.

    Raises:
        AdapterError: If the model has no such adapter.
        MaskNotLoadedError: If a mask in force was never loaded.
        MetaTensorError: If a tensor has no values here.
    """
    inner = getattr(model, "_orig_mod", model)  # behind torch.compile
    names = [adapters] if isinstance(adapters, str) else adapters
    chosen = nullcontext()
    if names is not None:
        wanted = tuple(name for name in names if name != BASE)
        check_adapters_exist(adapter_configs(inner), wanted)
        layers = frozenset(choosing_layers(inner))
        chosen = in_force.use(in_force.Chosen(wanted, layers))
    with torch.no_grad(), chosen:
        found = _InForce(inner)
        lines = [_VERSION, digest_of(found.base), *sorted(found.lines)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]


class _InForce:
    """What is in force in a model, found once.

    Attributes:
        lines: What adapters have in force, and how a bank is spread, one line each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lines: list[str] = []
        self._base: list[tuple[str, Callable[[], Tensor]]] = []
        self._masked: dict[PemnLayer, str] = {}
        self._banks: set[Bank] = set()
        copied = self._take_copies(model)
        for path, module in base_modules(model):
            if not f"{path}.".startswith(copied):
                inside = path_in_base(path.replace(_ORIGINAL, ""))
                for name in _names(module):
                    self._take(module, name, full_name(inside, name))

    def base(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's numbers in force, by name, one tensor at a time."""
        return ((name, read()) for name, read in sorted(self._base, key=lambda item: item[0]))

    def _take_copies(self, model: nn.Module) -> tuple[str, ...]:
        """Take what adapters have whole; return how the paths of what these replace begin."""
        replaced = []
        for path, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                held = module.modules_to_save
                names = [n for n in in_force.read(WholeModule(module)).names if n in held]
                for name, value in held[names[0]].state_dict().items() if names else ():
                    self._add(full_name(path_in_base(path), name), value)
                replaced += [f"{path}{_ORIGINAL}."] * bool(names)
        return tuple(replaced)

    def _take(self, module: nn.Module, name: str, full: str) -> None:
        masked = find_masked(module, name)
        if isinstance(masked, PemnLayer):
            self._take_masked(masked, full)
            return
        owned = find_owned(module, name)
        if owned is None:
            if places.stored(module, name) is not None:
                self._base.append((full, lambda: _stored(module, name)))
            return
        child, own_name = owned
        value = child.active_tensor(own_name)
        if value is not None:
            self._add(full, value)
        elif child.base(own_name) is not None:
            own = cast("Tensor", child.base(own_name))
            self._base.append((full, lambda: _whole(own, module, name)))

    def _take_masked(self, layer: PemnLayer, full: str) -> None:
        if layer in self._masked:  # tied
            self.lines.append(f"tie {full!r} {self._masked[layer]!r}")
            return
        self._masked[layer] = full
        self._take_frozen(layer, full)
        state = in_force.read(layer)
        names = state.names if state.merged_weight is None else layer.merged_adapters
        with onload_layer(layer):
            self.lines += [f"mask {full!r} {_mask_digest(layer.mask_of(name))}" for name in names]
        task = find_task(layer.owner)
        rows = None if task is None else task.new_rows(layer.parameter, names)
        if rows is not None:
            self._add(f"{full} rows", rows)
            return
        own = layer.own_rows()
        if own is not None:
            self._base.append((f"{full} rows", lambda: gathered(own)))

    def _take_frozen(self, layer: PemnLayer, full: str) -> None:
        bank = layer.bank
        if bank is None:
            self._base.append((full, lambda: _frozen(layer)))
            return
        shape = tuple(layer.shape)
        prototype = bank.layout.find(shape)
        place = None if prototype is None else (prototype.offset, bank.layout.period(shape))
        self.lines.append(f"fill {full!r} {shape} {layer.drawn_dtype} {place}")
        if bank not in self._banks:
            self._banks.add(bank)
            self._base.append(("the bank", lambda: bank.values))

    def _add(self, name: str, value: Tensor) -> None:
        self.lines.append(f"tensor {name!r} {tensor_digest(gathered(value))}")


def _names(module: nn.Module) -> list[str]:
    """Return the tensors of a module that decide what it computes, by its own names for them."""
    hidden = module._non_persistent_buffers_set
    stored = (name for name in (*module._parameters, *module._buffers) if name not in hidden)
    kept = [name for name in stored if not is_idle_counter(module, name)]
    return list(dict.fromkeys([*kept, *names_masked(module)]))


def _stored(module: nn.Module, name: str) -> Tensor:
    """Return a tensor as a module stores it; of a quantised weight what it stands for."""
    value = cast("Tensor", places.stored(module, name))
    may_be_packed = name == "weight" and not is_plain(value)
    backend = resolve_backend(module) if may_be_packed else None
    return _whole(value, module, name) if backend is None else dequantised(backend, module, value)


def _whole(value: Tensor, module: nn.Module, name: str) -> Tensor:
    """Return a tensor whose values are here: gathered, or from where accelerate has moved it."""
    moved = offloaded(module, name) if value.is_meta else None
    return gathered(value if moved is None else moved)


def _frozen(layer: PemnLayer) -> Tensor:
    return frozen_numbers(layer, None if layer.quantization_backend else layer.own_weight())


def _mask_digest(mask: AdapterMask) -> str:
    others = None if mask.others is None else payload_digest(mask.others)
    tensors = (mask.places, mask.saved_scale)
    told = [None if one is None else tensor_digest(gathered(one)) for one in tensors]
    parts = (type(mask).__name__, mask.scaled, payload_digest(mask.as_bits()), others, *told)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
