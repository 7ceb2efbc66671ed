"""Rewrite a torch model's weights as shared frozen numbers times learned binary masks.

    from pemn_surgery import pemnify, plan, PemnConfig, PemnCallback

Everything that the documents tell users to import is here, wherever its file lies (`docs/api.md`).
Names are imported when they are first used, so that ``import pemn_surgery`` does not import
transformers, timm or PEFT. PEFT knows masks as soon as both are imported, in either order
(`pemn_surgery.late`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from pemn_surgery import errors
from pemn_surgery.late import register_with_peft

if TYPE_CHECKING:
    from pemn_surgery.adapters.api import pemnify, plan
    from pemn_surgery.adapters.config import PemnConfig
    from pemn_surgery.adapters.files.card import complete_card
    from pemn_surgery.adapters.files.compare import Comparison, Overlap, compare_adapters
    from pemn_surgery.adapters.files.recode import recode
    from pemn_surgery.adapters.finetuned.convert import from_finetuned, nearest_mask, nearest_signs
    from pemn_surgery.adapters.finetuned.errors import ErrorReport, WeightError, measure_errors
    from pemn_surgery.adapters.foreign.attach import from_masks
    from pemn_surgery.adapters.foreign.masked_state import MaskedState
    from pemn_surgery.adapters.foreign.papers import (
        masks_of_hidden_networks,
        masks_of_piggyback,
        masks_of_piggyback_pack,
        masks_of_self_masking,
    )
    from pemn_surgery.adapters.foreign.pruned import masks_between, masks_of_pruned, unprune
    from pemn_surgery.adapters.identity import adapter_identity
    from pemn_surgery.adapters.model import PemnModel
    from pemn_surgery.adapters.param_groups import param_groups
    from pemn_surgery.adapters.presets import Training
    from pemn_surgery.adapters.tasks.flips import Flips, take_back_flips
    from pemn_surgery.adapters.tasks.inference import TaskGuess, infer_task
    from pemn_surgery.adapters.tasks.manage import rename_adapter, to_trainable
    from pemn_surgery.adapters.tasks.mixed_batch import GroupValues
    from pemn_surgery.adapters.tasks.salt import cache_salt
    from pemn_surgery.adapters.tasks.starting import start_from
    from pemn_surgery.masks.freezing import freeze
    from pemn_surgery.masks.masked_weight import keep_weights
    from pemn_surgery.models.forward import Trace, trace
    from pemn_surgery.models.inputs.examples import example_inputs
    from pemn_surgery.models.watcher import Use
    from pemn_surgery.planning.blocks import Block, repeated_blocks
    from pemn_surgery.planning.plan import Left, Owned, Plan, Target
    from pemn_surgery.training.gradients import masks_without_gradient
    from pemn_surgery.training.penalty import pull_back
    from pemn_surgery.training.schedules import SelectionSchedule, set_selection
    from pemn_surgery.training.trainer import PemnCallback, for_trainer

__version__ = "0.1.0"

_NAMES = {
    "pemn_surgery.adapters.api": ["pemnify", "plan"],
    "pemn_surgery.adapters.config": ["PemnConfig"],
    "pemn_surgery.adapters.files.card": ["complete_card"],
    "pemn_surgery.adapters.files.compare": ["Comparison", "Overlap", "compare_adapters"],
    "pemn_surgery.adapters.files.recode": ["recode"],
    "pemn_surgery.adapters.finetuned.convert": ["from_finetuned", "nearest_mask", "nearest_signs"],
    "pemn_surgery.adapters.finetuned.errors": ["ErrorReport", "WeightError", "measure_errors"],
    "pemn_surgery.adapters.foreign.attach": ["from_masks"],
    "pemn_surgery.adapters.foreign.masked_state": ["MaskedState"],
    "pemn_surgery.adapters.foreign.papers": [
        "masks_of_hidden_networks",
        "masks_of_piggyback",
        "masks_of_piggyback_pack",
        "masks_of_self_masking",
    ],
    "pemn_surgery.adapters.foreign.pruned": ["masks_between", "masks_of_pruned", "unprune"],
    "pemn_surgery.adapters.identity": ["adapter_identity"],
    "pemn_surgery.adapters.model": ["PemnModel"],
    "pemn_surgery.adapters.param_groups": ["param_groups"],
    "pemn_surgery.adapters.presets": ["Training"],
    "pemn_surgery.adapters.tasks.flips": ["Flips", "take_back_flips"],
    "pemn_surgery.adapters.tasks.inference": ["TaskGuess", "infer_task"],
    "pemn_surgery.adapters.tasks.manage": ["rename_adapter", "to_trainable"],
    "pemn_surgery.adapters.tasks.mixed_batch": ["GroupValues"],
    "pemn_surgery.adapters.tasks.starting": ["start_from"],
    "pemn_surgery.training.gradients": ["masks_without_gradient"],
    "pemn_surgery.adapters.tasks.salt": ["cache_salt"],
    "pemn_surgery.masks.freezing": ["freeze"],
    "pemn_surgery.masks.masked_weight": ["keep_weights"],
    "pemn_surgery.models.forward": ["Trace", "trace"],
    "pemn_surgery.models.inputs.examples": ["example_inputs"],
    "pemn_surgery.models.watcher": ["Use"],
    "pemn_surgery.training.penalty": ["pull_back"],
    "pemn_surgery.planning.blocks": ["Block", "repeated_blocks"],
    "pemn_surgery.planning.plan": ["Left", "Owned", "Plan", "Target"],
    "pemn_surgery.training.schedules": ["SelectionSchedule", "set_selection"],
    "pemn_surgery.training.trainer": ["PemnCallback", "for_trainer"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Block",
    "Comparison",
    "ErrorReport",
    "Flips",
    "GroupValues",
    "Left",
    "MaskedState",
    "Overlap",
    "Owned",
    "PemnCallback",
    "PemnConfig",
    "PemnModel",
    "Plan",
    "SelectionSchedule",
    "Target",
    "TaskGuess",
    "Trace",
    "Training",
    "Use",
    "WeightError",
    "__version__",
    "adapter_identity",
    "cache_salt",
    "compare_adapters",
    "complete_card",
    "errors",
    "example_inputs",
    "for_trainer",
    "freeze",
    "from_finetuned",
    "from_masks",
    "infer_task",
    "keep_weights",
    "masks_between",
    "masks_of_hidden_networks",
    "masks_of_piggyback",
    "masks_of_piggyback_pack",
    "masks_of_pruned",
    "masks_of_self_masking",
    "masks_without_gradient",
    "measure_errors",
    "nearest_mask",
    "nearest_signs",
    "param_groups",
    "pemnify",
    "plan",
    "pull_back",
    "recode",
    "rename_adapter",
    "repeated_blocks",
    "set_selection",
    "start_from",
    "take_back_flips",
    "to_trainable",
    "trace",
    "unprune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
