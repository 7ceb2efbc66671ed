"""What a tensor of a forward is made of, and what an operator makes of its arguments.

A parameter is a weight if a forward multiplies its input with it, whatever it meets before that: a
pruning mask, a gain, a softmax, a low-rank product that is added. So every tensor of a followed
forward has an `Origin`, and every operator call is a `Step` from the origins of its arguments to
that of its result. Names decide nothing: a table of positions is added, one of tokens looked up,
learned queries go into layers where an input would.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from pemn_surgery.models.operators import look_up, stands_at

Names = tuple[str, ...]

# What an operator does with a parameter: multiplies an input with it, looks rows of it up, takes it
# where nobody can see what becomes of it, or anything else.
Role = Literal["product", "rows", "unknown", "other"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor is made of. Without any of these it is a constant: a buffer, positions.

    Attributes:
        weights: Parameters that it carries: reshaped, cast, scaled, pruned, added up, multiplied
            with each other or with constants.
        inputs: Parameters that went through a layer as an input would, and no input of the model
            did: what came out is an activation.
        products: Parameters whose product with an activation it is, but for arithmetic since.
        is_fed: Whether it depends on the model's input.
    """

    weights: Names = ()
    inputs: Names = ()
    products: Names = ()
    is_fed: bool = False

    @property
    def made_of(self) -> Names:
        """All parameters in it, if it is made of parameters alone."""
        return (*self.weights, *self.inputs)

    @property
    def is_activation(self) -> bool:
        """Whether a product with it is one with an input."""
        return self.is_fed or bool(self.inputs and not self.weights)


CONSTANT = Origin()
FED = Origin(is_fed=True)


class Step(NamedTuple):
    """What is done with parameters that do not just pass through; what the result is made of."""

    roles: Sequence[tuple[str, Role]]
    origin: Origin


def step(
    operator: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
    origins: Sequence[Origin],
) -> Step:
    """Return what an operator of torch does with its arguments."""
    kind, weights, right, *_ = look_up(operator)
    if kind in ("filled", "unfilled"):
        return Step((), CONSTANT)
    if kind == "layer":
        return _layer([stands_at(args, kwargs, x, weights) for x in tensors], origins)
    if kind == "lookup":
        return Step([(name, "rows") for name in _all(o.made_of for o in origins)], FED)
    if kind == "product":
        factors = (*weights, *right)
        return _product(
            [not factors or stands_at(args, kwargs, x, factors) for x in tensors], origins
        )
    if kind in ("part", "form") and origins:
        return _first(origins)
    sizes = [x.numel() for x in tensors]
    return _arithmetic(sizes, origins, joins=kind == "join")


def unknown_step(origins: Sequence[Origin]) -> Step:
    """Return what is known of an operator that is none of torch's: what goes in."""
    return Step([(name, "unknown") for name in _all(o.weights for o in origins)], FED)


def _layer(is_weight: Sequence[bool], origins: Sequence[Origin]) -> Step:
    pairs = list(zip(is_weight, origins, strict=True))
    weights = _all(origin.made_of for at_weight, origin in pairs if at_weight)
    others = [origin for at_weight, origin in pairs if not at_weight]
    made_of = _all(origin.made_of for origin in others)
    is_fed = any(origin.is_fed for origin in others) or not made_of
    origin = Origin(inputs=() if is_fed else made_of, products=weights, is_fed=is_fed)
    passing = [name for name in _all(o.weights for o in others) if name not in weights]
    roles: list[tuple[str, Role]] = [(name, "product") for name in weights]
    return Step([*roles, *((name, "other") for name in passing)], origin)


def _product(is_factor: Sequence[bool], origins: Sequence[Origin]) -> Step:
    factors = [o for factor, o in zip(is_factor, origins, strict=True) if factor]
    is_fed = any(origin.is_fed for origin in origins)
    if not any(origin.is_activation for origin in factors):  # parameters, constants
        if not is_fed:
            weights = _all(origin.weights for origin in origins)
            return Step((), Origin(weights=weights, inputs=_all(o.inputs for o in origins)))
        return Step([(name, "other") for name in _all(o.weights for o in origins)], FED)
    multiplied = _all(origin.weights for origin in factors)
    added = [name for name in _all(o.weights for o in origins) if name not in multiplied]
    roles: list[tuple[str, Role]] = [(name, "product") for name in multiplied]
    roles.extend((name, "other") for name in added)
    inputs = () if is_fed else _all(origin.made_of for origin in origins)
    return Step(roles, Origin(inputs=inputs, products=multiplied, is_fed=is_fed))


def _first(origins: Sequence[Origin]) -> Step:
    """Return the step of an operator that takes parts of its first tensor, or casts it."""
    first, *others = origins
    is_constant = first == CONSTANT
    return Step((), FED if is_constant and any(o.is_fed for o in others) else first)


def _arithmetic(sizes: Sequence[int], origins: Sequence[Origin], *, joins: bool) -> Step:
    """Return the step of an operator that works element by element, or moves or joins elements.

    A gain that scales a weight is not what the result is: the largest of the parameters is.
    """
    products = _all(origin.products for origin in origins)
    if any(origin.is_fed for origin in origins):
        names = _all(origin.weights for origin in origins)
        return Step([(name, "other") for name in names], Origin(products=products, is_fed=True))
    made = [(size, o) for size, o in zip(sizes, origins, strict=True) if o.weights or o.inputs]
    if not made:
        return Step((), CONSTANT)
    largest = max(size for size, _ in made)
    kept = [origin for size, origin in made if joins or size == largest]
    weights = _all(origin.weights for origin in kept)
    left_out = [name for name in _all(o.weights for _, o in made) if name not in weights]
    origin = Origin(weights, _all(o.inputs for o in kept), products)
    return Step([(name, "other") for name in left_out], origin)


def _all(groups: Iterable[Names]) -> Names:
    """Return the names of all groups, each once, in order."""
    found = [group for group in groups if group]
    return (
        found[0] if len(found) == 1 else tuple(dict.fromkeys(n for group in found for n in group))
    )
