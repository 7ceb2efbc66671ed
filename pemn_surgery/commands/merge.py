"""``pemn merge``."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn

from pemn_surgery.commands import onnx_export
from pemn_surgery.commands.building import Wanted, add_model, build_model
from pemn_surgery.commands.common import (
    adapter_folder,
    add_adapter,
    add_command,
    add_json,
    add_overwrite,
    check_free,
    print_json,
    read_adapter,
)
from pemn_surgery.errors import ConfigError

_WRITTEN = {
    "safetensors": ("config.json", "model.safetensors", "model.safetensors.index.json"),
    "onnx": (onnx_export.GRAPH,),
}


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "merge",
        _run,
        "Write the dense model that an adapter means.",
        "pemn merge tasks/cifar10 resnet18 --model-arg num_classes=10 --out merged",
    )
    add_adapter(parser)
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dense model")
    parser.add_argument(
        "--format",
        choices=tuple(_WRITTEN),
        default="safetensors",
        help="weights that the model's library loads, or a graph for ONNX runtimes",
    )
    parser.add_argument(
        "--input-size",
        type=_size,
        metavar="HEIGHTxWIDTH",
        help="onnx: size of images in pixels, or one number; default: the model's own",
    )
    add_overwrite(parser)
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from peft import PeftModel

    _check(parsed)
    config, _ = read_adapter(parsed.adapter)
    made_on = (config.auto_mapping or {}).get("base_model_class")
    base = build_model(parsed.model, parsed.model_arg, Wanted(config.task_type, made_on))
    folder = str(adapter_folder(parsed.adapter))
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    parsed.out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"out": str(parsed.out), "format": parsed.format}
    if parsed.format == "onnx":
        about |= onnx_export.write_onnx(merged, parsed.out / onnx_export.GRAPH, parsed.input_size)
    else:
        _write_safetensors(merged, parsed.out)
    _say(parsed, about)
    return 0


def _check(parsed: argparse.Namespace) -> None:
    """Refuse what can be seen before anything is read."""
    if parsed.format == "onnx":
        onnx_export.check_can_export()
    elif parsed.input_size is not None:
        message = "--input-size is for --format onnx; weights have no size of images. Leave it out."
        raise ConfigError(message)
    for given in (parsed.adapter, parsed.model):
        if parsed.out.exists() and parsed.out.resolve() == Path(given).resolve():
            message = f"--out got {given!r}, which is read. Give another folder."
            raise ConfigError(message)
    check_free(parsed.out, _WRITTEN[parsed.format], overwrite=parsed.overwrite)


def _write_safetensors(merged: nn.Module, out: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    save = getattr(merged, "save_pretrained", None)
    try:
        if save is not None:
            save(str(out))
        else:
            save_model(merged, str(out / "model.safetensors"))
    except SafetensorError as error:  # what the disk refuses, in its words
        message = f"{str(out)!r} cannot be written: {error}"
        raise OSError(message) from error


def _say(parsed: argparse.Namespace, about: Mapping[str, Any]) -> None:
    if parsed.json:
        print_json(about)
        return
    console = Console()
    for what in ("inputs", "outputs"):
        for name, shape in about.get(what, {}).items():
            console.print(f"{what[:-1]} {escape(name)}: {escape(str(shape))}", soft_wrap=True)
    console.print(f"Wrote the merged model to {escape(str(parsed.out))}.", soft_wrap=True)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        message = f"{text!r} given; pixels are needed, for example 224 or 224x320"
        raise argparse.ArgumentTypeError(message)
    return int(found[1]), int(found[2] or found[1])
