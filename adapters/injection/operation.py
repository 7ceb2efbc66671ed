"""One planned injection: everything is checked when it is made, then carried out path by path."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from pemn_surgery.adapters.base import check_named_base, offloaded
from pemn_surgery.adapters.checks import (
    check_in_place,
    check_same_bank,
    check_same_targets,
    check_signs,
)
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import decode_held, put_on_base
from pemn_surgery.adapters.files.contents import AdapterFile
from pemn_surgery.adapters.files.file_checks import check_can_rename, check_file_fits
from pemn_surgery.adapters.injection.layer_checks import check_layers
from pemn_surgery.adapters.injection.stored_bank import stored_values
from pemn_surgery.adapters.layer import PemnLayer, weight_stream
from pemn_surgery.adapters.quantised import dequantised, find_requantiser, resolve_backend
from pemn_surgery.adapters.task_layer import PemnTaskLayer
from pemn_surgery.adapters.whole_modules import outputs_of
from pemn_surgery.masks.adapter_mask import Parts
from pemn_surgery.masks.attached import find_masked, find_task
from pemn_surgery.numbers import bank as banks
from pemn_surgery.numbers import fingerprint as fingerprints
from pemn_surgery.numbers.bank import Bank, Shape
from pemn_surgery.planning.plan import Owned, Plan, Target
from pemn_surgery.planning.roles import base_modules, full_name
from pemn_surgery.surgery import materialise, operate


class Operation:
    """One planned injection, carried out path by path as PEFT walks over the modules."""

    def __init__(self, model: nn.Module, config: PemnConfig, plan: Plan) -> None:
        check_signs(model, plan, config)
        self.config, self.plan = config, plan
        self.done: set[str] = set()
        self.parts = _parts_of(plan)
        self.modules = dict(base_modules(model))
        check_layers(self.modules, plan)
        self.requantiser = find_requantiser(model)
        self.by_path: dict[str, list[Target]] = defaultdict(list)
        for target in plan.targets:
            self.by_path[target.path].append(target)
        self.device = torch.get_default_device()
        materialise.check_device(self.device)
        if config.bank != "own" or config.bank_spec.generated:
            check_in_place(model, "replace them by the bank's")
        if config.bank == "own" or not config.bank_spec.generated:
            materialise.check_own_weights(model, plan)
        if config.origin.file is not None:
            sized = {item.path for item in plan.whole if outputs_of(self.modules[item.path])}
            names = {
                full_name(path, name)
                for path, module in self.modules.items()
                for name in (*module._parameters, *module._buffers)
            }
            check_file_fits(config.origin.file, plan, names, sized)
        self.bank = self._find_or_build_bank()
        self.fingerprint = self._fingerprint()
        self._check_base()
        if config.origin.file is not None:
            decode_held(config.origin.file)
            self._take_names_of_model(config.origin.file)
        from_meta = materialise.is_on_meta(model, plan)
        # Built without memory and not to be trained: nothing is held twice, nothing dense is kept.
        self.is_lean = from_meta and config.inference_mode
        if from_meta:
            materialise.fill_in(model, plan, self.device, self._supply())

    def mask(self, path: str, adapter_name: str) -> None:
        """Mask every target of one module; the first call also attaches the task's tensors."""
        if not self.done:
            self._attach_task(adapter_name)
        self.done.add(path)
        for target in self.by_path[path]:
            module = self.modules[path]
            layer = find_masked(module, target.parameter)
            if layer is None:
                layer = self._operate(target, module)
            held = cast("PemnLayer", layer)
            held.add_mask(adapter_name, self.config, self.fingerprint, target.density)
            held.mask_of(adapter_name).parts = self.parts

    def _operate(self, target: Target, module: nn.Module) -> PemnLayer:
        spec = self.config.bank_spec
        if self.bank is None and spec.generated:
            self._redraw(target, module)
        backend = self._backend(module, target.parameter)
        layer = PemnLayer(module, target, spec, self.bank, backend)
        if target.untied_from:
            operate.untie_parameter(layer)
        layer.keeps = not self.is_lean
        operate.mask_parameter(layer)
        for name in target.tied:
            path, _, parameter = name.rpartition(".")
            operate.share_mask(self.modules[path], parameter, layer)
        return layer

    def _redraw(self, target: Target, module: nn.Module) -> None:
        """Give a layer its own numbers from the seed (``bank="own"``)."""
        weight = cast("nn.Parameter", module._parameters[target.parameter])
        stream = weight_stream(target.name)
        spec = self.config.bank_spec
        fan = spec.fan(target.fan_in, target.fan_out)
        drawn = banks.draw(spec, stream, fan, target.weights)
        values = torch.from_numpy(drawn).view(target.shape).to(weight.device, weight.dtype)
        rows = weight.data[len(values) :] if values.dim() else weight.data[:0]
        weight.data = torch.cat([values, rows]) if len(rows) else values

    def _attach_task(self, adapter_name: str) -> None:
        owned: dict[str, list[Owned]] = defaultdict(list)
        for path in self.plan.frozen_norms:
            owned[path] = []
        shared = []
        masked = {name for target in self.plan.targets for name in (target.name, *target.tied)}
        for item in self.plan.owned:
            (shared if item.tied_to else owned[item.path]).append(item)
        for path, items in owned.items():
            layer = find_task(self.modules[path]) or PemnTaskLayer(self.modules[path], path)
            plain = (item.tensor for item in items if item.name not in masked)
            operate.own_tensors(layer, tuple(plain))
            frozen = path in self.plan.frozen_norms
            cast("PemnTaskLayer", layer).add_tensors(
                adapter_name, items, keeps_eval=frozen, shared=self.is_lean
            )
        for item in shared:
            path, _, source = item.tied_to.rpartition(".")
            owner = cast("PemnTaskLayer", find_task(self.modules[path]))
            operate.share_tensor(self.modules[item.path], item.tensor, owner, source)

    def _find_or_build_bank(self) -> Bank | None:
        spec = self.config.bank_spec
        children = (child for one in self.modules.values() for child in one._modules.values())
        held = [child for child in children if isinstance(child, PemnLayer)]
        for layer in held:
            check_same_bank(layer.spec, spec)
        if held and (spec.generated or spec.bank != "own"):
            check_same_targets({layer.target for layer in held}, self.plan)
        if spec.bank == "own":
            return None
        if held:
            return held[0].bank
        layout = cast("banks.Layout", self.plan.layout)
        largest = max(self.plan.targets, key=lambda target: target.weights)
        weight = self._weight(largest.name)
        device = self.device if weight.is_meta else weight.device
        dtype = banks.common_dtype(self._dtype(target.name) for target in self.plan.targets)
        if spec.init == "stored":
            return Bank(layout, stored_values(self.config, layout).to(device=device, dtype=dtype))
        shapes = {target.name: target.shape for target in self.plan.targets}
        return banks.build(
            layout, lambda name: _first_rows(self._weight(name), shapes[name]), dtype, device
        )

    def _supply(self) -> materialise.Supply:
        """A configuration that names its base was read with an adapter: values will follow."""
        saved = (item for item in (*self.plan.owned, *self.plan.whole) if item.saved)
        carried = {item.name for item in saved if not item.first_row}
        loading = self.config.origin.fingerprint is not None
        return materialise.Supply(loading, carried, verified=self.config.origin.file is not None)

    def _fingerprint(self, names: Mapping[str, str] | None = None) -> fingerprints.Fingerprint:
        """Return the base's fingerprint, under other names of the weights where they are given."""
        called = names or {}
        spec = self.config.bank_spec
        layout = self.bank.layout.renamed(called) if self.bank else None
        targets = {called.get(one.name, one.name): one for one in self.plan.targets}
        shapes = [(name, target.shape) for name, target in targets.items()]

        def frozen_numbers() -> Iterable[Tensor]:
            if self.bank is not None:
                return self.bank.prototypes(self._dtype)
            return (self._values(targets[name]) for name in sorted(targets))

        return fingerprints.make_fingerprint(spec, layout, shapes, frozen_numbers)

    def _take_names_of_model(self, file: AdapterFile) -> None:
        """Let a file whose weights were called otherwise be of the base as it is called here."""
        if file.is_renamed:
            self.config.origin = replace(self.config.origin, fingerprint=self.fingerprint)
            put_on_base(file, fingerprints.short_form(self.fingerprint))

    def _check_base(self) -> None:
        """Refuse masks of another base: the configuration names one, and so does every mask."""
        named, file = self.config.origin.fingerprint, self.config.origin.file
        actual_base = self.fingerprint
        if file is not None and file.is_renamed:
            check_can_rename(self.config)
            actual_base = self._fingerprint(file.called)
        if named is not None:
            fingerprints.check_fingerprint(named, actual_base, "the given model")
        for mask in file.headers.values() if file is not None else ():
            check_named_base(mask.base, actual_base)

    def _weight(self, name: str) -> Tensor:
        path, _, parameter = name.rpartition(".")
        return cast("Tensor", self.modules[path]._parameters[parameter])

    def _dtype(self, name: str) -> torch.dtype:
        """Return a weight's type, also where the bank has replaced it."""
        path, _, parameter = name.rpartition(".")
        held = find_masked(self.modules[path], parameter)
        return self._weight(name).dtype if held is None else cast("PemnLayer", held).dtype

    def _values(self, target: Target) -> Tensor:
        """Return a weight's numbers under masks; of a quantised one what it stands for."""
        name, parameter = target.name, target.parameter
        module = self.modules[target.path]
        held = find_masked(module, parameter)
        backend = None if held is not None else self._backend(module, parameter)
        if backend is not None:
            return dequantised(backend, module, self._weight(name))
        weight = self._weight(name) if held is None else held.fill()
        moved = offloaded(module, parameter) if weight.is_meta else None
        return _first_rows(weight if moved is None else moved, target.shape)

    def _backend(self, module: nn.Module, parameter: str) -> QuantizationBackend | None:
        return resolve_backend(module, self.requantiser) if parameter == "weight" else None


def _first_rows(weight: Tensor, shape: Shape) -> Tensor:
    """Return the rows of a weight that masks lie on, without those that are new."""
    return weight[: shape[0]] if shape and tuple(weight.shape) != shape else weight


def _parts_of(plan: Plan) -> Parts:
    owned = (item.name for item in plan.owned if item.saved and not item.tied_to)
    return Parts(
        masked=tuple(target.name for target in plan.targets),
        owned=tuple(owned),
        whole=tuple(dict.fromkeys(item.path for item in plan.whole)),
    )
