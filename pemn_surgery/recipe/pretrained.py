"""CIFAR-10 ResNets with published weights, read into this project's own.

Weights: github.com/akamaster/pytorch_resnet_cifar10 (``pretrained_models/resnet20-12fca82f.th`` and
so on), whose keys name stages and blocks; here a network is one `nn.Sequential`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.networks import resnet

CLASSES, WIDTH, STEM = 10, 64, 3  # STEM: convolution, norm, ReLU


def pretrained(name: str, depth: int, folder: Path | None) -> nn.Sequential:
    """Return a network with its published weights and its classifier of CIFAR-10's classes.

    Args:
        name: Beginning of the file's name: ``<name>-<hash>.th``.
        depth: 20, 32 or 56.
        folder: Where the file is; None: torch's initial weights in their place, for a trial.

    Raises:
        RecipeError: If the folder has not exactly one such file, or its tensors do not fit.
    """
    network = resnet(depth)
    network[-1] = nn.Linear(WIDTH, CLASSES)
    if folder is None:
        return network
    files = sorted(folder.glob(f"{name}-*.th"))
    if len(files) != 1:
        found = [file.name for file in files]
        message = f"{folder} needs one file {name}-*.th; it has {found}; see the recipe's README"
        raise RecipeError(message)
    held = torch.load(files[0], weights_only=True, map_location="cpu")["state_dict"]
    try:
        network.load_state_dict(renamed(held, depth))
    except RuntimeError as error:
        message = f"{files[0]} does not fit a ResNet of depth {depth}: {error}"
        raise RecipeError(message) from error
    return network


def renamed(held: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Return a published state dict with the keys of `resnet`."""
    blocks = (depth - 2) // 6
    starts = {f"layer{stage + 1}": STEM + stage * blocks for stage in range(3)}
    plain = {"conv1": 0, "bn1": 1, "linear": STEM + 3 * blocks + 2}  # pooling, flattening
    found = {}
    for key, value in held.items():
        first, rest = key.removeprefix("module.").split(".", 1)
        if first in starts:
            block, rest = rest.split(".", 1)
            found[f"{starts[first] + int(block)}.{rest}"] = value
        else:
            found[f"{plain.get(first, first)}.{rest}"] = value
    return found
