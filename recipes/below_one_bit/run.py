"""Train masks with scores at a learning rate of their own; keep masks and accuracy.

Only the scores' learning rate decides how many mask bits leave the initial mask, so it is swept
while everything else that is trained keeps its own. Masks are kept as they are, so that ways to
code them can be compared without training again (`measure`).
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from pemn_surgery import pemnify
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.commands import quickstart_run as quickstart
from pemn_surgery.recipe import Recipe
from pemn_surgery.recipe.arms import Arm
from pemn_surgery.recipe.classification import Classification
from pemn_surgery.recipe.options import SEEDS, ImageOptions, option
from pemn_surgery.recipe.rules import OPTIMIZERS
from pemn_surgery.recipe.runner import Runner

LARGE = 1e3  # a score that stays among the largest
TASKS = ("digit", "parity")


@dataclass(frozen=True, kw_only=True)
class Sweep(ImageOptions):
    """What tells trainings of one case apart, beside their seed and task."""

    TRIAL = ImageOptions.TRIAL | {"limit": 64}

    optimizer: str = option("of the scores", "adamw", sorted(OPTIMIZERS))
    lr: tuple[float, ...] = option("of the scores, at its highest")
    pull: float = option("of scores toward where they began, in learning rates", 0.0)
    held: float = option("share of weights, the smallest, whose mask bits stay as they began", 0.0)
    threads: int | None = option("torch's threads", 1)


@dataclass(frozen=True, kw_only=True)
class Options(Sweep):
    """What a run adds to the recipe."""

    seeds: tuple[int, ...] = option(SEEDS, (0,))
    task: str = option("of digits", "digit", TASKS)


@dataclass(frozen=True)
class Job:
    """One training: what is swept, beside what the recipe says; `Sweep` explains the fields."""

    case: str
    optimizer: str
    lr: float
    seed: int
    epochs: int
    task: str = "digit"
    pull: float = 0.0
    held: float = 0.0

    @property
    def label(self) -> str:
        """Name of the training's files."""
        parts = (self.case, self.task, self.optimizer, f"{self.lr:g}", f"p{self.pull:g}")
        parts += (f"h{self.held:g}",) if self.held else ()
        return "-".join((*parts, f"e{self.epochs}", f"s{self.seed}"))


def job_of(settings: dict[str, Any]) -> Job:
    """Return the job that `train` returned these settings of."""
    return Job(**{field.name: settings[field.name] for field in fields(Job)})


def run(recipe: Recipe, options: Options, console: Console) -> tuple[()]:
    """Train every seed and rate that is not there yet; their files are under ``work``.

    Raises:
        RecipeError: If the case is unknown, or one was begun and ``resume`` is not given.
        KeyboardInterrupt: After Ctrl-C; the checkpoint is written and the run can be resumed.
    """
    epochs = epochs_of(recipe, options)
    for seed in options.seeds:
        for lr in options.lr:
            swept = (options.case, options.optimizer, lr, seed, epochs)
            job = Job(*swept, options.task, options.pull, options.held)
            file = options.work / f"{job.label}.json"
            if not file.exists():
                found = train(recipe, job, options, console)
                file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return ()


def epochs_of(recipe: Recipe, options: Sweep) -> int:
    """How long the jobs of a sweep are trained."""
    return options.epochs or recipe.case(options.case).epochs or recipe.paper_epochs


def data(recipe: Recipe, job: Job, options: Sweep) -> Classification:
    """Return a job's images."""
    if job.case == "digits":
        train, test = ((one.images, one.labels[job.task]) for one in quickstart.load_digits())
        return Classification(train, test).cut(options.limit)
    images = recipe.images(job.case)
    return images.task(images.load(options)).cut(options.limit)


def network(recipe: Recipe, job: Job) -> PeftModel:
    """Return the case's network with fresh masks, some of whose bits may be held."""
    torch.manual_seed(job.seed)
    model = pemnify(recipe.network(job.case), seed=job.seed, **recipe.arms["masks"])
    for layer in layers(model) if job.held else ():
        hold(layer, job.held)
    return model


