"""What several commands share: their parsers' form, reading adapters, building models."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pemn_surgery.errors import AdapterFileError, ConfigError


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_text: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: The subparsers.
        name: The word behind ``pemn``.
        run: From the parsed arguments to the exit code.
        help_text: What it does, in a sentence.
        example: A whole command line.

    Returns:
        Its parser, for its arguments.
    """
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `build_model` takes."""
    parser.add_argument("model", help="a timm name, or a folder with a transformers config.json")
    parser.add_argument(
        "--model-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of timm.create_model, for example num_classes=10",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def positive(text: str) -> int:
    """Return an argument as a number of at least 1."""
    value = int(text)
    if value < 1:
        message = f"{value} given; at least 1 is needed"
        raise argparse.ArgumentTypeError(message)
    return value


def print_json(value: Any, default: Any = None) -> None:
    """Print a value as JSON; ``default`` as of `json.dumps`."""
    sys.stdout.write(json.dumps(value, indent=2, default=default) + "\n")


def read_adapter(folder: Path) -> tuple[Any, Any]:
    """Return the configuration and the `AdapterFile` of an adapter's folder.

    Raises:
        AdapterFileError: If one of its two files is missing, truncated or altered.
    """
    from pemn_surgery.adapters import PemnConfig

    if not (folder / "adapter_config.json").is_file():
        message = f"{str(folder)!r} has no adapter_config.json; give an adapter's folder."
        raise AdapterFileError(message)
    config = PemnConfig.from_pretrained(str(folder))
    if config.file is None:
        message = (
            f"{str(folder)!r} has no adapter_model.safetensors, so there are no masks to read."
        )
        raise AdapterFileError(message)
    return config, config.file


def build_model(name: str, arguments: Sequence[str], *, weights: bool) -> nn.Module:
    """Build a model by name.

    Args:
        name: A timm name, or a folder with a transformers ``config.json``.
        arguments: ``KEY=VALUE`` for ``timm.create_model``; values are read as JSON where they are.
        weights: Whether a transformers folder's weights are read.

    Returns:
        The model.

    Raises:
        ConfigError: If there is no such model, or an argument is not ``KEY=VALUE``.
    """
    if (Path(name) / "config.json").is_file():
        return _build_transformers(name, weights=weights)
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "none is similar"
        message = (
            f"{name!r} is neither a timm model ({close}) nor a folder with config.json. Give a "
            "name from timm.list_models() or a folder that save_pretrained made."
        )
        raise ConfigError(message)
    given = dict(_key_value(item) for item in arguments)
    try:
        return timm.create_model(name, **given)
    except TypeError as error:
        message = f"timm cannot build {name!r} with {given}: {error}. Change --model-arg."
        raise ConfigError(message) from error


def build_without_weights(name: str, arguments: Sequence[str]) -> nn.Module:
    """Build a model on the meta device; the few that compute while they are built, on the CPU."""
    try:
        with torch.device("meta"):
            return build_model(name, arguments, weights=False)
    except (NotImplementedError, RuntimeError):
        return build_model(name, arguments, weights=False)


def _build_transformers(folder: str, *, weights: bool) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    named = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, named, transformers.AutoModel)
    if weights:
        return model_class.from_pretrained(folder)
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    return build(config)


def _key_value(item: str) -> tuple[str, Any]:
    key, separator, value = item.partition("=")
    if not separator or not key:
        message = f"--model-arg got {item!r}; it needs KEY=VALUE, for example num_classes=10."
        raise ConfigError(message)
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
