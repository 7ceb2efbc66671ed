"""Makes PEFT know the method.

PEFT 0.21 has no entry point for methods from outside: ``register_peft_method`` accepts only members
of its own enum. So the documented way is tried first, and where it refuses, the same three tables
that it would fill are filled here, keyed by a string enum of our own (``get_model_status`` and
transformers read ``.value``).
"""

from enum import Enum
from typing import Any, cast

import peft.mapping
from peft.utils import register_peft_method

PREFIX = "pemn_"


class PemnType(str, Enum):
    """The method's name as PEFT's tables hold it."""

    PEMN = "PEMN"


PEMN = PemnType.PEMN


def register(config_class: type, model_class: type) -> None:
    """Enter the method into PEFT's tables.

    Args:
        config_class: The configuration.
        model_class: The tuner.
    """
    if PEMN in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    try:
        register_peft_method(
            name="pemn", config_cls=config_class, model_cls=model_class, prefix=PREFIX
        )
    except ValueError:  # not a member of PeftType: no door for outsiders yet
        key = cast("Any", PEMN)
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = config_class
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = model_class
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = PREFIX
