"""Flips and supports through the library: trained, saved, loaded, merged, combined, refused."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from pemn_surgery import PemnConfig, keep_weights, pemnify, plan, to_trainable
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.tasks.flips import take_back_flips
from pemn_surgery.errors import AdapterError, ArchitectureError, ConfigError
from pemn_surgery.numbers.support import Support
from tests.adapters import models
from tests.oracles import integers

OWN = {"bank": "own", "selector": "threshold"}
KINDS = {
    "flips": OWN | {"form": "flip"},
    "flips on a tenth": OWN | {"form": "flip", "support": 0.1, "seed": 3},
    "flips in rows": OWN | {"form": "flip", "support": 0.3, "support_by": "rows"},
    "flips of the largest": OWN | {"form": "flip", "support": 0.2, "support_by": "largest"},
    "flips of the smallest": OWN | {"form": "flip", "support": 0.2, "support_by": "smallest"},
    "drops on a fifth": OWN | {"support": 0.2},
    "half of a fifth": {"bank": "own", "selector": "topk", "support": 0.2},
    "flips of half": {"bank": "own", "selector": "topk", "form": "flip"},
    "largest scores, signs counting": {"bank": "own", "selector": "topk_signed", "support": 0.5},
    "rp, flips": {"bank": "rp", "ratio": 0.05, "form": "flip", "support": 0.5},
    "mp, a third": {"bank": "mp", "support": 0.3},
    "rp, partly frozen": {
        **{"bank": "rp", "ratio": 0.05, "density": 0.4, "seed": 5},
        **{"support": 0.3, "support_others": "drawn"},
    },
    "rows scaled": OWN | {"scale": "row"},
    "flips on a tenth, rows scaled": OWN | {"form": "flip", "support": 0.1, "scale": "row"},
}
_WIDE_AND_NARROW = (torch.float32, torch.bfloat16)
every_kind = pytest.mark.parametrize("kind", KINDS)


def trained(kind, task=1, **options):
    return models.train(pemnify(models.net(), **{**KINDS[kind], **options}), task, steps=3)


def load(folder, **options):
    return PeftModel.from_pretrained(models.net(), str(folder), **options).eval()


def wanted_weight(layer, name="default"):
    """The effective weight, number by number, from the fill, the places and the mask."""
    mask = models.mask_of_layer(layer, name)
    numbers = layer.fill().detach().clone().flatten()
    config = layer.mask_of(name)
    places = range(numbers.numel()) if config.places is None else config.places.tolist()
    assert len(places) == mask.numel()
    is_flip = type(config).__name__ == "FlipMask"
    if config.others is not None:
        drawn = drawn_others(layer.target, numbers.numel(), config.selector.density, seed=5)
        for place in set(range(numbers.numel())) - set(places):
            numbers[place] = numbers[place] if drawn[place] else 0.0
    for place, kept in zip(places, mask.flatten().tolist(), strict=True):
        if not kept:
            numbers[place] = -numbers[place] if is_flip else 0.0
    if config.row_scale is not None:
        factors = config.row_scale.detach()  # every layer here has its outputs first
        numbers = numbers.view(len(factors), -1) * factors[:, None]
    return numbers.view(layer.shape)


def drawn_others(name, weights, density, seed):
    """The seed's mask of what has no bit: the smallest numbers of a stream are dropped."""
    drawn = integers(seed, f"others/{name}", weights)
    by_size = sorted(range(weights), key=lambda place: (drawn[place], place))
    dropped = set(by_size[: int((1 - density) * weights)])
    return [place not in dropped for place in range(weights)]


@every_kind
def test_the_effective_weight_is_that_of_the_equations(kind):
    model = trained(kind)
    changed = 0
    for layer in models.mask_layers(model).values():
        models.assert_equal(layer.owner.weight.detach(), wanted_weight(layer), layer.target)
        changed += int((wanted_weight(layer) != layer.fill()).sum())
    assert changed > 0


