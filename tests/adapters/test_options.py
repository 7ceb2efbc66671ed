"""Every option with every kind of value, and every option that another one makes meaningless."""

import itertools
import json
import math
from dataclasses import fields

import pytest
import torch
from peft import PeftConfig
from torch import nn

from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.adapters.options import IDLE, OPTIONS
from pemn_surgery.errors import AdapterFileError, ConfigError
from tests.adapters import models

FIELDS = {item.name: item for item in fields(PemnConfig)}

# One of each kind that JSON, or a slip of the hand, can put there.
VALUES = [
    None, True, False, 0, 1, 3, -1, 7, 2**70, 10**30, -(10**30), 0.0, 0.5, 1.0, -0.5, 1e-300, 1e39,
    1e308, math.nan, math.inf, -math.inf, "", "0", "x", "mp", "rp", "own", "topk", "threshold",
    "sqrt_density", "product", "sign_delta", "binary", "seed", "drawn", "both", "context", "train",
    "normal", "magnitude",
    "kaiming_uniform", "fan_out",
    "SEQ_CLS", "PEMN", "LORA", "*", "x" * 5000, [], [None], [0], [1, 2], ["a"], ["a", 1],
    [["a"]], [[[]]], {}, {"a": 1}, {"a": {"b": [1]}}, {"float32": "0" * 16}, {"float32": 3},
]  # fmt: skip
IN_PYTHON = [
    10**5000,
    -(10**5000),
    3 + 4j,
    b"mp",
    ("a",),
    {"a"},
    {1},
    frozenset("a"),
    object(),
    len,
]


def is_a(*kinds):
    return lambda value: type(value) in kinds


def one_of(*choices):
    return lambda value: any(type(value) is type(c) and value == c for c in choices)


def a_list_of(*kinds):
    return lambda value: type(value) in (list, tuple, set) and all(type(v) in kinds for v in value)


def any_of(*tests):
    return lambda value: any(test(value) for test in tests)


def number(value):
    return type(value) in (int, float) and -3.4e38 <= value <= 3.4e38


def share(value):
    return number(value) and 0 < value <= 1


def whole(value):
    return type(value) is int and abs(value) < 10**1000


def pattern(value):
    return type(value) is str and value != "*"


def shares(value):
    return type(value) is dict and all(type(key) is str and share(value[key]) for key in value)


def lineage(value):
    return type(value) is dict and value.keys() == {"by", "of"}


def rows(value):
    return type(value) is dict and all(
        type(key) is str and whole(value[key]) and value[key] > 0 for key in value
    )


NONE, NAMES = one_of(None), a_list_of(str)
TARGETS = any_of(NONE, pattern, NAMES)

