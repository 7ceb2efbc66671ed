"""What single transformers types need beside the general rules of shrinking, and why."""

from typing import Any

from transformers import CONFIG_MAPPING


def _compose(method, first, second, **kwargs):
    """Return what makes the config of a type that is made of two others."""

    def compose():
        kind, name = method.split(".")
        make = getattr(CONFIG_MAPPING[kind], name)
        return make(CONFIG_MAPPING[first](), CONFIG_MAPPING[second](**kwargs))

    return compose


_DECODER = {"is_decoder": True, "add_cross_attention": True}
COMPOSED = {
    "encoder-decoder": _compose(
        "encoder-decoder.from_encoder_decoder_configs", "bert", "bert", **_DECODER
    ),
    "vision-encoder-decoder": _compose(
        "vision-encoder-decoder.from_encoder_decoder_configs", "vit", "gpt2", **_DECODER
    ),
    "speech-encoder-decoder": _compose(
        "speech-encoder-decoder.from_encoder_decoder_configs", "wav2vec2", "bert", **_DECODER
    ),
    "vision-text-dual-encoder": _compose(
        "vision-text-dual-encoder.from_vision_text_configs", "vit", "bert"
    ),
    # Its default is a configuration that it refuses. Of one that it takes every layer has to share
    # keys and values with another model, which gemma4_text in turn refuses to build.
    "gemma4_assistant": lambda: CONFIG_MAPPING["gemma4_assistant"](
        text_config=CONFIG_MAPPING["gemma4_text"](
            num_hidden_layers=2, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0
        )
    ),
}

# Types that build but do not run when they are shrunk further: widths that have to fit each other.
_KEEP_WIDTHS = (
    "align",
    "xcodec",
    "xcodec2",
    "neucodec",
    "edgetam",
    "sapiens2",
    "zoedepth",
    "bros",
    "clap",
    "d_fine",
    "deimv2",
    "edgetam_video",
    "encodec",
    "layoutlmv3",
    "lilt",
    "efficientloftr",
    "mobilebert",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "pp_ocrv5_mobile_rec",
    "pp_ocrv5_server_rec",
    "pp_ocrv6_small_rec",
    "pp_ocrv6_tiny_rec",
    "rf_detr",
    "rt_detr",
    "rt_detr_v2",
    "sam",
    "sam_hq",
    "sam2",
    "sam2_video",
    "sam2_vision_model",
    "sam2_hiera_det_model",
    "siglip",
    "siglip2",
    "vision-text-dual-encoder",
    "nemotron3_diarization",
    "blt",
    "clvp",
    "omdet-turbo",
)
FIRST_LEVEL: dict[str, str] = {
    **dict.fromkeys(_KEEP_WIDTHS, "experts"),
    **dict.fromkeys(("lightglue", "superglue"), "layers"),
    **dict.fromkeys(("uvdoc", "pp_ocrv6_small_det"), "nothing"),
}

# Types whose most complete class wants targets even in eval mode, or is not in its mapping.
CLASSES = {
    "sapiens2": "Sapiens2Model",
    "flava": "FlavaModel",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    # Its own class runs under torch.inference_mode on a session that keeps features between calls;
    # this is the one that sam3_video's mapping builds from the same configuration.
    "sam3_tracker_video": "Sam3TrackerModel",
}

