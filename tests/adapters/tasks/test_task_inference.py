"""The inferred task, against an obvious dense mixture with autograd; the model stays as it was."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.func import functional_call

from pemn_surgery import PemnConfig, TaskGuess, from_finetuned, infer_task, keep_weights, pemnify
from pemn_surgery.errors import ConfigError, TaskInferenceError
from pemn_surgery.masks.mixture import Mixture
from tests.adapters import models
from tests.adapters.mixtures import (
    MP,
    NAMES,
    PREPARE,
    Breaks,
    Counts,
    assert_close,
    in_training,
    mixed_state,
    same,
    state_of,
    tasks,
)

CASES = {
    **models.BANKS,
    "own_scaled": {
        "bank": "own", "selector": "threshold", "score_init": "kaiming_uniform",
        "scale": "sqrt_density", "rest": "norms",
    },
    "frozen": {"bank": "own", "bank_init": "signed_constant", "rest": "freeze"},
}  # fmt: skip


def oracle(model, names, x, network=None):
    """dH/dalpha by autograd through a plain network whose weights are the dense mixture."""
    alphas = torch.full((len(names),), 1 / len(names), requires_grad=True)
    network = network or models.net().eval()
    logits = functional_call(network, mixed_state(model, names, alphas), (x,))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    (gradients,) = torch.autograd.grad(entropy, alphas)
    return dict(zip(names, gradients.tolist(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_one_shot_is_the_gradient_of_the_dense_mixture(case):
    model, x = tasks(CASES[case]), models.images(1)
    expected = oracle(model, NAMES, x)
    assert len(set(expected.values())) == len(NAMES), "the tasks must differ"
    guess = infer_task(model, x)
    assert_close(guess.gradients, expected)
    assert guess.name == min(expected, key=expected.get)
    assert guess.steps == len(guess.rounds) == 1
    first, second, *_ = sorted(guess.gradients.values())
    assert guess.margin == second - first > 0
    assert guess.divergences == {}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_binary_drops_the_half_with_the_larger_gradients(count):
    model, x, names = tasks(MP), models.images(2), NAMES[:count]
    guess = infer_task(model, x, adapters=names, method="binary")
    assert guess.steps == max(math.ceil(math.log2(count)), 1)
    seen, leads = {}, [math.inf]
    for taken in guess.rounds:
        assert_close(taken, oracle(model, names, x))
        seen.update(taken)
        order = sorted(taken.values())
        limit = order[(len(order) + 1) // 2 - 1]
        leads += [value - taken[guess.name] for value in order if value > limit]
        names = tuple(name for name in names if taken[name] <= limit)
    assert names == (guess.name,)
    assert guess.gradients == seen
    assert guess.margin == min(leads)
    assert set(seen) == set(NAMES[:count])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classes", [1, 3])
def test_spare_outputs_have_the_gradient_of_their_share_alone(case, classes):
    """G: each spare logit's derivative, times its softmax, summed; the others count in it only."""
    model, x = tasks(CASES[case]), models.images(1)
    alphas = torch.full((len(NAMES),), 1 / len(NAMES), requires_grad=True)
    state = mixed_state(model, NAMES, alphas)
    logits = functional_call(models.net().eval(), state, (x,))
    shares = logits.detach().softmax(-1)
    expected = torch.zeros(len(NAMES))
    for row, share in zip(logits, shares, strict=True):
        for output in range(classes, 4):
            (slope,) = torch.autograd.grad(row[output], alphas, retain_graph=True)
            expected += share[output] * slope / len(x)
    expected = dict(zip(NAMES, expected.tolist(), strict=True))
    guess = infer_task(model, x, objective="spare_outputs", classes=classes)
    assert_close(guess.gradients, expected)
    assert guess.name == min(expected, key=expected.get)
    assert guess.gradients != infer_task(model, x).gradients


