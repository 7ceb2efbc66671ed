"""What transformers models take: from the name of an argument to a tensor.

``MAKERS`` is the table; what only one type needs is in `by_type`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TEXT_LENGTH, TARGET_LENGTH = 12, 6
FRAMES = 400  # of a spectrogram; divisible by the windows that encoders cut it into
SAMPLES = 7680  # of a waveform; divisible by the frames that some encoders cut it into
GRID = (1, 8, 8)  # patches of an image that is given as a list of patches: time, height, width


@dataclass(frozen=True)
class Asked:
    """A model, a number of examples, and forward's arguments, True for those without a default."""

    model: nn.Module
    batch: int
    arguments: dict[str, bool]
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def kind(self) -> str:
        """The model type."""
        return self.config.model_type

    def lacks(self, sense: str) -> bool:
        """Tell whether the model could have a part for images or audio, but has none."""
        name = {"image": "vision_config", "audio": "audio_config"}[sense]
        return getattr(self.config, name, self) is None

    def placeholder(self, sense: str) -> int | None:
        """Return the token that stands for a feature of an image or of audio in a text."""
        words = getattr(self.config, "vocabulary_map", None) or {}
        if f"<{sense}>" in words:
            return words[f"<{sense}>"]
        return find(self.config, (f"{sense}_token_id", f"{sense}_token_index"), int, None)

    def number(self, *names: str, default: int = 0) -> int:
        """Return the first of the named numbers in the config or in a config inside it."""
        return next((n for name in names if (n := find(self.config, (name,), int, None))), default)

    def normal(self, *shape: int) -> Tensor:
        """Return normal random numbers of a shape."""
        return torch.randn(shape, generator=self.random)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return random int64 numbers in [low, high) of a shape."""
        return torch.randint(low, high, shape, generator=self.random)


# ------------------------------------------------------------------------------------ text


def text(asked: Asked, length: int = TEXT_LENGTH) -> Tensor:
    """Return (batch, length) ids of ordinary tokens: none that the config names as special."""
    sizes = [size for size in values(asked.config, ("vocab_size",), int) if size > 0]
    size = min(sizes, default=200)  # several parts may have their own vocabulary
    special = set(_special_tokens(asked.config))
    ordinary = [token for token in range(min(size, 1000)) if token not in special] or [0]
    chosen = asked.integers(min(4, len(ordinary) - 1), len(ordinary), asked.batch, length)
    return torch.tensor(ordinary)[chosen]


def _special_tokens(config: Any) -> Iterator[int]:
    for part in parts(config):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index", "_id")):
                yield from (token for token in listed(value) if isinstance(token, int))


def ones(asked: Asked, *shape: int) -> Tensor:
    """Return (batch, ...) int64 ones; as long as a text, if no shape is given."""
    return torch.ones(asked.batch, *(shape or (TEXT_LENGTH,)), dtype=torch.int64)


# ------------------------------------------------------------------------------------ images


def vision_of(config: Any) -> Any:
    """Return the part of a config that is about images, or the config itself."""
    names = ("vision_config", "visual_config", "image_config", "vision_encoder_config")
    found = values(config, (*names, "encoder", "backbone_config"), object)
    return next((part for part in found if hasattr(part, "model_type")), config)


def image_shape(asked: Asked) -> tuple[int, int, int]:
    """Return channels, height and width of an image."""
    vision = vision_of(asked.config)
    if vision.model_type == "pixtral":  # takes any size up to the one of its configuration
        return (vision.num_channels, 8 * vision.patch_size, 8 * vision.patch_size)
    channels = ("num_channels", "in_channels", "in_chans", "n_channels")
    names = ("image_size", "img_size", "input_size")
    sizes = [*values(vision, names, object), *values(asked.config, names, object), 224]
    size = next(size for size in sizes if size)
    sides = list(size.values()) if isinstance(size, dict) else listed(size)
    return find(vision, channels, int, 3), int(sides[0]), int(sides[-1])


def image(asked: Asked) -> Tensor:
    """Return images (batch, channels, height, width), or patches where a grid says their order."""
    if any(name in asked.arguments for name in ("image_grid_thw", "grid_thw")):
        return patches(asked)
    if "spatial_shapes" in asked.arguments:
        return patches(asked).reshape(asked.batch, GRID[1] * GRID[2], -1)
    if getattr(asked.config, "image_grid_pinpoints", None):
        return tiles(asked)
    return asked.normal(asked.batch, *image_shape(asked))


def patches(asked: Asked) -> Tensor:
    """Return flat patches (batch x patches, channels x time x height x width)."""
    vision = vision_of(asked.config)
    channels = find(vision, ("in_channels", "num_channels", "in_chans"), int, 3)
    side = find(vision, ("patch_size", "spatial_patch_size"), object, 14)
    time = find(vision, ("temporal_patch_size", "patch_temporal"), object, 1)
    count = asked.batch * GRID[0] * GRID[1] * GRID[2]
    return asked.normal(count, channels * listed(time)[0] * listed(side)[0] ** 2)


def tiles(asked: Asked) -> Tensor:
    """Return an overview and the tiles of images of the first known size (batch, tiles, ...)."""
    channels, height, width = image_shape(asked)
    size = asked.config.image_grid_pinpoints[0]
    count = 1 + (size[0] // height) * (size[1] // width)
    return asked.normal(asked.batch, count, channels, height, width)


def image_sizes(asked: Asked) -> Tensor:
    """Return height and width of each image before it was cut (batch, 2)."""
    known = getattr(asked.config, "image_grid_pinpoints", None)
    return torch.tensor([known[0] if known else image_shape(asked)[1:]] * asked.batch)


def image_list(asked: Asked) -> Tensor:
    """Return one image an example, where several are possible (batch, 1, channels, ...)."""
    return asked.normal(asked.batch, 1, *image_shape(asked))


def video(asked: Asked) -> Tensor:
    """Return videos (batch, frames, channels, height, width)."""
    frames = asked.number("num_frames", "frames_per_clip", default=8)
    return asked.normal(asked.batch, frames, *image_shape(asked))


def half_of_patches(asked: Asked) -> Tensor:
    """Return which patches are hidden: every second one (batch, patches)."""
    _, height, width = image_shape(asked)
    side = find(vision_of(asked.config), ("patch_size",), int, 16)
    count = (height // side) * (width // side)
    if tubes := asked.number("tubelet_size"):  # of a video: patches of several frames
        count *= asked.config.num_frames // tubes
    return (torch.arange(count) % 2 == 1).repeat(asked.batch, 1)


# ------------------------------------------------------------------------------------ audio, states


def _frames(asked: Asked) -> int:
    return 2 * asked.number("max_source_positions") if _is_whisper(asked) else FRAMES


def spectrogram(asked: Asked) -> Tensor:
    """Return spectrograms (batch, frames, bins); Whisper's encoder has channels first."""
    names = ("input_dim", "num_mel_bins", "feature_projection_input_dim", "n_mels")
    bins = asked.number(*names, "input_feat_per_channel", "feature_size", default=80)
    frames = _frames(asked)
    shape = (bins, frames) if _is_whisper(asked) else (frames, bins)
    return asked.normal(asked.batch, *shape)


