"""A model hub's cache, fabricated: tiny random models under the names that PEFT's tests ask for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig

REVISION = f"{1:040x}"
_WORDS = 1024
_POSITIONS = 512


class Model(NamedTuple):
    """One fabricated model.

    Attributes:
        auto: transformers' Auto class that builds it.
        config: Name of its configuration class.
        options: What the configuration is given.
        name: What the tests ask for.
        gain: Factor on the weights of layers; transformers' initial weights are so small that a
            mask on a model this tiny hardly moves its outputs.
    """

    auto: str
    config: str
    options: dict[str, Any]
    name: str
    gain: float = 4.0


_TINY = {
    "hidden_size": 16,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": _POSITIONS,
}
_GPT = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": _POSITIONS}
_SPARSE = {**_TINY, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
_GROUPED = {**_TINY, "num_key_value_heads": 2}


def _opt(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": _POSITIONS,
    }


_CAUSAL, _BARE = "AutoModelForCausalLM", "AutoModel"
_CLASSIFIER, _TRANSLATOR = "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"
_OWN, _HF, _TRL = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"

MODELS: tuple[Model, ...] = (
    Model(_CAUSAL, "OPTConfig", _opt(16, 5), f"{_OWN}/tiny-random-OPTForCausalLM"),
    Model(_CAUSAL, "OPTConfig", _opt(64, 12), f"{_OWN}/opt-125m", gain=2.0),
    Model(_CAUSAL, "GPT2Config", _GPT, f"{_OWN}/tiny-random-GPT2LMHeadModel"),
    Model(_CAUSAL, "GPTJConfig", {**_GPT, "rotary_dim": 4}, f"{_OWN}/tiny-random-GPTJForCausalLM"),
    Model(_CAUSAL, "LlamaConfig", _TINY, f"{_TRL}/tiny-random-LlamaForCausalLM"),
    Model(_CAUSAL, "Qwen2Config", _GROUPED, f"{_OWN}/tiny-dummy-qwen2"),
    Model(
        _CAUSAL,
        "Gemma3TextConfig",
        {**_GROUPED, "head_dim": 8, "sliding_window": 32},
        f"{_HF}/tiny-random-Gemma3ForCausalLM",
    ),
    Model(
        _CAUSAL,
        "Llama4TextConfig",
        {**_SPARSE, "intermediate_size_mlp": 32, "num_local_experts": 4},
        f"{_TRL}/tiny-Llama4ForCausalLM",
    ),
    Model(
        _CAUSAL,
        "GptOssConfig",
        {**_SPARSE, "num_local_experts": 4, "num_experts_per_tok": 2},
        f"{_TRL}/tiny-GptOssForCausalLM",
    ),
    Model(
        _TRANSLATOR,
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
        f"{_OWN}/tiny-random-T5ForConditionalGeneration-calibrated",
        gain=1.0,
    ),
    Model(
        _TRANSLATOR,
        "BartConfig",
        {"d_model": 16, "max_position_embeddings": 128}
        | {f"{part}_layers": 2 for part in ("encoder", "decoder")}
        | {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        | {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
        f"{_OWN}/tiny-random-BartForConditionalGeneration",
    ),
    Model(_BARE, "BertConfig", _TINY, f"{_OWN}/tiny-random-BertModel"),
    Model(_BARE, "RobertaConfig", _TINY, f"{_OWN}/tiny-random-RobertaModel"),
    Model(_BARE, "DebertaConfig", _TINY, f"{_OWN}/tiny-random-DebertaModel"),
    Model(_BARE, "DebertaV2Config", _TINY, f"{_OWN}/tiny-random-DebertaV2Model"),
    Model(_CLASSIFIER, "BertConfig", _TINY, f"{_OWN}/tiny-random-BertForSequenceClassification"),
    Model(
        _CLASSIFIER,
        "RobertaConfig",
        _TINY,
        f"{_OWN}/tiny-random-RobertaForSequenceClassification",
    ),
    Model(
        _CLASSIFIER,
        "LlamaConfig",
        {**_TINY, "num_labels": 1},
        f"{_TRL}/tiny-LlamaForSequenceClassification-3.2",
    ),
    Model(
        "AutoModelForImageClassification",
        "ResNetConfig",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]}
        | {"num_labels": 3},
        f"{_OWN}/tiny-random-ResNetForImageClassification",
        gain=1.0,
    ),
)
_IMAGES = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_pct": 0.875,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def build(home: Path) -> None:
    """Build every model of the table below ``home``/hub, as huggingface_hub lays its cache out."""
    for model in MODELS:
        _put(home, model.name, "main", _make(model).save_pretrained)
    adapter: Any = LoraConfig(target_modules=["q_proj", "v_proj"])
    _put(home, f"{_OWN}/tiny-opt-lora-revision", "test", adapter.save_pretrained)


def _make(model: Model) -> Any:
    words = {} if model.config == "ResNetConfig" else {"vocab_size": _WORDS}
    config = getattr(transformers, model.config)(**model.options, **words)
    torch.manual_seed(0)
    made = getattr(transformers, model.auto).from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(model.gain)
    return made


def _put(home: Path, name: str, reference: str, save: Callable[[Path], object]) -> None:
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.rmtree(root, ignore_errors=True)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / reference).write_text(REVISION)
    snapshot = root / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    save(snapshot)
    if "Image" in name:
        (snapshot / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
