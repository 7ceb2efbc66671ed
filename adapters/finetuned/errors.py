"""How far a model with an adapter is from a fine-tuned one: measured on the weights in force."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.errors import FinetunedMismatchError
from pemn_surgery.planning.owned import is_idle_counter
from pemn_surgery.planning.roles import base_modules, full_name
from pemn_surgery.report import tables


@dataclass(frozen=True)
class WeightError:
    """One masked weight beside the fine-tuned one; norms are Frobenius norms.

    Attributes:
        name: The weight's name in the model's state dict.
        shape: Its shape.
        norm: Norm of the fine-tuned weight.
        difference: Norm of fine-tuned minus base: the error of changing nothing.
        error: Norm of fine-tuned minus effective weight.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    difference: float
    error: float

    @property
    def relative(self) -> float:
        """Error as a share of the fine-tuned weight's norm."""
        return _share(self.error, self.norm)

    @property
    def of_difference(self) -> float:
        """Error as a share of the difference: 0 is the fine-tuned weight, 1 is no better than W."""
        return _share(self.error, self.difference)

    def as_dict(self) -> dict[str, Any]:
        """Return the row in plain values for JSON; a share of nothing is None."""
        shares = {"relative": self.relative, "of_difference": self.of_difference}
        finite = {name: share if math.isfinite(share) else None for name, share in shares.items()}
        return {**asdict(self), "shape": list(self.shape), **finite}


@dataclass(frozen=True)
class ErrorReport:
    """Every masked weight beside the fine-tuned one.

    Attributes:
        weights: The masked weights, in the model's order.
        others: Number of unmasked tensors that were compared.
        others_differing: Names of those that differ from the fine-tuned model's by any bit that the
            model's type can hold; none after `from_finetuned`.
    """

    weights: tuple[WeightError, ...]
    others: int
    others_differing: tuple[str, ...]

    @property
    def total(self) -> WeightError:
        """All masked weights as if they were one."""
        norms = [
            math.sqrt(math.fsum(value**2 for value in values))
            for values in zip(
                *((row.norm, row.difference, row.error) for row in self.weights), strict=True
            )
        ]
        count = sum(math.prod(row.shape) for row in self.weights)
        return WeightError("total", (count,), *norms)

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values for JSON."""
        return {
            "weights": [row.as_dict() for row in self.weights],
            "total": self.total.as_dict(),
            "others": self.others,
            "others_differing": list(self.others_differing),
        }

    def table(self) -> Table:
        """Return the report as a table for people."""
        columns = ("weight", "shape", "error", "/ fine-tuned", "/ difference")
        shown = tables.table(
            "effective weights beside the fine-tuned ones (Frobenius norms)",
            columns,
            [_cells(row) for row in (*self.weights, self.total)],
        )
        differing = ", ".join(self.others_differing) or "none"
        shown.caption = f"of {self.others} other tensors these differ: {differing}"
        return shown

    def __str__(self) -> str:
        """Return the table in plain text."""
        return tables.as_text(self.table())


def measure_errors(model: nn.Module, finetuned: nn.Module | Mapping[str, Tensor]) -> ErrorReport:
    """Compare the weights that a model computes with now with those of a fine-tuned model.

    Args:
        model: A model with masks; what counts are the active adapters.
        finetuned: The fine-tuned model or its state dict, as given to `from_finetuned`.

    Returns:
        The report: prints as a table, ``as_dict()`` for JSON.

    Raises:
        FinetunedMismatchError: If the fine-tuned model lacks a masked weight, or has other shapes.
    """
    state = finetuned.state_dict() if isinstance(finetuned, nn.Module) else finetuned
    inner = getattr(getattr(model, "base_model", None), "model", model)
    masked = [module for module in model.modules() if isinstance(module, PemnLayer)]
    with torch.no_grad():
        rows = tuple(_row(layer, state) for layer in masked)
        skipped = {row.name for row in rows} | _idle_counters(inner)
        others = {name: value for name, value in state.items() if name not in skipped}
        differing = [
            n for n, value in others.items() if tensors_differ(attrgetter(n)(inner), value)
        ]
    return ErrorReport(rows, len(others), tuple(differing))


def _row(layer: PemnLayer, state: Mapping[str, Tensor]) -> WeightError:
    wanted = state.get(layer.target)
    if wanted is None or tuple(wanted.shape) != tuple(layer.shape):
        found = "none" if wanted is None else f"one of shape {tuple(wanted.shape)}"
        message = (
            f"The model's masked weight {layer.target!r} has shape {tuple(layer.shape)}, the "
            f"fine-tuned model has {found}. Give the model that the adapter was made from."
        )
        raise FinetunedMismatchError(message)
    weight = cast("Tensor", layer())
    goal = wanted.to(weight.device, torch.float64)
    return WeightError(
        layer.target,
        tuple(layer.shape),
        norm=float(goal.norm()),
        difference=float((goal - layer.fill()).norm()),
        error=float((goal - weight).norm()),
    )


def tensors_differ(held: Tensor, wanted: Tensor) -> bool:
    """Tell whether a tensor differs from another one, rounded to its type; NaN equals NaN."""
    rounded = wanted.to(held.device, held.dtype)
    return not torch.allclose(held, rounded, rtol=0.0, atol=0.0, equal_nan=True)


def _idle_counters(model: nn.Module) -> set[str]:
    return {
        full_name(path, name)
        for path, module in base_modules(model)
        for name in module._buffers
        if is_idle_counter(module, name)
    }


def _share(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf


def _cells(row: WeightError) -> list[str]:
    shape = "x".join(map(str, row.shape))
    return [row.name, shape, f"{row.error:.4g}", f"{row.relative:.2%}", f"{row.of_difference:.2%}"]
