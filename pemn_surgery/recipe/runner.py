"""The training loop: arms side by side, epoch by epoch, stopped and resumed to the same bits.

All arms of a run see the same batches, augmented once an epoch. All randomness is drawn from (seed,
epoch, step), so a run that was stopped and resumed gives the same bits as one that was not (on one
machine with one number of threads). Arms take turns epoch by epoch, or each step `together`.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from torch import Tensor, nn

from pemn_surgery import pemnify
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.allocator import keep_freed_memory
from pemn_surgery.recipe.arms import Arm, learn
from pemn_surgery.recipe.classification import Classification, Forward
from pemn_surgery.recipe.file import Recipe
from pemn_surgery.recipe.options import CaseOptions, Options
from pemn_surgery.recipe.pruning import prune
from pemn_surgery.recipe.rules import Rule
from pemn_surgery.recipe.stopping import Stop
from pemn_surgery.recipe.together import Together

SHARED = ("batch", "augmentation", "whole_batches")  # what arms of one run have in common


def of_case(recipe: Recipe, options: CaseOptions, seed: int, console: Console) -> "Runner":
    """Return the run of a case's arms on images, as the recipe's file says and nothing else.

    A RecipeError says that an arm is unknown, or that the work folder holds this run already, or
    one with other settings.
    """
    case, images = recipe.case(options.case), recipe.images(options.case)
    arms = recipe.arms_of(options.case, options.arms)
    task = images.task(images.load(options)).cut(options.limit)
    found = Runner(recipe, options, seed, task, console)
    if options.together:
        found.take_together(recipe.network(options.case))
    for name, changes in arms.items():
        build = partial(network_of_arm, recipe, options.case, changes, seed)
        found.add(name, build, case.rule_of(name), changes)
    return found


def network_of_arm(recipe: Recipe, case: str, changes: dict[str, Any], seed: int) -> nn.Module:
    """Return a case's network as an arm has it: as it is, pruned, or under masks of this seed."""
    network = recipe.network(case)
    if "prune" in changes:
        return prune(network, changes["prune"], changes["sparsity"])
    return pemnify(network, **changes, seed=seed) if changes else network


