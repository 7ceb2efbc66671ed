"""Every way that leads to a mask or a product here: each instruction set, and numpy."""

from contextlib import contextmanager

import pytest

from pemn_surgery.kernels import library

COMPILED = {found.instructions: found for found in library.all_kernels()}
WAYS = {"python": None, **COMPILED}

every_way = pytest.mark.parametrize("way", list(WAYS))
every_compiled = pytest.mark.parametrize(
    "way",
    list(COMPILED) or [pytest.param("none", marks=pytest.mark.skip(reason="nothing is compiled"))],
)


@contextmanager
def through(way):
    """Let one way serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "kernels", lambda: WAYS[way])
        yield WAYS[way]
