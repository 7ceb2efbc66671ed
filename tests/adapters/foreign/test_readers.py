"""What others store, written here as their code writes it, and read."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pemn_surgery import (
    from_finetuned,
    from_masks,
    masks_between,
    masks_of_hidden_networks,
    masks_of_piggyback,
    masks_of_piggyback_pack,
    masks_of_pruned,
    masks_of_self_masking,
    unprune,
)
from pemn_surgery.errors import ForeignMaskError, MovedWeightsError, NonFiniteScoresError
from tests.adapters import models

CONVOLUTIONS = ["conv1", "conv2", "conv3"]


def random_scores(shapes, seed=0):
    generator = torch.Generator().manual_seed(6000 + seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def masked_by_hand(model, masks):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            twin.get_parameter(name).mul_(mask.float())
    return twin


def in_parallel(state):
    """As ``DataParallel`` calls tensors."""
    return {f"module.{name}": value for name, value in state.items()}


def check(read, model, masks):
    """What was read is these masks on this model, and an adapter of it computes the same."""
    assert models.flips(read.masks, masks) == 0
    assert all(mask.dtype == torch.bool for mask in read.masks.values())
    models.assert_same_tensors(read.base, model.state_dict())
    base = models.net(9)
    base.load_state_dict(read.base)
    made = from_masks(base, read.masks)
    models.assert_equal(models.logits(made), models.logits(masked_by_hand(model, masks)))


# -------------------------------------------------------------------------------- torch's pruning


def smallest_half(weight):
    """The half with the largest sizes, by Python's sort."""
    sizes = weight.detach().abs().flatten().tolist()
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    mask = torch.ones(len(sizes), dtype=torch.bool)
    mask[order[: round(0.5 * len(sizes))]] = False
    return mask.view(weight.shape)


def pruned_net():
    model = models.net()
    masks = {f"{n}.weight": smallest_half(model.get_submodule(n).weight) for n in CONVOLUTIONS}
    twin = copy.deepcopy(model)
    for name in CONVOLUTIONS:
        prune.l1_unstructured(twin.get_submodule(name), "weight", 0.5)
    return model, twin, masks


def test_a_pruned_model_becomes_whole_again():
    model, pruned, masks = pruned_net()
    expected = models.logits(pruned)
    parameter = pruned.conv2.weight_orig
    found = unprune(pruned)
    assert models.flips(found, masks) == 0
    models.assert_same_tensors(pruned.state_dict(), model.state_dict())
    assert pruned.conv2.weight is parameter
    assert not prune.is_pruned(pruned)
    assert not [name for name, _ in pruned.named_buffers() if "mask" in name]
    models.assert_equal(models.logits(pruned), models.logits(model))
    models.assert_equal(models.logits(from_masks(pruned, found)), expected)


def test_pruned_twice_and_biases_and_rows():
    model = models.net()
    pruned = copy.deepcopy(model)
    prune.random_unstructured(pruned.conv1, "weight", 0.3)
    prune.l1_unstructured(pruned.conv1, "weight", 0.5)
    prune.l1_unstructured(pruned.conv1, "bias", 3)
    prune.ln_structured(pruned.conv2, "weight", 0.25, n=2, dim=0)
    expected = models.logits(pruned)
    stored = masks_of_pruned(pruned.state_dict())
    found = unprune(pruned)
    assert models.flips(stored.masks, found) == 0
    assert set(found) == {"conv1.weight", "conv1.bias", "conv2.weight"}
    assert int((~found["conv1.bias"]).sum()) == 3
    assert int((~found["conv2.weight"]).flatten(1).all(dim=1).sum()) == 2
    models.assert_same_tensors(pruned.state_dict(), model.state_dict())
    models.assert_equal(models.logits(from_masks(pruned, found)), expected)


def test_numbers_under_a_zero_come_back_bit_for_bit():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    values = torch.tensor([[float("nan"), float("inf"), -0.0, 2.0]])
    model[0].weight.data.copy_(values)
    prune.custom_from_mask(model[0], "weight", mask := torch.zeros(1, 4))
    assert not unprune(model)["0.weight"].any()
    assert torch.equal(model[0].weight.view(torch.int32), values.view(torch.int32))
    assert not mask.any()  # the caller's own tensor


@pytest.mark.parametrize("wrap", [dict, in_parallel])
def test_a_pruned_state_dict(wrap):
    model, pruned, masks = pruned_net()
    check(masks_of_pruned(wrap(pruned.state_dict())), model, masks)


