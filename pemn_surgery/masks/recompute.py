"""Activation checkpointing: the second run of a forward reads what the first one read.

`torch.utils.checkpoint` runs a function again in the backward pass, when another adapter may be
active, or the same one merged. It has no place for what a model looked up, so the two functions
behind it are wrapped (`pemn_surgery.adapters.doors`): the one that prepares a run without
reentrance, and the autograd function of a reentrant one. timm, transformers, accelerate and PEFT
all come to them, however they imported ``checkpoint``.
"""

import functools
from collections.abc import Callable, Generator
from typing import Any

import torch

from pemn_surgery.masks import in_force
from pemn_surgery.masks.kept import apart, one_forward


def recording(
    prepare: Callable[..., Generator[None, None, None]],
) -> Callable[..., Generator[None, None, None]]:
    """Let the function that prepares a run without reentrance record what the first run reads."""

    @functools.wraps(prepare)
    def prepared(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        if torch.compiler.is_compiling():
            return prepare(run, *args, **kwargs)
        call = in_force.Recorded(in_force.current())
        return _around(prepare(_reading(run, call), *args, **kwargs), call)

    return prepared


def _around(
    prepared: Generator[None, None, None], call: in_force.Call
) -> Generator[None, None, None]:
    """Let the first run, which happens while the generator waits, be recorded."""
    next(prepared)
    with in_force.use_in_generator(call), apart():
        yield
    yield from prepared


def recording_reentrant(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the forward of a reentrant run record what it reads."""

    @functools.wraps(forward)
    def recorded(ctx: Any, run: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, _reading(run, in_force.Recorded(in_force.current())), *args)

    return recorded


def _reading(run: Callable[..., Any], call: in_force.Recorded) -> Callable[..., Any]:
    def reading(*args: Any, **kwargs: Any) -> Any:
        with in_force.use(call), call.as_trained(), one_forward(), apart():
            return run(*args, **kwargs)

    return reading
