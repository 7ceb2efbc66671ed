"""Whether torch transforms or records a computation, rather than just carrying it out.

Under ``torch.func`` tensors stand for many, or carry tangents; a tracer writes down which operations
are run. There no value may be looked at in Python, nothing that was made before may be used again,
and gradients must be those of operations that torch knows.
"""

import torch
from torch.autograd import forward_ad

_C = torch._C


def is_transformed() -> bool:
    """Tell whether the operations that run now are transformed or recorded.

    True under ``torch.compile`` and ``torch.export``, within transforms of ``torch.func``, within a
    level of forward-mode gradients, under ``torch.jit.trace`` and ``make_fx``, and with fake tensors.
    """
    return (
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _C._get_tracing_state() is not None
        or any(_C._get_dispatch_mode(mode) is not None for mode in _RECORDING)
    )


# Modes of torch's own tracers. Others, which only count or cache (FLOPs, selective checkpointing),
# shall see what runs without them.
_RECORDING = (
    _C._TorchDispatchModeKey.PROXY,
    _C._TorchDispatchModeKey.FAKE,
    _C._TorchDispatchModeKey.FUNCTIONAL,
)
