"""Which models and adapters the commands take: names on the hub, tasks, arguments."""

import json
import shutil

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.commands import building, cli
from pemn_surgery.commands.common import hub_file, hub_name
from pemn_surgery.errors import HubError
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

REVISION, OLDER = f"{1:040x}", f"{2:040x}"


def run(capsys, *words, expect=0):
    assert cli.main([str(word) for word in words]) == expect
    captured = capsys.readouterr()
    return captured.err if expect else captured.out


def put(cache, name, fill, revision=REVISION, reference="main"):
    """Fill a repository of the hub's local cache."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / reference).write_text(revision)
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    fill(snapshot)


def bert(seed=0, **sizes):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, **sizes,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def resnet(classes=4):
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=classes)


def save_timm(folder):
    """A folder as timm pushes it to the hub."""
    timm.models.save_for_hf(resnet(), str(folder), model_args={"num_classes": 4})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of the hub with two bases and two adapters, and what was trained."""
    cache = tmp_path_factory.mktemp("hub")
    tuned = pemnify(bert(num_labels=3), bank="own", task_type="SEQ_CLS", density=0.3)
    images = models.train(pemnify(resnet(), bank="own", selector="topk", seed=3))
    put(cache, "me/bert", bert(num_labels=3).save_pretrained)
    put(cache, "me/images", save_timm)
    put(cache, "timm/images", save_timm)
    put(cache, "me/sst2", tuned.save_pretrained)
    images.add_adapter("second", PemnConfig(bank="own", density=0.7))
    put(cache, "me/tasks", images.save_pretrained)
    put(cache, "me/tasks", images.save_pretrained, OLDER, "older")
    shutil.rmtree(cache / "models--me--tasks" / "snapshots" / OLDER / "second")
    return cache, tuned, images


