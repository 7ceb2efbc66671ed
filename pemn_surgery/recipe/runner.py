"""Supervised image classification: all arms of a case side by side, epoch by epoch.

All arms see the same images, augmented once an epoch, in the same order under the same schedule.
All randomness is drawn from (seed, epoch, step), so a run that was stopped and resumed gives the
same bits as one that was not (on one machine with one number of threads).
"""

import math
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from torch import Tensor, nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Arm, Options, Recipe

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rule:
    """How a case is trained; ``optimizer`` and ``schedule`` name entries of the tables below."""

    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    batch: int
    augmentation: str
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse names that are in no table."""
        for table, key in ((SCHEDULES, self.schedule), (OPTIMIZERS, self.optimizer)):
            if key not in table:
                message = f"{key!r} in a rule is unknown; give one of {sorted(table)}"
                raise RecipeError(message)


def triangle(lr: float, step: int, steps: int) -> float:
    """Rise to ``lr`` at 40 % of the run, fall to ``lr / 20`` at 80 %, to 0 at its end.

    Linear in between. Steps count from 0; a step takes the rate of its end, so that the first
    is above 0 and the last is 0 (PEMN, after ConvMixer's CIFAR-10 code).
    """
    done = (step + 1) / steps
    if done <= 0.4:
        return lr * done / 0.4
    if done <= 0.8:
        return lr + (lr / 20 - lr) * (done - 0.4) / 0.4
    return lr / 20 * (1 - done) / 0.2


def cosine(lr: float, step: int, steps: int) -> float:
    """Fall from ``lr`` at step 0 towards 0 along half a cosine (Loshchilov and Hutter, 2017)."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def warm_cosine(lr: float, step: int, steps: int) -> float:
    """Rise to ``lr`` over 40/150 of the run, then half a cosine to 0 (Self-Masking Networks).

    Steps count from 0; while rising a step takes the rate of its end, so that the first is above 0.
    """
    warm = max(round(steps * 40 / 150), 1)
    return lr * (step + 1) / warm if step < warm else cosine(lr, step - warm, steps - warm)


def _adamw(weights: list[nn.Parameter], rule: Rule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, rule.lr, weight_decay=rule.weight_decay)


def _sgd(weights: list[nn.Parameter], rule: Rule) -> torch.optim.Optimizer:
    decay = rule.weight_decay
    return torch.optim.SGD(weights, rule.lr, momentum=rule.momentum, weight_decay=decay)


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "triangle": triangle,
    "cosine": cosine,
    "warm_cosine": warm_cosine,
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], Rule], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}


def train(recipe: Recipe, options: Options, console: Console) -> list[Arm]:
    """Train all arms of ``options.case`` to the end.

    Raises:
        RecipeError: If the work folder already holds this run, or one with other settings.
        KeyboardInterrupt: After Ctrl-C, once the step under way is in the checkpoint.
    """
    devices = [] if options.device == "cpu" else None
    with torch.random.fork_rng(devices):
        run = Run(recipe, options, console)
        run.go()
    return run.arms


