"""The ``pemn`` command: what it prints, what it writes, and its exit codes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from pemn_surgery import PemnConfig, __version__, pemnify, plan
from pemn_surgery.commands import cli, quickstart_run
from pemn_surgery.kernels import library
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

COMMANDS = ["quickstart", "plan", "inspect", "diff", "pack", "unpack", "merge"]


def run(capsys, *words, expect=0):
    """Run the command in this process; return what it printed."""
    assert cli.main([str(word) for word in words]) == expect
    captured = capsys.readouterr()
    return " ".join((captured.err if expect else captured.out).split())


def run_raw(capsys, *words):
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A timm adapter, a BERT folder and its adapter, and the trained models."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    resnet = models.train(
        pemnify(timm.create_model("test_resnet", num_classes=4), bank="rp", seed=7)
    )
    resnet.save_pretrained(str(root / "resnet"))
    base = models.bert()
    base.save_pretrained(str(root / "bert_base"))
    bert = pemnify(base, bank="own", rest="freeze", density=0.3)
    bert.save_pretrained(str(root / "bert"))
    return root, resnet, bert


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: pemn {command}" in text
    example = text.split("example:\n")[1].strip()
    words = example.split()
    assert words[:2] == ["pemn", command]
    parsed = cli._parser().parse_args(words[1:])
    assert callable(parsed.run)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^    {command}\s+[A-Z]", text, re.MULTILINE)


def test_alone_it_prints_its_help(capsys):
    assert cli.main([]) == 0
    alone = capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert alone.out == capsys.readouterr().out
    assert alone.out.startswith("usage: pemn")
    assert alone.err == ""


LINES = [
    (page.name, line)
    for page in [models.ROOT / "README.md", *sorted((models.ROOT / "docs").glob("*.md"))]
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith("pemn ") or line.endswith("&& pemn quickstart")
]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[" ".join(line) for line in LINES])
def test_command_lines_of_the_documents_parse(page, line):
    words = shlex.split(line.rpartition("&& ")[2], comments=True)
    parsed = cli._parser().parse_args(words[1:])
    assert callable(parsed.run)


def test_the_documents_have_command_lines():
    assert len([line for page, line in LINES if page == "README.md"]) >= 6


def test_version(capsys):
    said = f"pemn-surgery {__version__}\nkernels: {library.describe()}\n"
    assert run_raw(capsys, "--version") == said


def test_plan_of_a_timm_name(capsys):
    words = ["plan", "test_resnet", "--model-arg", "num_classes=4", "--bank", "rp"]
    text = run_raw(capsys, *words)
    expected = plan(timm.create_model("test_resnet", num_classes=4), bank="rp")
    assert text == str(expected)
    assert f"{expected.masked_weights:,} of" in text


@pytest.mark.parametrize("bank", ["mp", "rp", "one_layer", "own"])
def test_plan_as_json(bank, capsys):
    words = ["plan", "test_resnet", "--model-arg", "num_classes=4", "--bank", bank, "--json"]
    found = json.loads(run_raw(capsys, *words))
    model = timm.create_model("test_resnet", num_classes=4)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    if bank == "own":  # its classifier is trained whole
        weights.pop("fc.weight")
    totals = found["totals"]
    assert totals["parameters"] == sum(p.numel() for p in model.parameters())
    assert totals["masked_weights"] == sum(p.numel() for p in weights.values())
    assert totals["mask_bytes"] == sum(32 + (p.numel() + 7) // 8 for p in weights.values())
    largest = max(p.numel() for p in weights.values())
    shapes = {tuple(p.shape): p.numel() for p in weights.values()}
    floats = {"mp": largest, "rp": int(largest * 0.01) + 1, "own": 0,
              "one_layer": sum(shapes.values())}  # fmt: skip
    assert totals["bank_floats"] == floats[bank]
    names = [".".join([target["path"], target["parameter"]]) for target in found["targets"]]
    assert names == list(weights)


def test_plan_of_a_transformers_folder(folders, capsys):
    root = folders[0]
    found = json.loads(run_raw(capsys, "plan", root / "bert_base", "--bank", "mp", "--json"))
    model = models.bert()
    assert found["totals"]["parameters"] == sum(p.numel() for p in model.parameters())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(found["targets"]) == len(linear) == 14
    assert found["totals"]["masked_weights"] == sum(m.weight.numel() for m in linear)
    assert {item["reason"] for item in found["left"]} == {
        "an embedding, masked only if target_modules names it"
    }


def test_plan_passes_every_option(capsys):
    words = ["plan", "test_resnet", "--bank", "rp", "--length", "50", "--seed", "3", "--rest",
             "norms", "--bank-init", "signed_constant", "--density", "0.2", "--json"]  # fmt: skip
    found = json.loads(run_raw(capsys, *words))
    spec = found["spec"]
    assert (spec["length"], spec["seed"], spec["init"]) == (50, 3, "signed_constant")
    assert found["totals"]["bank_floats"] == 50
    trained = {item["path"] for item in found["owned"] if item["trained"]}
    model = timm.create_model("test_resnet")
    norms = {n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert trained == norms != set()


PLANS = {
    "--preset self_masking --threshold 0.3": {"preset": "self_masking", "threshold": 0.3},
    "--preset piggyback --rest norms": {"preset": "piggyback", "rest": "norms"},
    "--bank rp --permute --scale-fan --density 0.2": {
        "bank": "rp", "permute": True, "scale_fan": True, "density": 0.2,
    },
    "--selector threshold --threshold 0.1 --scale sqrt_density": {
        "selector": "threshold", "threshold": 0.1, "scale": "sqrt_density",
    },
    "--density erk --overall-density 0.2 --density-pattern query=0.1 .*output.dense=0.3": {
        "density": "erk", "overall_density": 0.2,
        "density_pattern": {"query": 0.1, ".*output.dense": 0.3},
    },
    "--target-modules query value": {"target_modules": ["query", "value"]},
    "--target-modules query": {"target_modules": ["query"]},
    "--target-modules .*query": {"target_modules": ".*query"},
    "--target-modules all-linear": {"target_modules": "all-linear"},
    "--exclude-modules pooler.dense": {"exclude_modules": ["pooler.dense"]},
    "--layers-to-transform 1 --layers-pattern layer": {
        "layers_to_transform": [1], "layers_pattern": ["layer"],
    },
    "--bank own --modules-to-save classifier": {
        "bank": "own", "modules_to_save": ["classifier"],
    },
    "--target-modules word_embeddings --tied both": {
        "target_modules": ["word_embeddings"], "tied": "both",
    },
    "--bank own --task-type SEQ_CLS": {"bank": "own", "task_type": "SEQ_CLS"},
    "--task-type seq_cls --target-parameters pooler.dense.weight": {
        "task_type": "SEQ_CLS", "target_parameters": ["pooler.dense.weight"],
    },
    "--bank one_layer --bank-init kaiming_uniform --seed 4": {
        "bank": "one_layer", "bank_init": "kaiming_uniform", "seed": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("words", PLANS)
def test_plan_takes_the_fields_of_a_configuration(words, folders, capsys):
    base = folders[0] / "bert_base"
    options = dict(PLANS[words])
    preset = options.pop("preset", None)
    config = PemnConfig.preset(preset, **options) if preset else PemnConfig(**options)
    model = BertForSequenceClassification.from_pretrained(str(base))
    expected = plan(model, config)
    assert expected.targets
    found = json.loads(run_raw(capsys, "plan", base, *words.split(), "--json"))
    wanted = json.loads(json.dumps(expected.as_dict()))
    assert found.pop("lost") == ""  # the command reads no weights, so sees nothing learned
    assert bool(wanted.pop("lost")) == (config.bank != "own")
    assert found == wanted


def test_plan_of_a_timm_model_with_its_classifier_masked(capsys):
    words = ["plan", "test_resnet", "--bank", "own", "--modules-to-save", "--json"]
    found = json.loads(run_raw(capsys, *words))
    assert "fc" in {target["path"] for target in found["targets"]}
    assert found["whole"] == []


@pytest.mark.parametrize("which", ["resnet", "bert"])
def test_inspect_gives_the_masks_densities(which, folders, capsys):
    root, resnet, bert = folders
    model = {"resnet": resnet, "bert": bert}[which]
    found = json.loads(run_raw(capsys, "inspect", root / which, "--json"))
    chosen = models.masks(model)
    assert {item["name"]: item["density"] for item in found["masks"]} == {
        name: float(mask.double().mean()) for name, mask in chosen.items()
    }
    assert {item["name"]: item["weights"] for item in found["masks"]} == {
        name: mask.numel() for name, mask in chosen.items()
    }
    assert found["bytes"] == (root / which / models.WEIGHTS_FILE).stat().st_size
    config = model.peft_config["default"]
    assert found["config"]["bank"] == config.bank
    assert found["config"]["fingerprint"] == config.fingerprint


def test_inspect_as_a_table(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    root, resnet, _ = folders
    text = run(capsys, "inspect", root / "resnet")
    for name, mask in models.masks(resnet).items():
        assert name in text
        assert f"{mask.numel():,}" in text
        assert f"{float(mask.double().mean()):.4f}" in text
    assert "bank rp, kaiming_normal, seed 7" in text
    assert resnet.peft_config["default"].fingerprint["float32"] in text


def test_inspect_of_a_target_list_is_json(tmp_path, capsys):
    pemnify(models.net(), bank="rp", target_modules=["conv2", "conv1"]).save_pretrained(
        str(tmp_path)
    )
    found = json.loads(run_raw(capsys, "inspect", tmp_path, "--json"))
    assert found["config"]["target_modules"] == ["conv1", "conv2"]


def test_merge_of_a_timm_adapter(folders, tmp_path, capsys):
    root, resnet, _ = folders
    out = tmp_path / "deep" / "out"
    words = ["merge", root / "resnet", "test_resnet", "--model-arg", "num_classes=4", "--out", out]
    assert str(out) in run(capsys, *words).replace(" ", "")
    plain = timm.create_model("test_resnet", num_classes=4)
    result = plain.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    assert result.unexpected_keys == []
    assert {key.rpartition(".")[2] for key in result.missing_keys} <= {"num_batches_tracked"}
    x = models.images(4, size=32)
    models.assert_equal(models.logits(plain, x), models.logits(resnet, x))


def test_merge_of_a_transformers_adapter(folders, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    root, _, bert = folders
    run(capsys, "merge", root / "bert", root / "bert_base", "--out", tmp_path)
    merged = AutoModelForSequenceClassification.from_pretrained(str(tmp_path)).eval()
    assert not any("pemn" in key or "masked" in key for key in merged.state_dict())
    with torch.no_grad():
        ids = models.tokens(5)
        models.assert_equal(merged(input_ids=ids).logits, bert.eval()(input_ids=ids).logits)


BAD = [
    (["plan", "no_such_model"], ("ConfigError", "'no_such_model'", "timm.list_models()")),
    (["plan", "test_resnets"], ("ConfigError", "test_resnet", "config.json")),
    (["plan", "test_resnet", "--model-arg", "num_classes"], ("'num_classes'", "KEY=VALUE")),
    (["plan", "test_resnet", "--density", "1.5"], ("density=1.5", "0 < value <= 1")),
    (["plan", "test_resnet", "--ratio", "0.1"], ("ratio=0.1", 'bank="rp"')),
    (["plan", "test_resnet", "--bank-init", "zeros"], ("bank_init='zeros'", "'kaiming_normal'")),
    (["inspect", "nowhere"], ("AdapterFileError", "'nowhere'", "adapter_config.json", "folder")),
    (["merge", "nowhere", "test_resnet", "--out", "x"], ("AdapterFileError", "'nowhere'")),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    models.says(run(capsys, *words, expect=2), *said)
    assert list(tmp_path.iterdir()) == []


def test_unknown_model_argument(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    text = run(capsys, "plan", "test_resnet", "--model-arg", "colour=red", expect=2)
    models.says(text, "colour")


def test_a_message_with_brackets_is_printed_whole(capsys, monkeypatch):
    """Square brackets are rich's markup; a path or a list in a message must survive."""
    monkeypatch.setenv("COLUMNS", "500")
    text = run(capsys, "inspect", "runs/[bold]/[1]", expect=2)
    models.says(text, "'runs/[bold]/[1]'")


