"""Many tasks on one random network, then the question which of them a batch is of.

Each task is a permutation of the pixels. Its mask is trained alone and saved as an adapter; then
one network loads all adapters, and every test batch is classified with its task given, and with
the task inferred.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import track
from safetensors.torch import save_model
from torch import Tensor, nn

from pemn_surgery import infer_task, pemnify
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Recipe

METHODS = ("one_shot", "binary")
PIXELS, TEST = 64, 450


@dataclass(frozen=True)
class Options:
    """What a run adds to the recipe; ``repeats`` is the number of batches a task and size."""

    case: str
    work: Path
    tasks: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (1, 8, 32)
    repeats: int = 2
    dense_tasks: int = 5

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        counts = {"tasks": self.tasks, "repeats": self.repeats, "seeds": len(self.seeds)}
        for name, count in (counts | {"sizes": min(self.sizes, default=0)}).items():
            if count < 1:
                message = f"{name}: {count}; give 1 or more"
                raise RecipeError(message)
        if not 1 <= self.dense_tasks <= self.tasks:
            message = f"dense_tasks={self.dense_tasks}; give 1 to {self.tasks}, the number of tasks"
            raise RecipeError(message)


@dataclass(frozen=True)
class Digits:
    """One seed's split of the digits and its permutations, one a task.

    ``train`` and ``test`` are images ``[n, 64]`` in 0..1 and labels ``[n]``.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    permutations: list[Tensor]


def digits(seed: int, tasks: int) -> Digits:
    """Shuffle the digits, keep the last 450 for testing, draw a permutation a task."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order].float() / 16, labels[order]
    permutations = [torch.randperm(PIXELS, generator=generator) for _ in range(tasks)]
    train, test = (images[:-TEST], labels[:-TEST]), (images[-TEST:], labels[-TEST:])
    return Digits(train, test, permutations)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers without bias, ReLU between them: nothing but weights."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit(model: nn.Module, images: Tensor, labels: Tensor, rule: dict[str, Any], lr: float) -> None:
    """Train with Adam under a cosine from ``lr`` to 0; batches follow torch's global seed."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    steps = rule["epochs"] * -(-len(labels) // rule["batch"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(rule["epochs"]):
        for rows in torch.randperm(len(labels)).split(rule["batch"]):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Count the images that a model classifies right."""
    return int((model(images).argmax(1) == labels).sum())


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Train and test every seed.

    Returns:
        Rows by seed, their mean and standard deviation, and bytes a task; JSON can hold it.

    Raises:
        RecipeError: If the case is unknown.
    """
    case = recipe.case(options.case)
    seeds = []
    for seed in options.seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            folder = options.work / f"{options.case}-s{seed}"
            seeds.append(Seed(recipe, options, seed, folder).go())
    return {"rule": case.rule, "summary": _summarise(seeds), "seeds": seeds}


