"""Rewrite a torch model's weights as shared frozen numbers times learned binary masks.

    from pemn_surgery import pemnify, plan, PemnConfig, PemnCallback

Names are imported when they are first used, so that ``import pemn_surgery`` does not import
transformers, timm or PEFT. PEFT knows masks as soon as both are imported, in either order
(`pemn_surgery.late`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from pemn_surgery import errors
from pemn_surgery.late import register_with_peft

if TYPE_CHECKING:
    from pemn_surgery.adapters import (
        PemnConfig,
        compare_adapters,
        from_finetuned,
        measure_errors,
        pemnify,
        plan,
        recode,
        rename_adapter,
        take_back_flips,
        to_trainable,
    )
    from pemn_surgery.adapters.tasks.inference import TaskGuess, infer_task
    from pemn_surgery.gradients import masks_without_gradient
    from pemn_surgery.masks.masked_weight import keep_weights
    from pemn_surgery.trainer import PemnCallback, for_trainer

__version__ = "0.1.0"

_HOMES = {
    "pemnify": "pemn_surgery.adapters",
    "plan": "pemn_surgery.adapters",
    "PemnConfig": "pemn_surgery.adapters",
    "recode": "pemn_surgery.adapters",
    "rename_adapter": "pemn_surgery.adapters",
    "take_back_flips": "pemn_surgery.adapters",
    "to_trainable": "pemn_surgery.adapters",
    "compare_adapters": "pemn_surgery.adapters",
    "from_finetuned": "pemn_surgery.adapters",
    "measure_errors": "pemn_surgery.adapters",
    "TaskGuess": "pemn_surgery.adapters.tasks.inference",
    "infer_task": "pemn_surgery.adapters.tasks.inference",
    "keep_weights": "pemn_surgery.masks.masked_weight",
    "masks_without_gradient": "pemn_surgery.gradients",
    "PemnCallback": "pemn_surgery.trainer",
    "for_trainer": "pemn_surgery.trainer",
}

__all__ = [
    "PemnCallback",
    "PemnConfig",
    "TaskGuess",
    "__version__",
    "compare_adapters",
    "errors",
    "for_trainer",
    "from_finetuned",
    "infer_task",
    "keep_weights",
    "masks_without_gradient",
    "measure_errors",
    "pemnify",
    "plan",
    "recode",
    "rename_adapter",
    "take_back_flips",
    "to_trainable",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
