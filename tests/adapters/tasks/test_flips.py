"""Flips of trained masks that are taken back."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from pemn_surgery import errors, from_finetuned, pemnify, take_back_flips, to_trainable
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

SHARES = [0.0, 0.3, 0.75, 1.0]
RP = {"bank": "rp", "ratio": 0.5, "rest": "train"}


def trained(**options):
    """A net whose masks have left their initial masks, and those."""
    model = pemnify(models.net(), **(options or RP))
    before = models.masks(model)
    models.train(model, steps=5)
    assert models.flips(before, models.masks(model)) > 20
    return model, before


def losses(model, tasks=range(3)):
    model.eval()
    return (F.cross_entropy(model(models.images(task)), models.labels(task)) for task in tasks)


def importances(model):
    """What a flip of each weight is expected to cost, number by number: w ** 2 x mean gradient."""
    layers = models.mask_layers(model)
    sums = {name: torch.zeros(layer.shape) for name, layer in layers.items()}
    for loss in losses(model):
        model.zero_grad()
        loss.backward()
        for name, layer in layers.items():
            sums[name] += layer.mask_of("default").scores.grad ** 2
    model.zero_grad()
    found = {}
    for name, layer in layers.items():
        squares = [number**2 for number in layer.fill().flatten().tolist()]
        curvature = sum(sums[name].flatten().tolist()) / sum(squares)
        found[name] = [square * curvature for square in squares]
    return found


def slowly_taken_back(model, before, share):
    """The masks that are expected, pair by pair in plain Python."""
    after = {name: mask.flatten().tolist() for name, mask in models.masks(model).items()}
    initial = {name: mask.flatten().tolist() for name, mask in before.items()}
    pairs = []
    for name, costs in importances(model).items():
        flips = [i for i, bit in enumerate(after[name]) if bit != initial[name][i]]
        flips.sort(key=lambda place: costs[place])
        lost = [place for place in flips if initial[name][place]]
        gained = [place for place in flips if after[name][place]]
        assert len(lost) == len(gained)
        pairs += [
            (costs[one] + costs[two], name, one, two) for one, two in zip(lost, gained, strict=True)
        ]
    for _, name, *both in sorted(pairs)[: round(share * len(pairs))]:
        for place in both:
            after[name][place] = initial[name][place]
    return {name: torch.tensor(bits).view(before[name].shape) for name, bits in after.items()}


@pytest.mark.parametrize("share", SHARES)
def test_the_least_important_pairs_go(share):
    model, before = trained()
    expected, trained_masks = slowly_taken_back(model, before, share), models.masks(model)
    found = take_back_flips(model, losses(model), share)
    models.assert_same_tensors(models.masks(model), expected)
    assert [one.name for one in found] == list(before)
    for one in found:
        old, name = before[one.name], one.name
        assert one.weights == old.numel()
        assert one.before == int((trained_masks[name] != old).sum())
        assert one.after == int((expected[name] != old).sum())
        assert int(expected[name].sum()) == int(old.sum())


def test_all_and_nothing():
    model, before = trained()
    after = models.masks(model)
    take_back_flips(model, losses(model), 0.0)
    models.assert_same_tensors(models.masks(model), after)
    model.set_adapter("default")  # scores train again
    take_back_flips(model, losses(model), 1.0)
    models.assert_same_tensors(models.masks(model), before)


def test_frozen_numbers_of_one_size_go_by_their_gradients():
    model, before = trained(bank="own", bank_init="signed_constant")
    gradients = {name: torch.zeros(mask.shape) for name, mask in before.items()}
    for loss in losses(model):
        model.zero_grad()
        loss.backward()
        for name, layer in models.mask_layers(model).items():
            gradients[name] += layer.mask_of("default").scores.grad ** 2
    after = models.masks(model)
    take_back_flips(model, losses(model), 0.5)
    gone = kept = 0
    for name, mask in models.masks(model).items():
        for was in (False, True):
            flips = (after[name] != before[name]) & (before[name] == was)
            back, stays = flips & (mask != after[name]), flips & (mask == after[name])
            gone, kept = gone + int(back.sum()), kept + int(stays.sum())
            if back.any() and stays.any():
                assert gradients[name][back].max() <= gradients[name][stays].min()
    assert gone > 10
    assert kept > 10


def test_the_file_is_shorter_and_norms_settle(tmp_path):
    model, _ = trained(**RP, coding="context")
    take_back_flips(model, losses(model), 0.6)
    masks, norm = models.masks(model), model.base_model.model.bn1.weight.detach().clone()
    models.train(model, steps=3)
    models.assert_same_tensors(models.masks(model), masks)
    assert not torch.equal(model.base_model.model.bn1.weight, norm)
    expected = models.logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path)
    models.assert_equal(models.logits(loaded), expected)
    model.set_adapter("default")
    models.train(model, steps=5)
    assert models.flips(masks, models.masks(model)) > 0


def test_masks_of_a_file_that_are_trainable_again(tmp_path):
    model, before = trained()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.net(), tmp_path)
    with pytest.raises(errors.AdapterError, match=r"4 masks .* are bits, first 'conv1.weight'"):
        take_back_flips(loaded, losses(loaded), 0.5)
    to_trainable(loaded)
    expected = slowly_taken_back(loaded, before, 0.5)
    take_back_flips(loaded, losses(loaded), 0.5)
    models.assert_same_tensors(models.masks(loaded), expected)


def test_masks_without_flips_are_refused():
    for selector in ("threshold", "topk_overall", "sample"):
        model = pemnify(models.net(), bank="own", selector=selector)
        with pytest.raises(errors.AdapterError, match=f"selector='{selector}'"):
            take_back_flips(model, losses(model), 0.5)
    model = from_finetuned(models.net(), models.net(1), "sign_delta")
    with pytest.raises(errors.AdapterError, match="form='sign_delta'"):
        take_back_flips(model, losses(model), 0.5)


@pytest.mark.parametrize(
    ("given", "share", "error", "match"),
    [
        (losses, 1.5, errors.ConfigError, "share=1.5"),
        (losses, -0.1, errors.ConfigError, "share=-0.1"),
        (losses, float("nan"), errors.ConfigError, "share=nan"),
        (lambda _: (), 0.5, errors.AdapterError, "no losses"),
        (lambda _: [torch.zeros(())], 0.5, errors.AdapterError, "Loss 1 does not depend"),
        (
            lambda model: (loss * float("inf") for loss in losses(model)),
            0.5,
            errors.AdapterError,
            "Loss 1 is inf",
        ),
    ],
)
def test_refusals_change_nothing(given, share, error, match):
    model, _ = trained()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        take_back_flips(model, given(model), share)
    models.assert_same_tensors(model.state_dict(), state)
    assert all(
        layer.mask_of("default").scores.requires_grad
        for layer in models.mask_layers(model).values()
    )


def test_sharded_scores_are_refused():
    """As ZeRO-3 leaves them between two uses."""
    model, _ = trained()
    model.base_model.model.conv2.masked_weight.mask_of("default").scores.data = torch.empty(0)
    with pytest.raises(errors.AdapterError, match=r"1 masks are sharded.*'conv2.weight'"):
        take_back_flips(model, losses(model), 0.5)


def test_a_transformers_model_with_its_own_loss():
    model = pemnify(models.bert(), bank="rp", ratio=0.5, rest="train", task_type="SEQ_CLS")
    before = models.masks(model)
    batch = {"input_ids": models.tokens(), "labels": torch.zeros(len(models.tokens()), dtype=int)}
    optimizer = models.trainer_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    flips = models.flips(before, models.masks(model))
    model.eval()
    found = take_back_flips(model, (model(**batch).loss for _ in range(2)), 0.5)
    assert sum(one.before for one in found) == flips > 100
    assert abs(sum(one.after for one in found) - flips / 2) <= 1
    assert models.flips(before, models.masks(model)) == sum(one.after for one in found)


def test_adapters_that_are_missing_or_idle_are_refused():
    model, _ = trained()
    with pytest.raises(errors.AdapterError, match="cats"):
        take_back_flips(model, losses(model), 0.5, "cats")
    model.add_adapter("cats", model.peft_config["default"])
    with pytest.raises(errors.AdapterError, match=r"set_adapter\('cats'\)"):
        take_back_flips(model, losses(model), 0.5, "cats")
