"""Size of learned masks with coding="context", beside "entropy" and what independent bits allow.

Reads adapters (``adapter_model.safetensors`` with masks of any coding) and, beside each adapter's
folder, ``base.safetensors``, which has the shapes of their weights. Nothing is drawn: these masks
have no guides, as those of pretrained weights with the selector "threshold" do not.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from pemn_surgery import bits
from pemn_surgery.adapters.file import parameter_name
from pemn_surgery.report import environment, table
from tests.bench.coding import entropy_of, timed

HEADERS = {"bits": bits.HEADER_BYTES, "entropy": 36, "context": 37}


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def measure(file: Path) -> dict[str, Any]:
    """Return bytes of one adapter's masks; payloads count all that stands behind the headers."""
    found = {"weights": 0, "masks": 0, "bound": 0.0, "by_context": 0}
    found |= {key: 0 for name in ("entropy", "context") for key in (name, f"{name}_payload")}
    seconds = {"encode": 0.0, "decode": 0.0}
    of_weights = shapes(file.parent.parent / "base.safetensors")
    for key, stored in load_file(file).items():
        if not key.endswith(".pemn_masks.bits"):
            continue
        plain, kernel = bits.decoded(stored, key), of_weights[parameter_name(key)][2:]
        mask = bits.unpack(plain, (bits.inspect(plain, key).weights,))
        found["masks"] += 1
        found["weights"] += mask.numel()
        found["bound"] += mask.numel() * entropy_of(float(mask.double().mean())) / 8
        took, coded = timed(lambda plain=plain, kernel=kernel: bits.coded(plain, (), kernel))
        seconds["encode"] += took
        took, again = timed(lambda coded=coded, key=key: bits.decoded(coded, key))
        seconds["decode"] += took
        if not torch.equal(again, plain):
            message = f"{file}: {key} is not decoded as it was"
            raise SystemExit(message)
        found["by_context"] += bits.inspect(coded, key).coding == "context"
        for name, one in (("entropy", bits.coded(plain)), ("context", coded)):
            found[name] += one.numel()
            found[f"{name}_payload"] += one.numel() - HEADERS[bits.inspect(one, key).coding]
    return found | {"seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.bench.learned_masks WORK"
    )
    parser.add_argument("work", type=Path, help="folder with adapters, at any depth")
    parser.add_argument("--pattern", default="masks_lr*[0-9]/adapter_model.safetensors")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(given.work.rglob(given.pattern))
    if not files:
        message = f"{given.work} has no {given.pattern}"
        raise SystemExit(message)
    rows = [
        {"adapter": str(file.parent.relative_to(given.work)), **measure(file)} for file in files
    ]
    show(rows)
    if given.json:
        command = " ".join(["python -m tests.bench.learned_masks WORK", *sys.argv[2:]])
        result = {"command": command, "environment": environment(), "numpy": np.__version__}
        given.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    keys = ("entropy_payload", "context_payload", "entropy", "context")
    cells = [
        [
            row["adapter"],
            f"{8 * row['bound'] / row['weights']:.3f}",
            f"{math.floor(row['bound']):,}",
            *(f"{row[key] / row['bound']:.4f}" for key in keys),
        ]
        for row in rows
    ]
    columns = ("adapter", "bound, bits a weight", "bound, bytes", *keys)
    Console(width=160).print(table("relative to the bound", columns, cells))


if __name__ == "__main__":
    sys.exit(main())
