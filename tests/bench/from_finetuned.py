"""Accuracy, errors and bytes of adapters made from fine-tuned models.

    python tests/bench/from_finetuned.py --weights FOLDER --data cifar10 --json result.json

digits: a small network learns scikit-learn's digits, and is fine-tuned on the same digits turned by
a quarter. resnet20: a network with published CIFAR-10 weights (those of recipes/mask_compression)
gets a new head and is fine-tuned to tell by how many quarters an image was turned. Each
fine-tuned model becomes an adapter by both methods; the scales of a sign delta are then trained for
20 and 100 steps to give the fine-tuned model's logits (no labels). Every seed trains anew.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pemn_surgery import from_finetuned, measure_errors
from pemn_surgery.adapters.finetuned.convert import nearest_mask
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.recipe import load
from pemn_surgery.report.machine import environment

NETWORKS = load(Path(__file__).resolve().parents[2] / "recipes/mask_compression").module("networks")
BATCH, DISTILL_STEPS, DISTILL_RATE = 64, (20, 100), 1e-3
Split = tuple[Tensor, Tensor]


def small_network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def digits() -> tuple[Split, Split]:
    """Train and test split of the 1,797 digits, the last 500 for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    return (x[:-500], y[:-500]), (x[-500:], y[-500:])


def cifar(folder: str, split: str, count: int) -> Split:
    """The first images of a split with ImageNet's mean and deviation, and their labels."""
    from datasets import load_dataset

    rows = load_dataset(folder, split=split).select(range(count)).with_format("torch")
    x = torch.stack(list(rows["img"])).float() / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (x - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), torch.as_tensor(rows["label"])


def turned(split: Split, seed: int) -> Split:
    """Every image turned by some quarters; the label is how many."""
    x, _ = split
    quarters = torch.randint(4, (len(x),), generator=torch.Generator().manual_seed(seed))
    return torch.stack([i.rot90(int(q), (1, 2)) for i, q in zip(x, quarters)]), quarters  # noqa: B905


def fit(model: nn.Module, split: Split, epochs: int, rate: float, seed: int) -> nn.Module:
    """SGD with momentum and a cosine schedule."""
    x, y = split
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=5e-4)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            if len(batch) == BATCH:
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def distil(model: nn.Module, finetuned: nn.Module, x: Tensor, steps: int, seed: int) -> None:
    """Train the scales alone to give the fine-tuned model's logits."""
    scales = [p for name, p in model.named_parameters() if name.endswith("row_scale")]
    optimizer = torch.optim.Adam(scales, DISTILL_RATE)
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    for _ in range(steps):
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        with torch.no_grad():
            goal = finetuned(batch)
        optimizer.zero_grad()
        F.mse_loss(model(batch), goal).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    x, y = split
    found = torch.cat([model(piece).argmax(1) for piece in x.split(250)])
    return float((found == y).float().mean())


def outcome(model: nn.Module, finetuned: nn.Module, test: Split) -> dict[str, Any]:
    """Accuracy, total error and the size of the saved adapter."""
    model.eval()
    errors = measure_errors(model, finetuned)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        nbytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
    total = errors.total
    return {
        "accuracy": accuracy(model, test),
        "bytes": nbytes,
        "relative_error": total.relative,
        "error_of_difference": total.of_difference,
        "others_differing": len(errors.others_differing),
    }


def dense(model: nn.Module, test: Split) -> dict[str, Any]:
    """Accuracy and size of a whole model."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_file(model.state_dict(), file.name)
        return {"accuracy": accuracy(model, test), "bytes": Path(file.name).stat().st_size}


def what_a_scale_would_do(base: nn.Module, finetuned: nn.Module, names: list[str]) -> dict:
    """Total error (as a share of the difference) of other scales, from their equations.

    Of the mask: none, 1 / sqrt(density), and each weight's least-squares factor. Of the signs: one
    scale a weight, as BitDelta has it, beside one an output.
    """
    sums = dict.fromkeys(("difference", "none", "sqrt_density", "best", "one_scale"), 0.0)
    factors = []
    for name in names:
        w, f = base.state_dict()[name].double(), finetuned.state_dict()[name].double()
        mask = nearest_mask(w, f)
        kept, change = w * mask, f - w
        best = float((f * kept).sum() / (kept * kept).sum())
        factors.append(best)
        sums["difference"] += float(change.square().sum())
        sums["none"] += float((f - kept).square().sum())
        density = float(mask.double().mean())
        sums["sqrt_density"] += float((f - kept / density**0.5).square().sum())
        sums["best"] += float((f - best * kept).square().sum())
        sums["one_scale"] += float((change.abs() - change.abs().mean()).square().sum())
    whole = sums.pop("difference")
    return {key: (value / whole) ** 0.5 for key, value in sums.items()} | {
        "best_factors": [min(factors), max(factors)]
    }


@torch.no_grad()
def without_deltas(model: nn.Module) -> nn.Module:
    """The base's weights beside the task's other tensors: all scales zero.

    Written in place: a write through ``.data`` leaves no trace, and the kept weight would be read.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("row_scale"):
            parameter.zero_()
    return model


