"""``pemn quickstart``: two tasks on one shared random vector, beside a dense network and LoRA.

Data are scikit-learn's digits (1,797 scans of 8 x 8 pixels, inside its wheel), the network is a
small timm ResNet. Every method starts from the same random weights and trains the same number of
steps. At the end both mask adapters are read again by a new process, onto a network with other
random weights, and must give the same logits bit for bit.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pemn_surgery.adapters import PemnConfig, pemnify
from pemn_surgery.report import machine, plots, tables

Advance = Callable[[str], None]
Fit = Callable[[nn.Module, str, str], None]  # of a model, for a task, by a method

TASKS = ("digit", "parity")
METHODS = ("dense", "LoRA r=8", "masks")
RATIO = 1e-2

_BATCH = 64
_NEEDED = {"dense": "nothing else", "LoRA r=8": "the dense base", "masks": "a seed"}
_LEARNING_RATES = {"dense": 3e-3, "LoRA r=8": 1e-2, "masks": 1e-2}
_WEIGHTS_FILE = "adapter_model.safetensors"
_LOGITS_FILE = "logits.safetensors"


@dataclass(frozen=True)
class Outcome:
    """How a method did on a task: its share of test images right, bytes to keep for the task."""

    method: str
    task: str
    accuracy: float
    nbytes: int


@dataclass(frozen=True)
class Split:
    """Images of shape (n, 1, 16, 16), float32, and the labels of each task, int64."""

    images: Tensor
    labels: dict[str, Tensor]


def run(out: Path, epochs: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Train everything, save the adapters, verify them in a new process, save table and plot.

    Args:
        out: Folder for adapters, ``results.json`` and ``quickstart.png``.
        epochs: Passes over the training images for each of the six trainings.
        seed: Seed of the weights, the bank and the order of the images.
        progress: Shows how far it is.

    Returns:
        What is in ``results.json``.
    """
    plots.check_plotting()
    train, test = load_digits()
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    steps = epochs * (len(train.images) // _BATCH)
    bar = progress.add_task("quickstart", total=len(TASKS) * len(METHODS) * steps)

    def advance(what: str) -> None:
        progress.update(bar, advance=1, description=what)

    fit = partial(_fit, train, epochs, seed, advance)
    outcomes = list(_baselines(out, test, seed, fit))
    model = _train_masks(seed, fit)
    model.save_pretrained(str(out / "masks"))
    logits = {task: _logits(model, task, test.images) for task in TASKS}
    save_file(logits, out / _LOGITS_FILE)
    for task in TASKS:
        size = (out / "masks" / task / _WEIGHTS_FILE).stat().st_size
        outcomes.append(Outcome("masks", task, _accuracy(logits[task], test.labels[task]), size))
    verified = verify_in_new_process(out)
    result = {
        "command": f"pemn quickstart --epochs {epochs} --seed {seed}",
        "epochs": epochs,
        "seed": seed,
        "ratio": RATIO,
        **machine.environment(),
        "seconds": round(time.monotonic() - begin, 1),
        "verified_in_new_process": verified,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(out / "quickstart.png", outcomes)
    return result


def network(seed: int) -> nn.Module:
    """Return a timm ResNet for 16 x 16 images with 4.2 million weights and ten outputs."""
    import timm

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 576)}
    return timm.create_model("resnet18", in_chans=1, num_classes=10, **shape)


def load_digits() -> tuple[Split, Split]:
    """Return three quarters of scikit-learn's digits to train on and one quarter to test.

    Images are enlarged twice; the tasks are which digit it is, and whether it is odd. Without
    scikit-learn an ImportError is raised.
    """
    try:
        from sklearn.datasets import load_digits as read
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        message = "The quickstart needs scikit-learn: pip install scikit-learn."
        raise ImportError(message) from error
    digits = cast("Any", read())
    places = train_test_split(
        range(len(digits.target)), test_size=0.25, random_state=0, stratify=digits.target
    )
    images = torch.tensor(digits.images / 16 - 0.3, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, scale_factor=2)
    digit = torch.tensor(digits.target, dtype=torch.int64)
    labels = {"digit": digit, "parity": digit % 2}
    train, test = (
        Split(images[part], {name: label[part] for name, label in labels.items()})
        for part in places
    )
    return train, test


