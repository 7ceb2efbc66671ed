"""A ``Trainer``'s checkpoints hold scores: a run that goes on from bits is another run.

A checkpoint and a final save are the same call of ``save_pretrained``, and only the Trainer knows
which it is. So the method that writes its checkpoints is wrapped (`doors`); within it scores are
kept, whatever module the adapters are in and whichever callbacks there are.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pemn_surgery.adapters.config import PemnConfig

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


def with_scores(write: Callable[..., Any]) -> Callable[..., Any]:
    """Let what is written hold scores."""

    @functools.wraps(write)
    def _save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with keeping_scores():
            return write(*args, **kwargs)

    return _save_checkpoint
