"""What transformers models take: from the name of an argument to a tensor, as tables."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pemn_surgery.errors import ExampleInputsError

TEXT_LENGTH, TARGET_LENGTH = 12, 6
FRAMES = 128  # of a spectrogram
SAMPLES = 8000  # of a waveform
GRID = (1, 8, 8)  # patches of an image that is given as a list of patches: time, height, width


@dataclass(frozen=True)
class Asked:
    """A model and what its forward can be given.

    Attributes:
        model: The model.
        batch: Number of examples.
        arguments: Names of forward's arguments, True for those without a default.
        random: Where numbers come from.
    """

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

    @property
    def main(self) -> list[str]:
        """The names of what the model calls its main input."""
        main = getattr(self.model, "main_input_name", "input_ids")
        return [name for name in _listed(main) if name in self.arguments]

    def number(self, *names: str, default: int | None = None) -> int:
        """Return the first of the named numbers in the config or in a config inside it."""
        return _find(self.config, names, int, default)

    def normal(self, *shape: int) -> Tensor:
        """Return normal random numbers of a shape."""
        return torch.randn(shape, generator=self.random)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return random int64 numbers in [low, high) of a shape."""
        return torch.randint(low, high, shape, generator=self.random)


def make_inputs(model: nn.Module, batch: int) -> dict[str, Any]:
    """Return keyword arguments for a transformers model's forward.

    Args:
        model: The model.
        batch: Number of examples.

    Raises:
        ExampleInputsError: A required argument is of an unknown kind.
    """
    asked = Asked(model, batch, _arguments(model))
    made = WHOLE[asked.kind](asked) if asked.kind in WHOLE else _make_all(asked)
    missing = [name for name, required in asked.arguments.items() if required and name not in made]
    if missing:
        message = (
            f"{type(model).__name__} needs {', '.join(missing)}, for which there is no rule; "
            "give `inputs=` yourself"
        )
        raise ExampleInputsError(message)
    if "use_cache" in asked.arguments:
        made["use_cache"] = False
    return made


def _arguments(model: nn.Module) -> dict[str, bool]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in variadic
    }


def _make_all(asked: Asked) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in _wanted(asked):
        maker = OF_TYPE.get((asked.kind, name), MAKERS.get(name))
        if maker is not None and name not in made:
            made[name] = maker(asked)
    if "input_ids" in made:
        _add_placeholders(asked, made, "image")
        _add_placeholders(asked, made, "audio")
    elif "attention_mask" in made and not asked.arguments["attention_mask"]:
        del made["attention_mask"]  # of the text
    return made


def _wanted(asked: Asked) -> list[str]:
    required = [name for name, needed in asked.arguments.items() if needed]
    also = [name for name in ALWAYS if name in asked.arguments]
    if (
        getattr(asked.config, "is_encoder_decoder", False)
        and "decoder_input_ids" in asked.arguments
    ):
        also.append("decoder_input_ids")
    return [*required, *asked.main, *also]


