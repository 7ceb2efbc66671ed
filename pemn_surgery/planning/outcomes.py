"""What a plan says of one tensor: it is a target, it is left, each task owns a copy of it.

* `Target`: a tensor that will be masked, under all of its names that share the mask.
* `Left`: one name of a tensor that masks could lie on by its shape (a `Candidate`), and that stays.
* `Owned`: an unmasked tensor of any shape, buffers too, that a task trains or saves. A tensor may
  be left, which is about masks, and owned.
"""

import math
from dataclasses import dataclass, field

from pemn_surgery.numbers.bank import Shape
from pemn_surgery.planning.roles import full_name


@dataclass(frozen=True)
class Target:
    """One weight that will be masked.

    Attributes:
        path: Path of its module within the model.
        parameter: Name of the parameter on the module.
        kind: Class of the module, or the operator that a graph hands the weight to.
        shape: Shape of the weight.
        fan_in: Inputs that one output sums over.
        tied: Other modules (as "path.parameter") that hold the same tensor and share the mask.
        untied_from: Name of the tensor that it was tied to and gets a copy of, or "".
        use: What a forward does with it ("linear", "linear at beit.py:225"), "" if not traced.
        row_scales: Number of float32 scales beside the mask: one an output with
            ``form="sign_delta"``, else 0.
        reached: Whether the followed forward uses it; True if none was followed.
        density: Share of ones that its mask is chosen with; None where the selector has none.
    """

    path: str
    parameter: str
    kind: str
    shape: Shape
    fan_in: int
    tied: tuple[str, ...] = ()
    untied_from: str = ""
    use: str = field(default="", compare=False)
    row_scales: int = 0
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
