"""No write escapes a kept weight: a model that keeps them says what one that keeps none says."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from pemn_surgery import PemnConfig, bits, pemnify
from pemn_surgery.errors import AlreadyPemnifiedError, MaskedWeightError
from pemn_surgery.masks.masked_weight import MaskedWeight, keep_weights
from tests import oracles
from tests.adapters import models

X = models.images(7)
MODES = {
    "gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
DOORS = {
    "peft": lambda model: model,
    "inner": lambda model: model.get_base_model(),
    "methods": lambda model: model.get_base_model().forward,
}


def keeping_none(model):
    twin = copy.deepcopy(model)
    keep_weights(twin, False)
    return twin


def assert_as_if_nothing_were_kept(model, run=lambda model: model(X)):
    expected = run(keeping_none(model)).detach().clone()
    oracles.assert_same(run(model).detach().clone(), expected)
    return expected


def move_through_data(parameters, others, share=0.5):
    for mine, other in zip(parameters, others, strict=True):
        mine.data.mul_(share).add_((1 - share) * other.data)


# ---- what is written without a trace -------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_an_averaged_teacher_follows_its_student(bank, mode, training):
    """DINO, MoCo, Mean Teacher: the teacher's tensors are only ever written through ``.data``."""
    student = pemnify(models.net(), bank=bank)
    teacher = copy.deepcopy(student).requires_grad_(False).train(training)
    said = []
    for task in range(3):
        with MODES[mode]():
            said.append(teacher(X).clone())
        models.train(student, task, steps=2)
        move_through_data(teacher.parameters(), student.parameters())
        with MODES[mode]():
            assert_as_if_nothing_were_kept(teacher)
    models.assert_differs(said[0], said[1])
    models.assert_differs(said[1], said[2])


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize("mode", list(MODES))
def test_scores_written_between_two_forwards(door, mode):
    """Evolution strategies, hand averaging, SAM: no backward pass in between."""
    model = pemnify(models.net(), bank="own").eval()
    run = DOORS[door]
    said = []
    for seed in range(3):
        with MODES[mode]():
            said.append(run(model)(X).detach().clone())
            for parameter in model.parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(seed)
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator))
            assert_as_if_nothing_were_kept(model, lambda model: run(model)(X))
    models.assert_differs(said[0], said[1])
    models.assert_differs(said[1], said[2])


def test_the_base_written_while_it_trains():
    """Joint training, and a teacher of it that holds bits."""
    model = models.train(pemnify(models.net(), bank="own"))
    for layer in models.mask_layers(model).values():
        layer.own_weight().requires_grad_(True)
    before = model(X).detach()
    for layer in models.mask_layers(model).values():
        layer.own_weight().data.mul_(1.5)
    assert_as_if_nothing_were_kept(model)
    models.assert_differs(model(X).detach(), before)


def test_what_was_kept_in_eval_mode_ends_with_it():
    model = pemnify(models.net(), bank="own", inference_mode=True)
    before = models.logits(model)
    model.train()
    for layer in models.mask_layers(model).values():
        layer.own_weight().data.mul_(1.5)
    model.eval()
    with torch.no_grad():
        assert_as_if_nothing_were_kept(model)
    models.assert_differs(models.logits(model), before)


# ---- what is read cannot be written to -----------------------------------------------------------

WRITES = {
    "data.mul_": lambda w: w.data.mul_(0.5),
    "data +=": lambda w: w.data.__iadd__(1.0),
    "data =": lambda w: setattr(w, "data", torch.zeros_like(w)),
    "data[0] =": lambda w: w.data.__setitem__(0, 1.0),
    "mul_": lambda w: w.mul_(0.5),
    "init": nn.init.normal_,
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
}


