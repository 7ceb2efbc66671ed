"""A penalty on flips, against the equation and in the Trainer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer

from pemn_surgery import PemnCallback, pemnify, pull_back
from pemn_surgery.errors import AdapterError
from pemn_surgery.training.penalty import pull_back_at_rates
from tests.adapters import models
from tests.training.test_trainer import arguments, bert_model, sentences

pytestmark = models.ignore_peft_on_transformers


def linear(**options):
    return pemnify(nn.Sequential(nn.Linear(3, 4)), bank="own", modules_to_save=[], **options)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-2, 2, width=32), min_size=12, max_size=12),
    st.floats(0, 1, width=32),
    st.sampled_from([0.01, 0.5, -0.25]),
)
def test_scores_move_by_at_most_the_amount_and_not_past_their_beginning(scores, amount, start):
    model = linear(threshold=start - 0.01, score_init=start)
    held = models.mask_layers(model)["0.weight"].mask_of("default").scores
    with torch.no_grad():
        held.copy_(torch.tensor(scores).view(4, 3))
    before = held.detach().flatten().tolist()
    pull_back(model, amount)
    for was, now in zip(before, held.detach().flatten().tolist(), strict=True):
        wanted = was if was >= start else min(was + amount, start)
        assert now == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"selector": "topk"}, "1 of 1 masks"), ({"inference_mode": True}, "no scores of this")],
)
def test_masks_without_one_beginning_are_refused(options, said):
    model = linear(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        pull_back(model, 0.1)
    models.says(error, said, 'selector="threshold"', "Nothing was changed")
    models.assert_same_tensors(model.state_dict(), before)


def test_each_mask_is_drawn_back_at_its_own_rate():
    model = pemnify(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), bank="own", modules_to_save=[])
    first, second = (
        layer.mask_of("default").scores for layer in models.mask_layers(model).values()
    )
    with torch.no_grad():
        first.fill_(-1.0)
        second.fill_(-1.0)
    groups = [{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.25}]
    pull_back_at_rates(model, torch.optim.AdamW(groups), 0.4)
    assert first.flatten().tolist() == pytest.approx([-0.8] * 12)
    assert second.flatten().tolist() == pytest.approx([-0.9] * 8)


def test_a_penalty_that_would_draw_nowhere_is_refused_before_the_first_step(tmp_path):
    model = bert_model(selector="topk")
    before = models.masks(model)
    driver = Trainer(
        model=model, args=arguments(tmp_path, save_strategy="no"),
        train_dataset=sentences(), callbacks=[PemnCallback(flip_penalty=0.1)],
    )  # fmt: skip
    with pytest.raises(AdapterError, match="began with drawn scores"):
        driver.train()
    models.assert_same_tensors(models.masks(model), before)
    assert driver.state.global_step == 0


def flips_with(penalty, folder):
    model = bert_model(selector="threshold", form="flip")
    before = models.masks(model)
    Trainer(
        model=model, args=arguments(folder, save_strategy="no", max_steps=8),
        train_dataset=sentences(), callbacks=[PemnCallback(flip_penalty=penalty)],
    ).train()  # fmt: skip
    return models.flips(before, models.masks(model))


def test_a_larger_penalty_flips_less(tmp_path):
    flips = [flips_with(penalty, tmp_path) for penalty in (0.0, 0.3, 0.8)]
    assert flips[0] > flips[1] > flips[2] > 0
    with pytest.warns(Warning, match="Not one of"):
        assert flips_with(20.0, tmp_path) == 0  # every step is taken back
