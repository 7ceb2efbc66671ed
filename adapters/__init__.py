"""Masks as a PEFT method. Importing this package makes PEFT know it.

What a masked weight is, and how a model is changed, stands in `pemn_surgery` itself.
"""

if __name__ == "adapters":  # a top-level `adapters` is another project (AdapterHub)
    message = (
        "Import this package as pemn_surgery.adapters; the folder is not on the path by itself."
    )
    raise ImportError(message)

from pemn_surgery.adapters.api import pemnify, plan
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.doors import install
from pemn_surgery.adapters.files.compare import compare_adapters
from pemn_surgery.adapters.files.recode import recode
from pemn_surgery.adapters.finetuned.convert import from_finetuned
from pemn_surgery.adapters.finetuned.errors import ErrorReport, measure_errors
from pemn_surgery.adapters.foreign.attach import from_masks
from pemn_surgery.adapters.model import PemnModel
from pemn_surgery.adapters.tasks.flips import Flips, take_back_flips
from pemn_surgery.adapters.tasks.manage import rename_adapter, to_trainable

install()

__all__ = [
    "ErrorReport",
    "Flips",
    "PemnConfig",
    "PemnModel",
    "compare_adapters",
    "from_finetuned",
    "from_masks",
    "measure_errors",
    "pemnify",
    "plan",
    "recode",
    "rename_adapter",
    "take_back_flips",
    "to_trainable",
]