@pytest.fixture
def hub(made, monkeypatch):
    """The cache in place, and no way to the hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(made[0]))
    monkeypatch.setenv("COLUMNS", "500")
    return made


@pytest.mark.parametrize("name", ["me/images", "timm/images", "hf-hub:me/images", "me/images@main"])
def test_plan_of_a_timm_name_on_the_hub(name, hub, capsys):
    found = json.loads(run(capsys, "plan", name, "--bank", "rp", "--json"))
    expected = plan(resnet(), bank="rp").as_dict()
    assert found["totals"] == expected["totals"]
    assert found["targets"] == json.loads(json.dumps(expected["targets"]))


def test_plan_of_a_transformers_name_on_the_hub(hub, capsys):
    found = json.loads(run(capsys, "plan", "me/bert", "--json"))
    expected = plan(bert(num_labels=3), bank="mp").as_dict()
    assert [item["path"] for item in found["targets"]] == [
        item["path"] for item in expected["targets"]
    ]
    assert found["totals"]["masked_weights"] == expected["totals"]["masked_weights"]


def test_inspect_of_a_name_on_the_hub(hub, capsys):
    _, tuned, images = hub
    found = json.loads(run(capsys, "inspect", "me/sst2", "--json"))
    assert {item["name"]: item["density"] for item in found["masks"]} == {
        name: float(mask.double().mean()) for name, mask in models.masks(tuned).items()
    }
    images.set_adapter("second")
    found = json.loads(run(capsys, "inspect", "me/tasks/second", "--json"))
    assert len(found["masks"]) == len(models.masks(images)) > 0
    assert all(abs(item["density"] - 0.7) < 0.01 for item in found["masks"])


def test_diff_of_names_on_the_hub(hub, capsys):
    found = json.loads(run(capsys, "diff", "me/tasks", "me/tasks@older", "--json"))
    assert found["total"]["jaccard"] == 1
    found = json.loads(run(capsys, "diff", "me/tasks", "me/tasks/second", "--json"))
    assert 0 < found["total"]["jaccard"] < 1


def test_pack_of_a_name_on_the_hub_needs_a_place(hub, tmp_path, capsys):
    models.says(run(capsys, "pack", "me/tasks", expect=2), "'me/tasks'", "--out")
    found = json.loads(run(capsys, "pack", "me/tasks", "--out", tmp_path / "small", "--json"))
    size = (tmp_path / "small" / models.WEIGHTS_FILE).stat().st_size
    assert found["bytes"] == size
    small = json.loads(run(capsys, "inspect", tmp_path / "small", "--json"))
    whole = json.loads(run(capsys, "inspect", "me/tasks", "--json"))
    assert small["config"]["coding"] == "entropy"
    assert [one["density"] for one in small["masks"]] == [one["density"] for one in whole["masks"]]


@pytest.mark.parametrize("name", ["me/images", "hf-hub:timm/images"])
def test_merge_of_names_on_the_hub(name, hub, tmp_path, capsys):
    """With the hub's weights, which masks on the model's own need."""
    images = hub[2]
    images.set_adapter("default")
    said = json.loads(run(capsys, "merge", "me/tasks", name, "--out", tmp_path, "--json"))
    assert said == {"out": str(tmp_path), "format": "safetensors"}
    plain = resnet()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    x = models.images(4, size=32)
    models.assert_equal(models.logits(plain, x), models.logits(images, x))


def test_merge_of_transformers_names_on_the_hub(hub, tmp_path, capsys):
    run(capsys, "merge", "me/sst2", "me/bert", "--out", tmp_path)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path))
    assert_same(merged, hub[1])


def assert_same(merged, tuned):
    ids = models.tokens(5)
    with torch.no_grad():
        expected = tuned.eval()(input_ids=ids).logits
        models.assert_equal(merged.eval()(input_ids=ids).logits, expected)


OFFLINE = [
    ["plan", "me/none"],
    ["plan", "timm/none"],
    ["plan", "hf-hub:me/none"],
    ["plan", "me/bert@none"],
    ["inspect", "me/none"],
    ["inspect", "me/tasks/third"],
    ["inspect", "me/bert"],
    ["diff", "me/tasks", "me/none"],
    ["pack", "me/none", "--out", "small"],
    ["unpack", "me/none", "--out", "small"],
    ["merge", "me/none", "me/bert", "--out", "merged"],
    ["merge", "me/sst2", "me/none", "--out", "merged"],
]


@pytest.mark.parametrize("words", OFFLINE, ids=" ".join)
def test_offline_it_says_so_in_a_line(words, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run(capsys, *words, expect=2)
    asked = next((word for word in words if "none" in word), words[1]).removeprefix("hf-hub:")
    models.says(text, "HubError", "HF_HUB_OFFLINE is set", "local cache", "Give a folder")
    assert f"{asked!r} is nothing on this machine" in text
    assert text.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_the_hub_says_is_passed_on(hub, capsys, monkeypatch):
    """Other reasons than the cache, each in its words."""
    import huggingface_hub
    from huggingface_hub import errors

    class Reply:
        headers, request = {}, None

    said = {
        errors.RepositoryNotFoundError: "no such repository",
        errors.GatedRepoError: "log in",
        errors.RevisionNotFoundError: "no such revision",
        errors.RemoteEntryNotFoundError: "no such file",
    }
    for kind, words in said.items():
        error = kind("404 Client Error\nand a report", response=Reply())

        def refuse(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
        models.says(run(capsys, "inspect", "me/tasks", expect=2), "HubError", words)

    def drop(*_, **__):
        raise RuntimeError("the line is dead\nat node 3")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", drop)
    text = run(capsys, "inspect", "me/tasks", expect=2)
    models.says(text, "HubError", "RuntimeError: the line is dead")
    assert "node 3" not in text


NAMES = {
    "me/bert": ("me/bert", "", None),
    "me/bert@v1.0": ("me/bert", "", "v1.0"),
    "me/tasks/second/part@refs/pr/1": ("me/tasks", "second/part", "refs/pr/1"),
}


def test_which_words_are_names_on_the_hub():
    for text, parts in NAMES.items():
        assert hub_name(text) == (text, *parts)
    for text in ("resnet18", "../a/b", "./a/b", "/a/b", "a/b/", "a//b", "runs/[1]/x", "a b/c", ""):
        assert hub_name(text) is None, text


def test_a_file_of_the_hub_is_the_one_of_its_revision(hub):
    cache = hub[0] / "models--me--tasks" / "snapshots"
    for text, place in (("me/tasks", REVISION), ("me/tasks@older", OLDER)):
        found = hub_file(hub_name(text), "adapter_config.json")
        assert found == cache / place / "adapter_config.json"
    with pytest.raises(HubError) as caught:
        hub_file(hub_name("me/tasks@older"), "config.json")
    models.says(str(caught.value), "'me/tasks@older'", "no config.json", "local cache")


def test_a_folder_of_that_name_comes_first(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pemnify(models.net(), bank="rp").save_pretrained("me/tasks")
    found = json.loads(run(capsys, "inspect", "me/tasks", "--json"))
    assert {item["name"] for item in found["masks"]} == set(models.NET_TARGETS)


# ------------------------------------------------------------------------------------ classes


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint without a head, as most bases are, of the same body."""
    folder = tmp_path_factory.mktemp("bare")
    bert().bert.save_pretrained(str(folder))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    return folder


