"""The training loop: resumed runs bit by bit, the schedule's rates, the result's values."""

import dataclasses
import functools
import io
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import arms, load, result, rules, runner
from pemn_surgery.recipe.cli import RecipeCommand, Verb
from pemn_surgery.recipe.options import CaseOptions, ImageOptions
from pemn_surgery.recipe.stopping import TimeIsUp

RECIPE = load(Path(__file__).resolve().parents[2] / "recipes" / "pemn")
DATA = RECIPE.images("resnet32")
MASKS = "rp_1e-2"
TRAIN, TEST = 40, 12


@pytest.fixture(scope="module")
def cache(images, tmp_path_factory):
    """A work folder into which the pictures have been decoded."""
    work = tmp_path_factory.mktemp("cache")
    DATA.load(ImageOptions(case="", work=work, data=str(images)))
    return work


def tiny(*arms, case="convmixer_d6_h256"):
    """The recipe with a network and batches small enough for a test: 5 steps an epoch."""
    given = RECIPE.cases[case]
    arguments = {"depth": 8} if "resnet" in given.factory else {"width": 8, "depth": 1}
    rule = given.rule | {"batch": 9}
    small = dataclasses.replace(given, arguments=arguments, rule=rule, arms=[])
    chosen = {name: RECIPE.arms[name] for name in arms or ("dense",)}
    return dataclasses.replace(RECIPE, arms=chosen, cases={"tiny": small})


@pytest.fixture
def options(images, tmp_path, cache):
    """Options of a two-epoch run in fp32, its data already decoded."""
    work = placed(tmp_path / "work", cache)
    given = {"data": str(images), "seeds": (3,), "precision": "fp32"}
    return CaseOptions(case="tiny", epochs=2, work=work, **given)


def placed(work, cache):
    """A work folder with the decoded pictures in it."""
    work.mkdir()
    shutil.copy(next(cache.glob("decoded-*.pt")), work)
    return work


def quiet():
    return Console(file=io.StringIO(), width=200)


def running(recipe, options):
    return runner.of_case(recipe, options, *options.seeds, quiet())


def finished(recipe, options):
    return dict(result.run(recipe, options, quiet()))


@pytest.mark.parametrize("case", ["convmixer_d6_h256", "resnet32"])
def test_every_step_takes_the_schedules_rate(case, options):
    recipe = tiny(case=case)
    run = running(recipe, options)
    seen = []
    optimizer = run.arms[0].optimizers["optimizer"]
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    run.go()
    rule = recipe.cases["tiny"].rule
    lr = rules.SCHEDULES[rule["schedule"]]
    assert seen == [lr(rule["lr"], i, 10) for i in range(10)]
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == rule["weight_decay"]
    assert group.get("momentum") == rule.get("momentum")


def test_arms_see_the_same_batches_and_each_image_once(options):
    recipe = dataclasses.replace(tiny(), arms={"dense": {}, "again": {}})
    run = running(recipe, options)
    run.go()
    first, second = run.arms
    assert all(torch.equal(a, second.tensors()[n]) for n, a in first.tensors().items())
    labels = torch.cat([y for _, y in run._batches(1, runner.Progress(console=quiet()))])
    assert labels.bincount().tolist() == [4] * 10


def stop_after(run, steps):
    """Send Ctrl-C while the given step is under way."""
    left = iter(range(steps - 1, -1, -1))

    def count(*_):
        if next(left) == 0:
            signal.raise_signal(signal.SIGINT)

    for arm in run.arms:
        arm.optimizers["optimizer"].register_step_pre_hook(count)