def _is_whisper(asked: Asked) -> bool:
    """Tell whether the encoder is Whisper's, which wants one length: two frames a position."""
    return bool(asked.number("max_source_positions") and asked.number("num_mel_bins"))


def wave(asked: Asked) -> Tensor:
    """Return waveforms (batch, samples)."""
    return asked.normal(asked.batch, SAMPLES)


def states(asked: Asked) -> Tensor:
    """Return hidden states (batch, length, width), or patches where a grid says their order."""
    if "grid_thw" in asked.arguments:
        return patches(asked)
    return asked.normal(asked.batch, TEXT_LENGTH, asked.number("hidden_size", "d_model"))


def past(asked: Asked) -> Tensor:
    """Return time series (batch, time, channels)."""
    length = asked.number("context_length", default=32)
    return asked.normal(asked.batch, length, asked.number("num_input_channels", default=1))


Maker = Callable[[Asked], Any]
TEXT = ("input_ids", "attention_mask")
DATA = {"image": ("pixel_values",), "audio": ("input_features", "input_values")}
SENSES = {
    "image": ("pixel_values", "image_grid_thw", "image_merge_sizes", "mm_token_type_ids"),
    "audio": ("input_features", "input_features_mask", "feature_attention_mask", "input_values"),
}
ALWAYS = (*TEXT, "bbox", *SENSES["image"], *SENSES["audio"])  # made wherever they are taken
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("input_ids", "qformer_input_ids"), text),
    "decoder_input_ids": lambda asked: text(asked, TARGET_LENGTH),
    **dict.fromkeys(("attention_mask", "qformer_attention_mask"), ones),
    "mm_token_type_ids": lambda asked: 0 * ones(asked),
    "bbox": lambda asked: 0 * ones(asked, TEXT_LENGTH, 4),
    "pixel_values": image,
    "pixel_values_videos": video,
    **dict.fromkeys(
        ("image_grid_thw", "grid_thw"), lambda asked: torch.tensor([GRID] * asked.batch)
    ),
    "spatial_shapes": lambda asked: torch.tensor([GRID[1:]] * asked.batch),
    "pixel_attention_mask": lambda asked: ones(asked, GRID[1] * GRID[2]),
    "image_sizes": image_sizes,
    "high_res_pixel_values": lambda asked: asked.normal(asked.batch, 3, 1024, 1024),
    **dict.fromkeys(("image_merge_sizes", "merge_sizes"), lambda asked: 2 * ones(asked)[:, 0]),
    "input_features": spectrogram,
    **dict.fromkeys(
        ("input_features_mask", "feature_attention_mask"), lambda asked: ones(asked, _frames(asked))
    ),
    "input_values": wave,
    "past_values": past,
    "past_values_padding": lambda asked: 0 * ones(asked, 64),
    "freq": lambda asked: torch.zeros(asked.batch, dtype=torch.int64),
    "bool_masked_pos": half_of_patches,
    "hidden_states": states,
    "inputs_embeds": states,
}


# ------------------------------------------------------------------------------------ configs


def parts(config: Any) -> Iterator[Any]:
    """Yield a config and every config inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from parts(value)


def values(config: Any, names: Sequence[str], kind: type) -> Iterator[Any]:
    """Yield the values of a kind that a config, or one inside it, has under the names."""
    for part in parts(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, kind) and value is not None and not isinstance(value, bool):
                yield value


def find(config: Any, names: Sequence[str], kind: type, default: Any) -> Any:
    """Return the first of ``values``, or a default."""
    return next(values(config, names, kind), default)


def listed(value: Any) -> list[Any]:
    """Return a list or tuple as a list, anything else as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def method(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """Return a method of the model or of the first module inside it that has one.

    One that merely passes on whatever it is given (``*args``) does not count: it does not tell
    what it takes.
    """
    found = (getattr(part, name, None) for part in model.modules())
    return next((one for one in found if callable(one) and not _passes_on(one)), None)


def _passes_on(function: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds
