"""`from_finetuned`: an adapter at once from a checkpoint that was fine-tuned without masks.

Two ways, for a base weight W and a fine-tuned weight F of the same shape:

"mask": the mask M that minimises ||F - W o M||^2. The sum falls apart into its elements, where
keeping costs (F - W)^2 and dropping F^2, so M is one where |F - W| <= |F|. Ties (W = 0, or
F = W / 2) keep the base. With ``scale`` the same mask is used, though it is the nearest only
without one: the best mask would depend on the factor, which depends on the mask.

"sign_delta": BitDelta (Liu et al. 2024, section 3), W + s (2M - 1) with one s for each output (or,
as there, for each matrix, of which all that follows is as true as of an output's weights). M is
one where F > W; ties (F = W) are zero. For any s >= 0 these signs are best, element by element:
with d = F - W, (d - s)^2 <= (d + s)^2 where d > 0, and the other way round where d < 0. Given them,
an output's n weights have the error sum (|d| - s)^2 = sum d^2 - 2 s sum |d| + n s^2, whose
derivative is zero at s = mean |d| and whose second derivative 2n is positive; mean |d| >= 0 agrees
with the signs. So both are the L2 optimum, and what is left is n (mean d^2 - (mean |d|)^2).

Everything else that differs - norms and their statistics, biases, embeddings, tables - becomes the
task's own tensors, exactly (`PemnConfig.carried`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.api import make_config, pemnify
from pemn_surgery.adapters.checks import check_fresh, check_model, signs_follow
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.contents import FINGERPRINT, KEY_PREFIX, TENSORS, mask_key
from pemn_surgery.adapters.finetuned.errors import tensors_differ
from pemn_surgery.adapters.finetuned.pair import (
    check_pair,
    check_tokens,
    check_values,
    state_of,
    with_ties,
)
from pemn_surgery.adapters.identity import identity_of_tensors, made_from
from pemn_surgery.adapters.injection.heads import settle_heads
from pemn_surgery.adapters.injection.matching import follow_forward, plan_for
from pemn_surgery.adapters.injection.new_rows import untied_heads
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.options import refuse_decided
from pemn_surgery.adapters.quantised import quantised_weights
from pemn_surgery.adapters.state import scores_from_mask
from pemn_surgery.adapters.task_layer import PemnTaskLayer
from pemn_surgery.coding import bits
from pemn_surgery.errors import ConfigError, UnsupportedModelError
from pemn_surgery.masks.rows import Rows
from pemn_surgery.masks.sign_delta import SignDelta
from pemn_surgery.masks.task_tensors import TASK_CHILD, TensorSet
from pemn_surgery.numbers import fingerprint as fingerprints

MethodName = Literal["mask", "sign_delta"]

# Fields of PemnConfig that follow from the method.
_DECIDED = ("bank", "bank_init", "selector", "form", "score_init", "inference_mode", "carried")


def from_finetuned(
    base: nn.Module,
    finetuned: nn.Module | Mapping[str, Tensor],
    method: MethodName = "mask",
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> PeftModel:
    """Give a base an adapter that makes it as nearly a fine-tuned model as masks on it can.

    The base is rewritten in place, as by `pemnify`; its values and the fine-tuned model's stay. How
    near it comes says `measure_errors`.

    Args:
        base: The model that was fine-tuned, as it was before.
        finetuned: The fine-tuned model, or its state dict: same names, same shapes. Types may
            differ; what the task owns is rounded to the base's.
        method: "mask" (base weights kept or dropped) or "sign_delta" (the sign of each change, and
            a float scale for each output; heads over tokens that are not tied get none).
        adapter_name: Name of the task.
        is_trainable: Whether to train on: scores that choose the same masks, or the scales beside
            signs that stay (BitDelta's scale distillation), and what ``rest`` says.
        inputs: As in `pemnify`.
        **options: Fields of `PemnConfig` that choose what is masked and what the task owns:
            ``target_modules``, ``exclude_modules``, ``rest``, ``tied``, ``modules_to_save``...;
            and ``scale``: "sqrt_density" for "mask", "matrix" for "sign_delta".

    Returns:
        The PEFT model; its masks are bits unless they are to be trained.

    Raises:
        ConfigError: If an option cannot have its value, or follows from the method.
        FinetunedMismatchError: If names, shapes or ties differ, tokens were added, or a weight is
            not finite.
        MetaTensorError: If a tensor of either model has no values.
        UnsupportedModelError: If a model is not a plain module, or the base is quantised.
        AlreadyPemnifiedError: If the base carries adapters already.
        NothingToMaskError: If no weight would be masked.
    """
    config = _config(method, options, is_trainable=is_trainable)
    check_model(base)
    check_fresh(base)
    _leave_heads(config, base)
    _check_not_quantised(base, config)
    before = base.state_dict()
    state = with_ties(before, state_of(finetuned))
    check_tokens(base, before, state)
    check_pair(before, state)
    settle_heads(config, base)
    plan = plan_for(base, config, follow_forward(base, config, inputs))
    check_values(plan, before, state)
    covered = {name for target in plan.targets for name in (target.name, *target.tied)}
    covered |= {item.name for item in plan.whole}
    new = set(config.carried or ())
    old_rows = {name: slice(rows.first) for name, rows in config.rows_by_name.items()}
    config.carried = [
        name
        for name, value in before.items()
        if name not in covered
        and (name in new or _rows_differ(value, state[name], old_rows.get(name)))
    ]
    with signs_follow():
        model = pemnify(base, config, adapter_name=adapter_name)
    set_peft_model_state_dict(model, dict(_entries(model, state, adapter_name)), adapter_name)
    in_force = cast("PemnConfig", model.peft_config[adapter_name])
    in_force.lineage = made_from("from_finetuned", [identity_of_tensors(state)])
    return model


def nearest_mask(base: Tensor, finetuned: Tensor) -> Tensor:
    """Return the mask M that minimises ||F - W o M||^2, one where |F - W| <= |F|.

    Written as 2F / W >= 1, which no rounding can turn: doubling is exact.

    Args:
        base: Float tensor W, finite.
        finetuned: Float tensor F of the same shape, finite.

    Returns:
        Bool tensor of that shape.
    """
    base, finetuned = _alike(base, finetuned)
    twice = 2 * finetuned
    return torch.where(base > 0, twice >= base, twice <= base) | (base == 0)


def nearest_signs(base: Tensor, finetuned: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return M and s that minimise ||F - W - s (2M - 1)||^2, s one number an output.

    Args:
        base: Float tensor W, finite.
        finetuned: Float tensor F of the same shape, finite.
        rows: Where each output's weights lie.

    Returns:
        M = [F > W], bool of that shape; s = mean |F - W|, float32 of shape (rows.count,).
    """
    base, finetuned = _alike(base, finetuned)
    return finetuned > base, rows.mean((finetuned - base).abs()).float()


def _alike(base: Tensor, finetuned: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on one device in one type, the wider one, and at least float32."""
    wide = torch.promote_types(torch.promote_types(base.dtype, finetuned.dtype), torch.float32)
    return base.detach().to(wide), finetuned.detach().to(base.device, wide)


def _config(method: str, options: Mapping[str, Any], *, is_trainable: bool) -> PemnConfig:
    if method not in get_args(MethodName):
        message = f"from_finetuned got method={method!r}; it needs 'mask' or 'sign_delta'."
        raise ConfigError(message)
    refuse_decided("from_finetuned", options, _DECIDED, "the method (and is_trainable)")
    return make_config(
        None,
        {
            **options,
            "bank": "own",
            "selector": "threshold",
            "form": "product" if method == "mask" else "sign_delta",
            "score_init": 0.01,  # a number: signs stay what they are made to be here
            "inference_mode": not is_trainable,
        },
    )


def _leave_heads(config: PemnConfig, base: nn.Module) -> None:
    """Leave out heads over tokens, unless targets were chosen: they are carried, as embeddings are.

    As BitDelta does: what a head's weights are off by goes straight into the logits.
    """
    paths = (
        [] if config.form == "product" or config.target_modules is not None else untied_heads(base)
    )
    given = config.exclude_modules
    if isinstance(given, str):
        config.exclude_modules = "|".join([f"(?:{given})", *map(re.escape, paths)])
    elif paths:
        config.exclude_modules = {*(given or ()), *paths}


def _check_not_quantised(base: nn.Module, config: PemnConfig) -> None:
    names = list(quantised_weights(base, config.bank_spec))
    if names:
        message = (
            f"The base stores {len(names)} weights quantised (first: {names[0]}), so that what "
            "fine-tuning changed cannot be read from them. Compare the unquantised checkpoints, "
            "or train masks on this base. Nothing was changed."
        )
        raise UnsupportedModelError(message)


def _rows_differ(before: Tensor, after: Tensor, rows: slice | None) -> bool:
    """Tell whether two tensors differ, of those with new rows in the rows before these."""
    if rows is None:
        return tensors_differ(before, after)
    return tensors_differ(before[rows], after[rows])


def _entries(
    model: PeftModel, state: Mapping[str, Tensor], adapter_name: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield what a file of the adapter would hold; it is loaded the way files are."""
    for path, module in model.named_modules():
        if isinstance(module, PemnLayer):
            yield from _mask_entries(module, state[module.target], model, adapter_name)
        elif isinstance(module, PemnTaskLayer):
            prefix = f"{module.target}." if module.target else ""
            held = cast("TensorSet", module.pemn_tensors[adapter_name])
            for name in held.state_dict():
                key = f"{KEY_PREFIX}{prefix}{TASK_CHILD}.{TENSORS}.{name}"
                value, first = state[f"{prefix}{name}"], held.first_rows.get(name)
                yield key, value[first:] if first else value
        elif isinstance(module, ModulesToSaveWrapper):
            inside = f"{path.removeprefix(KEY_PREFIX)}."
            names = [name for name in state if name.startswith(inside)]
            yield from ((KEY_PREFIX + name, state[name]) for name in names)


def _mask_entries(
    layer: PemnLayer, wanted: Tensor, model: PeftModel, adapter_name: str
) -> Iterator[tuple[str, Tensor]]:
    mask, base = layer.mask_of(adapter_name), layer.fill()
    wanted = wanted[: len(base)]
    config = cast("PemnConfig", model.peft_config[adapter_name])
    if isinstance(mask, SignDelta):
        chosen, scale = nearest_signs(base, wanted, cast("Rows", mask.rows))
        yield mask_key(layer.target, "row_scale"), scale
    else:
        chosen = nearest_mask(base, wanted)
    base = fingerprints.short_form(mask.fingerprint)
    if mask.scores is not None:
        yield mask_key(layer.target, "scores"), scores_from_mask(chosen, mask, config)
        yield mask_key(layer.target, FINGERPRINT), torch.tensor(list(base), dtype=torch.uint8)
    else:
        yield mask_key(layer.target, "bits"), bits.pack(chosen, base)