def test_pruning_that_is_none_is_refused():
    with pytest.raises(ForeignMaskError, match="no parameter that"):
        unprune(models.net())
    with pytest.raises(ForeignMaskError) as error:
        masks_of_pruned(models.net().state_dict())
    models.says(error, "21 names", "'..._mask' beside '..._orig'", "conv1.weight")


def test_masks_of_other_numbers_are_refused_and_stay():
    pruned = models.net()
    prune.l1_unstructured(pruned.conv1, "weight", 0.5)
    prune.custom_from_mask(pruned.conv2, "weight", torch.full((8, 8, 3, 3), 0.5))
    before = models.Snapshot(pruned)
    with pytest.raises(ForeignMaskError, match=r"'conv2\.weight' has 576 of 576 values"):
        unprune(pruned)
    before.assert_unchanged()
    with pytest.raises(ForeignMaskError, match=r"'conv2\.weight' has 576 of 576 values"):
        masks_of_pruned(pruned.state_dict())


def test_a_model_that_is_still_pruned_is_refused_with_what_to_do():
    _, pruned, masks = pruned_net()
    before = models.Snapshot(pruned)
    with pytest.raises(ForeignMaskError, match=r"masks = unprune\(model\)"):
        from_masks(pruned, masks)
    before.assert_unchanged()


# --------------------------------------------------------------------- a checkpoint and its base


def between_oracle(before, after):
    """Which numbers are kept, one by one; a zero that was one is kept."""
    pairs = zip(before.flatten().tolist(), after.flatten().tolist(), strict=True)
    return torch.tensor([a == b for b, a in pairs]).view(after.shape)


def test_a_pruned_checkpoint_beside_its_base():
    model, pruned, _ = pruned_net()
    with torch.no_grad():
        model.conv3.weight.view(-1)[:5] = 0.0  # zero in both is kept
        pruned.conv3.weight_orig.view(-1)[:5] = 0.0
    for name in CONVOLUTIONS:
        prune.remove(pruned.get_submodule(name), "weight")
    found = masks_between(model, pruned)
    before, after = model.state_dict(), pruned.state_dict()
    expected = {
        f"{n}.weight": between_oracle(before[f"{n}.weight"], after[f"{n}.weight"])
        for n in CONVOLUTIONS
    }
    assert models.flips(found, expected) == 0
    assert found["conv3.weight"].view(-1)[:5].all()
    made = from_masks(copy.deepcopy(model), masks_between(before, after))
    models.assert_equal(models.logits(made), models.logits(pruned))
    near = from_finetuned(copy.deepcopy(model), pruned, "mask")
    nearest = models.masks(near)
    assert models.flips({name: nearest[name] for name in found}, found) == 0
    assert masks_between(model, model) == {}


def test_a_base_that_is_wider_counts_as_rounded():
    base = {"weight": torch.tensor([[1.001, -2.0, 1e-9, float("nan")]])}
    half = {"weight": torch.tensor([[1.001, 0.0, 0.0, float("nan")]]).half()}
    assert masks_between(base, half)["weight"].tolist() == [[True, False, True, True]]


def test_numbers_that_moved_are_counted():
    model = models.net()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.conv2.weight.view(-1)[:7] += 1.0
        moved.conv3.weight.zero_()
        moved.bn1.running_mean[:3] -= 1.0
    with pytest.raises(MovedWeightsError) as error:
        masks_between(model, moved)
    models.says(
        error, "10 numbers of 2 tensors", "conv2.weight 7 of 576", "bn1.running_mean 3 of 8",
        'from_finetuned(base, pruned, "mask")',
    )  # fmt: skip
    assert "conv3" not in str(error.value)
    many = {f"{n}.weight": torch.ones(2) for n in range(20)}
    with pytest.raises(MovedWeightsError, match=r"40 numbers of 20 tensors.* and 12 more"):
        masks_between(many, {name: value * 2 for name, value in many.items()})


def test_checkpoints_of_other_tensors_are_refused():
    state = models.net().state_dict()
    with pytest.raises(ForeignMaskError, match=r"1 tensors .*'bn1\.bias', base"):
        masks_between(state, {n: v for n, v in state.items() if n != "bn1.bias"})
    with pytest.raises(ForeignMaskError, match=r"1 tensors .*'extra', pruned checkpoint"):
        masks_between(state, {**state, "extra": torch.ones(1)})
    with pytest.raises(ForeignMaskError, match=r"'head\.weight' has shape \(8, 4\), .*\(4, 8\)"):
        masks_between(state, {**state, "head.weight": torch.ones(8, 4)})


