"""A cast of a model never changes a bit of a mask that was trained."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from pemn_surgery import PemnConfig, from_finetuned, pemnify
from tests.adapters import models

BF, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NARROW = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to a type": lambda model: model.to(BF),
    "to device and type": lambda model: model.to(device="cpu", dtype=F16),
    "type": lambda model: model.type(BF),
    "half and back": lambda model: model.half().float(),
    "the inner model alone": lambda model: (model.get_base_model().bfloat16(), model)[1],
}
every_cast = pytest.mark.parametrize("cast", list(NARROW))
SELECTORS = {"topk": {"selector": "topk"}, "threshold": {"selector": "threshold", "threshold": 0.1}}


def trained(bank="own", **options):
    """Scores so close to the border that bfloat16 and float16 turn some of their bits."""
    model = models.train(pemnify(models.net(), **{"bank": bank, "selector": "topk", **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            scores = layer.mask_of("default").scores
            scores.copy_(0.1 + 1e-4 * torch.randn(scores.shape, generator=generator))
    return model


def scores_of(model, name="default"):
    return {key: layer.mask_of(name).scores for key, layer in models.mask_layers(model).items()}


def rounded_flips(model, dtype):
    """How many bits rounding the scores would turn: what a cast did."""
    twin = copy.deepcopy(model)
    for mask in scores_of(twin).values():
        mask.data = mask.data.to(dtype)
    return models.flips(models.masks(model), models.masks(twin))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("bank", ["own", "rp"])
@every_cast
def test_a_cast_turns_no_bit(bank, selector, cast, tmp_path):
    model = trained(bank, **SELECTORS[selector])
    assert rounded_flips(model, BF) > 9
    assert rounded_flips(model, F16) > 9
    masks, scores = models.masks(model), {n: s.clone() for n, s in scores_of(model).items()}
    parameters = {name: id(s) for name, s in scores_of(model).items()}
    model.save_pretrained(str(tmp_path / "before"))
    cast_model = NARROW[cast](model)
    assert cast_model is model
    models.assert_same_tensors(scores_of(model), scores)
    assert {name: id(s) for name, s in scores_of(model).items()} == parameters
    model.save_pretrained(str(tmp_path / "after"))
    base = models.net()
    if bank == "own" and cast == "half and back":  # the base is rounded now
        base = base.half().float()
    again = PeftModel.from_pretrained(base, str(tmp_path / "after"))
    models.assert_same_tensors(models.masks(again), masks)
    files = [load_file(tmp_path / when / models.WEIGHTS_FILE) for when in ("before", "after")]
    kept = [{k: v[32:] for k, v in file.items() if k.endswith(".bits")} for file in files]
    models.assert_same_tensors(kept[1], kept[0])


def test_the_rest_of_the_model_follows_the_cast():
    """As with LoRA, whose base and inputs have the new type; only scores stay exact."""
    model = trained("rp").half()
    lora = get_peft_model(models.net(), LoraConfig(target_modules=["conv2"])).half()
    assert {p.dtype for p in lora.parameters()} == {F16}
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert {t for n, t in types.items() if n.endswith(".scores")} == {F32}
    assert {t for n, t in types.items() if not n.endswith(".scores")} == {F16}
    assert model.base_model.model.conv2.weight.dtype == F16
    output = model.eval()(models.images().half())
    assert output.dtype == F16
    output.float().sum().backward()
    assert {s.grad.dtype for s in scores_of(model).values()} == {F32}


def test_gradients_keep_their_type_with_their_scores():
    model = trained()
    model(models.images()).sum().backward()
    before = {name: s.grad.clone() for name, s in scores_of(model).items()}
    model.half()
    models.assert_same_tensors({n: s.grad for n, s in scores_of(model).items()}, before)


def test_training_goes_on_with_the_same_optimizer_after_a_cast_and_back():
    """The scores of a run that was cast in between are those of one that was not."""
    runs = []
    for cast in (False, True):
        model = pemnify(models.net().bfloat16().float(), bank="own", selector="topk", rest="freeze")
        optimizer = models.trainer_of(model)
        models.step(model, optimizer, 0)
        if cast:
            model.bfloat16().float()
        models.step(model, optimizer, 1)
        runs.append({name: s.detach().clone() for name, s in scores_of(model).items()})
    models.assert_same_tensors(runs[1], runs[0])


def test_a_wider_type_is_taken():
    """Nothing is lost, and derivatives are checked in float64."""
    model = trained()
    masks = models.masks(model)
    model.double()
    assert {s.dtype for s in scores_of(model).values()} == {F64}
    models.assert_same_tensors(models.masks(model), masks)


def test_scales_of_signs_keep_their_type():
    finetuned = models.train(pemnify(models.net(), bank="rp")).merge_and_unload()
    model = from_finetuned(models.net(), finetuned, method="sign_delta", is_trainable=True)
    scales = {
        name: p.detach().clone() for name, p in model.named_parameters() if "row_scale" in name
    }
    model.half()
    models.assert_same_tensors({n: dict(model.named_parameters())[n] for n in scales}, scales)


def test_without_autocast_a_new_adapter_has_its_layers_type():
    model = get_peft_model(
        models.net().bfloat16(),
        PemnConfig(bank="own", selector="topk"),
        autocast_adapter_dtype=False,
    )
    assert {s.dtype for s in scores_of(model).values()} == {BF}
    model.add_adapter(
        "second", PemnConfig(bank="own", selector="topk"), autocast_adapter_dtype=False
    )
    assert {s.dtype for s in scores_of(model, "second").values()} == {BF}
    model = get_peft_model(models.net().bfloat16(), PemnConfig(bank="own", selector="topk"))
    assert {s.dtype for s in scores_of(model).values()} == {F32}


def checkpoint(folder):
    """An adapter trained in float32 with its scores, as a Trainer's checkpoint holds it."""
    model = trained()
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(folder))
    assert rounded_flips(model, BF) > 0
    return model


def from_pretrained(folder):
    return PeftModel.from_pretrained(
        models.net().bfloat16(), folder, is_trainable=True, autocast_adapter_dtype=False
    )


def into_its_own_place(folder):
    config = PemnConfig(bank="own", selector="topk")
    model = get_peft_model(models.net().bfloat16(), config, autocast_adapter_dtype=False)
    model.load_adapter(folder, "default", is_trainable=True, autocast_adapter_dtype=False)
    return model


def under_another_name(folder):
    model = get_peft_model(
        models.net().bfloat16(), PemnConfig(bank="own", selector="topk"), "first"
    )
    model.load_adapter(folder, "default", is_trainable=True, autocast_adapter_dtype=False)
    return model


@pytest.mark.parametrize("load", [from_pretrained, into_its_own_place, under_another_name])
def test_loaded_scores_are_those_of_the_file(load, tmp_path):
    """Whatever type PEFT would give them in a bfloat16 model without autocast."""
    expected = checkpoint(tmp_path)
    model = load(str(tmp_path))
    models.assert_same_tensors(scores_of(model), scores_of(expected))
    models.assert_same_tensors(models.masks(model), models.masks(expected))
