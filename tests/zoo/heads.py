"""Every head of every model type of transformers: does it run on its example inputs?"""

import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.zoo import run

LIBRARY = "transformers"


def tasks() -> dict[str, list[str]]:
    """Return what every head is for, by "type/class", in a fixed order."""
    from tests.zoo import transformers_models

    return {"/".join(key): found for key, found in transformers_models.heads().items()}


def check_many(names: Iterable[tuple[str, str]], *limits: Any) -> Iterator[dict[str, Any]]:
    """Check heads in processes of their own; yield results as they come."""
    known = tasks()
    for row in run.walk_many(names, *limits, check_one=check_one):
        yield {**row, "tasks": known[row["name"]]}


def check_one(library: str, name: str, memory: float) -> dict[str, Any]:
    """Build a head tiny, make its example inputs, run and plan it, in this process.

    Returns:
        What was found; "failed" is the first of build, inputs, forward and plan that failed, or "".
    """
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run.limit_memory(memory)
    model_type, class_name = name.split("/")
    row: dict[str, Any] = {"library": library, "name": name, "failed": "build"}
    start = time.monotonic()
    try:
        for step in _steps(model_type, class_name, row):
            row["failed"] = step
        row["failed"] = ""
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:400]
        row["where"] = _where(error)
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def _steps(model_type: str, class_name: str, row: dict[str, Any]) -> Iterator[str]:
    """Yield each step's name, then take it."""
    import torch

    from pemn_surgery import plan
    from pemn_surgery.models.inputs.examples import example_inputs
    from tests.zoo import transformers_models
    from tests.zoo.walk import OPTIONS, check, outputs

    yield "build"
    model = transformers_models.build(model_type, class_name)
    yield "inputs"
    inputs = example_inputs(model)
    row["inputs"] = {
        key: list(value.shape) for key, value in inputs.items() if isinstance(value, torch.Tensor)
    }
    yield "forward"
    check(bool(outputs(model, inputs)), "the model returns no floats")
    yield "plan"
    planned = plan(model, **OPTIONS)
    check(not planned.untraced, f"uses not seen: {planned.untraced}")
    row["coverage"] = round(planned.coverage, 4)


def _where(error: BaseException) -> str:
    """Return the innermost lines of transformers that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/torch/" not in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[-1:-4:-1])
