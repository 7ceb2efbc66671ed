"""A plan as a value: what will be masked, what is left alone and why, what each task owns.

It prints as a table, compares by value and turns into JSON; `planner` makes it. Of one tensor it
says:

* `Target`: a tensor that will be masked, under all of its names that share the mask.
* `Left`: one name of a tensor that masks could lie on by its shape (a `Candidate`), and that stays.
* `Owned`: an unmasked tensor of any shape, buffers too, that a task trains or saves. A tensor may
  be left, which is about masks, and owned.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from pemn_surgery.coding import bits
from pemn_surgery.numbers.bank import BankSpec, Layout, Shape
from pemn_surgery.planning.blocks import Block
from pemn_surgery.planning.roles import full_name
from pemn_surgery.report import tables

# Below this share of masked weights a plan says so loudly.
_LOW_COVERAGE = 0.9

_COLUMNS = ("tensor", "class", "shape", "count", "weights", "density", "action", "reason")
_TOTALS = (
    *("parameters", "masked_weights", "maskable_weights", "unreached_weights", "coverage"),
    *("bank_floats", "mask_bytes", "other_bytes", "file_bytes"),
)


@dataclass(frozen=True)
class Target:
    """One weight that will be masked.

    Attributes:
        path: Path of its module within the model.
        parameter: Name of the parameter on the module.
        kind: Class of the module, or the operator that a graph hands the weight to.
        shape: Shape of the weight.
        fan_in: Inputs that one output sums over.
        fan_out: Outputs that one input goes to.
        tied: Other modules (as "path.parameter") that hold the same tensor and share the mask.
        untied_from: Name of the tensor that it was tied to and gets a copy of, or "".
        use: What a forward does with it ("linear", "linear at beit.py:225"), "" if not traced.
        row_scales: Number of float32 scales beside the mask: with ``form="sign_delta"`` one an
            output, or one a matrix, with ``scale="row"`` one an output, else 0.
        supported: Number of its weights that are masked; None: all are.
        reached: Whether the followed forward uses it; True if none was followed.
        density: Share of ones that its mask is chosen with; None where the selector has none.
    """

    path: str
    parameter: str
    kind: str
    shape: Shape
    fan_in: int
    fan_out: int
    tied: tuple[str, ...] = ()
    untied_from: str = ""
    use: str = field(default="", compare=False)
    row_scales: int = 0
    supported: int | None = None
    reached: bool = field(default=True, compare=False)
    density: float | None = None

    @property
    def name(self) -> str:
        """The weight's name in the model's state dict."""
        return full_name(self.path, self.parameter)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Number of weights that have a bit in the mask."""
        return self.weights if self.supported is None else self.supported

    @property
    def reason(self) -> str:
        """What a plan says beside it: its use, and with which other tensors it is tied."""
        shared = f"one mask with {', '.join(self.tied)}" if self.tied else ""
        untied = f"untied from {self.untied_from}" if self.untied_from else ""
        return "; ".join(part for part in (self.use, shared, untied) if part)


