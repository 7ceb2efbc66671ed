"""What a model has learned already, and whether an adapter would begin without it.

Masks on drawn numbers take the model's own weights away, and "topk" drops a share of them at
random before the first step. Both are meant for models that have learned nothing yet.
"""

import warnings

from torch import Tensor, nn

from pemn_surgery.adapters.checks import do_signs_follow
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.injection.heads import loaded_models
from pemn_surgery.errors import PretrainedWarning
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.roles import is_norm


def lost_by(config: PemnConfig, model: nn.Module, plan: Plan) -> str:
    """Say what a new adapter would take from a model that has learned something, "" if nothing."""
    begins_new = config.origin.file is None and not do_signs_follow()
    if not begins_new or not plan.targets or not is_trained(model):
        return ""
    weights = f"{len(plan.targets)} weights ({plan.masked_weights:,} numbers)"
    keep = 'pemnify(model, bank="own") masks what the model has learned'
    if config.bank_spec.generated:
        numbers = "drawn numbers" if config.bank_spec.drawn else "those of bank_values"
        return (
            f'bank="{config.bank}" replaces {weights} of a trained model with {numbers}: it '
            f"begins anew; {keep}"
        )
    if config.form == "binary":
        return f'form="binary" takes the sizes of {weights} of a trained model; {keep}'
    shares = [1.0 if item.density is None else item.density for item in plan.targets]
    if config.bank == "own" and config.form == "product" and min(shares) < 1:
        return (
            f'selector="topk" drops a share of {weights} of a trained model at random before the '
            f"first step (densities from {min(shares):.4g}); {keep} and drops nothing at first"
        )
    return ""


def warn_of_lost_weights(lost: str) -> None:
    """Say aloud what `lost_by` says, if anything."""
    if lost:
        warnings.warn(
            f"{lost}. If it is meant so, ignore this warning: "
            "warnings.simplefilter('ignore', pemn_surgery.errors.PretrainedWarning).",
            PretrainedWarning,
            stacklevel=3,
        )


def is_trained(model: nn.Module) -> bool:
    """Tell whether a model has learned something, as far as one can see.

    Either transformers has filled it from a checkpoint, or the factors of some norm, which all
    begin alike, differ. Of other models nobody knows.
    """
    norms = (module for module in model.modules() if is_norm(module))
    return bool(loaded_models(model)) or any(
        _has_moved(norm._parameters.get("weight")) for norm in norms
    )


def _has_moved(factors: Tensor | None) -> bool:
    if factors is None or factors.is_meta or not factors.numel():
        return False
    return bool((factors.detach() != factors.detach().flatten()[0]).any())
