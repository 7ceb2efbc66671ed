"""Adapters of every coding, on a network whose masks are worth it."""

import torch
from peft import PeftModel
from safetensors.torch import load_file

from pemn_surgery import pemnify
from pemn_surgery.coding.header import inspect
from tests.adapters import models

OPTIONS = {
    "bits": {"bank": "rp"},
    "entropy": {"bank": "rp", "density": 0.95},
    "context": {"bank": "rp", "ratio": 0.1, "seed": 3},
    "base": {"bank": "own", "selector": "threshold"},
}


def net(seed=0):
    return models.net(seed, channels=32)  # masks of 9,216 weights, for which a table pays


def save(folder, coding, noise=0.3, **options):
    """Train a little, or drop large weights, as learned masks on pretrained weights do."""
    model = pemnify(net(), coding=coding, **{**OPTIONS[coding], **options})
    if coding == "base":
        drop_large_weights(model, noise)
    else:
        optimizer = models.trainer_of(model, rate=0.005)
        for _ in range(2):
            models.step(model, optimizer, 0)
    model.save_pretrained(str(folder))
    return model


@torch.no_grad()
def drop_large_weights(model, noise=0.3):
    """Masks whose zeros are mostly the largest fifth of the weights."""
    generator = torch.Generator().manual_seed(0)
    for layer in models.mask_layers(model).values():
        sizes = layer.fill().abs()
        random = torch.rand(sizes.shape, generator=generator)
        scores = sizes.quantile(0.8) - sizes - noise * sizes.mean() * (random - 0.5)
        layer.mask_of("default").scores.copy_(scores)


def load(folder, base=None, **options):
    return PeftModel.from_pretrained(net() if base is None else base, str(folder), **options)


def stored_masks(folder):
    tensors = load_file(folder / models.WEIGHTS_FILE)
    found = {key: value for key, value in tensors.items() if ".pemn_masks." in key}
    assert len(found) >= 4
    return found


def codings(folder):
    return {inspect(value, key).coding for key, value in stored_masks(folder).items()}


def keys(model):
    """The stored key of each mask by the weight's name."""
    parted = {name: name.rpartition(".")[::2] for name in models.mask_layers(model)}
    return {
        name: f"base_model.model.{module}.masked_{parameter}.pemn_masks.bits"
        for name, (module, parameter) in parted.items()
    }


def base_words(model):
    """What the independent reader needs of a base: each weight as words of bfloat16, by key."""
    found = keys(model)
    return {
        found[name]: layer.fill().flatten().bfloat16().view(torch.int16).numpy().view("u2")
        for name, layer in models.mask_layers(model).items()
    }


def size(folder):
    return sum(value.numel() for value in stored_masks(folder).values())
