"""Recipes: a folder that holds one claim, run beside the paper's numbers.

A recipe has ``recipe.toml`` (claim, arms, cases with training rule and published accuracy) and
``run.py`` with ``train(recipe, options, console) -> list[Arm]``, the experiment itself. What all
recipes share is here: reading the file, arms that can be stopped and resumed, and the result with
everything that is needed to judge it.
"""

import importlib.util
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pemn_surgery import report
from pemn_surgery.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

COLUMNS = ("arm", "best (epoch)", "last", "published", "best - published", "bytes", "s/epoch")
PROGRESS = ("epoch", "step", "loss", "seconds", "history")


@dataclass(frozen=True)
class Case:
    """One network: its factory, its training rule, the published numbers by arm."""

    factory: str
    arguments: dict[str, Any]
    rule: dict[str, Any]
    published: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A claim with what is needed to test it; an arm maps to its options of `pemnify`, or none.

    ``published`` holds the paper's numbers that belong to none of the recipe's own cases.
    """

    folder: Path
    name: str
    claim: str
    paper: str
    paper_epochs: int
    data: dict[str, str]
    arms: dict[str, dict[str, Any]]
    cases: dict[str, Case]
    published: dict[str, dict[str, Any]] = field(default_factory=dict)

    def module(self, name: str) -> ModuleType:
        """Import ``<folder>/<name>.py``; it is code and runs, so load recipes you trust.

        Raises:
            RecipeError: If the file is missing.
        """
        file = self.folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"_recipe_{self.name}_{name}", file)
        if not file.is_file() or spec is None or spec.loader is None:
            message = f"{file} does not exist; the recipe {self.name} needs it"
            raise RecipeError(message)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    def case(self, name: str) -> Case:
        """Return a case by its name.

        Raises:
            RecipeError: If there is none of that name; the message lists those there are.
        """
        if name not in self.cases:
            message = f"case {name!r} is unknown; {self.name} has {sorted(self.cases)}"
            raise RecipeError(message)
        return self.cases[name]


@dataclass(frozen=True)
class Options:
    """What a run adds to a recipe; ``limit`` cuts every split, for trials only."""

    case: str
    epochs: int
    work: Path
    data: str = ""
    seed: int = 0
    precision: str = "bf16"
    device: str = "cpu"
    limit: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.epochs < 1:
            message = f"epochs={self.epochs}; give 1 or more"
            raise RecipeError(message)
        if self.precision not in ("bf16", "fp32"):
            message = f"precision={self.precision!r}; give 'bf16' or 'fp32'"
            raise RecipeError(message)

    @property
    def label(self) -> str:
        """Name of the run's folder under ``work`` and of its result."""
        cut = f"-limit{self.limit}" if self.limit else ""
        return f"{self.case}-e{self.epochs}-s{self.seed}{cut}"

    def command(self, recipe: str) -> str:
        """The command line of the run, with its folders shortened to placeholders."""
        parts = [f"python recipes/{recipe} run --work WORK"]
        given = {k: v for k, v in asdict(self).items() if k not in ("work", "resume") and v}
        if Path(self.data).is_dir():
            given["data"] = f".../{Path(self.data).name}"
        return " ".join([*parts, *(f"--{key} {value}" for key, value in given.items())])


def load(folder: str | Path) -> Recipe:
    """Read ``<folder>/recipe.toml``.

    Raises:
        RecipeError: If the file is missing, is no TOML, or lacks or misspells a field.
    """
    file = Path(folder) / "recipe.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        cases = {name: Case(**given) for name, given in table.pop("cases").items()}
        return Recipe(folder=Path(folder), cases=cases, **table)
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        message = f"{file} cannot be read as a recipe: {error!r}"
        raise RecipeError(message) from error


