"""`PemnModel`: the PEFT tuner that plans, operates, saves and loads.

Every check runs in `_prepare_model`, before the first module changes.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn

from pemn_surgery import bank as banks
from pemn_surgery import bits, surgery
from pemn_surgery.adapters import fingerprint as fingerprints
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.file import KEY_PREFIX, MASKS, AdapterFile, mask_key
from pemn_surgery.adapters.layer import PemnLayer, PemnTaskLayer, PemnTunerLayer, initial_scores
from pemn_surgery.adapters.registry import PREFIX
from pemn_surgery.bank import Bank, BankSpec
from pemn_surgery.errors import (
    AlreadyPemnifiedError,
    ArchitectureError,
    BankMismatchError,
    NothingToMaskError,
    UnsupportedModelError,
)
from pemn_surgery.masked import AdapterMask
from pemn_surgery.planning import Owned, Plan, Request, Target, base_modules, make_plan
from pemn_surgery.selector import check_finite

_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "ScriptModule",
    "RecursiveScriptModule",
)


class PemnModel(BaseTuner):
    """Masks as a PEFT method. Use `pemnify` or ``get_peft_model``; PEFT makes this object."""

    prefix = PREFIX
    tuner_layer_cls = PemnTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT declares it so

    def _prepare_adapter_config(self, peft_config: PemnConfig, model_config: dict) -> PemnConfig:
        return peft_config

    def _prepare_model(self, peft_config: PemnConfig, model: nn.Module) -> None:
        """Plan and check everything; the model is still as it was when this raises."""
        check_model(model)
        set_default_head(peft_config, model)
        plan = plan_for(model, peft_config)
        if not plan.targets:
            raise NothingToMaskError(_nothing_to_mask(plan, peft_config))
        self._pending = _Operation(model, peft_config, plan)

    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: PemnConfig, key: str
    ) -> bool | _ExcludedModule:
        if key in self._pending.by_path:
            return True
        excluded = isinstance(_match(peft_config, key), _ExcludedModule)
        return _ExcludedModule() if excluded else False

    def _create_and_replace(
        self,
        peft_config: PemnConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._pending.mask(current_key, adapter_name)

    def _inject_parameters(
        self, peft_config: PemnConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """``target_parameters`` are targets of the plan like all others; mask what is left."""
        remaining = [path for path in self._pending.by_path if path not in self._pending.done]
        for path in remaining:
            self._pending.mask(path, adapter_name)
        wanted = peft_config.target_parameters or []
        names = [target.name for target in self._pending.plan.targets]
        return [name for name in names if any(name.endswith(item) for item in wanted)]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep what trains in float32, or in its layer's dtype if autocast was turned off."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, PemnLayer) and adapter_name in module.pemn_masks:
                    module.mask_of(adapter_name).to(module.dtype)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module | None, child: nn.Module
    ) -> None:
        """Put back what PEFT wrapped whole; a masking child has taken itself out already."""
        if new_module is not None:
            setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PemnConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Pack scores into bits, from the state dict that was passed in.

        FSDP and ZeRO pass gathered tensors there, while the modules hold shards.
        """
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        base = fingerprints.short_form(config.fingerprint or {})
        masks = _masks_by_key(model, adapter_name)
        saved: dict[str, Tensor] = {}
        for key, value in entries.items():
            place, _, kind = key.rpartition(".")
            mask = masks.get(place)
            if mask is None:
                saved[key] = _gathered(value)
            elif kind == "scores" and not config.keep_scores:
                scores = _gathered(value)
                check_finite(scores, mask.target)
                saved[f"{place}.bits"] = bits.pack(mask.selector.mask(scores), base)
            else:
                saved[key] = _gathered(value)
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PemnConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check every mask, and turn bits into scores or scores into bits where needed."""
        prefix = KEY_PREFIX if isinstance(getattr(model, "base_model", None), BaseTuner) else ""
        masks = {
            mask_key(mask.target, kind): (mask, kind)
            for mask in _masks_by_key(model, adapter_name).values()
            for kind in ("bits", "scores")
        }
        state_dict = {_with_prefix(key): value for key, value in state_dict.items()}
        _check_fit(masks, state_dict)
        loaded: dict[str, Tensor] = {}
        lossy = 0
        for key, value in state_dict.items():
            mask, kind = masks.get(key, (None, ""))
            if mask is None:
                loaded[key] = value
                continue
            _check_mask(key, kind, value, mask, config)
            held = "scores" if mask.scores is not None else "bits"
            lossy += held == "scores" and kind == "bits"
            loaded[mask_key(mask.target, held)] = _converted(value, kind, held, mask, config)
        if lossy:
            warnings.warn(
                f"The file holds bits, not scores, for {lossy} masks: training starts from scores "
                "made from the bits, so earlier magnitudes are lost.",
                stacklevel=2,
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, loaded)
        return {key if prefix else key.removeprefix(KEY_PREFIX): v for key, v in remapped.items()}


class _Operation:
    """One planned injection, carried out path by path as PEFT walks over the modules."""

    def __init__(self, model: nn.Module, config: PemnConfig, plan: Plan) -> None:
        self.config, self.plan = config, plan
        self.done: set[str] = set()
        self.modules = dict(base_modules(model))
        self.by_path: dict[str, list[Target]] = defaultdict(list)
        for target in plan.targets:
            self.by_path[target.path].append(target)
        self.bank = self._find_or_build_bank()
        actual = self._fingerprint()
        if config.fingerprint is None:
            config.fingerprint = actual
        else:
            fingerprints.check_fingerprint(config.fingerprint, actual, "the given model")
        if config.file is not None:
            check_file_fits(config.file, plan)

    def mask(self, path: str, adapter_name: str) -> None:
        """Mask every target of one module; the first call also attaches the task's tensors."""
        if not self.done:
            self._attach_task(adapter_name)
        self.done.add(path)
        for target in self.by_path[path]:
            module = self.modules[path]
            layer = surgery.find_masked(module, target.parameter)
            if layer is None:
                layer = self._operate(target, module)
            cast("PemnLayer", layer).add_mask(adapter_name, self.config)

    def _operate(self, target: Target, module: nn.Module) -> PemnLayer:
        spec = self.config.bank_spec
        if self.bank is None and spec.generated:
            self._redraw(target, module)
        layer = PemnLayer(module, target, spec, self.bank)
        surgery.mask_parameter(layer)
        for name in target.tied:
            path, _, parameter = name.rpartition(".")
            surgery.share_mask(self.modules[path], parameter, layer)
        return layer

    def _redraw(self, target: Target, module: nn.Module) -> None:
        """Give a layer its own numbers from the seed (``bank="own"``)."""
        weight = cast("nn.Parameter", module._parameters[target.parameter])
        stream = f"weight/{target.name}"
        drawn = banks.draw(self.config.bank_spec, stream, target.fan_in, target.weights)
        weight.data = torch.from_numpy(drawn).view(target.shape).to(weight.device, weight.dtype)

    def _attach_task(self, adapter_name: str) -> None:
        owned: dict[str, list[Owned]] = defaultdict(list)
        for path in self.plan.frozen_norms:
            owned[path] = []
        shared = []
        for item in self.plan.owned:
            (shared if item.tied_to else owned[item.path]).append(item)
        for path, items in owned.items():
            layer = surgery.find_task(self.modules[path]) or self._own(path)
            surgery.own_tensors(layer, tuple(item.tensor for item in items))
            frozen = path in self.plan.frozen_norms
            cast("PemnTaskLayer", layer).add_tensors(adapter_name, items, keeps_eval=frozen)
        for item in shared:
            first = self.modules[item.tied_to.rpartition(".")[0]]
            surgery.share_tensor(
                self.modules[item.path], item.tensor, cast("PemnTaskLayer", surgery.find_task(first))
            )

    def _own(self, path: str) -> PemnTaskLayer:
        return PemnTaskLayer(self.modules[path], path)

    def _find_or_build_bank(self) -> Bank | None:
        spec = self.config.bank_spec
        held = [module for module in self._all_layers() if isinstance(module, PemnLayer)]
        for layer in held:
            if layer.spec != spec:
                raise BankMismatchError(_other_bank(layer.spec, spec))
        existing = next((layer.bank for layer in held if layer.bank is not None), None)
        if spec.bank == "own":
            return None
        if existing is not None:
            self._check_fillable(existing)
            return existing
        layout = cast("banks.Layout", self.plan.layout)
        largest = max(self.plan.targets, key=lambda target: target.weights)
        weight = self._weight(largest.name)
        device = torch.device("cpu") if weight.is_meta else weight.device
        return banks.build(layout, self._weight, weight.dtype, device)

    def _check_fillable(self, bank: Bank) -> None:
        for target in self.plan.targets:
            if bank.layout.find(target.shape) is None:
                message = (
                    f"The model's bank has no numbers for {target.name} of shape {target.shape} "
                    f"({target.weights} weights): it was made for up to {bank.layout.largest}. Give "
                    "the first adapter of a model all weights that a later one masks."
                )
                raise BankMismatchError(message)

    def _fingerprint(self) -> fingerprints.Fingerprint:
        spec = self.config.bank_spec
        values: list[Tensor] = []
        if not spec.generated:
            names = sorted(target.name for target in self.plan.targets)
            values = [self.bank.values] if self.bank else [self._weight(name) for name in names]
        layout = self.bank.layout if self.bank else None
        targets = [(target.name, target.shape) for target in self.plan.targets]
        return fingerprints.make_fingerprint(spec, layout, targets, values)

    def _weight(self, name: str) -> Tensor:
        path, _, parameter = name.rpartition(".")
        return cast("Tensor", self.modules[path]._parameters[parameter])

    def _all_layers(self) -> Iterator[nn.Module]:
        for module in self.modules.values():
            yield from module._modules.values()  # type: ignore[misc]


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be rewritten.

    Args:
        model: What the user gave.

    Raises:
        UnsupportedModelError: If it is not a module, or a wrapper around one.
    """
    if not isinstance(model, nn.Module):
        message = f"Got {type(model).__name__}; a torch.nn.Module is needed, for example a timm model."
        raise UnsupportedModelError(message)
    for module_class in type(model).__mro__:
        if module_class.__name__ in _WRAPPERS:
            message = (
                f"Got a {module_class.__name__} around the model; masks must be there before it is "
                "wrapped or compiled. Call pemnify on the inner model, then wrap the result."
            )
            raise UnsupportedModelError(message)


def check_fresh(model: nn.Module) -> None:
    """Refuse a model that PEFT has changed already.

    Args:
        model: What the user gave.

    Raises:
        AlreadyPemnifiedError: If it carries adapters.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if layers:
        message = (
            f"The model carries adapters in {len(layers)} places already (first: {layers[0]}). Use "
            "model.add_adapter(name, config) for another task, or model.unload() to begin anew."
        )
        raise AlreadyPemnifiedError(message)


