"""Many tasks on one random network, then the question which of them a batch is of.

Each task is a permutation of the pixels. Its mask is trained alone and saved as an adapter; then
one network loads all adapters, and every test batch is classified with its task given, and with
the task inferred.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from pemn_surgery import infer_task, pemnify
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Recipe
from pemn_surgery.recipe.arms import Arm, sizes
from pemn_surgery.recipe.classification import Classification, Split
from pemn_surgery.recipe.options import SEEDS, check_counts, option
from pemn_surgery.recipe.options import Options as Shared
from pemn_surgery.recipe.runner import Runner

PIXELS, TEST, CLASSES = 64, 450, 10

# Rows of results, by what `infer_task` is asked.
ENTROPY: dict[str, dict[str, Any]] = {
    "one_shot": {"method": "one_shot"},
    "binary": {"method": "binary"},
}
G = {"objective": "spare_outputs", "classes": CLASSES}
SPARE_OUTPUTS = {f"{row}, G": asked | G for row, asked in ENTROPY.items()}


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """What a run adds to the recipe."""

    TRIAL = Shared.TRIAL | {"tasks": 2, "dense_tasks": 1, "limit": 64, "seeds": (0,)}

    case: str = option("row of the recipe's file", "outputs_100")
    seeds: tuple[int, ...] = option(SEEDS, (0, 1, 2))
    threads: int | None = option("torch's threads", 1)
    tasks: int = option("how many", 100)
    sizes: tuple[int, ...] = option("of batches whose task is inferred", (1, 8, 32))
    repeats: int = option("batches a task and size", 2)
    dense_tasks: int = option("how many tasks dense networks are trained on", 5)

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        check_counts(tasks=self.tasks, repeats=self.repeats, seeds=len(self.seeds))
        check_counts(sizes=min(self.sizes))
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


def digits(seed: int, tasks: int, limit: int | None = None) -> Digits:
    """Shuffle the digits, keep the last 450 for testing, draw a permutation a task, cut both."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order].float() / 16, labels[order]
    permutations = [torch.randperm(PIXELS, generator=generator) for _ in range(tasks)]
    train, test = ((images[part], labels[part]) for part in (slice(-TEST), slice(-TEST, None)))
    data = Classification(train, test).cut(limit)
    return Digits(data.train, data.test, permutations)


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Count the images that a model classifies right."""
    return int((model(images).argmax(1) == labels).sum())


def run(recipe: Recipe, options: Options, console: Console) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train and test every seed; yield the result's name, and what it holds.

    That is: rows by seed, their mean and standard deviation, and bytes a task.

    Raises:
        RecipeError: If the case is unknown, or the work folder holds this run already.
        KeyboardInterrupt: After Ctrl-C; checkpoints are written and the run can be resumed.
    """
    seeds = [Seed(recipe, options, seed, console).go() for seed in options.seeds]
    yield (
        f"{options.case}-t{options.tasks}{options.changes}",
        {
            "case": options.case,
            "tasks": options.tasks,
            "rule": recipe.case(options.case).rule,
            "summary": _summarise(seeds),
            "seeds": seeds,
        },
    )