class Run:
    """The arms of one case, trained side by side."""

    def __init__(self, recipe: Recipe, options: Options, console: Console) -> None:
        """Load the data, build the arms and, with ``options.resume``, continue them."""
        self.recipe, self.options, self.console = recipe, options, console
        self.case, self.stopped = recipe.case(options.case), False
        self.rule = Rule(**self.case.rule)
        self.folder = options.work / options.label
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipeline = recipe.module("data")
        self.train, self.test = self._splits()
        self.steps = math.ceil(len(self.train[1]) / self.rule.batch)
        self.arms = [self._arm(name) for name in recipe.arms]

    def _splits(self) -> Batches:
        data, cut = self.recipe.data, self.options.limit
        source = self.options.data or data["source"]
        splits = self.pipeline.load(source, self.options.work, data["image"], data["label"])
        return [(x[:cut], y[:cut]) for x, y in (splits["train"], splits["test"])]

    def _settings(self, arm: str) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        options, kept = asdict(self.options), ("case", "epochs", "seed", "precision")
        sizes = {"train": len(self.train[1]), "test": len(self.test[1])}
        given = {"pemnify": self.recipe.arms[arm], "rule": asdict(self.rule)}
        return {key: options[key] for key in kept} | sizes | given

    def _arm(self, name: str) -> Arm:
        file = self._file(name)
        model = self._model(name).to(self.options.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = OPTIMIZERS[self.rule.optimizer](trained, self.rule)
        arm = Arm(name, model, optimizer, file, self._settings(name))
        if file.exists():
            arm.restore()
        return arm

    def _file(self, name: str) -> Path:
        slug = "_".join("".join(c if c.isalnum() else " " for c in name).split())
        file = self.folder / f"{slug}.pt"
        if file.exists() and not self.options.resume:
            message = f"{file} exists; resume that run, or give another work folder"
            raise RecipeError(message)
        return file

    def _model(self, name: str) -> nn.Module:
        torch.manual_seed(self.options.seed)
        model = getattr(self.recipe.module("models"), self.case.factory)(**self.case.arguments)
        changes = self.recipe.arms[name]
        if not changes:
            return model
        from pemn_surgery import pemnify

        return pemnify(model, seed=self.options.seed, **changes)

    def go(self) -> None:
        """Train to the end; every arm's ``history`` then has one row an epoch."""
        bars = (*Progress.get_default_columns(), TimeElapsedColumn())
        progress = Progress(*bars, console=self.console, refresh_per_second=2)
        with self._stop_on_interrupt(), progress:
            for epoch in range(min(arm.epoch for arm in self.arms), self.options.epochs):
                batches = self._batches(epoch, progress)
                for arm in (arm for arm in self.arms if arm.epoch == epoch):
                    self._train(arm, batches, progress)
                    self._finish(arm)

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C finish the step under way; a second one stops at once."""

        def stop(*_: object) -> None:
            self.stopped = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread: Ctrl-C never arrives here
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _seed(self, *position: object) -> None:
        torch.manual_seed(zlib.crc32(repr((self.options.seed, *position)).encode()))

    def _batches(self, epoch: int, progress: Progress) -> Batches:
        """The epoch's shuffled, augmented uint8 images ``[b, 3, h, w]`` and labels ``[b]``."""
        images, labels = self.train
        self._seed("epoch", epoch)
        order = torch.randperm(len(labels))
        chunks = self.pipeline.augment(self.rule.augmentation, images[order])
        task = progress.add_task(f"epoch {epoch + 1}: augment", total=len(labels))
        ready = []
        for chunk in chunks:
            ready.append(chunk)
            progress.advance(task, len(chunk))
        progress.remove_task(task)
        size = self.rule.batch
        return list(zip(torch.cat(ready).split(size), labels[order].split(size), strict=True))

    def _train(self, arm: Arm, batches: Batches, progress: Progress) -> None:
        title = f"epoch {arm.epoch + 1}/{self.options.epochs}: {arm.name}"
        task = progress.add_task(title, total=len(batches), completed=arm.step)
        arm.model.train()
        for images, labels in batches[arm.step :]:
            started = time.perf_counter()
            arm.loss += self._step(arm, images, labels) * len(labels)
            arm.step += 1
            arm.seconds += time.perf_counter() - started
            progress.advance(task)
            self._halt(arm)
        progress.remove_task(task)

    def _halt(self, arm: Arm) -> None:
        if self.stopped:
            arm.save()
            done = f"{arm.step} of {self.steps} steps of epoch {arm.epoch + 1}"
            message = f"stopped: {arm.name} after {done}"
            raise KeyboardInterrupt(message)

    def _step(self, arm: Arm, images: Tensor, labels: Tensor) -> float:
        position = arm.epoch * self.steps + arm.step
        self._seed("step", position)
        lr = SCHEDULES[self.rule.schedule]
        for group in arm.optimizer.param_groups:
            group["lr"] = lr(self.rule.lr, position, self.options.epochs * self.steps)
        logits = self._logits(arm, images)
        loss = nn.functional.cross_entropy(logits, labels.to(logits.device))
        arm.optimizer.zero_grad()
        loss.backward()
        arm.optimizer.step()
        return loss.item()

    def _logits(self, arm: Arm, images: Tensor) -> Tensor:
        """uint8 ``[b, 3, h, w]`` -> fp32 ``[b, classes]``; channels_last measured faster."""
        x = self.pipeline.normalise(images.to(self.options.device))
        half = self.options.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return arm.model(x.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def accuracy(self, arm: Arm) -> float:
        """Share of the test split that ``arm`` gets right, in percent."""
        arm.model.eval()
        images, labels = self.test
        pairs = zip(images.split(500), labels.split(500), strict=True)
        right = sum(int((self._logits(arm, x).argmax(1).cpu() == y).sum()) for x, y in pairs)
        return 100 * right / len(labels)

    def _finish(self, arm: Arm) -> None:
        """Close the epoch: test, checkpoint, log."""
        started = time.perf_counter()
        accuracy = self.accuracy(arm)
        row = arm.close_epoch(len(self.train[1]), accuracy, time.perf_counter() - started)
        numbers = ", ".join(f"{key} {value:.5g}" for key, value in row.items())
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {arm.name}: {numbers}"
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
        self.console.print(line, highlight=False)
