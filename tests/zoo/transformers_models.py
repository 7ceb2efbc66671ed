"""A random tiny model of every model type that transformers' Auto classes know.

    python -m tests.zoo.transformers_models results.jsonl [type ...]

builds each one, makes its example inputs, runs it twice and prints one line a type.
"""

import copy
import json
import multiprocessing
import re
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from pemn_surgery.inputs import example_inputs

MOST_PARAMETERS = 40_000_000
WIDTH, FEED_FORWARD, HEADS, KEY_VALUE_HEADS, HEAD_WIDTH = 64, 128, 4, 2, 16
EXPERTS, EXPERTS_USED, VOCABULARY = 4, 2, 1200
LEVELS = ("widths", "experts", "vocabulary", "layers", "nothing")  # each shrinks what follows too

# The most complete class of a type comes first; what needs unusual inputs or drops parts, last.
HEADS_FIRST = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "RNNT",
    "TDT",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "TIME_SERIES_PREDICTION",
    "TEXT_TO_SPECTROGRAM",
    "PRETRAINING",
)
HEADS_LAST = ("BACKBONE", "AUDIO_XVECTOR", "MULTIPLE_CHOICE")


def model_types() -> list[str]:
    """Return every model type of transformers' Auto mappings, in a fixed order."""
    return list(dict.fromkeys(name for mapping in _mappings().values() for name in mapping))


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Build a random tiny instance of a type's most complete class.

    Args:
        model_type: One of ``model_types()``.
        seed: Of the random weights; the global random state is left alone.

    Returns:
        The model on the CPU, float32, in eval mode.
    """
    model_class = find_class(model_type)
    levels = _levels_that_build(model_type, model_class)
    small = [level for level, parameters in levels if parameters <= MOST_PARAMETERS]
    level = small[0] if small else min(levels, key=lambda pair: pair[1])[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(tiny_config(model_type, level)).float().eval()


def find_class(model_type: str) -> type[nn.Module]:
    """Return the class of a type that has most parts: with a head, if there is one."""
    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    mappings = _mappings()
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS_FIRST]
    last = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS_LAST]
    others = [name for name in mappings if name not in (*first, "MODEL_MAPPING_NAMES", *last)]
    for name in (*first, *others, "MODEL_MAPPING_NAMES", *last):
        found = mappings[name].get(model_type)
        if found is not None:
            model_class = getattr(transformers, found if isinstance(found, str) else found[0], None)
            if _can_run(model_class):
                return model_class
    message = f"transformers has no model of type {model_type!r}"
    raise KeyError(message)


def _can_run(model_class: Any) -> bool:
    """Tell whether a class is there (its packages are installed) and has a forward."""
    there = isinstance(model_class, type) and issubclass(model_class, nn.Module)
    return there and model_class.forward is not nn.Module.forward


def tiny_config(model_type: str, level: str = "widths") -> PreTrainedConfig:
    """Return a type's default config, shrunk as far as a level says."""
    config = COMPOSED[model_type]() if model_type in COMPOSED else CONFIG_MAPPING[model_type]()
    for part in {id(part): part for part in _parts(config)}.values():
        _shrink(part, LEVELS.index(level))
    _keep_tokens_in_vocabulary(config)
    for path, value in SETTINGS.get(model_type, {}).items():
        *way, name = path.split(".")
        part = config
        for step in way:
            part = getattr(part, step)
        setattr(part, name, copy.deepcopy(value))
    return config


def _mappings() -> dict[str, dict[str, Any]]:
    found = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)]
    return {name: getattr(modeling_auto, name) for name in sorted(found, reverse=True)}


def _levels_that_build(model_type: str, model_class: type[nn.Module]) -> list[tuple[str, int]]:
    """Return the levels at which a model can be built, with its number of parameters.

    Stops at the first level that is small enough; building on the meta device costs nothing.
    """
    found, problems = [], []
    for level in LEVELS[LEVELS.index(FIRST_LEVEL.get(model_type, LEVELS[0])) :]:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                model = model_class(tiny_config(model_type, level))
        except Exception as error:  # whatever a config's own checks or a constructor raise
            problems.append(error)
            continue
        found.append((level, sum(tensor.numel() for tensor in model.parameters())))
        if found[-1][1] <= MOST_PARAMETERS:
            return found
    if not found:
        raise problems[0]
    return found


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and every config inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


