"""What an adapter's file cannot hold: said or refused before anything changes."""

import warnings

import torch
from torch import nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.errors import PemnWarning, UnsupportedModelError
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.roles import base_modules


def warn_of_extra_state(model: nn.Module, config: PemnConfig) -> None:
    """Say what neither seed nor file brings back: state that modules keep beside their tensors.

    Args:
        model: The model.
        config: What was asked for; on its own weights a model has that state with them.
    """
    if not config.bank_spec.generated or config.file is not None:
        return
    plain = nn.Module.get_extra_state
    keeping = [p for p, m in base_modules(model) if type(m).get_extra_state is not plain]
    if keeping:
        warnings.warn(
            f"{len(keeping)} modules keep state beside their tensors (get_extra_state; first: "
            f"{keeping[0]!r}), which no adapter's file holds: where it is random or trained, seed "
            "and file do not make this model again. A buffer does.",
            PemnWarning,
            stacklevel=2,
        )


def check_can_be_stored(model: nn.Module, plan: Plan) -> None:
    """Refuse tensors of types that safetensors has no name for, before anything changes.

    Args:
        model: The model.
        plan: What the task owns.

    Raises:
        UnsupportedModelError: If there is one.
    """
    modules = dict(base_modules(model))
    for item in (*plan.owned, *plan.whole):
        tensors = modules[item.path]._parameters | modules[item.path]._buffers
        held = tensors.get(item.tensor)
        if held is not None and held.dtype == torch.complex128:
            message = (
                f"{item.name!r} is complex128, which an adapter's file (safetensors) cannot hold; "
                "complex64 it can. Nothing was changed."
            )
            raise UnsupportedModelError(message)
