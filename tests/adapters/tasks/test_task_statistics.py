"""The task whose running statistics a batch has, against explicit loops; the model stays as is."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from pemn_surgery import PemnConfig, from_finetuned, infer_task, pemnify
from pemn_surgery.errors import TaskInferenceError
from tests.adapters import models
from tests.adapters.mixtures import (
    MP,
    NAMES,
    PREPARE,
    Breaks,
    Counts,
    assert_close,
    mixed_state,
    same,
    state_of,
    tasks,
)

CASES = {
    **models.BANKS,
    "scaled_norms": {
        "bank": "own", "selector": "threshold", "score_init": "kaiming_uniform",
        "scale": "sqrt_density", "rest": "norms",
    },
    "stats": {"bank": "own", "bank_init": "signed_constant", "rest": "stats"},
}  # fmt: skip
OWN = {"bank": "own", "selector": "topk", "rest": "stats"}


def ask(model, x, **options):
    return infer_task(model, x, method="statistics", **options)


def kl(values, mean, variance, eps):
    """KL of one channel's values to its running statistics; of one value the mean's term."""
    seen = values.var(ddof=1) if len(values) > 1 else variance
    ratio, shift = (seen + eps) / (variance + eps), values.mean() - mean
    return (ratio - 1 - math.log(ratio) + shift**2 / (variance + eps)) / 2


def layer_kl(x, mean, variance, eps=1e-5):
    """Mean over channels of float64 inputs [n, channels, ...], a channel at a time."""
    found = [
        kl(x[:, channel].reshape(-1).numpy(), float(mean[channel]), float(variance[channel]), eps)
        for channel in range(x.shape[1])
    ]
    assert found
    return float(np.mean(found))


def oracle(model, name, x, seed=0):
    """The mean of three layers, of a plain float64 network written out by hand."""
    state = models.net(seed).state_dict() | mixed_state(model, (name,), (1.0,))
    p, x, found = {key: value.double() for key, value in state.items()}, x.double(), []
    for place in "123":
        x = F.conv2d(x, p[f"conv{place}.weight"], p.get(f"conv{place}.bias"))
        norm = f"bn{place}."
        mean, variance = p[f"{norm}running_mean"], p[f"{norm}running_var"]
        found.append(layer_kl(x, mean, variance))
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        x = (x * p[f"{norm}weight"].view(shape) + p[f"{norm}bias"].view(shape)).relu()
    return float(np.mean(found))


def by_hooks(model, name, x):
    """The same of any network, with the adapter activated and hooks that keep all inputs."""
    model.set_adapter(name)
    seen, hooks = {}, []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            hook = lambda m, given: seen.setdefault(m, []).append(  # noqa: E731
                layer_kl(given[0].double(), m.running_mean, m.running_var, m.eps)
            )
            hooks.append(module.register_forward_pre_hook(hook))
    models.logits(model, x)
    for hook in hooks:
        hook.remove()
    assert seen
    return float(np.mean([np.mean(one) for one in seen.values()]))


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("case", CASES)
def test_divergences_are_those_of_explicit_loops(case, count):
    model, x = tasks(CASES[case]), models.images(1, count)
    expected = {name: oracle(model, name, x) for name in NAMES}
    assert len(set(expected.values())) == len(NAMES), "the tasks must differ"
    guess = ask(model, x)
    assert_close(guess.divergences, expected)
    assert guess.name == min(expected, key=expected.get)
    first, second, *_ = sorted(guess.divergences.values())
    assert guess.margin == second - first > 0
    assert (guess.steps, guess.rounds, guess.gradients) == (0, (), {})


def test_one_candidate_of_many():
    model, x = tasks(MP), models.images(2)
    guess = ask(model, x, adapters=["c"])
    assert_close(guess.divergences, {"c": oracle(model, "c", x)})
    assert (guess.name, guess.margin) == ("c", math.inf)
    pair = ask(model, x, adapters=["d", "c"])
    assert list(pair.divergences) == ["d", "c"]
    assert pair.divergences["c"] == guess.divergences["c"], "others must not matter"


def test_of_equal_adapters_the_earlier_is_taken():
    model = pemnify(models.net(), adapter_name="first", **MP)
    model.add_adapter("second", PemnConfig(**MP))  # equal seeds: equal scores
    guess = ask(model, models.images(), adapters=["second", "first"])
    assert (guess.name, guess.margin) == ("second", 0)


class OneNorm(nn.Module):
    """A convolution (or Linear) that may be grouped, then BatchNorm; ``dims`` are spatial."""

    def __init__(self, dims, groups, width, eps):
        super().__init__()
        channels = groups * width
        self.layer = (
            getattr(nn, f"Conv{dims}d")(channels, channels, 1, groups=groups, bias=False)
            if dims
            else nn.Linear(channels, channels, bias=False)
        )
        self.norm = getattr(nn, f"BatchNorm{max(dims, 1)}d")(channels, eps=eps)

    def forward(self, x):
        return self.norm(self.layer(x))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.integers(0, 3).flatmap(lambda n: st.lists(st.integers(1, 3), min_size=n, max_size=n)),
    batch=st.integers(1, 4),
    groups=st.integers(1, 2),
    width=st.integers(1, 3),
    eps=st.sampled_from([1e-5, 1e-2]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_every_shape_of_a_batch(sizes, batch, groups, width, eps, scale):
    """BatchNorm1d to 3d, batch 1, one value a channel, grouped layers, activations of any size."""
    torch.manual_seed(0)
    model = pemnify(OneNorm(len(sizes), groups, width, eps), adapter_name="a", **OWN)
    net = model.base_model.model
    net.norm.running_mean = scale * torch.randn(groups * width)
    net.norm.running_var = scale**2 * torch.rand(groups * width)
    x = scale * torch.randn(batch, groups * width, *sizes)
    with torch.no_grad():
        inputs = net.layer(x).double()
    expected = layer_kl(inputs, net.norm.running_mean, net.norm.running_var, eps)
    assert ask(model, x).divergences["a"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_one_value_a_channel_counts_by_its_mean_alone():
    model = pemnify(OneNorm(0, 1, 2, 1e-5), adapter_name="a", **OWN)
    net = model.base_model.model
    net.norm.running_mean = torch.tensor([1.0, -1.0])
    net.norm.running_var = torch.tensor([4.0, 0.25])
    x = torch.tensor([[3.0, 5.0]])
    with torch.no_grad():
        first, second = net.layer(x)[0].tolist()
    expected = ((first - 1) ** 2 / 4 + (second + 1) ** 2 / 0.25) / 2 / 2
    assert ask(model, x).divergences["a"] == pytest.approx(expected, rel=1e-3)


class Residual(nn.Module):
    """A small ResNet: a stem, two blocks with a shortcut each, a linear head."""

    def __init__(self, width=12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean(dim=(2, 3)))


def pictures(task, count, seed):
    """Noise, of each task brighter in another colour; the next colour's mean is the label."""
    generator = torch.Generator().manual_seed(10_000 * task + seed)
    x = torch.randn(count, 3, 12, 12, generator=generator)
    y = x[:, task - 1].mean(dim=(1, 2)).gt(0).long()
    x[:, task] += 1.5
    return x, y


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """A folder of three adapters of `Residual`, each trained on its own pictures."""
    torch.manual_seed(0)
    folder, start = tmp_path_factory.mktemp("residual"), Residual().state_dict()
    for task in range(3):
        network = Residual()
        network.load_state_dict(start)
        model = pemnify(network, adapter_name=f"task{task}", **OWN, modules_to_save=[])
        optimizer = models.trainer_of(model)
        for turn in range(40):  # the rate ends at 0, so that statistics are those of the last masks
            optimizer.param_groups[0]["lr"] = 0.02 * max(1 - turn / 25, 0)
            x, y = pictures(task, 24, turn)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.save_pretrained(str(folder))
    network = Residual()
    network.load_state_dict(start)
    model = PeftModel.from_pretrained(network, folder / "task0", adapter_name="task0")
    for task in range(1, 3):
        model.load_adapter(str(folder / f"task{task}"), f"task{task}")
    return model.eval()


