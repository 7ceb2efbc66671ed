"""Try the whole library on a GPU: ``python -m tests.gpu --json gpu.json``, in at most 8 minutes.

Needs what the library needs, and no download. Every door (``doors.py``) is tried, whatever another
one did, and reported by itself; then training is timed beside dense training with CUDA events
(`tests.bench.training`), and a recipe's arms together beside one after the other (``arms.py``).
With ``--device cpu`` it is a dry run.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pemn_surgery.kernels import library
from pemn_surgery.report.machine import environment
from tests.bench import training
from tests.gpu import arms, doors


def main() -> int:
    given = _parse()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --device cpu is a dry run of everything else.")
        return 2
    started = time.monotonic()
    doors.quiet()
    result: dict[str, Any] = {
        "command": " ".join(["python -m tests.gpu", *sys.argv[1:]]),
        "environment": environment("numpy"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "kernels": library.describe(),
        "doors": {},
        "ratios": [],
        "arms": [],
    }
    for door in doors.DOORS:
        if given.only in door.__name__:
            result["doors"][door.__name__] = found = _try(door, device)
            print(f"{found['outcome']:8} {door.__name__:18} {found['seconds']:7.1f} s", flush=True)
            _write(given.json, result)
    for kind, row, measure in _measurements(given.rounds, device):
        left = given.minutes * 60 - (time.monotonic() - started)
        if not given.without_ratios and left > 0:
            measured = measure()
            result[kind].append(measured)
            print(row, {way: r["of_medians"] for way, r in measured["ratio"].items()}, flush=True)
            _write(given.json, result)
    result["seconds"] = round(time.monotonic() - started, 1)
    _write(given.json, result)
    wrong = [name for name, found in result["doors"].items() if found["outcome"] == "wrong"]
    print(f"{len(wrong)} of {len(result['doors'])} doors are wrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


def _measurements(
    rounds: int, device: torch.device
) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """What is timed: the list of the result, what it is called, what measures it."""
    for row in training.ROWS:
        bf16 = device.type == "cuda"
        yield "ratios", row, partial(training.measure, row, bf16, rounds, device)
    for case, count in arms.ROWS:
        yield "arms", f"{count} arms of {case}", partial(arms.measure, case, count, rounds, device)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.gpu --json docs/results/gpu.json",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu for a dry run")
    parser.add_argument("--only", default="", help="doors with this in their name")
    parser.add_argument("--without-ratios", action="store_true", help="time no training")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each way")
    parser.add_argument("--minutes", type=float, default=7, help="begin no measurement after these")
    parser.add_argument("--json", type=Path, help="write the result here, after each door")
    return parser.parse_args()


def _try(door: Any, device: torch.device) -> dict[str, Any]:
    """What came of a door; what it raised is kept, and the others go on."""
    started = time.monotonic()
    found: dict[str, Any]
    try:
        found = {"outcome": "right", **door(device)}
    except doors.Missing as missing:
        found = {"outcome": "missing", "needs": str(missing)}
    except Exception as error:  # whatever breaks is what this command is for
        last = traceback.format_exc(limit=-6)
        found = {"outcome": "wrong", "error": f"{type(error).__name__}: {error}", "where": last}
        print(last, flush=True)
    return found | {"seconds": round(time.monotonic() - started, 2)}


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
