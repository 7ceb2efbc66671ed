"""What single transformers types take differently, or more than their signature says.

A maker for an argument of a type replaces the general one; None: the argument is not given.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pemn_surgery.models.inputs.arguments import (
    FRAMES,
    GRID,
    TARGET_LENGTH,
    TEXT_LENGTH,
    Asked,
    Maker,
    half_of_patches,
    image_list,
    image_shape,
    ones,
    patches,
    spectrogram,
    states,
    text,
    video,
    vision_of,
    wave,
)

ONE_AT_A_TIME = ("tvp", "jev")  # types whose forward takes a batch of one only

Rules = dict[str, Maker | None]

_CODEC_SAMPLES = 9600  # divisible by the codecs' hops
_STEPS = TARGET_LENGTH


def _normal(*shape: int | str) -> Maker:
    """Return a maker of normal numbers (batch, *shape); words are fields of the configuration."""

    def make(asked: Asked) -> Tensor:
        sizes = (attrgetter(n)(asked.config) if isinstance(n, str) else n for n in shape)
        return asked.normal(asked.batch, *sizes)

    return make


_mono = _normal(1, _CODEC_SAMPLES)  # waveforms (batch, one channel, samples)


def _square_patches(asked: Asked) -> Tensor:
    """Return patches (batch x patches, channels, height, width)."""
    side = vision_of(asked.config).patch_size
    return patches(asked).reshape(-1, 3, side, side)


def _patch_row(asked: Asked) -> Tensor:
    """Return all patches of all images side by side (1, channels, height, patches x width)."""
    side = vision_of(asked.config).patch_size
    return asked.normal(1, 3, side, side * asked.batch * GRID[1] * GRID[2])


def _merged_patches(asked: Asked) -> Tensor:
    """Return squares of 2 x 2 patches (batch x squares, height, width, channels)."""
    side = 2 * vision_of(asked.config).patch_size
    return asked.normal(asked.batch * GRID[1] * GRID[2], side, side, 3)


def _sizes(asked: Asked) -> Tensor:
    """Return how many patches high and wide each image is (batch, 2)."""
    return torch.tensor([GRID[1:]] * asked.batch)


def _latents(asked: Asked) -> Tensor:
    """Return what a codec decodes (batch, width, steps)."""
    return asked.normal(asked.batch, asked.number("hidden_size"), _STEPS)


def _codebook_rows(asked: Asked) -> Tensor:
    """Return ids of each codebook of each example (batch x codebooks, steps)."""
    return text(asked, _STEPS).repeat(asked.number("num_codebooks", default=4), 1)


def _timm_video(asked: Asked, frames: int = 4) -> Tensor:
    """Return videos of the size that the timm network inside was built for."""
    embeds = (getattr(part, "patch_embed", None) for part in asked.model.modules())
    side = next(size for embed in embeds if (size := getattr(embed, "img_size", None)))
    return asked.normal(asked.batch, frames, 3, *side)


def _half_image(asked: Asked) -> Tensor:
    """Return images that make one of the configuration's size when two are put together."""
    channels, height, width = image_shape(asked)
    return asked.normal(asked.batch, channels, height // 2, width)


def _codes(asked: Asked, name: str) -> Tensor:
    """Return (batch, steps, codebooks) ids of an audio codec."""
    return asked.integers(0, 20, asked.batch, _STEPS, asked.number(name))


def _image_pair(asked: Asked) -> Tensor:
    """Return pairs of images to match (batch, 2, channels, height, width)."""
    return asked.normal(asked.batch, 2, 3, 128, 128).abs()


def _question(asked: Asked) -> Tensor:
    """Return a text with a question token, which this type asks for (batch, length)."""
    found = text(asked)
    found[:, 1] = asked.config.question_token_id
    return found


def _flattened_patches(asked: Asked) -> Tensor:
    """Return row, column and pixels of each patch (batch, patches, 2 + pixels)."""
    coordinates = asked.integers(1, 9, asked.batch, 16, 2).float()
    pixels = asked.normal(asked.batch, 16, asked.number("patch_embed_hidden_size"))
    return torch.cat([coordinates, pixels], dim=-1)


def _forecast_past(asked: Asked, width: int | None = None) -> Tensor:
    """Return series as long as a forecast looks back (batch, time, width, if there is one)."""
    length = asked.config.context_length + max(asked.config.lags_sequence)
    return asked.normal(asked.batch, length, *(() if width is None else (width,)))


def _categories(asked: Asked) -> Tensor | None:
    """Return the first of each category, if the model asks for categories (batch, categories)."""
    count = asked.config.num_static_categorical_features
    return 0 * ones(asked, count) if count else None


def _image_tokens_and_text(asked: Asked) -> Tensor:
    """Return a text after one image's tokens, as many as it has patches."""
    vision = vision_of(asked.config.vlm_config)
    count = (vision.image_size // vision.patch_size) ** 2
    image = torch.full((asked.batch, count), asked.config.vlm_config.image_token_id)
    return torch.cat([image, text(asked)], dim=1)


def _series(asked: Asked) -> Tensor | list[Tensor]:
    """Return series, as a tensor where a mask of the same shape says what is padding."""
    found = asked.normal(asked.batch, 64)
    return found if "past_values_padding" in asked.arguments else list(found)


def _perceived(asked: Asked) -> Tensor | None:
    """Return a text, or states where nothing makes states of a text; not beside an image."""
    if "pixel_values" in asked.arguments:
        return None
    if getattr(asked.model, "input_preprocessor", asked) is None:
        return asked.normal(asked.batch, TEXT_LENGTH, asked.config.d_model)
    return text(asked)


def _has_prenet(asked: Asked) -> bool:
    return any(hasattr(part, "prenet") for part in asked.model.modules())


def _spoken(asked: Asked) -> Tensor:
    """Return waveforms, or states where nothing makes states of a waveform."""
    return wave(asked) if _has_prenet(asked) else states(asked)


def _spoken_before(asked: Asked) -> Tensor:
    """Return the spectrograms that a decoder goes on from, or states likewise."""
    width = asked.config.num_mel_bins if _has_prenet(asked) else asked.config.hidden_size
    return asked.normal(asked.batch, _STEPS, width)


def _instead_of_text(asked: Asked) -> Tensor | None:
    """Return spectrograms, unless there is a text already and the forward takes one of the two."""
    return None if "input_ids" in asked.arguments else spectrogram(asked)


def _keys_and_values(asked: Asked) -> dict[str, tuple[Tensor, Tensor]]:
    """Return keys and values for the layers of each kind (batch, heads, length, width)."""
    found = {}
    part: Any
    for part in asked.model.modules():
        if hasattr(part, "layer_type") and hasattr(part, "num_key_value_groups"):
            heads = part.config.num_attention_heads // part.num_key_value_groups
            shape = (asked.batch, heads, TEXT_LENGTH, part.head_dim)
            found[part.layer_type] = (asked.normal(*shape), asked.normal(*shape))
    return found


_FORECAST: dict[str, Maker] = {
    "past_values": _forecast_past,
    "past_time_features": lambda asked: _forecast_past(asked, asked.config.num_time_features),
    "past_observed_mask": lambda asked: torch.ones_like(_forecast_past(asked)),
    "future_values": _normal("prediction_length"),
    "future_time_features": _normal("prediction_length", "num_time_features"),
    "static_categorical_features": _categories,
}

_TILED: Rules = {  # one image an example, in four tiles
    "pixel_values": lambda asked: asked.normal(asked.batch, 1, 4, *image_shape(asked)),
    "aspect_ratio_ids": lambda asked: ones(asked, 1),
    "aspect_ratio_mask": lambda asked: ones(asked, 1, 4),
}


def _each(kinds: str, **rules: Maker | None) -> dict[str, Rules]:
    return {kind: dict(rules) for kind in kinds.split()}


OF_TYPE: dict[str, Rules] = {
    # images: videos under the name of images, several images, pairs, patches in other shapes
    **_each("timesformer videomae vivit xclip", pixel_values=video),
    "tvp": {  # of the one size and length that a learned frame of pixels is laid over
        "pixel_values": _normal("num_frames", 3, "max_img_size", "max_img_size")
    },
    **_each(
        "idefics2 idefics3 smolvlm modernvbert ultravbert colmodernvbert", pixel_values=image_list
    ),
    **_each("efficientloftr lightglue superglue", pixel_values=_image_pair),
    **_each("kimi_k25 kimi_k25_vision paddleocr_vl", pixel_values=_square_patches),
    **_each("inkling2 inkling2_vision", pixel_values=_merged_patches),
    **_each("minicpm_ocr_vision minicpmv4_7_vision", pixel_values=_patch_row, target_sizes=_sizes),
    **_each("neomme molmo2 fuyu nemotron_h_omni", pixel_values=None),  # need its tokens in the text
    **_each("deepseek_ocr2 unlimited_ocr", pixel_values=None),  # two towers, views, separators
    **_each(
        "pp_ocrv5_server_rec pp_ocrv6_small_rec pp_ocrv6_tiny_rec",
        pixel_values=_normal(3, 48, 320),  # a line of text
    ),
    "pp_ocrv5_mobile_rec": {"pixel_values": _normal(3, 96, 320)},
    "vibevoice": {"input_values": None},  # a diffusion head makes the audio
    "speech-encoder-decoder": {"input_features": None},
    "musicgen_melody": {"input_features": _normal(FRAMES, 12), "decoder_input_ids": _codebook_rows},
    "pe_audio_video": {"input_values": _mono, "pixel_values_videos": _timm_video},
    "pe_audio_video_encoder": {"input_values": _mono, "pixel_values_videos": _timm_video},
    "perception_lm": {"pixel_values": lambda asked: _timm_video(asked, 1)},  # one tile
    "emu3": {"pixel_values": None},  # a tokenizer of a fixed width makes tokens of images
    "siglip2": {
        "pixel_attention_mask": lambda asked: ones(asked, GRID[1] * GRID[2]),
        "spatial_shapes": _sizes,
    },
    "depth_pro": {
        "pixel_values": lambda asked: asked.normal(
            asked.batch, 3, 4 * asked.config.patch_size, 4 * asked.config.patch_size
        )
    },
    "muse_spark": {"input_values": None},  # images need the same placeholders
    "glm_image": {"pixel_values": None, "image_grid_thw": None},  # wants a grid to draw, too
    **_each("pe_video pe_video_encoder", pixel_values_videos=_timm_video),
    "inkling_mm_model": {"pixel_values": _normal(2, 40, 40, 3)},
    "idefics": {
        "pixel_values": image_list,
        "image_attention_mask": lambda asked: ones(asked, TEXT_LENGTH, 1),
    },
    "granite_docling": {
        "pixel_values": image_list,
        "pixel_attention_mask": lambda asked: ones(asked, 1).bool(),
    },
    "instructblipvideo": {"pixel_values": lambda asked: image_list(asked).repeat(1, 4, 1, 1, 1)},
    "colqwen2": {"pixel_values": lambda asked: patches(asked).reshape(asked.batch, 64, -1)},
    "mllama_vision_model": _TILED,
    "mllama": {**_TILED, "cross_attention_mask": lambda asked: ones(asked, TEXT_LENGTH, 1, 4)},
    "gemma4_vision": {
        "pixel_values": lambda asked: asked.normal(
            asked.batch, 9 * 9, 3 * asked.number("patch_size") ** 2
        ),  # pooled in squares of 3 x 3
        "pixel_position_ids": lambda asked: torch.cartesian_prod(
            torch.arange(9), torch.arange(9)
        ).repeat(asked.batch, 1, 1),
    },
    "kosmos-2": {
        "input_ids": lambda asked: text(asked, 80),
        "attention_mask": lambda asked: ones(asked, 80),
        "image_embeds_position_mask": lambda asked: (
            (torch.arange(80) < asked.number("latent_query_num")).long().repeat(asked.batch, 1)
        ),
    },
    "flava": {"codebook_pixel_values": _normal(3, 112, 112), "bool_masked_pos": half_of_patches},
    "seggpt": dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), _half_image),
    "pix2struct": {"flattened_patches": _flattened_patches},
    "lxmert": {
        "visual_feats": _normal(5, "visual_feat_dim"),
        "visual_pos": _normal(5, "visual_pos_dim"),
    },
    "oneformer": {"task_inputs": _normal("task_seq_len")},
    "omdet-turbo": {
        "classes_input_ids": lambda asked: text(asked).repeat(2, 1),
        "classes_attention_mask": lambda asked: ones(asked).repeat(2, 1),
        "tasks_input_ids": text,
        "tasks_attention_mask": ones,
        "classes_structure": lambda asked: 2 * torch.ones(asked.batch, dtype=torch.int64),
    },
    "blip_2_qformer": {
        "query_embeds": _normal(8, "hidden_size"),
        "encoder_hidden_states": _normal(8, "encoder_hidden_size"),
    },
    # audio: a dimension of channels, features of another shape, codes of a codec
    **_each("mimi mimi_encoder encodec dac xcodec vibevoice_asr", input_values=_mono),
    **_each(
        "xcodec2 neucodec",
        input_values=_mono,
        input_features=_normal(_CODEC_SAMPLES // 320, 160),
        input_features_mask=None,
    ),
    **_each("pe_audio pe_audio_encoder", input_values=_mono),
    **_each("vibevoice_acoustic_tokenizer higgs_audio_v2_tokenizer", input_values=_mono),
    **_each("pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_encoder", input_values=_mono),
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": _mono},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": _latents},
    **_each("mimi_decoder pocket_tts_audio_tokenizer_decoder", latents=_latents),
    "audio-spectrogram-transformer": {"input_values": _normal("max_length", "num_mel_bins")},
    "clap": {"input_features": _normal(1, 1001, 64)},
    "clvp": {
        "input_features": lambda asked: asked.normal(
            asked.batch, asked.number("feature_size", default=80), FRAMES
        )
    },
    "gemma4_audio": {"input_features": _normal(FRAMES, 128)},
    "gemma3n": {  # the vocabularies of images and audio begin at fixed numbers
        "pixel_values": None,
        "input_features": None,
        "input_features_mask": None,
    },
    **_each("fun_asr_nano fun_asr_nano_encoder", input_features=_normal(FRAMES, 560)),
    **_each(
        "qwen3_asr qwen3_asr_encoder glmasr glmasr_encoder voxtral_realtime_encoder",
        input_features=_normal(128, FRAMES),  # channels first
    ),
    **_each(
        "granite_speech granite_speech_plus moss_transcribe_diarize qwen2_audio musicflamingo",
        input_features=None,  # need the lengths of the audio beside it
        input_features_mask=None,
        feature_attention_mask=None,
    ),
    "pop2piano": {
        "input_ids": None,
        "attention_mask": None,
        "input_features": lambda asked: asked.normal(asked.batch, FRAMES, asked.number("d_model")),
    },
    **_each("granite_speech5_ctc granite_speech5_encoder", input_features=_normal(FRAMES, 320)),
    "gemma3n_audio": {
        "audio_mel": lambda asked: asked.normal(
            asked.batch, FRAMES, asked.number("input_feat_size")
        ),
        "audio_mel_mask": lambda asked: torch.zeros(asked.batch, FRAMES, dtype=torch.bool),
    },
    "dots3_note": {
        "input_features": _normal("audio_config.feature_size", FRAMES),
        "chunk_sample_lengths": lambda asked: torch.full(
            (asked.batch,), FRAMES * asked.config.audio_config.hop_length
        ),
    },
    **_each("seamless_m4t seamless_m4t_v2", input_features=_instead_of_text),
    "speecht5": {
        "input_values": _spoken,
        "decoder_input_values": _spoken_before,
        "speaker_embeddings": _normal("speaker_embedding_dim"),
    },
    "dia": {"decoder_input_ids": lambda asked: _codes(asked, "num_channels")},
    "csm": {"input_ids": lambda asked: _codes(asked, "num_codebooks"), "attention_mask": None},
    "kyutai_speech_to_text": {
        "input_ids": lambda asked: _codes(asked, "num_codebooks").repeat(1, 1, 2)[:, :, :33],
        "attention_mask": None,
    },
    "musicgen": {"decoder_input_ids": _codebook_rows},
    **_each(
        "musicgen_decoder musicgen_melody_decoder", input_ids=_codebook_rows, attention_mask=None
    ),
    "voxtral_realtime": {"input_features": _normal(128, 8 * TEXT_LENGTH)},
    # time
    **_each("autoformer informer time_series_transformer", **_FORECAST),
    **_each("timesfm timesfm2_5", past_values=_series),
    "decision_transformer": {
        "states": _normal(_STEPS, "state_dim"),
        "actions": _normal(_STEPS, "act_dim"),
        "rewards": _normal(_STEPS, 1),
        "returns_to_go": _normal(_STEPS, 1),
        "timesteps": lambda asked: torch.arange(_STEPS).repeat(asked.batch, 1),
        "attention_mask": lambda asked: ones(asked, _STEPS),
    },
    # text
    "jev": {  # two questions after one prompt, each with two options
        "marks": lambda asked: torch.tensor([[4, TEXT_LENGTH - 1]]),
        "num_options": lambda asked: torch.tensor([[2, 2]]),
        "question_type_ids": lambda asked: torch.zeros(1, 2, dtype=torch.int64),
    },
    "gemma4_unified_assistant": {  # reads what another model has made of the text
        "input_ids": None,
        "inputs_embeds": lambda asked: asked.normal(
            asked.batch, TEXT_LENGTH, 2 * asked.config.backbone_hidden_size
        ),
        "shared_kv_states": _keys_and_values,
    },
    "splinter": {"input_ids": _question},
    "perceiver": {"inputs": _perceived, "input_ids": None},
    "muse_glimmer_assistant": {
        "noise_embeds": _normal("block_size", "hidden_size"),
        "context_hidden_states": lambda asked: asked.normal(
            asked.batch, TEXT_LENGTH, len(asked.config.target_layer_ids) * asked.config.hidden_size
        ),
    },
    # robots
    "pi0": {
        "input_ids": _image_tokens_and_text,
        "attention_mask": lambda asked: torch.ones_like(_image_tokens_and_text(asked)),
        "pixel_values": image_list,
        "pixel_attention_mask": lambda asked: ones(asked, 1).bool(),  # older releases index with it
        "state": _normal("max_state_dim"),
        "noise": _normal("chunk_size", "max_action_dim"),
        "timestep": lambda asked: torch.ones(asked.batch),
        "action_embeds": _normal("chunk_size", "dit_config.hidden_size"),
    },
}