def set_default_head(config: PemnConfig, model: nn.Module) -> None:
    """Train and save a timm classifier whole where masks lie on the model's own weights.

    A new classifier is random; masked and frozen it could not be rebuilt from the saved adapter.

    Args:
        config: Changed in place if ``modules_to_save`` is None.
        model: The model; timm says in its ``pretrained_cfg`` what its classifier is.
    """
    spoken_for = config.modules_to_save is not None or config.target_modules is not None
    if config.bank_spec.generated or spoken_for or config.target_parameters:
        return
    described = getattr(model, "pretrained_cfg", None)
    heads = described.get("classifier") if isinstance(described, Mapping) else None
    names = [heads] if isinstance(heads, str) else list(heads or ())
    paths = [path for path, _ in base_modules(model)]
    if names and all(_occurrences(name, paths) == 1 for name in names):
        config.modules_to_save = names


def plan_for(model: nn.Module, config: PemnConfig) -> Plan:
    """Return the plan that a configuration means for a model.

    Args:
        model: Any module.
        config: The configuration.
    """
    matcher = _matcher(config, model)

    def reason_to_leave(path: str) -> str:
        if not path:
            return "is the model itself; put it into torch.nn.Sequential to mask it"
        result = _match(matcher, path)
        if isinstance(result, _ExcludedModule):
            saved = _is_saved_whole(config, path)
            return "trained and saved whole (modules_to_save)" if saved else "in exclude_modules"
        return "" if result else "not in target_modules"

    return make_plan(
        model,
        Request(
            spec=config.bank_spec,
            rest=cast("Any", config.rest),
            reason_to_leave=reason_to_leave,
            is_saved_whole=lambda path: _is_saved_whole(config, path),
            parameters=tuple(config.target_parameters or ()),
        ),
    )


