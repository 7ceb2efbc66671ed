"""A random tiny model of every model type and head that transformers' Auto classes know."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from tests.zoo.transformers_settings import CLASSES, COMPOSED, FIRST_LEVEL, SETTINGS

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


def heads() -> dict[tuple[str, str], list[str]]:
    """Return what every class of every type is for, by type and class: "MULTIPLE_CHOICE", ..."""
    found: dict[tuple[str, str], list[str]] = {}
    for mapping, by_type in _mappings().items():
        task = re.sub("^MODEL_(FOR_)?|_?MAPPING_NAMES$", "", mapping) or "BASE"
        for model_type, names in by_type.items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault((model_type, name), []).append(task)
    return found


def build(model_type: str, class_name: str = "", *, seed: int = 0) -> nn.Module:
    """Build a random tiny instance of a type's class.

    Args:
        model_type: One of ``model_types()``.
        class_name: The class; the most complete one of the type, if it is not given.
        seed: Of the random weights; the global random state is left alone.

    Returns:
        The model on the CPU, float32, in eval mode.
    """
    model_class = _class_named(class_name) if class_name else find_class(model_type)
    levels = _levels_that_build(model_type, model_class)
    small = [level for level, parameters in levels if parameters <= MOST_PARAMETERS]
    level = small[0] if small else min(levels, key=lambda pair: pair[1])[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(_config_of(model_class, model_type, level)).float().eval()


def find_class(model_type: str) -> type[nn.Module]:
    """Return the class of a type that has most parts: with a head, if there is one.

    Raises:
        LookupError: No class of the type can run; says of each why.
    """
    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    mappings = _mappings()
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS_FIRST]
    last = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS_LAST]
    others = [name for name in mappings if name not in (*first, "MODEL_MAPPING_NAMES", *last)]
    problems = {}
    for mapping in (*first, *others, "MODEL_MAPPING_NAMES", *last):
        found = mappings[mapping].get(model_type)
        if found is not None:
            name = found if isinstance(found, str) else found[0]
            problems[name] = _why_not(name)
            if not problems[name]:
                return getattr(transformers, name)
    message = "; ".join(problems.values()) or f"no Auto class knows {model_type!r}"
    raise LookupError(message)


def _class_named(name: str) -> type[nn.Module]:
    problem = _why_not(name)
    if problem:
        raise LookupError(problem)
    return getattr(transformers, name)


def _why_not(name: str) -> str:
    """Return why a class of transformers cannot run, or ""."""
    model_class = getattr(transformers, name, None)
    if not isinstance(model_class, type):
        return f"transformers exports no {name}, so that AutoModel cannot build it either"
    try:
        forward = getattr(model_class, "forward", None)
    except ImportError as error:  # it stands for a class whose packages are missing
        return " ".join(str(error).split())
    if not issubclass(model_class, nn.Module) or forward is nn.Module.forward:
        return f"{name} has no forward"
    return ""


def _config_of(model_class: type[nn.Module], model_type: str, level: str) -> PreTrainedConfig:
    """Return a tiny config for a class, which may be for a part of the type alone."""
    config = tiny_config(model_type, level, model_class.__name__)
    kind = getattr(model_class, "config_class", None) or PreTrainedConfig
    return next((part for part in _parts(config) if isinstance(part, kind)), config)


def tiny_config(model_type: str, level: str = "widths", class_name: str = "") -> PreTrainedConfig:
    """Return a type's default config, shrunk as far as a level says, as a class needs it."""
    config = COMPOSED[model_type]() if model_type in COMPOSED else CONFIG_MAPPING[model_type]()
    for part in {id(part): part for part in _parts(config)}.values():
        _shrink(part, LEVELS.index(level))
    _keep_tokens_in_vocabulary(config)
    settings = {**SETTINGS.get(model_type, {}), **SETTINGS.get(class_name, {})}
    for path, value in settings.items():
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
                model = model_class(_config_of(model_class, model_type, level))
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
        if name == "num_feat_extract_layers":  # convolutions, which make a sequence short
            continue
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
    if count and values[name][0] > 2 and "depths" not in values:
        _set(config, name.removeprefix("_"), [2])
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