def tuned_from(bare, class_name, **options):
    """An adapter on a class of a head of its own, as `AutoModelFor...` makes it of a base."""
    torch.manual_seed(5)
    base = getattr(transformers, class_name).from_pretrained(str(bare), num_labels=3)
    return pemnify(base, bank="own", **options)


CLASSES = {
    "SEQ_CLS": "BertForSequenceClassification",
    "TOKEN_CLS": "BertForTokenClassification",
}


@pytest.mark.parametrize("named", [True, False], ids=["task_type", "class alone"])
@pytest.mark.parametrize("task", CLASSES)
def test_merge_builds_the_class_that_the_adapter_is_for(task, named, bare, tmp_path, capsys):
    """And not the one without a head that the base's configuration names."""
    heads = {"task_type": task} if named else {"modules_to_save": ["classifier"]}
    tuned = tuned_from(bare, CLASSES[task], **heads)
    tuned.save_pretrained(str(tmp_path / "task"))
    out = tmp_path / "out"
    words = ["merge", tmp_path / "task", bare, "--model-arg", "num_labels=3", "--out", out]
    run(capsys, *words)
    assert json.loads((out / "config.json").read_text())["architectures"] == [CLASSES[task]]
    assert_same(getattr(transformers, CLASSES[task]).from_pretrained(str(out)), tuned)


def test_merge_with_another_head_than_the_bases(tmp_path, capsys):
    """A base with a head of two labels, an adapter with one of three."""
    bert(num_labels=2).save_pretrained(str(tmp_path / "base"))
    tuned = pemnify(
        transformers.BertForSequenceClassification.from_pretrained(
            str(tmp_path / "base"), num_labels=3, ignore_mismatched_sizes=True
        ),
        bank="own", selector="topk", task_type="SEQ_CLS",
    )  # fmt: skip
    tuned.save_pretrained(str(tmp_path / "task"))
    words = ["merge", tmp_path / "task", tmp_path / "base", "--out", tmp_path / "out"]
    for more in ((), ("--model-arg", "num_labels=3", "--overwrite")):
        run(capsys, *words, *more)
        kind = transformers.AutoModelForSequenceClassification
        merged = kind.from_pretrained(str(tmp_path / "out"))
        assert merged.num_labels == 3
        assert_same(merged, tuned)


def test_a_task_that_the_model_has_no_class_for_takes_the_named_one():
    config = transformers.ResNetConfig(architectures=["ResNetForImageClassification"])
    wanted = building.Wanted("SEQ_CLS")
    assert building._class_of(config, wanted) is transformers.ResNetForImageClassification
    config.architectures = None
    assert building._class_of(config, wanted) is transformers.AutoModel


def test_unknown_arguments_are_refused(bare, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    text = run(capsys, "plan", bare, "--model-arg", "colour=red", "--model-arg", "num_labels=3",
               expect=2)  # fmt: skip
    models.says(text, "ConfigError", "colour", "BertConfig", str(bare))
    assert "num_labels," not in text.partition("colour")[2].partition("which")[0]
    text = run(capsys, "plan", "test_resnet", "--model-arg", "colour=red", expect=2)
    models.says(text, "ConfigError", "colour", "test_resnet", "--model-arg")


def test_arguments_change_the_model(bare, capsys):
    words = ["plan", bare, "--model-arg", "num_labels=7", "--task-type", "seq_cls", "--json"]
    found = json.loads(run(capsys, *words))
    whole = {item["path"] + "." + item["tensor"]: item["shape"] for item in found["whole"]}
    assert whole == {"classifier.weight": [7, 16], "classifier.bias": [7]}


def test_a_local_timm_folder(tmp_path, capsys):
    save_timm(tmp_path / "base")
    found = json.loads(run(capsys, "plan", tmp_path / "base", "--json"))
    assert found["totals"] == plan(resnet(), bank="mp").as_dict()["totals"]
    tuned = models.train(pemnify(resnet(), bank="own", selector="topk"))
    tuned.save_pretrained(str(tmp_path / "task"))
    run(capsys, "merge", tmp_path / "task", tmp_path / "base", "--out", tmp_path / "out")
    plain = resnet()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    x = models.images(4, size=32)
    models.assert_equal(models.logits(plain, x), models.logits(tuned, x))


def test_code_of_a_repository_is_not_run(tmp_path, capsys):
    """A configuration that names code of its own is refused, and asks no question."""
    written = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
    models.says(run(capsys, "plan", tmp_path, expect=2), "ConfigError", "cannot be built")
