"""Freed memory stays: page faults of allocations counted in a process of their own."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pemn_surgery.recipe import allocator, runner
from tests.bench import allocator as benchmark

# 64 MiB each, more than glibc ever takes from the heap by default; 16,384 pages of 4 KiB.
COUNT = """
import json, resource, runpy, sys

keep = runpy.run_path(sys.argv[1])["keep_freed_memory"]
kept, counts = "keep" in sys.argv and keep(), []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = bytearray(b"x") * 2**26
    del taken
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, counts]))
"""


def counted(*words):
    command = [sys.executable, "-c", COUNT, allocator.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these settings")
def test_pages_of_freed_memory_are_not_faulted_in_again():
    _, before = counted()
    kept, after = counted("keep")
    if not kept:
        pytest.skip("another C library than glibc")
    assert min(before) > 10_000
    assert after[0] > 10_000  # the first time they must be
    assert max(after[1:]) < 100


@pytest.mark.parametrize(
    ("platform", "library", "kept"),
    [
        ("darwin", None, False),
        ("win32", None, False),
        ("linux", SimpleNamespace(mallopt=lambda *_: 1), False),  # musl: another libc's mallopt
        ("linux", SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda *_: 0), False),
        ("linux", SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda *_: 1), True),
    ],
)
def test_other_c_libraries_are_left_alone(platform, library, kept, monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", platform)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    assert allocator.keep_freed_memory() is kept


def test_the_benchmark_counts_the_steps_behind_the_first_epoch(monkeypatch):
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(benchmark, "BATCH", 4)
    monkeypatch.setattr(benchmark, "EPOCHS", 2)
    found = [benchmark.child(way, steps=1, threads=1) for way in benchmark.WAYS]
    assert [set(one) for one in found] == [{*benchmark.KEYS, "loss"}] * 3
    assert all(len(one["seconds"]) == len(one["faults"]) == 1 for one in found)
    assert len({one["loss"] for one in found}) == 1