# What each field takes, written down once more and otherwise than in the source.
TAKES = {
    "bank": one_of("mp", "rp", "one_layer", "own"),
    "ratio": any_of(NONE, share),
    "length": any_of(NONE, lambda value: whole(value) and value >= 1),
    "permute": is_a(bool),
    "aligned": is_a(bool),
    "bank_init": one_of(
        None,
        "model",
        "kaiming_normal",
        "kaiming_uniform",
        "signed_constant",
        "unsigned_constant",
        "xavier_normal",
        "xavier_constant",
    ),
    "scale_fan": is_a(bool),
    "fan_mode": one_of("fan_in", "fan_out"),
    "seed": whole,
    "selector": one_of(None, "topk", "topk_overall", "topk_signed", "threshold", "sample"),
    "density": any_of(NONE, share, one_of("erk")),
    "overall_density": any_of(NONE, share),
    "density_pattern": any_of(NONE, shares),
    "threshold": number,
    "score_init": any_of(
        NONE, one_of("kaiming_uniform", "normal", "magnitude", "magnitude_shuffled"), number
    ),
    "score_mean": any_of(NONE, number),
    "score_std": any_of(NONE, lambda value: number(value) and value >= 0),
    "scale": one_of(None, "sqrt_density", "row", "matrix"),
    "form": one_of("product", "flip", "binary", "sign_delta"),
    "support": any_of(NONE, lambda value: share(value) and value < 1),
    "support_by": one_of("seed", "rows", "largest", "smallest"),
    "support_others": one_of("kept", "drawn"),
    "rest": one_of(None, "train", "norms", "stats", "freeze"),
    "target_modules": TARGETS,
    "exclude_modules": TARGETS,
    "layers_to_transform": any_of(NONE, whole, a_list_of(int)),
    "layers_pattern": any_of(NONE, is_a(str), NAMES),
    "target_parameters": any_of(NONE, NAMES),
    "functional_weights": any_of(NONE, NAMES),
    "rewritten_weights": any_of(NONE, NAMES),
    "carried": any_of(NONE, NAMES),
    "new_rows": any_of(NONE, rows, lambda value: whole(value) and value >= 0),
    "base_rows": any_of(NONE, rows),
    "tied": one_of("leave", "untie", "both"),
    "modules_to_save": any_of(NONE, NAMES),
    "trainable_token_indices": NONE,
    "coding": one_of("bits", "entropy", "context", "base"),
    "fingerprint": any_of(NONE, one_of({}, {"float32": "0" * 16})),
    "digest": any_of(NONE, is_a(str)),
    "lineage": any_of(NONE, lineage),
    "task_type": one_of(None, "SEQ_CLS", "CAUSAL_LM"),
    "inference_mode": is_a(bool),
    "revision": any_of(NONE, is_a(str)),
    "base_model_name_or_path": any_of(NONE, is_a(str)),
    "peft_type": one_of(None, "PEMN"),
    "auto_mapping": any_of(NONE, is_a(dict)),
    "peft_version": any_of(NONE, is_a(str)),
}
# Options beside which a field is read.
BESIDE = {
    "ratio": {"bank": "rp"}, "length": {"bank": "rp"}, "permute": {"bank": "rp"},
    "aligned": {"bank": "rp"},
    "threshold": {"selector": "threshold"}, "score_init": {"selector": "threshold"},
    "form": {"bank": "own", "selector": "topk"}, "layers_pattern": {"layers_to_transform": [0]},
    "score_mean": {"score_init": "normal"}, "score_std": {"score_init": "normal"},
    "support_by": {"support": 0.5}, "support_others": {"support": 0.5},
    "scale_fan": {"bank_init": "kaiming_normal"}, "fan_mode": {"bank_init": "kaiming_normal"},
    "overall_density": {"density": "erk"},
}  # fmt: skip


def test_the_tables_are_complete():
    assert len(FIELDS) >= 35
    assert set(OPTIONS) == set(FIELDS) == set(TAKES)
    assert {row.option for row in IDLE} <= set(FIELDS)


def named(message, field, value):
    """The field, what was given (a long one cut), what is needed."""
    assert f"PemnConfig got {field}=" in message
    assert "it needs " in message
    assert len(message) < 1000
    if isinstance(value, int) and abs(value) > 10**1000:
        assert f"{field}=<int too long to show>;" in message
    elif isinstance(value, (int, float, str)):
        assert f"{field}={repr(value)[:200]}" in message


@pytest.mark.parametrize("field", TAKES)
def test_every_kind_of_value_in_python(field):
    refused = taken = 0
    for value in [*VALUES, *IN_PYTHON]:
        options = {**BESIDE.get(field, {}), field: value}
        if TAKES[field](value):
            PemnConfig(**options)
            taken += 1
            continue
        with pytest.raises(ConfigError) as error:
            PemnConfig(**options)
        named(str(error.value), field, value)
        refused += 1
    assert refused >= 20, field
    assert taken >= 1, field


