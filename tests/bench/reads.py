"""What reading masked weights costs where layers are small, here and in another checkout.

A step (forward, backward, fused AdamW) of a CIFAR-sized ResNet at batch 1, relative to the same
step without masks: almost all of it is Python. And the microseconds that each of 32 small linear
layers takes in an evaluation: dense, masked, and with masks merged. Processes of both checkouts
take turns; one's result is the median over its processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from pemn_surgery import PemnConfig

BANKS: dict[str, dict[str, Any]] = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 1e-2},
    "own": {"bank": "own", "selector": "threshold"},
}
LAYERS, WIDTH = 32, 64
HERE = Path(__file__).resolve().parents[2]


def network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (5, 5, 5, 1), num_classes=10, channels=(16, 32, 64, 64))


def masked(model: nn.Module, bank: str) -> Any:
    return get_peft_model(model, PemnConfig(**BANKS[bank], modules_to_save=[]))


def stepper(model: nn.Module) -> Callable[[], None]:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    image = torch.randn(1, 3, 64, 64)

    def step() -> None:
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()

    return step


def in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way on the process's clock; a tenth of the rounds warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-(rounds // 10), rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if turn >= 0:
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def steps(rounds: int) -> dict[str, float]:
    """A step's time relative to the dense one."""
    ways = {"dense": stepper(network())}
    ways |= {bank: stepper(masked(network(), bank)) for bank in BANKS}
    found = in_turn(ways, rounds)
    return {name: seconds / found["dense"] for name, seconds in found.items()}


def layers(rounds: int) -> dict[str, float]:
    """Microseconds of a layer in an evaluation."""

    def stack() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).eval()

    x = torch.randn(1, WIDTH)
    plain, kept, merged = stack(), masked(stack(), "mp").eval(), masked(stack(), "mp").eval()
    merged.merge_adapter()
    with torch.no_grad():
        ways = {"dense": plain, "masked": kept, "merged": merged}
        found = in_turn({k: lambda way=way: way(x) for k, way in ways.items()}, 10 * rounds)
    return {name: 1e6 * seconds / LAYERS for name, seconds in found.items()}


def child(checkout: Path, rounds: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--child", "--rounds", str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        part: {
            name: {
                "median": round(statistics.median(values := [one[part][name] for one in found]), 3),
                "least": round(min(values), 3),
                "most": round(max(values), 3),
            }
            for name in found[0][part]
        }
        for part in ("step", "layer_us")
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.reads --against ../earlier --json reads.json",
    )
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--processes", type=int, default=5, help="of each checkout")
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each way")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        torch.set_num_threads(1)
        print(json.dumps({"step": steps(given.rounds), "layer_us": layers(given.rounds)}))  # noqa: T201
        return 0
    checkouts = {"here": HERE} | ({"against": given.against} if given.against else {})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(given.processes):
        for name, checkout in checkouts.items():
            found[name].append(child(checkout, given.rounds))
    rows = {name: {"commit": commit(checkouts[name]), **medians(found[name])} for name in found}
    Console().print_json(data=rows)
    if given.json:
        from pemn_surgery.kernels import library
        from pemn_surgery.report.machine import environment

        words = ["CHECKOUT" if word == str(given.against) else word for word in sys.argv[1:]]
        result = {"command": " ".join(["python -m tests.bench.reads", *words])}
        result |= {"environment": environment(), "kernels": library.describe()}
        given.json.write_text(json.dumps(result | rows, indent=1) + "\n", encoding="utf-8")
    return 0


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
