"""A ``Trainer``'s checkpoints hold scores: a run that goes on from bits is another run.

A checkpoint and a final save are the same call of ``save_pretrained``, and only the Trainer knows
which it is. So the method that writes its checkpoints gets a wrapper around it, within which scores
are kept, whatever module the adapters are in and whichever callbacks there are.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from pemn_surgery.adapters.config import PemnConfig

TRAINER = "transformers.trainer"
_WRITES = "_save_checkpoint"

_is_checkpoint: ContextVar[bool] = ContextVar("is_checkpoint", default=False)


@contextmanager
def keeping_scores() -> Iterator[None]:
    """Save scores in place of bits for a while."""
    token = _is_checkpoint.set(True)
    try:
        yield
    finally:
        _is_checkpoint.reset(token)


def are_scores_kept(config: PemnConfig) -> bool:
    """Tell whether saving an adapter writes its scores.

    Args:
        config: The adapter's configuration.
    """
    return config.keep_scores or _is_checkpoint.get()


def wrap_trainer() -> None:
    """Let the checkpoints of transformers' ``Trainer``, once it is imported, hold scores."""
    trainer = cast("Any", sys.modules[TRAINER]).Trainer
    setattr(trainer, _WRITES, _with_scores(getattr(trainer, _WRITES)))


def _with_scores(write: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(write)
    def _save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with keeping_scores():
            return write(*args, **kwargs)

    return _save_checkpoint
