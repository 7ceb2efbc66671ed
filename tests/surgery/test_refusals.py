"""Tools that would go past the masks: refused before anything changes, right once merged."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

from pemn_surgery import pemnify
from pemn_surgery.errors import LowCoverageWarning, MaskedWeightError
from tests import oracles
from tests.adapters import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]

CASES = {**models.BANKS, "own_all": {"bank": "own", "selector": "topk", "rest": "train"}}


class Plus(nn.Module):
    def forward(self, x):
        return x + 1


REPLACERS = {
    "prune_random": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
    "prune_structured": lambda layer, name: prune.ln_structured(layer, name, 0.5, n=2, dim=0),
    "prune_global": lambda layer, name: prune.global_unstructured(
        [(layer, name)], prune.L1Unstructured, amount=0.5
    ),
    "prune_identity": prune.identity,
    "prune_custom": lambda layer, name: prune.custom_from_mask(
        layer, name, torch.ones(getattr(layer, name).shape)
    ),
    "weight_norm": utils.weight_norm,
    "new_weight_norm": parametrizations.weight_norm,
    "new_spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": lambda layer, name: parametrize.register_parametrization(
        layer, name, Plus()
    ),
    "deletion": delattr,
}


def masked(case, steps=1):
    """A PEFT model that has trained, and the network inside."""
    outer = models.train(pemnify(models.net(), **CASES[case]), steps=steps).eval()
    return outer, outer.base_model.model


def anatomy(module):
    """All that a tool could change about a module, without reading through its properties."""
    return (
        type(module),
        {name: id(value) for name, value in module._parameters.items()},
        {name: id(value) for name, value in module._buffers.items()},
        {name: id(value) for name, value in module._modules.items()},
        list(module.__dict__),
        dict(module._forward_pre_hooks),
        dict(module._state_dict_hooks),
        dict(module._load_state_dict_pre_hooks),
    )


def refused(model, layer, act, match):
    before, output = anatomy(layer), models.logits(model)
    with pytest.raises(MaskedWeightError, match=match):
        act()
    assert anatomy(layer) == before
    oracles.assert_same(models.logits(model), output)
    models.train(model)  # it still learns


@pytest.mark.parametrize("tool", list(REPLACERS))
@pytest.mark.parametrize("case", list(CASES))
def test_a_masked_weight_is_not_replaced(case, tool):
    _, model = masked(case)
    act = REPLACERS[tool]
    match = r"Conv2d at 'conv2.weight'.*'weight'.*merge_and_unload"
    refused(model, model.conv2, lambda: act(model.conv2, "weight"), match)


@pytest.mark.parametrize("tool", [name for name in REPLACERS if "norm" not in name])
def test_a_tensor_that_tasks_own_is_not_replaced(tool):
    _, model = masked("mp")
    if tool in ("prune_structured", "orthogonal"):
        return  # they want matrices
    act = REPLACERS[tool]
    refused(model, model.head, lambda: act(model.head, "bias"), "Linear.*'bias'")


def test_old_spectral_norm():
    """It takes what is stored: there is nothing with a bank, and torch itself says so."""
    _, model = masked("own")
    refused(model, model.conv2, lambda: utils.spectral_norm(model.conv2), "delete 'weight'")
    _, model = masked("mp")
    before = anatomy(model.conv2)
    with pytest.raises(ValueError, match="cannot be applied as parameter `weight` is None"):
        utils.spectral_norm(model.conv2)
    assert anatomy(model.conv2) == before


@pytest.mark.parametrize("case", list(CASES))
def test_fusion(case):
    """A fused copy would be masked again; the merged layers fuse as any."""
    outer, model = masked(case)
    refused(
        model,
        model.conv1,
        lambda: utils.fuse_conv_bn_eval(model.conv1.eval(), model.bn1.eval()),
        "fusion would replace",
    )
    x, model = models.images(3), model.eval()
    with torch.no_grad():
        expected = model.bn1(model.conv1(x))
    merged = outer.merge_and_unload()
    with torch.no_grad():
        oracles.assert_near(utils.fuse_conv_bn_eval(merged.conv1, merged.bn1)(x), expected, 1e-5)


@pytest.mark.parametrize("case", ["own", "rp", "own_generated"])
def test_tools_on_the_merged_model(case):
    """What the error advises is right: values, gradients, and taking the tool off again."""
    outer, model = masked(case)
    weight = model.conv2.weight.detach().clone()
    merged = outer.merge_and_unload()
    mask = torch.arange(weight.numel()).view(weight.shape) % 3 != 0
    prune.custom_from_mask(merged.conv2, "weight", mask)
    oracles.assert_same(merged.conv2.weight.detach() + 0.0, weight * mask + 0.0)
    merged.conv2.weight_orig.requires_grad_()
    merged(models.images(3)).square().sum().backward()
    grad = merged.conv2.weight_orig.grad
    assert torch.equal(grad != 0, mask & (grad != 0))
    assert grad.abs().max() > 0
    prune.remove(merged.conv2, "weight")
    utils.weight_norm(merged.conv3)
    parametrizations.weight_norm(merged.head)
    before = masked(case)[1]
    oracles.assert_near(merged.conv3.weight, before.conv3.weight, 1e-6)
    oracles.assert_near(merged.head.weight, before.head.weight, 1e-6)


@pytest.mark.parametrize("case", ["own", "own_all"])
def test_a_tensor_that_nobody_owns_may_be_pruned(case):
    """On own weights a bias is the base's, unless tasks train everything."""
    outer, model = masked(case)
    if case == "own_all":
        refused(model, model.head, lambda: prune.identity(model.head, "bias"), "'bias'")
        return
    bias = model.conv1.bias.detach().clone()
    weight = model.conv1.weight.detach().clone()
    mask = torch.arange(8) % 2 == 0
    prune.custom_from_mask(model.conv1, "bias", mask)
    x = models.images(3)
    expected = nn.functional.conv2d(x, weight, bias * mask)
    with torch.no_grad():
        oracles.assert_near(model.conv1(x), expected, 1e-6)
    merged = outer.merge_and_unload()
    with torch.no_grad():
        oracles.assert_near(merged.conv1(x), expected, 1e-6)