def _add_placeholders(asked: Asked, made: dict[str, Any], what: str) -> None:
    """Put as many placeholder tokens before the text as the model makes features."""
    token = _first(_values(asked.config, (f"{what}_token_id", f"{what}_token_index"), int))
    encode = _method(asked.model, f"get_{what}_features")
    if token is None or encode is None or not any(name in made for name in SENSES[what]):
        return
    taken = inspect.signature(encode).parameters
    given = {name: value for name, value in made.items() if name in taken and name not in TEXT}
    count = _count_features(asked.model, encode, given)
    marks = torch.full((asked.batch, count // asked.batch), token)
    made["input_ids"] = torch.cat([marks, made["input_ids"]], dim=1)
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in made:
            kind = 1 if name == "attention_mask" or what == "image" else 2
            made[name] = torch.cat([torch.full_like(marks, kind), made[name]], dim=1)


def _method(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """Return a method of the model or of the first module inside it that has one."""
    return next((getattr(part, name) for part in model.modules() if hasattr(part, name)), None)


def _count_features(model: nn.Module, encode: Callable[..., Any], inputs: dict[str, Any]) -> int:
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        model.eval()  # dropout would use the global random state, a batch norm would move
        with torch.no_grad():
            found = encode(**{name: value.to(device) for name, value in inputs.items()})
    finally:
        for module, mode in modes:
            module.training = mode
    features = getattr(found, "pooler_output", found)
    return sum(one.numel() // one.shape[-1] for one in _listed(features))


# ---------------------------------------------------------------------------------- text


def _text(asked: Asked, length: int = TEXT_LENGTH) -> Tensor:
    """Return (batch, length) ids of ordinary tokens: none that the config names as special."""
    size = _vocabulary(asked)
    special = {value for value in _special_tokens(asked.config) if value < size}
    ordinary = [token for token in range(min(size, 1000)) if token not in special] or [0]
    places = asked.integers(min(4, len(ordinary) - 1), len(ordinary), asked.batch, length)
    return torch.tensor(ordinary)[places]


def _vocabulary(asked: Asked) -> int:
    text = getattr(asked.config, "text_encoder", None) or asked.config  # what makes music of text
    if text is asked.config and hasattr(text, "get_text_config"):
        text = text.get_text_config()
    return _find(text, ("vocab_size",), int, None) or asked.number("vocab_size", default=200)


def _special_tokens(config: Any) -> Iterator[int]:
    for part in _parts(config):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index", "_id")):
                yield from (token for token in _listed(value) if _is_count(token))


def _ones(asked: Asked, length: int = TEXT_LENGTH) -> Tensor:
    return torch.ones(asked.batch, length, dtype=torch.int64)


# ---------------------------------------------------------------------------------- images


def _vision(config: Any) -> Any:
    names = ("vision_config", "visual_config", "image_config", "vision_encoder_config")
    found = (getattr(config, name, None) for name in (*names, "encoder", "backbone_config"))
    return next((part for part in found if hasattr(part, "model_type")), config)


def _image(asked: Asked) -> Tensor:
    """Return images (batch, channels, height, width), or a list of patches where grids are given."""
    if "image_grid_thw" in asked.arguments or "grid_thw" in asked.arguments:
        return _patches(asked)
    return asked.normal(asked.batch, *_image_shape(asked))


def _image_shape(asked: Asked) -> tuple[int, int, int]:
    vision = _vision(asked.config)
    channels = ("num_channels", "in_channels", "in_chans", "n_channels")
    sizes = _values(vision, ("image_size", "img_size", "input_size"), (int, list, tuple, dict))
    size = next((size for size in sizes if size), 224)
    sides = list(size.values()) if isinstance(size, dict) else _listed(size)
    return _find(vision, channels, int, 3), int(sides[0]), int(sides[-1])


def _patches(asked: Asked) -> Tensor:
    """Return flat patches (batch x patches, channels x time x height x width)."""
    vision = _vision(asked.config)
    channels = _find(vision, ("in_channels", "num_channels", "in_chans"), int, 3)
    side = _find(vision, ("patch_size", "spatial_patch_size"), int, 14)
    time = _find(vision, ("temporal_patch_size",), int, 1)
    count = asked.batch * GRID[0] * GRID[1] * GRID[2]
    return asked.normal(count, channels * time * side * side)


def _grid(asked: Asked) -> Tensor:
    return torch.tensor([GRID] * asked.batch)


def _video(asked: Asked) -> Tensor:
    frames = asked.number("num_frames", "frames_per_clip", default=8)
    return asked.normal(asked.batch, frames, *_image_shape(asked))


# ---------------------------------------------------------------------------------- audio, series


def _spectrogram(asked: Asked) -> Tensor:
    names = ("num_mel_bins", "feature_projection_input_dim", "n_mels", "input_feat_per_channel")
    bins = asked.number(*names, "input_dim", default=80)
    positions = asked.number("max_source_positions", default=0)
    if positions:  # Whisper's encoder and its heirs: channels first, of one length
        return asked.normal(asked.batch, bins, 2 * positions)
    return asked.normal(asked.batch, FRAMES, bins)


def _spectrogram_mask(asked: Asked) -> Tensor:
    positions = asked.number("max_source_positions", default=0)
    return _ones(asked, 2 * positions or FRAMES)


def _wave(asked: Asked) -> Tensor:
    return asked.normal(asked.batch, SAMPLES)


def _mono(asked: Asked) -> Tensor:
    """Return waveforms (batch, one channel, samples)."""
    return asked.normal(asked.batch, 1, 9600)  # divisible by the codecs' hops


def _forecast(asked: Asked) -> dict[str, Tensor]:
    """Return a past with its times, and the times to predict (the forecasting transformers)."""
    config, batch = asked.config, asked.batch
    length = config.context_length + max(config.lags_sequence)
    times = config.num_time_features
    made = {
        "past_values": asked.normal(batch, length),
        "past_time_features": asked.normal(batch, length, times),
        "past_observed_mask": torch.ones(batch, length),
        "future_values": asked.normal(batch, config.prediction_length),
        "future_time_features": asked.normal(batch, config.prediction_length, times),
    }
    if config.num_static_categorical_features:
        shape = (batch, config.num_static_categorical_features)
        made["static_categorical_features"] = torch.zeros(shape, dtype=torch.int64)
    return made


def _trajectory(asked: Asked) -> dict[str, Tensor]:
    """Return states, actions and rewards of a few steps (Decision Transformer)."""
    batch, steps = asked.batch, TARGET_LENGTH
    return {
        "states": asked.normal(batch, steps, asked.config.state_dim),
        "actions": asked.normal(batch, steps, asked.config.act_dim),
        "rewards": asked.normal(batch, steps, 1),
        "returns_to_go": asked.normal(batch, steps, 1),
        "timesteps": torch.arange(steps).repeat(batch, 1),
        "attention_mask": _ones(asked, steps),
    }


def _image_pair(asked: Asked) -> Tensor:
    """Return pairs of images to match (batch, 2, channels, height, width)."""
    return asked.normal(asked.batch, 2, 3, 128, 128).abs()


def _codes(asked: Asked) -> Tensor:
    """Return (batch, steps, codebooks) ids of a codec."""
    config = asked.config.decoder_config
    return asked.integers(0, 1000, asked.batch, TARGET_LENGTH, config.num_channels)


def _states(asked: Asked) -> Tensor:
    return asked.normal(asked.batch, TEXT_LENGTH, asked.number("hidden_size", "d_model"))


def _past(asked: Asked) -> Tensor:
    length = asked.number("context_length", default=32)
    return asked.normal(asked.batch, length, asked.number("num_input_channels", default=1))


SENSES = {"image": ("pixel_values",), "audio": ("input_features", "input_values")}
TEXT = ("input_ids", "attention_mask")
ALWAYS = (
    *TEXT,
    "bbox",
    "pixel_values",
    "image_grid_thw",
    "mm_token_type_ids",
    "input_features",
    "input_features_mask",
    "feature_attention_mask",
    "input_values",
)
MAKERS: dict[str, Callable[[Asked], Any]] = {
    "input_ids": _text,
    "decoder_input_ids": lambda asked: _text(asked, TARGET_LENGTH),
    "attention_mask": _ones,
    "mm_token_type_ids": lambda asked: torch.zeros(asked.batch, TEXT_LENGTH, dtype=torch.int64),
    "bbox": lambda asked: torch.zeros(asked.batch, TEXT_LENGTH, 4, dtype=torch.int64),
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "input_features": _spectrogram,
    "input_features_mask": _spectrogram_mask,
    "feature_attention_mask": _spectrogram_mask,
    "input_values": _wave,
    "past_values": _past,
    "hidden_states": _states,
    "inputs_embeds": _states,
}
MONO = (
    *("mimi", "mimi_encoder", "encodec", "dac", "xcodec", "xcodec2", "neucodec"),
    *("pe_audio", "pe_audio_encoder", "pe_audio_video", "pe_audio_video_encoder"),
    *("pocket_tts_audio_tokenizer", "pocket_tts_audio_tokenizer_encoder"),
    *("higgs_audio_v2_tokenizer", "vibevoice_acoustic_tokenizer"),
)
OF_TYPE: dict[tuple[str, str], Callable[[Asked], Any]] = {
    **{(kind, "input_values"): _mono for kind in MONO},  # codecs: with a dimension of channels
    **{
        (kind, "pixel_values"): _image_pair for kind in ("efficientloftr", "lightglue", "superglue")
    },
    ("audio-spectrogram-transformer", "input_values"): lambda asked: asked.normal(
        asked.batch, asked.config.max_length, asked.config.num_mel_bins
    ),
    ("clap", "input_features"): lambda asked: asked.normal(asked.batch, 1, 1001, 64),
    ("dia", "decoder_input_ids"): _codes,
    ("timesfm", "past_values"): lambda asked: list(asked.normal(asked.batch, 64)),
    ("timesfm2_5", "past_values"): lambda asked: list(asked.normal(asked.batch, 64)),
}
WHOLE: dict[str, Callable[[Asked], dict[str, Any]]] = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _forecast),
    "decision_transformer": _trajectory,
}


# ---------------------------------------------------------------------------------- reading configs


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config and every config inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from _parts(value)


def _values(config: Any, names: Sequence[str], kind: Any) -> Iterator[Any]:
    for part in _parts(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, kind) and not isinstance(value, bool):
                yield value


def _find(config: Any, names: Sequence[str], kind: Any, default: Any) -> Any:
    return next(_values(config, names, kind), default)


def _first(values: Iterator[Any]) -> Any:
    return next(values, None)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
