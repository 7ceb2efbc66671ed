"""timm's architectures with random weights, the large ones with fewer blocks."""

import re

import timm
import torch
from torch import nn

# Above this many parameters a model is built with fewer of its repeated blocks, if it can be.
LARGE = 12_000_000

# Arguments that reduce the number of repeated blocks; the first that a model takes is used.
_FEWER_BLOCKS = (
    *({"depth": blocks} for blocks in (1, 2, 4)),
    {"depths": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"depth": 1, "num_kv_heads": (8,)},  # one entry a block
)
_SMALLER_IMAGES = {"img_size": 224}


_SIZES = (
    "atto|nano|tiny|mini|test",
    "base|medium|_b|50",
    "large|_l|101",
    "huge|giant|xl|[1-7]b|so400m",
)


def names() -> list[str]:
    """Return every architecture, those that sound large last."""
    return sorted(timm.list_models(), key=_loudness)


def _loudness(name: str) -> int:
    return max((place for place, size in enumerate(_SIZES) if re.search(size, name)), default=1)


def build(name: str, seed: int = 0) -> tuple[nn.Module, str]:
    """Return a model in eval mode, and how it was made smaller ("" if it was not)."""
    options = _smaller(name)
    torch.manual_seed(seed)
    model = timm.create_model(name, **options).eval()
    if "img_size" in options:  # what the model was built for; its configuration does not say so
        side = options["img_size"]
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    return model, ", ".join(f"{key}={value}" for key, value in options.items())


def _smaller(name: str) -> dict[str, object]:
    """Return the arguments that make an architecture small enough to be walked."""
    options: dict[str, object] = {}
    model = _on_meta(name)
    if _side(model) > 256 and _runs(name, _SMALLER_IMAGES):
        options.update(_SMALLER_IMAGES)
    if sum(parameter.numel() for parameter in model.parameters()) > LARGE:
        for fewer in _FEWER_BLOCKS:
            if _runs(name, {**options, **fewer}):
                return {**options, **fewer}
    return options


def _runs(name: str, options: dict[str, object]) -> bool:
    """Tell whether an architecture takes the arguments, and still fits together with them."""
    try:
        model = _on_meta(name, **options).eval()
        side = options.get("img_size", _side(model))
        with torch.no_grad():
            model(torch.zeros(1, 3, side, side, device="meta"))
    except Exception:  # an architecture refuses arguments in its own way
        return False
    return True


def _side(model: nn.Module) -> int:
    return model.pretrained_cfg.get("input_size", (3, 224, 224))[1]


def _on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)