@dataclass(frozen=True)
class Left:
    """One tensor of two or more dimensions that stays as it is, and why.

    Attributes:
        name: Its name in the model's state dict.
        kind: Class of its module.
        shape: Its shape.
        maskable: Whether it is a weight that could be masked.
        why: Why it stays.
        use: What a forward does with it, "" if not traced.
        reached: Whether the followed forward uses it; True if none was followed.
        is_open: Whether it may be a weight, since no forward was followed that shows its use.
    """

    name: str
    kind: str
    shape: Shape
    maskable: bool
    why: str
    use: str = field(default="", compare=False)
    reached: bool = field(default=True, compare=False)
    is_open: bool = field(default=False, compare=False)

    @property
    def counts(self) -> bool:
        """Whether it is among the weights that could be masked, for all that was seen."""
        return self.maskable or self.is_open

    @property
    def reason(self) -> str:
        """Why it stays, and what a forward does with it."""
        use = "its use was not seen" if self.is_open else self.use
        return f"{self.why}: {use}" if use else self.why

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Owned:
    """One unmasked tensor that every task has its own copy of.

    Attributes:
        path: Path of its module.
        tensor: Its name on the module.
        shape: Its shape.
        is_float: Whether it holds floating-point or complex numbers.
        nbytes: Size of one copy in bytes.
        trained: Whether it is trained; otherwise it moves (statistics) or is only saved.
        saved: Whether it is in the task's file: not a batch counter that nothing reads.
        tied_to: Name of the owned tensor that it is the same tensor as, or "".
        first_row: Of a table with new rows (added tokens), how many rows before the task's are the
            base's; 0 where the task has all. ``shape`` is that of the task's rows. Else None.
    """

    path: str
    tensor: str
    shape: Shape
    is_float: bool
    nbytes: int
    trained: bool
    saved: bool = True
    tied_to: str = ""
    first_row: int | None = None

    @property
    def name(self) -> str:
        """The tensor's name in the model's state dict."""
        return full_name(self.path, self.tensor)