@pytest.mark.parametrize("arms", [("dense",), ("dense", MASKS)], ids=len)
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_interrupted_run_resumes_to_the_same_bits(steps, arms, options, tmp_path, cache):
    recipe = tiny(*arms)
    elsewhere = dataclasses.replace(options, work=placed(tmp_path / "whole", cache))
    whole = running(recipe, elsewhere)
    whole.go()
    handler = signal.getsignal(signal.SIGINT)
    cut = running(recipe, options)
    stop_after(cut, steps)
    with pytest.raises(KeyboardInterrupt, match=r"stopped: .* of 5 steps of epoch"):
        cut.go()
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = running(recipe, dataclasses.replace(options, resume=True))
    assert sum(arm.epoch * 5 + arm.step for arm in resumed.arms) == steps
    resumed.go()
    for one, other in zip(whole.arms, resumed.arms, strict=True):
        assert same(one.tensors(), other.tensors())
        assert same(flat(one), flat(other))
        assert [timeless(row) for row in one.history] == [timeless(row) for row in other.history]


def flat(arm):
    state = arm.optimizers["optimizer"].state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, kept in state.items() for k, v in kept.items()}


def same(these, those):
    return these.keys() == those.keys() and all(torch.equal(t, those[n]) for n, t in these.items())


def timeless(row):
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_finished_run_resumes_to_its_result(options):
    first = finished(tiny(), options)
    assert first == finished(tiny(), dataclasses.replace(options, resume=True))
    assert list(first) == ["tiny-e2-s3"]


def test_accuracy_is_the_share_of_right_answers(options):
    run = running(tiny(), options)
    arm = run.arms[0]
    images, labels = run.task.test
    with torch.no_grad():
        logits = torch.cat([arm.model.eval()(DATA.normalise(x[None])) for x in images])
    right = sum(int(row.argmax()) == int(y) for row, y in zip(logits, labels, strict=True))
    assert run.accuracy(arm) == pytest.approx(100 * right / TEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "exists; resume that run, or give another work folder"),
        ({"resume": True, "precision": "bf16"}, r"'precision': \('fp32', 'bf16'\)"),
    ],
)
def test_a_run_is_never_overwritten_or_mixed(change, message, options):
    finished(tiny(), options)
    with pytest.raises(RecipeError, match=message):
        finished(tiny(), dataclasses.replace(options, **change))


def test_a_trial_says_that_it_is_one(options):
    given = dataclasses.replace(options, limit=10, epochs=1)
    ((label, found),) = finished(tiny(), given).items()
    assert found["note"] == "epochs: 1 of the paper's 100; a trial on 10 images of each split"
    assert label == "tiny-e1-s3-limit10"
    assert found["arms"]["dense"]["settings"]["train"] == 10


