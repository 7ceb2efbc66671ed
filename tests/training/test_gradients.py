"""Masks that no gradient reaches are named where training starts."""

import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer

from pemn_surgery import PemnCallback, masks_without_gradient, pemnify
from pemn_surgery.errors import NoGradientWarning
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.models.inputs.examples import example_inputs
from tests.training.test_trainer import arguments, pictures
from tests.zoo import transformers_models

# A few steps with hardly a gradient change no bit, which is said, too.
pytestmark = pytest.mark.filterwarnings("ignore:Not one of:pemn_surgery.errors.TrainingWarning")


class Gated(nn.Module):
    """A branch that starts at zero, one that never runs, one whose gradient is tiny."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.open, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)
        self.before, self.zero = nn.Linear(3, 3), nn.Linear(3, 3)
        self.faint, self.head = nn.Linear(3, 3), nn.Linear(3, 4)
        nn.init.zeros_(self.zero.weight)

    def forward(self, pixel_values, labels=None):
        x = pixel_values.mean((-2, -1))
        x = self.open(x) + self.zero(self.before(x)) + 1e-20 * self.faint(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def watched(model, folder, steps):
    return Trainer(
        model=model,
        args=arguments(folder, max_steps=steps),
        train_dataset=pictures(),
        callbacks=[PemnCallback()],
    )


IDLE = ["idle.weight", "before.weight", "zero.weight", "faint.weight"]


def test_masks_behind_zeros_and_beside_the_forward_are_listed():
    model = pemnify(Gated(), bank="own", selector="topk", rest="freeze")
    batch = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    assert masks_without_gradient(model) == [
        module.target for module in model.modules() if isinstance(module, MaskedWeight)
    ]  # there was no backward pass
    model(*batch)["loss"].backward()
    assert masks_without_gradient(model) == IDLE


def test_a_drawn_bank_has_no_zeros():
    model = pemnify(Gated(), bank="rp")
    model(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))["loss"].backward()
    assert masks_without_gradient(model) == ["idle.weight", "faint.weight"]


@pytest.mark.parametrize(("most", "steps"), [(3, 3), (12, 10)])
def test_the_trainer_warns_once(most, steps, tmp_path):
    model = pemnify(Gated(), bank="own", selector="topk", rest="freeze")
    trainer = watched(model, tmp_path, most)
    with pytest.warns(NoGradientWarning) as caught:
        trainer.train()
    said = [str(item.message) for item in caught if item.category is NoGradientWarning]
    assert len(said) == 1
    start = f"4 of 6 masks got no usable gradient in the first {steps} steps: {IDLE[0]}"
    assert said[0].startswith(start)
    assert all(name in said[0] for name in IDLE)


class Opening(Gated):
    """A gain that starts at zero, is trained, and lets gradients pass from the second step on."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        nn.init.zeros_(self.norm.weight)

    def forward(self, pixel_values, labels=None):
        x = pixel_values.mean((-2, -1))
        logits = self.head(x + self.norm(self.open(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_what_opens_after_the_first_step_is_not_warned_of(tmp_path):
    model = pemnify(
        Opening(), bank="own", selector="topk", target_modules=["open", "head"], rest="norms"
    )
    trainer = watched(model, tmp_path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoGradientWarning)
        trainer.train()


def test_where_every_mask_learns_nothing_is_said(tmp_path):
    class Plain(Gated):
        def forward(self, pixel_values, labels):
            logits = self.head(self.open(pixel_values.mean((-2, -1))))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = pemnify(
        Plain(), bank="own", selector="topk", target_modules=["open", "head"], rest="freeze"
    )
    trainer = watched(model, tmp_path, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoGradientWarning)
        trainer.train()


@pytest.mark.parametrize("kind", ["detr", "deformable_detr"])
def test_detection_heads_that_start_at_zero(kind):
    """By hand: the masks whose scores have a gradient of zero."""
    model = transformers_models.build(kind)
    masked = pemnify(model, bank="own", selector="topk").train()
    inputs = example_inputs(model)
    output = masked(**inputs)
    (output.logits.square().mean() + output.pred_boxes.square().mean()).backward()
    by_hand = [
        module.target
        for module in masked.modules()
        if isinstance(module, MaskedWeight)
        and (
            module.mask_of("default").scores.grad is None
            or not module.mask_of("default").scores.grad.any()
        )
    ]
    found = masks_without_gradient(masked)
    assert len(by_hand) > 40
    assert set(by_hand) <= set(found)
    largest = max(
        float(p.grad.abs().max())
        for n, p in masked.named_parameters()
        if n.endswith("scores") and p.grad is not None
    )
    for module in masked.modules():
        if isinstance(module, MaskedWeight) and module.target in set(found) - set(by_hand):
            assert float(module.mask_of("default").scores.grad.abs().max()) <= 1e-12 * largest
