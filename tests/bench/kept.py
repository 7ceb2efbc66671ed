"""What looking after kept weights takes of a forward at batch 1.

Each model holds one task as bits, in eval mode, on one core. Forwards that look at the sample of
frozen numbers alternate with forwards that do not; processor time, since machines are shared.
``python -m tests.bench.kept --out docs/results/kept.json``.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import timm
import torch

from pemn_surgery import pemnify
from pemn_surgery.masks import kept
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.report.machine import environment
from tests.adapters import models


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224")


MODELS = {
    "ViT-S/16": (vit, lambda: torch.zeros(1, 3, 224, 224), 15),
    "BERT, tiny": (models.bert, lambda: models.tokens(3)[:1], 400),
}
BANKS = {"own": {}, "rp": {"ratio": 0.1}}


def look_away(_):
    """A function rather than a mock, which takes time itself."""


def timed(act):
    start = time.process_time()
    act()
    return 1000 * (time.process_time() - start)


def measure(name, bank):
    build, batch, repeats = MODELS[name]
    model = pemnify(build(), bank=bank, inference_mode=True, modules_to_save=[], **BANKS[bank])
    model, x = model.eval(), batch()
    looking, blind = [], []
    with torch.no_grad():
        for _ in range(repeats):
            looking.append(timed(lambda: model(x)))
            with mock.patch.object(kept, "_look_at", look_away):
                blind.append(timed(lambda: model(x)))
        layers = [layer for layer in model.modules() if isinstance(layer, MaskedWeight)]
    with_look, without = statistics.median(looking), statistics.median(blind)
    sampled = sum(sample.there.numel() for layer in layers for sample in layer._kept.samples)
    return {
        "model": name,
        "bank": bank,
        "masked_weights": len(layers),
        "numbers_compared": sampled,
        "forward_ms": round(with_look, 3),
        "forward_without_look_ms": round(without, 3),
        "share": round(with_look / without - 1, 4),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m tests.bench.kept --out docs/results/kept.json",
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, bank) for name in MODELS for bank in BANKS]
    text = json.dumps({**environment(), "models": rows}, indent=1)
    print(text)  # noqa: T201
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