def test_global_generator_is_left_as_it_was(options):
    before = torch.get_rng_state()
    finished(tiny(), options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_result_holds_what_is_needed_to_judge_it(precision, options, tmp_path, images):
    verbs = {"run": Verb("", CaseOptions, result.run)}
    main = RecipeCommand(tiny("dense", MASKS), "", verbs, result.compare).main
    line = f"run --case tiny --work {options.work} --epochs 2 --precision {precision} --seeds 3"
    assert main(["--results", str(tmp_path), *line.split(), "--data", options.data]) == 0
    text = (tmp_path / "tiny-e2-s3.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert str(tmp_path) not in text
    assert str(images) not in text
    assert set(found) == {
        "schema", "recipe", "claim", "paper", "case", "command", "date", "seed", "epochs",
        "note", "limit", "machine", "versions", "arms",
    }  # fmt: skip
    assert found["note"] == "epochs: 2 of the paper's 100"
    assert found["epochs"] == {"run": 2, "paper": 100}
    assert found["command"] == (
        f"pemn run recipes/pemn run --case tiny --work WORK --epochs 2 "
        f"--precision {precision} --device cpu --layout channels_last "
        f"--data .../{images.name} --seeds 3"
    )
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert list(found["arms"]) == ["dense", MASKS]
    for arm in found["arms"].values():
        check_arm(arm)
    check_bytes(found["arms"], tmp_path)


def check_arm(arm):
    rows = arm["history"]
    assert [row["epoch"] for row in rows] == [1, 2]
    columns = {"epoch", "train_loss", "test_accuracy", "seconds", "test_seconds"}
    assert all(set(row) == columns and row["seconds"] > 0 for row in rows)
    assert arm["best"]["test_accuracy"] == max(row["test_accuracy"] for row in rows)
    assert arm["last"] == {"epoch": 2, "test_accuracy": rows[1]["test_accuracy"]}
    assert (arm["settings"]["train"], arm["settings"]["test"]) == (TRAIN, TEST)
    assert arm["bytes"]["total"] == sum(arm["bytes"]["files"].values()) > 0


def check_bytes(arms, work):
    dense, masks = arms["dense"], arms[MASKS]
    file = next(work.glob("work/tiny*/dense/model.safetensors"))
    assert dense["bytes"]["files"] == {"model.safetensors": file.stat().st_size}
    assert dense["published"] == {"accuracy": 94.01, "figure": True}
    assert masks["published"]["accuracy"] == 88.89
    assert "adapter_config.json" in masks["bytes"]["files"]
    # width 8, depth 1: stem 96, 8*25, 8*8, head 80; three norms of 2*8 - scores beside norms
    assert dense["trained"] == masks["trained"] == 96 + 200 + 64 + 80 + 48


def test_best_is_the_first_of_the_best_epochs():
    arm = arms.Arm("a", nn.Linear(1, 1), rules.Rule("sgd", 1.0, "cosine", 1), Path(), {})
    arm.stored = dict
    arm.ways = dict
    arm.history = [{"epoch": i + 1, "test_accuracy": a} for i, a in enumerate([1.0, 9.0, 9.0, 4.0])]
    found = result.summary(arm, {"accuracy": 8.5})
    assert found["best"] == {"epoch": 2, "test_accuracy": 9.0}
    assert found["last"] == {"epoch": 4, "test_accuracy": 4.0}


def test_table_shows_best_last_and_difference():
    row = {"epoch": 3, "train_loss": 1.0, "test_accuracy": 80.0, "seconds": 2.0}
    arm = {"best": row, "last": row | {"test_accuracy": 79.5}, "history": [row]}
    arm |= {"published": {"accuracy": 88.89}, "bytes": {"total": 1234}}
    given = {"recipe": "r", "case": "c", "note": "epochs: 3 of the paper's 100", "arms": {"m": arm}}
    out = io.StringIO()
    Console(file=out, width=200).print(result.compare(given))
    text = out.getvalue()
    for cell in ("80.00 (3)", "79.50", "88.89", "-8.89", "1,234", "2.0", "3 of the paper's 100"):
        assert cell in text


def test_every_seed_has_a_result_and_networks_of_its_own(options):
    found = finished(tiny(), dataclasses.replace(options, seeds=(0, 1), epochs=1))
    assert list(found) == ["tiny-e1-s0", "tiny-e1-s1"]
    losses = [one["arms"]["dense"]["history"][0]["train_loss"] for one in found.values()]
    assert losses[0] != losses[1]


def test_length_and_precision_are_the_options_or_the_cases_or_the_papers(options):
    plain = dataclasses.replace(options, epochs=None, precision=None)
    recipe = tiny()
    run = running(recipe, plain)
    assert (run.epochs, run.precision) == (100, "bf16")
    case = dataclasses.replace(recipe.cases["tiny"], epochs=7, precision="fp32")
    recipe = dataclasses.replace(recipe, cases={"tiny": case})
    run = running(recipe, plain)
    assert (run.epochs, run.precision, run.label) == (7, "fp32", "tiny-e7-s3")
    assert running(recipe, options).epochs == 2


def test_arms_that_would_see_other_batches_are_refused(options):
    recipe = tiny("dense", MASKS)
    case = dataclasses.replace(recipe.cases["tiny"], rules={MASKS: {"batch": 8}})
    with pytest.raises(RecipeError, match=r"'dense' and 'rp_1e-2' differ in \['batch'\]"):
        running(dataclasses.replace(recipe, cases={"tiny": case}), options)


def test_scores_apart_resume_to_the_same_bits_and_batches_can_be_whole(options, tmp_path, cache):
    """An arm's own rule, an optimizer for scores, and 4 whole batches of 9 in 40 rows."""
    recipe = tiny(MASKS)
    case = recipe.cases["tiny"]
    rule = case.rule | {"whole_batches": True, "schedule": "one_cycle"}
    scores = {MASKS: {"scores": {"optimizer": "sgd", "lr": 3.0, "momentum": 0.9}}}
    case = dataclasses.replace(case, rule=rule, rules=scores)
    recipe = dataclasses.replace(recipe, cases={"tiny": case})
    whole = running(recipe, dataclasses.replace(options, work=placed(tmp_path / "whole", cache)))
    whole.go()
    cut = running(recipe, options)
    stop_after(cut, 3)
    with pytest.raises(KeyboardInterrupt, match="3 of 4 steps of epoch 1"):
        cut.go()
    resumed = running(recipe, dataclasses.replace(options, resume=True))
    resumed.go()
    (one,), (other,) = whole.arms, resumed.arms
    assert same(one.tensors(), other.tensors())
    states = [arm.optimizers["scores"].state_dict()["state"] for arm in (one, other)]
    assert len(states[0]) == 4
    for key, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][key]["momentum_buffer"])


