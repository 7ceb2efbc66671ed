"""Arms that take their steps together, beside each of them alone."""

import dataclasses
import functools
import io
import json
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load, result, runner
from pemn_surgery.recipe.arms import Arm, learn
from pemn_surgery.recipe.cli import RecipeCommand, Verb
from pemn_surgery.recipe.options import CaseOptions
from pemn_surgery.recipe.stopping import TimeIsUp
from pemn_surgery.recipe.together import Together

RECIPE = load(Path(__file__).resolve().parents[2] / "recipes" / "pemn")
PRUNED = {f"{way}_50": {"prune": way, "sparsity": 0.5} for way in ("random", "magnitude")}
MASKS = ("mask", "one_layer", "mp", "rp_1e-2")
ARMS = {"dense": {}, **{name: RECIPE.arms[name] for name in MASKS}, **PRUNED}
FEW = {name: ARMS[name] for name in ("dense", "rp_1e-2", "random_50")}
NETWORKS = {
    "resnet32": {"depth": 8},
    "convmixer_d6_h256": {"width": 8, "depth": 2},
    "vit_d6_h256": {"width": 16, "depth": 2},
}


def tiny(case="resnet32", arms=FEW):
    """The recipe with a small network and batches of 9 rows."""
    given = RECIPE.cases[case]
    rule = given.rule | {"batch": 9}
    small = dataclasses.replace(given, arguments=NETWORKS[case], rule=rule, arms=[])
    return dataclasses.replace(RECIPE, arms=arms, cases={"tiny": small})


@pytest.fixture
def options(images, tmp_path):
    """Options of two epochs of 5 steps in fp32."""
    given = {"data": str(images), "seeds": (3,), "precision": "fp32", "together": True}
    return CaseOptions(case="tiny", epochs=2, work=tmp_path / "work", **given)


def running(recipe, options, **changes):
    given = dataclasses.replace(options, **changes)
    given.work.mkdir(exist_ok=True)
    quiet = Console(file=io.StringIO(), width=200)
    return runner.of_case(recipe, given, *given.seeds, quiet)


def gap(one, other):
    """How far apart tensors are, relative to the second's size."""
    return float((one - other).double().norm() / other.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("case", list(NETWORKS))
def test_a_step_is_that_of_every_arm_alone(case, options):
    """The ViT has dropout, which draws the same."""
    one_step = {"limit": 9, "epochs": 1}
    recipe = tiny(case, ARMS)
    whole = running(recipe, options, **one_step)
    whole.go()
    assert [arm.name for arm in whole.arms] == list(ARMS)
    apart = running(recipe, options, work=options.work / "alone", together=False, **one_step)
    apart.go()
    for one, other in zip(whole.arms, apart.arms, strict=True):
        loss, expected = (arm.history[0]["train_loss"] for arm in (one, other))
        assert loss == pytest.approx(expected, rel=1e-6)
        grads = [{n: p.grad for n, p in arm.model.named_parameters()} for arm in (one, other)]
        trained = [name for name, grad in grads[1].items() if grad is not None]
        assert len(trained) > 5
        largest = max(float(grads[1][name].norm()) for name in trained)
        for name in trained:
            error = float((grads[0][name] - grads[1][name]).norm())
            assert error < 1e-5 * largest, (one.name, name)
        for (name, moved), (_, expected) in zip(
            one.model.named_buffers(), other.model.named_buffers(), strict=True
        ):
            assert gap(moved, expected) < 1e-5, (one.name, name)


def doubled(recipe, folder):
    arms = []
    for name, options in recipe.arms.items():
        torch.manual_seed(3)
        model = runner.network_of_arm(recipe, "tiny", options, 3).double().train()
        arms.append(Arm(name, model, recipe.cases["tiny"].rule_of(name), folder / name, {}))
    return arms


@pytest.mark.parametrize("case", list(NETWORKS))
def test_many_steps_in_float64_are_those_of_every_arm_alone(case, tmp_path):
    recipe = tiny(case, ARMS)
    whole, apart = (doubled(recipe, tmp_path) for _ in range(2))
    together = Together(recipe.network("tiny").double(), compiled=False)
    for step in range(3):
        x, labels = torch.rand(9, 3, 32, 32).double(), torch.arange(9) % 10
        torch.manual_seed(step)
        learn(whole, [F.cross_entropy(y, labels) for y in together(whole, x)], step, 3)
        for arm in apart:
            torch.manual_seed(step)
            learn([arm], [F.cross_entropy(arm.model(x), labels)], step, 3)
    start = doubled(recipe, tmp_path)
    for one, other, before in zip(whole, apart, start, strict=True):
        expected, first = other.tensors(), before.tensors()
        for name, tensor in one.tensors().items():
            assert gap(tensor, expected[name]) < 1e-9, (one.name, name)
        assert sum(not torch.equal(expected[name], first[name]) for name in first) > 5


def same(one, other):
    a, b = one.tensors(), other.tensors()
    states = [arm.optimizers["optimizer"].state_dict()["state"] for arm in (one, other)]
    flat = [
        {(i, k): torch.as_tensor(v) for i, kept in state.items() for k, v in kept.items()}
        for state in states
    ]
    rows = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in arm.history]
        for arm in (one, other)
    ]
    assert rows[0] == rows[1]
    return all(
        left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
        for left, right in ((a, b), flat)
    )


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_an_interrupted_run_resumes_to_the_same_bits(steps, options):
    recipe = tiny()
    whole = running(recipe, options, work=options.work.with_name("whole"))
    whole.go()
    cut = running(recipe, options)
    left = iter(range(steps - 1, -1, -1))
    cut.arms[1].optimizers["optimizer"].register_step_pre_hook(
        lambda *_: signal.raise_signal(signal.SIGINT) if next(left) == 0 else None
    )
    message = r"stopped: dense, rp_1e-2, random_50 after \d of 5 steps of epoch"
    with pytest.raises(KeyboardInterrupt, match=message):
        cut.go()
    resumed = running(recipe, options, resume=True)
    assert [arm.epoch * 5 + arm.step for arm in resumed.arms] == [steps] * 3
    resumed.go()
    for one, other in zip(whole.arms, resumed.arms, strict=True):
        assert same(one, other)
        assert all(row["seconds"] > 0 for row in other.history)


def test_minutes_that_are_over_stop_a_run_that_goes_on_to_the_same_bits(options):
    recipe = tiny("convmixer_d6_h256")
    whole = running(recipe, options, work=options.work.with_name("whole"))
    whole.go()
    for calls in range(10):  # a step each: two epochs of five
        given = {"minutes": 1e-9, "until": float("inf"), "resume": calls > 0}
        with pytest.raises(TimeIsUp, match=r"rp_1e-2, random_50 after . of 5 steps"):
            running(recipe, options, **given).go()
    run = running(recipe, options, resume=True)
    assert [arm.step for arm in run.arms] == [5] * 3
    run.go()
    assert all(same(one, other) for one, other in zip(whole.arms, run.arms, strict=True))


def test_an_arm_that_comes_later_catches_up_and_goes_on_with_the_others(options, monkeypatch):
    recipe = tiny()
    first = running(recipe, options, arms=("dense", "rp_1e-2"), epochs=2)
    left = iter(range(6, -1, -1))
    first.arms[0].optimizers["optimizer"].register_step_pre_hook(
        lambda *_: signal.raise_signal(signal.SIGINT) if next(left) == 0 else None
    )
    with pytest.raises(KeyboardInterrupt, match="2 of 5 steps of epoch 2"):
        first.go()
    taken, step = [], runner.Runner._step
    monkeypatch.setattr(
        runner.Runner,
        "_step",
        lambda run, arms, *rest: taken.append([a.name for a in arms]) or step(run, arms, *rest),
    )
    run = running(recipe, options, resume=True)
    run.go()
    late, others = ["random_50"], ["dense", "rp_1e-2"]
    assert taken == [late] * 5 + [late] * 5 + [others] * 3
    assert [len(arm.history) for arm in run.arms] == [2, 2, 2]


def test_the_result_says_that_arms_were_trained_together(options, tmp_path):
    verbs = {"run": Verb("", CaseOptions, result.run)}
    main = RecipeCommand(tiny(), "", verbs, result.compare).main
    line = f"run --case tiny --work {options.work} --epochs 1 --together --data {options.data}"
    assert main(["--results", str(tmp_path), *line.split()]) == 0
    found = json.loads((tmp_path / "tiny-e1-s0.json").read_text())
    assert found["command"].endswith("--seeds 0 --together")
    assert [arm["settings"]["together"] for arm in found["arms"].values()] == [True] * 3


@pytest.mark.parametrize("together", [True, False])
def test_a_run_together_goes_on_as_one_alone(together, options):
    running(tiny(), options, epochs=1, together=together).go()
    with pytest.raises(RecipeError, match=r"other settings .*'together': \((True, )?None"):
        running(tiny(), options, epochs=1, together=not together, resume=True)


@pytest.mark.parametrize("changes", [{"compile": True}, {"precision": "bf16"}])
def test_compiled_and_half_precision_runs_learn_the_same(changes, options, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    losses, recipe = [], tiny(arms={name: FEW[name] for name in ("dense", "rp_1e-2")})
    for number, given in enumerate([{}, changes]):
        work = options.work.with_name(str(number))
        run = running(recipe, options, work=work, epochs=1, limit=18, **given)
        run.go()
        losses.append([arm.history[0]["train_loss"] for arm in run.arms])
    near = 1e-4 if "compile" in changes else 2e-2
    assert losses[1] == pytest.approx(losses[0], rel=near)
