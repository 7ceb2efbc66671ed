"""Which configurations go into which tables of PEFT's tests.

PEFT's tests are parametrised by tables at the top of each file. `TABLES` says what each table holds
in a run of ours; the plugin puts it there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from pemn_surgery import PemnConfig

Row = Any  # what pytest.param returns
Options = dict[str, Any]

# Barely above the threshold: the model starts as it was, and one step of training changes it.
_IDENTITY: Options = {"selector": "threshold", "score_init": 1e-8}

# Banks of the model's own values leave a model as it was where all its targets have one shape.
VARIANTS: dict[str, Options] = {
    "own-threshold": {"bank": "own", **_IDENTITY},
    "own-topk": {"bank": "own", "selector": "topk"},
    "mp-threshold": {"bank": "mp", "bank_init": "model", **_IDENTITY},
    "rp-threshold": {"bank": "rp", "bank_init": "model", "ratio": 1.0, **_IDENTITY},
    "one_layer-threshold": {"bank": "one_layer", "bank_init": "model", **_IDENTITY},
    "mp-topk": {"bank": "mp", "selector": "topk"},
    "rp-topk": {"bank": "rp", "selector": "topk"},
    "one_layer-topk": {"bank": "one_layer", "selector": "topk"},
}
MAIN = "own-threshold"

# Targets of PEFT's custom models, by name of the case; every one runs with the main variant.
_CUSTOM: dict[str, tuple[str, Options]] = {
    "mlp_by_name": ("MLP", {"target_modules": "lin0"}),
    "mlp_first": ("MLP", {"target_modules": ["lin0"]}),
    "mlp_second": ("MLP", {"target_modules": ["lin1"]}),
    "mlp_both": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "mlp_saving": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "mlp_parameter": ("MLP", {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    "parameters": ("MlpUsingParameters", {"target_parameters": ["lin0.weight"]}),
    "embedding": ("EmbConv1D", {"target_modules": ["emb"]}),
    "hf_conv1d": ("EmbConv1D", {"target_modules": ["conv1d"]}),
    "embedding_hf_conv1d": ("EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    "conv1d": ("Conv1d", {"target_modules": ["conv1d"]}),
    "conv1d_bigger": ("Conv1dBigger", {"target_modules": ["conv1d"]}),
    "conv1d_groups": ("Conv1dGroups", {"target_modules": ["conv1d"]}),
    "conv2d": ("Conv2d", {"target_modules": ["conv2d"]}),
    "conv2d_linear": ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    "conv2d_twice": ("Conv2d2", {"target_modules": ["conv2d"]}),
    "conv2d_1x1": ("Conv2d1x1", {"target_modules": ["conv2d"]}),
    "conv2d_groups": ("Conv2dGroups", {"target_modules": ["conv2d"]}),
    "conv2d_groups_linear": ("Conv2dGroups2", {"target_modules": ["conv2d", "lin0"]}),
    "conv3d": ("Conv3d", {"target_modules": ["conv3d"]}),
    "attention": ("MHA", {"target_modules": ["mha"]}),
}
_ONE_SHAPE = ("mlp_first", "mlp_saving", "hf_conv1d", "conv2d")
_CUSTOM_OF_VARIANT: dict[str, Iterable[str]] = {
    MAIN: _CUSTOM,
    "own-topk": ("mlp_both", "parameters", "embedding_hf_conv1d", "conv2d_linear", "attention"),
    "mp-threshold": _ONE_SHAPE,
    "rp-threshold": _ONE_SHAPE,
    "one_layer-threshold": _ONE_SHAPE,
    "mp-topk": ("mlp_both", "conv2d_linear"),
    "rp-topk": ("mlp_both", "conv2d_linear"),
    "one_layer-topk": ("mlp_both", "conv2d_linear"),
}
_EVERYWHERE = (MAIN, "mp-topk")  # variants that whole transformers run with


@dataclass
class OwnConfig(PemnConfig):
    """The main variant as a class, for tests that make a configuration of targets alone."""

    bank: Any = "own"
    selector: Any = "threshold"
    score_init: Any = _IDENTITY["score_init"]


def changed_at_start(options: Options) -> Options:
    """Return options of masks that are not all ones at the start (PEFT: ``init_weights=False``)."""
    return {**options, "score_init": "kaiming_uniform"}


def _custom() -> list[Row]:
    return [
        pytest.param(
            name, _CUSTOM[name][0], PemnConfig, {**VARIANTS[variant], **_CUSTOM[name][1]},
            id=f"{name}-{variant}",
        )
        for variant, names in _CUSTOM_OF_VARIANT.items()
        for name in names
    ]  # fmt: skip


def _two_active() -> list[Row]:
    """Two adapters at a time, of other seeds (on the model's own values a seed means scores)."""
    pairs = {
        "same": (["lin0"], ["lin0"], (MAIN, "own-topk", "mp-threshold", "rp-threshold")),
        "different": (["lin0"], ["lin1"], (MAIN, "own-topk")),
    }
    return [
        pytest.param(
            name, "pemn", PemnConfig, *_two(variant, first, second), id=f"{name}-{variant}"
        )
        for name, (first, second, variants) in pairs.items()
        for variant in variants
    ]


def _mixed() -> list[Row]:
    pairs = {"same": (["lin0"], ["lin0"]), "different": (["lin0"], ["lin1"])}
    return [
        pytest.param(name, *(PemnConfig(**one) for one in _two(MAIN, *pair)), id=f"{name}-{MAIN}")
        for name, pair in pairs.items()
    ]


def _two(variant: str, first: list[str], second: list[str]) -> tuple[Options, Options]:
    options = changed_at_start(VARIANTS[variant])
    return (
        {**options, "target_modules": first, "seed": 1},
        {**options, "target_modules": second, "seed": 2},
    )


def _of_task(task: str) -> Callable[[], list[Row]]:
    return lambda: [
        pytest.param(PemnConfig, {**VARIANTS[variant], "task_type": task}, id=variant)
        for variant in _EVERYWHERE
    ]


def _experts() -> list[Row]:
    models = {
        "trl-internal-testing/tiny-Llama4ForCausalLM": "feed_forward.experts",
        "trl-internal-testing/tiny-GptOssForCausalLM": "mlp.experts",
    }
    return [
        pytest.param(
            model, PemnConfig, {**VARIANTS[MAIN], "task_type": "CAUSAL_LM", **targets},
            id=f"{model.rpartition('-')[2]}-{name}-{MAIN}",
        )
        for model, experts in models.items()
        for name, targets in _expert_targets(experts).items()
    ]  # fmt: skip


def _expert_targets(experts: str) -> dict[str, Options]:
    down, up = f"{experts}.down_proj", f"{experts}.gate_up_proj"
    return {
        "down": {"target_modules": [], "target_parameters": [down]},
        "apart": {"target_modules": [], "target_parameters": [f"0.{up}", f"1.{down}"]},
        "both": {"target_modules": None, "target_parameters": [down, up]},
        "attention": {"target_modules": ["q_proj", "v_proj"], "target_parameters": [down]},
    }


def _plain() -> list[Row]:
    return [pytest.param(PemnConfig, options, id=name) for name, options in VARIANTS.items()]


def _vision() -> list[Row]:
    saved: Options = {
        "target_modules": ["convolution"],
        "modules_to_save": ["classifier", "normalization"],
    }
    return [
        pytest.param(PemnConfig(**options, **saved), id=name) for name, options in VARIANTS.items()
    ]


def _quantised() -> list[Row]:
    options = {**VARIANTS[MAIN], "target_modules": ["q_proj", "v_proj"]}
    return [pytest.param(PemnConfig, options, id=MAIN)]


# Suite -> name of a table in PEFT's test file -> what it holds here.
TABLES: dict[str, dict[str, Callable[[], list[Row]]]] = {
    "custom_models": {
        "TEST_CASES": _custom,
        "ALL_PEFT_CONFIG_CLASSES": lambda: [pytest.param(OwnConfig, id=MAIN)],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": _two_active,
        "MIXED_ADAPTER_TEST_CASES": _mixed,
    },
    "decoder_models": {"ALL_CONFIGS": _of_task("CAUSAL_LM")},
    "encoder_decoder_models": {"ALL_CONFIGS": _of_task("SEQ_2_SEQ_LM")},
    "feature_extraction_models": {"ALL_CONFIGS": _of_task("FEATURE_EXTRACTION")},
    "seq_classifier": {"ALL_CONFIGS": _of_task("SEQ_CLS")},
    "target_parameters": {"ALL_CONFIGS": _experts},
    "vision_models": {"CONFIGS": _vision},
    "config": {"ALL_CONFIG_CLASSES": _plain, "LAYER_INDEXING_CONFIG_CLASSES": _plain},
    "quantization": {"TEST_CASES": _quantised},
}
SUITES = tuple(TABLES)
