"""transformers' Trainer, and a plain loop, on masks."""

import copy
import pickle

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from pemn_surgery import PemnCallback, for_trainer, pemnify
from pemn_surgery.errors import UnsupportedModelError
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

COUNT, BATCH = 12, 4


def timm_model(bank="rp", **options):
    torch.manual_seed(0)
    base = for_trainer(timm.create_model("test_resnet", num_classes=4))
    return pemnify(base, bank=bank, **options)


def bert_model(bank="own", **options):
    options = {"selector": "topk", **options}
    return pemnify(models.bert(), bank=bank, task_type="SEQ_CLS", **options)


def pictures():
    pixels, labels = models.images(0, COUNT, 32), models.labels(0, COUNT)
    return [{"pixel_values": p, "labels": int(y)} for p, y in zip(pixels, labels, strict=True)]


def sentences():
    ids, labels = models.tokens(0, COUNT), models.labels(0, COUNT, 3)
    return [{"input_ids": i, "labels": int(y)} for i, y in zip(ids, labels, strict=True)]


KINDS = {"timm": (timm_model, pictures), "bert": (bert_model, sentences)}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": BATCH,
        "learning_rate": 0.02, "logging_steps": 1, "save_steps": 2, "use_cpu": True, "seed": 3,
        "report_to": "none", "remove_unused_columns": False, "dataloader_pin_memory": False,
        "label_names": ["labels"], "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def make(kind, folder, model=None, callbacks=(), **changes):
    build, data = KINDS[kind]
    extra = {name: changes.pop(name) for name in ("compute_metrics",) if name in changes}
    return Trainer(
        model=model or build(), args=arguments(folder, **changes), train_dataset=data(),
        eval_dataset=data(), callbacks=[PemnCallback(), *callbacks], **extra,
    )  # fmt: skip


class Recorder(TrainerCallback):
    """Keeps every step's masks, chosen with plain torch."""

    def __init__(self):
        self.masks = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.masks.append(models.masks(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.masks.append(models.masks(model))


def density(masks):
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("timm", {}), ("bert", {}), ("bert", {"selector": "threshold"}), ("timm", {"density": 0.3})],
)
def test_logs(kind, options, every, tmp_path):
    recorder = Recorder()
    model = KINDS[kind][0](**options)
    trainer = make(kind, tmp_path, model, [recorder], logging_steps=every, save_strategy="no")
    trainer.train()
    assert len(recorder.masks) == 5
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == list(range(every, 5, every))
    for log in logs:
        now, before = recorder.masks[log["step"]], recorder.masks[log["step"] - every]
        assert log["pemn_density"] == density(now)
        assert log["pemn_flips"] == models.flips(before, now)
    assert sum(log["pemn_flips"] for log in logs) > 0
    assert not any("pemn_flips" in log for log in trainer.state.log_history if "loss" not in log)


