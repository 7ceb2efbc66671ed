"""What planning and pemnifying cost, beside one forward on meta tensors."""

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from pemn_surgery import pemnify, plan
from pemn_surgery.models.inputs.examples import example_inputs
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit_base_patch16_224": lambda: timm.create_model("vit_base_patch16_224"),
    "resnet50": lambda: timm.create_model("resnet50"),
    "bert-base": lambda: BertModel(BertConfig()),
    "llama 7 B shape, meta": lambda: LlamaForCausalLM(LlamaConfig()),
}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Time a meta forward, planning and pemnifying in turn; medians in seconds."""
    make = MODELS[name]
    with torch.device("meta"):
        bare = make().eval()
    inputs = example_inputs(bare)
    on_meta = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
        if key != "attention_mask"  # transformers reads its values, and there are none on meta
    }
    real = None if "meta" in name else [make().eval() for _ in range(repeats)]
    seconds: dict[str, list[float]] = {"meta_forward": [], "plan": [], "pemnify": []}
    for turn in range(repeats):
        with contextlib.suppress(RuntimeError):  # it asks for values: no forward on meta alone
            seconds["meta_forward"].append(timed(lambda: forward(bare, on_meta)))
        seconds["plan"].append(timed(lambda: plan(bare, bank="rp", ratio=1e-2)))
        if real is not None:
            seconds["pemnify"].append(timed(partial(pemnify, real[turn], bank="rp", ratio=1e-2)))
    made = plan(bare, bank="rp", ratio=1e-2)
    return {
        "model": name,
        "weights": made.masked_weights,
        "untraced": made.untraced,
        **{key: statistics.median(values) for key, values in seconds.items() if values},
        "all": seconds,
    }


def forward(model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**inputs)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m tests.bench.planning --json planning.json"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    forward_once = MODELS["resnet50"]()
    forward(forward_once.eval(), example_inputs(forward_once))  # loads what is loaded lazily
    rows = [measure(name, arguments.repeats) for name in MODELS]
    columns = ("model", "weights", "meta_forward", "plan", "pemnify")
    cells = [
        [
            f"{row[key]:.3f}" if isinstance(row.get(key), float) else str(row.get(key, ""))
            for key in columns
        ]
        for row in rows
    ]
    Console().print(table("seconds, medians", columns, cells))
    if arguments.json:
        result = {"command": " ".join(["python", *sys.argv]), "environment": environment()}
        arguments.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
