"""`PemnConfig`: defaults, what they mean, and the way to disk and back."""

import json

import pytest

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters.files.contents import AdapterFile
from pemn_surgery.errors import AdapterFileError
from pemn_surgery.masks.selector import Selector
from tests.adapters import models
from tests.adapters.models import BANKS

NORMAL, UNIFORM = "kaiming_normal", "kaiming_uniform"


@pytest.mark.parametrize(
    ("given", "filled_in"),
    [
        ({}, ("mp", NORMAL, None, "topk", 0.5, UNIFORM, "train")),
        ({"bank": "rp"}, ("rp", NORMAL, 0.01, "topk", 0.5, UNIFORM, "train")),
        ({"bank": "rp", "length": 9}, ("rp", NORMAL, None, "topk", 0.5, UNIFORM, "train")),
        ({"bank": "own"}, ("own", "model", None, "threshold", 0.5, 0.01, "stats")),
        ({"bank": "own", "bank_init": "signed_constant"},
         ("own", "signed_constant", None, "topk", 0.5, UNIFORM, "train")),
        ({"bank_init": "model"}, ("mp", "model", None, "topk", 0.5, UNIFORM, "stats")),
        ({"selector": "threshold"}, ("mp", NORMAL, None, "threshold", 0.5, 0.01, "train")),
        ({"selector": "threshold", "threshold": 0.5},
         ("mp", NORMAL, None, "threshold", 0.5, 0.51, "train")),
        ({"rest": "freeze"}, ("mp", NORMAL, None, "topk", 0.5, UNIFORM, "freeze")),
    ], ids=str,
)  # fmt: skip
def test_defaults(given, filled_in):
    config = PemnConfig(**given)
    names = ("bank", "bank_init", "ratio", "selector", "density", "score_init", "rest")
    assert tuple(getattr(config, name) for name in names) == filled_in
    assert config.seed == 0
    assert config.scale is None
    assert config.peft_type.value == "PEMN"


def test_bank_spec_holds_what_decides_the_numbers():
    def spec(**options):
        return PemnConfig(**options).bank_spec

    assert spec() == spec(density=0.3) == spec(selector="threshold") == spec(rest="freeze")
    assert spec(seed=1) != spec()
    assert spec(scale_fan=True, density=0.3) != spec(scale_fan=True, density=0.4)
    assert spec(bank="own", selector="topk", seed=1) == spec(
        bank="own", selector="topk", seed=2
    )  # the model's own: no seed
    assert spec(bank="own", selector="topk").generated is False
    assert spec(bank="own", bank_init="signed_constant").generated is True
    first, second = (spec(bank="rp", bank_init="model", permute=True, seed=s) for s in (1, 2))
    assert first != second  # the permutation has a seed
    assert (spec(bank="rp").ratio, spec(bank="rp", length=5).length) == (0.01, 5)


def test_selection():
    assert PemnConfig(density=0.2).selector_of(0.2) == Selector("topk", 0.2, 0.0)
    given = PemnConfig(selector="threshold", threshold=0.25).selector_of(None)
    assert given == Selector("threshold", 0.5, 0.25)


def test_target_lists_become_sets():
    config = PemnConfig(target_modules=["b", "a", "b"], exclude_modules=["c"])
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})
    assert PemnConfig(target_modules="a|b").target_modules == "a|b"


@pytest.mark.parametrize(
    "options",
    [*BANKS.values(), {"selector": "threshold", "threshold": 0.1, "scale": "sqrt_density"},
     {"target_modules": ["a", "b"], "layers_to_transform": [1, 2], "layers_pattern": "layer"},
     {"modules_to_save": ["head"], "rest": "norms", "density": 0.25, "scale_fan": True}], ids=str,
)  # fmt: skip
def test_to_disk_and_back(options, tmp_path):
    config = PemnConfig(**options)
    config.save_pretrained(str(tmp_path))
    again = PemnConfig.from_pretrained(str(tmp_path))
    assert type(again) is PemnConfig
    assert again == config
    assert again.origin.file is None
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(stored) >= set(options)
    assert again.bank_spec == config.bank_spec
    assert again.density == config.density
    assert again.selector_of(None) == config.selector_of(None)


def test_reading_checks_the_masks_beside_it(tmp_path):
    model = pemnify(models.net(), bank="rp")
    model.save_pretrained(str(tmp_path / "sub"))
    config = PemnConfig.from_pretrained(str(tmp_path), subfolder="sub")
    assert isinstance(config.origin.file, AdapterFile)
    assert dict(config.origin.file.sizes) == {"conv1.weight": 216, "conv2.weight": 576,
                                       "conv3.weight": 576, "head.weight": 32}  # fmt: skip
    path = tmp_path / "sub" / models.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AdapterFileError, match=r"100 bytes\) cannot be read"):
        PemnConfig.from_pretrained(str(tmp_path / "sub"))


def test_stored_values_are_checked_too(tmp_path):
    PemnConfig(bank="rp").save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    for name, value in [("density", 3), ("bank", "vector"), ("ratio", 0), ("selector", "x")]:
        path.write_text(json.dumps({**stored, name: value}))
        with pytest.raises(AdapterFileError, match=f"{name}={value!r}; it needs"):
            PemnConfig.from_pretrained(str(tmp_path))


def test_runtime_state_is_not_part_of_the_configuration():
    config = PemnConfig()
    config.keep_scores = True
    assert "keep_scores" not in config.to_dict()
    assert "file" not in config.to_dict()
    assert json.loads(json.dumps(config.to_dict()))["bank"] == "mp"


def test_presets_take_changes():
    config = PemnConfig.preset("self_masking", rest="norms", threshold=0.1)
    assert (config.rest, config.threshold, config.score_init) == ("norms", 0.1, 1.0)
    assert PemnConfig.preset("edge_popup", seed=5).seed == 5
    assert PemnConfig.preset("piggyback").threshold == 5e-3
    assert PemnConfig.preset("piggyback").score_init == 1e-2
    assert PemnConfig.preset("pemn") == PemnConfig(rest="train")


def test_other_json_without_weights_is_refused_in_the_words_of_peft(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar", "baz": 123}')
    with pytest.raises(TypeError, match=r"is missing required keys: \{'peft_type'\}"):
        PemnConfig.from_pretrained(str(tmp_path))
