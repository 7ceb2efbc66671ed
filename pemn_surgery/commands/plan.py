"""``pemn plan``."""

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, get_args

from pemn_surgery.commands.building import Wanted, add_model, build_model
from pemn_surgery.commands.common import add_command, add_json, first_line, print_json
from pemn_surgery.errors import ConfigError, PemnError
from pemn_surgery.masks.selector import SelectorName
from pemn_surgery.numbers.bank import BankName, InitName
from pemn_surgery.planning.request import RestName, TiedName

if TYPE_CHECKING:
    from pemn_surgery.adapters import PemnConfig

_PATTERN = re.compile(r"[\\*+?()\[\]{}|^$]")  # what a name of modules does not have


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plan",
        _run,
        "Say what would happen to every weight of a model, and why; touches nothing.",
        "pemn plan vit_base_patch16_224 --bank rp --ratio 0.01",
    )
    add_model(parser)
    parser.add_argument(
        "--preset", help="known settings, which options change: text, image, pemn, piggyback, ..."
    )
    parser.add_argument("--task-type", type=str.upper, help="PEFT's: SEQ_CLS, CAUSAL_LM, ...")
    for group, options in (("numbers", _NUMBERS), ("masks", _MASKS), ("which", _WHICH)):
        listed = parser.add_argument_group(group, _GROUPS[group])
        for name, settings in options.items():
            listed.add_argument(f"--{name.replace('_', '-')}", **settings)
    add_json(parser)


def _share(word: str) -> float | str:
    return word if word == "erk" else float(word)


def _pattern(word: str) -> tuple[str, float]:
    pattern, _, share = word.rpartition("=")
    return pattern, float(share)


_GROUPS = {
    "numbers": "where the frozen numbers come from (fields of PemnConfig)",
    "masks": "how masks are chosen",
    "which": "what is masked, and what else a task has",
}
_NAMES = {"nargs": "+", "metavar": "NAME"}
_NUMBERS: dict[str, dict[str, Any]] = {
    "bank": {"choices": get_args(BankName), "help": "default mp, or the preset's"},
    "ratio": {"type": float, "help": "rp: share of the largest layer"},
    "length": {"type": int, "help": "rp: length of the vector"},
    "permute": {"action": "store_true", "default": None, "help": "rp: permute the tiled vector"},
    "aligned": {"action": "store_true", "default": None, "help": "rp: repeat it by whole rows"},
    "bank_init": {"help": ", ".join(get_args(InitName))},
    "scale_fan": {"action": "store_true", "default": None, "help": "numbers for the density"},
    "seed": {"type": int, "help": "of bank and initial scores"},
}
_MASKS: dict[str, dict[str, Any]] = {
    "selector": {"choices": get_args(SelectorName)},
    "density": {"type": _share, "help": "topk: share of ones, or erk: by shape"},
    "overall_density": {"type": float, "help": "erk: share of ones over all masks"},
    "density_pattern": {
        "nargs": "+",
        "type": _pattern,
        "metavar": "REGEX=SHARE",
        "help": "topk: weights of another density",
    },
    "threshold": {"type": float, "help": "threshold: what scores have to exceed"},
    "scale": {"help": "sqrt_density"},
}
_WHICH: dict[str, dict[str, Any]] = {
    "target_modules": {**_NAMES, "help": "names, one regular expression, or all-linear"},
    "exclude_modules": {**_NAMES, "help": "names, or one regular expression"},
    "target_parameters": {**_NAMES, "help": "further parameters"},
    "layers_to_transform": {"nargs": "+", "type": int, "metavar": "INDEX"},
    "layers_pattern": {**_NAMES, "help": "names of the list of layers"},
    "modules_to_save": {**_NAMES, "nargs": "*", "help": "trained and saved whole; none: nothing"},
    "tied": {"choices": get_args(TiedName), "help": "a weight tied to an embedding"},
    "rest": {"choices": get_args(RestName), "help": "what is not masked"},
}


def _run(parsed: argparse.Namespace) -> int:
    from pemn_surgery.adapters import plan

    config = _config(parsed)
    model = build_model(parsed.model, parsed.model_arg, Wanted(parsed.task_type), weights=False)
    result = plan(model, config)
    if parsed.json:
        print_json(result.as_dict())
    else:
        sys.stdout.write(str(result))
    return 0


def _config(parsed: argparse.Namespace) -> "PemnConfig":
    from pemn_surgery.adapters import PemnConfig

    fields = (*_NUMBERS, *_MASKS, *_WHICH, "task_type")
    given = {name: getattr(parsed, name) for name in fields if getattr(parsed, name) is not None}
    if "density_pattern" in given:
        given["density_pattern"] = dict(given["density_pattern"])
    for name in ("target_modules", "exclude_modules"):
        if name in given:
            given[name] = _names_or_pattern(given[name])
    try:
        return PemnConfig.preset(parsed.preset, **given) if parsed.preset else PemnConfig(**given)
    except PemnError:
        raise
    except ValueError as error:  # PEFT's own checks, of the task type
        raise ConfigError(first_line(error)) from error


def _names_or_pattern(words: list[str]) -> list[str] | str:
    """Return several names as PEFT's list, and a lone pattern as PEFT's pattern."""
    alone = len(words) == 1 and (words[0] == "all-linear" or _PATTERN.search(words[0]))
    return words[0] if alone else words