class Arm:
    """One way of training a case: the model, its optimizer, and how far it has come.

    ``history`` has a row an epoch: ``epoch`` (from 1), ``train_loss``, ``test_accuracy`` (in
    percent), ``seconds`` and ``test_seconds``. ``step``, ``loss`` (a sum over the images seen)
    and ``seconds`` belong to the epoch under way.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        file: Path,
        settings: dict[str, Any],
    ) -> None:
        """Start at epoch 0; ``file`` takes checkpoints of a run with these ``settings``."""
        self.name, self.model, self.optimizer = name, model, optimizer
        self.file, self.settings = file, settings
        self.epoch, self.step, self.loss, self.seconds = 0, 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name: trainable parameters and buffers."""
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return trained | dict(self.model.named_buffers())

    def save(self) -> None:
        """Write the checkpoint under another name, then rename it over the old one."""
        progress = {key: getattr(self, key) for key in PROGRESS}
        state = {"settings": self.settings, "progress": progress, "tensors": self.tensors()}
        partial = self.file.with_suffix(".partial")
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, partial)
        partial.replace(self.file)

    def restore(self) -> None:
        """Continue from the checkpoint.

        Raises:
            RecipeError: If it belongs to a run with other settings.
        """
        state = torch.load(self.file, weights_only=True)
        was = state["settings"]
        other = {k: (was.get(k), new) for k, new in self.settings.items() if was.get(k) != new}
        if other:
            message = f"{self.file} has other settings (its, given): {other}; give another work"
            raise RecipeError(message)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(state["tensors"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self).update(state["progress"])

    def close_epoch(self, images: int, accuracy: float, test_seconds: float) -> dict[str, float]:
        """Add the finished epoch's row to the history, reset the counters, checkpoint."""
        row = {"epoch": self.epoch + 1, "train_loss": self.loss / images}
        row |= {"test_accuracy": accuracy, "seconds": self.seconds, "test_seconds": test_seconds}
        self.history.append(row)
        self.epoch, self.step, self.loss, self.seconds = self.epoch + 1, 0, 0.0, 0.0
        self.save()
        return row

    def stored(self) -> dict[str, int]:
        """Write what a user would keep beside the checkpoint; bytes by file name."""
        folder = self.file.with_suffix("")
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(str(folder))  # pyright: ignore[reportCallIssue]
        else:
            from safetensors.torch import save_model

            folder.mkdir(exist_ok=True)
            save_model(self.model, str(folder / "model.safetensors"))
        kept = (file for file in folder.rglob("*.*") if file.suffix in (".safetensors", ".json"))
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in kept}

    def summary(self, published: dict[str, Any] | None) -> dict[str, Any]:
        """Best and last epoch beside the published number, bytes, and the whole history."""
        best = max(self.history, key=lambda row: row["test_accuracy"])
        keys, files = ("epoch", "test_accuracy"), self.stored()
        return {
            "best": {key: best[key] for key in keys},
            "last": {key: self.history[-1][key] for key in keys},
            "published": published,
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "bytes": {"total": sum(files.values()), "files": files},
            "settings": self.settings,
            "history": self.history,
        }


def run(recipe: Recipe, options: Options, console: Console | None = None) -> dict[str, Any]:
    """Train all arms of a case and return the result, which JSON can hold.

    Raises:
        RecipeError: If the case is unknown, or the work folder holds this run already.
        KeyboardInterrupt: After Ctrl-C; the checkpoint is written and the run can be resumed.
    """
    published = recipe.case(options.case).published
    arms = recipe.module("run").train(recipe, options, console or Console())
    ran = min(len(arm.history) for arm in arms)
    cut = f"; a trial on {options.limit} images of each split" if options.limit else ""
    return {
        "schema": 1,
        "recipe": recipe.name,
        "claim": recipe.claim,
        "paper": recipe.paper,
        "case": options.case,
        "command": options.command(recipe.name),
        "seed": options.seed,
        "epochs": {"run": ran, "paper": recipe.paper_epochs},
        "note": f"epochs: {ran} of the paper's {recipe.paper_epochs}{cut}",
        **report.environment(),
        "arms": {arm.name: arm.summary(published.get(arm.name)) for arm in arms},
    }


def compare(result: dict[str, Any]) -> Table:
    """Tabulate a result's arms beside the published accuracy."""
    table = Table(title=f"{result['recipe']}: {result['case']} - {result['note']}")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title == "arm" else "right")
    for name, arm in result["arms"].items():
        table.add_row(name, *_cells(arm))
    return table


def _cells(arm: dict[str, Any]) -> list[str]:
    best, published = arm["best"]["test_accuracy"], arm["published"]
    beside = ["-", "-"]
    if published:
        beside = [f"{published['accuracy']:.2f}", f"{best - published['accuracy']:+.2f}"]
    seconds = sum(row["seconds"] for row in arm["history"]) / len(arm["history"])
    found = [f"{best:.2f} ({arm['best']['epoch']})", f"{arm['last']['test_accuracy']:.2f}"]
    return [*found, *beside, f"{arm['bytes']['total']:,}", f"{seconds:.1f}"]
