"""`from_masks`: an adapter at once from masks that somebody else chose, on a model's own weights.

The masks are taken bit for bit: no score, density or threshold stands between what was given and
what the adapter holds. Their names decide which weights are masked, and no others are.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from pemn_surgery.adapters.api import make_config, pemnify
from pemn_surgery.adapters.base import masked_layers
from pemn_surgery.adapters.checks import check_fresh, check_model, signs_follow
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.foreign.masked_state import as_mask
from pemn_surgery.adapters.identity import identity_of_tensors, made_from
from pemn_surgery.adapters.injection.heads import settle_heads
from pemn_surgery.adapters.injection.matching import follow_forward, plan_for
from pemn_surgery.adapters.injection.stored_bank import with_stored_bank
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.options import refuse_decided
from pemn_surgery.adapters.state import scores_from_mask
from pemn_surgery.coding import bits
from pemn_surgery.errors import ForeignMaskError
from pemn_surgery.numbers import fingerprint as fingerprints
from pemn_surgery.planning.plan import Plan, Target
from pemn_surgery.planning.roles import base_modules, is_table, is_weight

Masks = dict[str, Tensor]

# Fields of PemnConfig that follow from the masks.
_DECIDED = (
    *("bank_init", "selector", "inference_mode", "carried", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("functional_weights", "density", "overall_density", "density_pattern"),
)


def from_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    inputs: Mapping[str, Any] | None = None,
    bank_values: Tensor | None = None,
    **options: Any,
) -> PeftModel:
    """Give a model an adapter whose masks are exactly the given ones.

    The model is rewritten in place, as by `pemnify`. It computes with W * M, merges to that, and
    its file has a bit a weight. W are the model's own weights, and every other tensor stays the
    model's; or they are a bank's, which is saved in the file with all other tensors.

    Args:
        model: A model with its own, dense weights.
        masks: By a weight's name in the model (``"layer1.0.conv1.weight"``) a tensor of its shape,
            bool or of zeros and ones alone; one is kept, zero is dropped, or with ``form="flip"``
            changes its sign. These weights are masked, no others.
        adapter_name: Name of the task.
        is_trainable: Whether to train on, from scores that choose the same masks.
        inputs: As in `pemnify`.
        bank_values: Numbers that the masks lie on in place of the model's own, as in `pemnify`; how
            they are spread says ``bank``, "mp" by default.
        **options: Fields of `PemnConfig` that do not follow from the masks: ``form``, ``scale``
            ("sqrt_density" for Self-Masking Networks), ``rest``, ``tied``, ``modules_to_save``,
            ``coding``...

    Returns:
        The PEFT model; its masks are bits unless they are to be trained.

    Raises:
        ForeignMaskError: If there are no masks, a name is not a weight's, a weight cannot be
            masked, or a tensor has another shape or other values than zeros and ones.
        ConfigError: If an option cannot have its value, or follows from the masks.
        MetaTensorError: If a masked weight has no values.
        UnsupportedModelError: If ``model`` is not a plain module.
        AlreadyPemnifiedError: If it carries adapters already.
    """
    check_model(model)
    check_fresh(model)
    _check_names(model, masks)
    chosen = {name: as_mask(mask, name) for name, mask in masks.items()}
    config = _config(model, chosen, options, bank_values, is_trainable=is_trainable)
    _settle_heads(config, model, chosen)
    plan = plan_for(model, config, follow_forward(model, config, inputs))
    by_target = _by_target(plan, chosen)
    with signs_follow():
        made = pemnify(model, config, adapter_name=adapter_name, bank_values=bank_values)
    in_force = cast("PemnConfig", made.peft_config[adapter_name])
    in_force.lineage = made_from("from_masks", [identity_of_tensors(chosen)])
    for layer in masked_layers(made, adapter_name).values():
        _put(layer, by_target[layer.target], in_force, adapter_name)
    return made


def _refuse(problem: str) -> NoReturn:
    message = f"{problem}. Nothing was changed."
    raise ForeignMaskError(message)


def _check_names(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    if not isinstance(masks, Mapping) or not masks:
        _refuse(
            f"Got {masks!r:.80} as masks; a dict of at least one weight's name to its mask is "
            "needed"
        )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    unknown = [name for name in masks if name not in names]
    if unknown:
        near = get_close_matches(str(unknown[0]), names, 3)
        hint = f" Near it: {', '.join(near)}." if near else ""
        pruned = f"{unknown[0]}_orig" in names
        todo = " Take torch's pruning off first: masks = unprune(model)." if pruned else ""
        _refuse(
            f"{len(unknown)} of the {len(masks)} masks are of no parameter of the model (first: "
            f"{unknown[0]!r}).{hint}{todo} Names are those of model.named_parameters()"
        )


def _config(
    model: nn.Module,
    masks: Masks,
    options: Mapping[str, Any],
    bank_values: Tensor | None,
    *,
    is_trainable: bool,
) -> PemnConfig:
    """Return the configuration that masks these weights and no others."""
    _check_options(options, has_bank=bank_values is not None)
    bank = "own" if bank_values is None else options.get("bank", "mp")
    modules = dict(base_modules(model))
    paths = dict.fromkeys(name.rpartition(".")[0] for name in masks)
    return make_config(
        None,
        {
            **with_stored_bank(None, {**options, "bank": bank}, bank_values),
            "selector": "threshold",
            "inference_mode": not is_trainable,
            "target_modules": "|".join(re.escape(path) for path in paths),
            "functional_weights": [name for name in masks if _is_raw(name, modules)],
        },
    )


def _check_options(options: Mapping[str, Any], *, has_bank: bool) -> None:
    decided = [*_DECIDED, *(() if has_bank else ("bank",))]
    decided += ["form"] if options.get("form") == "sign_delta" else []
    refuse_decided("from_masks", options, decided, "the masks (a bank: from bank_values=)")


def _is_raw(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether naming the module is not enough to mask a parameter: experts, a bias."""
    path, _, parameter = name.rpartition(".")
    module = modules.get(path)
    if module is None or is_weight(module, parameter):
        return False
    return not (parameter == "weight" and is_table(module))