def arm(recipe: Recipe, job: Job, options: Sweep, console: Console) -> tuple[Runner, Arm]:
    """Return a job's runner and its arm: fresh, or as far as it has come."""
    own = dataclasses.replace(options, case=job.case, epochs=job.epochs)
    runner = Runner(recipe, own, job.seed, data(recipe, job, options), console)
    scores = {"optimizer": job.optimizer, "lr": job.lr, "weight_decay": 0.0, "momentum": 0.9}
    rule = recipe.case(job.case).rule_of("masks", scores=scores)
    changes = recipe.arms["masks"] | {"pull": job.pull, "held": job.held, "task": job.task}
    starts: list[tuple[nn.Parameter, torch.Tensor]] = []

    def build() -> nn.Module:
        model = network(recipe, job)
        found = [cast("nn.Parameter", one.mask_of("default").scores) for one in layers(model)]
        starts.extend((score, score.detach().clone()) for score in found)
        return model

    one = runner.add(job.label, build, rule, changes)
    if job.pull:
        optimizer = one.optimizers["scores"]
        optimizer.register_step_post_hook(lambda *_: pull(starts, job.pull, optimizer))
    return runner, one


@torch.no_grad()
def pull(
    starts: list[tuple[nn.Parameter, torch.Tensor]], by: float, optimizer: torch.optim.Optimizer
) -> None:
    """Move scores toward where they began, by as much wherever they are, not beyond it."""
    far = by * optimizer.param_groups[0]["lr"]
    for score, start in starts:
        moved = score - start.to(score.device)
        score.sub_(moved).add_(F.softshrink(moved, far))


def train(recipe: Recipe, job: Job, options: Sweep, console: Console) -> dict[str, Any]:
    """Train a job; keep the packed masks by weight, ``<label>.npz`` under ``work``.

    Returns:
        The job's settings, accuracy in percent and seconds by epoch.
    """
    runner, one = arm(recipe, job, options, console)
    runner.go()
    keep_masks(options.work / f"{job.label}.npz", one.model, job.epochs)
    rows = [
        {"epoch": row["epoch"], "loss": row["train_loss"], "seconds": row["seconds"]}
        | {"accuracy": row["test_accuracy"]}
        for row in one.history
    ]
    return {**asdict(job), "history": rows, "shapes": shapes(one.model)}


def layers(model: nn.Module) -> Iterator[PemnLayer]:
    """Yield the masked layers of a model."""
    return (module for module in model.modules() if isinstance(module, PemnLayer))


@torch.no_grad()
def hold(layer: PemnLayer, share: float) -> None:
    """Keep the mask bits of a layer's smallest frozen numbers as they are, whatever is trained.

    Their scores go to both ends of the order and get no gradient.
    """
    scores, sizes = cast("nn.Parameter", layer.mask_of("default").scores), layer.fill().abs()
    held = torch.zeros_like(sizes, dtype=torch.bool)
    held.view(-1)[sizes.flatten().argsort(stable=True)[: int(share * sizes.numel())]] = True
    ends = torch.where(layer.mask_of("default").mask(), LARGE, 0.0)
    scores.copy_(torch.where(held, ends, scores))
    scores.register_hook(lambda gradient: gradient.masked_fill(held.to(gradient.device), 0.0))


@torch.no_grad()
def keep_masks(file: Path, model: nn.Module, epoch: int) -> None:
    """Write every mask by epoch and weight, eight weights a byte, the first lowest."""
    masks = {
        f"{epoch}/{layer.target}": np.packbits(
            layer.mask_of("default").mask().cpu().numpy(), bitorder="little"
        )
        for layer in layers(model)
    }
    np.savez(file, **cast("Any", masks))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every masked weight."""
    return {layer.target: tuple(layer.shape) for layer in layers(model)}
