"""The model card: what it says, that edits stay, and that every push carries it."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from pemn_surgery import PemnCallback, PemnConfig, adapter_identity, pemnify, recode
from pemn_surgery.adapters.files.card import complete_card, without_form
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

IMPORT = "import pemn_surgery.adapters"
BERT_WEIGHTS = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 16 + 3 * 16  # layers, pooler, classifier


def read(folder):
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def table(text, name="adapter"):
    """The rows of one adapter's table."""
    lines = text.split(f"| {name} | |\n")
    assert len(lines) == 2, f"not one table of {name!r}"
    rows = {}
    for line in lines[1].splitlines()[1:]:
        if not line.startswith("|"):
            break
        key, value = line.strip("| ").split(" | ")
        rows[key] = value
    return rows


@pytest.fixture
def saved(tmp_path):
    model = models.train(pemnify(models.net(), bank="rp", ratio=0.1, density=0.3, seed=4))
    model.save_pretrained(str(tmp_path))
    return model, tmp_path


def test_what_the_card_says(saved):
    model, folder = saved
    text, found = read(folder), models.masks(model)
    rows = table(text)
    ones = sum(int(mask.sum()) for mask in found.values())
    weights = sum(mask.numel() for mask in found.values())
    nbytes = (folder / models.WEIGHTS_FILE).stat().st_size
    digest = PemnConfig.from_pretrained(str(folder)).fingerprint["float32"]
    assert weights == 216 + 2 * 576 + 32
    assert rows == {
        "base": "`Net`",
        "base fingerprint": f"`{digest}`",
        "frozen numbers": "bank rp, ratio 0.1, bank_init kaiming_normal, "
        "made from seed 4 in place of the base's",
        "masks chosen by": "topk, density 0.3",
        "identity": f"`{adapter_identity('default', model)}`",
        "masks": "4 of 1,400 weights",
        "density": f"{ones / weights:.4f} ({ones:,} ones)",
        "other tensors": "14",  # two biases, three norms of four
        "file": f"{nbytes:,} bytes, {8 * nbytes / 1400:.3f} bits a masked weight",
    }
    assert "pip install pemn-surgery" not in text
    assert "\n# Masks on Net\n" in text
    assert abs(ones / weights - 0.3) < 0.01
    assert text.count(IMPORT) == 1
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"


def test_the_code_in_the_card_loads_the_adapter(saved):
    model, folder = saved
    code = re.search(r"```python\n(.*?)```", read(folder), re.DOTALL)[1]
    assert code.startswith(IMPORT)
    expected = models.logits(model)
    place = '"the name or folder of this adapter"'
    assert place in code
    around = "{0}\nfrom tests.adapters import models\nbase = models.net(3)\n{1}\n{2}"
    printed = "import json\nprint(json.dumps(models.logits(model).tolist()))"
    out = models.run_python(around.format(IMPORT, code.replace(place, repr(str(folder))), printed))
    models.assert_equal(torch.tensor(json.loads(out.splitlines()[-1])), expected)


def ran(folder, around):
    """The logits of the model that the card's own code makes, in a process of its own."""
    code = re.search(r"```python\n(.*?)```", read(folder), re.DOTALL)[1]
    assert "base = " in code
    code = code.replace('"the name or folder of this adapter"', repr(str(folder)))
    printed = "import json\nfrom tests.adapters import models\n" + around
    return torch.tensor(json.loads(models.run_python(f"{code}\n{printed}").splitlines()[-1]))


TIMM = {
    "classes": ("test_resnet", {"num_classes": 4}, '"test_resnet", num_classes=4)'),
    "size": ("test_vit", {"img_size": 64, "num_classes": 4},
             '"test_vit", img_size=64, num_classes=4)'),
    "channels": ("test_resnet", {"in_chans": 1}, '"test_resnet", in_chans=1)'),
}  # fmt: skip


