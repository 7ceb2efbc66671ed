"""Settings of every test."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("here", deadline=None, max_examples=40, print_blob=True)
settings.load_profile("here")


def pytest_configure():
    """Fixtures of a module are made before those of a test: they too get one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are fastest, and sums the same everywhere, in one thread."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
