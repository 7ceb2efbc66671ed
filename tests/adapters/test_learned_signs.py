"""Sign deltas that are trained from nothing: W + s (2M - 1), s from zero."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from pemn_surgery import (
    PemnConfig,
    adapter_identity,
    cache_salt,
    from_finetuned,
    pemnify,
    recode,
    to_trainable,
)
from pemn_surgery.errors import ConfigError
from tests.adapters import models

SIGNS = {"bank": "own", "form": "sign_delta"}
KINDS = {
    "all": SIGNS,
    "half of the scores": SIGNS | {"selector": "topk"},
    "a scale a matrix": SIGNS | {"scale": "matrix"},
    "on a fifth": SIGNS | {"support": 0.2},
    "on rows, a scale a matrix": SIGNS | {"support": 0.3, "support_by": "rows", "scale": "matrix"},
    "coded": SIGNS | {"support": 0.5, "coding": "entropy"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def trained(kind, **options):
    return models.train(pemnify(models.net(), **{**KINDS[kind], **options}), 1, steps=4)


def load(folder, **options):
    return PeftModel.from_pretrained(models.net(), str(folder), **options).eval()


def wanted_weight(layer):
    """The effective weight, number by number; every layer here has its outputs first."""
    held = layer.mask_of("default")
    numbers = layer.fill().detach().clone().double().flatten()
    places = range(numbers.numel()) if held.places is None else held.places.tolist()
    signs = models.mask_of_layer(layer, "default").flatten().tolist()
    scale = held.row_scale.detach() * held.unit
    width = numbers.numel() // len(scale)
    for place, kept in zip(places, signs, strict=True):
        numbers[place] += (1 if kept else -1) * float(scale[place // width])
    return numbers.float().view(layer.shape)


@every_kind
def test_training_begins_at_the_base_and_moves_signs_and_scales(kind):
    model = pemnify(models.net(), **KINDS[kind])
    models.assert_equal(models.logits(model), models.logits(models.net()))
    before = models.masks(model)
    models.train(model, 1, steps=6)
    assert models.flips(before, models.masks(model)) > 0
    for layer in models.mask_layers(model).values():
        assert bool(layer.mask_of("default").row_scale.detach().any())
        torch.testing.assert_close(
            layer.owner.weight.detach(), wanted_weight(layer), rtol=1e-6, atol=1e-7
        )


@every_kind
def test_one_step_is_that_of_the_equations(kind):
    """SGD on one Linear, by hand: s from 0, so that the first step moves scales alone."""
    base = nn.Sequential(nn.Linear(6, 5))
    model = pemnify(base, rest="freeze", modules_to_save=[], **KINDS[kind])
    layer = models.mask_layers(model)["0.weight"]
    held = layer.mask_of("default")
    x, y = torch.randn(7, 6), torch.randn(7, 5)
    (model(x) - y).square().sum().backward()
    assert not held.scores.grad.any()
    weight = layer.fill().detach().clone().requires_grad_()
    (x @ weight.T + base[0].bias.detach() - y).square().sum().backward()
    places = torch.arange(30) if held.places is None else held.places.long()
    signs = torch.where(models.mask_of_layer(layer, "default").flatten(), 1.0, -1.0)
    spread = torch.zeros(30).index_put((places,), signs * weight.grad.flatten()[places])
    one_each = KINDS[kind].get("scale") is None
    wanted = spread.view(5, 6).sum(1) if one_each else spread.sum().view(1)
    torch.testing.assert_close(held.row_scale.grad, wanted * held.unit, rtol=1e-5, atol=1e-5)


@every_kind
def test_saved_loaded_merged_and_trained_on(kind, tmp_path):
    model = trained(kind)
    outputs, masks = models.logits(model), models.masks(model)
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    models.assert_equal(models.logits(loaded), outputs)
    models.assert_same_tensors(models.masks(loaded), masks)
    for again in (copy.deepcopy(loaded), None):
        if again is None:
            with pytest.warns(Warning, match="holds bits, not scores"):
                again = load(tmp_path, is_trainable=True)
        else:
            to_trainable(again)
        models.assert_equal(models.logits(again), outputs)
        models.assert_same_tensors(models.masks(again), masks)
        assert models.flips(masks, models.masks(models.train(again, 2, steps=6))) > 0
    dense = loaded.merge_and_unload()
    models.assert_equal(models.logits(dense), outputs)


@every_kind
def test_scores_in_a_file_go_on_exactly(kind, tmp_path):
    model = trained(kind)
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(tmp_path))
    on = load(tmp_path, is_trainable=True)
    for name, layer in models.mask_layers(on).items():
        held = models.mask_layers(model)[name].mask_of("default")
        models.assert_equal(layer.mask_of("default").scores.detach(), held.scores.detach())
        models.assert_equal(layer.mask_of("default").row_scale.detach(), held.row_scale.detach())
    final = load(tmp_path)
    assert all(one.mask_of("default").scores is None for one in models.mask_layers(final).values())
    models.assert_equal(models.logits(final), models.logits(model))


@every_kind
def test_a_checkpoint_of_scores_becomes_bits_without_its_base(kind, tmp_path):
    model = trained(kind)
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(tmp_path / "scores"))
    recode(str(tmp_path / "scores"), "entropy", out=str(tmp_path / "bits"))
    models.assert_equal(models.logits(load(tmp_path / "bits")), models.logits(model))


def test_a_state_dict_of_bits_goes_into_a_model_with_scores():
    model, other = trained("all"), pemnify(models.net(), **KINDS["all"])
    with pytest.warns(Warning, match="holds bits, not scores"):
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    models.assert_equal(models.logits(other), models.logits(model))


@every_kind
def test_trained_or_loaded_it_has_one_name(kind, tmp_path):
    model = trained(kind)
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    assert adapter_identity("default", model) == adapter_identity("default", loaded)
    assert adapter_identity("default", model) == adapter_identity(str(tmp_path))
    assert cache_salt(model) == cache_salt(loaded) != cache_salt(pemnify(models.net(), **SIGNS))


def test_mixed_with_another_adapter():
    model = trained("on a fifth")
    alone = models.logits(model)
    model.add_adapter("masks", PemnConfig(bank="own", selector="threshold"))
    x = models.images(99)
    names = ["default", "masks", "default", "__base__", "masks", "default"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    ours = [i for i, name in enumerate(names) if name == "default"]
    torch.testing.assert_close(mixed[ours], alone[ours])


def test_signs_that_all_begin_alike_are_refused():
    model = models.net()
    before = models.Snapshot(model)
    with pytest.raises(ConfigError) as error:
        pemnify(model, score_init=0.5, **SIGNS)
    models.says(error, "score_init=0.5", "begin alike", "from_finetuned")
    before.assert_unchanged()


def test_signs_of_a_fine_tuned_model_stay(tmp_path):
    base, tuned = models.net(), models.train(models.net(), 1, steps=4)
    made = from_finetuned(base, tuned, "sign_delta")
    made.save_pretrained(str(tmp_path))
    on = load(tmp_path, is_trainable=True)
    masks = models.masks(on)
    models.assert_same_tensors(models.masks(models.train(on, 2, steps=6)), masks)
    assert all(one.mask_of("default").scores is None for one in models.mask_layers(on).values())


# ---- where scores begin --------------------------------------------------------------------------


def scores_of(**options):
    model = pemnify(models.net(), bank="own", rest="freeze", **options)
    layers = models.mask_layers(model)
    return {name: (layer, layer.mask_of("default").scores) for name, layer in layers.items()}


@pytest.mark.parametrize("form", ["product", "flip", "sign_delta"])
def test_normal_scores(form):
    default = 0.0 if form == "sign_delta" else 0.04
    for options, mean, std in (({}, default, 0.01), ({"score_mean": 2, "score_std": 3}, 2, 3)):
        found = scores_of(form=form, score_init="normal", seed=4, **options)
        drawn = torch.cat([scores.detach().flatten() for _, scores in found.values()]).double()
        assert drawn.numel() == 1400
        assert abs(float(drawn.mean()) - mean) < 4 * std / 1400**0.5
        assert abs(float(drawn.std()) / std - 1) < 4 / 2800**0.5
    again = scores_of(form=form, score_init="normal", seed=4, score_mean=2, score_std=3)
    for name, (_, scores) in found.items():
        models.assert_equal(again[name][1].detach(), scores.detach())


@pytest.mark.parametrize("support", [None, 0.3])
def test_scores_of_the_frozen_numbers(support):
    options = {"selector": "topk", "support": support, "seed": 2}
    plain = scores_of(score_init="magnitude", support=support, selector="topk")
    mixed = scores_of(score_init="magnitude_shuffled", **options)
    noisy = scores_of(score_init="magnitude", score_std=0.1, **options)
    assert plain
    moved = 0
    for name, (layer, scores) in plain.items():
        sizes = layer.fill().detach().abs()
        places = layer.mask_of("default").places
        if places is not None:
            sizes = sizes.flatten()[places]
        models.assert_equal(scores.detach(), sizes)
        shuffled = mixed[name][1].detach()
        if places is None:
            assert sorted(shuffled.flatten().tolist()) == sorted(sizes.flatten().tolist())
        moved += int((shuffled != sizes).sum())
        noise = (
            (
                noisy[name][1].detach()
                - noisy[name][0]
                .fill()
                .detach()
                .abs()
                .flatten()[noisy[name][0].mask_of("default").places]
            )
            if places is not None
            else noisy[name][1].detach() - sizes
        )
        assert 0.05 < float(noise.std()) < 0.2
    assert moved > 0


def test_the_largest_are_kept_at_first():
    for layer, scores in scores_of(selector="topk", score_init="magnitude", density=0.25).values():
        sizes = layer.fill().detach().abs().flatten()
        kept = models.mask_of_layer(layer, "default").flatten()
        assert int(kept.sum()) == kept.numel() - int(0.75 * kept.numel())
        assert float(sizes[kept].min()) >= float(sizes[~kept].max())
        assert scores.requires_grad
