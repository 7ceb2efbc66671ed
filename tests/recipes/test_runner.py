"""Recipes: the paper's rules against slow oracles, resumed runs bit by bit, the result's values."""

import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision.transforms import v2

from pemn_surgery import recipe as recipes
from pemn_surgery.errors import RecipeError

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "cifar10_rp"
RECIPE = recipes.load(FOLDER)
MODELS, DATA, RUN = (RECIPE.module(name) for name in ("models", "data", "run"))
MASKS = "masks (rp 1e-2)"
TRAIN, TEST = 40, 12


@pytest.fixture(scope="module")
def cache(images, tmp_path_factory):
    """A work folder into which the pictures have been decoded."""
    work = tmp_path_factory.mktemp("cache")
    DATA.load(str(images), work, "img", "label")
    return work


@pytest.fixture
def decoded(images, cache):
    """The decoded pictures."""
    return DATA.load(str(images), cache, "img", "label")


def tiny(*arms, case="convmixer_d6_h256"):
    """The recipe with a network and batches small enough for a test: 5 steps an epoch."""
    given = RECIPE.cases[case]
    arguments = {"depth": 8} if given.factory == "resnet" else {"width": 8, "depth": 1}
    small = dataclasses.replace(given, arguments=arguments, rule=given.rule | {"batch": 9})
    chosen = {name: RECIPE.arms[name] for name in arms or ("dense",)}
    return dataclasses.replace(RECIPE, arms=chosen, cases={"tiny": small})


@pytest.fixture
def options(images, tmp_path, cache):
    """Options of a two-epoch run in fp32, its data already decoded."""
    work = placed(tmp_path / "work", cache)
    return recipes.Options(
        case="tiny", epochs=2, work=work, data=str(images), seed=3, precision="fp32"
    )


def placed(work, cache):
    """A work folder with the decoded pictures in it."""
    work.mkdir()
    shutil.copy(next(cache.glob("decoded-*.pt")), work)
    return work


def quiet():
    return Console(file=io.StringIO(), width=200)


def oracle_triangle(lr, step, steps, epochs):
    """ConvMixer's CIFAR-10 code: interpolate the epoch, the step under way counted as done."""
    epoch, within = divmod(step, steps)
    now = epoch + (within + 1) / steps
    return np.interp(now, [0, 0.4 * epochs, 0.8 * epochs, epochs], [0, lr, lr / 20, 0])


@pytest.mark.parametrize(("epochs", "steps"), [(100, 98), (10, 98), (1, 7), (3, 1)])
def test_triangle_is_the_papers_interpolation(epochs, steps):
    total = epochs * steps
    ours = [RUN.triangle(0.05, i, total) for i in range(total)]
    oracle = [oracle_triangle(0.05, i, steps, epochs) for i in range(total)]
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-12)
    assert ours[-1] == 0


@pytest.mark.parametrize("steps", [1, 5, 196])
def test_cosine_is_torchs_cosine_annealing(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    oracle = []
    for _ in range(steps):
        oracle.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [RUN.cosine(0.1, i, steps) for i in range(steps)]
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 150, 500])
def test_warm_cosine_is_a_line_before_a_cosine(steps):
    warm = max(round(steps * 40 / 150), 1)
    line = [50 * (i + 1) / warm for i in range(warm)]
    fall = [25 * (1 + np.cos(np.pi * i / (steps - warm))) for i in range(steps - warm)]
    ours = [RUN.warm_cosine(50.0, i, steps) for i in range(steps)]
    np.testing.assert_allclose(ours, line + fall, rtol=0, atol=1e-12)
    assert max(ours) == 50
    assert min(ours) > 0