class Seed:
    """One seed: one random network, one set of permutations."""

    def __init__(self, recipe: Recipe, options: Options, seed: int, folder: Path) -> None:
        """Read the digits; files go to ``folder``."""
        self.recipe, self.options, self.seed, self.folder = recipe, options, seed, folder
        self.case = recipe.case(options.case)
        self.data = digits(seed, options.tasks)
        self.names = [f"task{number:03d}" for number in range(options.tasks)]

    def go(self) -> dict[str, Any]:
        """Train, load all masks into one network, test."""
        started = time.perf_counter()
        self._train_masks()
        trained = time.perf_counter()
        model = self._network_with_all_masks()
        loaded = time.perf_counter()
        rows = list(self._test(model))
        return {
            "seed": self.seed,
            "dense": self._dense_accuracy(),
            "rows": rows,
            "bytes": {"dense": self._bytes("dense"), "masks": self._bytes(self.names[0])},
            "seconds": {"train_a_task": (trained - started) / len(self.names)}
            | {"load_all": loaded - trained, "test": time.perf_counter() - loaded},
        }

    def _network(self) -> nn.Module:
        return globals()[self.case.factory](**self.case.arguments)

    def _split(self, task: int, *, test: bool = False) -> tuple[Tensor, Tensor]:
        images, labels = self.data.test if test else self.data.train
        return images[:, self.data.permutations[task]], labels

    def _train_masks(self) -> None:
        rule = self.case.rule
        for task in track(range(len(self.names)), f"seed {self.seed}: masks"):
            options: dict[str, Any] = self.recipe.arms["masks"] | {"seed": self.seed}
            model = pemnify(self._network(), adapter_name=self.names[task], **options)
            fit(model, *self._split(task), rule, rule["lr"])
            model.save_pretrained(str(self.folder))

    def _network_with_all_masks(self) -> PeftModel:
        first, *others = self.names
        model = PeftModel.from_pretrained(self._network(), self.folder / first, adapter_name=first)
        for name in track(others, f"seed {self.seed}: load"):
            model.load_adapter(str(self.folder / name), name)
        return model.eval()

    def _dense_accuracy(self) -> float:
        """Share of the test images that dense networks get right, one network a task."""
        total, rule = 0, self.case.rule
        for task in range(self.options.dense_tasks):
            model = self._network()
            fit(model, *self._split(task), rule, rule["dense_lr"])
            total += right(model, *self._split(task, test=True))
            (self.folder / "dense").mkdir(exist_ok=True)
            save_model(model, str(self.folder / "dense" / "model.safetensors"))
        return total / (self.options.dense_tasks * TEST)

    def _test(self, model: PeftModel) -> Iterator[dict[str, Any]]:
        known = [self._accuracy_known(model, task) for task in range(len(self.names))]
        yield {"task": "given", "batch": TEST, "found": 1.0, "accuracy": statistics.mean(known)}
        for size in self.options.sizes:
            for method in METHODS:
                yield self._inferred(model, size, method)

    def _accuracy_known(self, model: PeftModel, task: int) -> float:
        model.set_adapter(self.names[task])
        return right(model, *self._split(task, test=True)) / TEST

    def _inferred(self, model: PeftModel, size: int, method: Any) -> dict[str, Any]:
        """An image counts as right if its task is found and its class is (labels unshared)."""
        generator = torch.Generator().manual_seed(self.seed)  # both methods see the same batches
        found, correct, seconds = 0, 0, 0.0
        tasks = list(range(len(self.names))) * self.options.repeats
        for task in track(tasks, f"seed {self.seed}: {method}, batches of {size}"):
            rows = torch.randperm(TEST, generator=generator)[:size]
            images, labels = (part[rows] for part in self._split(task, test=True))
            started = time.perf_counter()
            guess = infer_task(model, images, method=method).name
            seconds += time.perf_counter() - started
            if guess == self.names[task]:
                model.set_adapter(guess)
                found, correct = found + 1, correct + right(model, images, labels)
        shares = {"found": found / len(tasks), "accuracy": correct / (len(tasks) * size)}
        row = {"task": method, "batch": size, **shares}
        return row | {"batches": len(tasks), "seconds_a_batch": seconds / len(tasks)}

    def _bytes(self, name: str) -> int:
        """What a user keeps for one task, its configuration included."""
        files = (self.folder / name).iterdir()
        return sum(f.stat().st_size for f in files if f.suffix in (".safetensors", ".json"))


def _summarise(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds, row by row; dense first."""
    dense = {"task": "dense, given", "batch": TEST, "found": _spread([1.0 for _ in seeds])}
    summary = [dense | {"accuracy": _spread([seed["dense"] for seed in seeds])}]
    for same in zip(*(seed["rows"] for seed in seeds), strict=True):
        row: dict[str, Any] = {key: same[0][key] for key in ("task", "batch")}
        for key in ("found", "accuracy"):
            row[key] = _spread([one[key] for one in same])
        summary.append(row)
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": std}
