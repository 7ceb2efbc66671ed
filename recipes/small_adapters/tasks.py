"""Tasks: what a case trains, chooses and tests with, and the network that it begins from."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import Recipe, load
from pemn_surgery.recipe.classification import Classification, Split

NETWORKS: Any = load(Path(__file__).resolve().parent).module("networks")
HELD_OUT, MOST = 0.1, 1_000  # of the training rows where a data set has no validation split


@dataclass(frozen=True)
class Task:
    """A case's task.

    Attributes:
        network: Makes its network, pretrained, with a head from torch's global generator.
        chosen: Trains on the training rows and tests with the validation rows.
        tested: The same with the test rows.
        tokens: Tokens of the training rows together; 0 for images.
    """

    network: Callable[[], nn.Module]
    chosen: Classification
    tested: Classification
    tokens: int


def task(recipe: Recipe, options: Any) -> Task:
    """Return the task of the options' case; a RecipeError says what is missing."""
    case = recipe.case(options.case)
    nested = Path(options.data) / case.data
    if options.data and nested.is_dir():
        options = dataclasses.replace(options, data=str(nested))
    of_kind = _sentences if "text" in recipe.data[case.data] else _pictures
    return of_kind(recipe, options)


def _sentences(recipe: Recipe, options: Any) -> Task:
    data, given = recipe.texts(options.case), {} if options.smoke else {"model": options.model}
    network = _network(recipe, options, given)
    splits = data.load(options, None if options.smoke else NETWORKS.tokenize(options.model))
    chosen, tested = _both(data, splits, options)
    padding = network().body.padding
    return Task(network, chosen, tested, int((chosen.train[0] != padding).sum()))


def _pictures(recipe: Recipe, options: Any) -> Task:
    if options.weights is None and not options.smoke:
        message = f"give --weights, the folder of the weights of {options.case!r}; see the README"
        raise RecipeError(message)
    data, given = recipe.images(options.case), {} if options.smoke else {"weights": options.weights}
    chosen, tested = _both(data, data.load(options), options)
    return Task(_network(recipe, options, given), chosen, tested, 0)


def _network(recipe: Recipe, options: Any, given: dict[str, Any]) -> Callable[[], Any]:
    """Return what makes a case's network, of the model or weights that the options name."""
    case = recipe.case(options.case)
    own = dataclasses.replace(case, arguments=case.arguments | given)
    with_it = dataclasses.replace(recipe, cases=recipe.cases | {options.case: own})
    return lambda: with_it.network(options.case)


def _both(data: Any, given: dict[str, Split], options: Any) -> tuple[Classification, ...]:
    _check_labels(options.case, given)
    splits = given if "validation" in given else held_out(given)
    names = ("validation", "test")
    return tuple(
        data.task({"train": splits["train"], "test": splits[name]}).cut(options.limit)
        for name in names
    )


def _check_labels(case: str, given: dict[str, Split]) -> None:
    for name, (_, labels) in given.items():
        if int(labels.min()) < 0:
            message = f"the {name} split of {case!r} has hidden labels ({int(labels.min())}); name "
            message += "another one in recipe.toml, or give --data with labels"
            raise RecipeError(message)


def held_out(given: dict[str, Split]) -> dict[str, Split]:
    """Take a tenth of the training rows, at most 1,000, for validation: the same for every seed."""
    inputs, labels = given["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = min(round(HELD_OUT * len(labels)), MOST)
    parts = {"validation": order[:count].sort().values, "train": order[count:].sort().values}
    return given | {name: (inputs[rows], labels[rows]) for name, rows in parts.items()}