@every_kind
def test_saved_loaded_merged_and_trained_on(kind, tmp_path):
    model = trained(kind)
    outputs, masks = models.logits(model), models.masks(model)
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    models.assert_equal(models.logits(loaded), outputs)
    models.assert_same_tensors(models.masks(loaded), masks)
    again = copy.deepcopy(loaded)
    to_trainable(again)
    models.assert_same_tensors(models.masks(again), masks)
    assert models.flips(masks, models.masks(models.train(again, 2, steps=4))) > 0
    dense = loaded.merge_and_unload()
    models.assert_equal(models.logits(dense), outputs)


@every_kind
def test_scores_and_bits_are_those_of_the_support_alone(kind, tmp_path):
    options = KINDS[kind]
    model = pemnify(models.net(), **options)
    share = options.get("support", 1)
    for layer in models.mask_layers(model).values():
        weights, scores = math.prod(layer.shape), layer.mask_of("default").scores
        if options.get("support_by") == "rows":
            rows = layer.shape[0]
            assert scores.numel() == max(round(share * rows), 1) * (weights // rows)
        else:
            assert scores.numel() == max(round(share * weights), 1)
    expected = plan(models.net(), **options).file_bytes
    model.save_pretrained(str(tmp_path))
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert sum((tmp_path / name).stat().st_size for name in files) == expected


@pytest.mark.parametrize(
    "kind", [name for name in KINDS if KINDS[name].get("selector") == "threshold"]
)
def test_training_begins_at_the_base(kind):
    plain = models.logits(models.net())
    models.assert_equal(models.logits(pemnify(models.net(), **KINDS[kind])), plain)


@every_kind
def test_compiled_kept_and_lean_are_equal(kind):
    model = trained(kind)
    outputs = models.logits(model)
    models.assert_equal(models.logits(model), outputs, "kept")
    keep_weights(model, keep=False)
    models.assert_equal(models.logits(model), outputs, "made at every read")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    models.assert_equal(models.logits(compiled), outputs, "compiled")
    torch._dynamo.reset()


@pytest.mark.parametrize("coding", ["bits", "entropy", "context", "base"])
@pytest.mark.parametrize("kind", ["flips on a tenth", "half of a fifth", "flips of half"])
def test_every_coding(coding, kind, tmp_path):
    model = trained(kind, coding=coding)
    model.save_pretrained(str(tmp_path))
    models.assert_equal(models.logits(load(tmp_path)), models.logits(model))


def test_flips_of_a_merged_model_give_the_base_back_bit_for_bit():
    model = trained("flips on a tenth", rest="freeze")
    base = {name: layer.fill().clone() for name, layer in models.mask_layers(model).items()}
    masks = {name: layer.mask_of("default") for name, layer in models.mask_layers(model).items()}
    dense = model.merge_and_unload()
    assert sum(int((dense.get_parameter(name) != one).sum()) for name, one in base.items()) > 0
    with torch.no_grad():
        back = {name: masks[name](dense.get_parameter(name)).detach() for name in base}
    for name, one in base.items():
        models.assert_equal(back[name].view(torch.int32), one.view(torch.int32), name)


def test_several_active_adapters_apply_in_turn(tmp_path):
    model = trained("flips on a tenth", rest="freeze")
    model.add_adapter("other", PemnConfig(**KINDS["drops on a fifth"], rest="freeze"))
    for layer in models.mask_layers(model).values():
        scores = layer.mask_of("other").scores
        scores.data[::2] = -1.0
    model.base_model.set_adapter(["default", "other"])
    for layer in models.mask_layers(model).values():
        both = wanted_weight(layer)
        places = layer.mask_of("other").places.tolist()
        for place in places[::2]:
            both.view(-1)[place] = 0.0
        models.assert_equal(layer.owner.weight.detach(), both, layer.target)


def test_mixed_batches_equal_each_adapter_alone(tmp_path):
    for task, kind in ((1, "flips on a tenth"), (2, "drops on a fifth")):
        trained(kind, task, rest="freeze").save_pretrained(str(tmp_path / str(task)))
    model = load(tmp_path / "1")
    model.load_adapter(str(tmp_path / "2"), "other")
    x = models.images(7, count=4)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(models.logits(model, x))
    names = ["default", "other", "other", "default"]
    with torch.no_grad():
        mixed = model.eval()(x, adapter_names=names)
    expected = torch.stack([alone[name == "other"][i] for i, name in enumerate(names)])
    assert torch.allclose(mixed, expected, atol=1e-6)


def test_masks_of_other_weights_are_not_swapped_in(tmp_path):
    trained("flips on a tenth").save_pretrained(str(tmp_path / "one"))
    trained("flips on a tenth", seed=4).save_pretrained(str(tmp_path / "other"))
    model = load(tmp_path / "one")
    outputs = models.logits(model)
    with pytest.raises(ArchitectureError, match="masks other weights"):
        hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    with pytest.raises(AdapterError, match="seed=3"):
        model.load_adapter(str(tmp_path / "other"), "default")
    models.assert_equal(models.logits(model), outputs)


def test_adapters_of_other_weights_are_not_combined(tmp_path):
    model = trained("flips on a tenth", rest="freeze")
    model.add_adapter("same", PemnConfig(**KINDS["flips on a tenth"], rest="freeze"))
    model.add_adapter("seed", PemnConfig(**{**KINDS["flips on a tenth"], "seed": 4}, rest="freeze"))
    model.add_adapter("drops", PemnConfig(**KINDS["drops on a fifth"], rest="freeze"))
    with pytest.raises(AdapterError, match="differ in support"):
        model.base_model.add_weighted_adapter(["default", "seed"], [1, 1], "made", "union")
    with pytest.raises(AdapterError, match="differ in form"):
        model.base_model.add_weighted_adapter(["default", "drops"], [1, 1], "made", "union")
    model.base_model.add_weighted_adapter(["default", "same"], [1, 1], "made", "intersection")
    made, alone = models.masks(model, "made"), models.masks(model)
    models.assert_same_tensors(made, alone)  # nothing of "same" was trained: all ones
    model.set_adapter("default")
    expected = models.logits(model)
    model.set_adapter("made")
    models.assert_equal(models.logits(model), expected)


def test_scales_train_from_one_and_are_saved_as_they_are(tmp_path):
    model = pemnify(models.net(), **KINDS["rows scaled"])
    layers = models.mask_layers(model)
    scales = {name: layer.mask_of("default").row_scale for name, layer in layers.items()}
    assert all(torch.equal(one.detach(), torch.ones(len(one))) for one in scales.values())
    assert {name: len(one) for name, one in scales.items()} == {
        name: shape[0] for name, shape in models.NET_TARGETS.items()
    }
    layer = layers["head.weight"]
    pull = torch.randn(layer.shape)
    layer.owner.weight.backward(pull)
    models.assert_equal(scales["head.weight"].grad, (pull * layer.fill()).sum(1))
    models.train(model).save_pretrained(str(tmp_path))
    loaded = models.mask_layers(load(tmp_path))
    for name, one in scales.items():
        assert not torch.equal(one.detach(), torch.ones(len(one)))
        models.assert_equal(loaded[name].mask_of("default").row_scale.detach(), one.detach(), name)


def test_scaled_rows_are_not_combined():
    model = trained("rows scaled", rest="freeze")
    model.add_adapter("same", PemnConfig(**KINDS["rows scaled"], rest="freeze"))
    with pytest.raises(AdapterError, match="have trained scales"):
        model.base_model.add_weighted_adapter(["default", "same"], [1, 1], "made", "union")


def test_what_the_seed_drops_is_not_combined(tmp_path):
    """A combination has bits alone, and no density by which a seed would drop the others again."""
    options = {"bank": "own", "support": 0.2, "support_others": "drawn", "rest": "freeze"}
    model = pemnify(models.net(), modules_to_save=[], **options)
    model.add_adapter("same", PemnConfig(modules_to_save=[], **options))
    before = models.Snapshot(model)
    with pytest.raises(AdapterError, match=r"default, same drop weights .*'drawn'.*activate sev"):
        model.base_model.add_weighted_adapter(["default", "same"], [1, 1], "made", "union")
    before.assert_unchanged()


def test_flips_are_a_group(tmp_path):
    """Xor of two is both applied in turn; with one of them again it is the other."""
    model = trained("flips on a tenth", rest="freeze")
    model.add_adapter("other", PemnConfig(**KINDS["flips on a tenth"], rest="freeze"))
    generator = torch.Generator().manual_seed(0)
    for layer in models.mask_layers(model).values():
        scores = layer.mask_of("other").scores.data
        scores.copy_(torch.randn(scores.shape, generator=generator))
    add = model.base_model.add_weighted_adapter
    add(["default", "other"], None, "both", "xor")
    add(["both", "other"], None, "again", "xor")
    models.assert_same_tensors(models.masks(model, "again"), models.masks(model))
    model.base_model.set_adapter(["default", "other"])
    in_turn = models.logits(model)
    model.set_adapter("both")
    models.assert_equal(models.logits(model), in_turn)


def test_what_the_base_decides_needs_whole_numbers(monkeypatch):
    model = pemnify(models.net(), **KINDS["flips on a tenth"])
    names = set(model.state_dict())
    monkeypatch.setattr(PemnLayer, "fill", lambda layer: torch.empty(0))  # as ZeRO-3 leaves it
    with pytest.raises(ConfigError, match=r"reads the numbers of 'conv1\.weight', which"):
        model.add_adapter("other", PemnConfig(**KINDS["flips of the largest"]))
    assert set(model.state_dict()) == names


def test_what_the_base_decides_is_not_read_from_float16():
    """Its numbers round otherwise on their way to bfloat16: places would be others."""
    options = KINDS["flips of the largest"]
    with pytest.raises(ConfigError, match="held in float16"):
        pemnify(models.net().half(), **options)
    wide, narrow = (pemnify(models.net().to(kind), **options) for kind in _WIDE_AND_NARROW)
    for name, layer in models.mask_layers(wide).items():
        places = models.mask_layers(narrow)[name].mask_of("default").places
        models.assert_equal(layer.mask_of("default").places, places, name)


def test_flips_are_not_taken_back_on_a_support():
    model = trained("half of a fifth")
    with pytest.raises(AdapterError, match=r"support=0\.2"):
        take_back_flips(model, [model(models.images(1)).sum()], 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"support": 1.0}, "0 < value < 1"),
        ({"support": 0}, "0 < value < 1"),
        ({"support": "all"}, "0 < value < 1"),
        ({"support_by": "chance", "support": 0.1}, "one of 'seed', 'rows'"),
        ({"support_by": "rows"}, "support= is a share of"),
        ({"support": 0.1, "scale": "sqrt_density"}, "masks a share of each"),
        ({"form": "flip", "scale": "sqrt_density"}, 'it belongs to form="product"'),
        ({"form": "sign_delta", "scale": "row"}, "which has its own scales"),
        ({"support": 0.1, "support_others": "drawn"}, 'selector="topk"'),
        ({"form": "sign_delta", "score_init": 0.1, "support": 0.1}, "from a fine-tuned model"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        PemnConfig(bank="own", **{"selector": "threshold", **options})


def test_the_support_in_force():
    config = PemnConfig(bank="own", selector="threshold", support=0.25, seed=5)
    assert config.support_in_force == Support(0.25, "seed", 5)
    assert PemnConfig().support_in_force is None