def verify_in_new_process(out: Path) -> bool:
    """Tell whether a new process gets the saved logits from the saved adapters, bit for bit."""
    command = [sys.executable, "-m", "pemn_surgery.commands.quickstart_run", str(out)]
    return subprocess.run(command, check=False).returncode == 0


def reload_and_compare(out: Path) -> bool:
    """Load both adapters onto a network with other random weights and compare logits."""
    _, test = load_digits()
    folder = out / "masks"
    first = TASKS[0]
    model = PeftModel.from_pretrained(network(seed=12345), str(folder / first), adapter_name=first)
    for task in TASKS[1:]:
        model.load_adapter(str(folder / task), task)
    saved = load_file(out / _LOGITS_FILE)
    return all(torch.equal(_logits(model, task, test.images), saved[task]) for task in TASKS)


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table."""
    dense = {row["task"]: row["nbytes"] for row in result["outcomes"] if row["method"] == "dense"}
    rows = [
        (
            row["task"],
            row["method"],
            f"{100 * row['accuracy']:.2f} %",
            f"{row['nbytes']:,}",
            f"{dense[row['task']] / row['nbytes']:.1f} x",
            _NEEDED[row["method"]],
        )
        for row in sorted(result["outcomes"], key=lambda row: TASKS.index(row["task"]))
    ]
    columns = ("task", "method", "accuracy", "bytes per task", "smaller than dense", "needs")
    return tables.table("Two tasks on one shared random vector", columns, rows)


def new_progress() -> Progress:
    """Return the progress bar."""
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        transient=True,
    )


def _baselines(out: Path, test: Split, seed: int, fit: Fit) -> Iterator[Outcome]:
    for task in TASKS:
        dense = network(seed)
        fit(dense, task, "dense")
        file = out / "dense" / f"{task}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({name: value.contiguous() for name, value in dense.state_dict().items()}, file)
        accuracy = _accuracy(_predict(dense, test.images), test.labels[task])
        yield Outcome("dense", task, accuracy, file.stat().st_size)
        lora = _lora(network(seed))
        fit(lora, task, "LoRA r=8")
        lora.save_pretrained(str(out / "lora" / task))
        accuracy = _accuracy(_predict(lora, test.images), test.labels[task])
        size = (out / "lora" / task / _WEIGHTS_FILE).stat().st_size
        yield Outcome("LoRA r=8", task, accuracy, size)


def _lora(model: nn.Module) -> PeftModel:
    """Return LoRA on every convolution; norms and classifier are trained whole, as under masks."""
    names = list(model.named_modules())
    convs = [name for name, module in names if isinstance(module, nn.Conv2d)]
    whole = [name for name, module in names if isinstance(module, (nn.BatchNorm2d, nn.Linear))]
    return get_peft_model(model, LoraConfig(r=8, target_modules=convs, modules_to_save=whole))


def _train_masks(seed: int, fit: Fit) -> PeftModel:
    """Return one network with one shared random vector and an adapter for each task."""
    first, *others = TASKS
    model = pemnify(network(seed), _config(seed), adapter_name=first)
    for task in others:
        model.add_adapter(task, _config(seed))
    for task in TASKS:
        model.set_adapter(task)
        fit(model, task, "masks")
    return model


def _config(seed: int) -> PemnConfig:
    return PemnConfig(bank="rp", ratio=RATIO, seed=seed)


def _fit(
    train: Split, epochs: int, seed: int, advance: Advance, model: nn.Module, task: str, method: str
) -> None:
    """Train with AdamW and a one-cycle learning rate; all methods see the same batches."""
    order = torch.Generator().manual_seed(seed)
    labels = train.labels[task]
    batches = len(labels) // _BATCH
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = _LEARNING_RATES[method]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        shuffled = torch.randperm(len(labels), generator=order)[: batches * _BATCH]
        for chosen in shuffled.split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(train.images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            advance(f"{task}: {method}")


def _logits(model: PeftModel, task: str, images: Tensor) -> Tensor:
    model.set_adapter(task)
    return _predict(model, images)


def _predict(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(images)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


def _plot(path: Path, outcomes: list[Outcome]) -> None:
    points = {
        method: [(o.nbytes, 100 * o.accuracy) for o in outcomes if o.method == method]
        for method in METHODS
    }
    plots.scatter(path, points, ("bytes per task", "test accuracy, %"), "Two digits tasks")


if __name__ == "__main__":
    sys.exit(0 if reload_and_compare(Path(sys.argv[1])) else 1)
