"""``pemn merge``."""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from pemn_surgery.commands.common import add_command, add_model, build_model, read_adapter


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "merge",
        _run,
        "Write the dense model that an adapter means.",
        "pemn merge tasks/cifar10 resnet18 --model-arg num_classes=10 --out merged",
    )
    parser.add_argument("adapter", type=Path, help="folder that save_pretrained made")
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dense model")
    parser.add_argument(
        "--format",
        choices=("safetensors", "onnx"),
        default="safetensors",
        help="weights that the model's library loads, or a graph for ONNX runtimes",
    )


def _run(parsed: argparse.Namespace) -> int:
    from peft import PeftModel

    read_adapter(parsed.adapter)
    base = build_model(parsed.model, parsed.model_arg, weights=True)
    merged = PeftModel.from_pretrained(base, str(parsed.adapter)).merge_and_unload()
    parsed.out.mkdir(parents=True, exist_ok=True)
    write = _write_onnx if parsed.format == "onnx" else _write_safetensors
    write(merged, parsed.out)
    Console().print(f"Wrote the merged model to {escape(str(parsed.out))}.")
    return 0


def _write_safetensors(merged: nn.Module, out: Path) -> None:
    from safetensors.torch import save_model

    save = getattr(merged, "save_pretrained", None)
    if save is not None:
        save(str(out))
    else:
        save_model(merged, str(out / "model.safetensors"))


def _write_onnx(merged: nn.Module, out: Path) -> None:
    """Write ``model.onnx`` by torch's exporter, for batches of any size."""
    from pemn_surgery.inputs import example_inputs

    inputs = example_inputs(merged)
    first = {0: torch.export.Dim.AUTO}  # any batch, unless the model fixes it
    shapes = {name: first if value.dim() else None for name, value in inputs.items()}
    options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False}
    torch.onnx.export(merged.eval(), (), str(out / "model.onnx"), kwargs=inputs, **options)
