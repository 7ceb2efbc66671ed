"""What is refused before anything changes, and in which words."""

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, cast

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.fx import GraphModule

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.registry import PREFIX
from pemn_surgery.adapters.within import set_within
from pemn_surgery.errors import (
    AdapterError,
    AlreadyPemnifiedError,
    BankMismatchError,
    ConfigError,
    GraphModeError,
    LowCoverageWarning,
    NothingToMaskError,
    UnsupportedModelError,
)
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.models.graph_modules import fixed_modes, graph_modules
from pemn_surgery.numbers.bank import BankSpec
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.roles import base_modules, is_container

_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "ScriptModule",
    "RecursiveScriptModule",
)

_OPTION = {"init": "bank_init"}  # what users call a field of `BankSpec`
_SIGNS_FOLLOW: ContextVar[bool] = ContextVar("pemn_signs_follow", default=False)


def signs_follow() -> AbstractContextManager[None]:
    """Put masks on a model whose signs and scales are put in place next (`from_finetuned`)."""
    return set_within(_SIGNS_FOLLOW, True)


def do_signs_follow() -> bool:
    """Tell whether signs and scales are put in place next."""
    return _SIGNS_FOLLOW.get()


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, or a wrapper around one (`UnsupportedModelError`)."""
    if not isinstance(model, nn.Module):
        message = (
            f"Got {type(model).__name__}; a torch.nn.Module is needed, for example a timm model."
        )
        raise UnsupportedModelError(message)
    for module_class in type(model).__mro__:
        if module_class.__name__ in _WRAPPERS:
            message = (
                f"Got a {module_class.__name__} around the model; masks must be there before it is "
                "wrapped or compiled. Call pemnify on the inner model, then wrap the result."
            )
            raise UnsupportedModelError(message)


def check_fresh(model: nn.Module) -> None:
    """Refuse a model that carries adapters of PEFT already (`AlreadyPemnifiedError`)."""
    check_no_other_method(model)
    layers = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if layers:
        message = (
            f"The model carries adapters in {len(layers)} places already (first: {layers[0]}). Use "
            "model.add_adapter(name, config) for another task, or model.unload() to begin anew."
        )
        raise AlreadyPemnifiedError(message)


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Refuse to overwrite an adapter that may have been trained (`AlreadyPemnifiedError`)."""
    layers = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    taken = sum(adapter_name in layer.pemn_masks for layer in layers)
    if taken:
        message = (
            f"The model has {taken} masks of an adapter {adapter_name!r} already; a new one of "
            "that name would overwrite them. Choose another name, or delete or unload that adapter."
        )
        raise AlreadyPemnifiedError(message)


def adapter_configs(model: Any) -> dict[str, PemnConfig]:
    """Return the configurations of a model's adapters by name."""
    return cast("dict[str, PemnConfig]", getattr(model, "peft_config", {}))