@pytest.mark.parametrize("field", TAKES)
def test_every_kind_of_value_in_a_file(field, tmp_path):
    """Also with the weights' seal forgotten: one named error for whatever is in the JSON."""
    beside = BESIDE.get(field, {})
    PemnConfig(**beside).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    whole_file = json.loads(path.read_text())
    assert set(whole_file) == set(FIELDS)
    refused = 0
    for value in VALUES:
        if field == "peft_type" and value == "LORA":
            continue  # a configuration of another method
        other = {"ratio": None} if field == "length" else {}  # filled in when it was saved
        path.write_text(json.dumps({**whole_file, **other, field: value}))
        needed = field == "peft_type"
        if TAKES[field](value) and not (needed and value is None):
            assert isinstance(PemnConfig.from_pretrained(str(tmp_path)), PemnConfig)
            continue
        with pytest.raises(AdapterFileError) as error:
            PemnConfig.from_pretrained(str(tmp_path))
        message = models.says(error, repr(str(path)), "is no configuration", "Nothing was loaded")
        if field != "peft_type":  # PEFT looks it up before there is a configuration of ours
            named(message, field, value)
        refused += 1
    assert refused >= 20, field


def test_values_of_a_pemnify_call_are_refused_before_the_model_changes():
    model = models.net()
    before = models.Snapshot(model)
    for options in ({"target_modules": 7}, {"functional_weights": 3}, {"layers_to_transform": {}}):
        for verb in (pemnify, plan):
            with pytest.raises(ConfigError, match="it needs a"):
                verb(model, **options)
    before.assert_unchanged()


def test_unknown_options_are_answered_with_what_users_give():
    internal = {
        "fingerprint", "digest", "lineage", "carried", "peft_type", "peft_version", "auto_mapping",
        "base_model_name_or_path", "trainable_token_indices", "origin", "keep_scores",
        "is_in_force",
    }  # fmt: skip
    doors = [
        lambda **options: pemnify(models.net(), **options),
        lambda **options: plan(models.net(), **options),
        lambda **options: PemnConfig.preset("pemn", **options),
    ]
    for door in doors:
        with pytest.raises(ConfigError) as error:
            door(densty=0.5)
        message = models.says(error, "Unknown option densty.", "Did you mean density?")
        listed = set(message.partition("PemnConfig has: ")[2].rstrip(".").split(", "))
        assert {"bank", "density", "target_modules", "task_type"} < listed
        assert not listed & internal
        assert listed < set(FIELDS)
        with pytest.raises(ConfigError, match="Unknown option digest"):
            door(digest="0" * 16)
    with pytest.raises(ConfigError, match="There is no preset 3"):
        PemnConfig.preset(3)


# ---- options that nothing reads ------------------------------------------------------------------