def test_damaged_adapter(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    for name in (models.WEIGHTS_FILE, "adapter_config.json"):
        (tmp_path / name).write_bytes((folders[0] / "resnet" / name).read_bytes())
    path = tmp_path / models.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    text = run(capsys, "inspect", tmp_path, expect=2)
    models.says(text, "AdapterFileError", "truncated or altered", path.stat().st_size)
    path.unlink()
    models.says(run(capsys, "inspect", tmp_path, expect=2), "has no adapter_model.safetensors")


def test_damaged_configuration(folders, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PEMN", ')
    (tmp_path / models.WEIGHTS_FILE).write_bytes(
        (folders[0] / "resnet" / models.WEIGHTS_FILE).read_bytes()
    )
    models.says(run(capsys, "inspect", tmp_path, expect=2), "adapter_config.json")


def test_merge_onto_another_architecture(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    out = tmp_path / "out"
    text = run(capsys, "merge", folders[0] / "resnet", "test_vit", "--out", out, expect=2)
    models.says(text, "ArchitectureError", "Build the model")
    assert not out.exists()


@pytest.mark.parametrize(
    "words", [["fly"], ["plan"], ["plan", "m", "--bank", "x"], ["quickstart", "--epochs", "0"],
              ["quickstart", "--epochs", "many"], ["merge", "a", "m"]], ids=str,
)  # fmt: skip
def test_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: pemn" in capsys.readouterr().err


def test_interrupted(capsys, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart_run, "run", interrupt)
    assert run(capsys, "quickstart", "--out", tmp_path, expect=130) == "Interrupted."


@pytest.mark.parametrize(("verified", "code"), [(True, 0), (False, 1)])
def test_quickstart_says_whether_it_verified(verified, code, capsys, monkeypatch, tmp_path):
    rows = [
        {"method": method, "task": task, "accuracy": 0.5, "nbytes": nbytes}
        for method, nbytes in zip(quickstart_run.METHODS, (4000, 100, 100), strict=True)
        for task in quickstart_run.TASKS
    ]
    result = {"verified_in_new_process": verified, "outcomes": rows}
    monkeypatch.setattr(quickstart_run, "run", lambda *_: result)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["quickstart", "--out", str(tmp_path)]) == code
    text = capsys.readouterr().out
    assert ("equal bit for bit" in text) is verified
    assert ("NOT EQUAL" in text) is not verified
    assert text.count("40.0 x") == 4
    assert text.count("50.00 %") == 6


@pytest.mark.slow
def test_quickstart(tmp_path, capsys, monkeypatch):
    """Everything but the number of training images is real, the new process included."""
    train, test = quickstart_run.load_digits()
    assert (len(train.images), len(test.images)) == (1347, 450)
    few = {name: label[:128] for name, label in train.labels.items()}
    fewer = quickstart_run.Split(train.images[:128], few)
    monkeypatch.setattr(quickstart_run, "load_digits", lambda: (fewer, test))
    text = run_raw(capsys, "quickstart", "--epochs", "1", "--out", tmp_path, "--json")
    result = json.loads(text)
    assert result == json.loads((tmp_path / "results.json").read_text())
    assert result["verified_in_new_process"] is True
    assert result["command"] == "pemn quickstart --epochs 1 --seed 0"
    rows = {(row["method"], row["task"]): row for row in result["outcomes"]}
    assert set(rows) == {(m, t) for m in quickstart_run.METHODS for t in quickstart_run.TASKS}
    for task in quickstart_run.TASKS:
        file = tmp_path / "masks" / task / models.WEIGHTS_FILE
        assert rows["masks", task]["nbytes"] == file.stat().st_size
        assert rows["masks", task]["nbytes"] < rows["dense", task]["nbytes"] / 25
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert (tmp_path / "quickstart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_reader_who_is_gone_is_no_error(folders):
    """As of ``pemn plan ... | head``: what nobody reads is dropped in silence."""
    words = ["inspect", str(folders[0] / "resnet"), "--json"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pemn_surgery.commands.cli", *words],
            stdout=write, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_in_a_process_of_its_own(folders):
    """The installed script: its exit codes and where it writes."""
    script = Path(sys.executable).parent / "pemn"
    command = (
        [str(script)] if script.is_file() else [sys.executable, "-m", "pemn_surgery.commands.cli"]
    )
    done = subprocess.run(
        [*command, "inspect", str(folders[0] / "resnet"), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["masks"]) == len(models.masks(folders[1]))