def check_file_fits(file: AdapterFile, plan: Plan) -> None:
    """Refuse masks of another architecture before anything changes.

    Args:
        file: The adapter file.
        plan: What would be masked.

    Raises:
        ArchitectureError: If names or sizes differ.
    """
    wanted = {target.name: target.weights for target in plan.targets}
    if dict(file.masks) == wanted:
        return
    names = sorted(set(file.masks) | set(wanted))
    differing = [name for name in names if file.masks.get(name) != wanted.get(name)]
    listed = "; ".join(
        f"{name}: file {_count(file.masks.get(name))}, model {_count(wanted.get(name))}"
        for name in differing[:3]
    )
    message = (
        f"The adapter masks {len(file.masks)} weights tensors of {sum(file.masks.values())} weights, "
        f"the model has {len(wanted)} of {sum(wanted.values())}; {len(differing)} differ ({listed}"
        f"{'; ...' if len(differing) > 3 else ''}). Build the model that the adapter was trained "
        "for. Nothing was changed."
    )
    raise ArchitectureError(message)


def _count(weights: int | None) -> str:
    return "no mask" if weights is None else f"{weights} weights"


def _matcher(config: PemnConfig, model: nn.Module) -> PemnConfig:
    """Return a configuration whose ``target_modules`` PEFT's own matching understands."""
    matcher = copy.copy(config)
    if matcher.target_modules is None and not matcher.target_parameters:
        # Last parts of the names: PEFT applies layers_to_transform to names matched by their end.
        matcher.target_modules = {path.rpartition(".")[2] for path, _ in base_modules(model) if path}
    elif isinstance(matcher.target_modules, str):
        _maybe_include_all_linear_layers(matcher, model)
    return matcher


