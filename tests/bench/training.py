"""What a training step with masks costs beside a dense one, LoRA and masks chosen by a sort.

Beside it: what an evaluation in the middle of training costs, and what a switch to another task.

A step is forward, backward and fused AdamW. All ways of one row run in turn in one process, so that
whatever else the machine does meets them alike; what counts are ratios to the dense step. With one
thread the clock is that of the process, which stands still while others run.
"""

import argparse
import copy
import functools
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import timm
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.kernels import library
from pemn_surgery.masks.selector import dropped_count, topk_mask
from pemn_surgery.recipe.networks import convmixer, resnet
from pemn_surgery.report.machine import environment
from pemn_surgery.report.tables import table

DENSITY = 0.5
CPU = torch.device("cpu")


class Sorted(torch.autograd.Function):
    """Masks by a full sort, as edge-popup's own code chooses them; the gradient passes straight."""

    @staticmethod
    def forward(ctx: Any, size: Tensor) -> Tensor:
        out = size.clone()
        _, order = size.flatten().sort()
        dropped = dropped_count(size.numel(), DENSITY)
        flat = out.flatten()
        flat[order[:dropped]] = 0
        flat[order[dropped:]] = 1
        return flat.view(size.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class SortedMask(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * Sorted.apply(self.scores.abs())


def by_sort(model: nn.Module) -> nn.Module:
    """Put sorted masks on every linear and convolution."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.requires_grad_(False)
            mask = SortedMask(module.weight)
            parametrize.register_parametrization(module, "weight", mask, unsafe=True)
    return model


def lora(model: nn.Module) -> nn.Module:
    names = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    grouped = [n for n in names if getattr(model.get_submodule(n), "groups", 1) > 1]
    targets = "|".join(re.escape(name) for name in names if name not in grouped)  # whole names
    return get_peft_model(model, LoraConfig(r=16, target_modules=targets))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dense": lambda model: model,
    "top-k mp": lambda model: pemnify(model, bank="mp", density=DENSITY),
    "top-k rp": lambda model: pemnify(model, bank="rp", ratio=1e-2, density=DENSITY),
    "threshold own": lambda model: pemnify(model, bank="own", selector="threshold"),
    "LoRA r16": lora,
    "sort": by_sort,
}


class Wide(nn.Module):
    """One linear layer of 768 x 3072."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(768, 3072, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=8, use_cache=False,
        )
    )  # fmt: skip


def features(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(*shape).requires_grad_()}  # as behind another layer


ROWS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    **{
        f"Linear 768x3072, {tokens} tokens": (Wide, lambda tokens=tokens: features(tokens, 768))
        for tokens in (64, 256, 2048)
    },
    "ViT-S/16, batch 8": (
        lambda: timm.create_model("vit_small_patch16_224", num_classes=10),
        lambda: {"x": torch.randn(8, 3, 224, 224)},
    ),
    "Llama shape 4 x 512, 256 tokens": (
        llama,
        lambda: {"input_ids": torch.randint(0, 1024, (1, 256))},
    ),
    "ResNet-32, batch 128": (resnet, lambda: {"input": torch.randn(128, 3, 32, 32)}),
    "ResNet-32, batch 1": (resnet, lambda: {"input": torch.randn(1, 3, 32, 32)}),
    "ConvMixer 256/6, batch 32": (
        lambda: convmixer(256, 6),
        lambda: {"input": torch.randn(32, 3, 32, 32)},
    ),
}


def stepper(model: nn.Module, inputs: dict[str, Tensor], bf16: bool) -> Callable[[], None]:
    """Return one training step of a model."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    device = next(iter(inputs.values())).device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            out = model(**inputs) if "input_ids" in inputs else model(*inputs.values())
        out = getattr(out, "logits", out)
        out.float().square().mean().backward()
        optimizer.step()

    return step


def on_cpu(way: Callable[[], object]) -> float:
    """Milliseconds: of the process where it has one thread, of the wall where it has more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    way()
    return 1e3 * (clock() - start)


def on_cuda(way: Callable[[], object]) -> float:
    """Milliseconds between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    way()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def in_turn(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Return milliseconds of each way and round; two rounds before them are for warming up."""
    timed = on_cuda if device.type == "cuda" else on_cpu
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, rounds):
        for name, way in ways.items():
            milliseconds = timed(way)
            if turn >= 0:
                taken[name].append(milliseconds)
    return taken


def measure(row: str, bf16: bool, rounds: int, device: torch.device = CPU) -> dict[str, Any]:
    """Time a row's ways in turn; milliseconds, and ratios to the dense step."""
    make, draw = ROWS[row]
    torch.manual_seed(0)
    base, inputs = make(), {name: tensor.to(device) for name, tensor in draw().items()}
    steps = {
        name: stepper(way(copy.deepcopy(base)).to(device), inputs, bf16)
        for name, way in WAYS.items()
    }
    taken = in_turn(steps, rounds, device)
    return {
        "row": row,
        "precision": "bf16 autocast" if bf16 else "fp32",
        "ms": {name: summary(times) for name, times in taken.items()},
        "ratio": {name: ratio(times, taken["dense"]) for name, times in taken.items()},
    }


def measure_choice(weights: int, rounds: int) -> dict[str, Any]:
    """Time the choice of a mask beside ``S > 0``."""
    scores = torch.randn(weights, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], object]] = {
        "S > 0": lambda: scores > 0,
        "top-k": lambda: topk_mask(scores, DENSITY),
        "sort": lambda: scores.abs().sort(),
    }
    taken = in_turn(ways, rounds)
    return {
        "row": f"choose among {weights:,} scores",
        "precision": "fp32",
        "ms": {name: summary(times) for name, times in taken.items()},
        "ratio": {name: ratio(times, taken["S > 0"]) for name, times in taken.items()},
    }