class Net(nn.Module):
    """Two shapes; 1 % of the larger one is a few numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(40, 10)


def meaning(config):
    """All that training and inference would see: frozen numbers, scores, masks, factors."""
    torch.manual_seed(0)
    model = pemnify(Net(), config)
    layers = models.mask_layers(model)
    assert len(layers) == 2
    found = []
    for layer in layers.values():
        mask = layer.mask_of("default")
        steps = torch.linspace(-1, 1, mask.scores.numel()).view(mask.scores.shape)
        chosen = mask.selector.mask(steps)
        found += [layer.fill(), mask.scores.detach(), chosen.float(), torch.tensor([mask.scaled])]
    return [value.clone() for value in found]


def combinations():
    banks = [
        {"bank": "mp"}, {"bank": "one_layer"}, {"bank": "own", "selector": "topk"}, {"bank": "rp"},
        {"bank": "rp", "length": 20, "permute": True}, {"bank": "rp", "ratio": 1.0},
        {"bank": "rp", "ratio": 0.2, "permute": True},
    ]  # fmt: skip
    inits = [{}, {"bank_init": "kaiming_uniform"}, {"bank_init": "model"}]
    selectors = [
        {"selector": "topk"}, {"selector": "topk", "density": "erk"}, {"selector": "threshold"},
        {"selector": "threshold", "scale": "sqrt_density"},
        {"selector": "threshold", "score_init": "kaiming_uniform"},
        {"selector": "topk", "score_init": "normal"}, {"score_init": "magnitude"},
        {"selector": "topk_signed"}, {"selector": "sample"},
        {"selector": "topk_overall"},
    ]  # fmt: skip
    fans = [{}, {"scale_fan": True}]
    for parts in itertools.product(banks, inits, selectors, fans):
        options = {key: value for part in parts for key, value in part.items()}
        no_trace = {"functional_weights": [], "rewritten_weights": []}
        try:
            PemnConfig(**options)
        except ConfigError:
            continue
        yield {**options, **no_trace}


CHANGES = {
    "seed": 1, "density": 0.3, "overall_density": 0.3, "density_pattern": {"head": 0.3},
    "threshold": 0.3, "ratio": 0.25, "length": 9, "permute": True, "aligned": True,
    "scale_fan": True, "scale": "sqrt_density", "score_init": 0.3, "bank_init": "signed_constant",
    "score_mean": 0.3, "score_std": 0.3, "fan_mode": "fan_out",
}  # fmt: skip


def test_an_option_is_read_or_refused():
    """Beside every combination of the others: the model differs, or ConfigError."""
    refused, read, silent = set(), set(), []
    cases = list(combinations())
    assert len(cases) > 100
    for options in cases:
        before = meaning(PemnConfig(**options))
        for name, value in CHANGES.items():
            if name in options:
                continue
            try:
                config = PemnConfig(**{**options, name: value})
            except ConfigError as error:
                models.says(error, f"{name}=" if name != "length" else "length=")
                refused.add(name)
                continue
            after = meaning(config)
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            (silent.append((name, options)) if same else read.add(name))
    assert silent == []
    assert read == set(CHANGES)
    assert refused == set(CHANGES) - {"scale", "bank_init"}


SIGNS = {"bank": "own", "selector": "threshold", "form": "sign_delta", "score_init": 0.5}
IDLES = [
    ({"ratio": 0.1}, 'bank="rp", not bank="mp"'),
    ({"bank": "one_layer", "length": 3}, 'bank="rp", not bank="one_layer"'),
    ({"bank": "own", "permute": True}, 'bank="rp", not bank="own"'),
    ({"bank": "rp", "ratio": 0.1, "length": 3}, "length=3 beside it decides"),
    ({"bank": "rp", "ratio": 1, "aligned": True}, "only a repeated one is aligned"),
    ({"bank": "rp", "aligned": True, "permute": True}, "permuted numbers do not repeat"),
    ({"bank": "rp", "ratio": 1, "permute": True}, "only a tiled one is permuted"),
    ({"bank_init": "model", "scale_fan": True}, "belongs to drawn numbers"),
    ({"bank": "own", "scale_fan": True}, "belongs to drawn numbers"),
    ({"bank": "own", "fan_mode": "fan_out"}, "belongs to drawn numbers"),
    ({"bank_init": "xavier_normal", "fan_mode": "fan_out"}, "by inputs and outputs together"),
    ({"bank_init": "xavier_constant", "scale_fan": True}, "by inputs and outputs together"),
    ({"bank": "rp", "bank_init": "unsigned_constant", "permute": True}, "have no order"),
    ({"bank_init": "unsigned_constant", "selector": "threshold", "seed": 1}, "no initial score"),
    ({"bank": "own", "selector": "threshold", "seed": 1}, "no initial score is drawn"),
    ({**SIGNS, "seed": 1}, "no initial score is drawn"),
    ({"selector": "threshold", "density": 0.3}, 'selector="topk" (or to scale_fan=True)'),
    ({**SIGNS, "density": 0.3}, "come from a fine-tuned model"),
    ({"overall_density": 0.3}, 'belongs to density="erk"; density=0.5 decides'),
    ({"selector": "threshold", "density_pattern": {"a": 0.3}}, 'selectors of the largest'),
    ({**SIGNS, "density_pattern": {"a": 0.3}}, "come from a fine-tuned model"),
    ({**SIGNS, "new_rows": 2}, "come from a fine-tuned model"),
    ({"threshold": 0.3}, '"threshold" or "sample", not selector="topk"'),
    ({"bank": "own", "selector": "sample", "seed": 1}, "no initial score is drawn"),
    ({**SIGNS, "threshold": 1}, "come from a fine-tuned model"),
    ({"selector": "topk_signed", "score_init": 1.0}, "equal ones have no order"),
    ({"selector": "topk_overall", "density": "erk"}, "give one number"),
    ({"selector": "topk_overall", "density_pattern": {"a": 0.3}}, "follows from all scores"),
    ({"score_init": 1.0}, "equal ones have no order"),
    ({"score_mean": 0.1}, 'belongs to score_init="normal", not score_init=None'),
    ({"score_init": "magnitude", "score_mean": 0.1}, "not score_init='magnitude'"),
    ({"selector": "threshold", "score_std": 0.1}, 'and "magnitude": say which'),
    ({"selector": "threshold", "score_init": 0.1, "score_std": 0.1}, "not score_init=0.1"),
    ({"score_init": "kaiming_uniform", "score_std": 0.1}, "not score_init='kaiming_uniform'"),
    ({**SIGNS, "scale": "sqrt_density"}, "has its own scales"),
    ({"scale": "matrix"}, 'belongs to form="sign_delta"'),
    ({**SIGNS, "support": 0.1}, "come from a fine-tuned model"),
    ({"form": "flip", "scale": "sqrt_density"}, 'belongs to form="product"'),
    ({"support": 0.1, "scale": "sqrt_density"}, "masks a share of each weight"),
    ({"form": "binary", "support": 0.1}, "would keep their sizes"),
    ({"form": "binary", "scale": "sqrt_density"}, "has a size of its own"),
    ({"support_by": "rows"}, "which weights support= is a share of"),
    ({"support_others": "drawn"}, "that support= leaves out"),
    ({"form": "flip", "support": 0.1, "support_others": "drawn"}, 'belongs to form="product"'),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), IDLES, ids=[str(o) for o, _ in IDLES])
def test_what_is_never_read_is_refused(options, said):
    with pytest.raises(ConfigError) as error:
        PemnConfig(**options)
    models.says(error, "PemnConfig got ", "which nothing would read", said, "Leave it out.")


def test_every_row_of_the_table_has_a_case():
    hit = set()
    for options, _ in IDLES:
        try:
            PemnConfig(**options)
        except ConfigError as error:
            hit |= {row.option for row in IDLE if f"got {row.option}=" in str(error)}
    assert hit == {row.option for row in IDLE}


def test_an_adapter_that_was_saved_with_an_option_that_nothing_reads_is_read(tmp_path):
    """Earlier releases took them; what was saved so means what it always did."""
    model = pemnify(models.net(), bank="own", selector="threshold")
    model.save_pretrained(str(tmp_path))
    models.forget_digest(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = {**json.loads(path.read_text()), "density": 0.3, "seed": 7}
    path.write_text(json.dumps(written))
    tensors = (tmp_path / models.WEIGHTS_FILE).read_bytes()
    from safetensors.torch import load, save_file

    save_file(load(tensors), tmp_path / models.WEIGHTS_FILE)  # without its seal
    for read in (PemnConfig.from_pretrained, PeftConfig.from_pretrained):
        config = read(str(tmp_path))
        assert (config.density, config.seed) == (0.3, 7)
        assert config.selector_of(config.density).mask(torch.tensor([0.1, -0.1])).tolist() == [
            True,
            False,
        ]
    again = models.net()
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(again, str(tmp_path))
    models.assert_equal(models.logits(loaded), models.logits(model))


def test_configurations_can_be_made_of_others():
    for options in ({}, {"bank": "own", "selector": "threshold"}, {"bank": "rp", "permute": True}):
        config = PemnConfig(**options)
        again = PemnConfig(**{**config.to_dict()})
        assert again == config


def test_presets_leave_out_what_a_change_makes_meaningless():
    config = PemnConfig.preset("piggyback", selector="topk", density=0.3)
    assert (config.threshold, config.score_init) == (0.0, "kaiming_uniform")
    assert config.density == 0.3
    assert PemnConfig.preset("edge_popup", selector="threshold").score_init == 0.01
    for name in ("pemn", "edge_popup"):
        with pytest.raises(ConfigError, match='"threshold" or "sample", not selector="topk"'):
            PemnConfig.preset(name, threshold=0.1)
    for name in ("piggyback", "self_masking"):
        with pytest.raises(ConfigError, match=r"density=0\.3"):
            PemnConfig.preset(name, density=0.3)
        with pytest.raises(ConfigError, match="no initial score is drawn"):
            PemnConfig.preset(name, seed=4)
