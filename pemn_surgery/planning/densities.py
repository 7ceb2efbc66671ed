"""A density for every weight: one for all, by the weight's name, or by its shape."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pemn_surgery.errors import ConfigError
from pemn_surgery.numbers.bank import Shape

ErkName = Literal["erk"]


def erdos_renyi_kernel(shapes: Mapping[str, Shape], overall: float) -> dict[str, float]:
    """Return densities by shape that together keep a share of all weights.

    The density of a weight of shape (d1, ..., dk) is ``min(1, e (d1 + ... + dk) / (d1 ... dk))``,
    with the one number ``e`` for which the ones are ``overall`` of all weights: Erdos-Renyi-Kernel
    (Evci et al. 2020, RigL, section 3; Mocanu et al. 2018 for two dimensions). So large layers keep
    a smaller share than small ones.

    Args:
        shapes: Shape of every weight by name.
        overall: Share of ones over all of them, 0 < overall <= 1.
    """
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        ones = overall * sum(weights.values()) - sum(weights[name] for name in dense)
        scale = ones / max(sum(sum(shapes[name]) for name in free), 1)
        wanted = {name: scale * sum(shapes[name]) / weights[name] for name in free}
        full = {name for name, density in wanted.items() if density > 1}
        if not full:
            return {name: wanted.get(name, 1.0) for name in shapes}
        dense |= full  # what they cannot take goes to the others, whose densities only grow


def densities_by_name(
    shapes: Mapping[str, Shape], patterns: Mapping[str, float], *, all_fit: bool = True
) -> dict[str, float]:
    """Return the densities of the weights that patterns name, the first pattern that fits first.

    Args:
        shapes: Shape of every weight by name.
        patterns: Densities by regular expressions, which match as PEFT's ``rank_pattern`` does: the
            end of a module's path, from a dot on, or of the weight's own name.
        all_fit: Whether one that fits no weight is refused.

    Raises:
        ConfigError: With ``all_fit``, if a pattern fits no weight.
    """
    fits = {pattern: [name for name in shapes if _fits(pattern, name)] for pattern in patterns}
    idle = [pattern for pattern, names in fits.items() if not names]
    if idle and shapes and all_fit:
        _refuse(idle, list(shapes))
    chosen: dict[str, float] = {}
    for pattern, names in fits.items():
        chosen = {**dict.fromkeys(names, patterns[pattern]), **chosen}
    return chosen


def _fits(pattern: str, name: str) -> bool:
    ends = (name.rpartition(".")[0], name)
    return any(re.match(rf"(.*\.)?({pattern})$", end) for end in ends if end)


def _refuse(idle: Sequence[str], names: Sequence[str]) -> None:
    message = (
        f"PemnConfig got density_pattern with {', '.join(map(repr, idle))}, which fits none of the "
        f"{len(names)} weights to mask (first: {names[0]!r}). A pattern is a regular expression "
        "for the end of a module's path or of a weight's name; see print(plan(model, ...)). "
        "Nothing was changed."
    )
    raise ConfigError(message)
