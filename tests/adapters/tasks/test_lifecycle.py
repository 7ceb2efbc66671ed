"""pemnify, train, save, load, switch, delete, merge, unload - for every bank."""

import gc
import json
import weakref

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.errors import NonFiniteScoresError
from pemn_surgery.numbers import rng
from tests.adapters import models
from tests.adapters.models import BANKS, GENERATED, NET_TARGETS, SHARED

every_bank = pytest.mark.parametrize("bank", list(BANKS))
shared_banks = pytest.mark.parametrize("bank", SHARED)

# What rest="train" (drawn numbers) and rest="stats" (the model's own) put beside the masks.
NORMS = ("bn1", "bn2", "bn3")
STATISTICS = {f"{norm}.{name}" for norm in NORMS for name in ("running_mean", "running_var")}
AFFINE = {f"{norm}.{name}" for norm in NORMS for name in ("weight", "bias")}
TRAINED = STATISTICS | AFFINE | {"conv1.bias", "head.bias"}


def make(bank, seed=0, **changes):
    return pemnify(models.net(seed), **{**BANKS[bank], **changes})


def file_key(name):
    path, _, tensor = name.rpartition(".")
    return f"base_model.model.{path}.task_tensors.pemn_tensors.{tensor}"


def mask_file_key(name):
    return f"base_model.model.{name.removesuffix('.weight')}.masked_weight.pemn_masks.bits"


