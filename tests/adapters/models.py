"""Tiny models and the comparisons that the adapter tests share."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.task_layer import PemnTaskLayer

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS_FILE = "adapter_model.safetensors"

BANKS = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.01},
    "rp_aligned": {"bank": "rp", "ratio": 0.05, "aligned": True, "seed": 4},
    "rp_permuted": {"bank": "rp", "ratio": 0.05, "permute": True, "seed": 3},
    "one_layer": {"bank": "one_layer"},
    "own": {"bank": "own", "selector": "topk"},
    "own_generated": {"bank": "own", "bank_init": "signed_constant", "scale": "sqrt_density"},
}
# Banks whose fills are drawn from one store.
SHARED = ["mp", "rp", "rp_aligned", "rp_permuted", "one_layer"]
GENERATED = [*SHARED, "own_generated"]  # numbers that a seed makes

# PEFT 0.21 reads an attribute that transformers 5.23 has renamed; nothing of ours.
ignore_peft_on_transformers = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


class Net(nn.Module):
    """Three convolutions (two of one shape) with norms, and a linear head."""

    def __init__(self, channels=8, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(x.mean(dim=(2, 3)))


NET_TARGETS = {
    "conv1.weight": (8, 3, 3, 3),
    "conv2.weight": (8, 8, 3, 3),
    "conv3.weight": (8, 8, 3, 3),
    "head.weight": (4, 8),
}


def net(seed=0, **shape):
    """A `Net` with random weights of its own seed; nothing else sees the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(**shape)
        for module in model.modules():  # fresh statistics would hide a mix-up of tasks
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def wide(seed=0):
    """2.1 million weights in three Linear layers, with a norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(16, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 2048),
            nn.ReLU(), nn.Linear(2048, 4),
        )  # fmt: skip


def images(seed=0, count=6, size=10):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(count, 3, size, size, generator=generator)


def labels(seed=0, count=6, classes=4):
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.randint(classes, (count,), generator=generator)


def trainer_of(model, rate=0.02):
    """Adam: every score moves by about ``rate`` a step, so masks really change."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)


def step(model, optimizer, task):
    """One step on a task's own batch."""
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(images(task)), labels(task)).backward()
    optimizer.step()


def train(model, task=0, steps=2):
    optimizer = trainer_of(model)
    for _ in range(steps):
        step(model, optimizer, task)
    return model


def flips(before, after):
    """How many bits differ between two sets of masks."""
    assert before, "nothing to compare"
    assert set(before) == set(after)
    return sum(int((after[name] != mask).sum()) for name, mask in before.items())


def logits(model, x=None):
    model.eval()
    with torch.no_grad():
        return model(images(99) if x is None else x)


def bert_config():
    from transformers import BertConfig

    return BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )


def bert(seed=0, kind="BertForSequenceClassification"):
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, kind)(bert_config()).eval()


def tokens(seed=0, count=4):
    generator = torch.Generator().manual_seed(3000 + seed)
    return torch.randint(40, (count, 8), generator=generator)


def mask_layers(model):
    """Every masking child, by the weight's name; never empty."""
    found = {m.target: m for m in model.modules() if isinstance(m, PemnLayer)}
    assert found, "the model has no masking layer"
    return found


def task_layers(model):
    found = {m.target: m for m in model.modules() if isinstance(m, PemnTaskLayer)}
    assert found, "the model has no task tensors"
    return found


def masks(model, adapter="default"):
    """The bool masks of an adapter by the weight's name, chosen with plain torch."""
    return {name: mask_of_layer(layer, adapter) for name, layer in mask_layers(model).items()}


def mask_of_layer(layer, adapter):
    """The bool mask of one layer, chosen with plain torch."""
    mask = layer.mask_of(adapter)
    if mask.scores is None:
        payload = mask.bits[32:].tolist()
        count = int(torch.Size(mask.mask_shape).numel())
        flat = [payload[i // 8] >> (i % 8) & 1 for i in range(count)]
        return torch.tensor(flat, dtype=torch.bool).view(mask.mask_shape)
    if mask.selector.name == "threshold":
        return mask.scores.detach() > mask.selector.threshold
    scores = mask.scores.detach().flatten()
    size = scores.abs() if mask.selector.name == "topk" else scores
    order = torch.argsort(size, stable=True)
    chosen = torch.ones(size.numel(), dtype=torch.bool)
    chosen[order[: int((1 - mask.selector.density) * size.numel())]] = False
    return chosen.view(mask.mask_shape)


def assert_equal(actual, expected, what=""):
    """Equal to the last bit: dtype, shape and values (NaN equals NaN)."""
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    assert tuple(actual.shape) == tuple(expected.shape), (what, actual.shape, expected.shape)
    same = torch.equal(torch.nan_to_num(actual, nan=1e30), torch.nan_to_num(expected, nan=1e30))
    difference = (actual.double() - expected.double()).abs().max() if not same else 0
    assert same, f"{what}: largest difference {difference}"


def assert_differs(actual, other, what=""):
    assert tuple(actual.shape) == tuple(other.shape), (what, actual.shape, other.shape)
    assert not torch.equal(actual, other), f"{what}: equal, but must not be"


def assert_same_tensors(actual, expected):
    """Two non-empty dictionaries of tensors: equal keys and equal bits."""
    assert expected, "nothing to compare"
    assert set(actual) == set(expected), sorted(set(actual) ^ set(expected))[:6]
    for name, value in expected.items():
        assert_equal(actual[name], value, name)


class Snapshot:
    """Everything about a model that a refused call must leave alone."""

    def __init__(self, model, run=None):
        self.model, self.run = model, run or logits
        self.classes = [(name, type(module)) for name, module in model.named_modules()]
        self.tensors = {name: value.clone() for name, value in model.state_dict().items()}
        self.grads = {name: p.requires_grad for name, p in model.named_parameters()}
        self.attributes = set(vars(model))
        self.training = {name: module.training for name, module in model.named_modules()}
        self.logits = self._run()

    def _run(self):
        """Logits in eval mode; the mode is put back."""
        found = self.run(self.model).clone()
        for name, module in self.model.named_modules():
            if name in self.training:
                module.training = self.training[name]
        return found

    def assert_unchanged(self):
        assert [(n, type(m)) for n, m in self.model.named_modules()] == self.classes
        assert {n: m.training for n, m in self.model.named_modules()} == self.training
        assert_same_tensors(self.model.state_dict(), self.tensors)
        assert {n: p.requires_grad for n, p in self.model.named_parameters()} == self.grads
        assert set(vars(self.model)) == self.attributes
        assert_equal(self._run(), self.logits, "logits")


def says(error, *parts):
    """The message of an error holds every part."""
    message = str(error.value if hasattr(error, "value") else error)
    assert parts, "name what the message must say"
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"
    return message


def run_python(code, *arguments, expect=0):
    """Run code in a new process in the repository's root; return its standard output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == expect, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def forget_digest(folder):
    """Let an adapter's weights be rewritten by hand, without the seal that they had."""
    path = Path(folder) / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config.pop("digest")
    path.write_text(json.dumps(config), encoding="utf-8")


def clone(model):
    """An untouched second copy."""
    return copy.deepcopy(model)
