"""Which options of `PemnConfig` another one makes meaningless.

`IDLE` has a row for each way in which a field is never read. A new option gets its rows there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pemn_surgery.adapters.options import is_number, shown
from pemn_surgery.errors import ConfigError
from pemn_surgery.masks.selector import TAKES_DENSITY


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
    return config.bank_init != "model" and (config.bank_init is not None or config.bank != "own")


def _draws_scores(config: Any) -> bool:
    is_constant = is_number(config.score_init)
    by_default = config.score_init is None and config.selector == "threshold"
    return config.form == "product" and not is_constant and not by_default


def _permutes(config: Any) -> bool:
    return config.permute and config.bank == "rp" and config.ratio != 1


_OTHER_BANK = 'it belongs to bank="rp", not bank="{bank}"'
_SIGNS = 'it belongs to form="product"; signs come from a fine-tuned model'

IDLE: tuple[Idle, ...] = (
    *(
        Idle(name, lambda config: config.bank != "rp", _OTHER_BANK, in_files=True)
        for name in ("ratio", "length", "permute")
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
        "scale_fan",
        lambda config: not _draws_numbers(config),
        'it belongs to drawn numbers, and bank_init="model" takes the model\'s own',
        in_files=True,
    ),
    Idle(
        "seed",
        lambda config: not (_draws_numbers(config) or _draws_scores(config) or _permutes(config)),
        "frozen numbers are the model's own and no initial score is drawn; batches and new heads "
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
            'it belongs to selector="topk", not selector="{selector}"',
        )
        for name in ("overall_density", "density_pattern")
    ),
    *(
        Idle(name, lambda config: config.form != "product", _SIGNS)
        for name in ("overall_density", "density_pattern", "new_rows")
    ),
    Idle(
        "density",
        lambda config: config.selector not in TAKES_DENSITY and not config.scale_fan,
        'it belongs to selector="topk" (or to scale_fan=True), not selector="{selector}"',
    ),
    Idle("density", lambda config: config.form != "product", _SIGNS),
    Idle(
        "threshold",
        lambda config: config.selector != "threshold",
        'it belongs to selector="threshold", not selector="{selector}"',
    ),
    Idle("threshold", lambda config: config.form != "product", _SIGNS),
    Idle(
        "score_init",
        lambda config: config.selector == "topk" and is_number(config.score_init),
        'a number belongs to selector="threshold"; "topk" needs "kaiming_uniform", as equal scores '
        "have no order",
        in_files=True,
    ),
    Idle("score_init", lambda config: config.form != "product", _SIGNS),
    Idle(
        "scale",
        lambda config: config.form != "product",
        'it belongs to form="product", not form="{form}", which has its own scales',
        in_files=True,
    ),
)


def idle_options(config: Any, given: Iterable[str], *, is_new: bool) -> dict[str, str]:
    """Return the options that nothing would read, and why.

    Args:
        config: Anything with the fields of a configuration; those left open are None.
        given: The fields that are not as they are by default.
        is_new: Whether a user gives them; an adapter that is read may have been saved with them.
    """
    names = set(given)
    return {
        row.option: row.because.format_map(vars(config))
        for row in IDLE
        if row.option in names and (is_new or row.in_files) and row.when(config)
    }


def refuse_idle(config: Any, idle: Mapping[str, str]) -> None:
    """Refuse options that nothing would read.

    Args:
        config: Where they are given.
        idle: What `idle_options` returned.

    Raises:
        ConfigError: If there is one.
    """
    for name, because in idle.items():
        message = (
            f"PemnConfig got {name}={shown(getattr(config, name))}, which nothing would read: "
            f"{because}. Leave it out."
        )
        raise ConfigError(message)
