"""Adapters' names: all that can work do, alone and beside others; the rest is refused at once."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tests.adapters.models as models
from pemn_surgery import PemnConfig, pemnify, rename_adapter
from pemn_surgery.adapters.names import without_name
from pemn_surgery.errors import AdapterError, AdapterNameError

pytestmark = [
    models.ignore_peft_on_transformers,
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained:UserWarning"),
]

OPTIONS = {"bank": "own", "selector": "topk", "rest": "train", "modules_to_save": ["fc"]}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.norm, self.fc = Pair(), nn.LayerNorm(4), nn.Linear(4, 3)
        self.layers = nn.ModuleList([Pair(), Pair()])

    def forward(self, x):
        x = self.layers[1](self.layers[0](self.model(x)))
        return self.fc(self.norm(x))


X = torch.linspace(-1, 1, 12).view(3, 4)


def net():
    torch.manual_seed(0)
    return Net().eval()


def changed(model, seed):
    """The active adapter with values of its own, and what it answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model(X).detach()


# Parts of this model's keys, of our keys and PEFT's, folders, letters: LoRA takes them all when
# alone, and loses tensors without a word beside others.
WORKING = [
    "weight", "bias", "pemn_masks", "pemn_tensors", "masked_weight", "task_tensors", "scores",
    "bits", "row_scale", "a", "1", "layers", "norm", "model", "base_model", "modules_to_save",
    "original_module", "base_layer", "pemn", "org/name", "a/b/c", "n" * 255, "é" * 127, "a b",
    " ", "_x", "merged",
]  # fmt: skip


@pytest.mark.parametrize("name", WORKING, ids=[name[:15] for name in WORKING])
def test_an_adapter_of_any_such_name_is_saved_and_loaded_beside_another(name, tmp_path):
    model = pemnify(net(), adapter_name="one", **OPTIONS).eval()
    model.add_adapter(name, PemnConfig(**OPTIONS))
    expected = {}
    for seed, adapter in enumerate(["one", name]):
        model.set_adapter(adapter)
        expected[adapter] = changed(model, seed)
    assert not torch.equal(*expected.values())
    model.save_pretrained(tmp_path)
    for adapter, answer in expected.items():
        for again in (adapter, "default"):
            loaded = PeftModel.from_pretrained(net(), tmp_path / adapter, adapter_name=again)
            models.assert_equal(loaded.eval()(X), answer)
    model.delete_adapter("one")
    models.assert_equal(model(X), expected[name])


@pytest.mark.parametrize("name", ["weight", "pemn_masks", "org/name", "bert", "layer"])
def test_transformers_doors_take_them(name, tmp_path):
    config = PemnConfig(bank="own", selector="topk", modules_to_save=["classifier"])
    model = models.bert()
    model.add_adapter(config, adapter_name=name)
    answer = changed_bert(model)
    model.save_pretrained(tmp_path)
    loaded = models.bert()
    loaded.load_adapter(str(tmp_path), adapter_name=name)
    models.assert_equal(loaded.eval()(models.tokens()).logits, answer)


