"""What a plan is asked for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pemn_surgery.models.forward import Trace
from pemn_surgery.numbers.bank import BankSpec, Shape
from pemn_surgery.numbers.support import Support

RestName = Literal["train", "norms", "stats", "freeze"]

TiedName = Literal["leave", "untie", "both"]


class NewRows(NamedTuple):
    """Last rows of a tensor that the base's checkpoint lacks (added tokens): first, how many."""

    first: int
    more: int


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        spec: What decides the bank's numbers.
        rest: What happens to the tensors that are not masked.
        reason_to_leave: Gives, for a module path, why its weight stays, or "" to mask it.
        is_saved_whole: Tells whether a module is trained and saved as a whole by PEFT.
        is_named: Tells whether a module was asked for by name: embeddings are masked only then.
        parameters: Suffixes of further parameters to mask, whatever their module.
        functional: Names of raw parameters that the forward uses as weights (`functional_weights`).
        rewritten: Names of weights that the forward changes in place (`rewritten_weights`).
        tied: What happens to a weight that is tied to an embedding.
        trace: What a forward does with every parameter, or None where none was followed.
        untraced: Why there is no trace.
        unseen: Whether no forward has ever shown which raw parameters are weights.
        carried: Names of further unmasked tensors that the task has its own copy of.
        new_rows: Of tensors whose last rows are the task's alone, by name, which rows.
        row_scaled: Whether a mask has scales beside it, one for each output.
        one_a_matrix: Whether it is one for each matrix instead.
        support: Which share of a weight is masked; None: all of it.
        densities: Gives, for the shapes of all masked weights by name, the densities of their
            masks; none where the selector has no density.
        quantised: Names of weights that a library stores quantised, with the reason why each cannot
            be masked, or "".
    """

    spec: BankSpec
    rest: RestName
    reason_to_leave: Callable[[str], str] = field(default=lambda path: "")
    is_saved_whole: Callable[[str], bool] = field(default=lambda path: False)
    is_named: Callable[[str], bool] = field(default=lambda path: False)
    parameters: Sequence[str] = ()
    functional: Collection[str] = ()
    rewritten: Collection[str] = ()
    tied: TiedName = "leave"
    trace: Trace | None = None
    untraced: str = ""
    unseen: bool = False
    carried: Collection[str] = ()
    new_rows: Mapping[str, NewRows] = field(default_factory=dict)
    row_scaled: bool = False
    one_a_matrix: bool = False
    support: Support | None = None
    densities: Callable[[Mapping[str, Shape]], Mapping[str, float]] = field(
        default=lambda shapes: {}
    )
    quantised: Mapping[str, str] = field(default_factory=dict)
