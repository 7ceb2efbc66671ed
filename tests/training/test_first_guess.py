"""A first guess works, or says what to change: defaults, presets, rates, and what goes wrong."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer
from transformers.optimization import get_cosine_schedule_with_warmup

from pemn_surgery import PemnCallback, PemnConfig, for_trainer, param_groups, pemnify, plan
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.presets import PRESETS
from pemn_surgery.errors import AdapterError, ConfigError, PretrainedWarning, TrainingWarning
from pemn_surgery.training.gradients import trained_masks
from pemn_surgery.training.movement import MovementWatch
from pemn_surgery.training.rates import advice_on_rates, margin_of
from tests.adapters import models
from tests.training.test_trainer import arguments, sentences

pytestmark = models.ignore_peft_on_transformers

OWN = {"bank": "own", "selector": "threshold", "task_type": "SEQ_CLS"}


def bert(**options):
    return pemnify(models.bert(), **{**OWN, **options})


def trainer(model, folder, **changes):
    return Trainer(
        model=model, args=arguments(folder, save_strategy="no", **changes),
        train_dataset=sentences(), callbacks=[PemnCallback()],
    )  # fmt: skip


def said_by(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, TrainingWarning)]


# ---- which selector ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "selector", "density"),
    [
        ({}, "topk", 0.5),
        ({"bank": "rp"}, "topk", 0.5),
        ({"bank": "mp", "bank_init": "model"}, "topk", 0.5),
        ({"bank": "own", "bank_init": "signed_constant"}, "topk", 0.5),
        ({"bank": "own"}, "threshold", 0.5),
        ({"bank": "own", "form": "flip", "support": 0.1}, "threshold", 0.5),
        ({"bank": "own", "density": 0.5}, "topk", 0.5),
        ({"bank": "own", "density": 0.3}, "topk", 0.3),
        ({"bank": "own", "density": "erk"}, "topk", "erk"),
        ({"bank": "own", "density_pattern": {"fc": 0.1}}, "topk", 0.5),
        ({"bank": "own", "support": 0.3, "support_others": "drawn"}, "topk", 0.5),
        ({"selector": "threshold"}, "threshold", 0.5),
    ],
)
def test_the_selector_follows_from_what_the_masks_lie_on(options, selector, density):
    config = PemnConfig(**options)
    assert (config.selector, config.density) == (selector, density)


def test_masks_on_a_models_own_weights_begin_at_the_model():
    models.assert_equal(
        models.logits(pemnify(models.net(), bank="own")), models.logits(models.net())
    )


def test_a_threshold_beside_a_density_says_which_to_leave_out():
    with pytest.raises(ConfigError, match=r"threshold=0\.1.*not selector=\"topk\""):
        PemnConfig(bank="own", density=0.3, threshold=0.1)


# ---- what a model has learned --------------------------------------------------------------------


def of_a_checkpoint(folder):
    models.bert(seed=7).save_pretrained(str(folder))
    return BertForSequenceClassification.from_pretrained(str(folder))


LOSING = {
    "drawn numbers": ({}, ('bank="mp" replaces 14 weights', "begins anew")),
    "topk": ({"bank": "own", "density": 0.5}, ('selector="topk" drops a share', "0.5")),
}


@pytest.mark.parametrize("case", LOSING)
def test_a_trained_model_that_would_begin_anew_is_named(case, tmp_path):
    options, said = LOSING[case]
    model = of_a_checkpoint(tmp_path)
    text = str(plan(model, **options))
    with pytest.warns(PretrainedWarning) as caught:
        pemnify(model, **options)
    (found,) = [one for one in caught if one.category is PretrainedWarning]
    for part in (*said, 'pemnify(model, bank="own")'):
        assert part in str(found.message)
        assert part in text.replace("\n", " ")


@pytest.mark.parametrize(
    "options",
    [
        {"bank": "own"},
        {"bank": "own", "form": "flip", "density": 0.9},
        {"bank": "own", "density": 1.0},
    ],
)
def test_nothing_is_said_where_nothing_is_lost(options, tmp_path):
    model = of_a_checkpoint(tmp_path)
    assert plan(model, **options).lost == ""
    pemnify(model, **options)


def test_norms_tell_a_trained_model_of_any_library():
    model = models.net()
    assert plan(model).lost == ""
    with torch.no_grad():
        model.bn2.weight[3] += 0.25
    with pytest.warns(PretrainedWarning, match="replaces 4 weights"):
        pemnify(model)


# ---- groups for an optimizer ---------------------------------------------------------------------


def test_every_trained_parameter_is_in_one_group():
    model = bert(scale="row", rest="norms")
    groups = {g["name"]: g for g in param_groups(model, 3e-3, scales=2e-3, norms=1e-4, head=5e-4)}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == {"scores": 3e-3, "scales": 2e-3, "norms": 1e-4, "head": 5e-4}
    held = [id(one) for group in groups.values() for one in group["params"]]
    trained = [id(one) for one in model.parameters() if one.requires_grad]
    assert trained
    assert sorted(held) == sorted(trained)
    masks = [m.mask_of("default") for m in model.modules() if isinstance(m, PemnLayer)]
    assert {id(one) for one in groups["scores"]["params"]} == {id(m.scores) for m in masks}
    assert {id(one) for one in groups["scales"]["params"]} == {id(m.row_scale) for m in masks}
    heads = dict(model.base_model.model.classifier.modules_to_save["default"].named_parameters())
    assert {id(one) for one in groups["head"]["params"]} == {id(one) for one in heads.values()}
    names = dict(model.named_parameters())
    norms = [
        name for name, one in names.items() if any(one is n for n in groups["norms"]["params"])
    ]
    assert norms
    assert all("LayerNorm" in name for name in norms)


def test_only_heads_decay_and_empty_groups_are_left_out():
    groups = param_groups(bert(), 1e-3, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("scores", 1e-3, 0.0), ("head", 1e-3, 0.1),
    ]  # fmt: skip


def test_a_model_without_trained_scores_has_no_groups():
    model = bert(inference_mode=True)
    with pytest.raises(AdapterError, match="No scores or scales of this PeftModel"):
        param_groups(model, 1e-3)


# ---- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_with_its_own_settings(name, tmp_path):
    task = {"task_type": "SEQ_CLS"}
    model = pemnify(models.bert(), PemnConfig.preset(name, **task))
    training = PemnConfig.training(name)
    optimizer = training.optimizer(model)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["scores"]["lr"] == training.lr
    assert by_name["head"]["lr"] == training.head
    decays = training.weight_decay if training.decays_scores else 0.0
    assert by_name["scores"]["weight_decay"] == decays
    changes = {**training.arguments(), "num_train_epochs": 2, "max_steps": -1}
    driver = Trainer(
        model=model, args=arguments(tmp_path, **changes, save_strategy="no"),
        train_dataset=sentences(), optimizers=(optimizer, None),
    )  # fmt: skip
    driver.train()
    assert driver.args.max_grad_norm == 0
    losses = [log["loss"] for log in driver.state.log_history if "loss" in log]
    assert losses
    assert max(losses) < 3


def test_there_is_no_training_of_no_preset():
    with pytest.raises(ConfigError, match="There is no preset 'lora'"):
        PemnConfig.training("lora")


def test_the_guesses_begin_at_the_model_and_move():
    for name, build in (("text", models.bert), ("image", models.net)):
        model = pemnify(build(), PemnConfig.preset(name))
        inner = next(m for m in model.modules() if isinstance(m, PemnLayer))
        models.assert_equal(inner.owner.weight.detach(), inner.fill().detach())
        training = PemnConfig.training(name)
        assert training.lr > margin_of(mask for mask, _ in trained_masks(model)) / 10


# ---- rates that cannot work ----------------------------------------------------------------------


def advice(model, optimizer, steps=100, scheduler=None, clip=0.0):
    return advice_on_rates(model, optimizer, scheduler, steps, clip)


def adam(model, rate):
    return torch.optim.AdamW(param_groups(model, rate))


def test_rates_that_cannot_reach_the_threshold_are_named():
    model = bert(score_init=0.02)
    (said,) = advice(model, adam(model, 1e-4))
    for part in ("begin 0.02 from", "100 steps add up to 0.01", "Take a rate of 0.002"):
        assert part in said
    assert advice(model, adam(model, 2.1e-4)) == []
    assert advice(model, adam(model, 1e-4), steps=210) == []
    assert advice(bert(selector="topk"), adam(bert(selector="topk"), 1e-6)) == []
    assert advice(model, None) == []
    assert advice(models.bert(), torch.optim.Adam(models.bert().parameters())) == []


def test_a_schedule_counts_with_its_sum():
    model = bert(score_init=0.01)
    optimizer = adam(model, 1.5e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    assert advice(model, optimizer) == []  # .015 without the schedule
    (said,) = advice(model, optimizer, scheduler=schedule)
    wanted = sum(1.5e-4 * schedule.lr_lambdas[0](step) for step in range(100))
    assert wanted < 0.01
    assert f"add up to {wanted:.2g}" in said


def test_clipping_and_heads_beside_a_papers_rate_are_named():
    model = bert()
    trained = [one for one in model.parameters() if one.requires_grad]
    said = advice(model, torch.optim.SGD(trained, lr=50.0), clip=1.0)
    assert len(said) == 2
    assert "clipped to a norm of 1" in said[0]
    assert "max_grad_norm=0" in said[0]
    assert "2 tensors that are no scores" in said[1]
    assert "rate of 50" in said[1]
    assert advice(model, torch.optim.SGD(param_groups(model, 50.0)), clip=0.0) == []


def test_the_trainer_says_so_before_the_first_step(tmp_path):
    driver = trainer(bert(score_init=1.0), tmp_path, learning_rate=5e-5)
    said = said_by(driver.train)
    assert len(said) == 2
    assert "Hardly a mask bit can change" in said[0]
    assert "Not one of" in said[1]
    assert "in 4 steps" in said[1]
    assert said_by(trainer(bert(), tmp_path, learning_rate=0.02).train) == []


# ---- masks that go wrong -------------------------------------------------------------------------


def set_scores(model, value, only=None):
    with torch.no_grad():
        for name, layer in models.mask_layers(model).items():
            if only is None or name == only:
                layer.mask_of("default").scores.fill_(value)


def test_masks_that_stand_still_are_named_once():
    model = bert()
    watch = MovementWatch(model, step=50)
    assert watch.look(model, 249) == []  # 199 steps may be a warm-up
    (said,) = watch.look(model, 250)
    weights = sum(mask.numel() for mask in models.masks(model).values())
    assert f"Not one of {weights:,} mask bits has changed in 200 steps" in said
    assert watch.look(model, 350) == []


def test_masks_that_moved_once_may_stand_still():
    model = bert()
    watch = MovementWatch(model)
    first = next(iter(models.mask_layers(model).values())).mask_of("default").scores
    with torch.no_grad():
        first[0, 0] = -1
    assert watch.look(model, 200) == []
    with torch.no_grad():
        first[0, 0] = 1
    assert watch.look(model, 300, is_last=True) == []


def test_a_mask_without_ones_is_named():
    model = bert()
    watch = MovementWatch(model)
    name = list(models.mask_layers(model))[3]
    set_scores(model, -1.0, only=name)
    (said,) = watch.look(model, 100)
    assert "1 of 13 masks drop every weight" in said
    assert name in said
    assert watch.look(model, 200) == []


def test_a_model_of_which_little_is_left_is_named():
    for form, share, what in (("product", 0.8, "are dropped"), ("flip", 0.5, "have another sign")):
        model = bert(form=form)
        watch = MovementWatch(model)
        for least in (share - 0.2, share):
            with torch.no_grad():
                for layer in models.mask_layers(model).values():
                    scores = layer.mask_of("default").scores.view(-1)
                    scores[: int(least * len(scores))] = -1
            said = watch.look(model, 100)
            assert len(said) == (least == share)
        assert what in said[0]
        assert f"{share:.0%} of the weights" in said[0]


def test_signs_that_are_added_are_neither_dropped_nor_flipped():
    model = bert(form="sign_delta")
    watch = MovementWatch(model)
    set_scores(model, -1.0)
    assert watch.look(model, 100) == []


def test_saving_what_nothing_changed_is_named(tmp_path):
    model = bert()
    with pytest.warns(TrainingWarning, match="All 13 masks keep every weight"):
        model.save_pretrained(str(tmp_path))
    for changed in (copy.deepcopy(model), bert(selector="topk", density=1.0)):
        first = next(iter(models.mask_layers(changed).values())).mask_of("default").scores
        with torch.no_grad():
            first[0, 0] = -1
        assert said_by(lambda model=changed: model.save_pretrained(str(tmp_path))) == []


# ---- the guess itself ----------------------------------------------------------------------------


def test_a_vision_model_learns_with_the_guess():
    """Eight images of four classes, learned by masks on random, norm-free features."""
    torch.manual_seed(0)
    model = pemnify(
        for_trainer(timm.create_model("test_vit", num_classes=4)), PemnConfig.preset("image")
    )
    optimizer = PemnConfig.training("image").optimizer(model)
    size = model.base_model.model.default_cfg["input_size"][-1]
    x, y = models.images(0, 8, size), models.labels(0, 8)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x)["logits"], y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert (
        models.flips(
            {name: torch.ones_like(mask) for name, mask in models.masks(model).items()},
            models.masks(model),
        )
        > 0
    )
