"""What every reader of masks returns, and what all of them refuse in the same words."""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from pemn_surgery.errors import ForeignMaskError


class MaskedState(NamedTuple):
    """A masked network as its masks and what lies under them.

    Attributes:
        masks: Bool masks by the weights' names.
        base: The network's other tensors under the names of the plain model, weights without masks
            among them where the format has them: what ``model.load_state_dict`` takes.
    """

    masks: dict[str, Tensor]
    base: dict[str, Tensor]


def as_mask(values: Any, name: str) -> Tensor:
    """Return a mask as a bool tensor of its own.

    Raises:
        ForeignMaskError: If it is no tensor of zeros and ones.
    """
    if not isinstance(values, Tensor) or values.is_meta:
        held = "a tensor without values (meta)" if isinstance(values, Tensor) else f"{values!r:.80}"
        refuse(
            f"The mask of {name!r} is {held}; a tensor of zeros and ones is needed. "
            "Nothing was changed"
        )
    held = values.detach()
    others = held[(held != 0) & (held != 1)]
    if others.numel():
        refuse(
            f"The mask of {name!r} has {others.numel()} of {held.numel()} values that are neither "
            f"0 nor 1 (first: {others[0].item()}). Scores become a mask by their method's rule "
            "first: scores > threshold, or the largest ones by size. Nothing was changed"
        )
    return held != 0


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without what ``DataParallel`` puts before each name."""
    inner = below(state, "module.")
    return inner if len(inner) == len(state) else dict(state)


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, under what follows."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def refuse_empty(state: Mapping[str, Any], needed: str) -> NoReturn:
    """Refuse a state dict without names that a format has (`ForeignMaskError`)."""
    refuse(
        f"Among the {len(state)} names of the state dict none is {needed} (first: "
        f"{[*state][:3]}). Give the state dict itself, which checkpoints often have under "
        "'state_dict' or 'model'"
    )


def refuse(problem: str) -> NoReturn:
    """Refuse what cannot be read (`ForeignMaskError`)."""
    message = f"{problem}."
    raise ForeignMaskError(message)
