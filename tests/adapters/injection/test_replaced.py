"""Modules that are replaced after masks were put on a model: saved, or refused by name."""

import pytest
import timm
import torch
from peft import PeftModel
from timm.utils.model import freeze, freeze_batch_norm_2d
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pemn_surgery import pemnify
from pemn_surgery.errors import AdapterError, MaskedWeightError, PemnWarning
from tests.adapters import models

BANKS = {
    "own": {"bank": "own", "selector": "topk"},
    "own, masked head": {"bank": "own", "selector": "topk", "modules_to_save": []},
    "rp": {"bank": "rp", "ratio": 0.1},
    "mp": {"bank": "mp"},
}
every_bank = pytest.mark.parametrize("bank", BANKS)
x = models.images(0, 4, 32)


def resnet(classes=10, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model("test_resnet", num_classes=classes)


def train(model):
    """A few steps on all that is trainable, new layers too."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


REPLACE = {
    "reset_classifier": lambda net: net.reset_classifier(5),
    "assigned": lambda net: setattr(net, "fc", nn.Linear(net.num_features, 5)),
}


@every_bank
@pytest.mark.parametrize("how", REPLACE)
def test_a_new_head_is_saved_whole(how, bank, tmp_path):
    model = pemnify(resnet(), **BANKS[bank])
    torch.manual_seed(1)
    REPLACE[how](model.get_base_model())
    train(model)
    expected = model(x)
    assert expected.shape == (4, 5)
    model.save_pretrained(str(tmp_path))
    base = resnet() if bank.startswith("own") else resnet(seed=7)
    again = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert again.peft_config["default"].modules_to_save == ["fc"]
    models.assert_equal(again(x), expected)
    model.save_pretrained(str(tmp_path / "again"))  # as often as one likes
    files = [(place / models.WEIGHTS_FILE).read_bytes() for place in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("bank", ["own, masked head", "rp"])
def test_a_head_that_is_gone_is_said(bank, tmp_path):
    model = train(pemnify(resnet(), **BANKS[bank]))
    model.get_base_model().reset_classifier(0)
    expected = model(x)
    with pytest.warns(PemnWarning, match="fc of adapter 'default' is gone from the model"):
        model.save_pretrained(str(tmp_path))
    base = resnet() if bank.startswith("own") else resnet(seed=7)
    base.reset_classifier(0)
    again = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    models.assert_equal(again(x), expected)


FREEZE = {
    "freeze_batch_norm_2d": freeze_batch_norm_2d,
    "freeze": lambda net: freeze(net, ["bn1"]),
}


@pytest.mark.parametrize("how", FREEZE)
@pytest.mark.parametrize("bank", ["own", "rp"])
def test_replaced_norms_are_refused(bank, how, tmp_path):
    model = train(pemnify(resnet(), **BANKS[bank]))
    net = model.get_base_model()
    FREEZE[how](net)
    with pytest.raises(AdapterError) as error:
        model.save_pretrained(str(tmp_path / "task"))
    models.says(error, "are no longer in the model", "FrozenBatchNorm2d", 'rest="freeze"')
    models.says(error, "Nothing was saved", "torch.save(model.state_dict(), ...)")
    assert not (tmp_path / "task" / models.WEIGHTS_FILE).exists()


def test_a_bank_that_would_be_another_is_refused(tmp_path):
    """The replaced layer was the largest: without it the vector is shorter."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 32))
    model = pemnify(net, bank="rp", ratio=0.5)
    net[2] = nn.Linear(4, 3)
    with pytest.raises(AdapterError, match=r"2 was replaced .* draws another bank"):
        model.save_pretrained(str(tmp_path))


def test_what_was_never_masked_is_no_ones_business(tmp_path):
    """A module that is added later (a teacher, a metric) stays out of the file."""
    model = train(pemnify(resnet(), bank="own", selector="topk"))
    model.save_pretrained(str(tmp_path / "before"))
    model.get_base_model().teacher = resnet()
    model.save_pretrained(str(tmp_path / "after"))
    files = [(tmp_path / n / models.WEIGHTS_FILE).read_bytes() for n in ("before", "after")]
    assert files[0] == files[1]


def test_a_second_adapter_is_saved_as_ever(tmp_path):
    model = pemnify(resnet(), bank="own", selector="topk")
    model.add_adapter("two", model.peft_config["default"].own_copy())
    model.set_adapter("two")
    train(model)
    expected = model(x)
    model.save_pretrained(str(tmp_path), selected_adapters=["two"])
    again = PeftModel.from_pretrained(resnet(), str(tmp_path / "two")).eval()
    models.assert_equal(again(x), expected)


def gpt2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).eval()


@pytest.mark.parametrize("tied", ["untie", "both"])
@pytest.mark.parametrize("bank", ["own", "rp", "mp"])
def test_ties_that_adapters_decide_stay_so(bank, tied, tmp_path):
    base = gpt2
    model = pemnify(base(), bank=bank, tied=tied).eval()
    ids = models.tokens()
    expected = model(input_ids=ids).logits
    net = model.get_base_model()
    net.tie_weights()
    net.init_weights()
    net.resize_token_embeddings(40)
    models.assert_equal(model(input_ids=ids).logits, expected)
    with pytest.raises(MaskedWeightError, match=r"resize_token_embeddings\(50\) would tie"):
        net.resize_token_embeddings(50)
    models.assert_equal(model(input_ids=ids).logits, expected)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    models.assert_equal(again(input_ids=ids).logits, expected)
    merged = again.merge_and_unload()
    assert type(merged) is GPT2LMHeadModel
    merged.save_pretrained(str(tmp_path / "merged"))
    dense = GPT2LMHeadModel.from_pretrained(str(tmp_path / "merged")).eval()
    models.assert_equal(dense(input_ids=ids).logits, expected)


@pytest.mark.filterwarnings("ignore::pemn_surgery.errors.LowCoverageWarning")
@pytest.mark.parametrize("bank", ["own", "rp"])
def test_a_head_that_stays_tied_is_resized_with_its_embedding(bank, tmp_path):
    model = pemnify(gpt2(), bank=bank).eval()
    ids = models.tokens()
    expected = model(input_ids=ids).logits
    model.get_base_model().tie_weights()
    models.assert_equal(model(input_ids=ids).logits, expected)
    model.get_base_model().resize_token_embeddings(50)
    models.assert_equal(model(input_ids=ids).logits[..., :40], expected)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    fresh = gpt2()
    fresh.resize_token_embeddings(50)
    again = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    models.assert_equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
