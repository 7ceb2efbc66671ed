"""The method's name, and the prefix of its tensors, as PEFT's tables hold them (`doors`).

PEFT 0.21 has no entry point for methods from outside: ``register_peft_method`` takes only members
of its own enum. So the tables that it would fill are filled by us, keyed by a string enum of our
own (``get_model_status`` and transformers read ``.value``).
"""

from enum import Enum

PREFIX = "pemn_"


class PemnType(str, Enum):
    """The method's name as PEFT's tables hold it."""

    PEMN = "PEMN"


PEMN = PemnType.PEMN
