"""Which weights a configuration means, in PEFT's own matching."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, cast

from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from torch.fx import GraphModule

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.quantised import quantised_weights
from pemn_surgery.adapters.within import set_within
from pemn_surgery.errors import ConfigError, TraceError
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.models.forward import Trace, trace
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.planner import functional_weights, make_plan, rewritten_weights
from pemn_surgery.planning.request import Request
from pemn_surgery.planning.roles import base_modules, is_saved_by_peft


class _NotNeededError(TraceError):
    """No forward was followed, because it is known already which weights are masked."""


def follow_forward(
    model: nn.Module, config: PemnConfig, inputs: Mapping[str, Any] | None = None
) -> Trace | TraceError:
    """Follow a forward on shapes; return the trace, or why there is none.

    What it shows is written into the configuration where that is open (``functional_weights``,
    ``rewritten_weights``). Without inputs they are made from the model's configuration.
    """
    result = _follow(model, config, inputs)
    chosen = config.target_modules is not None
    seen = not isinstance(result, TraceError)
    if config.functional_weights is None:
        config.functional_weights = functional_weights(model, result) if seen and not chosen else []
    if config.rewritten_weights is None:
        config.rewritten_weights = rewritten_weights(model, result) if seen else []
    return result


# What `pemnify` has followed with the inputs that it was given, while PEFT injects the adapter.
_followed: ContextVar[Trace | TraceError | None] = ContextVar("followed", default=None)


def followed(result: Trace | TraceError) -> AbstractContextManager[None]:
    """Have `forward_of` return a result, within the block."""
    return set_within(_followed, result)


def forward_of(model: nn.Module, config: PemnConfig) -> Trace | TraceError | None:
    """Return what a forward shows, if it was followed already or the configuration is open."""
    is_open = config.functional_weights is None or config.rewritten_weights is None
    return follow_forward(model, config) if is_open else _followed.get()


def _follow(
    model: nn.Module, config: PemnConfig, inputs: Mapping[str, Any] | None
) -> Trace | TraceError:
    if config.origin.file is not None:
        return _NotNeededError("the adapter's configuration says which weights are masked")
    if any(isinstance(module, MaskedWeight) for module in model.modules()):
        return _NotNeededError("the model carries masks already")
    try:
        return trace(model, inputs)
    except TraceError as error:
        return error


def plan_for(
    model: nn.Module, config: PemnConfig, followed: Trace | TraceError | None = None
) -> Plan:
    """Return the plan that a configuration means for a model whose forward was followed, or not."""
    matcher = _matcher(config, model)
    own_paths = _own_paths(model)
    if config.origin.file is None:
        _check_layers_exist(model, matcher)
    by_layer = config.target_modules is None and config.layers_to_transform is not None

    def reason_to_leave(path: str) -> str:
        path = own_paths.get(path, path)
        if not path and isinstance(model, GraphModule):  # its own parameters have no module
            takes_all = config.target_modules is None and config.layers_to_transform is None
            return "" if takes_all else "not in target_modules"
        if not path:
            return "is the model itself; put it into torch.nn.Sequential to mask it"
        if by_layer and "." not in path:  # PEFT takes full names before it looks at layers
            return "not in layers_to_transform"
        if is_saved_whole(config, path):
            return "trained and saved whole (modules_to_save)"
        result = _match(matcher, path)
        if isinstance(result, _ExcludedModule):
            return "in exclude_modules"
        return "" if result else "not in target_modules"

    return make_plan(
        model,
        Request(
            spec=config.bank_spec,
            rest=cast("Any", config.rest),
            reason_to_leave=reason_to_leave,
            is_saved_whole=lambda path: is_saved_whole(config, path),
            is_named=lambda path: config.target_modules is not None and not reason_to_leave(path),
            parameters=tuple(config.target_parameters or ()),
            functional=frozenset(config.functional_weights or ()),
            rewritten=frozenset(config.rewritten_weights or ()),
            tied=config.tied,
            carried=frozenset(config.carried or ()),
            new_rows=config.rows_by_name,
            row_scaled=config.form == "sign_delta" or config.scale == "row",
            one_a_matrix=config.scale == "matrix",
            support=config.support_in_force,
            densities=config.densities,
            quantised=quantised_weights(model, config.bank_spec),
            trace=followed if isinstance(followed, Trace) else None,
            untraced=str(followed) if isinstance(followed, TraceError) else "",
            unseen=isinstance(followed, TraceError) and not isinstance(followed, _NotNeededError),
        ),
    )


def _check_layers_exist(model: nn.Module, matcher: PemnConfig) -> None:
    """Refuse indices that no layer has: a filter that matches nothing would do so in silence."""
    wanted = matcher.layers_to_transform
    given = [wanted] if isinstance(wanted, int) else sorted(wanted or ())
    paths = [path for path, _ in base_modules(model) if path]
    missing = [index for index in given if not _has_layer(matcher, paths, index)]
    if not missing:
        return
    numbers = {int(part) for path in paths for part in path.split(".") if part.isdecimal()}
    found = [index for index in sorted(numbers) if _has_layer(matcher, paths, index)]
    there = f"indices {found[0]} to {found[-1]}" if found else "no indices that PEFT's names match"
    named = f" and layers_pattern={matcher.layers_pattern}" if matcher.layers_pattern else ""
    message = (
        f"PemnConfig got layers_to_transform={wanted}{named}, but the model's layers have {there}, "
        f"not {', '.join(map(str, missing))}. Nothing was changed."
    )
    raise ConfigError(message)


def _has_layer(matcher: PemnConfig, paths: Sequence[str], index: int) -> bool:
    probe = copy.copy(matcher)
    probe.layers_to_transform, probe.exclude_modules, probe.modules_to_save = [index], None, None
    inside = (path for path in paths if "." in path)  # PEFT takes full names, whatever the index
    return any(check_target_module_exists(probe, path) for path in inside)


def is_excluded(config: PemnConfig, path: str) -> bool:
    """Tell whether PEFT's matching excludes a module (``exclude_modules``, ``modules_to_save``)."""
    return isinstance(_match(config, path), _ExcludedModule)