# ------------------------------------------------------------------- hidden-networks, and PEMN


def largest_oracle(scores, kept):
    """All but the ``int((1 - kept) * n)`` smallest sizes, of equal ones the first."""
    sizes = scores.abs().flatten().tolist()
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    mask = torch.ones(len(sizes), dtype=torch.bool)
    mask[order[: int((1 - kept) * len(sizes))]] = False
    return mask.view(scores.shape)


def hidden_network(scores):
    """A state dict of layers with ``scores`` beside their ``weight``."""
    model = models.net()
    return model, OrderedDict([*model.state_dict().items(), *scores.items()])


@pytest.mark.parametrize("wrap", [dict, in_parallel])
@pytest.mark.parametrize("kept", [0.5, 0.3, 0.07, 1.0])
def test_hidden_networks(kept, wrap):
    scores = random_scores({f"{n}.scores": models.NET_TARGETS[f"{n}.weight"] for n in CONVOLUTIONS})
    scores["conv2.scores"].view(-1)[:300] = 0.25  # many of equal size
    model, state = hidden_network(scores)
    masks = {f"{n}.weight": largest_oracle(scores[f"{n}.scores"], kept) for n in CONVOLUTIONS}
    check(masks_of_hidden_networks(wrap(state), kept), model, masks)


def test_fixed_subnetworks_hold_masks_for_scores():
    scores = random_scores({"conv1.scores": (8, 3, 3, 3)})
    masks = {"conv1.weight": scores["conv1.scores"] > 0}
    model, state = hidden_network({"conv1.scores": masks["conv1.weight"].float()})
    check(masks_of_hidden_networks(state, None), model, masks)
    with pytest.raises(ForeignMaskError, match="neither 0 nor 1"):
        masks_of_hidden_networks(hidden_network(scores)[1], None)


def test_scores_that_fit_no_weight_are_refused():
    _, state = hidden_network({"conv1.scores": torch.ones(3, 3)})
    with pytest.raises(ForeignMaskError) as error:
        masks_of_hidden_networks(state, 0.5)
    models.says(error, "'conv1.scores' has shape (3, 3)", "'conv1.weight' (8, 3, 3, 3)")
    _, state = hidden_network({"conv1.scores": torch.full((8, 3, 3, 3), float("nan"))})
    with pytest.raises(NonFiniteScoresError, match=r"216 of the 216 scores of 'conv1\.weight'"):
        masks_of_hidden_networks(state, 0.5)
    with pytest.raises(ForeignMaskError, match=r"'\.\.\.\.scores'.*often have under 'state_dict'"):
        masks_of_hidden_networks({"state_dict": state}, 0.5)


# ------------------------------------------------------------------------------- Piggyback


def test_piggyback_scores():
    shapes = {f"{n}.mask_real": models.NET_TARGETS[f"{n}.weight"] for n in CONVOLUTIONS}
    scores = {name: 0.01 * value for name, value in random_scores(shapes).items()}
    scores["conv1.mask_real"].view(-1)[:9] = 5e-3  # not above it
    model = models.net()
    others = {n: v for n, v in model.state_dict().items() if n.startswith("bn")}
    read = masks_of_piggyback({**others, **scores})
    masks = {
        f"{n}.weight": torch.tensor(
            [value > 5e-3 for value in scores[f"{n}.mask_real"].double().flatten().tolist()]
        ).view(models.NET_TARGETS[f"{n}.weight"])
        for n in CONVOLUTIONS
    }  # fmt: skip
    masks["conv1.weight"].view(-1)[:9] = False  # 5e-3 in float32, as the released code compares
    assert models.flips(read.masks, masks) == 0
    models.assert_same_tensors(read.base, others)
    above = masks_of_piggyback(scores, threshold=0.02).masks
    assert int(above["conv2.weight"].sum()) == int((scores["conv2.mask_real"] > 0.02).sum())
    model.load_state_dict(read.base, strict=False)
    made = from_masks(copy.deepcopy(model), read.masks)
    models.assert_equal(models.logits(made), models.logits(masked_by_hand(model, masks)))
    with pytest.raises(ForeignMaskError, match=r"'\.\.\.\.mask_real'"):
        masks_of_piggyback(others)


