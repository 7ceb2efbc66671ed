"""Masks learned on pretrained ResNets, fully fine-tuned weights beside them, and both compressed.

Every task is learned from the same pretrained network by masks alone and by full fine-tuning, with
the same batches. ``coders.py`` measures the files that stay of either, ``structure.py`` what a mask
tells about itself beyond the densities of its layers.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Recipe, load
from pemn_surgery.recipe.arms import Arm, sizes
from pemn_surgery.recipe.options import SEEDS, ImageOptions, option
from pemn_surgery.recipe.pretrained import pretrained
from pemn_surgery.recipe.runner import Runner
from pemn_surgery.report import machine

HERE = load(Path(__file__).resolve().parent)
DATA, NETWORKS = HERE.module("data"), HERE.module("networks")
CODERS, STRUCTURE = HERE.module("coders"), HERE.module("structure")
BASE, CHECKPOINT, ADAPTER = "base.safetensors", "model.safetensors", "adapter_model.safetensors"
CONTEXTS = "decoded bits, weights"  # what every decoder has: no other task
OWN_TASK = 2_000  # test images that tell whether the pretrained weights were read as meant


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """What a run adds to the recipe."""

    TRIAL = ImageOptions.TRIAL | {"limit": 64}

    weights: Path | None = option("folder of the published weights; none in a trial", None)
    seeds: tuple[int, ...] = option(SEEDS, (0,))
    tasks: tuple[str, ...] = option("which", tuple(DATA.TASKS))
    rates: tuple[float, ...] = option("further ones, of masks, with the first seed", ())
    threads: int | None = option("torch's threads", 1)


@dataclass(frozen=True)
class Job:
    """One arm on one task with one seed; ``rate`` is its learning rate."""

    task: str
    seed: int
    arm: str
    rate: float

    @property
    def title(self) -> str:
        """Name of its files: masks of several rates lie side by side."""
        return f"{self.arm}_lr{self.rate:g}"


def start(recipe: Recipe, options: Options, job: Job) -> nn.Sequential:
    """The network that a job's arms start from: published weights, random classifier."""
    return NETWORKS.with_head(_pretrained(recipe, options), DATA.task(job.task).classes, job.seed)


def _pretrained(recipe: Recipe, options: Options) -> nn.Sequential:
    depth = recipe.case(options.case).arguments["depth"]
    if options.weights is None and not options.smoke:
        message = "give --weights, the folder of the published weights; see the recipe's README"
        raise RecipeError(message)
    return pretrained(options.case, depth, options.weights)


def jobs(recipe: Recipe, options: Options) -> Iterator[Job]:
    """All trainings: per seed and task both arms, then masks at the further rates."""
    case = recipe.case(options.case)
    for task in options.tasks:
        DATA.task(task)  # refuses an unknown one before anything is trained
    for seed in options.seeds:
        for task in options.tasks:
            for arm in ("masks", "finetuned"):
                yield Job(task, seed, arm, case.rule_of(arm).lr)
    for rate in options.rates:
        for task in options.tasks:
            yield Job(task, options.seeds[0], "masks", rate)


def train(recipe: Recipe, job: Job, options: Options, console: Console) -> Arm:
    """Train a job to the end and write what stays of it, and its start, beside the checkpoint.

    ``base.safetensors`` is the start; ``<job>/`` an adapter or the fine-tuned checkpoint, and
    ``<job>-small/`` the adapter with coded masks or the checkpoint in float16.
    """
    task, images = DATA.task(job.task), recipe.images(options.case)
    splits = task.splits(lambda: images.load(options))
    data = images.task(splits).cut(options.limit)
    epochs, work = options.epochs or task.epochs, options.work / job.task
    own = dataclasses.replace(options, epochs=epochs, work=work)
    runner = Runner(recipe, own, job.seed, data, console)
    rule, changes = recipe.case(options.case).rule_of(job.arm, lr=job.rate), recipe.arms[job.arm]
    arm = runner.add(job.title, lambda: _model(recipe, options, job), rule, changes)
    runner.go()
    save_file(start(recipe, options, job).state_dict(), runner.folder / BASE)
    arm.stored()
    _store_small(arm)
    return arm


def _model(recipe: Recipe, options: Options, job: Job) -> nn.Module:
    network, changes = start(recipe, options, job), recipe.arms[job.arm]
    return pemnify(network, PemnConfig.preset(**changes)) if changes else network


def _store_small(arm: Arm) -> None:
    folder = _small(arm)
    if isinstance(arm.model, PeftModel):
        arm.model.peft_config["default"].coding = "entropy"  # pyright: ignore[reportAttributeAccessIssue]
        arm.model.save_pretrained(str(folder))
        return
    folder.mkdir(exist_ok=True)
    state = arm.model.state_dict()
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    save_file(half, folder / CHECKPOINT)


def _small(arm: Arm) -> Path:
    return arm.file.with_name(f"{arm.file.stem}-small")


