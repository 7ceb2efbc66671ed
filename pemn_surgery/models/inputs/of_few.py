"""What only a few transformers types take: tensors that no argument's name tells."""

from typing import Any

import torch
from torch import Tensor

from pemn_surgery.models.inputs.arguments import (
    GRID,
    TARGET_LENGTH,
    TEXT_LENGTH,
    Asked,
    image_shape,
    ones,
    patches,
    spectrogram,
    states,
    text,
    vision_of,
    wave,
)

CODEC_SAMPLES = 9600  # divisible by the codecs' hops
STEPS = TARGET_LENGTH


def mono(asked: Asked) -> Tensor:
    """Return waveforms (batch, one channel, samples)."""
    return asked.normal(asked.batch, 1, CODEC_SAMPLES)


def square_patches(asked: Asked) -> Tensor:
    """Return patches (batch x patches, channels, height, width)."""
    side = vision_of(asked.config).patch_size
    return patches(asked).reshape(-1, 3, side, side)


def patch_row(asked: Asked) -> Tensor:
    """Return all patches of all images side by side (1, channels, height, patches x width)."""
    side = vision_of(asked.config).patch_size
    return asked.normal(1, 3, side, side * asked.batch * GRID[1] * GRID[2])


def merged_patches(asked: Asked) -> Tensor:
    """Return squares of 2 x 2 patches (batch x squares, height, width, channels)."""
    side = 2 * vision_of(asked.config).patch_size
    return asked.normal(asked.batch * GRID[1] * GRID[2], side, side, 3)


def sizes(asked: Asked) -> Tensor:
    """Return how many patches high and wide each image is (batch, 2)."""
    return torch.tensor([GRID[1:]] * asked.batch)


def latents(asked: Asked) -> Tensor:
    """Return what a codec decodes (batch, width, steps)."""
    return asked.normal(asked.batch, asked.number("hidden_size"), STEPS)


def codebook_rows(asked: Asked) -> Tensor:
    """Return ids of each codebook of each example (batch x codebooks, steps)."""
    return text(asked, STEPS).repeat(asked.number("num_codebooks", default=4), 1)


def timm_video(asked: Asked, frames: int = 4) -> Tensor:
    """Return videos of the size that the timm network inside was built for."""
    embeds = (getattr(part, "patch_embed", None) for part in asked.model.modules())
    side = next(size for embed in embeds if (size := getattr(embed, "img_size", None)))
    return asked.normal(asked.batch, frames, 3, *side)


def prompted_video(asked: Asked) -> Tensor:
    """Return videos of the one size and length that a learned frame of pixels is laid over."""
    side = asked.config.max_img_size
    return asked.normal(asked.batch, asked.config.num_frames, 3, side, side)


def half_image(asked: Asked) -> Tensor:
    """Return images that make one of the configuration's size when two are put together."""
    channels, height, width = image_shape(asked)
    return asked.normal(asked.batch, channels, height // 2, width)


def codes(asked: Asked, name: str) -> Tensor:
    """Return (batch, steps, codebooks) ids of an audio codec."""
    return asked.integers(0, 20, asked.batch, STEPS, asked.number(name))


def image_pair(asked: Asked) -> Tensor:
    """Return pairs of images to match (batch, 2, channels, height, width)."""
    return asked.normal(asked.batch, 2, 3, 128, 128).abs()


def question(asked: Asked) -> Tensor:
    """Return a text with a question token, which this type asks for (batch, length)."""
    found = text(asked)
    found[:, 1] = asked.config.question_token_id
    return found


def flattened_patches(asked: Asked) -> Tensor:
    """Return row, column and pixels of each patch (batch, patches, 2 + pixels)."""
    coordinates = asked.integers(1, 9, asked.batch, 16, 2).float()
    pixels = asked.normal(asked.batch, 16, asked.number("patch_embed_hidden_size"))
    return torch.cat([coordinates, pixels], dim=-1)


def forecast_past(asked: Asked, width: int | None = None) -> Tensor:
    """Return series as long as a forecast looks back (batch, time, width, if there is one)."""
    length = asked.config.context_length + max(asked.config.lags_sequence)
    return asked.normal(asked.batch, length, *(() if width is None else (width,)))


def categories(asked: Asked) -> Tensor | None:
    """Return the first of each category, if the model asks for categories (batch, categories)."""
    count = asked.config.num_static_categorical_features
    return 0 * ones(asked, count) if count else None


def image_tokens_and_text(asked: Asked) -> Tensor:
    """Return a text after one image's tokens, as many as it has patches."""
    vision = vision_of(asked.config.vlm_config)
    count = (vision.image_size // vision.patch_size) ** 2
    image = torch.full((asked.batch, count), asked.config.vlm_config.image_token_id)
    return torch.cat([image, text(asked)], dim=1)


def series(asked: Asked) -> Tensor | list[Tensor]:
    """Return series, as a tensor where a mask of the same shape says what is padding."""
    found = asked.normal(asked.batch, 64)
    return found if "past_values_padding" in asked.arguments else list(found)


def perceived(asked: Asked) -> Tensor | None:
    """Return a text, or states where nothing makes states of a text; not beside an image."""
    if "pixel_values" in asked.arguments:
        return None
    if getattr(asked.model, "input_preprocessor", asked) is None:
        return asked.normal(asked.batch, TEXT_LENGTH, asked.config.d_model)
    return text(asked)


def spoken(asked: Asked) -> Tensor:
    """Return waveforms, or states where nothing makes states of a waveform."""
    return wave(asked) if _has_prenet(asked) else states(asked)


def spoken_before(asked: Asked) -> Tensor:
    """Return the spectrograms that a decoder goes on from, or states likewise."""
    width = asked.config.num_mel_bins if _has_prenet(asked) else asked.config.hidden_size
    return asked.normal(asked.batch, STEPS, width)


def _has_prenet(asked: Asked) -> bool:
    return any(hasattr(part, "prenet") for part in asked.model.modules())


def instead_of_text(asked: Asked) -> Tensor | None:
    """Return spectrograms, unless there is a text already and the forward takes one of the two."""
    return None if "input_ids" in asked.arguments else spectrogram(asked)


def keys_and_values(asked: Asked) -> dict[str, tuple[Tensor, Tensor]]:
    """Return keys and values for the layers of each kind (batch, heads, length, width)."""
    found = {}
    part: Any
    for part in asked.model.modules():
        if hasattr(part, "layer_type") and hasattr(part, "num_key_value_groups"):
            heads = part.config.num_attention_heads // part.num_key_value_groups
            shape = (asked.batch, heads, TEXT_LENGTH, part.head_dim)
            found[part.layer_type] = (asked.normal(*shape), asked.normal(*shape))
    return found
