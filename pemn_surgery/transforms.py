"""Whether torch transforms or records a computation, rather than just carrying it out.

Under ``torch.func`` a tensor may stand for many, or carry a tangent; a tracer writes down which
operations run. There no value is looked at in Python, nothing that was made before is used again,
and gradients must be those of operations that torch knows. Nor does a process that holds a part of
a sharded tensor have its values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C: Any = torch._C

# Torch's own recording modes. Others, which only count or cache (FLOPs, selective checkpointing),
# shall see what runs without them.
_RECORDING = (
    _C._TorchDispatchModeKey.PROXY,
    _C._TorchDispatchModeKey.FAKE,
    _C._TorchDispatchModeKey.FUNCTIONAL,
)


def is_transformed() -> bool:
    """Tell whether the operations that run now are transformed or recorded.

    True under ``torch.compile`` and ``torch.export``, within transforms of ``torch.func``, within a
    level of forward-mode gradients, under ``torch.jit.trace`` and ``make_fx``, and with fake
    tensors.
    """
    return (
        _has_no_values()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _C._get_tracing_state() is not None
    )


def takes_functions() -> bool:
    """Tell whether a ``torch.autograd.Function`` without rules for transforms may be used now.

    ``torch.compile`` reads into it, and then keeps less for the backward pass than it would of the
    operations that torch differentiates itself.
    """
    if _C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or not is_transformed()


def count_rows(tensor: Tensor) -> int:
    """Return a tensor's first size (it has one) as a number: ``torch.jit.trace`` notes who asks."""
    if torch.compiler.is_compiling() or _C._get_tracing_state() is None:
        return tensor.shape[0]
    with untransformed():
        return tensor.shape[0]


def can_be_read(tensor: Tensor) -> bool:
    """Tell whether Python may read the values of a tensor that is not on the meta device."""
    return not _has_no_values() and not _C._functorch.is_functorch_wrapped_tensor(tensor)


@contextmanager
def untransformed() -> Iterator[None]:
    """Keep ``torch.func`` and ``torch.jit.trace`` away from what runs inside."""
    state = _C._get_tracing_state()
    _C._set_tracing_state(None)
    try:
        with _C._DisableFuncTorch():
            yield
    finally:
        _C._set_tracing_state(state)


def _has_no_values() -> bool:
    """Tell whether operations are only written down."""
    if torch.compiler.is_compiling():
        return True
    within = _C._len_torch_dispatch_stack() > 0
    return within and any(_C._get_dispatch_mode(mode) is not None for mode in _RECORDING)


def gathered(value: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, for which every process asks, others as they are."""
    gather: Any = getattr(value, "full_tensor", None)
    return gather() if gather is not None else value
