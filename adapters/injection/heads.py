"""Heads and other new layers: what came with no checkpoint, so that only a file can bring it back.

Masks on a model's own weights need those weights again. A head that is drawn anew in every process
is not there again, so it is not masked but trained and saved whole. Who knows what is new:

- transformers marks every parameter that it fills from a checkpoint. Where it filled most of a
  model, what it did not fill is new, wherever in the given module the model lies.
- timm says which layer is the classifier, and how many classes the checkpoint has.
- ``task_type`` names the heads that PEFT trains for it.
- Of any other model nobody knows; the user is asked (`warn_of_heads`).
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from pemn_surgery.adapters.checks import do_signs_follow
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.injection.matching import is_saved_whole
from pemn_surgery.adapters.injection.new_rows import settle_new_rows
from pemn_surgery.errors import HeadWarning
from pemn_surgery.planning.plan import Plan, Target
from pemn_surgery.planning.roles import base_modules, full_name, is_container

# What PEFT trains and saves whole for a task. For two of the three it says so only after the layers
# were chosen, and would then save a head that is masked, too.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class NewParts:
    """What of a model came with no checkpoint.

    Attributes:
        modules: Paths of the largest modules that are new as a whole, or layers that are in part.
        tensors: Names of the new parameters in no such module.
    """

    modules: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


def settle_heads(config: PemnConfig, model: nn.Module) -> None:
    """Write into a configuration which modules are trained and saved whole, where it is open.

    It gets ``modules_to_save`` and ``carried``; one that was read with an adapter says what it
    holds.
    """
    if config.origin.fingerprint is not None:
        return
    settle_new_rows(config, model)
    new = _without_grown(config, new_parts(model))
    of_task = _TASK_HEADS.get(config.task_type or "", ())
    asked = config.modules_to_save
    heads = [*(asked or ()), *of_task]
    is_open = asked is None or (bool(asked) and set(asked) <= set(of_task))  # PEFT's, not a user's
    if is_open and not config.bank_spec.generated:
        heads += [*new.modules, *_timm_heads(model, chosen=_has_chosen(config))]
    if heads:
        config.modules_to_save = _each_once(heads)
    left = [name for name in new.tensors if not is_saved_whole(config, name.rpartition(".")[0])]
    if left:
        config.carried = list(dict.fromkeys([*(config.carried or ()), *left]))


def warn_of_heads(config: PemnConfig, model: nn.Module, plan: Plan) -> None:
    """Name what neither a checkpoint nor the adapter's file will bring back, or might not.

    An adapter that is loaded has been warned of.
    """
    if config.origin.fingerprint is not None or do_signs_follow():
        return
    new = _without_grown(config, new_parts(model))
    missing = [path for path in new.modules if not is_saved_whole(config, path)]
    lost = [path for path in missing if _is_lost(path, model, plan)]
    if lost:
        given = config.modules_to_save or []
        warnings.warn(
            f"{len(lost)} modules came with no checkpoint, and the adapter's file will not hold "
            f"them: {', '.join(lost)}. Another process draws them anew, and the adapter fits "
            f"nothing but this one. Use PemnConfig(..., modules_to_save={[*given, *lost]!r}).",
            HeadWarning,
            stacklevel=3,
        )
    last = _unknown_head(config, model, plan)
    if last is not None:
        warnings.warn(
            f"Nothing tells whether {last.path!r} ({last.kind} {last.shape}), the last layer, came "
            "with the model's other weights. It will be masked on its own numbers, which are in no "
            "file: drawn anew in another process, they fit no mask. If it is new, train and save "
            f"it whole: PemnConfig(..., modules_to_save=[{last.path!r}]). If it is part of a "
            "checkpoint, say so: modules_to_save=[].",
            HeadWarning,
            stacklevel=3,
        )


def new_parts(model: nn.Module) -> NewParts:
    """Return what of a model came with no checkpoint, as far as transformers says so."""
    total: Counter[str] = Counter()
    new: Counter[str] = Counter()
    names = []
    loaded = loaded_models(model)
    for path, name, parameter in _parameters(model):
        if _is_under(path, loaded):
            total.update(_above(f"{path}.{name}"))
            if _is_new(parameter):
                new.update(_above(f"{path}.{name}"))
                names.append(f"{path}.{name}")
    return _grouped(model, names, {path for path in new if new[path] == total[path]})


def _without_grown(config: PemnConfig, new: NewParts) -> NewParts:
    """Return the new parts but those of which only the last rows are new (added tokens)."""
    grown = config.rows_by_name
    holders = {name.rpartition(".")[0] for name in grown}
    return NewParts(
        tuple(path for path in new.modules if path not in holders),
        tuple(name for name in new.tensors if name not in grown),
    )


def _grouped(model: nn.Module, names: list[str], whole: set[str]) -> NewParts:
    """Return new parameters as modules where PEFT can wrap one, else by their own names."""
    holders = {name.rpartition(".")[0] for name in names}
    modules: list[str] = []
    for path, module in _named_modules(model):
        is_layer = path in holders and not module._modules
        if path and (is_layer or path in whole) and not is_container(module):
            modules += [] if _is_under(path, modules) else [path]
    return NewParts(tuple(modules), tuple(n.strip(".") for n in names if not _is_under(n, modules)))


def loaded_models(model: nn.Module) -> list[str]:
    """Return the paths of transformers' models of which a checkpoint has filled most tensors.

    Where it is less, a part of the model was loaded so, and the rest by other means.
    """
    found = []
    for path, module in _named_modules(model):
        if isinstance(module, PreTrainedModel):
            filled = [_is_filled(parameter) for _, _, parameter in _parameters(module)]
            found += [path] if 2 * sum(filled) > len(filled) else []
    return found


def _is_filled(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _is_new(parameter: nn.Parameter) -> bool:
    """Tell whether nothing filled a parameter; packed or offloaded ones were made from filled."""
    is_plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return is_plain and parameter.is_floating_point() and not _is_filled(parameter)


def _timm_heads(model: nn.Module, *, chosen: bool) -> list[str]:
    """Return timm's classifiers; with chosen targets only those that no checkpoint can have."""
    modules = dict(_named_modules(model))
    heads: list[str] = []
    for path in _timm_models(model):
        described = cast("Any", modules[path]).pretrained_cfg
        named = described.get("classifier") or ()
        names = [named] if isinstance(named, str) else list(named)
        found = [full_name(path, name) for name in names]
        other = described.get("num_classes") != getattr(modules[path], "num_classes", None)
        if all(head in modules for head in found) and (other or not chosen):
            heads += [head for head in found if any(True for _ in modules[head].parameters())]
    return heads


