"""Finding and loading the compiled kernels, and doing without them."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pemn_surgery.kernels import library
from tests.adapters import models
from tests.kernels.ways import COMPILED, every_compiled

SAY = "from pemn_surgery.kernels import library; print(library.describe())"


def test_the_environment_chooses_numpy(monkeypatch):
    monkeypatch.setenv("PEMN_KERNELS", "python")
    assert models.run_python(SAY).strip() == "numpy and torch"


@every_compiled
def test_the_best_instructions_are_used(way):
    best = list(COMPILED)[-1]
    assert list(COMPILED) == ["base", "avx2", "avx512"][: len(COMPILED)]
    assert models.run_python(SAY).strip() == f"compiled, {best}"


def test_a_file_that_cannot_be_loaded_is_as_none(tmp_path, monkeypatch):
    (tmp_path / f"_kernels{library.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library.all_kernels() == []


def test_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.kernels.cache_clear()
    try:
        assert library.kernels() is None
        assert library.describe() == "numpy and torch"
    finally:
        library.kernels.cache_clear()


def test_what_can_be_read():
    assert library.can_read(torch.ones(3), torch.nn.Parameter(torch.ones(3).half()))
    for other in (torch.ones(2, 3).t(), torch.ones(3).int(), torch.ones(3, device="meta")):
        assert not library.can_read(torch.ones(3), other)
    with FlopCounterMode(display=False):
        assert not library.can_read(torch.ones(3))


BUILD = """
import sys
from setuptools import setup
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temp"]
setup()
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [None, "no-such-compiler"])
def test_the_build(tmp_path, compiler):
    """With a compiler there is a library; without one the build says so and goes on."""
    if compiler is None and shutil.which("cc") is None:
        pytest.skip("no C compiler is here")
    pytest.importorskip("setuptools", minversion="77")
    for item in ("pemn_surgery", "adapters", "pyproject.toml", "README.md", "LICENSE"):
        source = models.ROOT / item
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / item, **({"symlinks": True} if source.is_dir() else {}))
    env = os.environ | ({"CC": compiler, "LDSHARED": compiler} if compiler else {})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD],
        cwd=tmp_path, env=env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    built = list((tmp_path / "out").rglob("_kernels*"))
    assert len(built) == (compiler is None)
    assert ("_kernels" in done.stderr + done.stdout) == (compiler is not None)
