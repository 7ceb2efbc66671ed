"""What is refused before anything changes, and in which words."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.fx import GraphModule

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.other_methods import check_no_other_method
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


@contextmanager
def signs_follow() -> Iterator[None]:
    """Put masks on a model whose signs and scales are put in place next (`from_finetuned`)."""
    token = _SIGNS_FOLLOW.set(True)
    try:
        yield
    finally:
        _SIGNS_FOLLOW.reset(token)


def do_signs_follow() -> bool:
    """Tell whether signs and scales are put in place next."""
    return _SIGNS_FOLLOW.get()


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be rewritten.

    Args:
        model: What the user gave.

    Raises:
        UnsupportedModelError: If it is not a module, or a wrapper around one.
    """
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
    """Refuse a model that PEFT has changed already.

    Args:
        model: What the user gave.

    Raises:
        AlreadyPemnifiedError: If it carries adapters.
    """
    check_no_other_method(model)
    layers = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if layers:
        message = (
            f"The model carries adapters in {len(layers)} places already (first: {layers[0]}). Use "
            "model.add_adapter(name, config) for another task, or model.unload() to begin anew."
        )
        raise AlreadyPemnifiedError(message)


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Refuse to put a new adapter in the place of one that may have been trained.

    Args:
        model: The model.
        adapter_name: Name of the new adapter.

    Raises:
        AlreadyPemnifiedError: If the model has masks of that name.
    """
    layers = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    taken = sum(adapter_name in layer.pemn_masks for layer in layers)
    if taken:
        message = (
            f"The model has {taken} masks of an adapter {adapter_name!r} already; a new one of "
            "that name would overwrite them. Choose another name, or delete or unload that adapter."
        )
        raise AlreadyPemnifiedError(message)


def check_adapters_exist(configs: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse names of adapters that a model does not have.

    Args:
        configs: The configurations of the model's adapters by name.
        names: The names.

    Raises:
        AdapterError: If one is not there.
    """
    unknown = [name for name in names if name not in configs]
    if unknown:
        known = ", ".join(configs) or "none"
        message = f"There is no adapter {', '.join(map(repr, unknown))}; the model has {known}."
        raise AdapterError(message)


def check_in_place(model: nn.Module, what: str) -> None:
    """Refuse a model whose weights accelerate has moved out to CPU or disk.

    Args:
        model: The model.
        what: What is to be done with it, for the error.

    Raises:
        UnsupportedModelError: If a layer is offloaded.
    """
    for path, module in model.named_modules():
        if getattr(module.__dict__.get("_hf_hook"), "offload", False):
            message = (
                f"{path or 'The model'} is offloaded by accelerate, so its weights are not at hand "
                f"to {what}. Do it on the model in memory, then offload the result."
            )
            raise UnsupportedModelError(message)


def check_signs(model: nn.Module, plan: Plan, config: PemnConfig) -> None:
    """Refuse sign deltas that nothing gives signs, and those whose outputs cannot be told.

    Args:
        model: The model.
        plan: What would be masked.
        config: What was asked for; one that was read with an adapter names its base.

    Raises:
        ConfigError: If neither a file nor a fine-tuned model follows.
        UnsupportedModelError: If a graph reads a target itself: its code alone does not say which
            dimension the outputs are.
    """
    if config.form != "sign_delta":
        return
    if config.origin.fingerprint is None and not do_signs_follow():
        message = (
            'PemnConfig got form="sign_delta", whose signs come from a fine-tuned model: call '
            'from_finetuned(base, finetuned, method="sign_delta"), or load an adapter that it '
            "made. Nothing was changed."
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

    Args:
        plan: What would be masked.
        config: What was asked for.

    Raises:
        NothingToMaskError: If no weight would be masked, or ``target_parameters`` names none.
    """
    unfound = [name for name in config.target_parameters or () if not _finds(plan, name)]
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


def _finds(plan: Plan, parameter: str) -> bool:
    names = [name for target in plan.targets for name in (target.name, *target.tied)]
    return any(f".{name}".endswith(f".{parameter}") for name in names)


def check_mode(model: nn.Module, *, training: bool, why: str) -> None:
    """Refuse a mode that the graphs of a model cannot take on.

    Args:
        model: The model.
        training: The mode that is asked for.
        why: What asks for it, for the error.

    Raises:
        GraphModeError: If a graph holds operators in the other mode.
    """
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
    """Say loudly that much stays unmasked, where the user has not chosen the targets.

    Args:
        plan: What will be masked.
        config: What was asked for; an adapter that is loaded has been warned of.
    """
    chosen = (
        config.target_modules,
        config.exclude_modules,
        config.layers_to_transform,
        config.modules_to_save,
        config.origin.file,
    )
    if plan.warning and all(value is None for value in chosen):
        warnings.warn(
            f"{plan.warning}. print(plan(model, ...)) shows every weight.",
            LowCoverageWarning,
            stacklevel=2,
        )


def check_same_bank(held: BankSpec, wanted: BankSpec) -> None:
    """Refuse a second bank beside the one that a model has.

    Args:
        held: The model's.
        wanted: The new adapter's.

    Raises:
        BankMismatchError: If they differ.
    """
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
    """Refuse a later adapter that masks other weights than those that the bank has replaced.

    A weight that the bank replaced and an adapter leaves unmasked would be the bare fill, which
    that adapter's file could not bring back without the other adapter.

    Args:
        held: Names of the weights that the model's bank has replaced.
        plan: What would be masked.

    Raises:
        BankMismatchError: If the two differ.
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
    """Refuse to change an adapter whose effective weights are fixed.

    Args:
        model: The model.
        adapter_name: The adapter.

    Raises:
        UnsupportedModelError: If the adapter is merged.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    merged = sum(adapter_name in layer.merged_adapters for layer in layers)
    if merged:
        message = (
            f"The adapter {adapter_name!r} is merged in {merged} layers, which would not see other "
            "masks. Call unmerge_adapter() first. Nothing was changed."
        )
        raise UnsupportedModelError(message)
