"""A head that is tied to an embedding: leave, untie, or one mask for both."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pemn_surgery import pemnify, plan
from pemn_surgery.errors import ConfigError, LowCoverageWarning
from pemn_surgery.masks.masked_weight import MaskedWeight

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT reads it
)

OWN = {"bank": "own", "selector": "threshold", "score_init": "kaiming_uniform"}
RP = {"bank": "rp", "ratio": 0.3}
IDS = torch.arange(6).reshape(2, 3)
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def mask_of(model, name):
    (found,) = [m for m in model.modules() if isinstance(m, MaskedWeight) and m.target == name]
    return found.pemn_masks["default"].mask()


def burnt_in(masked, tied):
    """Return the oracle: a plain untied copy whose weights were multiplied with the masks."""
    oracle = gpt2()
    oracle.lm_head.weight = nn.Parameter(oracle.lm_head.weight.detach().clone())
    with torch.no_grad():
        for module in masked.modules():
            if isinstance(module, MaskedWeight):
                mask = mask_of(masked, module.target)
                for name in {module.target, *([HEAD] if module.target == EMBEDDING else [])}:
                    oracle.get_parameter(name).mul_(mask)
    assert torch.equal(oracle.lm_head.weight, oracle.transformer.wte.weight) is (tied == "both")
    return oracle


def merged(model, tied):
    if tied == "both":
        return model.merge_and_unload()
    with pytest.warns(UserWarning, match="no longer tied"):  # PEFT sets the model's configuration
        return model.merge_and_unload()


def test_leave_is_the_default():
    made = plan(gpt2(), **OWN)
    assert made == plan(gpt2(), **OWN, tied="leave")
    assert not {EMBEDDING, HEAD} & {target.name for target in made.targets}
    left = {item.name: item for item in made.left}
    assert 'see tied="both" and tied="untie"' in left[HEAD].reason
    assert made.coverage < 0.91
    with pytest.warns(LowCoverageWarning, match="lm_head.weight: tied to transformer.wte.weight"):
        masked = pemnify(gpt2(), **OWN).get_base_model()
    assert masked.lm_head.weight is masked.transformer.wte.weight


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_the_plan_says_so(tied):
    made = plan(gpt2(), **OWN, tied=tied)
    by_name = {target.name: target for target in made.targets}
    if tied == "untie":
        assert by_name[HEAD].untied_from == EMBEDDING
        assert f"untied from {EMBEDDING}" in by_name[HEAD].reason
        assert EMBEDDING in {item.name for item in made.left}
    else:
        assert by_name[EMBEDDING].tied == (HEAD,)
        assert f"one mask with {HEAD}" in by_name[EMBEDDING].reason
    assert made.coverage == 1.0


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_masks_on_own_weights_equal_burnt_in_masks(tied):
    masked = pemnify(gpt2(), **OWN, tied=tied)
    expected = logits(burnt_in(masked, tied))
    assert torch.equal(logits(masked), expected)
    assert not torch.allclose(expected, logits(gpt2()))


@pytest.mark.parametrize("bank", [OWN, RP], ids=["own", "rp"])
@pytest.mark.parametrize("tied", ["untie", "both"])
def test_save_load_merge(tied, bank, tmp_path):
    masked = pemnify(gpt2(), **bank, tied=tied)
    for module in masked.modules():
        if isinstance(module, MaskedWeight):
            module.pemn_masks["default"].scores.data.normal_(
                generator=torch.Generator().manual_seed(module.fan_in)
            )
    expected = logits(masked)
    masked.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    dense = merged(loaded, tied)
    assert type(dense) is GPT2LMHeadModel
    assert torch.equal(logits(dense), expected)
    assert (dense.lm_head.weight is dense.transformer.wte.weight) is (tied == "both")
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_unload_ties_again(tied):
    model = gpt2()
    expected = logits(model)
    plain = pemnify(model, **OWN, tied=tied).unload()
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.equal(logits(plain), expected)


def test_an_untied_head_over_a_bank_unloads_to_the_embedding():
    plain = pemnify(gpt2(), **RP, tied="untie").unload()
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.equal(plain.lm_head.weight, gpt2().lm_head.weight)


def test_an_untied_head_trains_alone():
    masked = pemnify(gpt2(), **OWN, tied="untie")
    masked(input_ids=IDS, labels=IDS).loss.backward()
    (head,) = [m for m in masked.modules() if isinstance(m, MaskedWeight) and m.target == HEAD]
    assert head.pemn_masks["default"].scores.grad.abs().sum() > 0
    assert not masked.get_base_model().transformer.wte.weight.requires_grad


def test_linear_layers_tied_to_each_other_share_one_mask_under_every_policy():
    for tied in ("leave", "untie", "both"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        made = plan(model, **OWN, tied=tied)
        assert [(t.name, t.tied) for t in made.targets] == [("0.weight", ("1.weight",))]


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="tied='split'"):
        plan(gpt2(), **OWN, tied="split")


class TwoNames(nn.Module):
    """One trained bias under two names on two modules."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.shift = nn.Parameter(self.norm.bias.detach() + 0.5)
        self.norm.bias = self.shift

    def forward(self, x):
        return self.norm(self.body(x)) + self.shift


def test_owned_tensors_may_be_tied_under_different_names(tmp_path):
    torch.manual_seed(0)
    model, x = TwoNames(), torch.randn(2, 3)
    expected = model(x)
    masked = pemnify(model, bank="own", selector="threshold", rest="train")
    assert torch.allclose(masked(x), expected)
    masked(x).sum().backward()
    trained = [p for n, p in masked.named_parameters() if p.requires_grad and "shift" in n]
    assert len(trained) == 1
    assert torch.equal(trained[0].grad, torch.full((3,), 4.0))  # two rows through both names
    trained[0].data.add_(1.0)
    moved = masked(x).detach()
    assert torch.allclose(moved, expected + 2.0)
    masked.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(TwoNames(), tmp_path)
    assert torch.equal(loaded(x), moved)
    merged = loaded.merge_and_unload()
    assert torch.equal(merged(x), moved)
    assert merged.norm.bias is merged.shift