@dataclass(frozen=True)
class Plan:
    """What `pemnify` would do.

    Attributes:
        spec: What decides the bank's numbers.
        layout: The bank's prototypes; None where every weight keeps its own numbers.
        targets: Weights that will be masked, in the model's order.
        left: Tensors of two or more dimensions that stay, with reasons.
        owned: Unmasked tensors that each task has its own copy of.
        frozen_norms: Modules that stay in eval mode while the task trains.
        whole: Tensors of the modules that PEFT trains and saves as a whole.
        parameters: Number of elements of all parameters of the model.
        blocks: The model's repeated blocks.
        untraced: Why no forward was followed to see the use of every weight, "" if one was.
        frame_bytes: Bytes of a task's two files beside those of its tensors: the tensors' names
            and offsets, and the configuration, which is in both.
        lost: What it takes from a model that has learned something already, "" if nothing.
    """

    spec: BankSpec
    layout: Layout | None
    targets: tuple[Target, ...]
    left: tuple[Left, ...]
    owned: tuple[Owned, ...]
    frozen_norms: tuple[str, ...]
    whole: tuple[Owned, ...]
    parameters: int
    blocks: tuple[Block, ...] = field(default=(), compare=False)
    untraced: str = field(default="", compare=False)
    frame_bytes: int = field(default=0, compare=False)
    lost: str = field(default="", compare=False)

    @property
    def masked_weights(self) -> int:
        """Number of weights under masks."""
        return sum(target.weights for target in self.targets)

    @property
    def maskable_weights(self) -> int:
        """Number of weights of all layers that could be masked."""
        return self.masked_weights + sum(item.weights for item in self.left if item.counts)

    @property
    def unreached_weights(self) -> int:
        """Number of maskable weights, masked or not, that the followed forward does not use."""
        maskable = [*self.targets, *(item for item in self.left if item.counts)]
        return sum(item.weights for item in maskable if not item.reached)

    @property
    def coverage(self) -> float:
        """Masked share of the maskable weights that the followed forward uses."""
        masked = sum(target.weights for target in self.targets if target.reached)
        maskable = self.maskable_weights - self.unreached_weights
        return masked / maskable if maskable else 0.0

    @property
    def mask_bytes(self) -> int:
        """Bytes of one task's stored masks, and of the scales beside them."""
        return sum(bits.packed_bytes(item.bits) + 4 * item.row_scales for item in self.targets)

    @property
    def other_bytes(self) -> int:
        """Bytes of one task's other tensors."""
        return sum(
            item.nbytes for item in (*self.owned, *self.whole) if item.saved and not item.tied_to
        )

    @property
    def file_bytes(self) -> int:
        """Size of one task's two files, with masks as bits; a coding makes them smaller."""
        return self.mask_bytes + self.other_bytes + self.frame_bytes

    @property
    def bank_floats(self) -> int:
        """Numbers that the bank stores (0 where every weight keeps its own)."""
        return self.layout.floats if self.layout else 0

    def ratio(self, bytes_per_float: int = 4) -> float:
        """Return the size of the dense model over the size of one task's files.

        Args:
            bytes_per_float: 4 for a float32 model, 2 for a 16-bit one.
        """
        dense = self.parameters * bytes_per_float
        return dense / max(self.file_bytes, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in plain values for JSON, totals included."""
        totals = {name: getattr(self, name) for name in _TOTALS}
        totals |= {"ratio_fp32": self.ratio(4), "ratio_fp16": self.ratio(2)}
        reasons = {
            name: [{**asdict(item), "reason": item.reason} for item in items]
            for name, items in (("targets", self.targets), ("left", self.left))
        }
        return {**asdict(self), **reasons, "totals": totals}

    def groups(self) -> list[dict[str, Any]]:
        """Return one row for each group of like tensors: repeated blocks become one row."""
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        masked = ((item, "mask") for item in self.targets)
        for item, action in [*masked, *((item, "leave") for item in self.left)]:
            reason = group_pattern(item.reason)
            density = getattr(item, "density", None)
            key = (group_pattern(item.name), item.kind, item.shape, density, action, reason)
            row = rows.setdefault(key, _row(key))
            row["count"] += 1
            row["weights"] += item.weights
        return list(rows.values())

    def table(self) -> Table:
        """Return the plan as a table for people; densities where they are not one and the same."""
        hidden = () if len({target.density for target in self.targets}) > 1 else ("density",)
        table = tables.table(
            f"{self.masked_weights:,} of {self.maskable_weights:,} maskable weights masked "
            f"({self.coverage:.1%}), bank {self.spec.bank}",
            [name for name in _COLUMNS if name not in hidden],
            ([str(row[name]) for name in _COLUMNS if name not in hidden] for row in self.groups()),
        )
        table.caption = (
            f"bank {self.bank_floats:,} numbers; a task {self.mask_bytes:,} bytes of masks + "
            f"{self.other_bytes:,} of other tensors, {self.file_bytes:,} in its two files; "
            f"{self.ratio(4):.1f} x smaller than float32, {self.ratio(2):.1f} x than 16 bits"
        )
        if self.unreached_weights:
            table.caption += (
                f"\n{self.unreached_weights:,} of the maskable weights are not reached by the "
                "forward that was followed, and count in no share"
            )
        if self.blocks:
            listed = (f"{block.pattern} = {block.count} x {block.kind}" for block in self.blocks)
            table.caption += f"\nrepeated blocks: {', '.join(listed)}"
        if self.untraced:
            table.caption += f"\nuses not seen: {self.untraced}"
        return table

    @property
    def warning(self) -> str:
        """What stays unmasked and why, if that is a tenth of the maskable weights or more."""
        unmasked = [item for item in self.left if item.counts and item.reached]
        if self.coverage >= _LOW_COVERAGE or not unmasked:
            return ""
        largest = max(unmasked, key=lambda item: item.weights)
        return (
            f"{sum(item.weights for item in unmasked):,} of "
            f"{self.maskable_weights - self.unreached_weights:,} maskable weights stay unmasked "
            f"({1 - self.coverage:.0%}); the largest is {largest.name}: {largest.reason}"
        )

    def __str__(self) -> str:
        """Return the plan as a table in plain text, with warnings: what stays, what is lost."""
        said = [warning for warning in (self.warning, self.lost) if warning]
        return tables.as_text(self.table()) + "".join(f"WARNING: {warning}\n" for warning in said)


def _row(key: tuple[Any, ...]) -> dict[str, Any]:
    pattern, kind, shape, density, action, reason = key
    shown = "x".join(map(str, shape))
    share = "" if density is None else f"{density:.4g}"
    return dict(zip(_COLUMNS, (pattern, kind, shown, 0, 0, share, action, reason), strict=True))


def group_pattern(name: str) -> str:
    """Return a name with every number replaced by ``*``: what repeated blocks have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