def test_a_parametrization_of_any_tensor_is_refused():
    """Merging gives the layer its own class back, and would take the parametrization with it."""
    _, model = masked("own")
    match = "parametrize would delete 'bias'"
    refused(
        model,
        model.conv1,
        lambda: parametrize.register_parametrization(model.conv1, "bias", Plus()),
        match,
    )


@pytest.mark.parametrize("bank", models.SHARED)
def test_a_weight_for_a_layer_that_a_bank_fills(bank):
    _, model = masked(bank)
    given = nn.Parameter(torch.ones_like(model.conv2.weight))
    match = "nothing would read a 'weight' of its own: the bank fills it"
    refused(model, model.conv2, lambda: setattr(model.conv2, "weight", given), match)
    refused(model, model.conv2, lambda: model.conv2.register_parameter("weight", given), match)
    model.conv2.weight = None  # as it is stored
    assert model.conv2._parameters["weight"] is None


def test_an_own_weight_may_be_assigned():
    """It is the base under the masks; load_state_dict(assign=True) comes this way."""
    _, model = masked("own")
    mask = models.mask_of_layer(model.conv2.masked_weight, "default")
    given = nn.Parameter(torch.full(mask.shape, 2.0), requires_grad=False)
    model.conv2.weight = given
    oracles.assert_same(model.conv2.weight.detach(), given * mask)


@pytest.mark.parametrize("case", list(CASES))
def test_scripting(case):
    _, model = masked(case)
    refused(model, model.conv1, lambda: torch.jit.script(model), "torch.jit.script")
    refused(model, model.conv2, lambda: torch.jit.script(model.conv2), "torch.jit.script")


def test_a_merged_model_scripts():
    outer, model = masked("own")
    expected = models.logits(model)
    merged = outer.merge_and_unload().eval()
    oracles.assert_near(models.logits(torch.jit.script(merged)), expected, 1e-6)


@pytest.mark.parametrize("case", ["own", "mp"])
def test_dynamic_quantisation(case):
    """It looks layers up by class, would find none, and return the model as it is."""
    from torch.ao.quantization import quantize_dynamic

    outer, model = masked(case)
    refused(model, model.head, lambda: quantize_dynamic(model, {nn.Linear}), "ao.quantization")
    expected = models.logits(model)
    quantised = quantize_dynamic(outer.merge_and_unload().eval(), {nn.Linear})
    assert type(quantised.head).__module__.startswith("torch.ao.nn.quantized")
    oracles.assert_near(models.logits(quantised), expected, 0.05)


def test_a_parametrization_that_the_model_came_with_reads_its_own_originals():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    expected = copy.deepcopy(model)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(LowCoverageWarning):
        # Every weight is kept at first; the parametrization's own are the task's.
        masked = pemnify(model, bank="own", selector="threshold", rest="train")
    models.assert_equal(masked(x), expected(x))
