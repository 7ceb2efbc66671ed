"""Settings of every test."""

import numpy as np
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


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of the shape of CIFAR-10 on the hub, with 40 + 12 pictures."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("pictures")
    columns = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split, n in (("train", 40), ("test", 12)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        rows = {"img": list(pixels), "label": [i % 10 for i in range(n)]}
        table = datasets.Dataset.from_dict(rows, features=columns)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder
