"""Masks never load onto another base, and do load onto the same one in another float type."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import ArchitectureError, BankMismatchError, FingerprintError
from pemn_surgery.numbers import fingerprint as fingerprints
from tests.adapters import models
from tests.adapters.models import BANKS, GENERATED

OWN = {"own": {"bank": "own"}, "mp_of_model": {"bank": "mp", "bank_init": "model"},
       "one_layer_of_model": {"bank": "one_layer", "bank_init": "model"}}  # fmt: skip
from_the_model = pytest.mark.parametrize("options", OWN.values(), ids=OWN)


def fingerprint_of(model):
    """What saving writes."""
    assert get_peft_model_state_dict(model)
    return model.peft_config["default"].fingerprint


def saved(folder, base, **options):
    model = models.train(pemnify(base, **options))
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@from_the_model
def test_same_base_in_another_float_type(options, dtype, tmp_path):
    trained = saved(tmp_path, models.net(), **options)
    model = PeftModel.from_pretrained(models.net().to(dtype), str(tmp_path))
    models.assert_same_tensors(models.masks(model), models.masks(trained))
    weight = model.base_model.model.conv2.weight
    assert weight.dtype == dtype
    models.assert_equal(
        weight.detach() + 0.0, trained.base_model.model.conv2.weight.detach().to(dtype) + 0.0
    )


def test_trained_in_bfloat16_and_served_in_float32(tmp_path):
    base = models.net().to(torch.bfloat16)
    widened = models.clone(base).float()
    model = pemnify(base, bank="own")
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(widened, str(tmp_path))
    models.assert_same_tensors(models.masks(again), models.masks(model))


def test_types_that_cannot_be_compared_warn(tmp_path):
    pemnify(models.net().to(torch.bfloat16), bank="own").save_pretrained(str(tmp_path))
    base = models.net().to(torch.float16)
    with pytest.warns(UserWarning, match=r"could not be checked.*bfloat16.*loaded in float16"):
        PeftModel.from_pretrained(base, str(tmp_path))


@pytest.mark.parametrize("name", ["conv1.weight", "conv3.weight", "head.weight"])
def test_one_changed_weight_is_refused(name, tmp_path):
    trained = saved(tmp_path, models.net(), bank="own")
    base = models.net()
    with torch.no_grad():
        flat = base.get_parameter(name).view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(10.0))
    before = models.Snapshot(base)
    with pytest.raises(FingerprintError) as error:
        PeftModel.from_pretrained(base, str(tmp_path))
    known = trained.peft_config["default"].fingerprint
    models.says(error, "fingerprint", "frozen weights differ", "Load the checkpoint", "Nothing was")
    assert any(digits in str(error.value) for digits in known.values())
    before.assert_unchanged()


@from_the_model
def test_another_base_is_refused(options, tmp_path):
    saved(tmp_path, models.net(0), **options)
    base = models.net(1)
    before = models.Snapshot(base)
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(base, str(tmp_path))
    before.assert_unchanged()


@pytest.mark.parametrize("bank", GENERATED)
def test_a_seeded_bank_needs_no_base(bank, tmp_path):
    model = saved(tmp_path, models.net(0), **BANKS[bank])
    again = PeftModel.from_pretrained(models.net(1), str(tmp_path))
    assert again.peft_config["default"].fingerprint == model.peft_config["default"].fingerprint
    assert len(set(model.peft_config["default"].fingerprint.values())) == 1


def test_fingerprints_differ_by_what_makes_the_numbers():
    options = [
        *BANKS.values(), {"seed": 1}, {"bank_init": "kaiming_uniform"}, {"bank_init": "model"},
        {"scale_fan": True}, {"bank": "rp", "ratio": 0.02}, {"target_modules": ["conv1"]},
    ]  # fmt: skip
    found = [fingerprint_of(pemnify(models.net(), **given))["float32"] for given in options]
    assert len(found) == len(BANKS) + 6
    assert len(set(found)) == len(found)
    assert all(len(digits) == 16 and int(digits, 16) >= 0 for digits in found)


def test_fingerprints_are_equal_where_only_training_differs():
    given = [{}, {"density": 0.3}, {"selector": "threshold"}, {"rest": "freeze"}]
    found = {
        fingerprint_of(pemnify(models.net(), bank="own", **options))["float32"] for options in given
    }
    assert len(found) == 1


def test_one_configuration_object_serves_several_models(tmp_path):
    config = PemnConfig(bank="own")
    trained = [models.train(pemnify(models.net(seed), config)) for seed in (0, 1)]
    for seed, model in enumerate(trained):
        model.save_pretrained(str(tmp_path / str(seed)))
        again = PeftModel.from_pretrained(models.net(seed), str(tmp_path / str(seed)))
        models.assert_equal(models.logits(again), models.logits(model))
        with pytest.raises(FingerprintError):
            PeftModel.from_pretrained(models.net(1 - seed), str(tmp_path / str(seed)))


def test_existing_adapter_refuses_masks_of_another_base(tmp_path):
    saved(tmp_path, models.net(1), bank="own")
    model = models.train(pemnify(models.net(0), bank="own"))
    before = models.Snapshot(model)
    with pytest.raises(FingerprintError, match="frozen weights differ"):
        model.load_adapter(str(tmp_path), "default")
    before.assert_unchanged()
    with pytest.raises(FingerprintError, match="frozen weights differ"):
        set_peft_model_state_dict(model, load_file(tmp_path / models.WEIGHTS_FILE))
    before.assert_unchanged()


def test_existing_adapter_refuses_masks_of_another_seed(tmp_path):
    saved(tmp_path, models.net(), bank="rp", seed=1)
    model = models.train(pemnify(models.net(), bank="rp", seed=0))
    before = models.Snapshot(model)
    with pytest.raises(FingerprintError):
        model.load_adapter(str(tmp_path), "default")
    before.assert_unchanged()


def test_existing_adapter_takes_masks_of_the_same_base(tmp_path):
    other = saved(tmp_path, models.net(), bank="own")
    model = pemnify(models.net(), bank="own")
    with pytest.warns(UserWarning, match="bits, not scores"):
        model.load_adapter(str(tmp_path), "default")
    models.assert_same_tensors(models.masks(model), models.masks(other))


def test_second_adapter_with_another_bank_is_refused():
    model = models.train(pemnify(models.net(), bank="rp", seed=0))
    before = models.Snapshot(model)
    for options, said in [
        ({"bank": "rp", "seed": 1}, "seed=1 instead of 0"),
        ({"bank": "rp", "ratio": 0.5}, "ratio=0.5 instead of 0.01"),
        ({"bank": "mp"}, "bank='mp' instead of 'rp'"),
        ({"bank": "own"}, "bank='own' instead of 'rp'"),
    ]:
        with pytest.raises(BankMismatchError) as error:
            model.add_adapter("second", PemnConfig(**options))
        models.says(error, said, "share one bank", "fresh model", "Nothing was changed")
        before.assert_unchanged()
        assert list(model.peft_config) == ["default"]


def test_second_adapter_of_larger_weights_is_refused():
    model = pemnify(models.net(), bank="mp", target_modules=["head"])
    before = models.Snapshot(model)
    with pytest.raises(BankMismatchError) as error:
        model.add_adapter("second", PemnConfig(bank="mp"))
    models.says(error, "fills 1 weights", "would mask 4", "conv1.weight", "the same targets")
    before.assert_unchanged()


def test_loading_an_adapter_of_another_bank_is_refused(tmp_path):
    saved(tmp_path, models.net(), bank="rp", seed=1)
    model = models.train(pemnify(models.net(), bank="rp", seed=0))
    before = models.Snapshot(model)
    with pytest.raises(BankMismatchError, match="seed=1 instead of 0"):
        model.load_adapter(str(tmp_path), "second")
    before.assert_unchanged()
    assert list(model.peft_config) == ["default"]


def test_another_architecture_is_refused(tmp_path):
    saved(tmp_path, models.net(), bank="rp")
    base = models.net(channels=12)
    before = models.Snapshot(base)
    with pytest.raises(ArchitectureError) as error:
        PeftModel.from_pretrained(base, str(tmp_path))
    models.says(error, "216 weights", "324 weights", "Build the model", "Nothing")
    before.assert_unchanged()
    model = models.train(pemnify(models.net(channels=12), bank="rp"))
    before = models.Snapshot(model)
    for name in ("default", "second"):
        with pytest.raises(ArchitectureError):
            model.load_adapter(str(tmp_path), name)
        before.assert_unchanged()


def add_to_one(weight):
    weight[3, 5] += 2**-20


def swap_two(weight):
    weight[7, [1, 90]] = weight[7, [90, 1]]


def swap_rows(weight):
    weight[[2, 40]] = weight[[40, 2]]


def end_with_another(weight):
    weight.view(-1)[-1] *= -1


@pytest.mark.parametrize("change", [add_to_one, swap_two, swap_rows, end_with_another])
@pytest.mark.parametrize("width", [128, 131])  # whole rows of words, and some left over
def test_a_later_adapter_sees_changes_that_torch_does_not(tmp_path, change, width):
    """Fingerprints are remembered by what the values are, not by versions or addresses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(width, width))
    pemnify(models.clone(base), bank="own").save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(base, str(tmp_path))
    expected = model.peft_config["default"].fingerprint
    weight = model.base_model.model[0]._parameters["weight"].data
    whole, version = weight.clone(), model.base_model.model[0]._parameters["weight"]._version
    change(weight)
    assert model.base_model.model[0]._parameters["weight"]._version == version
    with pytest.raises(FingerprintError):
        model.load_adapter(str(tmp_path), "late")
    weight.copy_(whole)
    model.load_adapter(str(tmp_path), "later")
    known = dict(fingerprints._known)
    fingerprints._known.clear()
    model.load_adapter(str(tmp_path), "latest")
    assert fingerprints._known.items() <= known.items()
    found = {name: model.peft_config[name].fingerprint for name in ("later", "latest")}
    assert found == {"later": expected, "latest": expected}


