"""What training masks takes of memory, and what leaner ways of training them cost in accuracy.

Memory: a process for each way trains 12 linear layers of 1,536 x 1,536 (28.3 million weights) on
256 tokens, and reports the highest resident memory of two steps, after two others, less what was
resident before the model was made: bytes a weight. Accuracy: the same ways on the 1,797 digits of
scikit-learn, a network of three linear layers, five seeds, on a third of the images held out.

Lean ways are made of what others have: bfloat16 scores rounded stochastically and 8-bit moments,
torchao's ``AdamW8bit``; a step within the backward pass, by torch's gradient hooks; and activation
checkpointing of every layer, which makes its effective weight again in place of keeping it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pemn_surgery import PemnConfig
from pemn_surgery.kernels import library
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table

WIDTH, DEPTH, TOKENS = 1536, 12, 256
WEIGHTS = WIDTH * WIDTH * DEPTH
BANKS: dict[str, dict[str, Any]] = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 1e-2},
    "own": {"bank": "own", "selector": "threshold"},
}
Stepper = Callable[[], None]


def layers(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())))


def lora(model: nn.Module) -> nn.Module:
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return get_peft_model(model, LoraConfig(r=16, target_modules=targets))


def masked(model: nn.Module, bank: str, *, low: bool) -> nn.Module:
    """Masks on a model, on one in bfloat16 with scores of that type where ``low``."""
    if low:
        model = model.to(torch.bfloat16)
    config = PemnConfig(**BANKS[bank], modules_to_save=[])
    return get_peft_model(model, config, autocast_adapter_dtype=not low)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def eight_bits(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, weight_decay=0.0, bf16_stochastic_round=True)


def after_backward(model: nn.Module, make: Any, rate: float) -> Stepper:
    """Step when all gradients are there."""
    optimizer = make(trained(model), rate)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_backward(model: nn.Module, make: Any, rate: float) -> Stepper:
    """Step each parameter as soon as its gradient is there, and free that."""
    optimizers = {parameter: make([parameter], rate) for parameter in trained(model)}

    def step_one(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step_one)
    return lambda: None


class Checkpointed(nn.Sequential):
    """Layers that run again for the gradient, each by itself."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


WAYS: dict[str, tuple[str, bool, Any, Any]] = {  # bank, bfloat16, optimizer, when it steps
    "dense": ("dense", False, plain, after_backward),
    "LoRA r16": ("lora", False, plain, after_backward),
    **{bank: (bank, False, plain, after_backward) for bank in BANKS},
    "mp, step in backward": ("mp", False, plain, in_backward),
    "mp, 8-bit moments": ("mp", False, eight_bits, after_backward),
    **{f"{bank}, lean": (bank, True, eight_bits, after_backward) for bank in BANKS},
    "own, lean, checkpointed": ("own", True, eight_bits, after_backward),
    "own, lean, step in backward": ("own", True, eight_bits, in_backward),
    **{
        f"{bank}, lean, checkpointed, step in backward": (bank, True, eight_bits, in_backward)
        for bank in BANKS
    },
}


def ready(way: str, model: nn.Module, rate: float) -> tuple[nn.Module, Stepper, torch.dtype]:
    """A model to train in one way, its step, and the type of its inputs."""
    kind, low, optimizer, when = WAYS[way]
    if "checkpointed" in way:
        model = Checkpointed(*model.children())
    if kind in BANKS:
        model = masked(model, kind, low=low)
    elif kind == "lora":
        model = lora(model)
    model.train()
    return model, when(model, optimizer, rate), torch.bfloat16 if low else torch.float32


# ---- memory --------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """Bytes by the kernel's status of this process: VmRSS now, VmHWM at the most."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(x.split()[1]) for x in text.splitlines() if x.startswith(name)) * 1024


def child(way: str) -> None:
    """Print bytes a weight of one way, in this process."""
    torch.set_num_threads(1)
    _, _, dtype = made = ready(way, layers(32, 2), 1e-3)
    _train(*made[:2], torch.randn(4, 32).to(dtype))  # what is loaded or compiled once
    before = resident("VmRSS")
    torch.manual_seed(0)
    model, step, dtype = ready(way, layers(WIDTH, DEPTH), 1e-3)
    x = torch.randn(TOKENS, WIDTH).to(dtype)
    for _ in range(2):
        _train(model, step, x)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(2):
        _train(model, step, x)
    print((resident("VmHWM") - before) / WEIGHTS)  # noqa: T201


def _train(model: nn.Module, step: Stepper, x: Tensor) -> None:
    model(x).float().square().mean().backward()
    step()


def memory(way: str) -> float:
    """Bytes a weight of one way, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.memory", "--child", way]
    # What is freed goes back at once: else glibc keeps it, and the highest tells of its habits.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


# ---- accuracy ------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data).float() / 16 - 0.5, torch.tensor(found.target)


def accuracy(way: str, seed: int, epochs: int) -> float:
    """Share of the held-out digits that a network trained in one way names."""
    torch.manual_seed(seed)
    x, y = digits()
    order = torch.randperm(len(x))
    known, unknown = order[: 2 * len(x) // 3], order[2 * len(x) // 3 :]
    network = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    model, step, dtype = ready(way, network, 1e-3 if way == "dense" else 1e-2)
    for _ in range(epochs):
        for rows in known[torch.randperm(len(known))].split(64):
            F.cross_entropy(model(x[rows].to(dtype)).float(), y[rows]).backward()
            step()
    model.eval()
    with torch.no_grad():
        return float((model(x[unknown].to(dtype)).argmax(-1) == y[unknown]).float().mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.memory --json docs/results/memory.json",
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes a way")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--child", choices=list(WAYS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return 0
    torch.set_num_threads(1)
    rows = []
    for way in WAYS:
        taken = [memory(way) for _ in range(given.repeats)]
        right = [accuracy(way, seed, given.epochs) for seed in range(given.seeds)]
        rows.append({"way": way, "bytes_a_weight": taken, "accuracy": right})
        Console().print(way, statistics.median(taken), statistics.mean(right))
    Console(width=110).print(shown(rows))
    if given.json:
        command = " ".join(["python -m tests.bench.memory", *sys.argv[1:]])
        result = {"command": command, "environment": environment("numpy", "torchao")}
        result |= {"kernels": library.describe(), "weights": WEIGHTS, "rows": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def shown(rows: list[dict[str, Any]]) -> Any:
    dense = statistics.median(rows[0]["bytes_a_weight"])
    cells = [
        [
            row["way"],
            f"{statistics.median(row['bytes_a_weight']):.1f}",
            f"{statistics.median(row['bytes_a_weight']) / dense:.2f}",
            f"{100 * statistics.mean(row['accuracy']):.2f}",
            f"{100 * statistics.stdev(row['accuracy']):.2f}",
        ]
        for row in rows
    ]
    columns = ("way", "bytes a weight", "of dense", "accuracy, %", "deviation")
    return table("training", columns, cells)


if __name__ == "__main__":
    sys.exit(main())