# What a type needs beside the general rules, and why.
_FORECAST = {"prediction_length": 8, "context_length": 24}  # has no default
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_BY_LAYER = {"full_attention": dict(_ROPE), "sliding_attention": dict(_ROPE)}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 1000,
}
_LLAMA4_PROJECTOR = ("projector_input_dim", "projector_output_dim", "vision_output_dim")
_MERGED = {"out_hidden_size": 256}  # four patches side by side
_SEVEN_BY_SEVEN = {"mm_tokens_per_image": 49}
_EVEN_PATCHES = {"vision_config.image_size": 256}  # pixels are shuffled in squares
_INTRACLASS = {
    "kernel_list": [3, 2, 2],
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{name}_{ratio}ratio": [
                (1 if name.startswith("h") else side, 1 if name.startswith("v") else side),
                (1, 1),
                (
                    0 if name.startswith("h") else side // 2,
                    0 if name.startswith("v") else side // 2,
                ),
            ]
            for name in (
                "vertical_long_to_small_conv",
                "horizontal_small_to_long_conv",
                "symmetric_conv_long",
            )
            for ratio, side in (("long", 7), ("mid", 5), ("short", 3))
        },
    },
}
_FOUR_STAGES = {  # each half the size of the one before; by default they are made to read lines
    "backbone_config.out_features": [f"stage{n}" for n in range(1, 5)],
    "backbone_config.block_configs": [
        [[3, 96, 96, 1, True]],  # kernel, channels in and out, stride, squeeze and excite
        [[3, 96, 96, 2, False]],
        [[3, 96, 192, 2, False]],
        [[3, 192, 384, 2, False]],
    ],
}
_TINY_PE = {
    "vision_config.architecture": "vit_pe_core_tiny_patch16_384",
    "vision_config.model_args": {"depth": 2, "img_size": 64},
}
_DOTS_TEXT = {
    "head_dim": 64,  # a quarter is rotated: the rotary part of a head
    "per_layer_config": {2: {"kv_lora_rank": 16, "qk_nope_head_dim": 24}},
    "index_n_heads": 4,
    "index_head_dim": 32,
}
_MOE = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
SETTINGS: dict[str, dict[str, Any]] = {  # by type, or by class
    # no default, or one that does not build
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _FORECAST),
    # a random head under relu may give nothing but zeros; the other kind of head ends in a sigmoid
    "depth_anything": {"depth_estimation_type": "metric"},
    "prompt_depth_anything": {"depth_estimation_type": "metric"},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "chameleon": {
        "vq_config.num_embeddings": 10,
        "vocabulary_map": {
            "<image>": 5,
            "<|extra_200|>": 6,
            **{f"IMGIMG{'ABCDEFGHIJ'[n]}Z": 200 + n for n in range(10)},
        },
    },
    "emu3": {
        "vq_config.codebook_size": 10,
        "vocabulary_map": {
            "<image>": 5,
            "<|extra_200|>": 6,
            **{f"<|visual token {n:06d}|>": 200 + n for n in range(10)},
        },
    },
    "cohere_compass": {"text_config.rope_parameters": _BY_LAYER},
    "cohere_compass_text": {"rope_parameters": _BY_LAYER},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {f"text_config.{name}": value for name, value in _MOE.items()},
    "dots1": {
        "n_routed_experts": 4,
        "num_local_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "timm_backbone": {"backbone": "resnet18"},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "wav2vec2-conformer": {"vocab_size": 32},
    "wav2vec2-bert": {"vocab_size": 32},
    "moonshine_streaming": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "step3p7": {"text_config.sliding_window": 64},
    "blip-2": {"image_token_index": 1100},
    "instructblip": {"image_token_index": 1100},
    "instructblipvideo": {"video_token_index": 1100},
    "xmod": {"default_language": "en_XX"},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 1100},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 64},
    "gemma4_assistant": {"text_config.num_kv_shared_layers": 2},  # all, as it asks for
    "granite4_vision": {
        "text_config.num_hidden_layers": 5,
        "deepstack_layer_map": [(1, 0)],  # from a layer of the image's part to one of the text's
        "spatial_target_layers": [1, 2, 3, 4],
        "downsample_rate": "2/4",
        "vision_config.image_size": 256,
        "image_grid_pinpoints": [[256, 512]],
    },
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_tiny_patch16_384",
        "vision_config.model_args": {"embed_dim": 192, "depth": 2, "img_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    **{
        kind: {f"{part}rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
        for part, kinds in (
            ("", "qwen2_vl_text qwen2_5_vl_text glm4v_text glm_ocr_text glm_image_text"),
            (
                "text_config.",
                "qwen2_vl qwen2_5_vl glm4v glm46v glmga glm_ocr glm_image paddleocr_vl",
            ),
        )
        for kind in kinds.split()
    },
    **{
        kind: {
            f"{part}rope_parameters": {
                **_ROPE,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            }
        }
        for part, kind in (("", "glm4v_moe_text"), ("text_config.", "glm4v_moe"))
    },
    "llama4": {
        "vision_config.intermediate_size": 256,
        **{f"vision_config.{name}": 64 for name in _LLAMA4_PROJECTOR},
    },
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 1100,
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]},
    },
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],  # they share weights
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "hybrid_layer_ids": [1],
    },
    "mistral4": {"qk_rope_head_dim": 8, "qk_head_dim": 24},
    "rf_detr": {"backbone_config.image_size": 448},
    "colmodernvbert": {"vlm_config.vision_config.image_size": 256},
    "colqwen2": {"vlm_config.text_config.rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0, 1]},
    "voxtral": {"audio_token_id": 1100},
    "florence2": {"vision_config.projection_dim": 64},
    "gemma3n": {"vision_config.hidden_size": 2048},
    "mllama": {
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 192,
        "text_config.cross_attention_layers": [1],
    },
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "projector_in_channels": [64],
        "num_feature_levels": 1,
    },
    **dict.fromkeys(("muse_spark", "muse_glimmer"), _MERGED),
    "minimax_m3_vl": {"merged_hidden_size": 256},
    "fast_vlm": {"vision_config.architecture": "fastvit_t8", "vision_config.hidden_size": 768},
    **dict.fromkeys(("idefics3", "smolvlm", "modernvbert", "ultravbert"), _EVEN_PATCHES),
    "pp_ocrv5_server_det": _INTRACLASS,
    "pp_ocrv6_medium_det": {**_INTRACLASS, **_FOUR_STAGES},
    "pp_ocrv6_small_det": {**_FOUR_STAGES, "layer_list_out_channels": [96, 96, 192, 384]},
    "uvdoc": {"backbone_config.out_features": [f"stage{n}" for n in range(1, 7)]},
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "blt": {"encoder_hash_byte_group_vocab": 1000},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "aya_vision": {"vision_config.image_size": 364},
    "efficientnet": {
        "width_coefficient": 0.25,
        "hidden_dim": 320,
        "depth_coefficient": 0.1,
        "image_size": 64,
    },
    "vjepa2": {"frames_per_clip": 8, "crop_size": 64, "image_size": 64},
    "t5gemma2": {"encoder.mm_tokens_per_image": 49},
    "edgetam_vision_model": {"backbone_config.architecture": "repvit_m1"},
    "edgetam": {
        "vision_config.backbone_config.architecture": "repvit_m1",  # its default is misspelt
        "vision_config.backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
        "prompt_encoder_config.image_size": 256,
    },
    "depth_pro": {
        "intermediate_hook_ids": [1, 0],
        "patch_size": 64,
        "image_model_config.image_size": 64,
    },
    # what one class needs that others of its type do not have
    "Blip2ForImageTextRetrieval": {"qformer_config.use_qformer_text_input": True},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "ReformerModelWithLMHead": {"is_decoder": True},
    # tuples by default, where a configuration that was read from a file has lists
    "ConvNextBackbone": {"hidden_sizes": [96, 192, 384, 768]},
    "ConvNextV2Backbone": {"hidden_sizes": [96, 192, 384, 768]},
    "FocalNetBackbone": {"hidden_sizes": [192, 384, 768, 768]},
    "ShieldGemma2ForImageClassification": {"yes_token_index": 5, "no_token_index": 6},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "HieraForPreTraining": {
        "decoder_hidden_size": 64,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
    },
    "sapiens2": {
        "head_config.upsample_out_channels": [64, 32],
        "head_config.upsample_kernel_sizes": [4, 4],
        "head_config.conv_out_channels": [32],
        "head_config.conv_kernel_sizes": [1],
    },
    # numbers that have to fit others which the general rules have changed
    **dict.fromkeys(("gemma3", "shieldgemma2"), _SEVEN_BY_SEVEN),
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0, **_SEVEN_BY_SEVEN},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "aria": {"projector_patch_to_query_dict": {49: 16}},
    "reformer": {
        "axial_pos_embds_dim": (16, 48),
        "axial_pos_shape": (3, 4),  # the length of the text, in train mode
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "clvp": {"speech_config.vocab_size": 1200},  # reads what the decoder writes
    "dots3_note_text": _DOTS_TEXT,
    "dots3_note": {
        **{f"text_config.{name}": value for name, value in _DOTS_TEXT.items()},
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "vision_config.per_layer_config": {1: {"num_local_experts": 4}},
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
        "audio_config.conv_output_size": 512,
        "audio_config.samples_per_token": 1280,
    },
    "tvp": {"num_frames": 2, "max_img_size": 224},
    "pe_video_encoder": _TINY_PE,
    **{
        kind: {f"{part}.{name}": value for name, value in _TINY_PE.items()}
        for kind, part in (
            ("pe_video", "video_config"),
            ("pe_audio_video_encoder", "video_config"),
            ("pe_audio_video", "audio_video_config.video_config"),
        )
    },
}
