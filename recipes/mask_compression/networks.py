"""Classifiers of the tasks' own on the pretrained networks."""

import torch
from torch import nn

from pemn_surgery.recipe.pretrained import WIDTH


def with_head(network: nn.Sequential, classes: int, seed: int) -> nn.Sequential:
    """Put a random classifier without bias (kaiming normal, from ``seed``) on a network."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, classes, bias=False)
    nn.init.kaiming_normal_(head.weight, generator=generator)
    network[-1] = head
    return network
