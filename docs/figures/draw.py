"""Draw bank, mask and effective weight of a tiny model, whose numbers are the library's own.

    python docs/figures/draw.py docs/figures/effective_weight.svg

Needs matplotlib (the extra ``train``). The seed decides what is drawn.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from pemn_surgery import pemnify

BANK = 5  # numbers
COLUMNS = {
    "fill": "the bank's numbers,\nrepeated to the layer's size",
    "scores": "trained, one a weight;\nnot in the file",
    "mask": "1 where abs(score) is large;\nthe file: one bit a weight",
    "effective weight": "fill x mask:\nwhat layer.weight is",
}


def main(path: Path) -> None:
    """Write the picture.

    Args:
        path: The SVG file.
    """
    settings = {"svg.hashsalt": "pemn", "svg.fonttype": "none", "axes.titlesize": 9}
    with mpl.rc_context(settings):
        draw(rows()).savefig(path, metadata={"Date": None})


def rows() -> list[dict[str, Tensor]]:
    """Return fill, scores, mask and effective weight of two layers that share a bank."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
    model = pemnify(net, bank="rp", length=BANK, seed=4)
    scores = [value for name, value in model.named_parameters() if name.endswith("scores")]
    weights = [net[0].weight.detach(), net[2].weight.detach()]
    with model.disable_adapter():
        fills = [net[0].weight.detach(), net[2].weight.detach()]
    return [
        {"fill": fill, "scores": score.detach(), "mask": weight != 0, "effective weight": weight}
        for fill, score, weight in zip(fills, scores, weights, strict=True)
    ]


def draw(layers: list[dict[str, Tensor]]) -> Figure:
    """Return the bank and, for each layer, the way from it to the effective weight.

    Args:
        layers: For each layer its tensors (rows, columns) by the names of the columns.
    """
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    grid = figure.add_gridspec(1 + len(layers), len(COLUMNS), height_ratios=[1.6, 3, 4])
    bank = figure.add_subplot(grid[0, 0])
    show(bank, layers[0]["fill"].flatten()[None, :BANK])
    bank.set_title("bank\none vector from a seed, shared\nby all layers; not in the file")
    for row, tensors in enumerate(layers, start=1):
        for column, (name, says) in enumerate(COLUMNS.items()):
            axes = figure.add_subplot(grid[row, column])
            show(axes, tensors[name])
            axes.set_title(f"{name}\n{says}" if row == 1 else name)
            if column == 0:
                axes.set_ylabel(f"layer {row}")
    return figure


def show(axes: Axes, values: Tensor) -> None:
    """Show a matrix as coloured cells with their numbers.

    Args:
        axes: Where.
        values: Floats, or a mask, of shape (rows, columns).
    """
    is_mask = values.dtype == torch.bool
    colours, low = ("Greys", 0.0) if is_mask else ("PuOr", -2.0)
    axes.pcolormesh(values.float(), cmap=colours, vmin=low, vmax=2.0, edgecolors="white")
    axes.invert_yaxis()
    axes.set(aspect="equal", xticks=[], yticks=[])
    for row, column in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
        value = round(values[row, column].item(), 1) + 0  # no "-0.0"
        text = f"{value:.0f}" if is_mask else f"{value:.1f}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
