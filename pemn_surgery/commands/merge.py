"""``pemn merge``."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn

from pemn_surgery.commands import gguf_export, onnx_export
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
from pemn_surgery.masks.masked_weight import MaskedWeight

_WRITTEN = {
    "safetensors": ("config.json", "model.safetensors", "model.safetensors.index.json"),
    "onnx": (onnx_export.GRAPH,),
    "gguf": (gguf_export.FILE,),
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
        help="weights that the model's library loads, a graph for ONNX runtimes, or a file for "
        "llama.cpp",
    )
    parser.add_argument(
        "--input-size",
        type=_size,
        metavar="HEIGHTxWIDTH",
        help="onnx: size of images in pixels, or one number; default: the model's own",
    )
    parser.add_argument(
        "--like", type=Path, metavar="FILE", help="gguf: the base's, by llama.cpp's converter"
    )
    parser.add_argument(
        "--type",
        choices=gguf_export.TYPES,
        help="gguf: of masked weights; default: the smallest that holds each as it is",
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
    model = PeftModel.from_pretrained(base, folder)
    masked = {layer.target for layer in model.modules() if isinstance(layer, MaskedWeight)}
    merged = model.merge_and_unload()
    parsed.out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"out": str(parsed.out), "format": parsed.format}
    if parsed.format == "onnx":
        about |= onnx_export.write_onnx(merged, parsed.out / onnx_export.GRAPH, parsed.input_size)
    elif parsed.format == "gguf":
        path = parsed.out / gguf_export.FILE
        about |= gguf_export.write_gguf(merged, masked, parsed.like, path, parsed.type or "auto")
    else:
        _write_safetensors(merged, parsed.out)
    _say(parsed, about)
    return 0


def _check(parsed: argparse.Namespace) -> None:
    """Refuse what can be seen before anything is read."""
    if parsed.format == "gguf":
        gguf_export.check_can_export()
        if parsed.like is None or not parsed.like.is_file():
            message = (
                f"--format gguf got --like {parsed.like}; it needs the base's GGUF file, which "
            )
            message += "llama.cpp's convert_hf_to_gguf.py writes."
            raise ConfigError(message)
    elif parsed.like is not None or parsed.type is not None:
        message = "--like and --type are for --format gguf. Leave them out."
        raise ConfigError(message)
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
    if "tensors" in about:
        counts = ", ".join(f"{count} {kind}" for kind, count in about["tensors"].items())
        rounding = about["largest_rounding"]
        console.print(f"tensors: {counts}; scales rounded by up to {rounding:.1e}", soft_wrap=True)
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
