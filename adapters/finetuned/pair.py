"""What two checkpoints must have in common for the one to be an adapter of the other.

Names, shapes, kinds, ties, tokens and values: each is refused with both sides named, before
anything changes.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.checks import check_fresh, check_model
from pemn_surgery.adapters.finetuned.errors import tensors_differ
from pemn_surgery.adapters.injection.new_rows import token_tables
from pemn_surgery.errors import FinetunedMismatchError, MetaTensorError
from pemn_surgery.planning.plan import Plan


def state_of(finetuned: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a fine-tuned model's state dict, if it is not one (`UnsupportedModelError`)."""
    if isinstance(finetuned, Mapping):
        return finetuned
    check_model(finetuned)
    check_fresh(finetuned)
    return finetuned.state_dict()


def with_ties(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with all names of tied tensors, of which safetensors keep one."""
    present = {_place(value): after[name] for name, value in before.items() if name in after}
    absent = {name: _place(value) for name, value in before.items() if name not in after}
    return {**after, **{name: present[at] for name, at in absent.items() if at in present}}


def check_tokens(base: nn.Module, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse tokens that the base does not have: it has to have a place for their rows."""
    for name in token_tables(base):
        held, wanted = (_rows(state.get(name)) for state in (before, after))
        if wanted > held:
            _refuse(
                f"has {wanted} rows in {name!r}, the base {held}: {wanted - held} tokens were "
                f"added. Call base.resize_token_embeddings({wanted}) first; their rows travel with "
                "the adapter"
            )


def _rows(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else 0


def check_pair(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse two models that are not of the same parts."""
    missing, unknown = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if missing or unknown:
        _refuse(
            f"lacks {len(missing)} of the base's {len(before)} tensors (first: {missing[:1]}) and "
            f"has {len(unknown)} that the base has not (first: {unknown[:1]})"
        )
    for name, value in before.items():
        _check_tensors(name, value, after[name])
    first_of: dict[tuple[Any, ...], str] = {}
    for name, value in before.items():
        first = first_of.setdefault(_place(value), name)
        if tensors_differ(after[first], after[name]):
            _refuse(f"has two tensors where the base ties {first!r} and {name!r} to one")


def _check_tensors(name: str, before: Any, after: Any) -> None:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        _refuse(f"or the base has {name!r}, which is no tensor, so that no adapter can hold it")
    shown = [f"{tuple(v.shape)} of {v.dtype}" for v in (before, after)]
    same_kind = before.is_floating_point() == after.is_floating_point()
    if before.shape != after.shape or not same_kind:
        _refuse(f"has {name!r} as {shown[1]}, the base as {shown[0]}")
    for whose, value in (("base", before), ("fine-tuned model", after)):
        if value.is_meta:
            message = (
                f"{name!r} of the {whose} is on the meta device and has no values to compare. Load "
                "the checkpoint into memory. Nothing was changed."
            )
            raise MetaTensorError(message)


def check_values(plan: Plan, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """A comparison with NaN is false, so it would become a mask like any other."""
    for target in plan.targets:
        for whose, state in (("the base's", before), ("the fine-tuned", after)):
            rows = state[target.name][: target.shape[0]]
            bad = target.weights - int(torch.isfinite(rows).sum())
            if bad:
                _refuse(
                    "cannot be compared with its base: "
                    f"{bad} of the {target.weights} values of {whose} {target.name!r} are NaN or "
                    "infinite"
                )


def _place(value: Any) -> tuple[Any, ...]:
    """Return what names of one tensor have in common; those without memory share nothing."""
    if not isinstance(value, Tensor) or value.numel() == 0 or value.is_meta:
        return (id(value),)
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device


def _refuse(problem: str) -> NoReturn:
    message = (
        f"The fine-tuned model {problem}. Give a model of the base's class and settings, or its "
        "state dict with the same names. Nothing was changed."
    )
    raise FinetunedMismatchError(message)