def _settle_heads(config: PemnConfig, model: nn.Module, masks: Masks) -> None:
    """Write down what is trained and saved whole, but nothing that the masks are of."""
    is_open = config.modules_to_save is None and config.task_type is None
    settle_heads(config, model)
    if is_open:
        config.modules_to_save = [
            path
            for path in config.modules_to_save or ()
            if not any(name.startswith(f"{path}.") for name in masks)
        ]


def _by_target(plan: Plan, masks: Masks) -> Masks:
    """Return the masks by the names of the plan's targets, each of which has one that fits."""
    names_of = {target.name: (target.name, *target.tied) for target in plan.targets}
    masked = {name for names in names_of.values() for name in names}
    reasons = {item.name: item.reason for item in plan.left}
    staying = [name for name in masks if name not in masked]
    if staying:
        why = reasons.get(staying[0], "is in a module that another one holds, too")
        _refuse(
            f"{len(staying)} of the {len(masks)} weights that have masks cannot be masked (first: "
            f"{staying[0]!r}: {why}). Leave their masks out"
        )
    return {target.name: _mask_of(target, names_of[target.name], masks) for target in plan.targets}


def _mask_of(target: Target, names: Iterable[str], masks: Masks) -> Tensor:
    given = [name for name in names if name in masks]
    if not given:
        _refuse(
            f"The masks are of weights of {target.path!r}, whose {target.name!r} is masked with "
            f"them and has none. Give it one, too: torch.ones({tuple(target.shape)}) keeps all"
        )
    first, *others = given
    for name in given:
        if masks[name].shape != target.shape:
            _refuse(
                f"The mask of {name!r} has shape {tuple(masks[name].shape)}, the weight "
                f"{tuple(target.shape)}"
            )
    different = [name for name in others if not torch.equal(masks[name], masks[first])]
    if different:
        _refuse(f"{first!r} and {different[0]!r} are one tensor (tied) and have different masks")
    return masks[first]


def _put(layer: PemnLayer, chosen: Tensor, config: PemnConfig, adapter_name: str) -> None:
    mask = layer.mask_of(adapter_name)
    if mask.scores is None:
        stored = bits.pack(chosen, fingerprints.short_form(mask.fingerprint))
        mask.bits = stored.to(mask.store.device)
    else:
        mask.scores.data.copy_(scores_from_mask(chosen, mask, config))