@every_kind
def test_resumed_run_equals_an_uninterrupted_one(kind, tmp_path):
    whole = make(kind, tmp_path / "whole")
    whole.train()
    first = make(kind, tmp_path / "parts", max_steps=4)
    first.add_callback(StopAt(2))
    first.train()
    assert first.state.global_step == 2
    at_stop = copy.deepcopy(first.model.state_dict())
    second = make(kind, tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert second.state.global_step == 4
    models.assert_same_tensors(second.model.state_dict(), whole.model.state_dict())
    moved = [n for n, v in whole.model.state_dict().items() if not torch.equal(v, at_stop[n])]
    assert any("scores" in name for name in moved)
    flips = [log["pemn_flips"] for log in second.state.log_history if "pemn_flips" in log]
    expected = [log["pemn_flips"] for log in whole.state.log_history if "pemn_flips" in log]
    assert flips == expected


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@every_kind
def test_checkpoints_hold_scores_and_the_final_save_bits(kind, tmp_path):
    trainer = make(kind, tmp_path)
    trainer.train()
    names = set(models.mask_layers(trainer.model))
    held = load_file(tmp_path / "checkpoint-4" / models.WEIGHTS_FILE)
    scores = {key: value for key, value in held.items() if key.endswith(".scores")}
    assert len(scores) == len(names) > 5
    assert not any(key.endswith(".bits") for key in held)
    for key, value in scores.items():
        place = key.removesuffix(".scores") + ".default.scores"
        models.assert_equal(value, trainer.model.state_dict()[place], key)
    trainer.save_model(str(tmp_path / "final"))
    stored = load_file(tmp_path / "final" / models.WEIGHTS_FILE)
    bits = [key for key in stored if key.endswith(".bits")]
    assert len(bits) == len(names)
    assert not any(key.endswith(".scores") for key in stored)
    settings = (tmp_path / "final" / "adapter_config.json").read_text()
    assert "keep_scores" not in settings
    build, data = KINDS[kind]
    base = build().unload()
    again = PeftModel.from_pretrained(base, str(tmp_path / "final"))
    models.assert_same_tensors(models.masks(again), models.masks(trainer.model))
    item = data()[0]
    given = {name: v.unsqueeze(0) for name, v in item.items() if torch.is_tensor(v)}
    with torch.no_grad():
        first, second = (m.eval()(**given)["logits"] for m in (again, trainer.model))
    models.assert_equal(first, second)


@every_kind
def test_load_best_model_at_end(kind, tmp_path):
    worse = iter([1.0, 0.5])
    trainer = make(
        kind, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="quality", greater_is_better=True,
        compute_metrics=lambda _: {"quality": next(worse)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / models.WEIGHTS_FILE)
    last = load_file(tmp_path / "checkpoint-4" / models.WEIGHTS_FILE)
    state = trainer.model.state_dict()
    scores = [key for key in best if key.endswith(".scores")]
    assert len(scores) == len(models.mask_layers(trainer.model))
    for key in scores:
        held = state[key.removesuffix(".scores") + ".default.scores"]
        models.assert_equal(held, best[key], key)
    assert any(not torch.equal(best[key], last[key]) for key in scores)


def test_evaluation_and_prediction(tmp_path):
    trainer = make("timm", tmp_path)
    found = trainer.evaluate()
    predicted = trainer.predict(pictures())
    trainer.model.eval()
    with torch.no_grad():
        given = {"pixel_values": models.images(0, COUNT, 32), "labels": models.labels(0, COUNT)}
        expected = trainer.model(**given)
    assert found["eval_loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(predicted.predictions), expected["logits"], rtol=1e-4, atol=1e-5
    )


def test_plain_loop_equals_the_equations():
    """One SGD step on one Linear: dL/dS = dL/dW * W * sign(S), done by hand."""
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    model = pemnify(base, bank="own", selector="topk", rest="freeze")
    layer = models.mask_layers(model)["0.weight"]
    weight, scores = base[0].__dict__, layer.mask_of("default").scores
    assert "weight" not in weight
    own, start = layer.own_weight().detach(), scores.detach().clone()
    x, y = torch.randn(7, 6), torch.randn(7, 5)
    optimizer = torch.optim.SGD([scores], lr=0.5)
    (model(x) - y).square().sum().backward()
    optimizer.step()
    order = start.abs().flatten().argsort()
    mask = torch.ones(30)
    mask[order[:15]] = 0
    effective = (own * mask.view(5, 6)).requires_grad_()
    (x @ effective.T + base[0].bias.detach() - y).square().sum().backward()
    expected = start - 0.5 * effective.grad * own * start.sign()
    torch.testing.assert_close(scores.detach(), expected, rtol=1e-5, atol=1e-6)


@every_kind
def test_plain_loop_learns(kind):
    build, data = KINDS[kind]
    model = build().train()
    batch = torch.utils.data.default_collate(data())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, start = [], models.masks(model)
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert models.flips(start, models.masks(model)) > 100


def test_for_trainer_keeps_the_model():
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    keys = list(plain.state_dict())
    model = for_trainer(copy.deepcopy(plain))
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, type(plain))
    assert model.main_input_name == "pixel_values"
    assert list(model.state_dict()) == keys
    x, y = models.images(1, size=32), models.labels(1)
    with torch.no_grad():
        logits = plain(x)
        assert set(model(pixel_values=x)) == {"logits"}
        found = model(pixel_values=x, labels=y)
        models.assert_equal(found["logits"], logits)
    expected = torch.nn.functional.cross_entropy(logits, y)
    models.assert_equal(found["loss"], expected)
    assert for_trainer(model) is model
    assert type(for_trainer(model)).__mro__.count(type(plain)) == 1


def test_for_trainer_smooths_labels_as_the_trainer_does():
    x, y = models.images(1), models.labels(1)
    model = for_trainer(models.net(), label_smoothing=0.2).eval()
    found = model(pixel_values=x, labels=y)
    theirs = LabelSmoother(epsilon=0.2)({"logits": found["logits"]}, y)
    torch.testing.assert_close(found["loss"], theirs)
    again = pickle.loads(pickle.dumps(model))
    models.assert_equal(again(pixel_values=x, labels=y)["loss"], found["loss"])
    plain = for_trainer(model)(pixel_values=x, labels=y)["loss"]
    expected = torch.nn.functional.cross_entropy(found["logits"], y)
    models.assert_equal(plain, expected)


def test_label_smoothing_of_the_trainer_says_what_to_do(tmp_path):
    with pytest.raises(AttributeError, match=r"no 'config'.*label_smoothing_factor.*for_trainer\("):
        make("timm", tmp_path, label_smoothing_factor=0.1)
    assert not hasattr(timm_model(), "config")
    torch.manual_seed(0)
    base = for_trainer(timm.create_model("test_resnet", num_classes=4), label_smoothing=0.1)
    trainer = make("timm", tmp_path, model=pemnify(base, bank="rp"))
    trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < 3


def test_for_trainer_after_pemnify_is_refused():
    for given in (lambda model: model, lambda model: model.base_model.model):
        model = given(pemnify(models.net(), bank="rp"))
        kind = type(model)
        with pytest.raises(UnsupportedModelError) as error:
            for_trainer(model)
        models.says(error, "carries adapters already", "Call it first: pemnify(for_trainer(model)")
        assert type(model) is kind


def test_for_trainer_pickles_and_copies():
    model = for_trainer(models.net())
    x = models.images(1)
    expected = model.eval()(x)["logits"].detach()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        models.assert_equal(other(x)["logits"].detach(), expected)
    masked = pemnify(model, bank="rp").eval()
    expected = masked(x)["logits"].detach()
    for other in (pickle.loads(pickle.dumps(masked)), copy.deepcopy(masked)):
        models.assert_equal(other(x)["logits"].detach(), expected)
    assert type(masked.merge_and_unload()) is type(for_trainer(models.net()))