def expected_fill(bank, base):
    """The unmasked weights by hand, from the generator alone."""
    options = BANKS[bank]
    seed = options.get("seed", 0)
    largest, fan = 576, 72
    std = (2 / fan) ** 0.5
    fills = {}
    for name, shape in NET_TARGETS.items():
        count = int(torch.Size(shape).numel())
        fan_in = count // shape[0]
        if bank == "own":
            fills[name] = base.state_dict()[name].clone()
            continue
        if bank == "mp":
            vector = rng.normal(seed, "bank", largest, std)
        elif bank == "rp":
            period = int(largest * 0.01) + 1
            vector = rng.normal(seed, "bank", period, std)
        elif bank == "rp_aligned":
            d = int(largest * 0.05) + 1
            period = (
                count
                if d >= count
                else max(
                    [rows * fan_in for rows in range(1, d // fan_in + 1)]
                    or [one for one in range(1, d + 1) if fan_in % one == 0]
                )
            )
            vector = rng.normal(seed, "bank", d, std)[:period]
        elif bank == "rp_permuted":
            period = int(largest * 0.05) + 1
            short = rng.normal(seed, "bank", period, std)
            tiled = [short[i % period] for i in range(largest)]
            vector = [tiled[i] for i in rng.permutation(seed, "permutation", largest)]
        elif bank == "one_layer":
            stream = "bank/" + "x".join(map(str, shape))
            vector = rng.normal(seed, stream, count, (2 / fan_in) ** 0.5)
        else:
            vector = rng.signs(seed, f"weight/{name}", count, (2 / fan_in) ** 0.5)
        values = [float(vector[i % len(vector)]) for i in range(count)]
        fills[name] = torch.tensor(values).view(shape)
    return fills


def scale_of(bank, mask):
    scaled = BANKS[bank].get("scale") == "sqrt_density"
    return (mask.numel() / mask.sum().float()).sqrt() if scaled else torch.tensor(1.0)


@every_bank
def test_effective_weight_is_fill_times_mask(bank):
    base = models.net()
    model = models.train(pemnify(models.clone(base), **BANKS[bank]))
    fills = expected_fill(bank, base)
    chosen = models.masks(model)
    assert set(chosen) == set(fills) == set(NET_TARGETS)
    for name, mask in chosen.items():
        assert int(mask.sum()) == mask.numel() - mask.numel() // 2, name
        weight = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}").weight
        expected = torch.where(mask, fills[name], torch.zeros(())) * scale_of(bank, mask)
        models.assert_equal(weight.detach() + 0.0, expected + 0.0, name)


@every_bank
def test_training_moves_masks_and_logits(bank):
    model = make(bank)
    before, start = models.masks(model), models.logits(model)
    models.train(model)
    assert models.flips(before, models.masks(model)) > 10
    models.assert_differs(models.logits(model), start)


@every_bank
def test_training_leaves_the_frozen_numbers_alone(bank):
    base = models.net()
    model = make(bank)
    models.train(model, steps=3)
    fills = expected_fill(bank, base)
    layers = models.mask_layers(model)
    assert set(layers) == set(fills)
    for name, layer in layers.items():
        models.assert_equal(layer.fill().detach(), fills[name], name)
    kept = model.base_model.model.state_dict()
    for name in TRAINED:  # the module's own tensors serve while adapters are disabled
        models.assert_equal(kept[name], base.state_dict()[name], name)


@every_bank
def test_file_holds_bits_and_task_tensors_only(bank, tmp_path):
    model = models.train(make(bank))
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / models.WEIGHTS_FILE)
    others = STATISTICS if bank == "own" else TRAINED
    masks = {mask_file_key(name) for name in NET_TARGETS}
    assert set(stored) == masks | {file_key(name) for name in others}
    for name, mask in models.masks(model).items():
        value = stored[mask_file_key(name)]
        assert value.dtype == torch.uint8
        assert value.numel() == 32 + (mask.numel() + 7) // 8
        flat = [value[32 + i // 8].item() >> (i % 8) & 1 for i in range(mask.numel())]
        assert flat == mask.flatten().int().tolist(), name
    for name in others:
        path, _, tensor = name.rpartition(".")
        copies = models.task_layers(model)[path].pemn_tensors["default"]
        models.assert_equal(stored[file_key(name)], copies(tensor).detach(), name)


@every_bank
def test_file_size(bank, tmp_path):
    base = models.wide()
    weights = sum(p.numel() for p in base.parameters() if p.dim() == 2)
    assert weights >= 2_000_000
    planned = plan(base, **BANKS[bank])
    model = pemnify(base, **BANKS[bank])
    model.save_pretrained(str(tmp_path))
    file = tmp_path / models.WEIGHTS_FILE
    stored = load_file(file)
    others = [v for key, v in stored.items() if "pemn_masks" not in key]
    assert len(stored) - len(others) == 3
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    other_bytes = sum(v.numel() * v.element_size() for v in others)
    assert weights / 8 <= file.stat().st_size <= weights / 8 * 1.02 + other_bytes + header
    size = file.stat().st_size - header - other_bytes
    assert size == planned.mask_bytes == weights // 8 + 3 * 32
    assert other_bytes == planned.other_bytes


RELOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import save_file
import pemn_surgery.adapters
from tests.adapters import models
torch.set_num_threads(1)
folder = Path(sys.argv[1])
found = {}
for bank in models.BANKS:
    base = models.net(seed=77 if bank in models.GENERATED else 0)
    found[bank] = models.logits(PeftModel.from_pretrained(base, str(folder / bank)))
    assert len(models.mask_layers(base)) == 4
save_file(found, folder / "logits.safetensors")
"""


def test_reload_in_a_new_process_is_bit_identical(tmp_path):
    """Banks from a seed onto a base with other random weights, own weights onto the same base."""
    expected = {}
    for bank in BANKS:
        model = models.train(make(bank))
        model.save_pretrained(str(tmp_path / bank))
        expected[bank] = models.logits(model)
    models.run_python(RELOAD, tmp_path)
    models.assert_same_tensors(load_file(tmp_path / "logits.safetensors"), expected)


@every_bank
def test_reload_gives_the_same_masks_and_tensors(bank, tmp_path):
    model = models.train(make(bank))
    model.save_pretrained(str(tmp_path))
    base = models.net(seed=5 if bank in GENERATED else 0)
    again = PeftModel.from_pretrained(base, str(tmp_path))
    models.assert_same_tensors(models.masks(again), models.masks(model))
    models.assert_equal(models.logits(again), models.logits(model))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == []
    again.save_pretrained(str(tmp_path / "again"))
    first, second = (
        (folder / models.WEIGHTS_FILE).read_bytes() for folder in (tmp_path, tmp_path / "again")
    )
    assert first == second


def test_reload_of_a_timm_model(tmp_path):
    base = timm.create_model("test_resnet", num_classes=4)
    model = models.train(pemnify(base, bank="rp", ratio=0.01))
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(
        timm.create_model("test_resnet", num_classes=4), str(tmp_path)
    )
    x = models.images(5, size=32)
    models.assert_equal(models.logits(again, x), models.logits(model, x))


def test_loading_to_train_starts_from_the_same_masks(tmp_path):
    for bank, options in {
        "rp": {}, "own": {"selector": "threshold"}, "mp": {"density": 0.3},
    }.items():  # fmt: skip
        model = models.train(make(bank, **options))
        folder = str(tmp_path / bank)
        model.save_pretrained(folder)
        with pytest.warns(UserWarning, match="holds bits, not scores, for 4 masks"):
            again = PeftModel.from_pretrained(models.net(), folder, is_trainable=True)
        models.assert_same_tensors(models.masks(again), models.masks(model))
        models.assert_equal(models.logits(again), models.logits(model))
        before = models.masks(again)
        models.train(again, steps=10)
        assert models.flips(before, models.masks(again)) > 10, bank


@every_bank
def test_two_tasks_are_each_as_if_alone(bank):
    alone = {}
    for task in (1, 2):
        model = make(bank)
        models.train(model, task, steps=3)
        alone[task] = (models.logits(model), models.masks(model))
    models.assert_differs(alone[1][0], alone[2][0])
    assert models.flips(alone[1][1], alone[2][1]) > 10
    model = pemnify(models.net(), **BANKS[bank], adapter_name="task1")
    model.add_adapter("task2", PemnConfig(**BANKS[bank]))
    optimizers = {}
    for task in (1, 2):
        model.set_adapter(f"task{task}")
        optimizers[task] = models.trainer_of(model)
    for task in (1, 2, 2, 1, 2, 1):
        model.set_adapter(f"task{task}")
        models.step(model, optimizers[task], task)
    for task in (2, 1, 2, 1):
        model.set_adapter(f"task{task}")
        models.assert_equal(models.logits(model), alone[task][0], f"task {task}")
        models.assert_same_tensors(models.masks(model, f"task{task}"), alone[task][1])


@every_bank
def test_two_saved_tasks_load_beside_each_other(bank, tmp_path):
    expected = {}
    for task in (1, 2):
        model = models.train(make(bank), task)
        model.save_pretrained(str(tmp_path / str(task)))
        expected[task] = models.logits(model)
    base = models.net(seed=8 if bank in GENERATED else 0)
    model = PeftModel.from_pretrained(base, str(tmp_path / "1"), adapter_name="one")
    model.load_adapter(str(tmp_path / "2"), "two")
    for name, task in [("one", 1), ("two", 2), ("one", 1)]:
        model.set_adapter(name)
        models.assert_equal(models.logits(model), expected[task], name)
    models.assert_differs(expected[1], expected[2])


@every_bank
def test_running_statistics_belong_to_the_task(bank, tmp_path):
    base = models.net()
    start = base.state_dict()["bn1.running_mean"].clone()
    model = models.train(pemnify(base, **BANKS[bank], adapter_name="one"), 1)
    model.add_adapter("two", PemnConfig(**BANKS[bank]))
    model.set_adapter("two")
    models.train(model, 2)
    norm = model.base_model.model.bn1
    seen = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        seen[name] = norm.running_mean.clone()
        model.save_pretrained(str(tmp_path), selected_adapters=[name])
        stored = load_file(tmp_path / name / models.WEIGHTS_FILE)
        models.assert_equal(stored[file_key("bn1.running_mean")], seen[name])
    models.assert_differs(seen["one"], seen["two"])
    models.assert_differs(seen["one"], start)
    with model.disable_adapter():
        models.assert_equal(norm.running_mean, start)


@every_bank
def test_disabled_adapter_gives_the_base(bank):
    base = models.net()
    plain = models.clone(base)
    with torch.no_grad():
        for name, fill in expected_fill(bank, base).items():
            plain.get_parameter(name).copy_(fill)
    model = models.train(pemnify(base, **BANKS[bank]))
    trained = models.logits(model)
    with model.disable_adapter():
        models.assert_equal(models.logits(model), models.logits(plain))
    models.assert_equal(models.logits(model), trained)
    models.assert_differs(trained, models.logits(plain))


@every_bank
def test_delete_adapter(bank):
    model = pemnify(models.net(), **BANKS[bank], adapter_name="keep")
    models.train(model, 1)
    expected = models.logits(model)
    alone = dict(model.state_dict())
    model.add_adapter("drop", PemnConfig(**BANKS[bank]))
    assert any(".drop." in key for key in model.state_dict())
    model.set_adapter("drop")
    models.train(model, 2)
    model.set_adapter("keep")
    model.delete_adapter("drop")
    assert list(model.peft_config) == ["keep"]
    models.assert_same_tensors(model.state_dict(), alone)
    models.assert_equal(models.logits(model), expected)


@every_bank
def test_merge_and_unload_gives_a_plain_model(bank):
    base = models.net()
    classes = {name: type(module) for name, module in base.named_modules()}
    keys = {name: value.dtype for name, value in base.state_dict().items()}
    model = models.train(pemnify(base, **BANKS[bank]))
    expected, chosen = models.logits(model), models.masks(model)
    fills = expected_fill(bank, models.net())
    merged = model.merge_and_unload()
    assert merged is base
    assert {name: type(module) for name, module in merged.named_modules()} == classes
    assert {name: value.dtype for name, value in merged.state_dict().items()} == keys
    models.assert_equal(models.logits(merged), expected)
    for name, mask in chosen.items():
        weight = merged.state_dict()[name]
        expected_weight = torch.where(mask, fills[name], torch.zeros(())) * scale_of(bank, mask)
        models.assert_equal(weight, expected_weight + 0.0, name)
        assert not torch.signbit(weight[~mask]).any(), "zeros must be +0"
    assert isinstance(merged.conv1.weight, nn.Parameter)


@every_bank
def test_merged_model_saves_and_trains_like_any_other(bank, tmp_path):
    merged = models.train(make(bank)).merge_and_unload()
    save_file(merged.state_dict(), tmp_path / "m.safetensors")
    plain = models.net(seed=31)
    plain.load_state_dict(load_file(tmp_path / "m.safetensors"))
    models.assert_equal(models.logits(plain), models.logits(merged))
    before = merged.conv2.weight.detach().clone()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    models.train(merged)
    models.assert_differs(merged.conv2.weight.detach(), before)


@every_bank
def test_unload_gives_the_unmasked_weights(bank):
    base = models.net()
    original = {name: value.clone() for name, value in base.state_dict().items()}
    classes = [type(module) for module in base.modules()]
    fills = expected_fill(bank, base)
    model = models.train(pemnify(base, **BANKS[bank]))
    plain = model.unload()
    assert plain is base
    assert [type(module) for module in plain.modules()] == classes
    models.assert_same_tensors(plain.state_dict(), {**original, **fills})


@every_bank
def test_merge_adapter_and_back_is_exact(bank):
    model = models.train(make(bank))
    expected, before = models.logits(model), dict(models.masks(model))
    keys = set(model.state_dict())
    model.merge_adapter()
    assert all(layer.merged for layer in models.mask_layers(model).values())
    models.assert_equal(models.logits(model), expected)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in models.mask_layers(model).values())
    models.assert_equal(models.logits(model), expected)
    models.assert_same_tensors(models.masks(model), before)
    assert set(model.state_dict()) == keys
    for name, fill in expected_fill(bank, models.net()).items():
        models.assert_equal(models.mask_layers(model)[name].fill().detach(), fill, name)


def test_safe_merge_refuses_broken_scores():
    model = make("mp")
    with torch.no_grad():
        models.mask_layers(model)["conv2.weight"].mask_of("default").scores[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteScoresError) as error:
        model.merge_adapter(safe_merge=True)
    models.says(error, "conv2.weight", "1 of the 576 scores", "lower the learning rate")


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.2, 1.0])
def test_rp_weights_are_the_tiled_prototype(ratio):
    model = models.train(make("rp", ratio=ratio))
    merged = model.merge_and_unload()
    count = min(int(576 * ratio) + 1, 576)
    vector = rng.normal(0, "bank", count, (2 / 72) ** 0.5)
    values = set()
    for name in NET_TARGETS:
        flat = merged.state_dict()[name].flatten().tolist()
        kept = [(place, value) for place, value in enumerate(flat) if value != 0.0]
        assert kept, name
        for place, value in kept:
            assert value == float(vector[place % count]), (name, place)
        values |= {value for _, value in kept}
    assert 1 <= len(values) <= count


@pytest.mark.parametrize("length", [1, 7, 576, 10_000])
def test_rp_length(length):
    layer = next(iter(models.mask_layers(make("rp", ratio=None, length=length)).values()))
    assert layer.bank.values.numel() == min(length, 576)


def test_one_layer_shares_values_between_equal_shapes():
    layers = models.mask_layers(models.train(make("one_layer")))
    models.assert_equal(layers["conv2.weight"].fill(), layers["conv3.weight"].fill())
    first = layers["conv2.weight"].fill().data_ptr()
    assert first == layers["conv3.weight"].fill().data_ptr(), "two copies of one prototype"
    assert layers["conv1.weight"].fill().data_ptr() != first
    assert layers["conv1.weight"].bank.values.numel() == 216 + 576 + 32


@shared_banks
def test_replaced_weights_are_freed(bank):
    base = models.net()
    dead = {name: weakref.ref(base.get_parameter(name)) for name in NET_TARGETS}
    kept = weakref.ref(base.get_parameter("conv1.bias"))
    model = pemnify(base, **BANKS[bank])
    gc.collect()
    assert {name for name, reference in dead.items() if reference() is not None} == set()
    assert kept() is not None
    assert not any(name.endswith(tuple(NET_TARGETS)) for name, _ in model.named_parameters())


@pytest.mark.parametrize("bank", ["own", "own_generated"])
def test_own_weights_stay_in_place(bank):
    base = models.net()
    weights = {name: base.get_parameter(name) for name in NET_TARGETS}
    model = pemnify(base, **BANKS[bank])
    named = dict(model.base_model.model.named_parameters())
    for name, weight in weights.items():
        assert named[name] is weight
        assert not weight.requires_grad


def test_modules_to_save(tmp_path):
    base = models.net()
    start = base.head.weight.detach().clone()
    model = models.train(pemnify(base, bank="own", selector="topk", modules_to_save=["head"]))
    assert set(models.mask_layers(model)) == set(NET_TARGETS) - {"head.weight"}
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / models.WEIGHTS_FILE)
    head = {key: value for key, value in stored.items() if ".head." in key}
    assert set(head) == {"base_model.model.head.weight", "base_model.model.head.bias"}
    models.assert_differs(head["base_model.model.head.weight"], start)
    again = PeftModel.from_pretrained(models.net(), str(tmp_path))
    models.assert_equal(models.logits(again), models.logits(model))
    expected = models.logits(model)
    merged = model.merge_and_unload()
    assert type(merged.head) is nn.Linear
    models.assert_equal(merged.head.weight.detach(), head["base_model.model.head.weight"])
    models.assert_equal(models.logits(merged), expected)


def test_timm_head_is_trained_whole_on_own_weights(tmp_path):
    base = timm.create_model("test_resnet", num_classes=4)
    copy = models.clone(base)
    model = models.train(pemnify(base, bank="own", selector="topk"))
    assert model.peft_config["default"].modules_to_save == ["fc"]
    assert "fc.weight" not in models.mask_layers(model)
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / models.WEIGHTS_FILE)
    models.assert_differs(stored["base_model.model.fc.weight"], copy.fc.weight.detach())
    torch.nn.init.zeros_(copy.fc.weight)  # a new classifier is random: the file must bring it
    again = PeftModel.from_pretrained(copy, str(tmp_path))
    x = models.images(4, size=32)
    models.assert_equal(models.logits(again, x), models.logits(model, x))


def test_timm_head_is_masked_when_asked_or_drawn():
    for options in ({"bank": "mp"}, {"bank": "own", "selector": "topk", "modules_to_save": []}):
        model = pemnify(timm.create_model("test_resnet", num_classes=4), **options)
        assert "fc.weight" in models.mask_layers(model), options


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"target_modules": ["conv2", "head"]}, {"conv2.weight", "head.weight"}),
        ({"target_modules": r"conv[13]"}, {"conv1.weight", "conv3.weight"}),
        ({"exclude_modules": ["conv1"]}, {"conv2.weight", "conv3.weight", "head.weight"}),
        ({"exclude_modules": r"conv\d"}, {"head.weight"}),
        ({"target_modules": "all-linear"}, {"head.weight"}),
        ({"modules_to_save": ["conv3"]}, {"conv1.weight", "conv2.weight", "head.weight"}),
        ({}, set(NET_TARGETS)),
    ],
)
def test_targets(options, wanted):
    model = pemnify(models.net(), **options)
    assert set(models.mask_layers(model)) == wanted
    original = models.net().state_dict()
    for name in set(NET_TARGETS) - wanted:
        module = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        weight = getattr(module, "original_module", module).weight
        models.assert_equal(weight.detach(), original[name], name)


@models.ignore_peft_on_transformers
@pytest.mark.parametrize("layers", [[1], 0, [0, 1]])
def test_layers_to_transform(layers):
    model = pemnify(models.bert(), bank="own", selector="topk", layers_to_transform=layers)
    wanted = [layers] if isinstance(layers, int) else layers
    blocks = "attention.self.query attention.self.key attention.self.value attention.output.dense"
    names = [*blocks.split(), "intermediate.dense", "output.dense"]
    assert set(models.mask_layers(model)) == {
        f"bert.encoder.layer.{layer}.{name}.weight" for layer in wanted for name in names
    }


@models.ignore_peft_on_transformers
def test_sequence_classification_on_bert(tmp_path):
    base = models.bert()
    head = base.classifier.weight.detach().clone()
    model = pemnify(base, bank="own", selector="threshold", task_type="SEQ_CLS")
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    assert "classifier.weight" not in models.mask_layers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=models.tokens(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / models.WEIGHTS_FILE)
    models.assert_differs(stored["base_model.model.classifier.weight"], head)
    with torch.no_grad():
        expected = model(input_ids=models.tokens(7)).logits
        again = PeftModel.from_pretrained(models.bert(), str(tmp_path)).eval()
        models.assert_equal(again(input_ids=models.tokens(7)).logits, expected)
    assert len(models.masks(again)) == 13
    models.assert_same_tensors(models.masks(again), models.masks(model))


def test_saved_configuration_says_everything_and_nothing_of_the_runtime(tmp_path):
    model = make("rp_permuted")
    model.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PEMN"
    assert stored["inference_mode"] is True
    assert {name: stored[name] for name in BANKS["rp_permuted"]} == BANKS["rp_permuted"]
    assert set(stored["fingerprint"]) == {"float32", "bfloat16", "float16"}
    assert not {"keep_scores", "file"} & set(stored)


def test_scores_are_kept_in_a_model_that_is_loaded_for_inference(tmp_path):
    model = models.train(make("own"))
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(tmp_path))
    config = PemnConfig.from_pretrained(str(tmp_path))
    config.keep_scores = True
    again = PeftModel.from_pretrained(models.net(), str(tmp_path), config=config)
    expected = {key: value for key, value in model.state_dict().items() if ".scores" in key}
    assert len(expected) == len(models.NET_TARGETS)
    assert config.inference_mode
    models.assert_same_tensors(
        {key: value for key, value in again.state_dict().items() if ".pemn_masks." in key}, expected
    )
    assert not any(parameter.requires_grad for parameter in again.parameters())
    models.assert_equal(models.logits(again), models.logits(model))


def test_saving_refuses_broken_scores(tmp_path):
    model = models.train(make("rp"))
    scores = models.mask_layers(model)["conv3.weight"].mask_of("default").scores
    with torch.no_grad():
        scores.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with pytest.raises(NonFiniteScoresError) as error:
        model.save_pretrained(str(tmp_path))
    models.says(error, "3 of the 576 scores", "conv3.weight", "earlier checkpoint")
    assert not (tmp_path / models.WEIGHTS_FILE).exists()


def test_several_active_adapters_compose_as_and():
    model = pemnify(models.net(), bank="rp", adapter_name="a")
    models.train(model, 1)
    model.add_adapter("b", PemnConfig(bank="rp"))
    model.set_adapter("b")
    models.train(model, 2)
    model.base_model.set_adapter(["a", "b"])
    both = models.masks(model, "a"), models.masks(model, "b")
    fills = expected_fill("rp", models.net())
    assert models.flips(*both) > 10
    for name, layer in models.mask_layers(model).items():
        expected = torch.where(both[0][name] & both[1][name], fills[name], torch.zeros(()))
        models.assert_equal(layer.read().detach() + 0.0, expected, name)


def test_a_model_that_is_nothing_but_masks_comes_back(tmp_path):
    """Without a single parameter left PEFT takes the model for one that has no key prefix."""

    def build():
        return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))

    model = pemnify(build(), bank="rp", ratio=0.5, seed=4)
    x = torch.ones(2, 6)
    expected = model(x).detach()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(build(), str(tmp_path))
    assert not list(loaded.parameters())
    models.assert_equal(loaded(x), expected)


def test_a_masked_layer_answers_for_its_masks():
    model = make("rp")
    model.add_adapter("b", PemnConfig(**BANKS["rp"]))
    layer, bare = model.base_model.model.conv1, model.base_model.model.bn1
    child = layer.masked_weight
    assert layer.adapter_layer_names == child.adapter_layer_names == ("pemn_masks",)
    assert layer.pemn_masks is child.pemn_masks
    assert layer.active_adapters == ["default"]
    model.set_adapter("b")
    assert layer.active_adapters == ["b"]
    assert not hasattr(bare, "pemn_masks")
    assert not hasattr(model.merge_and_unload().conv1, "active_adapters")


def test_a_class_with_such_a_name_keeps_it():
    class Own(nn.Linear):
        active_adapters = "its own"

    model = pemnify(nn.Sequential(Own(8, 8)), bank="rp", ratio=0.5)
    assert model.base_model.model[0].active_adapters == "its own"
    assert list(model.base_model.model[0].pemn_masks) == ["default"]
