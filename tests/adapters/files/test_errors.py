"""Bad input: the named error, a message that says what to do, and an untouched model."""

import math

import pytest
import timm
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.errors import (
    AlreadyPemnifiedError,
    BankMismatchError,
    ConfigError,
    MaskNotLoadedError,
    NothingToMaskError,
    PemnError,
    UnsupportedModelError,
)
from tests.adapters import models

OTHER_METHODS = {
    "LORA": LoraConfig(target_modules=["query", "value"]),
    "ADALORA": AdaLoraConfig(target_modules=["query", "value"], total_step=10),
    "IA3": IA3Config(target_modules=["query", "value"], feedforward_modules=[]),
}

SHARE = "0 < value <= 1"
BAD_OPTIONS = [
    ({"density": 0}, ("density=0;", SHARE)),
    ({"density": 0.0}, ("density=0.0", SHARE)),
    ({"density": 1.5}, ("density=1.5", SHARE, "not a percentage")),
    ({"density": -0.1}, ("density=-0.1", SHARE)),
    ({"density": math.nan}, ("density=nan", SHARE)),
    ({"density": math.inf}, ("density=inf", SHARE)),
    ({"density": "half"}, ("density='half'", SHARE)),
    ({"density": True}, ("density=True", SHARE)),
    ({"bank": "rp", "ratio": 0}, ("ratio=0;", SHARE)),
    ({"bank": "rp", "ratio": 2}, ("ratio=2;", SHARE)),
    ({"bank": "rp", "ratio": math.nan}, ("ratio=nan", SHARE)),
    ({"bank": "rp", "length": 0}, ("length=0", "whole number of at least 1")),
    ({"bank": "rp", "length": 2.5}, ("length=2.5", "whole number")),
    ({"bank": "rp", "ratio": 0.1, "length": 5}, ("length=5", "ratio=0.1", "give one")),
    ({"bank": "mp", "ratio": 0.1}, ("ratio=0.1", 'bank="rp"', '"mp"')),
    ({"bank": "own", "selector": "topk", "length": 9}, ("length=9", 'bank="rp"', '"own"')),
    ({"bank": "one_layer", "permute": True}, ("permute=True", 'bank="rp"', '"one_layer"')),
    ({"bank": "max"}, ("bank='max'", "'mp', 'rp', 'one_layer', 'own'")),
    ({"bank": None}, ("bank=None", "'mp'")),
    ({"bank": ["mp"]}, ("bank=['mp']", "'mp'")),
    ({"bank_init": "zeros"}, ("bank_init='zeros'", "'kaiming_normal'", "'model'")),
    ({"selector": "best"}, ("selector='best'", "'topk_signed', 'threshold', 'sample'")),
    ({"scale": "two"}, ("scale='two'", "'sqrt_density'")),
    ({"rest": "all"}, ("rest='all'", "'train', 'norms', 'stats', 'freeze'")),
    ({"seed": 1.5}, ("seed=1.5", "whole number")),
    ({"seed": None}, ("seed=None", "whole number")),
    ({"score_init": "zeros"}, ("score_init='zeros'", "'magnitude_shuffled', a finite number")),
    ({"score_std": -1}, ("score_std=-1", "a finite number of at least 0")),
    ({"score_init": 1.0}, ("score_init=1.0", "drawn scores", "no order")),
    ({"selector": "threshold", "threshold": math.nan}, ("threshold=nan", "finite number")),
    ({"selector": "threshold", "score_init": math.inf}, ("score_init=inf", "finite number")),
    ({"bank": "own", "scale_fan": True}, ("scale_fan=True", "belongs to drawn numbers")),
    ({"target_modules": "conv("}, ("target_modules='conv('", "regular expression")),
    ({"exclude_modules": "*x"}, ("exclude_modules='*x'", "regular expression")),
    ({"target_modules": "a", "layers_to_transform": [1]}, ("layers_to_transform=[1]", "a list")),
    ({"layers_pattern": "layer"}, ("layers_pattern='layer'", "`layers_to_transform` must also")),
    ({"trainable_token_indices": [1]}, ("trainable_token_indices=[1]", "modules_to_save")),
    ({"sead": 3}, ("Unknown option sead", "PemnConfig has:", "seed")),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_bad_option(options, said):
    model = models.net()
    before = models.Snapshot(model)
    for verb in (pemnify, plan):
        with pytest.raises(ConfigError) as error:
            verb(model, **options)
        models.says(error, *said)
        before.assert_unchanged()
    assert isinstance(error.value, ValueError)


def test_edges_of_the_ranges_are_allowed():
    model = pemnify(models.net(), bank="rp", ratio=1.0, density=1.0)
    chosen = models.masks(model)
    assert all(bool(mask.all()) for mask in chosen.values())
    assert models.mask_layers(model)["conv2.weight"].bank.values.numel() == 576
    tiny = pemnify(models.net(), density=1e-9)
    assert {int(mask.sum()) for mask in models.masks(tiny).values()} == {1}


def test_unknown_preset():
    with pytest.raises(ConfigError) as error:
        PemnConfig.preset("lora")
    models.says(error, "'lora'", "pemn, edge_popup, piggyback, self_masking")


@pytest.mark.parametrize("name", ["pemn", "edge_popup", "piggyback", "self_masking"])
def test_presets(name):
    wanted = {
        "pemn": ("mp", "kaiming_normal", "topk", "train", None),
        "edge_popup": ("own", "signed_constant", "topk", "stats", None),
        "piggyback": ("own", "model", "threshold", "freeze", None),
        "self_masking": ("own", "model", "threshold", "stats", "sqrt_density"),
    }
    made = PemnConfig.preset(name, tied="both")
    assert (made.bank, made.bank_init, made.selector, made.rest, made.scale) == wanted[name]
    assert made.tied == "both"
    with pytest.raises(ConfigError, match="density=2"):
        PemnConfig.preset(name, density=2)


def test_configuration_and_options_together():
    model = models.net()
    before = models.Snapshot(model)
    for verb in (pemnify, plan):
        with pytest.raises(ConfigError) as error:
            verb(model, PemnConfig(), seed=1, density=0.3)
        models.says(error, "seed, density", "give one")
    before.assert_unchanged()


@pytest.mark.parametrize("config", [{"bank": "mp"}, LoraConfig(target_modules=["conv1"]), "mp"])
def test_not_a_configuration(config):
    model = models.net()
    before = models.Snapshot(model)
    for verb in (pemnify, plan):
        with pytest.raises(ConfigError):
            verb(model, config)
        before.assert_unchanged()


@pytest.mark.parametrize("thing", [None, "resnet18", [1], nn.Linear, {}])
def test_not_a_module(thing):
    for verb in (pemnify, plan):
        with pytest.raises(UnsupportedModelError) as error:
            verb(thing)
        models.says(error, f"Got {type(thing).__name__}", "torch.nn.Module is needed", "timm")


def test_nothing_to_mask():
    for model, options, said in [
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {}, ("6 parameters", "none")),
        (nn.Sequential(nn.Embedding(5, 2)), {}, ("10 parameters", "1 x an embedding")),
        (nn.Sequential(nn.Bilinear(2, 2, 3)), {}, ("masks for Bilinear are not available",)),
        (models.net(), {"target_modules": ["conv9"]}, ("conv9", "4 x not in target_modules")),
        (models.net(), {"exclude_modules": ".*"}, ("4 x in exclude_modules",)),
        (models.net(), {"target_parameters": ["nothing"]}, ("nothing", "not found")),
        (nn.Linear(2, 3), {}, ("torch.nn.Sequential",)),
    ]:  # fmt: skip
        names = [(name, type(module)) for name, module in model.named_modules()]
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(NothingToMaskError) as error:
            pemnify(model, **options)
        models.says(error, *said, "print(plan(model", "Nothing was changed")
        assert [(name, type(module)) for name, module in model.named_modules()] == names
        models.assert_same_tensors(model.state_dict(), tensors)


