"""No write escapes a kept weight: a model that keeps them says what one that keeps none says."""

import copy
import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import inspect
from pemn_surgery.errors import AlreadyPemnifiedError, MaskedWeightError
from pemn_surgery.masks import kept
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


def turning(scores):
    """Factors that make the smaller half of scores the larger one, as numpy sees them."""
    size = scores.detach().abs()
    return torch.where(size < size.median(), 50.0, 0.02).numpy()


def turn(scores):
    scores *= torch.from_numpy(turning(scores))


UNNOTICED_SCORES = {
    "all": lambda s: turn(s.data),
    "an output": lambda s: turn(s.data[1]),
    "an input": lambda s: turn(s.data[:, -1]),
    "numpy": lambda s: s.detach().numpy().__imul__(turning(s)),
    "other memory": lambda s: setattr(s, "data", s.data.flip(0)),
}


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
    model = pemnify(models.net(), bank="own", selector="topk").eval()
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
    model = models.train(pemnify(models.net(), bank="own", selector="topk"))
    for layer in models.mask_layers(model).values():
        layer.own_weight().requires_grad_(True)
    before = model(X).detach()
    for layer in models.mask_layers(model).values():
        layer.own_weight().data.mul_(1.5)
    assert_as_if_nothing_were_kept(model)
    models.assert_differs(model(X).detach(), before)


def test_what_was_kept_in_eval_mode_ends_with_it():
    model = pemnify(models.net(), bank="own", selector="topk", inference_mode=True)
    before = models.logits(model)
    model.train()
    for layer in models.mask_layers(model).values():
        layer.own_weight().data.mul_(1.5)
    model.eval()
    with torch.no_grad():
        assert_as_if_nothing_were_kept(model)
    models.assert_differs(models.logits(model), before)


# ---- scores of a model in eval mode, while nobody asks for gradients -----------------------------


class ThroughData(torch.optim.Optimizer):
    """Writes one number of each parameter, where no version counts it and no sample looks."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                places = set(range(parameter.numel()))
                taken = range(0, parameter.numel(), kept.spaced(parameter).stride(0))
                place = next(iter(places - set(taken)), None)
                if place is not None:
                    parameter.data.view(-1)[place] *= -7.0


def trained_scores(model):
    return [layer.mask_of("default").scores for layer in models.mask_layers(model).values()]


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_an_evaluation_in_the_middle_of_training_makes_weights_once(monkeypatch, bank, mode):
    model = models.train(pemnify(models.net(), bank=bank))
    counted = Counted(monkeypatch)
    for _ in range(2):
        model.eval()
        with MODES[mode]():
            assert counted.during(lambda: model(X)) == 4
            assert counted.during(lambda: model(X)) == 0
            assert_as_if_nothing_were_kept(model)
        models.train(model, 1, steps=1)
    with torch.enable_grad():
        model.eval()
        assert counted.during(lambda: model(X)) == 4
        assert counted.during(lambda: model(X)) == 4


def test_a_teacher_in_eval_mode_keeps_what_frozen_scores_make(monkeypatch):
    teacher = pemnify(models.net(), bank="own", selector="topk").eval().requires_grad_(False)
    counted = Counted(monkeypatch)
    assert counted.during(lambda: teacher(X)) == 4
    assert counted.during(lambda: teacher(X)) == 0
    trained_scores(teacher)[0].requires_grad_(True)
    assert counted.during(lambda: teacher(X)) == 1
    assert teacher(X).requires_grad


@pytest.mark.parametrize("optimizer", [ThroughData, lambda p: torch.optim.SGD(p, 0.1)])
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_a_step_in_eval_mode_ends_what_was_kept(monkeypatch, bank, optimizer):
    model = pemnify(models.net(), bank=bank).eval()
    stepper = optimizer([p for p in model.parameters() if p.requires_grad])
    counted = Counted(monkeypatch)
    with torch.no_grad():
        model(X)
    model(X).square().sum().backward()
    stepper.step()
    with torch.no_grad():
        assert counted.during(lambda: assert_as_if_nothing_were_kept(model)) == 8
        assert counted.during(lambda: model(X)) == 0


def test_a_step_keeps_what_bits_made(monkeypatch):
    """A frozen teacher does not pay for its student's steps."""
    teacher, student = serving("own"), pemnify(models.net(), bank="own", selector="topk")
    counted = Counted(monkeypatch)
    with torch.no_grad():
        teacher(X)
    models.train(student, steps=1)
    with torch.no_grad():
        assert counted.during(lambda: teacher(X)) == 0


