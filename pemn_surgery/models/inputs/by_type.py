"""What single transformers types take differently, or more than their signature says.

A maker for an argument of a type replaces the general one; None: the argument is not given.
"""

import torch

from pemn_surgery.models.inputs import of_few as few
from pemn_surgery.models.inputs.arguments import (
    FRAMES,
    GRID,
    TEXT_LENGTH,
    Maker,
    half_of_patches,
    image_list,
    image_shape,
    ones,
    patches,
    text,
    video,
)

ONE_AT_A_TIME = ("tvp", "jev")  # types whose forward takes a batch of one only


_FORECAST: dict[str, Maker] = {
    "past_values": few.forecast_past,
    "past_time_features": lambda asked: few.forecast_past(asked, asked.config.num_time_features),
    "past_observed_mask": lambda asked: torch.ones_like(few.forecast_past(asked)),
    "future_values": lambda asked: asked.normal(asked.batch, asked.config.prediction_length),
    "future_time_features": lambda asked: asked.normal(
        asked.batch, asked.config.prediction_length, asked.config.num_time_features
    ),
    "static_categorical_features": few.categories,
}

Rules = dict[str, Maker | None]

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
    "tvp": {"pixel_values": few.prompted_video},
    **_each(
        "idefics2 idefics3 smolvlm modernvbert ultravbert colmodernvbert", pixel_values=image_list
    ),
    **_each("efficientloftr lightglue superglue", pixel_values=few.image_pair),
    **_each("kimi_k25 kimi_k25_vision paddleocr_vl", pixel_values=few.square_patches),
    **_each("inkling2 inkling2_vision", pixel_values=few.merged_patches),
    **_each(
        "minicpm_ocr_vision minicpmv4_7_vision", pixel_values=few.patch_row, target_sizes=few.sizes
    ),
    **_each("neomme molmo2 fuyu nemotron_h_omni", pixel_values=None),  # need its tokens in the text
    **_each("deepseek_ocr2 unlimited_ocr", pixel_values=None),  # two towers, views, separators
    **_each(
        "pp_ocrv5_server_rec pp_ocrv6_small_rec pp_ocrv6_tiny_rec",
        pixel_values=lambda asked: asked.normal(asked.batch, 3, 48, 320),  # a line of text
    ),
    "pp_ocrv5_mobile_rec": {"pixel_values": lambda asked: asked.normal(asked.batch, 3, 96, 320)},
    "vibevoice": {"input_values": None},  # a diffusion head makes the audio
    "speech-encoder-decoder": {"input_features": None},
    "musicgen_melody": {
        "input_features": lambda asked: asked.normal(asked.batch, FRAMES, 12),
        "decoder_input_ids": few.codebook_rows,
    },
    "pe_audio_video": {"input_values": few.mono, "pixel_values_videos": few.timm_video},
    "pe_audio_video_encoder": {"input_values": few.mono, "pixel_values_videos": few.timm_video},
    "perception_lm": {"pixel_values": lambda asked: few.timm_video(asked, 1)},  # one tile
    "emu3": {"pixel_values": None},  # a tokenizer of a fixed width makes tokens of images
    "siglip2": {
        "pixel_attention_mask": lambda asked: ones(asked, GRID[1] * GRID[2]),
        "spatial_shapes": few.sizes,
    },
    "depth_pro": {
        "pixel_values": lambda asked: asked.normal(
            asked.batch, 3, 4 * asked.config.patch_size, 4 * asked.config.patch_size
        )
    },
    "muse_spark": {"input_values": None},  # images need the same placeholders
    "glm_image": {"pixel_values": None, "image_grid_thw": None},  # wants a grid to draw, too
    **_each("pe_video pe_video_encoder", pixel_values_videos=few.timm_video),
    "inkling_mm_model": {"pixel_values": lambda asked: asked.normal(asked.batch, 2, 40, 40, 3)},
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
    "mllama": {
        **_TILED,
        "cross_attention_mask": lambda asked: ones(asked, TEXT_LENGTH, 1, 4),
    },
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
    "flava": {
        "codebook_pixel_values": lambda asked: asked.normal(asked.batch, 3, 112, 112),
        "bool_masked_pos": half_of_patches,
    },
    "seggpt": dict.fromkeys(
        ("pixel_values", "prompt_pixel_values", "prompt_masks"), few.half_image
    ),
    "pix2struct": {"flattened_patches": few.flattened_patches},
    "lxmert": {
        "visual_feats": lambda asked: asked.normal(asked.batch, 5, asked.config.visual_feat_dim),
        "visual_pos": lambda asked: asked.normal(asked.batch, 5, asked.config.visual_pos_dim),
    },
    "oneformer": {
        "task_inputs": lambda asked: asked.normal(asked.batch, asked.config.task_seq_len)
    },
    "omdet-turbo": {
        "classes_input_ids": lambda asked: text(asked).repeat(2, 1),
        "classes_attention_mask": lambda asked: ones(asked).repeat(2, 1),
        "tasks_input_ids": text,
        "tasks_attention_mask": ones,
        "classes_structure": lambda asked: 2 * torch.ones(asked.batch, dtype=torch.int64),
    },
    "blip_2_qformer": {
        "query_embeds": lambda asked: asked.normal(asked.batch, 8, asked.config.hidden_size),
        "encoder_hidden_states": lambda asked: asked.normal(
            asked.batch, 8, asked.config.encoder_hidden_size
        ),
    },
    # audio: a dimension of channels, features of another shape, codes of a codec
    **_each("mimi mimi_encoder encodec dac xcodec vibevoice_asr", input_values=few.mono),
    **_each(
        "xcodec2 neucodec",
        input_values=few.mono,
        input_features=lambda asked: asked.normal(asked.batch, few.CODEC_SAMPLES // 320, 160),
        input_features_mask=None,
    ),
    **_each("pe_audio pe_audio_encoder", input_values=few.mono),
    **_each("vibevoice_acoustic_tokenizer higgs_audio_v2_tokenizer", input_values=few.mono),
    **_each("pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_encoder", input_values=few.mono),
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": few.mono},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": few.latents},
    **_each("mimi_decoder pocket_tts_audio_tokenizer_decoder", latents=few.latents),
    "audio-spectrogram-transformer": {
        "input_values": lambda asked: asked.normal(
            asked.batch, asked.config.max_length, asked.config.num_mel_bins
        )
    },
    "clap": {"input_features": lambda asked: asked.normal(asked.batch, 1, 1001, 64)},
    "clvp": {
        "input_features": lambda asked: asked.normal(
            asked.batch, asked.number("feature_size", default=80), FRAMES
        )
    },
    "gemma4_audio": {"input_features": lambda asked: asked.normal(asked.batch, FRAMES, 128)},
    "gemma3n": {  # the vocabularies of images and audio begin at fixed numbers
        "pixel_values": None,
        "input_features": None,
        "input_features_mask": None,
    },
    **_each(
        "fun_asr_nano fun_asr_nano_encoder",
        input_features=lambda asked: asked.normal(asked.batch, FRAMES, 560),
    ),
    **_each(
        "qwen3_asr qwen3_asr_encoder glmasr glmasr_encoder voxtral_realtime_encoder",
        input_features=lambda asked: asked.normal(asked.batch, 128, FRAMES),  # channels first
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
    **_each(
        "granite_speech5_ctc granite_speech5_encoder",
        input_features=lambda asked: asked.normal(asked.batch, FRAMES, 320),
    ),
    "gemma3n_audio": {
        "audio_mel": lambda asked: asked.normal(
            asked.batch, FRAMES, asked.number("input_feat_size")
        ),
        "audio_mel_mask": lambda asked: torch.zeros(asked.batch, FRAMES, dtype=torch.bool),
    },
    "dots3_note": {
        "input_features": lambda asked: asked.normal(
            asked.batch, asked.config.audio_config.feature_size, FRAMES
        ),
        "chunk_sample_lengths": lambda asked: torch.full(
            (asked.batch,), FRAMES * asked.config.audio_config.hop_length
        ),
    },
    **_each("seamless_m4t seamless_m4t_v2", input_features=few.instead_of_text),
    "speecht5": {
        "input_values": few.spoken,
        "decoder_input_values": few.spoken_before,
        "speaker_embeddings": lambda asked: asked.normal(
            asked.batch, asked.config.speaker_embedding_dim
        ),
    },
    "dia": {"decoder_input_ids": lambda asked: few.codes(asked, "num_channels")},
    "csm": {"input_ids": lambda asked: few.codes(asked, "num_codebooks"), "attention_mask": None},
    "kyutai_speech_to_text": {
        "input_ids": lambda asked: few.codes(asked, "num_codebooks").repeat(1, 1, 2)[:, :, :33],
        "attention_mask": None,
    },
    "musicgen": {"decoder_input_ids": few.codebook_rows},
    **_each(
        "musicgen_decoder musicgen_melody_decoder", input_ids=few.codebook_rows, attention_mask=None
    ),
    "voxtral_realtime": {
        "input_features": lambda asked: asked.normal(asked.batch, 128, 8 * TEXT_LENGTH)
    },
    # time
    **_each("autoformer informer time_series_transformer", **_FORECAST),
    **_each("timesfm timesfm2_5", past_values=few.series),
    "decision_transformer": {
        "states": lambda asked: asked.normal(asked.batch, few.STEPS, asked.config.state_dim),
        "actions": lambda asked: asked.normal(asked.batch, few.STEPS, asked.config.act_dim),
        "rewards": lambda asked: asked.normal(asked.batch, few.STEPS, 1),
        "returns_to_go": lambda asked: asked.normal(asked.batch, few.STEPS, 1),
        "timesteps": lambda asked: torch.arange(few.STEPS).repeat(asked.batch, 1),
        "attention_mask": lambda asked: ones(asked, few.STEPS),
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
        "shared_kv_states": few.keys_and_values,
    },
    "splinter": {"input_ids": few.question},
    "perceiver": {"inputs": few.perceived, "input_ids": None},
    "muse_glimmer_assistant": {
        "noise_embeds": lambda asked: asked.normal(
            asked.batch, asked.config.block_size, asked.config.hidden_size
        ),
        "context_hidden_states": lambda asked: asked.normal(
            asked.batch,
            TEXT_LENGTH,
            len(asked.config.target_layer_ids) * asked.config.hidden_size,
        ),
    },
    # robots
    "pi0": {
        "input_ids": few.image_tokens_and_text,
        "attention_mask": lambda asked: torch.ones_like(few.image_tokens_and_text(asked)),
        "pixel_values": image_list,
        "pixel_attention_mask": lambda asked: ones(asked, 1).bool(),  # older releases index with it
        "state": lambda asked: asked.normal(asked.batch, asked.config.max_state_dim),
        "noise": lambda asked: asked.normal(
            asked.batch, asked.config.chunk_size, asked.config.max_action_dim
        ),
        "timestep": lambda asked: torch.ones(asked.batch),
        "action_embeds": lambda asked: asked.normal(
            asked.batch, asked.config.chunk_size, asked.config.dit_config.hidden_size
        ),
    },
}