def _timm_models(model: nn.Module) -> list[str]:
    """Return the paths of timm's models, but for those that transformers has filled."""
    loaded = loaded_models(model)
    return [
        path
        for path, module in _named_modules(model)
        if isinstance(getattr(module, "pretrained_cfg", None), Mapping)
        and not _is_under(path, loaded)
    ]


def _unknown_head(config: PemnConfig, model: nn.Module, plan: Plan) -> Target | None:
    """Return the last layer if it will be masked on numbers of which nobody knows the origin."""
    found = {*new_parts(model).modules, *_timm_heads(model, chosen=False)}
    given = config.modules_to_save
    spoken_for = given is not None and (not given or not found.issuperset(given))
    if config.bank_spec.generated or spoken_for or _has_chosen(config) or not plan.targets:
        return None
    last = plan.targets[-1]
    known = [*loaded_models(model), *_timm_models(model)]
    if _is_under(last.path, known) or _is_language_head(last.path, model):
        return None
    return last if last.path else None


def _is_language_head(path: str, model: nn.Module) -> bool:
    """Tell whether a layer of a transformers model gives its tokens: every checkpoint has it."""
    modules = dict(_named_modules(model))
    outer = [
        m for at, m in modules.items() if isinstance(m, PreTrainedModel) if _is_under(path, [at])
    ]
    return any(found.get_output_embeddings() is modules.get(path) for found in outer)


def _has_chosen(config: PemnConfig) -> bool:
    chosen = (config.target_modules, config.target_parameters, config.layers_to_transform)
    return any(choice is not None for choice in chosen)


def _is_lost(path: str, model: nn.Module, plan: Plan) -> bool:
    """Tell whether a tensor of a new module is neither saved nor drawn again from a seed."""
    held = {item.name for item in (*plan.owned, *plan.whole) if item.saved}
    if plan.spec.generated:
        held |= {name for target in plan.targets for name in (target.name, *target.tied)}
    inside = (f"{at}.{name}" for at, name, _ in _parameters(model) if _is_under(at, [path]))
    return any(name not in held for name in inside)


def _each_once(heads: list[str]) -> list[str]:
    """Return names without those of modules within another one."""
    names = list(dict.fromkeys(heads))
    return [name for name in names if not _is_under(name, [n for n in names if n != name])]


def _is_under(name: str, paths: list[str]) -> bool:
    return any(not path or f".{name}.".startswith(f".{path}.") for path in paths)


def _above(name: str) -> Iterator[str]:
    """Yield the paths of all modules that a parameter lies in."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the model's parameters, after the paths of their modules and their names there."""
    for path, module in _named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield path, name, parameter


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's modules by the paths that they had before PEFT wrapped any."""
    for path, module in base_modules(model):
        if ".modules_to_save" not in path:
            yield path.replace(".original_module", ""), module
