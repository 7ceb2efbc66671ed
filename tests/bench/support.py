"""What a training step with masks on a share of the weights costs beside LoRA's and full training.

The model has the shape of MiniLM (six layers of 384, 10.6 million weights in linear layers); a step
is forward, backward and fused AdamW on 32 sequences of 32 tokens. All ways run in turn in one
process; what counts are ratios to LoRA r8. Trained numbers and the adapter's bytes stand beside it.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from pemn_surgery import pemnify
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table
from tests.bench.training import in_turn, ratio, summary

OF = "LoRA r8"


def encoder() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def masks(**options: Any) -> Callable[[nn.Module], nn.Module]:
    given = {"bank": "own", "selector": "threshold", "rest": "freeze", "modules_to_save": []}
    return lambda model: pemnify(model, **given, **options)


def lora(model: nn.Module) -> nn.Module:
    targets = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": lambda model: model,
    OF: lora,
    "flips": masks(form="flip"),
    "flips on .1": masks(form="flip", support=0.1),
    "flips on .02": masks(form="flip", support=0.02),
    "drops on .1": masks(support=0.1),
    "flips on .1 of rows": masks(form="flip", support=0.1, support_by="rows"),
}


def stepper(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens).last_hidden_state.square().mean().backward()
        optimizer.step()

    return step


def adapter_bytes(model: nn.Module) -> int:
    if not hasattr(model, "save_pretrained") or not hasattr(model, "peft_config"):
        return sum(4 * one.numel() for one in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def measure(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    base, tokens = encoder(), torch.randint(0, 30522, (32, 32))
    models = {name: way(copy.deepcopy(base)) for name, way in WAYS.items()}
    taken = in_turn({name: stepper(one, tokens) for name, one in models.items()}, rounds)
    trained = {
        name: sum(p.numel() for p in one.parameters() if p.requires_grad)
        for name, one in models.items()
    }
    return {
        "row": "BERT of MiniLM's shape, 32 x 32 tokens, fp32",
        "ms": {name: summary(times) for name, times in taken.items()},
        "ratio": {name: ratio(times, taken[OF]) for name, times in taken.items()},
        "trained": trained,
        "bytes": {name: adapter_bytes(one) for name, one in models.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.support --json docs/results/support.json",
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.rounds)
    rows = [
        (name, f"{found['ms'][name]['median']:.0f}", f"{found['ratio'][name]['of_medians']:.2f}",
         f"{found['trained'][name]:,}", f"{found['bytes'][name]:,}")
        for name in WAYS
    ]  # fmt: skip
    columns = ("way", "ms a step", f"of {OF}", "trained", "bytes")
    Console(width=120).print(table(found["row"], columns, rows))
    if given.json:
        words = f"python -m tests.bench.support --rounds {given.rounds} --threads {given.threads}"
        result = {"command": words, **environment(), "rows": [found]}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