def _match(config: PemnConfig, path: str) -> Any:
    if config.target_modules is None and not config.target_parameters:
        config = copy.copy(config)
        config.target_modules = {path.rpartition(".")[2]}
    return check_target_module_exists(config, path)


def _is_saved_whole(config: PemnConfig, path: str) -> bool:
    if not config.modules_to_save:
        return False
    probe = copy.copy(config)
    probe.exclude_modules, probe.target_modules = None, {path}
    return isinstance(check_target_module_exists(probe, path), _ExcludedModule)


def _occurrences(name: str, paths: Sequence[str]) -> int:
    return sum(path == name or path.endswith(f".{name}") for path in paths)


def _nothing_to_mask(plan: Plan, config: PemnConfig) -> str:
    reasons: dict[str, int] = defaultdict(int)
    for item in plan.left:
        reasons[item.reason] += 1
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    asked = ""
    if config.target_modules is not None:
        asked = f"Target modules {config.target_modules} not found in the base model. "
    elif config.target_parameters is not None:
        asked = f"Target parameters {config.target_parameters} not found in the base model. "
    return (
        f"{asked}None of the model's {plan.parameters} parameters would be masked: of its "
        f"{len(plan.left)} tensors with two or more dimensions: {listed or 'there is none'}. Masks go "
        "on the weights of Linear and Conv layers; see print(plan(model, ...)). Nothing was changed."
    )


