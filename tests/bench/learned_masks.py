"""Size of learned masks with coding="base" and "context", beside "entropy" and independent bits.

Reads adapters (``adapter_model.safetensors`` with masks of any coding but "base") and, beside each
adapter's folder, ``base.safetensors``, which has their weights. Nothing is drawn: these masks have
no guides but the weights, as those of pretrained models with the selector "threshold" do not.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

from pemn_surgery.adapters.files.contents import parameter_name
from pemn_surgery.coding import bits, codec
from pemn_surgery.coding.context import Guide
from pemn_surgery.coding.header import HEADER_BYTES, inspect
from pemn_surgery.numbers.sizes import base_sizes
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table
from tests.bench.coding import entropy_of, timed

CODINGS = ("entropy", "context", "base")


def guided(coding: str, weight: torch.Tensor) -> tuple[list[Any] | None, tuple[int, ...]]:
    """Return guides and kernel for a coding."""
    words = weight.to(torch.bfloat16).flatten().view(torch.int16).numpy().view(np.uint16)
    guides = [Guide(base_sizes(words), 5)] if coding == "base" else []
    return (None if coding == "entropy" else guides), tuple(weight.shape[2:])


def measure(file: Path) -> dict[str, Any]:
    """Return bytes of one adapter's masks; payloads count all that stands behind the headers."""
    found = {"weights": 0, "masks": 0, "bound": 0.0}
    found |= {key: 0 for name in CODINGS for key in (name, f"{name}_payload", f"by_{name}")}
    seconds = {f"{verb}_{name}": 0.0 for verb in ("encode", "decode") for name in CODINGS}
    of_weights = load_file(file.parent.parent / "base.safetensors")
    for key, stored in load_file(file).items():
        if not key.endswith(".pemn_masks.bits"):
            continue
        plain, weight = codec.decode(stored, key), of_weights[parameter_name(key)]
        mask = bits.unpack(plain, (inspect(plain, key).weights,))
        found["masks"] += 1
        found["weights"] += mask.numel()
        found["bound"] += mask.numel() * entropy_of(float(mask.double().mean())) / 8
        for name in CODINGS:
            guides, kernel = guided(name, weight)
            took, coded = timed(partial(codec.encode, plain, guides, kernel))
            seconds[f"encode_{name}"] += took
            known = guides[-1].sizes if guides else None
            took, again = timed(partial(codec.decode, coded, key, lambda known=known: known))
            seconds[f"decode_{name}"] += took
            if not torch.equal(again, plain):
                message = f"{file}: {key} is not decoded as it was"
                raise SystemExit(message)
            used = inspect(coded, key).coding
            found[f"by_{name}"] += used == name
            found[name] += coded.numel()
            found[f"{name}_payload"] += coded.numel() - HEADER_BYTES
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
    keys = (*(f"{name}_payload" for name in CODINGS), *CODINGS)
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