class Seed:
    """One seed: one random network, one set of permutations."""

    def __init__(self, recipe: Recipe, options: Options, seed: int, console: Console) -> None:
        """Read the digits."""
        self.recipe, self.options, self.seed, self.console = recipe, options, seed, console
        self.case = recipe.case(options.case)
        self.data = digits(seed, options.tasks, options.limit)
        self.tested = len(self.data.test[1])
        self.names = [f"task{number:03d}" for number in range(options.tasks)]

    def go(self) -> dict[str, Any]:
        """Train, load all masks into one network, test."""
        started = time.perf_counter()
        masks = [self._fit("masks", task).folder for task in self._each("masks", len(self.names))]
        trained = time.perf_counter()
        model = self._network_with_all_masks(masks)
        loaded = time.perf_counter()
        rows = list(self._test(model))
        seconds = {"train_a_task": (trained - started) / len(self.names)}
        seconds |= {"load_all": loaded - trained, "test": time.perf_counter() - loaded}
        dense = [self._fit("dense", task) for task in self._each("dense", self.options.dense_tasks)]
        return {
            "seed": self.seed,
            "dense": statistics.mean(arm.history[-1]["test_accuracy"] / 100 for arm in dense),
            "rows": rows,
            "bytes": {
                "dense": sum(sizes(dense[0].folder).values()),
                "masks": sum(sizes(masks[0]).values()),
            },
            "seconds": seconds,
        }

    def _each(self, what: str, count: int) -> Iterator[int]:
        yield from track(range(count), f"seed {self.seed}: {what}", console=self.console)

    def _fit(self, arm: str, task: int) -> Arm:
        """Train one network, dense or its masks, on one task."""
        data = Classification(self._split(task), self._split(task, test=True))
        runner = Runner(self.recipe, self.options, self.seed, data, Console(quiet=True))
        changes, rule = self.recipe.arms[arm], self.case.rule_of(arm)
        found = runner.add(f"{arm} {self.names[task]}", lambda: self._model(changes), rule, changes)
        runner.go()
        found.stored()
        return found

    def _model(self, changes: dict[str, Any]) -> nn.Module:
        network = self.recipe.network(self.options.case)
        return pemnify(network, seed=self.seed, **changes) if changes else network

    def _split(self, task: int, *, test: bool = False) -> Split:
        images, labels = self.data.test if test else self.data.train
        return images[:, self.data.permutations[task]], labels

    def _network_with_all_masks(self, folders: list[Path]) -> PeftModel:
        base, first = self.recipe.network(self.options.case), self.names[0]
        model = PeftModel.from_pretrained(base, folders[0], adapter_name=first)
        for task in self._each("load", len(folders)):
            if task:
                model.load_adapter(str(folders[task]), self.names[task])
        return model.eval()

    def _test(self, model: PeftModel) -> Iterator[dict[str, Any]]:
        known = [self._accuracy_known(model, task) for task in range(len(self.names))]
        yield {
            "task": "given",
            "batch": self.tested,
            "found": 1.0,
            "accuracy": statistics.mean(known),
        }
        has_spare = self.case.arguments["sizes"][-1] > CLASSES
        rows = ENTROPY | SPARE_OUTPUTS if has_spare else ENTROPY
        for size in self.options.sizes:
            for row, asked in rows.items():
                yield self._inferred(model, size, row, asked)

    def _accuracy_known(self, model: PeftModel, task: int) -> float:
        model.set_adapter(self.names[task])
        return right(model, *self._split(task, test=True)) / self.tested

    def _inferred(
        self, model: PeftModel, size: int, task_by: str, asked: dict[str, Any]
    ) -> dict[str, Any]:
        """An image counts as right if its task is found and its class is (labels unshared)."""
        generator = torch.Generator().manual_seed(self.seed)  # all rows see the same batches
        found, correct, seconds = 0, 0, 0.0
        tasks = list(range(len(self.names))) * self.options.repeats
        title = f"seed {self.seed}: {task_by}, batches of {size}"
        for task in track(tasks, title, console=self.console):
            rows = torch.randperm(self.tested, generator=generator)[:size]
            images, labels = (part[rows] for part in self._split(task, test=True))
            started = time.perf_counter()
            guess = infer_task(model, images, **asked).name
            seconds += time.perf_counter() - started
            if guess == self.names[task]:
                model.set_adapter(guess)
                found, correct = found + 1, correct + right(model, images, labels)
        shares = {"found": found / len(tasks), "accuracy": correct / (len(tasks) * size)}
        row = {"task": task_by, "batch": size, **shares}
        return row | {"batches": len(tasks), "seconds_a_batch": seconds / len(tasks)}


def _summarise(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds, row by row; dense first."""
    tested = seeds[0]["rows"][0]["batch"]
    dense = {"task": "dense, given", "batch": tested, "found": _spread([1.0 for _ in seeds])}
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
