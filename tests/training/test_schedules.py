"""Densities and thresholds that move while masks train, against the equation."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from pemn_surgery import PemnCallback, SelectionSchedule, pemnify, set_selection
from pemn_surgery.errors import AdapterError, ConfigError
from tests.adapters import models
from tests.training.test_trainer import arguments, bert_model, sentences

pytestmark = models.ignore_peft_on_transformers


def linear(**options):
    model = nn.Sequential(nn.Linear(20, 10))
    return pemnify(model, bank="own", modules_to_save=[], **options)


@pytest.mark.parametrize("selector", ["topk", "topk_signed"])
@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_densities_by_the_equation(selector, progress):
    model = linear(selector=selector, density=0.2)
    layer = models.mask_layers(model)["0.weight"]
    scores = layer.mask_of("default").scores.detach()
    before = layer.owner.weight.detach().clone()
    set_selection(model, progress, density=0.9)
    share = 0.2 + 0.7 * (1 - progress) ** 3
    sizes = scores.abs() if selector == "topk" else scores
    kept = sizes.flatten().argsort(descending=True)[: 200 - int((1 - share) * 200)]
    wanted = torch.zeros(200).index_fill(0, kept, 1.0).view(10, 20) * layer.fill().detach()
    assert torch.equal(layer.owner.weight.detach(), wanted)
    assert torch.equal(before, wanted) == (progress == 1.0)


def test_thresholds_by_the_equation():
    model = linear(threshold=0.0, score_init=0.3)
    layer = models.mask_layers(model)["0.weight"]
    for progress, kept in ((0.0, False), (0.1, False), (0.2, True), (1.0, True)):
        set_selection(model, progress, threshold=0.5)
        assert 0.5 * (1 - progress) ** 3 != 0.3
        assert bool(layer.owner.weight.detach().any()) == kept == (0.5 * (1 - progress) ** 3 < 0.3)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"progress": 1.5, "density": 0.5}, "progress=1.5"),
        ({"progress": 0.5}, "density=None and threshold=None: give one"),
        ({"progress": 0.5, "density": 0.5, "threshold": 0.0}, "give one of them"),
        ({"progress": 0.5, "density": 0.0}, "density=0.0: a share of ones"),
    ],
)
def test_numbers_that_cannot_be(numbers, said):
    with pytest.raises(ConfigError, match=said):
        set_selection(linear(), **numbers)


def test_masks_of_another_selector_are_refused():
    with pytest.raises(AdapterError, match=r'takes a density.*selector="topk"'):
        set_selection(linear(), 0.5, density=0.5)
    with pytest.raises(AdapterError, match="takes a threshold"):
        set_selection(linear(selector="topk"), 0.5, threshold=0.5)
    with pytest.raises(ConfigError, match="until=0"):
        SelectionSchedule(density=0.5, until=0)


class Densities(TrainerCallback):
    """Keeps each step's share of ones."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        masks = [layer.mask_of("default").mask() for layer in models.mask_layers(model).values()]
        self.found.append([float(mask.double().mean()) for mask in masks])


def test_the_trainer_moves_the_density(tmp_path):
    model, seen = bert_model(density=0.25), Densities()
    schedule = SelectionSchedule(density=1.0, until=0.5)
    Trainer(
        model=model, args=arguments(tmp_path, save_strategy="no", max_steps=8),
        train_dataset=sentences(), callbacks=[PemnCallback(), schedule, seen],
    ).train()  # fmt: skip
    wanted = [0.25 + 0.75 * (1 - min(step / 4, 1)) ** 3 for step in range(8)]
    assert len(seen.found) == 8
    for shares, share in zip(seen.found, wanted, strict=True):
        assert all(abs(one - share) < 0.01 for one in shares)
    model.save_pretrained(str(tmp_path))
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(models.bert(), str(tmp_path))
    models.assert_same_tensors(models.masks(loaded), models.masks(model))