def test_data_parallel():
    inner = models.net()
    before = models.Snapshot(inner)
    with pytest.raises(UnsupportedModelError) as error:
        pemnify(nn.DataParallel(inner))
    models.says(error, "Got a DataParallel", "pemnify on the inner model", "wrap the result")
    before.assert_unchanged()


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        inner = models.net()
        before = models.Snapshot(inner)
        wrapped = nn.parallel.DistributedDataParallel(inner)
        with pytest.raises(UnsupportedModelError) as error:
            pemnify(wrapped)
        models.says(error, "Got a DistributedDataParallel", "inner model")
        before.assert_unchanged()
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_model():
    inner = models.net()
    wrapped = torch.compile(inner, backend="eager")
    before = models.Snapshot(inner)
    with pytest.raises(UnsupportedModelError) as error:
        pemnify(wrapped)
    models.says(error, "Got a OptimizedModule", "inner model")
    before.assert_unchanged()


def test_pemnify_twice():
    model = models.train(pemnify(models.net(), bank="rp"))
    before = models.Snapshot(model)
    for again in (model, model.base_model, model.base_model.model):
        with pytest.raises(AlreadyPemnifiedError) as error:
            pemnify(again, bank="rp")
        models.says(error, "in 9 places", "conv1", "add_adapter", "unload()")
        before.assert_unchanged()