def test_rules_are_the_papers():
    conv, res = (RECIPE.cases[name].rule for name in ("convmixer_d6_h256", "resnet32"))
    assert conv == {
        "optimizer": "adamw", "lr": 0.05, "weight_decay": 0.005, "schedule": "triangle",
        "batch": 512, "augmentation": "convmixer",
    }  # fmt: skip
    assert res == {
        "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
        "schedule": "cosine", "batch": 256, "augmentation": "resnet",
    }  # fmt: skip
    assert RECIPE.arms == {"dense": {}, MASKS: {"bank": "rp", "ratio": 0.01}}
    assert RECIPE.paper_epochs == 100
    published = {name: case.published[MASKS]["accuracy"] for name, case in RECIPE.cases.items()}
    assert published == {"convmixer_d6_h256": 88.89, "resnet32": 86.39}


@pytest.mark.parametrize(
    ("case", "masked", "norms"),
    [
        # stem 3*256*4, six of 256*25 + 256*256, head 2560; 13 norms of 2*256
        ("convmixer_d6_h256", 3072 + 6 * (6400 + 65536) + 2560, 13 * 512),
        # stem 432, 10 of 16*16*9, 16*32*9 + 9 of 32*32*9, 32*64*9 + 9 of 64*64*9, head 640
        ("resnet32", 432 + 23040 + 4608 + 82944 + 18432 + 331776 + 640, 2 * (11 * 16 + 960)),
    ],
)
def test_parameter_counts(case, masked, norms):
    given = RECIPE.cases[case]
    model = getattr(MODELS, given.factory)(**given.arguments)
    sizes = {True: 0, False: 0}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            sizes[isinstance(module, nn.BatchNorm2d)] += p.numel()
            assert isinstance(module, nn.BatchNorm2d) or name == "weight"
    assert sizes == {False: masked, True: norms}
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_subsamples_and_pads_with_zeros():
    block = MODELS.BasicBlock(16, 32).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("depth", [2, 31, 33])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 2"):
        MODELS.resnet(depth)


def test_papers_resized_crop_is_the_identity_on_32x32():
    x = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    crop = v2.RandomResizedCrop(32, scale=(1, 1), ratio=(1, 1))
    assert all(torch.equal(crop(x), x) for _ in range(20))


def test_crop_and_flip_gives_crops_and_flips():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (30, 3, 6, 5), dtype=torch.uint8)
    y = DATA.crop_and_flip(x, pad=2)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    places, flips = set(), 0
    for i in range(30):
        crops = {(r, c): padded[i, :, r : r + 6, c : c + 5] for r in range(5) for c in range(5)}
        plain = [at for at, crop in crops.items() if torch.equal(crop, y[i])]
        flipped = [at for at, crop in crops.items() if torch.equal(crop.flip(2), y[i])]
        assert len(plain) + len(flipped) == 1
        places |= {*plain, *flipped}
        flips += len(flipped)
    assert 5 < flips < 25
    assert {r for r, _ in places} == {c for _, c in places} == set(range(5))


def test_augmentations_keep_shape_type_and_follow_the_seed():
    x = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    drawn = []
    for name in ("convmixer", "resnet"):
        for _ in range(2):
            torch.manual_seed(5)
            drawn.append(torch.cat(list(DATA.augment(name, x))))
    assert all(y.shape == x.shape and y.dtype == torch.uint8 for y in drawn)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], x)
    assert torch.equal(next(DATA.augment("none", x)), x)
    with pytest.raises(RecipeError, match="'other' is unknown"):
        next(DATA.augment("other", x))


def test_decoding_keeps_pixels_labels_and_order(decoded):
    for split, n in (("train", TRAIN), ("test", TEST)):
        images, labels = decoded[split]
        pixels = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert labels.tolist() == [i % 10 for i in range(n)]


def test_decoding_names_missing_columns(images, tmp_path):
    with pytest.raises(RecipeError, match=r"lacks the columns \['image'\]; it has"):
        DATA.load(str(images), tmp_path, "image", "label")


def test_normalise_is_torchvisions():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    oracle = v2.functional.normalize(x / 255, list(DATA.MEAN), list(DATA.STD))
    torch.testing.assert_close(DATA.normalise(x), oracle)