def changed_bert(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scores" in name:
                parameter.copy_(parameter.flip(0))
        return model.eval()(models.tokens()).logits


@pytest.mark.parametrize("name", ["weight", "a", "org/name"])
def test_lora_takes_them_alone(name, tmp_path):
    """So we do; what LoRA cannot do is load "weight" with a head that is saved whole."""
    model = get_peft_model(net(), LoraConfig(target_modules=["a"], init_lora_weights=False), name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path / name, adapter_name=name)
    models.assert_equal(loaded(X), model(X))


REFUSED = {
    "train": "attribute of that name",
    "keys": "attribute of that name",
    "forward": "attribute of that name",
    "v1.0": "has a dot",
    "..": "has a dot",
    "../up": "has a dot",
    "": "is empty",
    "/etc": "is empty",
    "a//b": "is empty",
    "a/": "is empty",
    "a\0b": "no file's name",
    "\ud800": "no file's name",
    "n" * 300: "300 bytes",
    "é" * 128: "256 bytes",
    "fc": "ends like 'fc'",
    "my_fc": "ends like 'fc'",
}
NOT_TEXT = {7: "int, not a string", None: "NoneType, not a string"}

DOORS = {
    "pemnify": lambda model, name: pemnify(net(), adapter_name=name, **OPTIONS),
    "get_peft_model": lambda model, name: get_peft_model(net(), PemnConfig(**OPTIONS), name),
    "add_adapter": lambda model, name: model.add_adapter(name, PemnConfig(**OPTIONS)),
    "rename": lambda model, name: rename_adapter(model, "one", name),
    "algebra": lambda model, name: model.add_weighted_adapter(["one"], None, name, "union"),
}


@pytest.mark.parametrize("door", DOORS)
def test_the_others_are_refused_at_once(door):
    model = pemnify(net(), adapter_name="one", **OPTIONS).eval()
    before = models.Snapshot(model, lambda model: model(X).detach())
    for name, why in REFUSED.items():
        with pytest.raises(AdapterNameError) as error:
            DOORS[door](model, name)
        models.says(error, "cannot be an adapter's name", why, "Choose another", "Nothing was")
        assert len(str(error.value)) < 400
        before.assert_unchanged()
        assert list(model.peft_config) == ["one"]


@pytest.mark.parametrize("door", ["load_adapter", "from_pretrained"])
def test_loading_under_such_a_name_is_refused(door, tmp_path):
    pemnify(net(), adapter_name="one", **OPTIONS).save_pretrained(tmp_path)
    model = pemnify(net(), adapter_name="two", **OPTIONS).eval()
    before = models.Snapshot(model, lambda model: model(X).detach())
    folder = str(tmp_path / "one")
    load = {
        "load_adapter": model.load_adapter,
        "from_pretrained": lambda *given: PeftModel.from_pretrained(net(), *given),
    }[door]
    for name, why in REFUSED.items():
        with pytest.raises(AdapterNameError, match="cannot be an adapter's name") as error:
            load(folder, name)
        models.says(error, why)
        before.assert_unchanged()
        assert list(model.peft_config) == ["two"]


def test_transformers_doors_refuse_them(tmp_path):
    config = PemnConfig(bank="own", selector="topk", modules_to_save=["classifier"])
    named = models.bert()
    named.add_adapter(config, adapter_name="one")
    named.save_pretrained(tmp_path)
    for name in ("train", "v1.0", "n" * 300, "classifier", "a/"):
        model = models.bert()
        before = models.Snapshot(model, lambda model: model(models.tokens()).logits.detach())
        with pytest.raises(AdapterNameError):
            model.add_adapter(config, adapter_name=name)
        before.assert_unchanged()
        with pytest.raises(AdapterNameError):
            model.load_adapter(str(tmp_path), adapter_name=name)
        before.assert_unchanged()


@pytest.mark.parametrize("name", NOT_TEXT)
def test_what_is_no_text_is_no_name(name):
    with pytest.raises(AdapterNameError, match=NOT_TEXT[name]):
        pemnify(net(), adapter_name=name, **OPTIONS)


def test_a_taken_name_is_refused():
    model = pemnify(net(), adapter_name="one", **OPTIONS)
    model.add_adapter("two", PemnConfig(**OPTIONS))
    for door in ("add_adapter", "rename", "algebra"):
        with pytest.raises((AdapterError, ValueError), match="two"):
            DOORS[door](model, "two")


def test_an_earlier_adapters_name_may_stand_against_what_a_new_one_saves_whole():
    model = pemnify(net(), bank="own", selector="topk", adapter_name="my_norm")
    with pytest.raises(AdapterNameError, match=r"'my_norm' cannot be .* ends like 'norm'"):
        model.add_adapter("two", PemnConfig(bank="own", selector="topk", modules_to_save=["norm"]))
    assert list(model.peft_config) == ["my_norm"]


KEYS = [
    ("x.masked_weight.pemn_masks.a.scores", "a", "x.masked_weight.pemn_masks.scores"),
    ("a.masked_w.pemn_masks.a.bits", "a", "a.masked_w.pemn_masks.bits"),
    ("x.task_tensors.pemn_tensors.bias.bias", "bias", "x.task_tensors.pemn_tensors.bias"),
    ("masked_w.pemn_masks.pemn_masks.bits", "pemn_masks", "masked_w.pemn_masks.bits"),
    ("x.masked_w.pemn_masks.b.bits", "a", "x.masked_w.pemn_masks.b.bits"),
    ("fc.weight", "weight", "fc.weight"),
    ("pemn_masks.a.weight", "a", "pemn_masks.a.weight"),
]


@pytest.mark.parametrize(("key", "name", "expected"), KEYS)
def test_only_an_adapters_own_place_in_a_key_is_its_name(key, name, expected):
    assert without_name(key, name) == expected