LAYERS = re.compile(
    r"(num|n|encoder|decoder)_(hidden_)?(layers?|blocks)|depth|layers|[lxr]_layers"
    r"|num_.*_(layers|blocks)|n_\w*layers?|.*_(num_layers|num_hidden_layers|layers_num|n_layers)"
    r"|(vision|text|encoder|decoder)_layers?|num_layer|.*_depth"
)
WIDTHS = re.compile(
    r"(.*_)?hidden_(size|dim)|d_model|n_embd|dim_model|dim|(.*_)?(embed_dim|embedding_size)|projection_dim"
    r"|word_embed_proj_dim|feature_size|output_dim|embedding_dim|emb_dim|lru_width"
)
FEED_FORWARDS = re.compile(
    r".*intermediate_(size|dim).*|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size"
    r"|feedforward_dim|dim_feedforward|mlp_dim|ff_dim|ffn_size|.*feed_forward_size|.*mlp_hidden_size"
)
EXPERT_COUNTS = re.compile(r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts")
EXPERT_CHOICES = re.compile(
    r"num_experts_per_tok(en)?|top_k_experts|moe_top_?k|moe_k|experts_per_token|router_top_k"
)
SMALL_NUMBERS = {  # by name, at the first level
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KEY_VALUE_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), HEAD_WIDTH),
    "qk_head_dim": 2 * HEAD_WIDTH,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    # Mamba: heads x width of a head = expansion (2) x hidden size
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_WIDTH),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD_WIDTH),
}
STAGES = re.compile(r"depths|hidden_sizes|.*embed_dims|.*_per_stage|.*channel_list|.*_channels")
SHAPES_OF_STAGES = re.compile(r"kernel|stride|patch|size|channel|dilation|upsampl|conv_dim|ratio")


def _shrink(config: PreTrainedConfig, level: int) -> None:
    """Shrink one config, not those inside it."""
    if level <= LEVELS.index("layers"):
        _shrink_layers(config)
    if level <= LEVELS.index("vocabulary"):
        _shrink_vocabulary(config)
    if level <= LEVELS.index("experts"):
        _shrink_experts(config)
    if level <= LEVELS.index("widths"):
        _shrink_widths(config)


def _shrink_layers(config: PreTrainedConfig) -> None:
    values = dict(vars(config))
    if isinstance(values.get("depths"), (list, tuple)):  # stages: one block each
        _set(config, "depths", type(values["depths"])([1] * len(values["depths"])))
        return
    taken = _layers_taken(config, values)
    kept = list(range(taken)) if taken else _layers_to_keep(values)
    for name, value in values.items():
        if _is_count(value) and LAYERS.fullmatch(name) and value > len(kept):
            _set(config, name, len(kept))
        elif isinstance(value, (list, tuple)) and name in _lists_of_layers(values):
            _set(config, name, type(value)([value[place] for place in kept]))
    if _is_count(values.get("num_kv_shared_layers")):
        _set(config, "num_kv_shared_layers", 0)  # the layers that share are gone
    dense = values.get("first_k_dense_replace")
    if _is_count(dense) and dense >= len(kept):
        _set(config, "first_k_dense_replace", 1)


def _layers_taken(config: PreTrainedConfig, values: dict[str, Any]) -> int:
    """Let a neck take its inputs from the first layers, and return how many it takes (or 0)."""
    name = next((n for n in ("backbone_out_indices", "_out_indices") if values.get(n)), "")
    count = len(values[name]) if name else 0
    if count > 1:
        _set(config, name.removeprefix("_"), list(range(1, count + 1)))
        return count + 1
    return 0


def _layers_to_keep(values: dict[str, Any]) -> list[int]:
    """Return the first layer of each kind, two layers at least."""
    lists = _lists_of_layers(values)
    if not lists:
        return [0, 1]
    kinds = list(zip(*(values[name] for name in lists), strict=True))
    names = [tuple(kind for kind in layer if isinstance(kind, (str, bool))) for layer in kinds]
    first = {names.index(name) for name in names}
    spare = (place for place in range(len(kinds)) if place not in first)
    while len(first) < 2:
        first.add(next(spare))
    return sorted(first)


def _lists_of_layers(values: dict[str, Any]) -> list[str]:
    """Return the names of lists that hold one entry a layer."""
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
    layers = next((values[name] for name in names if _is_count(values.get(name))), 0)
    return [
        name
        for name, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) == layers > 2
        and not SHAPES_OF_STAGES.search(name)
    ]


def _shrink_vocabulary(config: PreTrainedConfig) -> None:
    for name in ("vocab_size", "n_vocab", "n_words", "entity_vocab_size"):
        _lower(config, name, VOCABULARY)
    _lower(config, "vocab_size_per_layer_input", VOCABULARY)