@pytest.mark.parametrize("case", ["convmixer_d6_h256", "resnet32"])
def test_every_step_takes_the_schedules_rate(case, options):
    recipe = tiny(case=case)
    run = RUN.Run(recipe, options, quiet())
    seen = []
    optimizer = run.arms[0].optimizer
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    run.go()
    rule = recipe.cases["tiny"].rule
    lr = RUN.SCHEDULES[rule["schedule"]]
    assert seen == [lr(rule["lr"], i, 10) for i in range(10)]
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == rule["weight_decay"]
    assert group.get("momentum") == rule.get("momentum")


def test_arms_see_the_same_batches_and_each_image_once(options):
    recipe = dataclasses.replace(tiny(), arms={"dense": {}, "again": {}})
    run = RUN.Run(recipe, options, quiet())
    run.go()
    first, second = run.arms
    assert all(torch.equal(a, second.tensors()[n]) for n, a in first.tensors().items())
    labels = torch.cat([y for _, y in run._batches(1, RUN.Progress(console=quiet()))])
    assert labels.bincount().tolist() == [4] * 10


def stop_after(run, steps):
    """Send Ctrl-C while the given step is under way."""
    left = iter(range(steps - 1, -1, -1))

    def count(*_):
        if next(left) == 0:
            signal.raise_signal(signal.SIGINT)

    for arm in run.arms:
        arm.optimizer.register_step_pre_hook(count)


@pytest.mark.parametrize("arms", [("dense",), ("dense", MASKS)], ids=len)
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_interrupted_run_resumes_to_the_same_bits(steps, arms, options, tmp_path, cache):
    recipe = tiny(*arms)
    elsewhere = dataclasses.replace(options, work=placed(tmp_path / "whole", cache))
    whole = RUN.Run(recipe, elsewhere, quiet())
    whole.go()
    handler = signal.getsignal(signal.SIGINT)
    cut = RUN.Run(recipe, options, quiet())
    stop_after(cut, steps)
    with pytest.raises(KeyboardInterrupt, match=r"stopped: .* of 5 steps of epoch"):
        cut.go()
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = RUN.Run(recipe, dataclasses.replace(options, resume=True), quiet())
    assert sum(arm.epoch * 5 + arm.step for arm in resumed.arms) == steps
    resumed.go()
    for one, other in zip(whole.arms, resumed.arms, strict=True):
        assert same(one.tensors(), other.tensors())
        assert same(flat(one.optimizer), flat(other.optimizer))
        assert [timeless(row) for row in one.history] == [timeless(row) for row in other.history]


def flat(optimizer):
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, kept in state.items() for k, v in kept.items()}


def same(these, those):
    return these.keys() == those.keys() and all(torch.equal(t, those[n]) for n, t in these.items())


def timeless(row):
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_finished_run_resumes_to_its_result(options):
    first = recipes.run(tiny(), options, quiet())
    again = recipes.run(tiny(), dataclasses.replace(options, resume=True), quiet())
    assert again["arms"] == first["arms"]


def test_accuracy_is_the_share_of_right_answers(options):
    run = RUN.Run(tiny(), options, quiet())
    arm = run.arms[0]
    images, labels = run.test
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
    recipes.run(tiny(), options, quiet())
    with pytest.raises(RecipeError, match=message):
        recipes.run(tiny(), dataclasses.replace(options, **change), quiet())


def test_a_trial_says_that_it_is_one(options):
    given = dataclasses.replace(options, limit=10, epochs=1)
    result = recipes.run(tiny(), given, quiet())
    assert result["note"] == "epochs: 1 of the paper's 100; a trial on 10 images of each split"
    assert given.label == "tiny-e1-s3-limit10"
    assert result["arms"]["dense"]["settings"]["train"] == 10


