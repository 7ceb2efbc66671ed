"""Masks as a PEFT method. Importing this package makes PEFT know it."""

if __name__ == "adapters":  # a top-level `adapters` is another project (AdapterHub)
    message = (
        "Import this package as pemn_surgery.adapters; the folder is not on the path by itself."
    )
    raise ImportError(message)

from pemn_surgery.adapters.api import pemnify, plan
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.atomic import wrap_saving
from pemn_surgery.adapters.files.card import wrap_cards
from pemn_surgery.adapters.files.compare import compare_adapters
from pemn_surgery.adapters.files.recode import recode
from pemn_surgery.adapters.finetuned.convert import from_finetuned
from pemn_surgery.adapters.finetuned.errors import ErrorReport, measure_errors
from pemn_surgery.adapters.guard import wrap_loading
from pemn_surgery.adapters.injection.all_or_nothing import wrap_adding
from pemn_surgery.adapters.model import PemnModel
from pemn_surgery.adapters.names import wrap_filter
from pemn_surgery.adapters.other_methods import wrap_other_methods
from pemn_surgery.adapters.registry import register
from pemn_surgery.adapters.tasks.flips import Flips, take_back_flips
from pemn_surgery.adapters.tasks.hotswap import enter_hotswap
from pemn_surgery.adapters.tasks.manage import rename_adapter, to_trainable
from pemn_surgery.adapters.versions import wrap_version_check
from pemn_surgery.adapters.whole.whole_modules import wrap_choices
from pemn_surgery.masks.recompute import wrap_checkpoints

register(PemnConfig, PemnModel)
wrap_adding()
wrap_saving()
wrap_loading()
wrap_cards()
enter_hotswap()
wrap_filter()
wrap_other_methods()
wrap_version_check()
wrap_choices()
wrap_checkpoints()

__all__ = [
    "ErrorReport",
    "Flips",
    "PemnConfig",
    "PemnModel",
    "compare_adapters",
    "from_finetuned",
    "measure_errors",
    "pemnify",
    "plan",
    "recode",
    "rename_adapter",
    "take_back_flips",
    "to_trainable",
]
