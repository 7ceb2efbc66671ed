"""What a run adds to a recipe: one value, whose fields are the options of the command line."""

import math
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

from pemn_surgery.errors import RecipeError

PRECISIONS = ("bf16", "fp32")
LAYOUTS = ("channels_last", "contiguous")
SEEDS = "one run of everything for each"


def option(text: str, default: Any = MISSING, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field that is an option of the command line; its type reads the words."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the runs of all recipes have; a recipe derives what its own adds."""

    TRIAL: ClassVar[dict[str, Any]] = {"epochs": 1}  # what ``smoke`` gives in place of other values

    case: str = option("row of the recipe's file")
    work: Path = option(
        "folder of decoded data, checkpoints, logs and what arms would ship", Path("work")
    )
    epochs: int | None = option("in place of the recipe's; schedules stretch to them", None)
    minutes: float | None = option("stop cleanly after so long; --resume goes on", None)
    precision: str | None = option("in place of the recipe's", None, PRECISIONS)
    device: str = option("torch's name of it", "cpu")
    threads: int | None = option("torch's threads", None)
    layout: str = option("of images in memory", "channels_last", LAYOUTS)
    compile: bool = option("compile networks with torch.compile", default=False)
    limit: int | None = option("cut every split, for a trial", None)
    smoke: bool = option("a trial of seconds: little data, an epoch", default=False)
    resume: bool = option("continue from the checkpoints, if any", default=False)
    until: float = field(default=math.inf, compare=False)  # of `time.monotonic`
    results: Path | None = field(default=None, compare=False)  # where those before this run are

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name, value in self.TRIAL.items() if self.smoke else ():
            object.__setattr__(self, name, value)
        if self.precision not in (*PRECISIONS, None):
            message = f"precision={self.precision!r}; give 'bf16' or 'fp32'"
            raise RecipeError(message)
        check_counts(epochs=self.epochs, threads=self.threads, limit=self.limit)
        if self.minutes is not None and not self.minutes > 0:
            message = f"minutes={self.minutes}; give more than 0"
            raise RecipeError(message)
        if self.minutes is not None and self.until == math.inf:  # what replaces options keeps it
            object.__setattr__(self, "until", time.monotonic() + 60 * self.minutes)

    @property
    def changes(self) -> str:
        """What makes a run another one than the recipe's, for the name of its result."""
        return (f"-e{self.epochs}" if self.epochs else "") + self.cut

    @property
    def cut(self) -> str:
        """What makes a run a trial, for the name of its folder."""
        return "-smoke" if self.smoke else f"-limit{self.limit}" if self.limit else ""


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Options of recipes whose file names a data set of images."""

    data: str = option("folder or hub id, in place of the recipe's", "")


@dataclass(frozen=True, kw_only=True)
class CaseOptions(ImageOptions):
    """Options of recipes whose file says all that is trained."""

    arms: tuple[str, ...] = option("which, of the case's; none named: all", ())
    seeds: tuple[int, ...] = option(SEEDS, (0,))
    together: bool = option(
        "arms take each step in one call, for devices larger than a network", default=False
    )


def check_counts(**counts: int | None) -> None:
    """Raise a RecipeError for the first count below 1; None is no count."""
    for name, count in counts.items():
        if count is not None and count < 1:
            message = f"{name}={count}; give 1 or more"
            raise RecipeError(message)


def add_options(parser: ArgumentParser, kind: type, choices: Mapping[str, Sequence[str]]) -> None:
    """Add a dataclass of `option` to a parser; ``choices`` has values that the file knows."""
    for one in _options(kind):
        given = one.default not in (MISSING, None, "", (), False)
        shown = one.default if isinstance(one.default, Path) else _shown(one, one.default)
        default = f" (default: {shown})" if given else ""
        chosen = choices.get(one.name, one.metadata["choices"])
        parser.add_argument(_flag(one), help=one.metadata["help"] + default, **_reader(one, chosen))


def _reader(one: Field[Any], choices: Sequence[str] | None) -> dict[str, Any]:
    """What argparse needs to read an option of no word, of one or of several."""
    if one.type is bool:
        return {"action": "store_true"}
    needed = {"required": True} if one.default is MISSING else {"default": one.default}
    plural = {"nargs": "+"} if get_origin(one.type) is tuple else {}
    return needed | plural | {"type": (*get_args(one.type), one.type)[0], "choices": choices}


def from_words(kind: type, given: Mapping[str, Any]) -> Any:
    """Return the dataclass of what argparse read, which has lists where values have tuples."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def command(recipe: str, verb: str, options: Any) -> str:
    """Return the command line of a run, with its folders and files as placeholders."""
    given = [(one, getattr(options, one.name)) for one in _options(options) if one.name != "resume"]
    words = [f"{_flag(one)} {_shown(one, value)}".strip() for one, value in given if value]
    return " ".join([f"pemn run recipes/{recipe} {verb}", *words])


def _options(kind: Any) -> list[Field[Any]]:
    return [one for one in fields(kind) if "help" in one.metadata]


def _flag(one: Field[Any]) -> str:
    return "--" + one.name.replace("_", "-")


def _shown(one: Field[Any], value: Any) -> str:
    if one.type is bool:
        return ""
    if isinstance(value, Path):
        return one.name.upper()
    if one.name in ("data", "model") and Path(value).is_dir():
        return f".../{Path(value).name}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