def pack_of(model):
    """Masks as bytes by the number of a layer, counted from the container itself."""
    shared = nn.Sequential(OrderedDict(list(model.named_children())[:-1]))
    numbers = {"conv1": 1, "conv2": 3, "conv3": 5}  # 0 is the container, 2 and 4 are norms
    masks = random_scores({n: models.NET_TARGETS[f"{n}.weight"] for n in CONVOLUTIONS})
    packed = {numbers[n]: (value > 0).to(torch.uint8) for n, value in masks.items()}
    return shared, packed, {f"{n}.weight": value > 0 for n, value in masks.items()}


def test_a_piggyback_pack():
    model = models.net()
    shared, packed, masks = pack_of(model)
    found = masks_of_piggyback_pack(packed, shared)
    assert models.flips(found, masks) == 0
    made = from_masks(copy.deepcopy(model), found)
    models.assert_equal(models.logits(made), models.logits(masked_by_hand(model, masks)))


def test_packs_that_do_not_fit_are_refused():
    shared, packed, _ = pack_of(models.net())
    for wrong, said in (
        ({2: packed[1]}, r"module 2 has shape \(8, 3, 3, 3\).*\('bn1'\) has shape \(8,\)"),
        ({0: packed[1]}, r"module 0 of 7 \(''\) has none"),
        ({70: packed[1]}, r"module 70 of 7 \(''\) has none"),
        ({1: (packed[1].short() - 1).to(torch.uint8)}, r"module 1 is ternary: it turns \d+ of 216"),
        ({1: packed[1] * 2}, r"'conv1\.weight' has \d+ of 216 values"),
    ):
        with pytest.raises(ForeignMaskError, match=said):
            masks_of_piggyback_pack(wrong, shared)


# --------------------------------------------------------------------- Self-Masking Networks


def submasked(model, scores, held=None):
    """The state dict of a shell whose masked parameters were overwritten by their products."""
    state = {f"model_shell.{name}": value for name, value in model.state_dict().items()}
    for name, value in scores.items():
        weight, mask = model.state_dict()[name], (value > 0).float()
        state[f"scores.{name.replace('.', '_')}"] = value
        state[f"data.{name.replace('.', '_')}"] = weight.clone()
        state[f"model_shell.{name}"] = weight * torch.sqrt(1 / mask.mean()) * mask
    return state


def test_self_masking_networks():
    model = models.net()
    names = ["conv1.weight", "conv1.bias", "conv2.weight", "head.weight"]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    scores = random_scores(shapes)
    scores["conv1.weight"].view(-1)[:9] = 0.0  # not above it
    state = submasked(model, scores)
    read = masks_of_self_masking(state)
    masks = {
        name: torch.tensor([one > 0 for one in value.flatten().tolist()]).view(value.shape)
        for name, value in scores.items()
    }
    check(read, model, masks)
    inside = {f"model.{name}": value for name, value in state.items()}  # of a Lightning module
    check(masks_of_self_masking({**inside, "fc.weight": torch.ones(2)}), model, masks)
    made = from_masks(copy.deepcopy(model), read.masks, scale="sqrt_density")
    for name, layer in models.mask_layers(made).items():
        expected = state[f"model_shell.{name}"]
        torch.testing.assert_close(layer().detach(), expected, rtol=1e-6, atol=0)
    above = masks_of_self_masking(state, threshold=0.5).masks
    assert int(above["head.weight"].sum()) == int((scores["head.weight"] > 0.5).sum())


def test_self_masking_scores_of_no_tensor_are_refused():
    model = models.net()
    state = submasked(model, random_scores({"conv1.weight": (8, 3, 3, 3)}))
    with pytest.raises(ForeignMaskError, match=r"'scores\.\.\.\.' beside 'model_shell\.\.\.\.'"):
        masks_of_self_masking({n: v for n, v in state.items() if "model_shell" not in n})
    with pytest.raises(ForeignMaskError, match="'conv9_weight' could be of no tensor"):
        masks_of_self_masking({**state, "scores.conv9_weight": torch.ones(1)})
    twice = {**state, "model_shell.conv1_weight": torch.ones(1)}
    with pytest.raises(ForeignMaskError, match=r"'conv1_weight' could be of \['conv1\.weight'"):
        masks_of_self_masking(twice)
    bad = {**state, "scores.conv1_weight": torch.full((8, 3, 3, 3), float("inf"))}
    with pytest.raises(NonFiniteScoresError, match=r"'conv1\.weight'"):
        masks_of_self_masking(bad)