def test_another_kind_of_training_has_the_methods_of_classification(options):
    class Fit:
        sizes = {"train": 3, "test": 1}  # noqa: RUF012

        def on(self, device):
            return self

        def rows(self, rule):
            return 3

        def batches(self, rule, advance):
            return [(torch.ones(3, 2), torch.zeros(3))]

        def loss(self, forward, batch):
            return forward(batch[0]).square().mean()

        def accuracy(self, forward):
            return 100 - float(forward(torch.ones(1, 2)).detach().square())

        def prepare(self, inputs):
            return inputs

    run = runner.Runner(tiny(), options, 0, Fit(), quiet())
    run.add("line", lambda: nn.Linear(2, 1), rules.Rule("sgd", 0.1, "cosine", 3), {})
    run.go()
    first, last = run.arms[0].history
    assert last["test_accuracy"] > first["test_accuracy"]


def test_minutes_that_are_over_stop_a_run_that_goes_on_to_the_same_bits(options, tmp_path, cache):
    recipe = tiny("dense", MASKS)
    whole = running(recipe, dataclasses.replace(options, work=placed(tmp_path / "whole", cache)))
    whole.go()
    given = dataclasses.replace(options, minutes=1e-9)
    for calls in range(20):  # a step each: two arms, two epochs of five
        given = dataclasses.replace(given, resume=calls > 0, until=float("inf"))
        run = running(recipe, given)
        assert sum(arm.epoch * 5 + arm.step for arm in run.arms) == calls
        with pytest.raises(TimeIsUp, match="of 5 steps of epoch"):
            run.go()
    run = running(recipe, dataclasses.replace(given, until=float("inf")))
    run.go()
    for one, other in zip(whole.arms, run.arms, strict=True):
        assert same(one.tensors(), other.tensors())
        assert [timeless(row) for row in one.history] == [timeless(row) for row in other.history]


def test_what_replaces_options_keeps_their_deadline(options):
    given = dataclasses.replace(options, minutes=5)
    assert dataclasses.replace(given, work=options.work / "other").until == given.until
    assert 0 < given.until - time.monotonic() <= 300
    assert options.until == float("inf")
    with pytest.raises(RecipeError, match=r"minutes=0; give more than 0"):
        dataclasses.replace(options, minutes=0)


