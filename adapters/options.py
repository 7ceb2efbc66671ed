"""What every option of `PemnConfig` may be.

`OPTIONS` has a row for each field, with the words for its error. A new option gets its row there,
and in `IDLE` for each way in which another one makes it meaningless, not code elsewhere.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from os import PathLike
from typing import Any, NoReturn, get_args

from peft.utils import TaskType

from pemn_surgery.coding.header import CodingName
from pemn_surgery.errors import ConfigError
from pemn_surgery.masks.selector import HAS_THRESHOLD, TAKES_DENSITY, SelectorName
from pemn_surgery.numbers.bank import XAVIER, BankName, FanMode, InitName
from pemn_surgery.numbers.support import OthersName, SupportName
from pemn_surgery.planning.request import RestName, TiedName

_LARGEST = 3.4e38  # of float32
_MOST_DIGITS = 1000  # Python itself turns no more than 4,300 into text
_SHOWN = 200  # characters of a value in an error
SCORE_INITS = ("kaiming_uniform", "normal", "magnitude", "magnitude_shuffled")
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Option:
    """What a field may be.

    Attributes:
        needed: What it needs to be, for the error.
        holds: Tells whether a value is that.
        is_users: Whether users give it; what the library fills in for itself is in no list.
    """

    needed: str
    holds: Callable[[Any], bool]
    is_users: bool = True


def _choice(*choices: Any) -> Option:
    listed = ", ".join(repr(choice) for choice in choices)
    return Option(f"one of {listed}", lambda value: value in choices)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and abs(value) < 10**_MOST_DIGITS


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that float32 can hold; none is infinite there."""
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and abs(value) <= _LARGEST  # not true of NaN


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple, set)) and all(map(holds, value))


def _is_rows(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(name) and _is_whole(count) and count > 0 for name, count in value.items()
    )


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(name) and _is_text(digest) and _FINGERPRINT.fullmatch(digest)
        for name, digest in value.items()
    )


def _is_lineage(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"by", "of"} or not _is_text(value["by"]):
        return False
    made_from = value["of"]
    return isinstance(made_from, list) and all(
        _is_text(one) and _FINGERPRINT.fullmatch(one) for one in made_from
    )


def _or_none(option: Option, *, is_users: bool = True) -> Option:
    needed = f"{option.needed}, or None"
    return Option(needed, lambda value: value is None or option.holds(value), is_users)


_SHARE = Option("a number with 0 < value <= 1 (a share, not a percentage)", _is_share)
_NUMBER = Option("a finite number", is_number)
_WHOLE = Option(f"a whole number of at most {_MOST_DIGITS} digits", _is_whole)
_FLAG = Option("True or False", lambda value: isinstance(value, bool))
_TEXT = Option("a string", _is_text)
_NAMES = Option("a list of strings", _is_list_of(_is_text))
_NAMES_OR_PATTERN = Option(
    "a list of names, or a string", lambda value: _is_text(value) or _NAMES.holds(value)
)
_INDICES = Option(
    "a whole number, or a list of them",
    lambda value: _is_whole(value) or _is_list_of(_is_whole)(value),
)
_PATH = Option("a string", lambda value: isinstance(value, (str, PathLike)))
_DICT = Option("a dict", lambda value: isinstance(value, dict))


_internal = partial(_or_none, is_users=False)  # a field that PEFT or this library fills in