def _shrink_experts(config: PreTrainedConfig) -> None:
    for name in list(vars(config)):
        if EXPERT_COUNTS.fullmatch(name):
            _lower(config, name, EXPERTS)
        elif EXPERT_CHOICES.fullmatch(name):
            _lower(config, name, EXPERTS_USED)
        elif FEED_FORWARDS.fullmatch(name):
            _lower(config, name, FEED_FORWARD)
        elif name in ("n_group", "topk_group", "num_expert_group"):
            _lower(config, name, 1)


def _shrink_widths(config: PreTrainedConfig) -> None:
    values = dict(vars(config))
    if any(STAGES.fullmatch(name) and isinstance(values[name], (list, tuple)) for name in values):
        return  # the widths of stages fit each other
    grouped = values.get("num_key_value_heads") != values.get("num_attention_heads")
    for name in values:
        if WIDTHS.fullmatch(name):
            _lower(config, name, WIDTH)
        elif name in ("num_key_value_heads", "num_kv_heads"):
            _lower(config, name, KEY_VALUE_HEADS if grouped else HEADS)
        elif name in SMALL_NUMBERS:
            _lower(config, name, SMALL_NUMBERS[name])
        elif name == "upsample_groups":  # of a convolution that has one group a channel
            _lower(config, name, WIDTH)
    for name, small in (("head_dim", HEAD_WIDTH), ("num_key_value_heads", HEADS)):
        if name in values and values[name] is None:
            _set(config, name, small)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict):
            _shrink_rotary_sections(values[name], values)


def _shrink_rotary_sections(rope: dict[str, Any], before: dict[str, Any]) -> None:
    """Fit the sections of a multi-axis rotary embedding, which add up to half a head's width."""
    sections = rope.get("mrope_section")
    if not sections:
        return
    width = before.get("head_dim") or before["hidden_size"] // before["num_attention_heads"]
    total = max(sum(sections) * HEAD_WIDTH // width, len(sections))
    rest = total // (len(sections) + 1)
    rope["mrope_section"] = [total - rest * (len(sections) - 1)] + [rest] * (len(sections) - 1)


def _keep_tokens_in_vocabulary(config: PreTrainedConfig) -> None:
    """Give special tokens that the smaller vocabulary has lost a new, distinct number."""
    sizes = [getattr(part, "vocab_size", None) for part in _parts(config)]
    shared = min((size for size in sizes if _is_count(size)), default=None)
    renamed: dict[int, int] = {}

    def fit(token: int, vocabulary: int) -> int:
        if token < vocabulary:
            return token
        return renamed.setdefault(token, max(vocabulary - 1 - len(renamed), 0))

    for part in _parts(config):
        own = getattr(part, "vocab_size", None)
        size = own if _is_count(own) else shared
        if size is None:
            continue
        for name, value in list(vars(part).items()):
            if not re.search(r"_(token_id|token_index|token|id)$", name):
                continue
            if _is_count(value):
                _set(part, name, fit(value, size))
            elif isinstance(value, list) and value and all(_is_count(item) for item in value):
                _set(part, name, [fit(item, size) for item in value])


def _lower(config: PreTrainedConfig, name: str, most: int) -> None:
    value = vars(config).get(name)
    if _is_count(value) and value > most:
        _set(config, name, most)


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property without a setter, or one that refuses: keep what is there
        return


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _compose(method: str, first: str, second: str, **kwargs: Any) -> Callable[[], PreTrainedConfig]:
    """Return what makes the config of a type that is made of two others."""

    def compose() -> PreTrainedConfig:
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
}

# Types that build but do not run when they are shrunk further: widths that have to fit each other.
_KEEP_WIDTHS = (
    "align",
    "bros",
    "clap",
    "d_fine",
    "deimv2",
    "edgetam_video",
    "encodec",
    "layoutlmv3",
    "lilt",
    "lightglue",
    "efficientloftr",
    "mobilebert",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "pp_ocrv5_mobile_rec",
    "pp_ocrv5_server_rec",
    "pp_ocrv6_small_det",
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
    "sew",
    "sew-d",
    "siglip",
    "uvdoc",
    "vision-text-dual-encoder",
    "emu3",
    "nemotron3_diarization",
    "blt",
    "clvp",
    "omdet-turbo",
)
FIRST_LEVEL: dict[str, str] = dict.fromkeys(_KEEP_WIDTHS, "experts")

