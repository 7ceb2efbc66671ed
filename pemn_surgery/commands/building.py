"""Building a base by name: timm's, a folder, or the hub's; whatever goes wrong is one sentence."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from pemn_surgery.commands.common import HubName, first_line, hub_file, hub_name
from pemn_surgery.errors import ConfigError, PemnError

_TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


class Wanted(NamedTuple):
    """Which class of a configuration is meant: a PEFT task's, or that an adapter was made on."""

    task_type: str | None = None
    class_name: str | None = None


class Source(NamedTuple):
    """A library, "timm" or "transformers", its name of a model, and a revision on the hub."""

    library: str
    name: str
    revision: str | None = None


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `build_model` takes."""
    parser.add_argument(
        "model",
        help="a timm name; a folder with config.json; a name on the hub: owner/name[@revision], "
        "timm/name or hf-hub:owner/name",
    )
    parser.add_argument(
        "--model-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of timm.create_model (num_classes=10, pretrained=true), or field of a "
        "transformers configuration (num_labels=3)",
    )


def build_model(
    name: str, arguments: Sequence[str], wanted: Wanted | None = None, *, weights: bool = True
) -> nn.Module:
    """Build a model by name, with the weights that a folder or the hub has, or without any.

    Args:
        name: A timm name, a folder with ``config.json``, or a name on the hub.
        arguments: ``KEY=VALUE``; values are read as JSON where they are.
        wanted: Which class of a transformers configuration.
        weights: Whether it is built with them; otherwise on the meta device, and the few models
            that compute while they are built, on the CPU.

    Raises:
        ConfigError: If there is no such model, or an argument is unknown or not ``KEY=VALUE``.
        HubError: If the hub does not give it.
    """
    given = dict(_key_value(item) for item in arguments)
    build = partial(_build, find_model(name), given, wanted or Wanted(), weights=weights)
    try:
        return build() if weights else _on_meta(build)
    except PemnError:
        raise
    except Exception as error:  # whatever a library raises on a name or an argument of the user's
        listed = ", ".join(f"{key}={value!r}" for key, value in given.items()) or "none"
        message = (
            f"{name!r} cannot be built with --model-arg {listed}: {first_line(error)}. Change "
            "the name or --model-arg."
        )
        raise ConfigError(message) from error


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        return build()


def find_model(name: str) -> Source:
    """Return where a model comes from, as in `build_model`; a ConfigError or HubError if not."""
    import timm

    path = Path(name)
    if (path / "config.json").is_file():
        library = _library_of(path / "config.json")
        return Source(library, f"local-dir:{name}" if library == "timm" else name)
    if path.exists():
        _refuse(name, "is a folder without config.json" if path.is_dir() else "is a file")
    if name.startswith(_TIMM_SOURCES):
        found = hub_name(name.partition(":")[2])
        if found is not None and not name.startswith("local-dir:"):
            hub_file(found, "config.json")
        return Source("timm", name)
    found = hub_name(name)
    if found is not None and not found.folder:
        return _on_the_hub(found)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "none is similar"
        _refuse(name, f"is neither a timm model ({close}) nor a folder with config.json")
    return Source("timm", name)


def _on_the_hub(name: HubName) -> Source:
    library = _library_of(hub_file(name, "config.json"))
    if library == "timm":
        return Source(library, f"hf-hub:{name.text}")
    return Source(library, name.repository, name.revision)


def _library_of(path: Path) -> str:
    """Return whose configuration a ``config.json`` is."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8
        _refuse(str(path), f"is not JSON ({first_line(error)})")
    if not isinstance(written, dict):
        _refuse(str(path), f"holds {type(written).__name__}; a configuration is an object")
    return "timm" if "architecture" in written and "model_type" not in written else "transformers"


def _build(source: Source, given: Mapping[str, Any], wanted: Wanted, *, weights: bool) -> nn.Module:
    if source.library == "timm":
        import timm

        stored = weights and ":" in source.name
        return timm.create_model(source.name, **{"pretrained": stored, **given})
    return _build_transformers(source, given, wanted, weights=weights)


def _build_transformers(
    source: Source, given: Mapping[str, Any], wanted: Wanted, *, weights: bool
) -> nn.Module:
    import transformers

    options = {"revision": source.revision} if source.revision else {}
    config, unused = transformers.AutoConfig.from_pretrained(
        source.name, return_unused_kwargs=True, trust_remote_code=False, **options, **given
    )
    unknown = sorted(set(unused) - set(options))
    if unknown:
        message = (
            f"--model-arg got {', '.join(unknown)}, which {type(config).__name__} of "
            f"{source.name!r} does not have. Give fields of its configuration, such as num_labels."
        )
        raise ConfigError(message)
    model_class = _class_of(config, wanted)
    if weights:
        # Another number of labels is another head, which the adapter brings.
        new_head = {"ignore_mismatched_sizes": "num_labels" in given}
        return model_class.from_pretrained(source.name, config=config, **options, **new_head)
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    return build(config)


def _class_of(config: Any, wanted: Wanted) -> Any:
    """Return the class that an adapter was made on, or that fits the task, or that is named."""
    import transformers

    from pemn_surgery.adapters.files.card import AUTO_CLASSES

    made_on = getattr(transformers, wanted.class_name or "", None)
    if made_on is not None:
        return made_on
    for_task = getattr(transformers, AUTO_CLASSES.get(wanted.task_type or "", ""), None)
    if for_task is not None and type(config) in for_task._model_mapping:
        return for_task
    named = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, named, transformers.AutoModel)


def _key_value(item: str) -> tuple[str, Any]:
    key, separator, value = item.partition("=")
    if not separator or not key:
        message = f"--model-arg got {item!r}; it needs KEY=VALUE, for example num_classes=10."
        raise ConfigError(message)
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _refuse(name: str, problem: str) -> NoReturn:
    message = (
        f"{name!r} {problem}. Give a name from timm.list_models(), a folder that save_pretrained "
        "made, or a name on the hub (owner/name)."
    )
    raise ConfigError(message)