def measure_evaluation(rounds: int) -> dict[str, Any]:
    """Time forwards of models that have just taken a training step; the first one by itself."""
    torch.manual_seed(0)
    base = timm.create_model("vit_small_patch16_224", num_classes=10)
    x = torch.randn(1, 3, 224, 224)
    models = {name: way(copy.deepcopy(base)) for name, way in WAYS.items() if name != "sort"}
    for model in models.values():
        stepper(model, {"x": x}, bf16=False)()
        model.eval()
    with torch.inference_mode():
        forwards = {name: functools.partial(model, x) for name, model in models.items()}
        first = {name: on_cpu(way) for name, way in forwards.items()}
        taken = in_turn(forwards, rounds)
    return {
        "row": "ViT-S/16, batch 1, evaluated in the middle of training",
        "precision": "fp32",
        "first_ms": {name: round(time, 3) for name, time in first.items()},
        "ms": {name: summary(times) for name, times in taken.items()},
        "ratio": {name: ratio(times, taken["dense"]) for name, times in taken.items()},
    }


def measure_switch(rounds: int) -> dict[str, Any]:
    """Time what leads to the first answer of another task, beside reading a dense checkpoint."""
    torch.manual_seed(0)
    dense = timm.create_model("resnet18", num_classes=10).eval()
    masked = pemnify(copy.deepcopy(dense), bank="mp", inference_mode=True).eval()
    masked.add_adapter("other", PemnConfig(bank="mp", inference_mode=True))
    names, x = itertools.cycle(["other", "default"]), torch.randn(1, 3, 32, 32)

    def switch() -> None:
        masked.set_adapter(next(names))
        masked.eval()(x)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "dense.safetensors"
        save_file(dense.state_dict(), path)

        def load() -> None:
            dense.load_state_dict(load_file(path))
            dense(x)

        taken = in_turn({"load a dense checkpoint": load, "switch to another task": switch}, rounds)
    of = taken["load a dense checkpoint"]
    return {
        "row": "ResNet-18, the first answer of another task",
        "precision": "fp32",
        "ms": {name: summary(times) for name, times in taken.items()},
        "ratio": {name: ratio(times, of) for name, times in taken.items()},
    }


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    found = {"min": min(times), "median": middle, "quarter": low, "three_quarters": high}
    return {key: round(value, 3) for key, value in found.items()}


def ratio(times: list[float], of: list[float]) -> dict[str, float]:
    """Ratios of the minima, of the medians, and quartiles of those of single rounds."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, of, strict=True)], n=4)
    found = {
        "of_minima": min(times) / min(of),
        "of_medians": statistics.median(times) / statistics.median(of),
        "of_rounds": middle,
        "quarter": low,
        "three_quarters": high,
    }
    return {key: round(value, 3) for key, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.training --json docs/results/training.json",
    )
    parser.add_argument("--rows", nargs="*", default=[""], help="only rows with these words")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[], choices=list(WAYS), help="leave out")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="both")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="draw the steps here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.without:
        del WAYS[name]
    console, rows = Console(width=150), []
    for found in (
        measure_choice(768 * 3072, given.rounds),
        measure_evaluation(given.rounds),
        measure_switch(given.rounds),
    ):
        rows.append(found)
        show(console, found)
        write(given, rows)
    for row in ROWS:
        if any(word in row for word in given.rows):
            for bf16 in (False, True):
                if given.precision in ("both", "bf16" if bf16 else "fp32"):
                    rows.append(measure(row, bf16, given.rounds))
                    show(console, rows[-1])
                    write(given, rows)
    if given.plot:
        draw(given.plot, [row for row in rows if row["row"] in ROWS])
    return 0


def write(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Keep what was measured, after every row: who stops the command keeps that."""
    if given.json:
        command = " ".join(["python -m tests.bench.training", *sys.argv[1:]])
        result = {"command": command, "environment": environment("numpy")}
        result |= {"kernels": library.describe(), "rounds": given.rounds, "rows": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def show(console: Console, row: dict[str, Any]) -> None:
    cells = [
        [
            name,
            f"{row['ms'][name]['min']:.2f}",
            f"{row['ms'][name]['median']:.2f}",
            f"{found['of_minima']:.2f}",
            f"{found['of_medians']:.2f}",
            f"{found['quarter']:.2f} - {found['three_quarters']:.2f}",
        ]
        for name, found in row["ratio"].items()
    ]
    columns = ("way", "ms, least", "median", "ratio of least", "of medians", "quartiles")
    console.print(table(f"{row['row']}, {row['precision']}", columns, cells))


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw each step's ratios as points between their quartiles; dense is the line at 1."""
    mpl.rcParams.update({"svg.hashsalt": "pemn", "svg.fonttype": "none"})
    figure = Figure(figsize=(8.5, 1.2 + 0.34 * len(rows)), layout="constrained")
    axes: Any = figure.add_subplot()
    ways = [way for way in rows[0]["ratio"] if way != "dense"]
    for number, (way, marker) in enumerate(zip(ways, "osD^v", strict=False)):
        found = [row["ratio"][way] for row in rows]
        heights = [place + 0.14 * (number - len(ways) / 2) for place in range(len(rows))]
        ends = [(one["quarter"], one["three_quarters"]) for one in found]
        axes.plot([one["of_medians"] for one in found], heights, marker, markersize=5, label=way)
        axes.hlines(heights, *zip(*ends, strict=True), colors=axes.lines[-1].get_color())
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "dense", "2", "5", "10", "20", "50"])
    axes.set_yticks(range(len(rows)), [f"{row['row']}, {row['precision']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step relative to dense")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
