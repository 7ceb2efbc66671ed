"""Activation checkpointing: the second run of a forward reads what the first one read.

`torch.utils.checkpoint` runs a function again in the backward pass, when another adapter may be
active, or the same one merged. It has no place for what a model looked up, so the two functions
behind it are wrapped: the one that prepares a run without reentrance, and the autograd function of
a reentrant one. timm, transformers, accelerate and PEFT all come to them, however they imported
``checkpoint``.
"""

import functools
import warnings
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch.utils import checkpoint

from pemn_surgery.errors import PemnWarning
from pemn_surgery.masks import in_force
from pemn_surgery.masks.kept import one_forward

# The first of them that torch has; older releases have the second alone.
_PREPARING = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)


def wrap_checkpoints() -> None:
    """Let functions under activation checkpointing read the same in both runs."""
    module = cast("Any", checkpoint)
    reentrant = module.CheckpointFunction
    reentrant.forward = staticmethod(_recording_reentrant(reentrant.forward))
    name = next((name for name in _PREPARING if hasattr(module, name)), None)
    if name is None:
        message = (
            f"torch {torch.__version__} prepares activation checkpoints in a function that is not "
            "known here: switch no adapter between a forward under them and its backward pass."
        )
        warnings.warn(message, PemnWarning, stacklevel=2)
        return
    setattr(module, name, _recording(getattr(module, name)))


def _recording(
    prepare: Callable[..., Generator[None, None, None]],
) -> Callable[..., Generator[None, None, None]]:
    @functools.wraps(prepare)
    def recording(
        run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Generator[None, None, None]:
        if torch.compiler.is_compiling():
            return prepare(run, *args, **kwargs)
        call = in_force.Recorded(in_force.current())
        return _around(prepare(_reading(run, call), *args, **kwargs), call)

    return recording


def _around(
    prepared: Generator[None, None, None], call: in_force.Call
) -> Generator[None, None, None]:
    """Let the first run, which happens while the generator waits, be recorded."""
    next(prepared)
    with in_force.use_in_generator(call):
        yield
    yield from prepared


def _recording_reentrant(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recording(ctx: Any, run: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, _reading(run, in_force.Recorded(in_force.current())), *args)

    return recording


def _reading(run: Callable[..., Any], call: in_force.Recorded) -> Callable[..., Any]:
    def reading(*args: Any, **kwargs: Any) -> Any:
        with in_force.use(call), call.as_trained(), one_forward():
            return run(*args, **kwargs)

    return reading
