"""Wrong inputs of every kind: one readable sentence, a code that is not zero, nothing written."""

import json
import shutil

import pytest
import timm
from peft import LoraConfig, get_peft_model

from pemn_surgery import compare_adapters, pemnify, recode
from pemn_surgery.adapters.files.opening import open_adapter
from pemn_surgery.commands import cli
from pemn_surgery.errors import AdapterFileError
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files of every kind, two of them right."""
    root = tmp_path_factory.mktemp("places")
    lora = get_peft_model(models.bert(), LoraConfig(target_modules=["query"], r=2))
    lora.save_pretrained(str(root / "lora"))
    models.bert().save_pretrained(str(root / "base"))
    pemnify(models.bert(), bank="own", selector="topk").save_pretrained(str(root / "bert"))
    task = pemnify(timm.create_model("test_resnet", num_classes=4), bank="rp")
    task.save_pretrained(str(root / "resnet"))
    (root / "file").write_text("no folder")
    (root / "empty").mkdir()
    contents = {
        "broken": "{",
        "list": "[1]",
        "unknown": '{"model_type": "x", "peft_type": "X"}',
        "nothing": "{}",
        "odd_timm": '{"architecture": "x"}',
        "binary": "\udcff",
    }
    for name, text in contents.items():
        (root / name).mkdir()
        for file in ("config.json", "adapter_config.json"):
            (root / name / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    (root / "a_folder" / "adapter_config.json").mkdir(parents=True)
    (root / "a_folder" / "config.json").mkdir(parents=True)
    for name, content in (("no_weights", None), ("bad_weights", b"bad")):
        (root / name).mkdir()
        shutil.copy(root / "base" / "config.json", root / name)
        if content is not None:
            (root / name / "model.safetensors").write_bytes(content)
    return root


def refused(capsys, monkeypatch, places, *words):
    """What the command says on wrong words; it wrote nothing."""
    monkeypatch.chdir(places)
    monkeypatch.setenv("COLUMNS", "1000")
    before = sorted(places.rglob("*"))
    assert cli.main(list(words)) == 2
    assert sorted(places.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out.strip() == ""
    lines = [line for line in captured.err.splitlines() if "Error: " in line]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert len(lines[0]) < 700
    return lines[0]


ADAPTERS = {
    "nowhere": "does not exist",
    "file": "is a file",
    "empty": "has no adapter_config.json",
    "a_folder": "adapter_config.json' cannot be read: it is a folder",
    "base": "has no adapter_config.json",
    "lora": "is an adapter of PEFT's method LORA, which has no masks",
    "broken": "is not JSON",
    "binary": "is not JSON",
    "list": "holds list",
    "unknown": "is no configuration",
    "nothing": "has no adapter_model.safetensors",
    "": "has no adapter_config.json",
}
READERS = {
    "inspect": ["inspect", "?"],
    "pack": ["pack", "?"],
    "unpack": ["unpack", "?", "--out", "new"],
    "diff first": ["diff", "?", "resnet"],
    "diff second": ["diff", "resnet", "?"],
    "merge": ["merge", "?", "test_resnet", "--out", "new"],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_adapter(adapter, reader, places, capsys, monkeypatch):
    words = [adapter if word == "?" else word for word in READERS[reader]]
    text = refused(capsys, monkeypatch, places, *words)
    models.says(text, "AdapterFileError", ADAPTERS[adapter], adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_adapter_in_python(adapter, places, monkeypatch):
    """The functions behind the commands, and not only these."""
    monkeypatch.chdir(places)
    for call in (
        open_adapter,
        lambda folder: recode(folder, "entropy", "new"),
        lambda folder: compare_adapters("resnet", folder),
    ):
        with pytest.raises(AdapterFileError) as caught:
            call(adapter)
        models.says(str(caught.value), ADAPTERS[adapter])
    assert not (places / "new").exists()


BASES = {
    "nowhere": "is neither a timm model",
    "file": "is a file",
    "empty": "is a folder without config.json",
    "a_folder": "is a folder without config.json",
    "lora": "is a folder without config.json",
    "": "is a folder without config.json",
    "broken": "is not JSON",
    "binary": "is not JSON",
    "list": "holds list",
    "unknown": "model type `x`",
    "nothing": "model_type",
    "odd_timm": "Unknown model (x)",
    "local-dir:nowhere": "nowhere",
    "hf-hub:": "hf-hub:",
}


@pytest.mark.parametrize("base", BASES)
def test_no_base(base, places, capsys, monkeypatch):
    for words in (["plan", base], ["merge", "resnet", base, "--out", "new"]):
        text = refused(capsys, monkeypatch, places, *words)
        models.says(text, "ConfigError", BASES[base])


OTHERS = [
    (["merge", "bert", "no_weights", "--out", "new"], ("ConfigError", "model.safetensors")),
    (["merge", "bert", "bad_weights", "--out", "new"], ("ConfigError", "bad_weights")),
    (["merge", "resnet", "test_resnet", "--out", "file"], ("ConfigError", "which is a file")),
    (["merge", "resnet", "test_resnet", "--model-arg", "num_classes=4", "--out", "file/new"],
     ("NotADirectoryError", "file/new")),
    (["merge", "resnet", "test_resnet", "--model-arg", "num_classes=4", "--out", "/proc/new"],
     ("Error", "/proc/new")),
    (["merge", "resnet", "test_resnet", "--out", "new"], ("ArchitectureError", "fc.weight")),
    (["merge", "bert", "base", "--out", "base"], ("ConfigError", "'base', which is read")),
    (["merge", "bert", "base", "--out", "bert", "--overwrite"], ("'bert', which is read",)),
    (["merge", "bert", "base", "--out", "no_weights"], ("holds config.json", "--overwrite")),
    (["merge", "resnet", "test_resnet", "--out", "new", "--input-size", "3"],
     ("ConfigError", "--format onnx")),
    (["plan", "base", "--task-type", "none"], ("ConfigError", "NONE", "SEQ_CLS")),
    (["plan", "base", "--preset", "none"], ("ConfigError", "'none'", "piggyback")),
    (["plan", "base", "--target-modules", "(("], ("ConfigError", "((", "regular expression")),
    (["plan", "base", "--scale", "x"], ("ConfigError", "sqrt_density")),
    (["plan", "test_resnet", "--bank", "rp", "--ratio", "nan"], ("ConfigError", "ratio=nan")),
    (["plan", "test_resnet", "--layers-pattern", "x"], ("ConfigError", "layers_to_transform")),
    (["plan", "test_resnet", "--model-arg", "pretrained=true"], ("ConfigError", "pretrained=True")),
    (["inspect", "resnet", "--plot", "x.nope"], ("ConfigError", "'.nope'", "png")),
    (["inspect", "resnet", "--plot", "nowhere/x.png"], ("FileNotFoundError", "nowhere/x.png")),
    (["diff", "resnet", "resnet", "--plot", "x.nope"], ("ConfigError", "'.nope'", "png")),
    (["diff", "resnet", "bert"], ("ArchitectureError", "16 masks", "14 masks")),
    (["pack", "resnet", "--out", "bert"], ("ConfigError", "adapter_model.safetensors already")),
    (["unpack", "resnet", "--out", "file"], ("ConfigError", "which is a file")),
    (["pack", "resnet", "--out", "/proc/new"], ("AdapterWriteError", "/proc/new")),
    (["quickstart", "--out", "file"], ("FileExistsError", "file")),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), OTHERS, ids=[" ".join(words) for words, _ in OTHERS])
def test_other_mistakes(words, said, places, capsys, monkeypatch):
    models.says(refused(capsys, monkeypatch, places, *words), *said)


def test_overwrite_is_what_it_takes(places, tmp_path, capsys, monkeypatch):
    """What --out holds is replaced only where that is asked for; all else in it stays."""
    monkeypatch.chdir(places)
    out = tmp_path / "out"
    shutil.copytree(places / "bert", out)
    (out / "notes.txt").write_text("mine")
    old = (out / models.WEIGHTS_FILE).read_bytes()
    assert cli.main(["pack", "resnet", "--out", str(out)]) == 2
    assert (out / models.WEIGHTS_FILE).read_bytes() == old
    assert cli.main(["pack", "resnet", "--out", str(out), "--overwrite"]) == 0
    assert len(open_adapter(out)[1].masks) == 16
    merge = ["merge", "resnet", "test_resnet", "--model-arg", "num_classes=4", "--out", str(out)]
    assert cli.main(merge) == 0  # nothing of that name
    written = (out / "model.safetensors").read_bytes()
    assert cli.main(merge) == 2
    models.says(capsys.readouterr().err, "holds model.safetensors already")
    (out / "model.safetensors").write_bytes(b"old")
    assert cli.main([*merge, "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() == written
    assert (out / "notes.txt").read_text() == "mine"


def test_pack_in_place_needs_no_overwrite(places, tmp_path, capsys):
    shutil.copytree(places / "resnet", tmp_path / "task")
    assert cli.main(["pack", str(tmp_path / "task")]) == 0
    config = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    assert config["coding"] == "entropy"
