"""Pruned networks: what is removed, that it stays so, and what their file holds."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import arms, pruning, rules


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize("way", ["random", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_a_share_of_every_layer_goes(way, sparsity):
    plain, pruned = network(), pruning.prune(network(), way, sparsity)
    for before, layer in zip(plain, pruned, strict=True):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gone = layer.weight == 0
            assert gone.sum() == round(sparsity * gone.numel())
            assert torch.equal(layer.weight[~gone], before.weight[~gone])
            if way == "magnitude" and gone.any():
                assert before.weight[gone].abs().max() <= before.weight[~gone].abs().min()
    assert pruning.is_pruned(pruned)
    assert not pruning.is_pruned(plain)


def test_random_pruning_follows_the_seed():
    masks = []
    for seed in (1, 1, 2):
        layer = network()
        torch.manual_seed(seed)
        masks.append(pruning.prune(layer, "random", 0.5)[3].weight_mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_what_is_removed_stays_so_and_the_file_holds_the_rest(tmp_path):
    model = pruning.prune(network(), "magnitude", 0.9)
    gone = {name: m.weight == 0 for name, m in model.named_modules() if hasattr(m, "weight_mask")}
    assert len(gone) == 2
    arm = arms.Arm("a", model, rules.Rule("sgd", 0.1, "cosine", 4), tmp_path / "a.pt", {})
    for step in range(3):
        arms.learn([arm], [model(torch.randn(4, 3, 3, 3)).square().sum()], step, 10)
    files = arm.stored()
    kept = load_file(tmp_path / "a" / "model.safetensors")
    for name, zeros in gone.items():
        layer = model.get_submodule(name)
        weight = (layer.weight_orig * layer.weight_mask).detach()  # the next forward's
        assert not weight[zeros].any()
        parts = [kept[f"{name}.weight.{part}"] for part in ("ends", "columns", "values")]
        ends, columns, values = parts
        starts, found = [0, *ends.tolist()], torch.zeros_like(weight.flatten(1))
        for row, (first, last) in enumerate(itertools.pairwise(starts)):
            found[row, columns[first:last]] = values[first:last]
        assert torch.equal(found.view(weight.shape), weight)
        assert values.numel() == int((~zeros).sum())
    assert torch.equal(kept["1.weight"], model[1].weight)
    assert arm.ways() == {"stored": sum(files.values())}
    assert arm.unique == 8 * 27 + 80


@pytest.mark.parametrize(("way", "share"), [("least", 0.5), ("random", 1.0), ("random", -0.1)])
def test_what_cannot_be_pruned_is_refused(way, share):
    with pytest.raises(RecipeError, match=r"give one of \['magnitude', 'random'\] and 0 to 1"):
        pruning.prune(network(), way, share)
