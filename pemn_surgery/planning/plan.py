"""A plan as a value: what will be masked, what is left alone and why, what each task owns.

It prints as a table, compares by value and turns into JSON. `planner` makes it.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from pemn_surgery.coding import bits
from pemn_surgery.numbers.bank import BankSpec, Layout
from pemn_surgery.planning.blocks import Block
from pemn_surgery.planning.outcomes import Left, Owned, Target
from pemn_surgery.report import tables

# Below this share of masked weights a plan says so loudly.
_LOW_COVERAGE = 0.9

_COLUMNS = ("tensor", "class", "shape", "count", "weights", "density", "action", "reason")


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
        return sum(bits.packed_bytes(item.weights) + 4 * item.row_scales for item in self.targets)

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
        totals = {
            "parameters": self.parameters,
            "masked_weights": self.masked_weights,
            "maskable_weights": self.maskable_weights,
            "unreached_weights": self.unreached_weights,
            "coverage": self.coverage,
            "bank_floats": self.bank_floats,
            "mask_bytes": self.mask_bytes,
            "other_bytes": self.other_bytes,
            "file_bytes": self.file_bytes,
            "ratio_fp32": self.ratio(4),
            "ratio_fp16": self.ratio(2),
        }
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
        """Return the plan as a table in plain text, with a warning where much stays unmasked."""
        text = tables.as_text(self.table())
        return f"{text}WARNING: {self.warning}\n" if self.warning else text


def _row(key: tuple[Any, ...]) -> dict[str, Any]:
    pattern, kind, shape, density, action, reason = key
    shown = "x".join(map(str, shape))
    share = "" if density is None else f"{density:.4g}"
    return dict(zip(_COLUMNS, (pattern, kind, shown, 0, 0, share, action, reason), strict=True))


def group_pattern(name: str) -> str:
    """Return a name with every number replaced by ``*``: what repeated blocks have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