@pytest.mark.parametrize("write", list(UNNOTICED_SCORES))
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_scores_written_without_a_trace(bank, write):
    model, said = pemnify(models.net(), bank=bank, selector="topk").eval(), []
    with torch.no_grad():
        for place in range(4):
            said.append(model(X).clone())
            UNNOTICED_SCORES[write](trained_scores(model)[place])
            assert_as_if_nothing_were_kept(model)
    for one, two in itertools.pairwise(said):
        models.assert_differs(one, two)


# ---- frozen numbers under bits, of a model in eval mode ------------------------------------------


def serving(bank):
    return pemnify(models.net(), bank=bank, inference_mode=True).eval()


def frozen(model):
    """What lies under the masks: own weights, or the bank."""
    layers = list(models.mask_layers(model).values())
    own = [layer.own_weight() for layer in layers if layer.bank is None]
    return own or [layers[0].bank.values]


def halve(numbers):
    numbers *= 0.5


UNNOTICED = {
    "all": lambda w: halve(w.data),
    "an output": lambda w: halve(w.data[1]) if w.dim() > 1 else halve(w.data[: len(w) // 2]),
    "an input": lambda w: halve(w.data[:, -1]) if w.dim() > 1 else halve(w.data[-len(w) // 2 :]),
    "numpy": lambda w: halve(w.detach().numpy()),
    "dlpack": lambda w: halve(torch.from_dlpack(w.detach())),
    "other memory": lambda w: setattr(w, "data", w.data * 0.5),
    "swap_tensors": lambda w: torch.utils.swap_tensors(w, type(w)(w.detach() * 0.5)),
}


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("write", list(UNNOTICED))
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_frozen_numbers_written_without_a_trace(bank, write, mode, door):
    if (bank, write) == ("mp", "swap_tensors"):
        return  # a buffer that operations alias cannot be exchanged
    model, run = serving(bank), DOORS[door]
    said = []
    for place in range(3):
        with MODES[mode]():
            said.append(run(model)(X).detach().clone())
            numbers = frozen(model)
            UNNOTICED[write](numbers[place % len(numbers)])
            assert_as_if_nothing_were_kept(model, lambda model: run(model)(X))
    models.assert_differs(said[0], said[1])
    models.assert_differs(said[1], said[2])


@pytest.mark.parametrize("bank", ["mp", "own"])
def test_bits_written_without_a_trace(bank):
    """``for mine, other in zip(teacher.buffers(), student.buffers()): mine.data.copy_(other)``."""
    model = serving(bank)
    with torch.no_grad():
        before = model(X).clone()
        for layer in models.mask_layers(model).values():
            mask = layer.mask_of("default")
            mask.bits.data.copy_(bits.pack(~mask.mask(), inspect(mask.bits, "").base))
        models.assert_differs(assert_as_if_nothing_were_kept(model), before)


def edit_one_number(model):
    """What no sample need find; the last number of each tensor is in none of these."""
    for numbers in frozen(model):
        sample, flat = kept.spaced(numbers), numbers.data.view(-1)
        assert sample.data_ptr() == numbers.data_ptr()
        taken = range(0, numbers.numel(), sample.stride(0))
        chosen = [place for place in range(numbers.numel()) if place not in taken][:40]
        flat[chosen] += 3.0


def save_again(model, folder):
    model.save_pretrained(folder)
    return model


def merge_and_back(model, folder):
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def keep_again(model, folder):
    keep_weights(model, True)
    return model


BEGIN_ANEW = {
    "train() and eval()": lambda model, folder: model.train().eval(),
    "save": save_again,
    "merge": merge_and_back,
    "copy": lambda model, folder: copy.deepcopy(model),
    "cast": lambda model, folder: model.double().float(),
    "keep_weights": keep_again,
}


@pytest.mark.parametrize("act", list(BEGIN_ANEW))
@pytest.mark.parametrize("bank", ["mp", "own"])
def test_a_few_numbers_written_are_seen_when_keeping_begins_anew(bank, act, tmp_path):
    model = serving(bank)
    with torch.no_grad():
        before = model(X).clone()
        edit_one_number(model)
        oracles.assert_same(model(X), before)  # as docs/mechanism.md says
        model = BEGIN_ANEW[act](model, tmp_path)
        models.assert_differs(assert_as_if_nothing_were_kept(model), before)


@given(
    shape=st.lists(st.integers(1, 12), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]),
    order=st.randoms(use_true_random=False),
)
def test_a_sample_has_some_of_every_row_and_column(shape, dtype, order):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    dense = torch.arange(max(torch.Size(shape).numel(), 1)).view(shape).permute(axes)
    places = {int(place) for place in kept.spaced(dense)}
    splits = [torch.Size(shape[:axis]).numel() for axis in range(1, len(shape))]
    rows = max(splits, key=lambda rows: min(rows, dense.numel() // rows), default=1)
    columns = dense.numel() // rows
    if min(rows, columns) > 1:
        assert {place // columns for place in places} == set(range(rows))
        assert {place % columns for place in places} == set(range(columns))
        if min(rows, columns) > 30:  # fewer may have no common prime with the columns but 1
            assert len(places) <= 2 * max(rows, columns)
    numbers = torch.zeros(dense.shape, dtype=dtype)
    assert kept.spaced(numbers).data_ptr() == numbers.data_ptr()


@given(count=st.integers(0, 3000))
def test_a_sample_has_some_of_every_stretch_of_a_vector(count):
    places = kept.spaced(torch.arange(count)).tolist()
    gaps = [b - a for a, b in zip(places, [*places[1:], count], strict=False)]
    assert all(gap**2 <= count for gap in gaps)
    assert len(places) < 3 * max(count, 1) ** 0.5 + 3


def test_few_numbers_of_large_tensors_are_looked_at():
    for shape in ((8, 96, 160), (1, 96, 160), (64, 32, 3, 3), (96, 1, 7, 7), (5000,), (5000, 1)):
        assert kept.spaced(torch.empty(shape)).numel() < 2 * torch.Size(shape).numel() ** 0.5 + 700


def test_a_tensor_with_gaps_is_its_own_sample():
    numbers = torch.zeros(6, 8)[:, ::2]
    assert kept.spaced(numbers) is numbers


def test_not_a_number_is_what_it_was(monkeypatch):
    model = serving("own")
    frozen(model)[0].data.view(-1)[0] = float("nan")
    counted = Counted(monkeypatch)
    with torch.no_grad():
        assert counted.during(lambda: model(X)) == 4
        assert counted.during(lambda: model(X)) == 0


@pytest.mark.parametrize("bank", ["mp", "own"])
def test_a_forward_compares_once(bank, monkeypatch):
    """Where answers are waited for; on a CPU every sample is compared by itself."""
    model, compared = serving(bank), []
    equal = torch.equal
    monkeypatch.setattr(kept, "_is_waited_for", lambda tensor: True)
    monkeypatch.setattr(torch, "equal", lambda *two: compared.append(1) or equal(*two))
    with torch.no_grad():
        model(X)
        compared.clear()
        model(X)
        kinds = {tensor.element_size() for tensor in (*frozen(model), torch.empty(0).byte())}
        assert len(compared) == len(kinds)
        halve(frozen(model)[0].data)
        assert_as_if_nothing_were_kept(model)


def test_only_what_was_written_is_made_again(monkeypatch):
    model = serving("own")
    counted = Counted(monkeypatch)
    with torch.no_grad():
        model(X)
        halve(frozen(model)[2].data)
        assert counted.during(lambda: model(X)) == 1
        assert counted.during(lambda: model(X)) == 0
        halve(frozen(model)[0].data)
        assert counted.during(lambda: model.get_base_model().conv2.weight) == 0
        assert counted.during(lambda: model.get_base_model().conv1.weight) == 1


def test_a_kept_weight_holds_nothing_of_another_layer():
    """What was served together is looked at together, and freed one by one."""
    model = serving("own")
    with torch.no_grad():
        model(X)
    held = weakref.ref(models.mask_layers(model)["conv2.weight"]._kept)
    owner = model.get_base_model().conv2
    owner.masked_weight._kept = kept.Lasting()
    assert held() is None
    with torch.no_grad():
        assert_as_if_nothing_were_kept(model)


# ---- what is read cannot be written to -----------------------------------------------------------

WRITES = {
    "data.mul_": lambda w: w.data.mul_(0.5),
    "data +=": lambda w: w.data.__iadd__(1.0),
    "data =": lambda w: setattr(w, "data", torch.zeros_like(w)),
    "data[0] =": lambda w: w.data.__setitem__(0, 1.0),
    "mul_": lambda w: w.mul_(0.5),
    "init": nn.init.normal_,
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
    "swap_tensors": lambda w: torch.utils.swap_tensors(w, torch.zeros(w.shape)),
    "swap_tensors, the other": lambda w: torch.utils.swap_tensors(torch.zeros(w.shape), w),
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
    model = pemnify(models.net(), bank="own", selector="topk")
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
    model = DOORS[door](pemnify(Twelve(), bank="own", selector="topk"))
    counted = Counted(monkeypatch)
    x = torch.ones(2, 8)
    with MODES[mode]():
        assert counted.during(lambda: model(x)) == 1
        assert counted.during(lambda: model(x)) == 1


def accumulated(model, optimizer, *, until_step):
    """Gradients of three micro-batches, and of two more after a step; the weights made in each."""
    keep_weights(model, True, until_step=until_step)
    with pytest.MonkeyPatch.context() as patch:
        counted, made, grads = Counted(patch), [], []

        def micro_batches(first, last):
            for number in range(first, last):
                model.train()  # as Trainer does before each
                model(models.images(number)).square().sum().backward()

        for first, last in ((0, 3), (3, 5)):
            made.append(counted.during(lambda first=first, last=last: micro_batches(first, last)))
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
    return made, grads


@pytest.mark.parametrize("bank", ["mp", "own"])
def test_micro_batches_of_a_step_share_a_weight(bank):
    found = {}
    for until_step in (False, True):
        model = pemnify(models.net(), bank=bank)
        trained = [p for p in model.parameters() if p.requires_grad]
        found[until_step] = accumulated(model, torch.optim.SGD(trained, 0.1), until_step=until_step)
    (often, expected), (once, grads) = found[False], found[True]
    assert (often, once) == ([12, 8], [4, 4])
    assert len(grads) >= 8
    for one, other in zip(grads, expected, strict=True):
        oracles.assert_same(one, other)


@pytest.mark.parametrize("write", list(UNNOTICED_SCORES))
def test_scores_written_between_micro_batches(write):
    model = pemnify(models.net(), bank="mp").train()
    keep_weights(model, True, until_step=True)
    before = model(X).detach().clone()
    for layer in models.mask_layers(model).values():
        UNNOTICED_SCORES[write](layer.mask_of("default").scores)
    after = assert_as_if_nothing_were_kept(model)
    models.assert_differs(before, after)


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
    for outer in (model, model.get_base_model()):
        with pytest.raises(
            AlreadyPemnifiedError, match=f"^{method} adapters.*4 masked weights"
        ) as e:
            get_peft_model(outer, config(target_modules=["head"], **options), adapter_name="b")
        models.says(e, "conv1.weight", "merge_and_unload()")
        snapshot.assert_unchanged()
    merged = get_peft_model(model.merge_and_unload(), LoraConfig(target_modules=["head"], r=2))
    models.assert_equal(models.logits(merged), snapshot.logits)


def test_transformers_add_no_other_method_to_masks():
    model = models.bert()
    model.add_adapter(PemnConfig(bank="own", selector="topk"))
    keys = set(model.state_dict())
    with pytest.raises(AlreadyPemnifiedError, match="LORA adapters cannot lie on masks"):
        model.add_adapter(LoraConfig(target_modules=["query"], r=2), adapter_name="lora")
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]