NO_ARGUMENTS = pytest.mark.skipif(
    not hasattr(timm.create_model("test_vit"), "_model_args"),
    reason="this timm does not remember what a model was created with",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=NO_ARGUMENTS if case != "classes" else ()) for case in TIMM]
)
def test_a_timm_base_is_built_by_the_cards_code(case, tmp_path):
    name, options, shown = TIMM[case]
    model = pemnify(timm.create_model(name, **options), bank="rp", ratio=0.1, seed=4)
    model.save_pretrained(str(tmp_path))
    assert f"\nbase = timm.create_model({shown}\n" in read(tmp_path)
    sizes = (2, options.get("in_chans", 3), 64, 64)
    around = f"print(json.dumps(models.logits(model, torch.ones{sizes}).tolist()))"
    found = ran(tmp_path, f"import torch\n{around}")
    models.assert_equal(found, models.logits(model, torch.ones(sizes)))
    recode(tmp_path, "entropy")
    assert f"\nbase = timm.create_model({shown}\n" in read(tmp_path)  # nobody knows better


def test_a_timm_base_with_its_own_weights_names_them(tmp_path):
    pemnify(timm.create_model("test_resnet"), bank="own", selector="topk").save_pretrained(
        str(tmp_path)
    )
    line = (
        'base = timm.create_model("test_resnet.r160_in1k")  # with the weights of the fingerprint'
    )
    assert line in read(tmp_path)


def test_a_timm_model_that_was_changed_is_not_said_to_be_timms(tmp_path):
    base = timm.create_model("test_resnet")
    base.fc = torch.nn.Linear(base.num_features, 7)
    pemnify(base, bank="rp").save_pretrained(str(tmp_path))
    text = read(tmp_path)
    assert "timm.create_model" not in text
    assert "# base: ResNet, built as it was for training\n" in text


def test_a_transformers_base_is_built_by_the_cards_code(tmp_path):
    models.bert().save_pretrained(str(tmp_path / "base"))
    base = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    for place, options in (("named", {"task_type": "SEQ_CLS"}), ("classed", {})):
        model = pemnify(base, bank="own", **options)
        model.save_pretrained(str(tmp_path / place))
        around = "ids = models.tokens()\nprint(json.dumps(model.eval()(ids).logits.tolist()))"
        with torch.no_grad():
            expected = model.eval()(input_ids=models.tokens()).logits
        models.assert_equal(ran(tmp_path / place, around), expected)
        assert "num_labels=3)\n" in read(tmp_path / place)
        base = model.unload()


# ------------------------------------------------------------------------------------ the form


def test_no_card_has_an_empty_form(saved):
    text = read(saved[1])
    assert "more information needed" not in text.lower()
    assert "[optional]" not in text
    heads = re.findall(r"^#+ [A-Z].*$", text, re.MULTILINE)
    assert heads == ["# Masks on Net", "## How to load it", "### Framework versions"]


def test_saving_again_changes_nothing(saved):
    model, folder = saved
    first = read(folder)
    model.save_pretrained(str(folder))
    assert read(folder) == first


FILLED = {
    "developers": "A. Person",
    "license": "mit",
    "training_data": "CIFAR-10, 50,000 images.",
    "out_of_scope_use": "```\n# not a heading\n[More or less]\n```",
    "results": "| test | 90 % |",
}


def test_what_somebody_filled_in_stays(saved):
    model, folder = saved
    card = ModelCard.from_template(ModelCardData(), **FILLED)
    card.text += "\n## Notes\n\n\n\nOf mine.\n\n## Empty one of mine\n"
    card.save(folder / "README.md")
    model.save_pretrained(str(folder))
    text = read(folder)
    assert "more information needed" not in text.lower()
    for value in FILLED.values():
        assert value in text, value
    assert text.endswith(
        "\n## Notes\n\n\n\nOf mine.\n\n## Empty one of mine\n### Framework versions\n\n"
        f"- PEFT {peft.__version__}"
    )
    heads = re.findall(r"^#+ [A-Z].*$", text, re.MULTILINE)
    assert heads == [
        "# Masks on Net", "## How to load it", "## Model Details", "### Model Description",
        "## Uses", "### Out-of-Scope Use", "## Training Details",
        "### Training Data", "## Evaluation", "### Results", "## Notes", "## Empty one of mine",
        "### Framework versions",
    ]  # fmt: skip
    assert "**Developed by:** A. Person" in text
    assert "**Shared by" not in text
    model.save_pretrained(str(folder))
    assert read(folder) == text


