"""What an adapter's file cannot hold: said or refused before anything changes."""

import warnings

import torch
from torch import Tensor, nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.quantised import resolve_backend
from pemn_surgery.errors import PemnWarning, UnsupportedModelError
from pemn_surgery.planning.plan import Plan
from pemn_surgery.planning.roles import base_modules


def warn_of_extra_state(model: nn.Module, config: PemnConfig) -> None:
    """Say what neither seed nor file brings back: state that modules keep beside their tensors.

    Args:
        model: The model.
        config: What was asked for; on its own weights a model has that state with them.
    """
    if not config.bank_spec.generated or config.origin.file is not None:
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


def check_is_plain(name: str, tensor: Tensor) -> None:
    """Refuse to save a tensor whose numbers a library stores its own way (torchao).

    Args:
        name: Its name.
        tensor: The tensor, whole.

    Raises:
        UnsupportedModelError: If it is one.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        message = (
            f"{name!r} is a {type(tensor).__name__}, which an adapter's file (safetensors) cannot "
            "hold: it was quantised after the adapter was made. Save before that, or merge first, "
            "model.merge_and_unload(), and quantise the plain model. Nothing was saved."
        )
        raise UnsupportedModelError(message)


def check_can_be_stored(model: nn.Module, plan: Plan) -> None:
    """Refuse tensors that a file cannot hold, before anything changes.

    safetensors has no name for complex128; of quantised numbers it would hold those without their
    scales (bitsandbytes), or none (torchao).

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
        backend = resolve_backend(modules[item.path]) if item.tensor == "weight" else None
        if backend is not None:
            message = (
                f"{item.name!r} is stored as {backend.backend_name} (quantised) and would be the "
                "task's, but no adapter's file can hold it. On a model's own weights rest="
                '"stats" or "norms" leaves it to the base; drawn numbers need a base that is not '
                "quantised. Nothing was changed."
            )
            raise UnsupportedModelError(message)
        if held is not None and held.dtype == torch.complex128:
            message = (
                f"{item.name!r} is complex128, which an adapter's file (safetensors) cannot hold; "
                "complex64 it can. Nothing was changed."
            )
            raise UnsupportedModelError(message)