def run(recipe: Recipe, options: Options, console: Console) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train everything, then measure it; yield the result's name, and what it holds.

    That is: ``network`` (masked weights, accuracy on its own task) and ``rows``, one for each job.

    Raises:
        RecipeError: If a case, a task or a file is missing, or a tool is not installed.
        KeyboardInterrupt: After Ctrl-C; checkpoints are written, and ``resume`` goes on.
    """
    chosen = CODERS.tools()  # refuses before anything is trained
    all_jobs = list(dict.fromkeys(jobs(recipe, options)))  # a rate may be the recipe's own
    network = {"own_task": own_task(recipe, options)}
    arms = {job: train(recipe, job, options, console) for job in all_jobs}
    console.print("measuring")
    rows = [_row(job, arms, chosen) for job in all_jobs]
    network["weights"] = next(row["weights"] for row in rows if row["arm"] == "masks")
    label = options.case + options.changes
    found = {"case": label, "seeds": list(options.seeds), "network": network, "rows": rows}
    rule = {"rule": recipe.case(options.case).rule}
    yield label, found | rule | machine.environment("cramjam")


def own_task(recipe: Recipe, options: Options) -> dict[str, float]:
    """CIFAR-10's classes by the published weights in float32: percent right, of how many images."""
    network = _pretrained(recipe, options).eval()
    data = recipe.images(options.case)
    images, labels = (part[:OWN_TASK] for part in data.load(options)["test"])
    with torch.no_grad():
        found = torch.cat([network(data.normalise(part)).argmax(1) for part in images.split(500)])
    return {"accuracy": 100 * float((found == labels).float().mean()), "images": len(labels)}


def _row(job: Job, arms: Mapping[Job, Arm], chosen: Any) -> dict[str, Any]:
    arm = arms[job]
    last = arm.history[-1]
    row = dataclasses.asdict(job) | {"epochs": arm.epoch, "accuracy": last["test_accuracy"]}
    row |= {"train_images": arm.settings["train"], "test_images": arm.settings["test"]}
    row |= {"seconds": sum(epoch["seconds"] for epoch in arm.history), "history": arm.history}
    measured = _measure_masks(job, arms, chosen) if job.arm == "masks" else _measure(arm, chosen)
    return row | measured


def _measure_masks(job: Job, arms: Mapping[Job, Arm], chosen: Any) -> dict[str, Any]:
    base, masks = _base(arms[job]), _masks(arms[job])
    twin = next((j for j in arms if _is_twin(j, job)), None)
    others = _masks(arms[twin]) if twin else {}
    layers = [_layer(mask, base[name], others.get(name)) for name, mask in masks.items()]
    found = CODERS.of_masks(masks, chosen)
    found["ones_by_magnitude"] = STRUCTURE.ones_by_magnitude(layers)
    found["structure"] = STRUCTURE.alone(layers) | STRUCTURE.combined(layers)
    contexts = {"contexts": found["structure"][CONTEXTS]["adaptive"]}
    found["bytes"] |= contexts
    found["reduction"] |= CODERS.reductions(contexts, found["weights"] / 8)
    adapter, small = _bytes(arms[job].folder), _bytes(_small(arms[job]))
    return found | {"files": {"adapter": adapter, "adapter_coded": small}}


def _layer(mask: Tensor, weight: Tensor, other: Tensor | None) -> Any:
    """A mask beside what a decoder may have; another task's classifier has another shape."""
    arrays = [STRUCTURE.four_dimensional(tensor) for tensor in (mask, weight)]
    fits = other is not None and other.shape == mask.shape
    return STRUCTURE.Layer(*arrays, STRUCTURE.four_dimensional(other) if fits else None)


def _is_twin(job: Job, other: Job) -> bool:
    """Whether the jobs differ in their task alone."""
    return job.task != other.task and dataclasses.replace(job, task=other.task) == other


def _measure(arm: Arm, chosen: Any) -> dict[str, Any]:
    """Measure fine-tuned weights of the layers that masks would choose from, and their change."""
    base, tuned = _base(arm), load_file(arm.folder / CHECKPOINT)
    weights = {name: tuned[name] for name, tensor in base.items() if tensor.dim() > 1}
    change = {name: tensor - base[name] for name, tensor in weights.items()}
    files = {"float32": _bytes(arm.folder), "float16": _bytes(_small(arm))}
    return {
        "weights": sum(tensor.numel() for tensor in weights.values()),
        "finetuned": CODERS.of_floats(weights, chosen),
        "change": CODERS.of_floats(change, chosen),
        "files": files,
    }


def _base(arm: Arm) -> dict[str, Tensor]:
    """The start's tensors from the first layer to the last; the file has them by the alphabet."""
    held = load_file(arm.file.parent / BASE)
    return {name: held[name] for name in sorted(held, key=_place)}


def _place(name: str) -> tuple[int, str]:
    number, rest = name.split(".", 1)
    return int(number), rest


def _masks(arm: Arm) -> dict[str, Tensor]:
    shapes = {name: tensor.shape for name, tensor in _base(arm).items()}
    return CODERS.read_masks(arm.folder / ADAPTER, shapes)


def _bytes(folder: Path) -> int:
    return sum(sizes(folder).values())
