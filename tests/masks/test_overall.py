"""One top-k over all masks of an adapter, against one sort of all scores."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from pemn_surgery import PemnConfig, pemnify, recode, set_selection, to_trainable
from pemn_surgery.errors import PemnWarning
from pemn_surgery.masks.overall import counts_of_dropped
from tests.adapters import models
from tests.oracles import assert_same

TIED = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(TIED, max_size=6), min_size=1, max_size=4), st.floats(0.01, 1.0))
def test_counts_are_those_of_one_sort(lists, density):
    scores = {f"w{i}": torch.tensor(one) for i, one in enumerate(lists)}
    pairs = sorted(
        (abs(value), name, place)
        for name, one in scores.items()
        for place, value in enumerate(one.tolist())
    )
    dropped = [name for _, name, _ in pairs[: int((1 - density) * len(pairs))]]
    turned = dict(reversed(scores.items()))  # as a file may have them
    for given_scores in (scores, turned):
        assert counts_of_dropped(given_scores, density) == {n: dropped.count(n) for n in scores}


def model_of(**options):
    chosen = {"selector": "topk_overall", "score_init": "normal", "score_mean": 0.0, "density": 0.3}
    return pemnify(models.net(), bank="own", bank_init="kaiming_normal", **(chosen | options))


def held(model, name="default"):
    layers = models.mask_layers(model).values()
    return {layer.target: layer.mask_of(name) for layer in layers if layer.holds(name)}


def by_hand(masks, density=0.3):
    """All scores in one row, by the names of their weights; the largest are kept."""
    names = sorted(masks)
    rows = [masks[name].scores.detach().abs().flatten() for name in names]
    together = torch.cat(rows)
    order = together.argsort(stable=True)[: int((1 - density) * len(together))]
    kept = torch.ones(len(together), dtype=torch.bool).index_fill(0, order, False)
    parts = kept.split([len(row) for row in rows])
    return {name: part.view(masks[name].shape) for name, part in zip(names, parts, strict=True)}


def assert_chosen_together(model, density=0.3):
    masks = held(model)
    assert len(masks) == 4
    wanted = by_hand(masks, density)
    shares = {round(float(one.float().mean()), 3) for one in wanted.values()}
    assert len(shares) > 1  # not one share for all
    for name, mask in masks.items():
        assert_same(mask.mask(), wanted[name])
    for layer in models.mask_layers(model).values():
        assert_same(layer().detach() != 0, wanted[layer.target])


def step(model, seed, only=""):
    torch.manual_seed(seed)
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and only in n]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    model(torch.randn(4, 3, 12, 12)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("training", [True, False])
def test_masks_follow_all_scores(training):
    model = model_of().train(training)
    assert_chosen_together(model)
    for n in range(3):
        step(model, n)
        assert_chosen_together(model)
    step(model, 9, only="head.masked_weight")  # other weights' own scores stand still
    assert_chosen_together(model)
    with torch.no_grad():
        held(model)["head.weight"].scores.mul_(3.0)
        assert_chosen_together(model)
    other = copy.deepcopy(model)
    step(other, 10)
    assert_chosen_together(other)
    assert_chosen_together(model)


def test_density_may_move_while_training():
    model = model_of()
    set_selection(model, 0.0, density=0.8)
    assert_chosen_together(model, 0.8)
    set_selection(model, 1.0, density=0.8)
    assert_chosen_together(model)


def test_files_have_what_was_chosen_together(tmp_path):
    model = model_of()
    for n in range(3):
        step(model, n)
    model.eval()
    wanted, expected = by_hand(held(model)), models.logits(model)
    model.save_pretrained(str(tmp_path / "bits"))
    loaded = PeftModel.from_pretrained(models.net(), str(tmp_path / "bits")).eval()
    models.assert_equal(models.logits(loaded), expected)
    with pytest.warns(PemnWarning, match="bits, not scores"):
        again = PeftModel.from_pretrained(
            models.net(), str(tmp_path / "bits"), is_trainable=True
        ).eval()
    assert_chosen_together(again)
    assert all(torch.equal(mask.mask(), wanted[name]) for name, mask in held(again).items())
    models.assert_equal(models.logits(again), expected)
    to_trainable(loaded)
    assert all(torch.equal(mask.mask(), wanted[name]) for name, mask in held(loaded).items())
    step(loaded.train(), 20)
    assert_chosen_together(loaded)


def test_scores_of_a_checkpoint_become_the_same_masks(tmp_path):
    model = model_of()
    for n in range(3):
        step(model, n)
    model.eval()
    expected = models.logits(model)
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(tmp_path / "scores"))
    loaded = PeftModel.from_pretrained(models.net(), str(tmp_path / "scores")).eval()
    assert all(mask.scores is None for mask in held(loaded).values())
    models.assert_equal(models.logits(loaded), expected)
    going_on = PeftModel.from_pretrained(
        models.net(), str(tmp_path / "scores"), is_trainable=True
    ).eval()
    assert_chosen_together(going_on)
    models.assert_equal(models.logits(going_on), expected)
    recode(str(tmp_path / "scores"), "entropy", str(tmp_path / "coded"))
    coded = PeftModel.from_pretrained(models.net(), str(tmp_path / "coded")).eval()
    models.assert_equal(models.logits(coded), expected)


def test_each_adapter_chooses_among_its_own():
    model = model_of()
    chosen = {"selector": "topk_overall", "score_init": "normal", "score_mean": 0.0, "seed": 0}
    own = {"bank": "own", "bank_init": "kaiming_normal", **chosen}
    model.add_adapter("b", PemnConfig(density=0.6, **own))
    step(model, 0)
    model.set_adapter("b")
    step(model, 1)
    for name, density in (("default", 0.3), ("b", 0.6)):
        masks = held(model, name)
        wanted = by_hand(masks, density)
        assert len(wanted) == 4
        for target, mask in masks.items():
            assert_same(mask.mask(), wanted[target])


def test_one_masked_weight_is_as_topk():
    nets = [nn.Sequential(nn.Linear(9, 7)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    made = [
        pemnify(net, bank="mp", selector=selector, density=0.4, modules_to_save=[])
        for net, selector in zip(nets, ("topk", "topk_overall"), strict=True)
    ]
    x = torch.randn(3, 9)
    assert_same(made[0](x).detach(), made[1](x).detach())