class Runner:
    """A run: the arms of one case with one seed."""

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        seed: int,
        task: Classification,
        console: Console,
    ) -> None:
        """Take what arms have in common; `add` takes them, `go` trains them."""
        case = recipe.case(options.case)
        self.options, self.seed, self.console = options, seed, console
        self.task = task.on(options.device)
        self.epochs = options.epochs or case.epochs or recipe.paper_epochs
        self.precision = options.precision or case.precision
        self.arms: list[Arm] = []
        self.together: Together | None = None
        self.stop = Stop(options.until)
        self.folder = options.work / self.label
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def label(self) -> str:
        """Name of the run's folder under ``work``, and of its result."""
        return f"{self.options.case}-e{self.epochs}-s{self.seed}{self.options.cut}"

    def take_together(self, network: nn.Module) -> None:
        """Let arms that have come as far take each step together; ``network`` is theirs, plain."""
        on_device = network.to(self.options.device)
        self.together = Together(on_device, compiled=self.options.compile)

    def add(
        self, name: str, build: Callable[[], nn.Module], rule: Rule, changes: dict[str, Any]
    ) -> Arm:
        """Add an arm, as its checkpoint has it if the options say ``resume``.

        Torch's global generator has the run's seed when ``build`` makes the model; ``changes`` are
        what made it what it is, for the checkpoint and the result.

        Raises:
            RecipeError: If there is a checkpoint and no ``resume``, or it has other settings, or
                the arm cannot see the batches that the others see.
        """
        file = self._file(name)
        with self._own_generator():
            torch.manual_seed(self.seed)
            model = build().to(self.options.device)
        arm = Arm(name, model, rule, file, self._settings(rule, changes))
        self._check_batches(arm)
        if self.options.compile:  # static: one shorter batch would make the graph of all dynamic
            arm.call = torch.compile(model, dynamic=False)
        if file.exists():
            arm.restore()
        self.arms.append(arm)
        return arm

    def _file(self, name: str) -> Path:
        slug = "_".join("".join(c if c.isalnum() else " " for c in name).split())
        file = self.folder / f"{slug}.pt"
        if file.exists() and not self.options.resume:
            message = f"{file} exists; resume that run, or give another work folder"
            raise RecipeError(message)
        return file

    def _settings(self, rule: Rule, changes: dict[str, Any]) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        run = {"case": self.options.case, "epochs": self.epochs, "seed": self.seed}
        run |= {"precision": self.precision} | self.task.sizes
        run |= {"together": True} if self.together else {}
        return run | {"pemnify": changes, "rule": rule.settings()}

    def _check_batches(self, arm: Arm) -> None:
        for first in self.arms[:1]:
            one, other = first.rules["optimizer"], arm.rules["optimizer"]
            differ = [key for key in SHARED if getattr(one, key) != getattr(other, key)]
            if differ:
                message = f"the arms {first.name!r} and {arm.name!r} differ in {differ}; arms of a "
                message += "run see the same batches: give them cases of their own"
                raise RecipeError(message)

    def _own_generator(self) -> Any:
        return torch.random.fork_rng([] if self.options.device == "cpu" else None)

    def go(self) -> None:
        """Train to the end; every arm's ``history`` then has one row an epoch.

        Raises:
            KeyboardInterrupt: After Ctrl-C, or when the options' minutes are over, once the step
                under way is in the checkpoint.
        """
        if self.options.device == "cpu":
            keep_freed_memory()
        bars = (*Progress.get_default_columns(), TimeElapsedColumn())
        progress = Progress(*bars, console=self.console, refresh_per_second=2)
        with self._own_generator(), self.stop.on_interrupt(), progress:
            for epoch in range(min(arm.epoch for arm in self.arms), self.epochs):
                batches = self._batches(epoch, progress)
                for arms in self._turns(epoch):
                    self._train(arms, batches, progress)
                    for arm in arms:
                        self._finish(arm)

    def _turns(self, epoch: int) -> list[list[Arm]]:
        """Return an epoch's arms by turns: one each, or together those that have come as far."""
        there = [arm for arm in self.arms if arm.epoch == epoch]
        if self.together is None:
            return [[arm] for arm in there]
        steps = sorted({arm.step for arm in there})
        return [[arm for arm in there if arm.step == step] for step in steps]

    def _seed(self, *position: object) -> None:
        torch.manual_seed(zlib.crc32(repr((self.seed, *position)).encode()))

    def _batches(self, epoch: int, progress: Progress) -> list[Any]:
        self._seed("epoch", epoch)
        rule = self.arms[0].rules["optimizer"]
        bar = progress.add_task(f"epoch {epoch + 1}: augment", total=self.task.rows(rule))
        ready = self.task.batches(rule, partial(progress.advance, bar))
        progress.remove_task(bar)
        return ready

    def _train(self, arms: Sequence[Arm], batches: list[Any], progress: Progress) -> None:
        """Take arms that have come as far, one or several, to the epoch's end."""
        title = f"epoch {arms[0].epoch + 1}/{self.epochs}: {_names(arms)}"
        bar = progress.add_task(title, total=len(batches), completed=arms[0].step)
        for arm in arms:
            arm.model.train()
        for batch in batches[arms[0].step :]:
            started = time.perf_counter()
            losses = self._step(arms, batch, len(batches))
            seconds = (time.perf_counter() - started) / len(arms)
            for arm, loss in zip(arms, losses, strict=True):
                arm.loss = arm.loss + loss * len(batch[1])
                arm.step += 1
                arm.seconds += seconds
            progress.advance(bar)
            self._halt(arms, len(batches))
        progress.remove_task(bar)

    def _halt(self, arms: Sequence[Arm], steps: int) -> None:
        reason = self.stop.reason
        if reason is not None:
            for arm in arms:
                arm.save()
            done = f"{arms[0].step} of {steps} steps of epoch {arms[0].epoch + 1}"
            message = f"stopped: {_names(arms)} after {done}"
            raise reason(message)

    def _step(self, arms: Sequence[Arm], batch: Any, steps: int) -> list[Tensor]:
        """Take a step; return the arms' losses as float64, which nothing has waited for."""
        position = arms[0].epoch * steps + arms[0].step
        self._seed("step", position)
        losses = self._losses(arms, batch)
        learn(arms, losses, position, self.epochs * steps)
        return [loss.detach().double() for loss in losses]

    def _losses(self, arms: Sequence[Arm], batch: Any) -> list[Tensor]:
        if self.together is None:
            return [self.task.loss(self.forward(arm.call), batch) for arm in arms]
        outputs = self.forward(partial(self.together, arms))(batch[0])
        return [self.task.loss(lambda _, own=own: own, batch) for own in outputs]

    def forward(self, call: Callable[[Tensor], Tensor]) -> Forward:
        """Return what maps inputs to a model's outputs: on the run's device, float32 at the end."""
        device, half = self.options.device, self.precision == "bf16"
        is_last = self.options.layout == "channels_last"

        def outputs(inputs: Tensor) -> Tensor:
            x = self.task.prepare(inputs.to(device))
            if is_last and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                return call(x).float()

        return outputs

    def accuracy(self, arm: Arm) -> float:
        """Share of the test split that ``arm`` gets right, in percent."""
        arm.model.eval()
        return self.task.accuracy(self.forward(arm.call))

    def _finish(self, arm: Arm) -> None:
        """Close the epoch: test, checkpoint, log."""
        started = time.perf_counter()
        accuracy, rows = self.accuracy(arm), self.task.rows(arm.rules["optimizer"])
        row = arm.close_epoch(rows, accuracy, time.perf_counter() - started)
        numbers = ", ".join(f"{key} {value:.5g}" for key, value in row.items())
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {arm.name}: {numbers}"
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
        self.console.print(line, highlight=False)


def _names(arms: Sequence[Arm]) -> str:
    return ", ".join(arm.name for arm in arms)
