"""Adapters that earlier versions wrote load, with the same masks and the same outputs."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pemn_surgery import __version__
from pemn_surgery.adapters.files.adapter_file import WEIGHTS, read_adapter_file
from pemn_surgery.adapters.layer import PemnLayer
from tests.golden import cases
from tests.golden.make import FOLDER, digest

STORED = sorted(path.parent for path in FOLDER.glob("*/*/expected.json"))
IDS = [f"{folder.parent.name}-{folder.name}" for folder in STORED]


def load(folder, **options):
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = PeftModel.from_pretrained(cases.build(expected["model"]), str(folder), **options)
    return model.eval(), expected


def found_masks(model):
    layers = [module for module in model.modules() if isinstance(module, PemnLayer)]
    return {layer.target: layer.mask_of("default").mask() for layer in layers}


def assert_as_expected(model, expected):
    masks = found_masks(model)
    assert len(masks) >= 1
    assert {name: int(mask.sum()) for name, mask in masks.items()} == expected["ones"]
    assert {name: digest(mask) for name, mask in masks.items()} == expected["masks"]
    with torch.no_grad():
        outputs = model(cases.inputs(expected["model"]))
    wanted = torch.tensor(expected["outputs"])
    assert outputs.shape == wanted.shape
    assert wanted.std() > 0.01
    # The last digits of a convolution or a matrix product differ between processors.
    torch.testing.assert_close(outputs, wanted, rtol=1e-5, atol=1e-6)


def test_there_are_stored_adapters_of_every_kind():
    first = {folder.name for folder in STORED if folder.parent.name == "0.1"}
    assert len(first) == 31
    assert first <= set(cases.CASES)  # later versions may have more
    assert {cases.CASES[name][0] for name in first} == {"net", "attention", "mixture", "kernels"}


@pytest.mark.parametrize(
    ("case", "codings"),
    [
        ("own_topk", {"bits"}),
        ("entropy", {"entropy", "bits"}),
        ("entropy_near_half", {"entropy", "bits"}),  # a mask takes what is shorter
        ("context_guides", {"context", "bits"}),
        ("context_neighbours", {"context", "entropy", "bits"}),
        ("base", {"base", "bits"}),
    ],
)
def test_stored_adapters_hold_masks_of_all_codings(case, codings):
    file = read_adapter_file(FOLDER / "0.1" / case / WEIGHTS)
    assert {header.coding for header in file.headers.values()} == codings


def test_this_release_has_its_adapters():
    """Run ``python -m tests.golden.make`` once after a release number has changed."""
    assert (FOLDER / ".".join(__version__.split(".")[:2])).is_dir()


@pytest.mark.parametrize("folder", STORED, ids=IDS)
def test_loads(folder):
    assert_as_expected(*load(folder))


@pytest.mark.parametrize("folder", STORED, ids=IDS)
def test_loads_to_train_on(folder):
    """Scores made of the bits choose the same masks; stored scores are the same scores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The file holds bits, not scores", UserWarning)
        model, expected = load(folder, is_trainable=True)
    assert_as_expected(model, expected)
    assert any(".scores" in name and p.requires_grad for name, p in model.named_parameters())


def test_a_stored_adapter_means_its_own_masks():
    """The comparison sees a difference: one adapter's masks are not another's."""
    first, _ = load(FOLDER / "0.1" / "rp_topk")
    _, other = load(FOLDER / "0.1" / "rp_permuted_topk")
    with pytest.raises(AssertionError):
        assert_as_expected(first, other)


CODED = [folder for folder in STORED if cases.CASES[folder.name][1].get("coding", "bits") != "bits"]


@pytest.mark.parametrize("folder", CODED, ids=lambda folder: folder.name)
def test_a_mask_is_coded_to_the_same_bytes(folder, tmp_path):
    """Whichever machine and whichever coder, constriction's or the one in Python, writes it."""
    assert len(CODED) == 8
    model, _ = load(folder)
    model.save_pretrained(tmp_path)
    again, stored = load_file(tmp_path / WEIGHTS), load_file(folder / WEIGHTS)
    coded = [key for key in stored if key.endswith(".bits")]
    assert coded
    for key in coded:
        assert again[key].tolist() == stored[key].tolist(), key