def _other_bank(held: BankSpec, wanted: BankSpec) -> str:
    pairs = vars(wanted).items()
    differing = [f"{k}={v!r} instead of {getattr(held, k)!r}" for k, v in pairs if getattr(held, k) != v]
    return (
        f"The model draws its weights from another bank: the adapter wants {', '.join(differing)}. "
        "All adapters of one model share one bank; load this one onto a fresh model. Nothing was "
        "changed."
    )


def _masks_by_key(model: nn.Module, adapter_name: str) -> dict[str, AdapterMask]:
    """Return an adapter's masks by their place in the model's state dict."""
    found: dict[str, AdapterMask] = {}
    for name, module in model.named_modules():
        if isinstance(module, PemnLayer) and adapter_name in module.pemn_masks:
            clean = name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
            found[f"{clean}.{MASKS}.{adapter_name}"] = module.mask_of(adapter_name)
    return found


def _gathered(value: Tensor) -> Tensor:
    """Return the whole of a sharded tensor (DTensor), any other tensor as it is."""
    gather: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
    return gather() if gather is not None else value


def _with_prefix(key: str) -> str:
    return key if key.startswith("base_model.") else KEY_PREFIX + key


def _check_fit(
    masks: Mapping[str, tuple[AdapterMask, str]], state_dict: Mapping[str, Tensor]
) -> None:
    stray = [key for key in state_dict if f".{MASKS}." in key and key not in masks]
    targets = {mask.target for mask, _ in masks.values()}
    given = {masks[key][0].target for key in state_dict if key in masks}
    missing = sorted(targets - given)
    if stray or missing:
        message = (
            f"The adapter's masks do not fit: {len(missing)} of the model's {len(targets)} masked "
            f"weights have none in the file (first: {missing[:1]}), {len(stray)} masks have no place "
            f"(first: {stray[:1]}). Load it onto the architecture that it was trained for."
        )
        raise ArchitectureError(message)


def _check_mask(key: str, kind: str, value: Tensor, mask: AdapterMask, config: PemnConfig) -> None:
    weights = int(torch.Size(mask.shape).numel())
    if kind == "scores":
        count = value.numel()
    else:
        header = bits.verify(value, key)
        count = header.weights
        expected = fingerprints.from_short_form(header.base)
        actual = fingerprints.shorten(config.fingerprint or {})
        if expected and actual:
            fingerprints.check_fingerprint(expected, actual, "the given model")
    if count != weights:
        message = (
            f"{key} masks {count} weights, but {mask.target} has {weights} (shape {mask.shape}). "
            "Load it onto the architecture that it was trained for."
        )
        raise ArchitectureError(message)


def _converted(
    value: Tensor, kind: str, held: str, mask: AdapterMask, config: PemnConfig
) -> Tensor:
    if kind == held:
        return value
    if held == "bits":
        check_finite(value, mask.target)
        return bits.pack(mask.selector.mask(value), fingerprints.short_form(config.fingerprint or {}))
    return scores_from_mask(bits.unpack(value, mask.shape), mask, config)


def scores_from_mask(chosen: Tensor, mask: AdapterMask, config: PemnConfig) -> Tensor:
    """Return scores that choose exactly this mask, to train on from a file of bits.

    Their magnitudes are the initial ones, sorted apart: with "topk" ones lie above the largest
    initial score and zeros keep theirs; with "threshold" every score lies one initial margin above
    or below it.

    Args:
        chosen: Bool mask.
        mask: Where it belongs.
        config: Says what initial scores are.
    """
    fan_in = max(chosen.numel() // max(chosen.shape[0], 1), 1) if chosen.dim() else 1
    start = initial_scores(config, mask.target, mask.shape, fan_in).to(chosen.device)
    if mask.selector.uses_magnitude:
        return torch.where(chosen, start.sign().clamp(min=0) * 2 - 1, 0.0) * fan_in**-0.5 + start
    threshold = mask.selector.threshold
    margin = (start - threshold).abs().clamp(min=1e-3)
    return torch.where(chosen, threshold + margin, threshold - margin)
