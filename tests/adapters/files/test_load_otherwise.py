"""PEFT's ``key_mapping`` and ``ignore_mismatched_sizes``, beside LoRA under the same."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tests.adapters.models as models
from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters import to_trainable
from pemn_surgery.errors import ArchitectureError, ConfigError, FingerprintError, PemnWarning

MAPPING = {r"^conv(\d)": r"features.c\1", r"^head": "classifier"}


class Renamed(nn.Module):
    """`models.Net` after a release that put its convolutions elsewhere."""

    def __init__(self, net, order=(1, 2, 3)):
        super().__init__()
        self.features = nn.Module()
        for place in order:
            setattr(self.features, f"c{place}", getattr(net, f"conv{place}"))
        self.bn1, self.bn2, self.bn3 = net.bn1, net.bn2, net.bn3
        self.classifier = net.head

    def forward(self, x):
        x = torch.relu(self.bn1(self.features.c1(x)))
        x = torch.relu(self.bn2(self.features.c2(x)))
        x = torch.relu(self.bn3(self.features.c3(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def renamed(seed=0, **shape):
    return Renamed(models.net(seed, **shape))


KINDS = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.05, "permute": True},
    "one_layer": {"bank": "one_layer"},
    "model_bank": {"bank": "mp", "bank_init": "model"},
    "own": {"bank": "own", "selector": "topk"},
    "own_train": {"bank": "own", "selector": "topk", "rest": "train"},
    "entropy": {"bank": "own", "selector": "topk", "coding": "entropy"},
    "context": {"bank": "mp", "coding": "context"},
    "pattern": {"bank": "own", "density": 0.4, "density_pattern": {"conv[23]": 0.1, "head": 1.0}},
    "erk": {"bank": "own", "density": "erk"},
    "largest": {
        "bank": "own",
        "selector": "topk",
        "form": "flip",
        "support": 0.2,
        "support_by": "largest",
    },
}


def saved(folder, **options):
    model = models.train(pemnify(models.net(), **options))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_key_mapping_loads_onto_a_model_with_other_names(kind, door, tmp_path):
    expected = models.logits(saved(tmp_path / "old", **KINDS[kind]))
    if door == "from_pretrained":
        model = PeftModel.from_pretrained(renamed(), tmp_path / "old", key_mapping=MAPPING)
        name = "default"
    else:
        first = {key: KINDS[kind][key] for key in KINDS[kind] if key != "density_pattern"}
        model = pemnify(renamed(), adapter_name="other", **first)
        name = "second"
        model.load_adapter(str(tmp_path / "old"), name, key_mapping=MAPPING)
        model.set_adapter(name)
    models.assert_equal(models.logits(model), expected)
    # Saved from here it is an adapter of this model, under its names: nothing has to be mapped.
    model.save_pretrained(tmp_path / "new", selected_adapters=[name])
    place = tmp_path / "new" / ("" if name == "default" else name)
    again = PeftModel.from_pretrained(renamed(), place)
    models.assert_equal(models.logits(again), expected)
    with pytest.raises((ArchitectureError, FingerprintError)):
        PeftModel.from_pretrained(models.net(), place)
    to_trainable(again)
    models.assert_same_tensors(models.masks(again), models.masks(model, name))
    counts = {n: int(mask.sum()) for n, mask in models.masks(again).items()}
    models.train(again, task=1)  # each mask keeps its density
    assert {n: int(mask.sum()) for n, mask in models.masks(again).items()} == counts


def test_own_weights_may_come_in_another_order(tmp_path):
    expected = models.logits(saved(tmp_path / "old", bank="own", selector="topk"))
    base = [Renamed(models.net(), order=(3, 1, 2)) for _ in range(2)]
    model = PeftModel.from_pretrained(base[0], tmp_path / "old", key_mapping=MAPPING)
    models.assert_equal(models.logits(model), expected)
    model.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(base[1], tmp_path / "new")
    models.assert_equal(models.logits(again), expected)


def test_a_models_own_mapping_counts_as_pefts_does(tmp_path):
    expected = models.logits(saved(tmp_path, bank="own", selector="topk"))
    model = renamed()
    model._checkpoint_conversion_mapping = MAPPING
    models.assert_equal(models.logits(PeftModel.from_pretrained(model, tmp_path)), expected)


def test_lora_does_so(tmp_path):
    model = get_peft_model(
        models.net(), LoraConfig(target_modules=[".*conv2", "conv2", "c2"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(renamed(), tmp_path, key_mapping=MAPPING)
    models.assert_equal(models.logits(loaded), models.logits(model))


def test_without_it_the_error_names_it(tmp_path):
    saved(tmp_path, bank="own", selector="topk")
    with pytest.raises(ArchitectureError, match="give key_mapping"):
        PeftModel.from_pretrained(renamed(), tmp_path)


@pytest.mark.parametrize("kind", ["own", "model_bank"])
def test_another_base_is_refused_under_other_names_too(kind, tmp_path):
    saved(tmp_path, **KINDS[kind])
    base = renamed(1)
    with pytest.raises(FingerprintError, match="trained on a base"):
        PeftModel.from_pretrained(base, tmp_path, key_mapping=MAPPING)
    assert type(base.features.c1) is nn.Conv2d


def test_names_that_meet_are_refused(tmp_path):
    saved(tmp_path, bank="own", selector="topk")
    with pytest.raises(ConfigError, match=r"several tensors of .* one name"):
        PeftModel.from_pretrained(renamed(), tmp_path, key_mapping={r"^conv\d": "features.c1"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bank": "own", "bank_init": "signed_constant"}, "draws each weight's numbers by its"),
        ({"bank": "own", "selector": "topk", "coding": "base"}, 'coding="base"'),
        (
            {"bank": "own", "selector": "topk", "support": 0.2},
            "draws the masked weights by their names",
        ),
        ({"bank": "mp", "support": 0.2, "support_by": "rows"}, "draws the masked weights"),
        (
            {
                **{"bank": "own", "selector": "topk", "support": 0.2, "support_by": "largest"},
                "support_others": "drawn",
            },
            "draws a mask for each weight by its name",
        ),
    ],
)
def test_what_goes_by_names_cannot_be_renamed(options, said, tmp_path):
    expected = models.logits(saved(tmp_path, **options))
    with pytest.raises(ConfigError, match=said):
        PeftModel.from_pretrained(renamed(), tmp_path, key_mapping=MAPPING)
    idle = PeftModel.from_pretrained(models.net(), tmp_path, key_mapping={"^nothing": "x"})
    models.assert_equal(models.logits(idle), expected)


def test_scores_are_renamed_too(tmp_path):
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(renamed(), tmp_path, key_mapping=MAPPING, is_trainable=True)
    models.assert_equal(models.logits(loaded), models.logits(model))
    expected = {
        name.replace("conv", "features.c").replace("head", "classifier"): mask
        for name, mask in models.masks(model).items()
    }
    models.assert_same_tensors(models.masks(loaded), expected)


def test_names_in_full_in_the_configuration_are_renamed(tmp_path):
    model = models.train(
        pemnify(models.net(), bank="own", selector="topk", functional_weights=["conv1.weight"])
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(renamed(), tmp_path, key_mapping=MAPPING)
    assert loaded.peft_config["default"].functional_weights == ["features.c1.weight"]
    models.assert_equal(models.logits(loaded), models.logits(model))


# ---- sizes --------------------------------------------------------------------------------------


def other_head(classes=7):
    model = models.net()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model.head = nn.Linear(8, classes)
    return model


HEAD = {"bank": "own", "selector": "topk", "modules_to_save": ["head"]}


def test_ignore_mismatched_sizes_leaves_a_heads_tensors_as_the_model_has_them(tmp_path):
    model = saved(tmp_path, **HEAD)
    as_stored = PeftModel.from_pretrained(other_head(), tmp_path)
    models.assert_equal(models.logits(as_stored), models.logits(model))
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        loaded = PeftModel.from_pretrained(other_head(), tmp_path, ignore_mismatched_sizes=True)
    models.assert_same_tensors(models.masks(loaded), models.masks(model))
    head = loaded.base_model.model.head.modules_to_save["default"]
    models.assert_equal(head.weight.detach(), other_head().head.weight.detach())
    assert models.logits(loaded).shape == (6, 7)
    expected = models.net()
    for name, layer in models.mask_layers(model).items():
        expected.get_parameter(name).data = layer.owner.weight.detach()
    expected.head = other_head().head
    for name in ("bn1", "bn2", "bn3"):
        for tensor in ("running_mean", "running_var"):
            value = getattr(getattr(model.base_model.model, name), tensor)
            getattr(getattr(expected, name), tensor).copy_(value)
    models.assert_equal(models.logits(loaded), models.logits(expected))


def test_lora_leaves_them_so(tmp_path):
    config = LoraConfig(target_modules=["conv2"], modules_to_save=["head"], init_lora_weights=False)
    get_peft_model(models.net(), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        loaded = PeftModel.from_pretrained(other_head(), tmp_path, ignore_mismatched_sizes=True)
    head = loaded.base_model.model.head.modules_to_save["default"]
    models.assert_equal(head.weight.detach(), other_head().head.weight.detach())


@pytest.mark.parametrize("name", ["default", "second"])
def test_load_adapter_ignores_them_too(name, tmp_path):
    model = saved(tmp_path, **HEAD)
    other = pemnify(other_head(), **HEAD)
    with pytest.warns((UserWarning, PemnWarning)):
        other.load_adapter(str(tmp_path), name, ignore_mismatched_sizes=True)
    models.assert_same_tensors(models.masks(other, name), models.masks(model))
    head = other.base_model.model.head.modules_to_save[name]
    models.assert_equal(head.weight.detach(), other_head().head.weight.detach())


def test_tensors_of_a_task_may_have_other_sizes(tmp_path):
    """Not masked, and the task's own: a bias of another length keeps the model's value."""
    options = {"bank": "own", "selector": "topk", "rest": "train", "exclude_modules": ["head"]}
    model = saved(tmp_path, **options)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        loaded = PeftModel.from_pretrained(other_head(), tmp_path, ignore_mismatched_sizes=True)
    models.assert_equal(loaded.base_model.model.head.bias.detach(), other_head().head.bias.detach())
    models.assert_equal(
        loaded.base_model.model.conv1.bias.detach(), model.base_model.model.conv1.bias.detach()
    )


def test_masks_of_other_sizes_are_never_left_out(tmp_path):
    saved(tmp_path, bank="own", selector="topk")
    model = other_head()
    before = models.Snapshot(model)
    with pytest.raises(ArchitectureError) as error:
        PeftModel.from_pretrained(model, tmp_path, ignore_mismatched_sizes=True)
    models.says(error, "head.weight: file 32 weights, model 56 weights", "never masks")
    before.assert_unchanged()


def test_a_tensor_that_is_missing_is_still_refused(tmp_path):
    saved(tmp_path, bank="own", selector="topk")
    model = models.net()
    model.more = nn.BatchNorm2d(3)
    with pytest.raises(ArchitectureError, match=r"more\.running_mean: file none"):
        PeftModel.from_pretrained(model, tmp_path, ignore_mismatched_sizes=True)


def test_wishes_are_of_one_call(tmp_path):
    saved(tmp_path, **HEAD)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        PeftModel.from_pretrained(other_head(), tmp_path, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(other_head(), tmp_path)
    assert loaded.base_model.model.head.modules_to_save["default"].out_features == 4
    assert PemnConfig.from_pretrained(str(tmp_path)).origin.file.wish.ignores_sizes is False