@models.ignore_peft_on_transformers
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of a second adapter
@pytest.mark.parametrize(("kind", "config"), OTHER_METHODS.items())
def test_masks_on_a_model_with_adapters_of_another_method(kind, config):
    """One sentence with the method, the count and what to do, at every door."""
    peft_model = get_peft_model(models.bert(), config)
    inner = peft_model.base_model.model
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    classes = [type(module) for module in peft_model.modules()]
    doors = {
        "pemnify": lambda: pemnify(peft_model),
        "pemnify inner": lambda: pemnify(inner),
        "get_peft_model": lambda: get_peft_model(inner, PemnConfig(), adapter_name="masks"),
        "around": lambda: get_peft_model(peft_model, PemnConfig(), adapter_name="masks"),
        "injected": lambda: inject_adapter_in_model(PemnConfig(), inner, "masks"),
    }
    for door, call in doors.items():
        with pytest.raises(AlreadyPemnifiedError) as error:
            call()
        message = models.says(
            error, f"carries {kind} adapters in 4 layers", "attention.self.query",
            "merge_and_unload()", "Nothing was changed",
        )  # fmt: skip
        assert len(message) < 400, door
    assert list(peft_model.peft_config) == ["default"]
    assert [type(module) for module in peft_model.modules()] == classes
    models.assert_same_tensors(peft_model.state_dict(), before)
    merged = peft_model.merge_and_unload()
    assert len(models.masks(pemnify(merged))) > 4


@models.ignore_peft_on_transformers
def test_masks_beside_lora_in_a_transformers_model():
    model = models.bert()
    model.add_adapter(LoraConfig(target_modules=["query", "value"]), "lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AlreadyPemnifiedError, match="carries LORA adapters in 4 layers"):
        model.add_adapter(PemnConfig(), "masks")
    models.assert_same_tensors(model.state_dict(), before)


def test_after_unload_a_model_is_fresh():
    model = pemnify(models.net(), bank="own", selector="topk")
    again = pemnify(model.unload(), bank="rp")
    assert len(models.masks(again)) == 4


def test_a_refused_call_can_be_repeated():
    model = models.net()
    with pytest.raises(NothingToMaskError):
        pemnify(model, target_modules=["conv9"])
    models.assert_equal(
        models.logits(pemnify(model, bank="rp")), models.logits(pemnify(models.net(), bank="rp"))
    )


def test_plan_touches_nothing():
    for options in models.BANKS.values():
        for model in (models.net(), timm.create_model("test_resnet", num_classes=4)):
            before = models.Snapshot(model, lambda m: models.logits(m, models.images(size=32)))
            planned = plan(model, **options)
            assert planned.masked_weights > 0
            before.assert_unchanged()


def test_mask_that_was_never_loaded(tmp_path):
    pemnify(models.net(), bank="rp").save_pretrained(str(tmp_path))
    config = PemnConfig.from_pretrained(str(tmp_path))
    model = get_peft_model(models.net(), config)
    with pytest.raises(MaskNotLoadedError) as error:
        models.logits(model)
    models.says(error, "conv1.weight", "never loaded", "PeftModel.from_pretrained")
    again = PeftModel.from_pretrained(models.net(), str(tmp_path))
    assert int(models.masks(again)["conv1.weight"].sum()) == 108


def test_every_error_is_a_pemn_error():
    from pemn_surgery import errors

    named = [thing for thing in vars(errors).values() if isinstance(thing, type)]
    assert len(named) >= 12
    assert all(issubclass(thing, (PemnError, UserWarning)) and thing.__doc__ for thing in named)


def test_a_second_get_peft_model_overwrites_nothing():
    model = get_peft_model(models.net(), PemnConfig(bank="rp", ratio=0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before
    with (
        pytest.warns(UserWarning, match="a second time"),
        pytest.raises(AlreadyPemnifiedError, match="masks of an adapter 'default' already"),
    ):
        get_peft_model(model.base_model.model, PemnConfig(bank="rp", ratio=0.5))
    models.assert_same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("bank", ["mp", "rp", "one_layer", "own_generated"])
def test_all_adapters_of_a_bank_have_the_same_targets(bank):
    options = models.BANKS[bank]
    model = pemnify(models.net(), PemnConfig(**options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before
    with pytest.raises(BankMismatchError) as error:
        model.add_adapter("second", PemnConfig(**options, target_modules=["conv1", "conv2"]))
    models.says(
        error, "fills 4 weights", "would mask 2", "2 differ", "conv3.weight", "same targets"
    )
    models.assert_same_tensors(model.state_dict(), before)
    assert list(model.peft_config) == ["default"]


def test_adapters_on_own_weights_may_have_other_targets():
    model = pemnify(models.net(), PemnConfig(bank="own", selector="topk", target_modules=["conv1"]))
    model.add_adapter("second", PemnConfig(bank="own", selector="topk", target_modules=["conv2"]))
    layers = models.mask_layers(model)
    assert {name: list(layer.pemn_masks) for name, layer in layers.items()} == {
        "conv1.weight": ["default"],
        "conv2.weight": ["second"],
    }