def check_control(row: dict[str, Any]) -> None:
    """All of the difference must be left; otherwise the control measured another model."""
    if row["error_of_difference"] != 1.0:
        message = f"the control is not the base: error {row['error_of_difference']}"
        raise RuntimeError(message)


def compare(base, finetuned, train: Split, test: Split, seed: int, **options) -> dict[str, Any]:
    """All rows of one fine-tuned model."""
    rows = {"base": dense(base, test), "fine-tuned": dense(finetuned, test)}
    for label, method, more in (
        ("mask", "mask", {}),
        ("mask, scale sqrt_density", "mask", {"scale": "sqrt_density"}),
        ("sign_delta", "sign_delta", {}),
    ):
        model = from_finetuned(copy.deepcopy(base), finetuned, method, **more, **options)
        rows[label] = outcome(model, finetuned, test)
    names = [m.target for m in model.modules() if isinstance(m, PemnLayer)]
    for steps in DISTILL_STEPS:
        trained = from_finetuned(
            copy.deepcopy(base), finetuned, "sign_delta", is_trainable=True, **options
        )
        distil(trained, finetuned, train[0], steps, seed)
        rows[f"sign_delta, scales distilled {steps} steps"] = outcome(trained, finetuned, test)
    rows["other tensors alone"] = outcome(without_deltas(model), finetuned, test)
    check_control(rows["other tensors alone"])
    return {
        "seed": seed,
        "rows": rows,
        "weights": sum(base.state_dict()[name].numel() for name in names),
        "scales": what_a_scale_would_do(base, finetuned, names),
    }


def on_digits(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    train, test = digits()
    base = fit(small_network(), train, 8, 0.05, seed)
    quarter = [(x.rot90(1, (2, 3)), y) for x, y in (train, test)]
    finetuned = fit(copy.deepcopy(base), quarter[0], 6, 0.02, seed)
    found = compare(base, finetuned, *quarter, seed)
    return found | {"base_on_its_own_task": accuracy(base, test)}


def on_resnet20(seed: int, weights: Path, data: str, sizes: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(seed)
    base = NETWORKS.pretrained("resnet20", 20, weights).eval()
    splits = [cifar(data, name, size) for name, size in zip(("train", "test"), sizes, strict=True)]
    own = accuracy(base, splits[1])
    base[-1] = nn.Linear(64, 4)
    train, test = turned(splits[0], seed), turned(splits[1], 1000)
    finetuned = fit(copy.deepcopy(base), train, 2, 0.02, seed)
    found = compare(base, finetuned, train, test, seed, modules_to_save=[str(len(base) - 1)])
    return found | {"base_on_its_own_task": own}


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure of every row."""
    return {
        row: {
            key: {
                "mean": statistics.fmean(run["rows"][row][key] for run in runs),
                "std": statistics.stdev(run["rows"][row][key] for run in runs),
            }
            for key in figures
        }
        for row, figures in runs[0]["rows"].items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tests.bench.from_finetuned --json from_finetuned.json",
    )
    parser.add_argument("--weights", type=Path, help="folder of the published ResNet-20 weights")
    parser.add_argument("--data", help="CIFAR-10: a folder or hub id for datasets.load_dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=1280, help="CIFAR-10 images to train on")
    parser.add_argument("--test", type=int, default=500, help="CIFAR-10 images to test on")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def shown(arguments: argparse.Namespace) -> list[str]:
    """What was run, with the names of files in place of their paths."""
    seeds = ["--seeds", *map(str, arguments.seeds)]
    if not (arguments.weights and arguments.data):
        return seeds
    sizes = ["--train", str(arguments.train), "--test", str(arguments.test)]
    names = ["--weights", arguments.weights.name, "--data", Path(arguments.data).name]
    return [*seeds, *names, *sizes]


def main() -> int:
    arguments = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = {"digits": on_digits}
    if arguments.weights and arguments.data:
        sizes = (arguments.train, arguments.test)
        cases["resnet20"] = lambda seed: on_resnet20(seed, arguments.weights, arguments.data, sizes)
    result: dict[str, Any] = {
        "command": " ".join(["python tests/bench/from_finetuned.py", *shown(arguments)]),
        **environment(),
        "seeds": arguments.seeds,
        "distillation": {"steps": DISTILL_STEPS, "batch": BATCH, "adam": DISTILL_RATE},
        "cases": {},
    }
    for name, run in cases.items():
        start = time.perf_counter()
        runs = [run(seed) for seed in arguments.seeds]
        seconds = time.perf_counter() - start
        result["cases"][name] = {"seconds": seconds, "summary": spread(runs), "runs": runs}
        sys.stdout.write(json.dumps({name: result["cases"][name]}, indent=1) + "\n")
        sys.stdout.flush()
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