def check_adapters_exist(configs: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse names of adapters that a model does not have (`AdapterError`)."""
    unknown = [name for name in names if name not in configs]
    if unknown:
        known = ", ".join(configs) or "none"
        message = f"There is no adapter {', '.join(map(repr, unknown))}; the model has {known}."
        raise AdapterError(message)


def check_in_place(model: nn.Module, what: str) -> None:
    """Refuse weights that accelerate has moved to CPU or disk (`UnsupportedModelError`)."""
    for path, module in model.named_modules():
        if getattr(module.__dict__.get("_hf_hook"), "offload", False):
            message = (
                f"{path or 'The model'} is offloaded by accelerate, so its weights are not at hand "
                f"to {what}. Do it on the model in memory, then offload the result."
            )
            raise UnsupportedModelError(message)


def check_signs(model: nn.Module, plan: Plan, config: PemnConfig) -> None:
    """Refuse sign deltas that nothing gives signs, and those whose outputs cannot be told.

    Raises:
        ConfigError: If neither a file nor a fine-tuned model follows.
        UnsupportedModelError: If a graph reads a target itself: its code alone does not say which
            dimension the outputs are.
    """
    if config.form != "sign_delta":
        return
    fixed = config.has_fixed_signs and config.origin.fingerprint is None
    if fixed and not do_signs_follow():
        message = (
            f'PemnConfig got form="sign_delta", score_init={config.score_init!r}: signs that all '
            'begin alike do not learn. Leave score_init out (it is "normal" then) to train signs '
            "and scales, or take the signs of a fine-tuned model, "
            'from_finetuned(base, finetuned, method="sign_delta"). Nothing was changed.'
        )
        raise ConfigError(message)
    read = _read_by_graphs(model, plan)
    if read:
        message = (
            f'form="sign_delta" needs layers, but a graph reads {len(read)} of the '
            f"{len(plan.targets)} weights itself (first: {read[0]}). Use the model that the graph "
            "was made from, and trace or export the merged result. Nothing was changed."
        )
        raise UnsupportedModelError(message)


def _read_by_graphs(model: nn.Module, plan: Plan) -> list[str]:
    if not graph_modules(model):
        return []
    modules = dict(base_modules(model))
    held = {path for path, m in modules.items() if isinstance(m, GraphModule) or is_container(m)}
    return [target.name for target in plan.targets if target.path in held]


def check_targets(plan: Plan, config: PemnConfig) -> None:
    """Refuse a plan without targets, or without one that was named.

    Raises:
        NothingToMaskError: If no weight would be masked, or ``target_parameters`` names none.
    """
    names = [name for target in plan.targets for name in (target.name, *target.tied)]
    unfound = [
        asked
        for asked in config.target_parameters or ()
        if not any(f".{name}".endswith(f".{asked}") for name in names)
    ]
    if plan.targets and unfound:
        message = (
            f"Target parameters {unfound} not found in the base model among the {len(plan.targets)}"
            f" weights that would be masked (first: {plan.targets[0].name}). Name parameters by "
            "their full names or the ends of them; see print(plan(model, ...)). Nothing was "
            "changed."
        )
        raise NothingToMaskError(message)
    if plan.targets:
        return
    reasons: dict[str, int] = defaultdict(int)
    for item in plan.left:
        reasons[item.reason] += 1
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    asked = ""
    if config.target_modules:
        asked = f"Target modules {config.target_modules} not found in the base model. "
    elif config.target_parameters:
        asked = f"Target parameters {config.target_parameters} not found in the base model. "
    message = (
        f"{asked}None of the model's {plan.parameters} parameters would be masked: of its "
        f"{len(plan.left)} tensors with two or more dimensions: {listed or 'there is none'}. "
        "Masks go on the weights of Linear and Conv layers; see print(plan(model, ...)). Nothing "
        "was changed."
    )
    raise NothingToMaskError(message)


def check_mode(model: nn.Module, *, training: bool, why: str) -> None:
    """Refuse a mode that operators in a model's graphs cannot take on (`GraphModeError`)."""
    for module in graph_modules(model):
        held = fixed_modes(module, training=training)
        if held:
            wanted, other = ("train", "eval") if training else ("eval", "train")
            message = (
                f"{why} asks for {wanted} mode, but the graph was exported in {other} mode: "
                f"{len(held)} of its operators hold it (first: {held[0]}). Export the model after "
                f"model.{wanted}(), or leave the mode alone."
            )
            raise GraphModeError(message)


def warn_of_low_coverage(plan: Plan, config: PemnConfig) -> None:
    """Say loudly that much stays unmasked, where the user has not chosen the targets."""
    chosen = (
        config.target_modules,
        config.exclude_modules,
        config.layers_to_transform,
        config.modules_to_save,
        config.origin.file,  # an adapter that is loaded has been warned of
    )
    if plan.warning and all(value is None for value in chosen):
        warnings.warn(
            f"{plan.warning}. print(plan(model, ...)) shows every weight.",
            LowCoverageWarning,
            stacklevel=2,
        )


def check_same_bank(held: BankSpec, wanted: BankSpec) -> None:
    """Refuse a second bank beside the one that a model has (`BankMismatchError`)."""
    if held == wanted:
        return
    differing = ", ".join(
        f"{_OPTION.get(name, name)}={value!r} instead of {getattr(held, name)!r}"
        for name, value in vars(wanted).items()
        if getattr(held, name) != value
    )
    message = (
        f"The model draws its weights from another bank: the adapter wants {differing}. All "
        "adapters of one model share one bank; load this one onto a fresh model. Nothing was "
        "changed."
    )
    raise BankMismatchError(message)


def check_same_targets(held: Set[str], plan: Plan) -> None:
    """Refuse an adapter that masks others than the bank has replaced (`BankMismatchError`).

    A weight that the bank replaced and an adapter leaves unmasked would be the bare fill, which
    that adapter's file could not bring back without the other adapter.
    """
    wanted = {target.name for target in plan.targets}
    if held == wanted:
        return
    differing = sorted(held ^ wanted)
    message = (
        f"The model's bank fills {len(held)} weights, the adapter would mask {len(wanted)}; "
        f"{len(differing)} differ (first: {differing[0]}). Give all adapters of a model with a "
        "bank the same targets. Nothing was changed."
    )
    raise BankMismatchError(message)


def check_not_merged(model: nn.Module, adapter_name: str) -> None:
    """Refuse to change an adapter whose weights are fixed (`UnsupportedModelError`)."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    merged = sum(adapter_name in layer.merged_adapters for layer in layers)
    if merged:
        message = (
            f"The adapter {adapter_name!r} is merged in {merged} layers, which would not see other "
            "masks. Call unmerge_adapter() first. Nothing was changed."
        )
        raise UnsupportedModelError(message)


def check_no_other_method(model: nn.Module) -> None:
    """Refuse adapters of another method: masks would mask theirs (`AlreadyPemnifiedError`)."""
    others = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, (MaskedWeight, TaskTensors))
    }
    if others:
        first = next(iter(others))
        message = (
            f"The model carries {_method_of(others[first])} adapters in {len(others)} layers "
            f"(first: {first}), and masks cannot lie on those. Merge them into the model first "
            "(merge_and_unload() of its PeftModel), or take a model without them. Nothing was "
            "changed."
        )
        raise AlreadyPemnifiedError(message)


def refusing_masks(begin: Callable[..., None]) -> Callable[..., None]:
    """Let PEFT's other methods refuse a model with masks.

    They would merge into a masked weight, which is computed, and save masks under names that
    nothing can load.
    """

    @functools.wraps(begin)
    def refusing(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "prefix", None) != PREFIX:
            _check_no_masks(model, _method_of(self))
        begin(self, model, *args, **kwargs)

    return refusing


def _check_no_masks(model: nn.Module, method: str) -> None:
    masked = [module.target for module in model.modules() if isinstance(module, MaskedWeight)]
    if masked:
        message = (
            f"{method} adapters cannot lie on masks, and the model has {len(masked)} masked "
            f"weights (first: {masked[0]}): they would change weights that are computed. Merge the "
            "masks first, model.merge_and_unload(), or take a model without. Nothing was changed."
        )
        raise AlreadyPemnifiedError(message)


def _method_of(layer: object) -> str:
    """Return PEFT's name of the method whose tuner lies in the same package as a layer's class."""
    tuners = PEFT_TYPE_TO_TUNER_MAPPING.items()
    places = {_package(tuner): kind.value for kind, tuner in tuners}
    return places.get(_package(type(layer)), type(layer).__name__)


def _package(of: type) -> str:
    return of.__module__.rpartition(".")[0]