@pytest.mark.parametrize("held", ["scores", "bits"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_a_masked_weight_is_read_only(bank, write, mode, held):
    model = pemnify(models.net(), bank=bank, inference_mode=held == "bits").eval()
    conv = model.get_base_model().conv2
    with MODES[mode]():
        before = model(X).detach().clone()
        with pytest.raises(MaskedWeightError, match=r"'conv2\.weight' is computed.*would not last"):
            WRITES[write](conv.weight)
        oracles.assert_same(model(X).detach(), before)


def test_a_write_that_leaves_a_trace_is_undone():
    """Through a view, which is a plain tensor."""
    model = pemnify(models.net(), bank="mp", inference_mode=True).eval()
    with torch.no_grad():
        before = model(X).clone()
        model.get_base_model().conv2.weight.view(-1).mul_(3.0)
        oracles.assert_same(model(X), before)


def test_a_masked_weight_reads_like_any_tensor(tmp_path):
    model = pemnify(models.net(), bank="own")
    weight = model.get_base_model().conv2.weight
    for made in (weight * 1, weight.detach(), weight.view(-1), copy.deepcopy(weight.detach())):
        assert type(made) is torch.Tensor
    torch.save(weight, tmp_path / "weight.pt")
    copies = (torch.load(tmp_path / "weight.pt"), copy.deepcopy(weight), weight.data.clone())
    for made in copies:
        oracles.assert_same(made, weight.detach())
        made.mul_(2.0)
    oracles.assert_same(weight.data, weight.detach())
    assert weight.requires_grad
    assert not weight.data.requires_grad


# ---- when a weight is made ----------------------------------------------------------------------


class Counted:
    """Counts how often masks are applied."""

    def __init__(self, monkeypatch):
        self.count = 0
        make = MaskedWeight._make

        def counting(layer, state):
            self.count += 1
            return make(layer, state)

        monkeypatch.setattr(MaskedWeight, "_make", counting)

    def during(self, act):
        before = self.count
        act()
        return self.count - before


class Twelve(nn.Module):
    """One layer that runs twelve times, and whose type is asked before (ALBERT, T5)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(12):
            x = torch.tanh(self.layer(x.to(self.layer.weight.dtype)))
        return x


@pytest.mark.parametrize("door", ["peft", "inner"])
@pytest.mark.parametrize("mode", list(MODES))
def test_one_forward_makes_a_weight_once(monkeypatch, mode, door):
    model = DOORS[door](pemnify(Twelve(), bank="own"))
    counted = Counted(monkeypatch)
    x = torch.ones(2, 8)
    with MODES[mode]():
        assert counted.during(lambda: model(x)) == 1
        assert counted.during(lambda: model(x)) == 1


@pytest.mark.parametrize("bank", ["mp", "own"])
def test_a_loaded_task_makes_its_weights_once(monkeypatch, bank, tmp_path):
    models.train(pemnify(models.net(), bank=bank)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(models.net(), tmp_path).eval()
    counted = Counted(monkeypatch)
    with torch.no_grad():
        assert counted.during(lambda: model(X)) == 4
        assert counted.during(lambda: model(X)) == 0
        assert counted.during(lambda: model.get_base_model().conv1.weight) == 0
        layer = models.mask_layers(model)["conv2.weight"]
        layer.mask_of("default").bits.copy_(bits.pack(torch.ones(8, 8, 3, 3, dtype=torch.bool)))
        assert counted.during(lambda: model(X)) == 1
    assert_as_if_nothing_were_kept(model)


# ---- other methods on top of masks ---------------------------------------------------------------


@pytest.mark.parametrize("bank", ["mp", "own"])
@pytest.mark.parametrize(
    "config", [LoraConfig, LoHaConfig, IA3Config], ids=lambda kind: kind.__name__
)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
def test_no_other_method_lies_on_masks(config, bank):
    options = {"feedforward_modules": []} if config is IA3Config else {}
    model = models.train(pemnify(models.net(), bank=bank))
    snapshot = models.Snapshot(model)
    method = config.__name__.removesuffix("Config").upper()
    for given in (model, model.get_base_model()):
        with pytest.raises(
            AlreadyPemnifiedError, match=f"^{method} adapters.*4 masked weights"
        ) as e:
            get_peft_model(given, config(target_modules=["head"], **options), adapter_name="b")
        models.says(e, "conv1.weight", "merge_and_unload()")
        snapshot.assert_unchanged()
    merged = get_peft_model(model.merge_and_unload(), LoraConfig(target_modules=["head"], r=2))
    models.assert_equal(models.logits(merged), snapshot.logits)


def test_transformers_add_no_other_method_to_masks():
    model = models.bert()
    model.add_adapter(PemnConfig(bank="own"))
    keys = set(model.state_dict())
    with pytest.raises(AlreadyPemnifiedError, match="LORA adapters cannot lie on masks"):
        model.add_adapter(LoraConfig(target_modules=["query"], r=2), adapter_name="lora")
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]
