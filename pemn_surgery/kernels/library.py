"""The compiled kernels, where there are any: found, loaded, and called with tensors.

``kernels.c`` is a plain shared library, built when the package is installed where a C compiler is
at hand. Without it, or with ``PEMN_KERNELS=python`` in the environment, `twin` does the same work
in numpy and torch: the same masks and the same numbers, in more passes over memory.
"""

import ctypes
import functools
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pemn_surgery.transforms import is_transformed

# Instruction sets in the order of level() in kernels.c.
_SETS = ("base", "avx2", "avx512")

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PACKED = 3

_INT, _FLOAT, _ANY = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Choice(ctypes.Structure):
    """Which scores are kept, as kernels.c reads it (``choice``)."""

    _fields_ = (
        ("scores", _ANY),
        ("kind", _INT),
        ("by_size", _INT),
        ("cut", _INT),
        ("place", _INT),
        ("above", _FLOAT),
    )


class Numbers(ctypes.Structure):
    """A weight, or the period of one that repeats, as kernels.c reads it (``numbers``)."""

    _fields_ = (("data", _ANY), ("kind", _INT), ("period", _INT))


def choice_of_bits(packed: Tensor) -> Choice:
    """Return a mask of one bit a weight as kernels.c reads it; the tensor must outlive the call."""
    return Choice(packed.data_ptr(), _PACKED, False, -1, 0, 0.0)


_CHOICE, _NUMBERS = ctypes.POINTER(Choice), ctypes.POINTER(Numbers)

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "choose": (None, (_CHOICE, _INT, _INT, _INT)),
    "mark": (_INT, (_CHOICE, _INT, _INT, _ANY)),
    "product": (None, (_CHOICE, _NUMBERS, _INT, _INT, _FLOAT, _INT, _ANY, _INT)),
    "grad": (
        None,
        (_NUMBERS, _NUMBERS, _ANY, *(_INT,) * 4, _FLOAT, _FLOAT, _INT, _ANY),
    ),
    "kept_sum": (ctypes.c_double, (_NUMBERS, _NUMBERS, _ANY, _INT, _INT)),
    "dot_rows": (None, (_ANY, _ANY, _INT, _ANY, *(_INT,) * 4, _ANY)),
    "look_up": (_INT, (_ANY, _ANY, _ANY, *(_INT,) * 6, _ANY)),
}


class Kernels:
    """The functions of the library for one instruction set.

    Attributes:
        instructions: Name of the set.
    """

    choose: Any
    mark: Any
    product: Any
    grad: Any
    kept_sum: Any
    dot_rows: Any
    look_up: Any

    def __init__(self, library: ctypes.CDLL, instructions: str) -> None:
        self.instructions = instructions
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"{name}_{instructions}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


def all_kernels() -> list[Kernels]:
    """Return the kernels of every instruction set that this processor has, the best one last."""
    library = _open()
    if library is None:
        return []
    library.level.restype = _INT
    try:
        return [Kernels(library, name) for name in _SETS[: library.level() + 1]]
    except AttributeError:  # it was built from another version of this package
        return []


@functools.cache
def kernels() -> Kernels | None:
    """Return the best kernels for this processor, or None where the twin serves."""
    if os.environ.get("PEMN_KERNELS") == "python":
        return None
    found = all_kernels()
    return found[-1] if found else None


def describe() -> str:
    """Return which kernels are in use, for people."""
    found = kernels()
    return "numpy and torch" if found is None else f"compiled, {found.instructions}"


def can_read(*tensors: Tensor) -> bool:
    """Tell whether compiled code may read tensors: plain ones in memory, while nobody records."""
    return is_in_memory(*tensors) and all(tensor.dtype in _KINDS for tensor in tensors)


def is_in_memory(*tensors: Tensor) -> bool:
    """Tell whether tensors of any type are plain rows of numbers, while nobody records."""
    if is_transformed() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        for tensor in tensors
    )


def kind(tensor: Tensor) -> int:
    """Return the number that kernels.c gives a tensor's type."""
    return _KINDS[tensor.dtype]


def numbers(tensor: Tensor) -> Numbers:
    """Return a tensor as kernels.c reads it; it must outlive the call."""
    return Numbers(tensor.data_ptr(), _KINDS[tensor.dtype], tensor.numel())


def _open() -> ctypes.CDLL | None:
    """Load the library from beside this file; None where it was not built, or cannot be loaded."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None
    return None
