"""A recipe's file: a claim, and one row a network: model, data, masks, rule, published number.

A recipe is a folder with ``recipe.toml`` and ``__main__.py``, its command line. What a case of the
file cannot say, the recipe's own modules do.
"""

import functools
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.images import ImageData
from pemn_surgery.recipe.rules import Rule
from pemn_surgery.recipe.texts import TextData

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Table = dict[str, Any]
DataKind = TypeVar("DataKind", ImageData, TextData)


@dataclass(frozen=True)
class Case:
    """One network on one data set.

    Attributes:
        factory: What makes the network: a function by its dotted name (``timm.create_model``), or,
            without a dot, one of the recipe's ``networks.py``.
        arguments: Of the factory.
        data: Which of the recipe's data sets.
        rule: How it is trained, the fields of a `Rule`.
        rules: What is otherwise for an arm, by its name.
        epochs: How long it is trained; None: as long as in the paper.
        precision: "bf16" (autocast) or "fp32".
        arms: Which arms it has; none named: all of the recipe.
        published: The paper's numbers by arm.
    """

    factory: str
    arguments: Table
    data: str
    rule: Table
    rules: dict[str, Table] = field(default_factory=dict)
    epochs: int | None = None
    precision: str = "bf16"
    arms: list[str] = field(default_factory=list)
    published: dict[str, Table] = field(default_factory=dict)

    def rule_of(self, arm: str, **changes: Any) -> Rule:
        """Return an arm's rule; a RecipeError if a field is missing, misspelt or unknown."""
        try:
            return Rule(**self.rule | self.rules.get(arm, {}) | changes)
        except TypeError as error:
            message = f"the rule of the arm {arm!r} cannot be read: {error}"
            raise RecipeError(message) from error


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
    data: dict[str, Table]
    arms: dict[str, Table]
    cases: dict[str, Case]
    published: dict[str, Table] = field(default_factory=dict)

    def module(self, name: str) -> ModuleType:
        """Import ``<folder>/<name>.py``, once; it is code and runs, so load recipes you trust."""
        file = self.folder / f"{name}.py"
        if not file.is_file():
            message = f"{file} does not exist; the recipe {self.name} needs it"
            raise RecipeError(message)
        return _imported(f"_recipe_{self.name}_{name}", file.resolve())

    def case(self, name: str) -> Case:
        """Return a case by its name, or raise a RecipeError that lists those there are."""
        if name not in self.cases:
            message = f"case {name!r} is unknown; {self.name} has {sorted(self.cases)}"
            raise RecipeError(message)
        return self.cases[name]

    def arms_of(self, case: str, chosen: Sequence[str] = ()) -> dict[str, Table]:
        """Return a case's arms, all or chosen, with their options; a RecipeError if one is none."""
        there = self.case(case).arms or list(self.arms)
        unknown = [name for name in (*chosen, *there) if name not in there or name not in self.arms]
        if unknown:
            message = f"arms {unknown} are unknown; {case!r} of {self.name} has {there}"
            raise RecipeError(message)
        return {name: self.arms[name] for name in chosen or there}

    def network(self, case: str) -> nn.Module:
        """Make a case's network with torch's global generator, or raise a RecipeError."""
        one = self.case(case)
        return self._factory(one.factory)(**one.arguments)

    def images(self, case: str) -> ImageData:
        """Return the data set of a case on images; a RecipeError if its row cannot be read."""
        return self._data(case, ImageData)

    def texts(self, case: str) -> TextData:
        """Return the data set of a case on texts; a RecipeError if its row cannot be read."""
        return self._data(case, TextData)

    def _data(self, case: str, kind: Callable[..., DataKind]) -> DataKind:
        name = self.case(case).data
        try:
            return kind(**self.data[name])
        except (KeyError, TypeError) as error:
            message = f"the data set {name!r} of {self.name} cannot be read: {error!r}"
            raise RecipeError(message) from error

    def _factory(self, name: str) -> Callable[..., nn.Module]:
        try:
            if "." in name:
                return pkgutil.resolve_name(name)
            return getattr(self.module("networks"), name)
        except (ImportError, AttributeError) as error:
            message = f"the factory {name!r} of a case of {self.name} cannot be imported: {error}"
            raise RecipeError(message) from error


@functools.cache
def _imported(name: str, file: Path) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load(folder: str | Path) -> Recipe:
    """Read ``<folder>/recipe.toml``.

    A case's ``rule`` and ``arms`` may be names in the tables ``rules`` and ``groups``.

    Raises:
        RecipeError: If the file is missing, is no TOML, or lacks or misspells a field.
    """
    file = Path(folder) / "recipe.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        shared = {"rule": table.pop("rules", {}), "arms": table.pop("groups", {})}
        cases = {name: _case(given, shared) for name, given in table.pop("cases").items()}
        return Recipe(folder=Path(folder), cases=cases, **table)
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        message = f"{file} cannot be read as a recipe: {error!r}"
        raise RecipeError(message) from error


def _case(given: Table, shared: dict[str, Table]) -> Case:
    named = {key: given[key] for key in shared if isinstance(given.get(key), str)}
    return Case(**given | {key: shared[key][name] for key, name in named.items()})