def test_spare_outputs_agree_with_finite_differences():
    """In float64, of explicitly mixed weights: how G moves when the used logits stand still."""
    model, x, names = tasks(CASES["frozen"]), models.images(3).double(), NAMES[:3]
    network, start, step = models.net().eval().double(), [1 / 3] * 3, 1e-3
    still = {n: t for n, t in mixed_state(model, names, start).items() if "running" in n}

    def logits(alphas):
        state = mixed_state(model, names, alphas) | still  # statistics pass no gradients on
        state = {name: value.double() for name, value in state.items()}
        with torch.no_grad():
            return functional_call(network, state, (x,))

    def value(used, spare):
        total = used[:, :2].exp().sum(1) + spare[:, 2:].exp().sum(1)
        return float(total.log().mean())

    expected = {}
    for place, name in enumerate(names):
        up, down = list(start), list(start)
        up[place], down[place] = up[place] + step, down[place] - step
        here = logits(start)
        rise = value(here, logits(up)) - value(here, logits(down))
        expected[name] = rise / (2 * step)
    guess = infer_task(model, x.float(), adapters=names, objective="spare_outputs", classes=2)
    assert guess.gradients == pytest.approx(expected, rel=2e-3)


def test_entropy_is_what_none_means_and_position_logits_are_averaged():
    model, x = tasks(MP, ("a", "b")), models.images(1)
    assert infer_task(model, x, objective="entropy") == infer_task(model, x)
    plain = infer_task(model, x, objective="spare_outputs", classes=2)
    by_position = pemnify(Returns(lambda y: y[:, None].expand(-1, 5, -1)), adapter_name="a", **MP)
    by_position.add_adapter("b", PemnConfig(**MP))
    by_position.load_state_dict(model.state_dict())
    found = infer_task(by_position, x, objective="spare_outputs", classes=2)
    assert_close(found.gradients, plain.gradients)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"objective": "loss"}, ["objective='loss'", "entropy, spare_outputs"]),
        ({"objective": "spare_outputs"}, ["classes=None", "how many outputs labels use"]),
        ({"objective": "spare_outputs", "classes": 0}, ["classes=0", "1 or more"]),
        ({"objective": "entropy", "classes": 3}, ["classes=3", "objective='spare_outputs'"]),
        ({"classes": 3}, ["classes=3", "objective=None", "objective='spare_outputs'"]),
        ({"method": "statistics", "objective": "entropy"}, ["'entropy'", "reads no outputs"]),
        ({"method": "statistics", "classes": 3}, ["classes=3", "reads no outputs"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, parts):
    model = tasks(MP, ("a", "b"), steps=1)
    with pytest.raises(ConfigError) as error:
        infer_task(model, models.images(), **options)
    models.says(error, *parts)


@pytest.mark.parametrize("classes", [4, 10])
def test_a_head_without_spare_outputs_is_refused(classes):
    model = tasks(MP, ("a", "b"), steps=1)
    before = models.Snapshot(model)
    with pytest.raises(TaskInferenceError) as error:
        infer_task(model, models.images(), objective="spare_outputs", classes=classes)
    models.says(error, f"classes={classes}", "4 outputs", "none is spare", "objective='entropy'")
    before.assert_unchanged()


def test_margin_of_several_rounds_is_the_least_lead_of_the_winner():
    rounds = ({"a": -3.0, "b": -2.5, "c": -2.0, "d": 1.0}, {"a": -1.0, "b": 4.0})
    assert TaskGuess("a", rounds).margin == 1  # -2 was dropped first; b is 5 behind later
    assert TaskGuess("a", (rounds[0], {"a": -1.0, "b": -0.5})).margin == 0.5
    assert TaskGuess("a", rounds[:1]).margin == 0.5
    assert TaskGuess("a", ({"a": 2.0},)).margin == math.inf
    assert TaskGuess("b", divergences={"a": 0.75, "b": 0.25, "c": 3.0}).margin == 0.5
    assert TaskGuess("b", divergences={"b": 0.25}).margin == math.inf


def test_of_equal_adapters_the_earlier_is_taken():
    model = pemnify(models.net(), adapter_name="first", **MP)
    for name in ("second", "third"):
        model.add_adapter(name, PemnConfig(**MP))  # equal seeds: equal scores
    for method in ("one_shot", "binary"):
        guess = infer_task(model, models.images(), method=method)
        assert (guess.name, guess.margin) == ("first", 0)
        found = infer_task(model, models.images(), adapters=["third", "second"], method=method)
        assert found.name == "third"


def test_an_adapter_without_a_mask_of_a_weight_adds_all_of_it():
    model = pemnify(
        models.net(), PemnConfig(bank="own", selector="topk", rest="freeze"), adapter_name="a"
    )
    some = PemnConfig(
        bank="own", selector="topk", rest="freeze", target_modules=["conv1", "conv2"], seed=4
    )
    model.add_adapter("b", some)
    assert "b" not in models.mask_layers(model)["head.weight"].pemn_masks
    x = models.images(3)
    assert_close(infer_task(model, x).gradients, oracle(model, ("a", "b"), x))


class Digits(nn.Module):
    """A small classifier with more outputs than classes, which is what makes entropy tell."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(24, 96, bias=False), nn.ReLU(), nn.Linear(96, 64, bias=False)
        )

    def forward(self, x):
        return self.layers(x)


def permuted(task, count, seed):
    """Four noisy classes in 24 values, permuted in the task's own way; images and labels."""
    prototypes = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(100 + task))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    x = prototypes[y] + 0.3 * torch.randn(count, 24, generator=generator)
    return x[:, order], y


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of six trained tasks' adapters."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tasks")
    for task in range(6):
        options = {"bank": "own", "bank_init": "signed_constant", "rest": "freeze"}
        model = pemnify(Digits(), adapter_name=f"task{task}", **options)
        optimizer = models.trainer_of(model)
        for turn in range(60):
            x, y = permuted(task, 32, 1000 * task + turn)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.save_pretrained(str(folder))
    return folder