OPTIONS: dict[str, Option] = {
    "bank": _choice(*get_args(BankName)),
    "ratio": _or_none(_SHARE),
    "length": _or_none(
        Option("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
    ),
    "permute": _FLAG,
    "aligned": _FLAG,
    "bank_init": _choice(None, *get_args(InitName)),
    "scale_fan": _FLAG,
    "fan_mode": _choice(*get_args(FanMode)),
    "seed": _WHOLE,
    "selector": _choice(None, *get_args(SelectorName)),
    "density": _or_none(
        Option(
            f"{_SHARE.needed}, or 'erk'",
            lambda value: value == "erk" if _is_text(value) else _is_share(value),
        )
    ),
    "overall_density": _or_none(_SHARE),
    "density_pattern": _or_none(
        Option(
            "a dict of regular expressions to numbers with 0 < number <= 1",
            lambda value: (
                isinstance(value, dict)
                and all(_is_text(key) and _is_share(share) for key, share in value.items())
            ),
        )
    ),
    "threshold": _NUMBER,
    "score_init": _or_none(
        Option(
            f"one of {', '.join(map(repr, SCORE_INITS))}, a finite number",
            lambda value: value in SCORE_INITS if _is_text(value) else is_number(value),
        )
    ),
    "score_mean": _or_none(_NUMBER),
    "score_std": _or_none(
        Option("a finite number of at least 0", lambda value: is_number(value) and value >= 0)
    ),
    "scale": _choice(None, "sqrt_density", "row", "matrix"),
    "form": _choice("product", "flip", "binary", "sign_delta"),
    "support": _or_none(
        Option(
            "a number with 0 < value < 1 (a share, not a percentage)",
            lambda value: is_number(value) and 0 < value < 1,
        )
    ),
    "support_by": _choice(*get_args(SupportName)),
    "support_others": _choice(*get_args(OthersName)),
    "rest": _choice(None, *get_args(RestName)),
    "target_modules": _or_none(_NAMES_OR_PATTERN),
    "exclude_modules": _or_none(_NAMES_OR_PATTERN),
    "layers_to_transform": _or_none(_INDICES),
    "layers_pattern": _or_none(_NAMES_OR_PATTERN),
    "target_parameters": _or_none(_NAMES),
    "functional_weights": _or_none(_NAMES),
    "rewritten_weights": _or_none(_NAMES),
    "carried": _internal(_NAMES),
    "new_rows": _or_none(
        Option(
            "a whole number, or a dict of tensors' names to whole numbers above 0",
            lambda value: _is_rows(value) or (_is_whole(value) and value >= 0),
        )
    ),
    "base_rows": _internal(Option("whole numbers above 0 by tensors' names", _is_rows)),
    "tied": _choice(*get_args(TiedName)),
    "modules_to_save": _or_none(_NAMES),
    "trainable_token_indices": Option(
        "None: use modules_to_save for embeddings", lambda value: value is None, is_users=False
    ),
    "coding": _choice(*get_args(CodingName)),
    "task_type": _choice(None, *(task.value for task in TaskType)),
    "inference_mode": _FLAG,
    "revision": _or_none(_TEXT),
    "base_model_name_or_path": _internal(_PATH),
    "peft_type": _internal(Option("'PEMN'", lambda value: value == "PEMN")),
    "auto_mapping": _internal(_DICT),
    "peft_version": _internal(_TEXT),
    "lineage": _internal(
        Option('"by" with a string and "of" with a list of 16 hexadecimal digits each', _is_lineage)
    ),
    "fingerprint": _internal(Option("16 hexadecimal digits by dtype", _is_fingerprint)),
    "digest": _internal(_TEXT),
}

# What is read each time an adapter is saved or loaded; all else only when an adapter is made.
_READ_LATER = {"coding", "modules_to_save", "task_type", "inference_mode", "revision"}


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse values that options cannot have, each by itself (`ConfigError`)."""
    for name, value in values.items():
        if name in OPTIONS and not OPTIONS[name].holds(value):
            refuse(name, value, OPTIONS[name].needed)


def refuse_in_force(config: Any, name: str, value: Any) -> None:
    """Refuse another value of a setting that an adapter was made by (`ConfigError`)."""
    settled = name in OPTIONS and OPTIONS[name].is_users and name not in _READ_LATER
    if settled and value != getattr(config, name):
        message = (
            f"The adapter was made with {name}={shown(getattr(config, name))}; {name}="
            f"{shown(value)} would change none of its masks, but stand in its file. Add a further "
            f"adapter with a new PemnConfig({name}=...) instead. Nothing was changed."
        )
        raise ConfigError(message)


def check_names(options: Mapping[str, Any]) -> None:
    """Refuse options that there are not, or that the library fills in (`ConfigError`)."""
    users = [name for name, option in OPTIONS.items() if option.is_users]
    internal = [name for name in OPTIONS if name not in users and options.get(name) is None]
    unknown = [name for name in options if name not in users and name not in internal]
    if unknown:
        near = get_close_matches(unknown[0], users, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        message = (
            f"Unknown option {', '.join(map(str, unknown))}.{hint} "
            f"PemnConfig has: {', '.join(sorted(users))}."
        )
        raise ConfigError(message)


def refuse_decided(
    verb: str, options: Mapping[str, Any], decided: Iterable[str], follows_from: str
) -> None:
    """Refuse options of a verb that settles these itself (`ConfigError`)."""
    given = [f"{name}={shown(options[name])}" for name in decided if name in options]
    if given:
        message = f"{verb} got {', '.join(given)}; that follows from {follows_from}. Leave it out."
        raise ConfigError(message)


def check_pattern(name: str, value: Any) -> None:
    """Refuse a string that is no regular expression (`ConfigError`)."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            refuse(name, value, f"a regular expression ({error})")


def refuse(name: str, value: Any, needed: str) -> NoReturn:
    """Refuse an option's value (`ConfigError`)."""
    message = f"PemnConfig got {name}={shown(value)}; it needs {needed}."
    raise ConfigError(message)


def shown(value: Any) -> str:
    """Return a value as it stands in an error: a long one is cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nested too deeply
        return f"<{type(value).__name__} too long to show>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


@dataclass(frozen=True)
class Idle:
    """A way in which a field is never read.

    Attributes:
        option: The field.
        when: Tells from a configuration, its open fields still None, whether nothing reads it.
        because: Where it belongs, and what stands against that; braces name fields.
        in_files: Whether an adapter that is read is refused too, or else taken as it is.
    """

    option: str
    when: Callable[[Any], bool]
    because: str
    in_files: bool = False


def _draws_numbers(config: Any) -> bool:
    is_open = config.bank_init is None and config.bank != "own"
    return is_open or config.bank_init not in (None, "model", "stored")


def _draws_by_seed(config: Any) -> bool:
    return _draws_numbers(config) and config.bank_init != "unsigned_constant"


def _draws_scores(config: Any) -> bool:
    if config.score_init is None:
        is_drawn = config.selector == "sample" and _draws_numbers(config)
        is_drawn = is_drawn or config.selector in TAKES_DENSITY
        return is_drawn or config.form == "sign_delta"
    is_exact = config.score_init == "magnitude" and not config.score_std
    return not is_number(config.score_init) and not is_exact


def _draws_support(config: Any) -> bool:
    return config.support is not None and config.support_by in ("seed", "rows")


def _permutes(config: Any) -> bool:
    return config.permute and config.bank == "rp" and config.ratio != 1


_OTHER_BANK = 'it belongs to bank="rp", not bank="{bank}"'
_SIGNS = "it belongs to masks that are trained; these signs come from a fine-tuned model"


def _has_fixed_signs(config: Any) -> bool:
    return config.form == "sign_delta" and is_number(config.score_init)


def _is_normal(config: Any) -> bool:
    by_default = config.form == "sign_delta" and config.selector in HAS_THRESHOLD
    return config.score_init == "normal" or (config.score_init is None and by_default)


IDLE: tuple[Idle, ...] = (
    *(
        Idle(name, lambda config: config.bank != "rp", _OTHER_BANK, in_files=True)
        for name in ("ratio", "length", "permute", "aligned")
    ),
    Idle(
        "ratio",
        lambda config: config.length is not None,
        "length={length!r} beside it decides: give one",
        in_files=True,
    ),
    Idle(
        "permute",
        lambda config: config.ratio == 1,
        "a vector of ratio=1 is as long as the largest layer, and only a tiled one is permuted",
    ),
    Idle(
        "aligned",
        lambda config: config.ratio == 1,
        "a vector of ratio=1 is as long as the largest layer, and only a repeated one is aligned",
    ),
    Idle(
        "aligned",
        lambda config: config.permute,
        "permuted numbers do not repeat: give one of them",
        in_files=True,
    ),
    Idle(
        "permute",
        lambda config: config.bank_init == "unsigned_constant",
        "numbers that are all one have no order",
    ),
    Idle(
        "permute",
        lambda config: config.bank_init == "stored",
        "a stored bank is taken as it is given: permute the values",
        in_files=True,
    ),
    *(
        Idle(
            name,
            lambda config: not _draws_numbers(config),
            "it belongs to drawn numbers, not to the model's own or to stored ones",
            in_files=True,
        )
        for name in ("scale_fan", "fan_mode")
    ),
    *(
        Idle(
            name,
            lambda config: config.bank_init in XAVIER,
            "the variance of bank_init={bank_init!r} is by inputs and outputs together",
            in_files=True,
        )
        for name in ("scale_fan", "fan_mode")
    ),
    Idle(
        "seed",
        lambda config: (
            not any(
                draws(config)
                for draws in (_draws_by_seed, _draws_scores, _draws_support, _permutes)
            )
        ),
        "no frozen number and no initial score is drawn from it; batches and new heads "
        "follow torch.manual_seed",
    ),
    Idle(
        "overall_density",
        lambda config: config.density != "erk",
        'it belongs to density="erk"; density={density!r} decides',
    ),
    *(
        Idle(
            name,
            lambda config: config.selector not in TAKES_DENSITY,
            'it belongs to selectors of the largest ("topk"), not selector="{selector}"',
        )
        for name in ("overall_density", "density_pattern")
    ),
    *(
        Idle(name, _has_fixed_signs, _SIGNS)
        for name in ("overall_density", "density_pattern", "new_rows", "support")
    ),
    Idle(
        "support",
        lambda config: config.form == "binary",
        'numbers that it leaves out would keep their sizes, beside form="binary", which has one',
        in_files=True,
    ),
    Idle(
        "support_by",
        lambda config: config.support is None,
        "it says which weights support= is a share of; give a share",
        in_files=True,
    ),
    Idle(
        "support_others",
        lambda config: config.support is None,
        "it says what the weights are that support= leaves out; give a share",
        in_files=True,
    ),
    Idle(
        "support_others",
        lambda config: config.form != "product" or config.selector not in TAKES_DENSITY,
        'it drops weights by a density: it belongs to form="product" and selector="topk"',
        in_files=True,
    ),
    Idle(
        "density",
        lambda config: config.selector not in TAKES_DENSITY and not config.scale_fan,
        'it belongs to selector="topk" (or to scale_fan=True), not selector="{selector}"',
    ),
    Idle("density", _has_fixed_signs, _SIGNS),
    Idle(
        "density_pattern",
        lambda config: config.selector == "topk_overall",
        "each weight's share follows from all scores together",
        in_files=True,
    ),
    Idle(
        "density",
        lambda config: config.selector == "topk_overall" and config.density == "erk",
        "each weight's share follows from all scores together: give one number",
        in_files=True,
    ),
    Idle(
        "threshold",
        lambda config: config.selector not in HAS_THRESHOLD,
        'it belongs to selector="threshold" or "sample", not selector="{selector}"',
    ),
    Idle("threshold", _has_fixed_signs, _SIGNS),
    Idle(
        "score_init",
        lambda config: config.selector in TAKES_DENSITY and is_number(config.score_init),
        'a number belongs to selector="threshold"; "topk" needs drawn scores, as equal ones '
        "have no order",
        in_files=True,
    ),
    Idle(
        "score_mean",
        lambda config: not _is_normal(config),
        'it belongs to score_init="normal", not score_init={score_init!r}',
        in_files=True,
    ),
    Idle(
        "score_std",
        lambda config: is_number(config.score_init) or config.score_init == "kaiming_uniform",
        'it belongs to score_init="normal" and "magnitude", not score_init={score_init!r}',
        in_files=True,
    ),
    Idle(
        "score_std",
        lambda config: config.score_init is None and not _is_normal(config),
        'it belongs to score_init="normal" and "magnitude": say which',
        in_files=True,
    ),
    Idle(
        "scale",
        lambda config: config.form == "sign_delta" and config.scale != "matrix",
        'it belongs to other forms than "sign_delta", which has its own scales',
        in_files=True,
    ),
    Idle(
        "scale",
        lambda config: config.scale == "sqrt_density" and config.form == "flip",
        'flips have no density to make up for; it belongs to form="product"',
        in_files=True,
    ),
    Idle(
        "scale",
        lambda config: config.scale == "sqrt_density" and config.form == "binary",
        'form="binary" has a size of its own; scale="row" is trained',
        in_files=True,
    ),
    Idle(
        "scale",
        lambda config: config.scale == "sqrt_density" and config.support is not None,
        "it makes up for the density of whole masks, and support={support} masks a share of each "
        'weight; scale="row" is trained',
        in_files=True,
    ),
    Idle(
        "scale",
        lambda config: config.form != "sign_delta" and config.scale == "matrix",
        'it belongs to form="sign_delta", not form="{form}"',
        in_files=True,
    ),
)


def idle_options(config: Any, given: Iterable[str], *, is_new: bool) -> dict[str, str]:
    """Return the options that nothing would read, and why.

    The configuration is anything with its fields, those left open None; given are the fields that
    are not as by default. An adapter that is read, so not new, may have been saved with them.
    """
    names = set(given)
    return {
        row.option: row.because.format_map(vars(config))
        for row in IDLE
        if row.option in names and (is_new or row.in_files) and row.when(config)
    }


def refuse_idle(config: Any, idle: Mapping[str, str]) -> None:
    """Refuse options of which `idle_options` says that nothing would read them (`ConfigError`)."""
    for name, because in idle.items():
        message = (
            f"PemnConfig got {name}={shown(getattr(config, name))}, which nothing would read: "
            f"{because}. Leave it out."
        )
        raise ConfigError(message)