def test_compiled_networks_and_other_layouts_learn_the_same(options, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found = []
    for number, changes in enumerate([{}, {"compile": True}, {"layout": "contiguous"}]):
        work = placed(tmp_path / str(number), cache)
        run = running(tiny("dense", MASKS), dataclasses.replace(options, work=work, **changes))
        run.go()
        found.append(run.arms)
    for one, other in ((0, 1), (0, 2)):
        for a, b in zip(found[one], found[other], strict=True):
            losses = [[row["train_loss"] for row in arm.history] for arm in (a, b)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert found[1][0].call is not found[1][0].model


def test_compiled_runs_have_no_dynamic_graphs_and_resume_to_the_same_bits(
    options, tmp_path, cache, monkeypatch
):
    """An epoch of 40 rows ends with a batch of 4, and a test has 12."""
    rows = []

    def backend(graph, inputs):
        rows.extend(size for one in inputs if isinstance(one, torch.Tensor) for size in one.shape)
        rows.extend(one for one in inputs if isinstance(one, torch.SymInt))
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    recipe, options = tiny("dense", MASKS), dataclasses.replace(options, compile=True)
    whole = running(recipe, dataclasses.replace(options, work=placed(tmp_path / "whole", cache)))
    whole.go()
    cut = running(recipe, options)
    stop_after(cut, 7)
    with pytest.raises(KeyboardInterrupt, match="2 of 5 steps of epoch 1"):
        cut.go()
    resumed = running(recipe, dataclasses.replace(options, resume=True))
    resumed.go()
    for one, other in zip(whole.arms, resumed.arms, strict=True):
        assert same(one.tensors(), other.tensors())
        assert [timeless(row) for row in one.history] == [timeless(row) for row in other.history]
    assert {4, 9, 12} <= set(rows)
    assert all(type(size) is int for size in rows)


def test_a_run_on_a_cpu_keeps_freed_memory(options, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: calls.append(1))
    running(tiny(), options).go()
    assert calls == [1]


def test_chosen_arms_have_a_result_of_their_own(options):
    recipe = tiny("dense", MASKS)
    found = finished(recipe, dataclasses.replace(options, arms=(MASKS,)))
    assert list(found) == [f"tiny-e2-s3-{MASKS}"]
    assert list(found[f"tiny-e2-s3-{MASKS}"]["arms"]) == [MASKS]
    both = finished(recipe, dataclasses.replace(options, resume=True))
    (alone,), (together,) = found.values(), both.values()
    assert alone["arms"][MASKS]["history"] == together["arms"][MASKS]["history"]


def test_a_pruned_arm_is_the_cases_network_pruned(options):
    recipe = dataclasses.replace(tiny(), arms={"pruned": {"prune": "random", "sparsity": 0.5}})
    run = running(recipe, options)
    (arm,) = run.arms
    torch.manual_seed(3)
    plain = recipe.network("tiny")
    assert torch.equal(arm.model[0].weight_orig, plain[0].weight)
    run.go()
    assert int((arm.model[0].weight == 0).sum()) == 48  # of 96
    assert arm.unique == 96 + 200 + 64 + 80


def test_bytes_in_every_way(options):
    found = finished(tiny("dense", MASKS, "mp"), dataclasses.replace(options, epochs=1))
    ((_, one),) = found.items()
    largest = 8 * 25  # the depthwise layer
    for name, unique in ((MASKS, int(largest / 100) + 1), ("mp", largest)):
        arm = one["arms"][name]
        ways = arm["bytes"]["ways"]
        assert arm["unique"] == unique
        assert ways["from the seed, bits"] == arm["bytes"]["total"]
        assert ways["with the prototype"] == ways["from the seed, bits"] + 4 * unique
        assert set(ways) == {
            "with the prototype", "from the seed, bits", "from the seed, entropy",
            "from the seed, context",
        }  # fmt: skip
    assert one["arms"]["dense"]["unique"] == 96 + 200 + 64 + 80
    assert list(one["arms"]["dense"]["bytes"]["ways"]) == ["stored"]
