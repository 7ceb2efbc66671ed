"""Writing a dense model as a GGUF file, which llama.cpp and what is built on it run.

A GGUF of the base, made by llama.cpp's own ``convert_hf_to_gguf.py``, says all but the weights:
architecture, tokenizer, rotary embeddings. Here its tensors get the values of the merged model.
What masks lie on takes the smallest type that holds it as it is:

    {-c, c}       Q1_0, 1.125 bits a weight, a c for each 128: flips of a binary base
    {-c, 0, c}    TQ2_0 (or TQ1_0), 2.06 (1.69) bits, one c: masks on signed constants
    all else      floats of 16 or 32 bits, as in the base's file

Scales are float16 in these types; by how much that rounds is said.
"""

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from pemn_surgery.errors import ConfigError, ExportError

FILE = "model.gguf"
TypeName = Literal["auto", "q1_0", "tq1_0", "tq2_0", "float"]
TYPES: tuple[TypeName, ...] = ("auto", "q1_0", "tq1_0", "tq2_0", "float")

# Architectures by GGUF's name for them, and whether llama.cpp has their query and key rows in
# another order than transformers (halves of a head interleaved, for its rotary embedding).
_INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False}
_AUTO = ("q1_0", "tq2_0")
_FLOATS = ("F32", "F16", "BF16")
_TERNARY_BLOCK, _BINARY_BLOCK = 256, 128

Floats = np.ndarray[Any, np.dtype[np.float32]]


def check_can_export() -> None:
    """Refuse early where the package that writes such files is missing (ImportError)."""
    if importlib.util.find_spec("gguf") is None:
        message = "--format gguf needs gguf: pip install gguf."
        raise ImportError(message)


