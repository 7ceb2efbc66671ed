"""The networks of both cases, drawn from torch's global generator."""

from collections.abc import Sequence

import torch
from torch import nn

from pemn_surgery.commands import quickstart_run as quickstart
from pemn_surgery.recipe.networks import BasicBlock


def digits() -> nn.Module:
    """Return the quickstart's network, from the seed that the generator was given last."""
    return quickstart.network(torch.initial_seed())


def resnet(widths: Sequence[int], classes: int = 10) -> nn.Sequential:
    """Return a ResNet of one block a width, for images of 32 x 32, whose stem halves them.

    Args:
        widths: Channels of the blocks; the sides are 16, 8, 4, ...
        classes: Number of outputs.
    """
    first = widths[0]
    stem = [nn.Conv2d(3, first, 3, 2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    blocks = [BasicBlock(*pair) for pair in zip((first, *widths), widths, strict=False)]
    head = nn.Linear(widths[-1], classes, bias=False)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
