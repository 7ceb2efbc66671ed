"""Many walks, each in a process of its own, with limits; results go to a file line by line."""

import contextlib
import json
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from pemn_surgery.report.machine import environment

GIB = 2**30

LIBRARIES = ("timm", "transformers")
CheckOne = Callable[[str, str, float], dict[str, Any]]  # library, name, GiB -> its row


def names(library: str) -> list[str]:
    """Return every model of a library."""
    from tests.zoo import timm_models, transformers_models

    return timm_models.names() if library == "timm" else transformers_models.model_types()


def build(library: str, name: str) -> tuple[Any, str]:
    """Return a model with random weights, and how it was made smaller."""
    from tests.zoo import timm_models, transformers_models

    if library == "timm":
        return timm_models.build(name)
    return transformers_models.build(name), "tiny"


def walk_one(library: str, name: str, memory: float) -> dict[str, Any]:
    """Build one model and walk it, in this process, within a limit of memory (GiB)."""
    import torch

    from pemn_surgery.models.inputs.examples import example_inputs
    from tests.zoo.walk import Walk, walk

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit_memory(memory)
    result, smaller, kind = Walk(failed="build"), "", ""
    try:
        model, smaller = build(library, name)
        kind = type(model).__name__
        result.failed = "inputs"
        inputs = example_inputs(model, batch=1 if library == "timm" else 2)
        with tempfile.TemporaryDirectory() as folder:
            result = walk(model, inputs, Path(folder))
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"[:500]
    if "can't allocate memory" in result.error:
        result.error = f"needs more memory than the limit ({memory:.0f} GiB)"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "library": library,
        "name": name,
        "class": kind,
        "smaller": smaller,
        **result.as_dict(),
        "peak_bytes": peak,
    }


def limit_memory(memory: float) -> None:
    """Let this process have so many GiB; what asks for more fails."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * GIB), int(memory * GIB)))


def walk_many(
    models: Iterable[tuple[str, str]],
    jobs: int,
    timeout: float,
    memory: float,
    check_one: CheckOne = walk_one,
) -> Iterator[dict[str, Any]]:
    """Walk models in processes of their own; yield results as they come."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.zoo.preload"])
    with ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(_in_process, context, check_one, library, name, timeout, memory)
            for library, name in models
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _in_process(
    context: Any, check_one: CheckOne, library: str, name: str, timeout: float, memory: float
) -> dict[str, Any]:
    receiver, sender = context.Pipe(duplex=False)
    words = (sender, check_one, library, name, memory)
    process = context.Process(target=_child, args=words, daemon=True)
    start = time.monotonic()
    process.start()
    sender.close()
    result = None
    if receiver.poll(timeout):
        with contextlib.suppress(EOFError):
            result = receiver.recv()
    process.join(0 if result is None else 10)
    process.kill()
    process.join()
    if result is not None:
        return result
    seconds = time.monotonic() - start
    why = "time" if seconds >= timeout else "memory, or crashed"
    limit = f"{timeout:.0f} s" if why == "time" else f"{memory:.0f} GiB"
    error = f"killed after {seconds:.0f} s: more {why} than the limit ({limit})"
    return {"library": library, "name": name, "failed": "limits", "error": error}


def _child(sender: Any, check_one: CheckOne, library: str, name: str, memory: float) -> None:
    sender.send(check_one(library, name, memory))


def environment_of(path: Path) -> dict[str, Any]:
    """Return what the last walk of a results file ran on; what runs now, if it does not say."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [row["environment"] for line in lines if "environment" in (row := json.loads(line))]
    return found[-1] if found else environment()


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results of a file by library and name; the last one of each counts."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [{"failed": "", **json.loads(line)} for line in lines if line.strip()]
    return {(row["library"], row["name"]): row for row in rows if "library" in row}