def loaded(folder):
    model = PeftModel.from_pretrained(Digits(), folder / "task0", adapter_name="task0")
    for task in range(1, 6):
        model.load_adapter(str(folder / f"task{task}"), f"task{task}")
    return model.eval()


@pytest.mark.parametrize("asked", [{}, {"objective": "spare_outputs", "classes": 4}])
@pytest.mark.parametrize("method", ["one_shot", "binary"])
def test_the_right_one_of_trained_tasks_is_found(trained, method, asked):
    model = loaded(trained)
    for task in range(6):
        x, y = permuted(task, 32, 77 + task)
        guess = infer_task(model, x, method=method, **asked)
        assert guess.name == f"task{task}"
        assert guess.steps == (1 if method == "one_shot" else 3)
        model.set_adapter(guess.name)
        assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_bits_and_scores_give_the_same_bits(tmp_path):
    model, x = tasks(MP), models.images(4)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(models.net(9), tmp_path / "a", adapter_name="a")
    for name in NAMES[1:]:
        again.load_adapter(str(tmp_path / name), name)
    assert models.mask_layers(again)["head.weight"].mask_of("b").scores is None
    assert infer_task(again, x).rounds == infer_task(model, x).rounds


def whole_heads(names=("a", "b", "c")):
    """Adapters with a head of their own each, trained and saved whole."""
    options = {"bank": "own", "selector": "topk", "rest": "stats", "modules_to_save": ["head"]}
    return tasks(options, names)


def test_whole_modules_are_mixed_too():
    model, x, names = whole_heads(), models.images(5), ("a", "b", "c")
    wrapper = model.base_model.model.head
    weights = [wrapper.modules_to_save[name].weight for name in names]
    assert not torch.equal(weights[0], weights[1])

    network = models.net().eval()
    alphas = torch.full((3,), 1 / 3, requires_grad=True)
    state = mixed_state(model, names, alphas)
    for tensor in ("weight", "bias"):
        held = [getattr(wrapper.modules_to_save[name], tensor).detach() for name in names]
        state[f"head.{tensor}"] = sum(a * t for a, t in zip(alphas, held, strict=True))
    logits = functional_call(network, state, (x,))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    (expected,) = torch.autograd.grad(entropy, alphas)
    snapshot = models.Snapshot(model)
    assert_close(infer_task(model, x).gradients, dict(zip(names, expected.tolist(), strict=True)))
    snapshot.assert_unchanged()
    assert not wrapper._forward_hooks