def write_gguf(
    model: nn.Module,
    masked: Collection[str],
    like: Path,
    path: Path,
    kind: TypeName = "auto",
) -> dict[str, Any]:
    """Write a merged model of transformers beside what a GGUF of its base says.

    Args:
        model: A merged causal language model.
        masked: Names of the weights that masks lay on.
        like: GGUF file of the base, with floats.
        path: The file.
        kind: Type of the masked weights; "auto" takes the smallest that holds each as it is.

    Returns:
        "tensors": number by type; "largest_rounding": of scales to float16, relative.

    Raises:
        ExportError: If ``like`` is no GGUF of this model, or a masked weight is not what ``kind``
            can hold.
        ConfigError: If there is no such type.
    """
    import gguf

    if kind not in TYPES:
        message = f"write_gguf got kind={kind!r}; it needs one of {', '.join(TYPES)}."
        raise ConfigError(message)
    reader = _opened(gguf, like)
    base = _Base(gguf, reader, like)
    chosen = dict(_tensors(base, model, masked, kind))
    partial = path.with_suffix(".partial")
    try:
        _write(gguf, reader, base.architecture, chosen, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    for one in chosen.values():
        counts[one.kind] = counts.get(one.kind, 0) + 1
    rounding = max((one.rounding for one in chosen.values()), default=0.0)
    return {"tensors": counts, "largest_rounding": rounding}


@dataclass(frozen=True)
class _Tensor:
    """What is written: numbers of a type as numpy has them, or a type's bytes."""

    data: Any
    kind: str
    rounding: float = 0.0


def _opened(gguf: Any, like: Path) -> Any:
    try:
        return gguf.GGUFReader(like)
    except (OSError, ValueError, IndexError) as error:
        message = f"{str(like)!r} cannot be read as GGUF ({error}). Nothing was written."
        raise ExportError(message) from error


class _Base:
    """A GGUF of the base: its architecture and what it calls the model's tensors."""

    def __init__(self, gguf: Any, reader: Any, like: Path) -> None:
        self.gguf = gguf
        self.reader = reader
        self.like = like
        self.architecture: str = reader.get_field("general.architecture").contents()
        if self.architecture not in _INTERLEAVED:
            self.refuse(
                f"is of the architecture {self.architecture!r}; known are "
                f"{', '.join(_INTERLEAVED)}. Write safetensors, and convert those by llama.cpp's "
                "convert_hf_to_gguf.py"
            )
        blocks = int(self._number("block_count"))
        known = {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}
        self.names = gguf.get_tensor_name_map(known[self.architecture], blocks)

    def refuse(self, problem: str) -> None:
        """Refuse this file (`ExportError`)."""
        message = f"{str(self.like)!r} {problem}. Nothing was written."
        raise ExportError(message)

    def called(self, name: str) -> str | None:
        """Return what GGUF calls a tensor of transformers'."""
        return self.names.get_name(name, try_suffixes=(".weight", ".bias"))

    def numbers(self, name: str, tensor: Tensor) -> Floats:
        """Return a tensor as float32, with its rows in llama.cpp's order."""
        values = tensor.detach().float().cpu().numpy()
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}
        key = heads.get(name.split(".")[-2])
        if key is None or not _INTERLEAVED[self.architecture]:
            return values
        count = int(self._number(key))
        halves = values.reshape(count, 2, len(values) // count // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    def _number(self, key: str) -> Any:
        return self.reader.get_field(f"{self.architecture}.{key}").contents()


def _tensors(
    base: _Base, model: nn.Module, masked: Collection[str], kind: TypeName
) -> Iterator[tuple[str, _Tensor]]:
    """Yield every tensor of the file: the model's by the base's names, and what only GGUF has."""
    given = _by_gguf_name(base, model)
    for tensor in base.reader.tensors:
        if tensor.name not in given:
            yield tensor.name, _Tensor(tensor.data, tensor.tensor_type.name)
            continue
        name, own = given.pop(tensor.name)
        shape, found = tuple(int(size) for size in reversed(tensor.shape)), tuple(own.shape)
        if found != shape:
            base.refuse(f"has {tensor.name} of shape {shape}, the model {name} of {found}")
        values, as_base = base.numbers(name, own), tensor.tensor_type.name
        yield tensor.name, _made(base.gguf, name, values, name in masked, kind, as_base)
    for called, (name, own) in given.items():
        values = base.numbers(name, own)
        yield called, _made(base.gguf, name, values, name in masked, kind, "F16")


def _by_gguf_name(base: _Base, model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return the model's tensors by GGUF's names; one that shares another's memory is left out."""
    found: dict[str, tuple[str, Tensor]] = {}
    unknown = []
    for name, tensor in model.named_parameters():
        called = base.called(name)
        if called is None:
            unknown.append(name)
        else:
            found[called] = name, tensor
    if unknown:
        base.refuse(
            f"has no place for {len(unknown)} tensors of {type(model).__name__} (first: "
            f"{unknown[0]}); is it a GGUF of another model"
        )
    return found


def _made(
    gguf: Any, name: str, values: Floats, is_masked: bool, kind: TypeName, as_base: str
) -> _Tensor:
    """Return a tensor in the type that is asked for."""
    if is_masked and values.ndim == 2 and kind != "float":
        for one in _AUTO if kind == "auto" else (kind,):
            found = _in_blocks(gguf, values, one)
            if found is not None:
                return found
        if kind != "auto":
            raise ExportError(_cannot_hold(name, values, kind))
    asked = as_base if as_base in _FLOATS else "F16"
    if asked == "BF16":
        return _Tensor(gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16), asked)
    return _Tensor(values.astype(np.float32 if asked == "F32" else np.float16), asked)


def _in_blocks(gguf: Any, values: Floats, kind: str) -> _Tensor | None:
    """Return a weight in blocks of few bits; None if they cannot hold it."""
    if kind == "q1_0":
        return _binary(values)
    sizes = np.abs(values)
    scale = float(sizes.max(initial=0.0))
    fits = values.shape[-1] % _TERNARY_BLOCK == 0 and bool(((sizes == 0) | (sizes == scale)).all())
    if not fits or not _is_half(scale):
        return None
    half = np.float32(np.float16(scale))
    packed = gguf.quants.quantize(np.sign(values) * half, gguf.GGMLQuantizationType[kind.upper()])
    return _Tensor(packed, kind.upper(), _rounding(np.array([scale])))


def _binary(values: Floats) -> _Tensor | None:
    """Return a weight as Q1_0: of each 128 numbers a float16 size, and a bit where positive."""
    if values.shape[-1] % _BINARY_BLOCK or not values.size:
        return None
    blocks = values.reshape(-1, _BINARY_BLOCK)
    scales = np.abs(blocks[:, :1])
    if not (np.abs(blocks) == scales).all() or not all(map(_is_half, (scales.max(), scales.min()))):
        return None
    bits = np.packbits(blocks > 0, axis=1, bitorder="little")
    packed = np.concatenate([scales.astype(np.float16).view(np.uint8), bits], axis=1)
    return _Tensor(packed.reshape(len(values), -1), "Q1_0", _rounding(scales))


def _is_half(scale: float) -> bool:
    """Tell whether float16 can be near a scale: 0, or neither too large nor subnormal there."""
    return scale == 0 or 2.0**-14 <= scale <= 65504


def _rounding(scales: Floats) -> float:
    """Return the largest relative error of scales in float16."""
    error = np.abs(scales.astype(np.float16).astype(np.float64) - scales)
    return float((error / np.where(scales == 0, 1, scales)).max())


def _cannot_hold(name: str, values: Floats, kind: str) -> str:
    block = _BINARY_BLOCK if kind == "q1_0" else _TERNARY_BLOCK
    holds = "{-c, c}, a c for each 128" if kind == "q1_0" else "{-c, 0, c}, one c a weight"
    found = len(np.unique(np.abs(values[:1024])))
    return (
        f"{name} of shape {values.shape} is not what {kind} holds: {holds}, in rows of a multiple "
        f"of {block}; its first rows have {found:,} different sizes. TQ holds masks on signed "
        'constants (bank_init="signed_constant"), Q1_0 flips of a binary base; --type float '
        "writes any numbers. Nothing was written."
    )


def _write(
    gguf: Any, reader: Any, architecture: str, tensors: Mapping[str, _Tensor], path: Path
) -> None:
    """Write what the base's file says, and the tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        kind = field.types[0]
        of_items = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=of_items)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.kind]
        is_plain = tensor.kind in ("F32", "F16")
        writer.add_tensor(
            name, np.ascontiguousarray(tensor.data), raw_dtype=None if is_plain else kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