def test_global_generator_is_left_as_it_was(options):
    before = torch.get_rng_state()
    recipes.run(tiny(), options, quiet())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_result_holds_what_is_needed_to_judge_it(precision, options, tmp_path, images):
    given = dataclasses.replace(options, precision=precision)
    result = recipes.run(tiny("dense", MASKS), given, quiet())
    assert json.loads(json.dumps(result)) == result
    text = json.dumps(result)
    assert str(tmp_path) not in text
    assert str(images) not in text
    assert set(result) == {
        "schema", "recipe", "claim", "paper", "case", "command", "date", "seed", "epochs",
        "note", "machine", "versions", "arms",
    }  # fmt: skip
    assert result["note"] == "epochs: 2 of the paper's 100"
    assert result["epochs"] == {"run": 2, "paper": 100}
    assert result["command"] == (
        f"python recipes/cifar10_rp run --work WORK --case tiny --epochs 2 "
        f"--data .../{images.name} --seed 3 --precision {precision} --device cpu"
    )
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert list(result["arms"]) == ["dense", MASKS]
    for arm in result["arms"].values():
        check_arm(arm)
    check_bytes(result["arms"], tmp_path)


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
    assert dense["published"] is None
    assert masks["published"]["accuracy"] == 88.89
    assert "adapter_config.json" in masks["bytes"]["files"]
    # width 8, depth 1: stem 96, 8*25, 8*8, head 80; three norms of 2*8 - scores beside norms
    assert dense["trained"] == masks["trained"] == 96 + 200 + 64 + 80 + 48


def test_best_is_the_first_of_the_best_epochs():
    arm = recipes.Arm("a", nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), Path(), {})
    arm.stored = dict
    arm.history = [{"epoch": i + 1, "test_accuracy": a} for i, a in enumerate([1.0, 9.0, 9.0, 4.0])]
    found = arm.summary({"accuracy": 8.5})
    assert found["best"] == {"epoch": 2, "test_accuracy": 9.0}
    assert found["last"] == {"epoch": 4, "test_accuracy": 4.0}


def test_table_shows_best_last_and_difference():
    row = {"epoch": 3, "train_loss": 1.0, "test_accuracy": 80.0, "seconds": 2.0}
    arm = {"best": row, "last": row | {"test_accuracy": 79.5}, "history": [row]}
    arm |= {"published": {"accuracy": 88.89}, "bytes": {"total": 1234}}
    given = {"recipe": "r", "case": "c", "note": "epochs: 3 of the paper's 100", "arms": {"m": arm}}
    out = io.StringIO()
    Console(file=out, width=200).print(recipes.compare(given))
    text = out.getvalue()
    for cell in ("80.00 (3)", "79.50", "88.89", "-8.89", "1,234", "2.0", "3 of the paper's 100"):
        assert cell in text


def test_command_line_shows_written_results(tmp_path, capsys):
    main = RECIPE.module("__main__").COMMAND.main
    assert main(["--results", str(tmp_path), "show"]) == 0
    assert "the verb run writes one" in " ".join(capsys.readouterr().out.split())
    assert main(["run", "--case", "resnet32", "--epochs", "0", "--work", str(tmp_path)]) == 1
    assert "epochs=0; give 1 or more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "TOMLDecodeError"),
        ("name = 'x'", "KeyError"),
        ("[cases.a]\nfactory = 'f'", r"missing .* 'arguments' and 'rule'"),
    ],
)
def test_a_broken_recipe_is_refused_with_its_reason(text, message, tmp_path):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(tmp_path)


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.toml cannot be read"):
        recipes.load(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="'other' is unknown; cifar10_rp has"):
        RECIPE.case("other")
    with pytest.raises(RecipeError, match="the recipe cifar10_rp needs it"):
        RECIPE.module("absent")
    with pytest.raises(RecipeError, match=r"'lamb' in a rule is unknown; give one of \['adamw'"):
        RUN.Rule(**RECIPE.cases["resnet32"].rule | {"optimizer": "lamb"})


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"precision": "fp16"}])
def test_options_refuse_what_cannot_run(wrong, options):
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))}="):
        dataclasses.replace(options, **wrong)