HELD = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("trained", HELD)
@pytest.mark.parametrize("served", HELD)
def test_the_error_names_the_types_of_the_two_bases(trained, served, tmp_path):
    """Whichever types they are compared in: that is said besides, where it is another."""
    model = pemnify(models.net(0).to(HELD[trained]), bank="own")
    model.save_pretrained(str(tmp_path))
    base = models.net(1).to(HELD[served])
    before = {name: value.clone() for name, value in base.state_dict().items()}
    if {trained, served} == {"bfloat16", "float16"}:  # neither is a rounding of the other
        with pytest.warns(UserWarning, match=f"know it in {trained}, it is loaded in {served}"):
            PeftModel.from_pretrained(base, str(tmp_path))
        return
    compared = next(
        name for name in ("bfloat16", "float16", "float32") if name in (trained, served)
    )
    with pytest.raises(FingerprintError) as error:
        PeftModel.from_pretrained(base, str(tmp_path))
    sides = [
        f"({held})" if held == compared else f"({held}, rounded to {compared})"
        for held in (trained, served)
    ]
    message = str(error.value)
    assert re.search(
        rf"trained on a base with fingerprint [0-9a-f]{{16}} {re.escape(sides[0])},", message
    )
    assert re.search(rf"the given model has [0-9a-f]{{16}} {re.escape(sides[1])}:", message)
    assert re.findall("float32|bfloat16|float16", message) == re.findall(
        "float32|bfloat16|float16", "".join(sides)
    )
    models.assert_same_tensors(base.state_dict(), before)


def test_the_error_names_no_type_of_numbers_that_a_seed_draws(tmp_path):
    pemnify(models.net(), bank="rp", seed=1).save_pretrained(str(tmp_path))
    config = PemnConfig.from_pretrained(str(tmp_path))
    config.seed = 2
    with pytest.raises(
        FingerprintError, match=r"[0-9a-f]{16} \(drawn from a seed\), but the gi"
    ) as error:
        PeftModel.from_pretrained(models.net(), str(tmp_path), config=config)
    assert "float" not in str(error.value)
