"""Runs a worker module as several processes that meet in one folder."""

import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from filelock import FileLock

from tests.adapters import models


def run_once(tmp_path_factory, worker, count, timeout):
    """Run ``python -m WORKER RANK FOLDER`` for every rank, once for all workers of pytest-xdist.

    Args:
        tmp_path_factory: pytest's.
        worker: Name of the module.
        count: Number of processes.
        timeout: Seconds for all of them together.

    Returns:
        The folder with what they left; the test fails with their output if one of them fails.
    """
    root = tmp_path_factory.getbasetemp()
    place = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / worker
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.mkdir()
            (place / "failure").write_text(_run(place, worker, count, timeout))
    failure = (place / "failure").read_text()
    if failure:
        pytest.fail(failure, pytrace=False)
    return place


def leave():
    """End a worker that has done all it should, without the interpreter's own ending.

    What still holds a process group then may abort the process: gloo's threads are joined by
    nobody (pytorch/pytorch#179291, #190489).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run(folder, worker, count, timeout):
    """Run the workers to their end; return the output of all if one fails or hangs, else ""."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(count)]
    started = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", worker, str(rank), str(folder)]
        with log.open("wb") as output:
            started.append(
                subprocess.Popen(
                    command, cwd=models.ROOT, env=environment, stdout=output, stderr=output
                )
            )
    ends = [_end(code, timeout) for code in _wait(started, timeout)]
    if set(ends) == {"succeeded"}:
        return ""
    return "\n".join(f"--- process {i} {ends[i]}\n{logs[i].read_text()}" for i in range(count))


def _end(code, timeout):
    if code is None:
        return f"stopped: still running after {timeout} s or another's failure"
    return f"exit code {code}" if code else "succeeded"


def _wait(started, timeout):
    """Exit codes once all have succeeded, one has failed or the time is over; none stays alive."""
    end = time.monotonic() + timeout
    codes = [None]
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.05)
        codes = [process.poll() for process in started]
    for process in started:
        process.kill()
        process.wait()
    return codes