def test_a_text_without_a_form_stays_as_it_is():
    for text in ("", "\n", "words\n\n\nmore words", "# A title\n\n\n## Head\n\nwords\n", "# A\n"):
        assert without_form(text, "title") == text


def test_the_models_own_weights_are_asked_for(tmp_path):
    model = pemnify(models.net(), bank="own", selector="threshold")
    model.save_pretrained(str(tmp_path))
    rows = table(read(tmp_path))
    digests = PemnConfig.from_pretrained(str(tmp_path)).fingerprint
    assert len(set(digests.values())) == 3
    shown = ", ".join(f"`{digest}` in {name}" for name, digest in sorted(digests.items()))
    assert sorted(rows["base fingerprint"].split(", ")) == sorted(shown.split(", "))
    assert rows["frozen numbers"] == (
        "bank own, bank_init model: the base's own, which must be those of the fingerprint"
    )
    assert rows["density"] == "1.0000 (1,400 ones)"  # a threshold starts with every weight


def test_edits_stay_and_figures_follow(saved):
    model, folder = saved
    path = folder / "README.md"
    first = table(read(folder))["density"]
    card = ModelCard.load(path)
    card.data["license"] = "mit"
    card.text = "# My digits\n\nFirst words.\n" + card.text + "\nLast words.\n"
    card.save(path)
    for mask in models.mask_layers(model).values():
        with torch.no_grad():
            mask.mask_of("default").scores.fill_(1.0)  # ties: another mask, the same density
            mask.mask_of("default").selector = PemnConfig().selector_of(0.75)
    model.save_pretrained(str(folder))
    text = read(folder)
    ones = int(sum(mask.sum() for mask in models.masks(model).values()))
    assert table(text)["density"] == f"{ones / 1400:.4f} ({ones:,} ones)" != first
    assert text.count("First words.") == text.count("Last words.") == text.count(IMPORT) == 1
    assert text.index("My digits") < text.index(IMPORT) < text.index("Last words.")
    assert ModelCard.load(path).data["license"] == "mit"


def test_each_adapter_of_a_model_has_its_table(saved):
    model, folder = saved
    model.add_adapter("second", PemnConfig(bank="rp", ratio=0.1, density=0.8, seed=4))
    model.save_pretrained(str(folder))
    text = read(folder)
    assert text.count(IMPORT) == 2
    assert 'this adapter", subfolder="second")' in text
    assert table(text)["density"].startswith("0.3")
    assert table(text, "second")["density"].startswith("0.8")
    again = PeftModel.from_pretrained(models.net(1), str(folder), subfolder="second")
    model.set_adapter("second")
    models.assert_equal(models.logits(again), models.logits(model))


def test_a_damaged_file_in_the_folder_is_saved_over(saved):
    model, folder = saved
    whole = read(folder)
    (folder / models.WEIGHTS_FILE).write_bytes(b"damaged")
    model.save_pretrained(str(folder))
    assert read(folder) == whole


def test_a_pickled_file_is_not_opened(saved, tmp_path):
    """The card says how to load; figures come from a safetensors file alone."""
    saved[0].peft_config["default"].save_pretrained(str(tmp_path / "bin"))
    torch.save({}, tmp_path / "bin" / "adapter_model.bin")
    complete_card(tmp_path / "bin")
    rows = table(read(tmp_path / "bin"))
    assert not {"masks", "density", "file"} & set(rows)
    assert {"base", "base fingerprint", "frozen numbers"} < set(rows)


def test_other_processes_write_no_card(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(str(tmp_path / "rank1"), is_main_process=False)
    assert not (tmp_path / "rank1" / "README.md").exists()


def test_cards_of_other_methods_are_left_alone(tmp_path):
    model = get_peft_model(models.net(), LoraConfig(target_modules=["head"], r=2))
    model.save_pretrained(str(tmp_path))
    assert "pemn" not in read(tmp_path)
    complete_card(tmp_path)
    assert "pemn" not in read(tmp_path)


def test_transformers_own_save_gets_a_card_on_request(tmp_path):
    """transformers writes none beside an adapter, of whatever method."""
    model = models.bert()
    model.add_adapter(PemnConfig(bank="rp", ratio=0.1), adapter_name="task")
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "README.md").exists()
    complete_card(tmp_path)
    assert table(read(tmp_path))["masks"] == f"14 of {BERT_WEIGHTS:,} weights"
    assert read(tmp_path).count(IMPORT) == 1