def is_saved_whole(config: PemnConfig, path: str) -> bool:
    """Tell whether PEFT trains and saves a module as a whole, or one that it lies in.

    PEFT goes by the ends of names, within a part of a name too: "classifier" is "pre_classifier".
    """
    parts = path.split(".")
    above = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    ends = tuple(config.modules_to_save or ())
    return any(name.endswith(ends) for name in above)


def _own_paths(model: nn.Module) -> dict[str, str]:
    """Return what modules within PEFT's wrappers are called without them, by path."""
    paths = dict(base_modules(model))
    inside = [f"{path}.original_module" for path, one in paths.items() if is_saved_by_peft(one)]
    return {
        path: start.rpartition(".")[0] + path[len(start) :]
        for start in inside
        for path in paths
        if f"{path}.".startswith(f"{start}.")
    }


def _matcher(config: PemnConfig, model: nn.Module) -> PemnConfig:
    """Return a configuration whose ``target_modules`` PEFT's own matching understands."""
    matcher = copy.copy(config)
    if matcher.target_modules is None:
        # Last parts of the names: PEFT applies layers_to_transform to names matched by their end.
        matcher.target_modules = {
            path.rpartition(".")[2] for path, _ in base_modules(model) if path
        }
    elif isinstance(matcher.target_modules, str):
        _maybe_include_all_linear_layers(matcher, model)
    return matcher


def _match(config: PemnConfig, path: str) -> Any:
    if config.target_modules is None:
        config = copy.copy(config)
        config.target_modules = {path.rpartition(".")[2]}
    return check_target_module_exists(config, path)
