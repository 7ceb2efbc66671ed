"""Committed pictures are what their script draws: the same words, the numbers of the library."""

import importlib.util
import re

import torch

from tests.adapters import models

FOLDER = models.ROOT / "docs/figures"


def script():
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(path):
    """What a picture says, whatever version of matplotlib placed it."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))


def test_the_picture_is_drawn_again(tmp_path):
    drawn = tmp_path / "drawn.svg"
    script().main(drawn)
    found = words(drawn)
    assert len(found) > 4 * (12 + 12)  # each number of two layers, in four forms
    assert found == words(FOLDER / "effective_weight.svg")


def test_the_picture_is_of_the_method():
    """The fill is the bank tiled; half of each layer's scores, by size, make the mask."""
    drawing = script()
    layers = drawing.rows()
    assert len(layers) == 2
    bank = layers[0]["fill"].flatten()[: drawing.BANK]
    for layer in layers:
        fill, mask = layer["fill"], layer["mask"]
        tiled = bank.repeat(fill.numel() // drawing.BANK + 1)[: fill.numel()]
        assert torch.equal(fill, tiled.reshape(fill.shape))
        assert mask.sum() == mask.numel() // 2
        assert layer["scores"][mask].abs().min() > layer["scores"][~mask].abs().max()
        assert torch.equal(layer["effective weight"], fill * mask)


def test_every_figure_is_shown():
    pages = [models.ROOT / "README.md", *sorted((models.ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    pictures = sorted(path.name for path in FOLDER.glob("*.svg"))
    assert pictures == ["effective_weight.svg", "training.svg"]
    assert all(f"figures/{name})" in text for name in pictures)
