"""The recipe on permuted digits: a small run counted anew, and the README's figures."""

import dataclasses
import io
import json
import statistics
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from pemn_surgery import infer_task
from pemn_surgery import recipe as recipes
from pemn_surgery.errors import RecipeError

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "supsup_permuted_digits"
RECIPE = recipes.load(FOLDER)
RUN = RECIPE.module("run")
RESULTS = {
    path.name: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((FOLDER / "results").glob("*.json"))
}

ASKED = {
    "one_shot": {"method": "one_shot"},
    "binary": {"method": "binary"},
    "one_shot, G": {"method": "one_shot", "objective": "spare_outputs", "classes": 10},
    "binary, G": {"method": "binary", "objective": "spare_outputs", "classes": 10},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two seeds of four tasks, a few epochs: the result, its options and where the files are."""
    work = tmp_path_factory.mktemp("work")
    given = {"epochs": 3, "tasks": 4, "seeds": (0, 1), "sizes": (2, 5), "dense_tasks": 1}
    options = RUN.Options(work=work, **given)
    return run(options), options, work


def run(options):
    ((label, found),) = RUN.run(RECIPE, options, Console(file=io.StringIO()))
    assert label == "outputs_100-t4-e3"
    return found


def loaded(folder):
    names = [f"task{number:03d}" for number in range(4)]
    network = RECIPE.network("outputs_100")
    model = PeftModel.from_pretrained(network, folder / f"masks_{names[0]}", adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / f"masks_{name}"), name)
    return model.eval(), names


@pytest.mark.parametrize("place", [0, 1])
def test_rows_are_what_counting_one_by_one_gives(small, place):
    result, options, work = small
    seed = options.seeds[place]
    model, names = loaded(work / f"outputs_100-e3-s{seed}")
    data = RUN.digits(seed, 4)
    rows = {(row["task"], row["batch"]): row for row in result["seeds"][place]["rows"]}
    assert set(rows) == {("given", 450), *((asked, b) for asked in ASKED for b in (2, 5))}
    right = 0
    for task, name in enumerate(names):
        model.set_adapter(name)
        for image, label in zip(*data.test, strict=True):
            right += int(model(image[data.permutations[task]][None]).argmax()) == int(label)
    assert rows["given", 450]["accuracy"] == pytest.approx(right / 1800)
    for (asked, size), row in rows.items():
        if asked == "given":
            continue
        generator = torch.Generator().manual_seed(seed)
        found = correct = 0
        for task in [0, 1, 2, 3] * 2:
            chosen = torch.randperm(450, generator=generator)[:size].tolist()
            images = torch.stack([data.test[0][i][data.permutations[task]] for i in chosen])
            guess = infer_task(model, images, **ASKED[asked]).name
            model.set_adapter(guess)
            hits = [model(images).argmax(1)[j] == data.test[1][i] for j, i in enumerate(chosen)]
            found += guess == names[task]
            correct += sum(map(int, hits)) if guess == names[task] else 0
        assert (row["found"], row["accuracy"]) == (found / 8, correct / (8 * size))


def test_summary_is_mean_and_sample_deviation(small):
    result, *_ = small
    assert len(result["summary"]) == 2 + 2 * len(ASKED)
    for place, row in enumerate(result["summary"][1:]):
        values = [seed["rows"][place]["accuracy"] for seed in result["seeds"]]
        assert row["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert row["accuracy"]["std"] == pytest.approx(statistics.stdev(values))
    assert result["summary"][0]["task"] == "dense, given"


def test_a_task_is_masks_alone_and_its_bytes_are_the_files(small):
    result, _, work = small
    folder = work / "outputs_100-e3-s0"
    stored = load_file(folder / "masks_task003" / "adapter_model.safetensors")
    assert len(stored) == 3
    assert all(name.endswith(".bits") for name in stored)
    weights = 64 * 300 + 300 * 100 + 100 * 100
    assert sum(t.numel() - 32 for t in stored.values()) == weights // 8
    sizes = result["seeds"][0]["bytes"]
    assert sizes["masks"] == sum(
        f.stat().st_size for f in (folder / "masks_task000").glob("*.[js]*")
    )
    assert sizes["dense"] == (folder / "dense_task000" / "model.safetensors").stat().st_size
    assert 4 * weights < sizes["dense"] < 4 * weights + 1000


def test_tasks_differ_and_seeds_decide_them():
    data, again, other = RUN.digits(0, 60), RUN.digits(0, 60), RUN.digits(1, 60)
    assert len({tuple(p.tolist()) for p in data.permutations}) == 60
    assert all(sorted(p.tolist()) == list(range(64)) for p in data.permutations)
    assert torch.equal(data.test[0], again.test[0])
    assert torch.equal(data.permutations[59], again.permutations[59])
    assert not torch.equal(data.test[0], other.test[0])
    assert (len(data.train[1]), len(data.test[1])) == (1347, 450)
    assert data.train[0].min() == 0
    assert data.train[0].max() == 1


@pytest.mark.parametrize(
    "wrong", [{"tasks": 0}, {"repeats": 0}, {"seeds": ()}, {"sizes": (0,)}, {"dense_tasks": 101}]
)
def test_options_refuse_what_cannot_run(wrong, tmp_path):
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))}.*give 1 "):
        RUN.Options(work=tmp_path, **wrong)


def timeless(found):
    seeds = [{k: v for k, v in seed.items() if k != "seconds"} for seed in found["seeds"]]
    for seed in seeds:
        seed["rows"] = [row | {"seconds_a_batch": 0} for row in seed["rows"]]
    return seeds


def test_a_finished_run_resumes_to_its_result_and_is_not_overwritten(small):
    result, options, _ = small
    with pytest.raises(RecipeError, match="exists; resume that run"):
        run(options)
    assert timeless(run(dataclasses.replace(options, resume=True))) == timeless(result)


def test_without_spare_outputs_the_entropy_alone_is_asked(tmp_path):
    given = {"epochs": 1, "tasks": 2, "seeds": (0,), "sizes": (1,), "dense_tasks": 1, "limit": 64}
    options = RUN.Options(work=tmp_path, case="outputs_10", **given)
    ((_, found),) = RUN.run(RECIPE, options, Console(file=io.StringIO()))
    assert [row["task"] for row in found["seeds"][0]["rows"]] == ["given", "one_shot", "binary"]


def test_a_trial_cuts_both_splits():
    data = RUN.digits(0, 2, limit=30)
    assert [len(labels) for _, labels in (data.train, data.test)] == [30, 30]
    assert torch.equal(data.test[0], RUN.digits(0, 2).test[0][:30])


def percent(spread):
    return f"{100 * spread['mean']:.2f} ({100 * spread['std']:.2f})"


def test_readme_figures_are_those_of_the_results():
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    assert set(RESULTS) == {f"outputs_{n}.json" for n in ("100-t100", "100-t30", "10-t50")}
    for file, result in RESULTS.items():
        assert result["tasks"] >= 30
        assert len(result["seeds"]) >= 3
        for line in result["summary"]:
            found = percent(line["found"]) if "given" not in line["task"] else "given"
            cells = [line["task"].removesuffix(", given"), str(line["batch"])]
            start = [result["case"], str(result["tasks"])]
            wanted = [*start, *cells, found, percent(line["accuracy"])]
            assert wanted in rows, wanted
        sizes = result["seeds"][0]["bytes"]
        ratio = f"{sizes['dense'] / sizes['masks']:.1f} x"
        label = file.removesuffix(".json")
        assert [label, f"{sizes['dense']:,}", f"{sizes['masks']:,}", ratio] in rows