def test_heads_of_other_shapes_are_refused():
    model = whole_heads()
    model.base_model.model.head.modules_to_save["b"] = nn.Linear(8, 7)
    with pytest.raises(TaskInferenceError) as error:
        infer_task(model, models.images())
    models.says(error, "head of adapter 'b'", "(7, 8)", "(4, 8)", "adapters=[...]")
    assert infer_task(model, models.images(), adapters=["a", "c"]).name in ("a", "c")


@pytest.mark.parametrize("prepare", PREPARE)
@pytest.mark.parametrize("method", ["one_shot", "binary"])
def test_the_model_stays_as_it_was(prepare, method):
    model, x = tasks(MP), models.images(6)
    model.set_adapter("b")
    expected = infer_task(model, x, method=method).rounds
    prepare(model)
    if not model.training:
        models.logits(model)  # keeps weights
    snapshot, before = models.Snapshot(model), state_of(model)
    guess = infer_task(model, x, method=method)
    assert all(same(value, before[key]) for key, value in state_of(model).items())
    snapshot.assert_unchanged()
    if prepare is not in_training:
        assert guess.rounds == expected, "the active adapter must not matter"


def test_an_error_on_the_way_changes_nothing():
    model = whole_heads().train()
    net = model.base_model.model
    whole, net.bn3 = net.bn3, Breaks()
    before, modes = state_of(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        infer_task(model, models.images())
    assert [m.training for m in model.modules()] == modes
    assert all(same(value, before[key]) for key, value in state_of(model).items())
    net.bn3 = whole
    assert infer_task(model, models.images()).name in ("a", "b", "c")


def test_what_a_forward_writes_is_dropped():
    model = pemnify(Counts(), adapter_name="a", **MP)
    model.add_adapter("b", PemnConfig(**MP))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("running_mean" in name for name in before)
    infer_task(model, models.images())
    models.assert_same_tensors(model.state_dict(), before)
    model.eval()(models.images())  # outside, writing still works
    written = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert any("running_mean" in name for name in written)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_around_it(mode):
    model = tasks(MP)
    expected = infer_task(model, models.images(7))
    with mode():
        assert infer_task(model, models.images(7)) == expected
        assert not torch.is_grad_enabled()


def test_keeping_or_not_is_the_same():
    model = tasks(MP)
    expected = infer_task(model, models.images(7), method="binary")
    keep_weights(model, False)
    assert infer_task(model, models.images(7), method="binary") == expected


@models.ignore_peft_on_transformers
def test_transformers_models_with_keyword_inputs():
    config = {"bank": "rp", "ratio": 0.1, "task_type": "SEQ_CLS"}
    model = pemnify(models.bert(), PemnConfig(**config), adapter_name="a")
    model.add_adapter("b", PemnConfig(**config))
    model.set_adapter("b")
    with torch.no_grad():
        for layer in models.mask_layers(model).values():
            layer.mask_of("b").scores.copy_(layer.mask_of("b").scores.flip(0))
    batch = {"input_ids": models.tokens(), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    guess = infer_task(model, batch)
    assert set(guess.gradients) == {"a", "b"}
    assert guess.gradients["a"] != guess.gradients["b"]
    assert infer_task(model, (models.tokens(), batch["attention_mask"])) == guess


def test_a_traced_graph_gives_the_same_bits():
    eager, traced = (
        pemnify(network, PemnConfig(**MP), adapter_name="a")
        for network in (models.net().eval(), torch.fx.symbolic_trace(models.net().eval()))
    )
    for model in (eager, traced):
        model.add_adapter("b", PemnConfig(**MP))
        for layer in models.mask_layers(model).values():
            scores = layer.mask_of("b").scores.data
            scores.copy_(scores.flip(0))
    expected = infer_task(eager, models.images(8))
    assert expected.gradients["a"] != expected.gradients["b"]
    assert infer_task(traced, models.images(8)) == expected


def test_an_offloaded_model_gives_the_same_bits():
    accelerate = pytest.importorskip("accelerate")
    model = tasks({"bank": "own", "selector": "topk"}, ("a", "b"))
    expected = infer_task(model, models.images(8), method="binary")
    accelerate.cpu_offload(model.base_model.model, torch.device("cpu"), offload_buffers=True)
    assert model.base_model.model.conv2._parameters["weight"].is_meta
    assert infer_task(model, models.images(8), method="binary") == expected


@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    model = tasks(MP)
    expected = infer_task(model, models.images(8))
    compiled = torch.compile(model, backend="eager")
    assert infer_task(compiled, models.images(8)).name == expected.name
    assert_close(infer_task(compiled, models.images(8)).gradients, expected.gradients)


def test_memory_does_not_grow_with_the_number_of_adapters():
    fill, alphas = torch.randn(64, 64), torch.full((40,), 1 / 40, requires_grad=True)
    made, alive = [0], [0]

    def masking(weight):
        made[0] += 1
        return weight * 1.0

    def pack(tensor):
        alive[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight = Mixture(("x",) * 40, alphas).of_masks(fill, [masking] * 40)
    assert made == [40]
    assert alive[0] < 2 * fill.numel()
    weight.sum().backward()
    assert made == [80], "made anew in the backward pass"
    torch.testing.assert_close(alphas.grad, fill.sum().expand(40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_hundreds_of_shares_sum_in_full_precision(dtype):
    fill = torch.randn(50).to(dtype)
    count = 300
    mixture = Mixture(("x",) * count, torch.full((count,), 1 / count))
    exact = fill.double()
    for mixed in (mixture.of_masks(fill, [None] * count), mixture.of_tensors([fill] * count)):
        assert mixed.dtype == dtype
        error = (mixed.double() - exact).abs().max() / exact.abs().max()
        assert error <= max(torch.finfo(dtype).eps, 1e-5)


def test_counters_are_copied_from_the_first():
    first, second = torch.tensor(3), torch.tensor(9)
    mixed = Mixture(("x", "y"), torch.full((2,), 0.5)).of_tensors([first, second])
    assert mixed.item() == 3
    mixed.add_(1)
    assert first.item() == 3


@pytest.mark.parametrize(
    ("adapters", "part"),
    [(["a", "z"], "['a', 'z']"), ([], "adapters=[]"), (["a", "a"], "['a', 'a']")],
)
def test_unknown_adapters_are_refused(adapters, part):
    model = tasks(MP, ("a", "b"), steps=1)
    with pytest.raises(TaskInferenceError) as error:
        infer_task(model, models.images(), adapters=adapters)
    models.says(error, part, "have masks in the model: a, b", "load_adapter")


def test_a_model_without_masks_is_refused():
    with pytest.raises(TaskInferenceError, match="there are none"):
        infer_task(models.net(), models.images())


def test_an_unknown_method_is_refused():
    model = tasks(MP, ("a", "b"), steps=1)
    with pytest.raises(
        ConfigError, match="method='twice'; it needs one of one_shot, binary, statistics"
    ):
        infer_task(model, models.images(), method="twice")


class Returns(models.Net):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda y: [y], "returned list"),
        (lambda y: y[:, :1], "returned (6, 1)"),
        (lambda y: y.sum(), "returned ()"),
        (lambda y: y.detach(), "no gradient with respect to the masks"),
        (lambda y: y / 0, "not finite"),
    ],
)
def test_outputs_that_tell_nothing_are_refused(change, part):
    model = pemnify(Returns(change), adapter_name="a", **MP)
    model.add_adapter("b", PemnConfig(**MP))
    snapshot = models.Snapshot(model, lambda m: torch.zeros(1))
    with pytest.raises(TaskInferenceError) as error:
        infer_task(model, models.images())
    models.says(error, part)
    snapshot.assert_unchanged()


def test_adapters_that_add_signs_are_refused():
    model = from_finetuned(models.net(), models.net(seed=1), "sign_delta")
    before = models.Snapshot(model)
    with pytest.raises(TaskInferenceError) as error:
        infer_task(model, models.images())
    models.says(error, "default", "sign_delta", "multiply")
    before.assert_unchanged()