@pytest.mark.parametrize("count", [1, 2, 16])
def test_a_residual_network_finds_the_task_of_every_batch(residual, count):
    snapshot = models.Snapshot(residual, lambda m: models.logits(m, pictures(0, 2, 900)[0]))
    for task in range(3):
        for turn in range(5):
            guess = ask(residual, pictures(task, count, 500 + turn)[0])
            assert guess.name == f"task{task}"
            assert guess.margin > 0.01
    snapshot.assert_unchanged()


@pytest.mark.parametrize("prepare", PREPARE)
def test_the_model_stays_as_it_was(prepare):
    model, x = tasks(MP), models.images(6)
    model.set_adapter("b")
    expected = ask(model, x)
    prepare(model)
    if not model.training:
        models.logits(model)  # keeps weights
    snapshot, before = models.Snapshot(model), state_of(model)
    guess = ask(model, x)
    assert all(same(value, before[key]) for key, value in state_of(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    snapshot.assert_unchanged()
    if model.base_model.model.conv1.training:  # a step has changed what it says
        expected = ask(model.eval(), x)
    assert guess == expected, "modes, merged and disabled adapters must not matter"


def test_an_error_on_the_way_changes_nothing():
    model = tasks(MP, ("a", "b")).train()
    net = model.base_model.model
    whole, net.head = net.head, Breaks()
    before, modes = state_of(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        ask(model, models.images())
    assert [m.training for m in model.modules()] == modes
    assert all(same(value, before[key]) for key, value in state_of(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    net.head = whole
    assert ask(model, models.images()).name in ("a", "b")


def test_what_a_forward_writes_is_dropped():
    model = pemnify(Counts(), adapter_name="a", **MP)
    model.add_adapter("b", PemnConfig(**MP))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = ask(model, models.images())
    models.assert_same_tensors(model.state_dict(), before)
    assert ask(model, models.images()) == first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_around_it(mode):
    model = tasks(MP, ("a", "b"))
    expected = ask(model, models.images(7))
    with mode():
        assert ask(model, models.images(7)) == expected
        assert not torch.is_grad_enabled()


class Around(nn.Module):
    """A wrapper that calls by keyword and returns no logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixels, times):
        return {"features": times * self.inner(pixels)}


def test_a_wrapped_model_whose_output_is_no_logits():
    model, x = tasks(MP, ("a", "b")), models.images(7)
    expected = ask(model, x)
    assert ask(Around(model), {"pixels": x, "times": 2}) == expected
    assert ask(Around(model), (x, 3)) == expected


def test_bits_and_scores_and_offloaded_tensors_give_the_same_bits(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = tasks(OWN, ("a", "b")), models.images(8)
    expected = ask(model, x)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(models.net(), tmp_path / "a", adapter_name="a")
    again.load_adapter(str(tmp_path / "b"), "b")
    assert ask(again, x) == expected
    accelerate.cpu_offload(again.base_model.model, torch.device("cpu"), offload_buffers=True)
    assert again.base_model.model.conv2._parameters["weight"].is_meta
    assert ask(again, x) == expected


def test_mixed_precision():
    model, x = tasks(OWN, ("a", "b", "c")), models.images(8)
    expected = ask(model, x).divergences
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ask(model, x).divergences
    assert rounded == pytest.approx(expected, rel=0.05)
    assert rounded != expected
    half = ask(model.to(torch.bfloat16), x.to(torch.bfloat16)).divergences
    assert half == pytest.approx(expected, rel=0.1)


class Head(models.Net):
    """Its head has a BatchNorm of its own, and the body calls one layer twice."""

    def __init__(self, classes=4):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, classes), nn.BatchNorm1d(classes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn2(self.conv3(x)))
        return self.head(x.mean(dim=(2, 3)))


def test_whole_heads_of_any_size_and_layers_that_run_twice():
    """Each candidate runs alone, so that heads need not fit each other; bn3 never runs."""
    torch.manual_seed(0)
    model = pemnify(Head(), adapter_name="a", **OWN, modules_to_save=["head"])
    model.add_adapter("b", PemnConfig(**OWN, modules_to_save=["head"]))
    copies = model.base_model.model.head.modules_to_save
    copies["b"] = nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7))
    for name in ("a", "b"):
        model.set_adapter(name)
        models.train(model, ord(name), 2)
    x = models.images(3)
    expected = {name: by_hooks(model, name, x) for name in ("a", "b")}
    assert copies["a"][1].running_mean.abs().sum() > 0
    assert_close(ask(model, x).divergences, expected)
    with pytest.raises(TaskInferenceError, match="logits cannot be mixed"):
        infer_task(model, x)


def test_adapters_that_add_signs_are_compared_too():
    model, x = from_finetuned(models.net(), models.net(seed=1), "sign_delta"), models.images(3)
    model.add_adapter("b", PemnConfig(**OWN))
    model.set_adapter("b")
    models.train(model, 1)
    expected = {name: by_hooks(model, name, x) for name in ("default", "b")}
    assert_close(ask(model, x).divergences, expected)


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
    expected = ask(eager, models.images(8))
    assert expected.margin > 0
    assert ask(traced, models.images(8)) == expected


@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    model, x = tasks(MP, ("a", "b")), models.images(8)
    expected = ask(model, x)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    assert ask(compiled, x) == expected
    assert ask(compiled, x[:3]) == ask(model, x[:3])


def refusal(model, x=None, **options):
    """The message of a refusal, which changes nothing."""
    before = models.Snapshot(model, lambda m: torch.zeros(1))
    with pytest.raises(TaskInferenceError) as error:
        ask(model, models.images() if x is None else x, **options)
    before.assert_unchanged()
    return error


def test_a_model_without_batch_norm_is_refused():
    model = pemnify(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), adapter_name="a", **OWN)
    error = refusal(model, torch.randn(2, 4))
    models.says(error, "a owns none", "BatchNorm layers in the model: 0", "'one_shot' or 'binary'")


@pytest.mark.parametrize("generated", [{}, {"bank_init": "signed_constant"}])
def test_statistics_that_stood_still_are_refused(generated):
    """With a drawn bank every task has copies, which are the base's all the same."""
    frozen = {"bank": "own", "selector": "topk", "rest": "freeze", **generated}
    model = tasks(frozen, ("a", "b"))
    models.says(refusal(model), "a, b owns none", "layers in the model: 3", "rest='stats'")


def test_candidates_that_own_some_are_named_apart():
    model = tasks(OWN, ("a", "b"))
    model.add_adapter("c", PemnConfig(**{**OWN, "rest": "freeze"}))
    models.says(refusal(model), "c owns none", "adapters=[...]")
    assert set(ask(model, models.images(), adapters=["a", "b"]).divergences) == {"a", "b"}


def test_layers_that_one_candidate_does_not_own_are_left_out():
    model, x = tasks(OWN, ("a", "b")), models.images(2)
    both = ask(model, x).divergences
    task = models.task_layers(model)["bn2"].pemn_tensors
    del task["b"]
    state = {name: oracle_of(model, name, x, "13") for name in ("a", "b")}
    found = ask(model, x).divergences
    assert_close(found, state)
    assert found != both
    for path, name in (("bn1", "a"), ("bn3", "a")):
        del models.task_layers(model)[path].pemn_tensors[name]
    models.says(refusal(model), "owned by all 2 adapters", "bn2", "bn1", "bn3")


def oracle_of(model, name, x, places):
    """As `by_hooks`, of some of a `Net`'s norms."""
    model.set_adapter(name)
    found, net = [], model.base_model.model
    x = net.conv1(x)
    for place in "123":
        norm = getattr(net, f"bn{place}")
        if place in places:
            found.append(layer_kl(x.detach().double(), norm.running_mean, norm.running_var))
        x = F.relu(norm(x))
        x = getattr(net, f"conv{int(place) + 1}")(x) if place != "3" else x
    return float(np.mean(found))


class Skips(models.Net):
    """Its norms are never called."""

    def forward(self, x):
        return self.head(self.conv1(x).mean(dim=(2, 3)))


def test_norms_that_never_run_are_refused():
    model = pemnify(Skips(), adapter_name="a", **OWN)
    models.says(refusal(model), "None of the 3 BatchNorm layers", "bn1", "exported")


@pytest.mark.parametrize("x", [models.images() / 0, models.images()[:0]])
def test_what_is_not_finite_is_refused(x):
    models.says(refusal(tasks(OWN, ("a", "b"), 1), x), "not finite", "'a': nan", "one sample")
