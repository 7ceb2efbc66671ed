"""The models of the stored adapters. They must never change: adapters of every version use them.

Base values are quotients of small whole numbers, equal on every machine and with every torch, so
that fingerprints of a model's own weights stay the same.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Two convolutions (one grouped) with norms, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.grouped(x).mean(dim=(2, 3)))


class Attention(nn.Module):
    """Both projections of torch's attention, a 1-D convolution, a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.recurrent = nn.GRU(8, 4, batch_first=True)

    def forward(self, x):
        x = self.conv(x.flatten(2)).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.recurrent(x)[0].mean(dim=1)


class Experts(nn.Module):
    """Raw parameters of three dimensions, multiplied as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(2, 4, 8))
        self.down = nn.Parameter(torch.zeros(2, 8, 4))

    def forward(self, x):
        return torch.bmm(F.relu(torch.bmm(x.expand(2, -1, -1), self.gate_up)), self.down).sum(0)


class Mixture(nn.Module):
    """A router, experts and a head."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 4)
        self.experts = Experts()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.experts(self.router(x.mean(dim=(2, 3))[:, [0, 1, 2, 0]])))


class Kernels(nn.Module):
    """Kernels enough for levels: bits are coded beside their place and their neighbours."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 32, 3, stride=4, padding=1, bias=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.deep(x).mean(dim=(2, 3)))


MODELS = {"net": Net, "attention": Attention, "mixture": Mixture, "kernels": Kernels}


def build(name):
    """A model with fixed values: 127ths of -64 to 63, positive variances."""
    model = MODELS[name]().eval()
    for place, (key, tensor) in enumerate(sorted(model.state_dict().items())):
        if tensor.is_floating_point():
            steps = torch.arange(tensor.numel()) * 37 + 11 * place
            values = (steps.remainder(128) - 64).to(torch.float32) / 128
            tensor.copy_(values.view(tensor.shape).abs() + 0.5 if "running_var" in key
                         else values.view(tensor.shape))  # fmt: skip
    return model


def inputs(name):
    count = 2 * (4 if name == "attention" else 3) * 6 * 6
    steps = torch.arange(count)
    values = (steps * steps * 7 + steps * 29).remainder(61).to(torch.float32) / 32 - 1
    return values.view(2, -1, 6, 6)


EXPERTS = ["experts.gate_up", "experts.down"]
_BANKS = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.1, "seed": 5},
    "rp_permuted": {"bank": "rp", "length": 7, "permute": True, "seed": 3},
    "one_layer": {"bank": "one_layer", "bank_init": "kaiming_uniform"},
    "own": {"bank": "own"},
    "own_drawn": {"bank": "own", "bank_init": "signed_constant", "scale_fan": True},
}
_SELECTORS = {
    "topk": {"selector": "topk", "density": 0.4},
    "threshold": {"selector": "threshold", "threshold": 0.005},
}
# Name: (model, options of PemnConfig). New cases of a later version go behind these.
CASES = {
    **{
        f"{bank}_{selector}": ("net", {**_BANKS[bank], **_SELECTORS[selector]})
        for bank in _BANKS
        for selector in _SELECTORS
    },
    "scaled": ("net", {"bank": "own", "selector": "threshold", "scale": "sqrt_density"}),
    "rest_train": ("net", {"bank": "own", "rest": "train"}),
    "rest_freeze": ("net", {"bank": "own", "rest": "freeze"}),
    "modules_to_save": ("net", {"bank": "own", "modules_to_save": ["head"]}),
    "named_targets": ("net", {"bank": "own", "target_modules": ["grouped"]}),
    "mp_of_the_model": ("net", {"bank": "mp", "bank_init": "model"}),
    "attention_rp": ("attention", {"bank": "rp", "ratio": 0.2}),
    "attention_own": ("attention", {"bank": "own", "rest": "norms"}),
    "experts_mp": ("mixture", {"bank": "mp", "functional_weights": EXPERTS}),
    "experts_own": ("mixture", {"bank": "own", "functional_weights": EXPERTS}),
    "entropy": ("attention", {"bank": "rp", "ratio": 0.2, "density": 0.9, "coding": "entropy"}),
    "entropy_low": ("attention", {"bank": "own", "density": 0.08, "coding": "entropy"}),
    "entropy_near_half": ("kernels", {"bank": "rp", "density": 0.58, "coding": "entropy"}),
    "entropy_middle": ("kernels", {"bank": "rp", "density": 0.75, "coding": "entropy"}),
    "entropy_high": ("kernels", {"bank": "rp", "density": 0.95, "coding": "entropy"}),
    "context_guides": ("kernels", {"bank": "rp", "ratio": 0.1, "coding": "context"}),
    "context_neighbours": (
        "kernels",
        {"bank": "own", "selector": "threshold", "coding": "context"},
    ),
    "base": ("kernels", {"bank": "own", "selector": "threshold", "coding": "base"}),
    "scores": ("net", {"bank": "rp", "ratio": 0.1}),  # a Trainer's checkpoint: float scores
}