class LocalHub:
    """What a push needs of the hub, with a folder on the other side."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        self.folder.mkdir(exist_ok=True)
        return type("Repo", (), {"repo_id": repo_id})()

    def create_commit(self, *, operations, **_):
        for operation in operations:
            target = self.folder / operation.path_in_repo
            target.parent.mkdir(exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)

    def upload_folder(self, *, folder_path, **_):
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    load = ModelCard.load.__func__

    def load_card(cls, place, **options):
        if str(place) != "me/digits":
            return load(cls, place, **options)
        if not (folder / "README.md").is_file():
            raise EntryNotFoundError(str(place))
        return load(cls, folder / "README.md")

    monkeypatch.setattr(ModelCard, "load", classmethod(load_card))
    for module in ("transformers.utils.hub", "transformers.trainer"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: LocalHub(folder))
    return folder


def test_push_of_a_peft_model(hub, saved):
    model, folder = saved
    model.push_to_hub("me/digits")
    files = {path.name for path in hub.iterdir()}
    assert files == {"README.md", "adapter_config.json", models.WEIGHTS_FILE}
    assert table(read(hub)) == table(read(folder))
    assert ModelCard.load(hub / "README.md").data.library_name == "peft"
    models.assert_same_tensors(
        load_file(hub / models.WEIGHTS_FILE), load_file(folder / models.WEIGHTS_FILE)
    )
    again = PeftModel.from_pretrained(models.net(2), str(hub))
    models.assert_equal(models.logits(again), models.logits(model))


def test_a_second_push_keeps_edits_on_the_hub(hub, saved):
    model, _ = saved
    model.push_to_hub("me/digits")
    path = hub / "README.md"
    path.write_text(read(hub) + "\nWritten on the hub.\n", encoding="utf-8")
    model.push_to_hub("me/digits")
    assert read(hub).count("Written on the hub.") == read(hub).count(IMPORT) == 1


def test_push_of_a_transformers_model_with_an_adapter(hub, tmp_path):
    models.bert().save_pretrained(str(tmp_path / "base"))
    model = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    model.add_adapter(PemnConfig(bank="own", selector="topk"), adapter_name="task")
    model.push_to_hub("me/digits")
    rows = table(read(hub))
    assert "more information needed" not in read(hub).lower()
    assert rows["base"] == f"`{tmp_path / 'base'}`"
    assert rows["masks"] == f"14 of {BERT_WEIGHTS:,} weights"
    again = AutoModelForSequenceClassification.from_pretrained(str(hub)).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=models.tokens()).logits
        models.assert_equal(again(input_ids=models.tokens()).logits, expected)


def test_push_of_other_models_is_left_alone(hub):
    models.bert().push_to_hub("me/digits")
    assert "pemn" not in read(hub)
    assert "[More Information Needed]" in read(hub)  # transformers' form is theirs


def test_push_of_a_trainer(hub, tmp_path):
    model = pemnify(models.bert(), bank="rp", ratio=0.1)
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_strategy="steps", save_steps=1,
        report_to=[], use_cpu=True, hub_model_id="me/digits", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": 1} for row in models.tokens()]
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[PemnCallback()])
    trainer.train()
    trainer.push_to_hub()
    text = read(hub)
    assert "Training procedure" in text
    assert text.count(IMPORT) == 1
    nbytes = (hub / models.WEIGHTS_FILE).stat().st_size
    bits = 8 * nbytes / BERT_WEIGHTS
    assert table(text)["file"] == f"{nbytes:,} bytes, {bits:.3f} bits a masked weight"
    assert "more information needed" not in text.lower()
    assert IMPORT not in read(tmp_path / "run" / "checkpoint-1")  # float scores to go on with