# Types whose most complete class wants targets even in eval mode, or is not in its mapping.
CLASSES = {
    "flava": "FlavaModel",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
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
_EVEN_PATCHES = {"vision_config.image_size": 256}  # pixels are shuffled in squares
_INTRACLASS = {
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
    }
}
_MOE = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    # no default, or one that does not build
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _FORECAST),
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "chameleon": {
        "vq_config.num_embeddings": 10,
        "vocabulary_map": {
            "<image>": 5,
            **{f"IMGIMG{'ABCDEFGHIJ'[n]}Z": 200 + n for n in range(10)},
        },
    },
    "emu3": {
        "vq_config.codebook_size": 10,
        "vocabulary_map": {
            "<image>": 5,
            **{f"<|visual token {n:06d}|>": 200 + n for n in range(10)},
        },
    },
    "cohere_compass": {"text_config.rope_parameters": _BY_LAYER},
    "cohere_compass_text": {"rope_parameters": _BY_LAYER},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
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
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
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
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
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
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "hybrid_layer_ids": [1],
    },
    "mistral4": {"qk_rope_head_dim": 8, "qk_head_dim": 24},
    "rf_detr": {"backbone_config.image_size": 448},
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "projector_in_channels": [64],
        "num_feature_levels": 1,
    },
    **dict.fromkeys(("muse_spark", "muse_glimmer"), _MERGED),
    "minimax_m3_vl": {"merged_hidden_size": 256},
    "fast_vlm": {"vision_config.hidden_size": 3072},
    **dict.fromkeys(
        ("idefics3", "smolvlm", "modernvbert", "ultravbert", "colmodernvbert"), _EVEN_PATCHES
    ),
    **dict.fromkeys(("pp_ocrv6_medium_det", "pp_ocrv5_server_det"), _INTRACLASS),
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "blt": {"encoder_hash_byte_group_vocab": 1000},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "aya_vision": {"vision_config.image_size": 364},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 64},
    "vjepa2": {"frames_per_clip": 8, "crop_size": 64, "image_size": 64},
    "t5gemma2": {"encoder.mm_tokens_per_image": 49},
    "edgetam_vision_model": {"backbone_channel_list": [2048, 1024, 512, 256]},
    "edgetam": {"vision_config.backbone_channel_list": [2048, 1024, 512, 256]},
    "depth_pro": {"patch_size": 64, "image_model_config.image_size": 64},
    # numbers that have to fit others which the general rules have changed
    "gemma3": {"mm_tokens_per_image": 49},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "aria": {"projector_patch_to_query_dict": {49: 16}},
    "reformer": {"axial_pos_embds_dim": (16, 48)},
}


SECONDS, BYTES = 300, 8 << 30  # that one type may take


def check(model_type: str) -> dict[str, Any]:
    """Build a type, run it twice on its example inputs and say what happened.

    Returns:
        The type, its class, its parameters, shapes of its inputs, and "stage": the first of
        build, inputs and forward that failed (with "error"), or "runs"; "equal" tells whether
        two runs with the same seed gave the same numbers, "finite" whether all were finite.
    """
    result: dict[str, Any] = {"type": model_type, "stage": "build"}
    start = time.perf_counter()
    try:
        model = build(model_type)
        result["class"] = type(model).__name__
        result["parameters"] = sum(tensor.numel() for tensor in model.parameters())
        result["stage"] = "inputs"
        inputs = example_inputs(model)
        result["inputs"] = {name: list(getattr(v, "shape", ())) for name, v in inputs.items()}
        result["stage"] = "forward"
        first, second = (_tensors_of(_run(model, inputs)) for _ in range(2))
        result["stage"] = "runs"
        result["equal"] = all(
            torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
            for one, other in zip(first, second, strict=True)
        )
        result["finite"] = all(bool(torch.isfinite(one).all()) for one in first)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"[:400]
        result["where"] = _where(error)
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def _run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)


def _tensors_of(output: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _where(error: BaseException) -> str:
    """Return the innermost lines of transformers that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/torch/" not in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[-1:-4:-1])


def _check_apart(model_type: str) -> dict[str, Any]:
    """Check a type in a process of its own, with limits on time and memory."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_check, args=(model_type, there))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(SECONDS) else {"error": f"more than {SECONDS} seconds"}
    except EOFError:
        found = {"error": "the process died"}
    process.kill()
    process.join()
    return {"type": model_type, "stage": "process", **found}


def _send_check(model_type: str, there: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    there.send(check(model_type))


def main(path: Path, types: list[str]) -> None:
    """Check types, one line each, and keep the results; those in the file are not checked again."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    done = path.read_text().splitlines() if path.exists() else []
    seen = {json.loads(line)["type"] for line in done}
    for warm in ("llama", "vit", "whisper", "qwen2_vl"):
        build(warm)
    with path.open("a") as file:
        for model_type in types or model_types():
            if model_type not in seen:
                result = _check_apart(model_type)
                file.write(json.dumps(result) + "\n")
                file.flush()
                told = result.get("error", "") or f"equal={result['equal']}"
                print(model_type, result["stage"], result.get("class", ""), told)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
