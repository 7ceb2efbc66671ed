"""Write this version's adapters: ``python -m tests.golden.make``. Once per version that differs.

A folder that exists is never written again: adapters of old versions are what must keep loading.
"""

import hashlib
import json
from pathlib import Path

import torch

from pemn_surgery import __version__, pemnify
from pemn_surgery.adapters.layer import PemnLayer
from tests.golden import cases

FOLDER = Path(__file__).parent


def expectation(model, name):
    """What a loaded adapter must be: its masks' digests exactly, its outputs to the last digits."""
    model.eval()
    with torch.no_grad():
        outputs = model(cases.inputs(name))
    layers = [module for module in model.modules() if isinstance(module, PemnLayer)]
    return {
        "model": name,
        "masks": {layer.target: digest(layer.mask_of("default").mask()) for layer in layers},
        "ones": {layer.target: int(layer.mask_of("default").mask().sum()) for layer in layers},
        "outputs": outputs.tolist(),
    }


def digest(mask):
    """SHA-256 of a mask as one byte a weight, row by row."""
    return hashlib.sha256(bytes(mask.flatten().tolist())).hexdigest()


def trained(name, options):
    """A model whose scores and tensors have moved, as far as the options let them."""
    model = pemnify(cases.build(name), **options)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(cases.inputs(name)).square().mean().backward()
        optimizer.step()
    if options.get("coding") == "base":
        drop_large_weights(model)
    return model


@torch.no_grad()
def drop_large_weights(model):
    """As learned masks do; three steps of Adam, which moves all scores alike, do not."""
    for layer in model.modules():
        if isinstance(layer, PemnLayer):
            layer.mask_of("default").scores.add_(0.1 - layer.fill().abs() / 3)


def write(case, folder):
    """Train one case and keep it."""
    name, options = cases.CASES[case]
    torch.manual_seed(0)
    model = trained(name, options)
    model.peft_config["default"].keep_scores = case == "scores"
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    text = json.dumps(expectation(model, name), indent=1)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


def main():
    release = ".".join(__version__.split(".")[:2])
    folder = FOLDER / release
    for case in cases.CASES:
        if not (folder / case).exists():
            write(case, folder / case)


if __name__ == "__main__":
    main()
