"""The ``pemn`` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from pemn_surgery import __version__, report
from pemn_surgery.errors import AdapterFileError, ConfigError, PemnError

_FAILED = 2
_INTERRUPTED = 130

_OPTIONS = ("bank", "ratio", "length", "bank_init", "seed", "selector", "density", "rest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words behind ``pemn``; None takes the process's.

    Returns:
        0, 1 if a verification failed, 2 after an error that is named, 130 after Ctrl-C.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (PemnError, ImportError, OSError) as error:
        Console(stderr=True).print(
            f"[bold red]{type(error).__name__}[/]: {escape(str(error))}",
            highlight=False,
            soft_wrap=True,
        )
        return _FAILED
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pemn", description="Binary masks on shared frozen weights, for timm and transformers."
    )
    parser.add_argument("--version", action="version", version=f"pemn-surgery {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_quickstart(commands)
    _add_plan(commands)
    _add_inspect(commands)
    _add_merge(commands)
    return parser


def _command(commands: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_quickstart(commands: Any) -> None:
    parser = _command(
        commands,
        "quickstart",
        "Train two tasks on one shared random vector, beside dense and LoRA; needs no download.",
        "pemn quickstart --out quickstart",
    )
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for results")
    parser.add_argument("--epochs", type=_positive, default=6, help="epochs of each training")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, bank and batches")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_quickstart)


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        "Say what would happen to every weight of a model, and why; touches nothing.",
        "pemn plan vit_base_patch16_224 --bank rp --ratio 0.01",
    )
    _add_model(parser)
    parser.add_argument("--bank", choices=("mp", "rp", "one_layer", "own"), default="mp")
    parser.add_argument("--ratio", type=float, help="rp: share of the largest layer")
    parser.add_argument("--length", type=int, help="rp: length of the vector")
    parser.add_argument(
        "--bank-init", help="kaiming_normal, kaiming_uniform, signed_constant, model"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--selector", choices=("topk", "threshold"), default="topk")
    parser.add_argument("--density", type=float, default=0.5, help="topk: share of ones")
    parser.add_argument("--rest", choices=("train", "norms", "stats", "freeze"))
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=_plan)


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "Show an adapter: its configuration, the density of every mask, its bytes.",
        "pemn inspect quickstart/masks/digit",
    )
    parser.add_argument("adapter", type=Path, help="folder that save_pretrained made")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_inspect)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        "Write the dense model that an adapter means.",
        "pemn merge tasks/cifar10 resnet18 --model-arg num_classes=10 --out merged",
    )
    parser.add_argument("adapter", type=Path, help="folder that save_pretrained made")
    _add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dense model")
    parser.set_defaults(run=_merge)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a timm name, or a folder with a transformers config.json")
    parser.add_argument(
        "--model-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of timm.create_model, for example num_classes=10",
    )


def _quickstart(parsed: argparse.Namespace) -> int:
    from pemn_surgery import quickstart

    with quickstart.new_progress() as progress:
        result = quickstart.run(parsed.out, parsed.epochs, parsed.seed, progress)
    if parsed.json:
        _print_json(result)
    else:
        console = Console()
        console.print(quickstart.table(result))
        done = result["verified_in_new_process"]
        found = "equal bit for bit" if done else "NOT EQUAL"
        console.print(f"Both mask adapters reloaded in a new process: logits {found}.")
        console.print(
            f"Adapters, results.json and quickstart.png are in {escape(str(parsed.out))}."
        )
    return 0 if result["verified_in_new_process"] else 1


def _plan(parsed: argparse.Namespace) -> int:
    from pemn_surgery.adapters import plan

    model = _build_without_weights(parsed.model, parsed.model_arg)
    given = {name: getattr(parsed, name) for name in _OPTIONS if getattr(parsed, name) is not None}
    result = plan(model, **given)
    if parsed.json:
        _print_json(result.as_dict())
    else:
        sys.stdout.write(str(result))
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    config, file = _read_adapter(parsed.adapter)
    masks = [
        {
            "name": name,
            "weights": weights,
            "density": _share(file.ones.get(name), weights),
            "coding": file.stored[name].coding if name in file.stored else "scores",
        }
        for name, weights in file.masks.items()
    ]
    if parsed.json:
        settings = config.to_dict()
        _print_json({"config": settings, "bytes": file.nbytes, "masks": masks}, default=sorted)
        return 0
    columns = ("weight", "weights", "density", "coding")
    rows = [
        (mask["name"], f"{mask['weights']:,}", _shown_share(mask["density"]), mask["coding"])
        for mask in masks
    ]
    shown = report.table(escape(str(parsed.adapter)), columns, rows)
    total = sum(file.masks.values())
    shown.caption = (
        f"bank {config.bank}, {config.bank_init}, seed {config.seed}; {len(masks)} masks of "
        f"{total:,} weights, {len(file.others)} other tensors, {file.nbytes:,} bytes; "
        f"fingerprint {_shown(config.fingerprint)}"
    )
    Console().print(shown)
    return 0


def _merge(parsed: argparse.Namespace) -> int:
    from peft import PeftModel
    from safetensors.torch import save_model

    _read_adapter(parsed.adapter)
    base = build_model(parsed.model, parsed.model_arg, weights=True)
    merged = PeftModel.from_pretrained(base, str(parsed.adapter)).merge_and_unload()
    parsed.out.mkdir(parents=True, exist_ok=True)
    save = getattr(merged, "save_pretrained", None)
    if save is not None:
        save(str(parsed.out))
    else:
        save_model(merged, str(parsed.out / "model.safetensors"))
    Console().print(f"Wrote the merged model to {escape(str(parsed.out))}.")
    return 0


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


def _build_without_weights(name: str, arguments: Sequence[str]) -> nn.Module:
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


def _read_adapter(folder: Path) -> tuple[Any, Any]:
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


def _key_value(item: str) -> tuple[str, Any]:
    key, separator, value = item.partition("=")
    if not separator or not key:
        message = f"--model-arg got {item!r}; it needs KEY=VALUE, for example num_classes=10."
        raise ConfigError(message)
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"{value} given; at least 1 is needed"
        raise argparse.ArgumentTypeError(message)
    return value


def _share(ones: int | None, weights: int) -> float | None:
    """Return the density; None where the file holds float scores."""
    return None if ones is None else ones / max(weights, 1)


def _shown_share(share: float | None) -> str:
    return "scores" if share is None else f"{share:.4f}"


def _shown(fingerprint: dict[str, str] | None) -> str:
    return next(iter(fingerprint.values())) if fingerprint else "unknown"


def _print_json(value: Any, default: Any = None) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=default) + "\n")


if __name__ == "__main__":
    sys.exit(main())
