"""Writing a dense model as an ONNX graph: any batch, any length of text, the model's own images."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pemn_surgery.commands.common import first_line
from pemn_surgery.errors import ConfigError, ExportError
from pemn_surgery.models.inputs.examples import example_inputs

GRAPH = "model.onnx"
Size = tuple[int, int]  # height and width of an image in pixels

_ANY = torch.export.Dim.AUTO  # any size, unless the model fixes it


def check_can_export() -> None:
    """Refuse early where a package that writes graphs is missing (ImportError)."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}."
        raise ImportError(message)


def write_onnx(model: nn.Module, path: Path, size: Size | None = None) -> dict[str, Any]:
    """Write a model as a graph.

    The batch is free, and so are the lengths of texts and waveforms where the model lets them be.
    Outputs have the names that the model gives them.

    Args:
        model: A timm or transformers model; it is put into eval mode.
        path: The file.
        size: Height and width of images; None takes the model's own.

    Returns:
        "inputs" and "outputs": the shape of each by name, with words where a size is free.

    Raises:
        ConfigError: If the model takes no images, but a size of them is given.
        ExportError: If the model does not run on such inputs, or torch cannot export it.
    """
    model.eval()
    inputs = _sized(model, example_inputs(model), size)
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:  # what a model raises on a size that it does not take
        shapes = {key: tuple(value.shape) for key, value in _tensors(inputs).items()}
        message = (
            f"{type(model).__name__} does not run on inputs of shapes {shapes}: "
            f"{first_line(error)}. Change --input-size. Nothing was written."
        )
        raise ExportError(message) from error
    names = [*_names_of(output, _what_it_is(model, output))]
    program = _exported(model, inputs, names)
    program.save(str(path))
    graph = program.model.graph
    return {"inputs": _shapes(graph.inputs), "outputs": _shapes(graph.outputs)}


def _exported(model: nn.Module, inputs: Mapping[str, Any], names: list[str]) -> Any:
    """Return the graph: with free lengths if torch can, with a free batch alone if it cannot."""
    errors = []
    for shapes in (_free_lengths(inputs), _free_batch(inputs)):
        options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False}
        try:
            return torch.onnx.export(model, (), kwargs=dict(inputs), output_names=names, **options)
        except Exception as error:  # the exporter has no base of its errors
            errors.append(error)
    message = (
        f"torch {torch.__version__} cannot export {type(model).__name__} to ONNX: "
        f"{first_line(errors[-1])}. Write safetensors instead. Nothing was written."
    )
    raise ExportError(message) from errors[-1]


def _free_batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {0: _ANY} if isinstance(value, Tensor) and value.dim() else None
        for name, value in inputs.items()
    }


def _free_lengths(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Free every size of numbers (texts, masks) and of rows (waveforms); of images the batch."""
    sequences = {
        name: dict.fromkeys(range(value.dim()), _ANY)
        for name, value in _tensors(inputs).items()
        if value.dim() <= 2 or not value.is_floating_point()
    }
    return {**_free_batch(inputs), **sequences}


def _sized(model: nn.Module, inputs: dict[str, Any], size: Size | None) -> dict[str, Any]:
    """Return the inputs with images of the size that is asked for, or of the model's own."""
    wanted = size or _own_size(model)
    images = [name for name, value in _tensors(inputs).items() if _is_image(value)]
    if size is not None and not images:
        message = (
            f"--input-size got {size[0]}x{size[1]}, but {type(model).__name__} takes "
            f"{', '.join(inputs)}: no images. Leave it out."
        )
        raise ConfigError(message)
    if wanted is None:
        return inputs
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(*inputs[name].shape[:2], *wanted, generator=generator) for name in images
    }
    return {**inputs, **made}


def _own_size(model: nn.Module) -> Size | None:
    """Return a timm model's own size; `example_inputs` gives transformers models theirs."""
    described = getattr(model, "pretrained_cfg", None)
    if not isinstance(described, Mapping) or not described.get("input_size"):
        return None
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built_for or described["input_size"][-2:]
    return height, width


def _is_image(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() == 4


def _tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def _what_it_is(model: nn.Module, output: Any) -> str:
    """Return what to call an output that has no name: logits, or features without a classifier."""
    has_classes = getattr(model, "num_classes", None) != 0
    return "logits" if has_classes and isinstance(output, Tensor) else "features"


def _names_of(output: Any, name: str) -> Iterator[str]:
    """Yield the names of a model's outputs in the order in which the exporter lays them out."""
    if isinstance(output, Mapping):
        for key, value in output.items():
            yield from _names_of(value, key)
    elif isinstance(output, (list, tuple)):
        for place, value in enumerate(output):
            yield from _names_of(value, f"{name}_{place}")
    elif isinstance(output, Tensor):
        yield name


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [size if isinstance(size, int) else str(size) for size in value.shape]
        for value in values
    }
