"""One adapter's mask of one weight: scores while it trains, bits otherwise."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pemn_surgery.coding import bits
from pemn_surgery.errors import MaskNotLoadedError
from pemn_surgery.masks.overall import Overall
from pemn_surgery.masks.product import (
    goes_by_pieces,
    masked,
    masked_by_bits,
    masked_straight_through,
    spread,
)
from pemn_surgery.masks.rows import Rows, scaled_rows
from pemn_surgery.masks.selector import Selector
from pemn_surgery.transforms import can_be_read, gathered, is_transformed, untransformed


@dataclass(frozen=True)
class Parts:
    """What one adapter was made of when it was put on a model, by the tensors' names in the base.

    Attributes:
        masked: Masked weights.
        owned: Unmasked tensors that the task has its own copy of and saves.
        whole: Paths of the modules whose tensors are trained and saved whole.
    """

    masked: tuple[str, ...]
    owned: tuple[str, ...]
    whole: tuple[str, ...]


class AdapterMask(nn.Module):
    """One adapter's mask of one weight: float scores while it trains, packed bits otherwise.

    Attributes:
        target: Name of the weight, for errors.
        shape: Shape of the weight.
        places: Where the weights that it masks lie in the flattened weight, an integer buffer of
            shape (masked weights,), ascending, that no file holds; None: all are masked.
        together: Settles how many scores it drops, of masks that are chosen with all others of
            their adapter; else None.
        last_selector: The one that training ends with, while a schedule has another in its place.
        fingerprint: Identifies the base that the mask belongs to, by dtype.
        scaled: Whether the masked weight is multiplied by 1 / sqrt(density of the mask).
        others: Packed bits that are the mask where no place lies, of the whole weight (see `bits`),
            a buffer that no file holds; None: all ones.
        scores: Float parameter of ``mask_shape``, or None.
        bits: Uint8 buffer, a stored mask (see `bits`), or None; one of the two is set.
        row_scale: Float parameter of shape (outputs,), a factor for each output; or None.
        rows: Where each output's weights lie; None without ``row_scale``.
        start: The number at which all scores began; None where they were drawn.
        is_final: Whether it was made for inference, so that nobody trains the scales, nor averages
            them into a copy.
        adds: Whether it adds to a weight rather than multiplies it.
        drops: Whether it makes zeros of weights.
    """

    adds: ClassVar[bool] = False
    drops: ClassVar[bool] = True
    places: Tensor | None
    others: Tensor | None
    scores: nn.Parameter | None
    bits: Tensor | None
    row_scale: nn.Parameter | None
    rows: Rows | None

    def __init__(
        self,
        target: str,
        shape: tuple[int, ...],
        selector: Selector,
        fingerprint: Mapping[str, str] | None = None,
        *,
        scaled: bool,
        scores: Tensor | None = None,
        stored: Tensor | None = None,
        places: Tensor | None = None,
        others: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.target = target
        self.shape = shape
        self.together: Overall | None = None
        self.selector = self.last_selector = selector
        self.fingerprint = dict(fingerprint or {})
        self.scaled = scaled
        self.start: float | None = None
        self.parts: Parts | None = None  # of the adapter, the same for all its masks
        self._verified: tuple[int, int] | None = None  # which bits were checked: id, version
        self.register_parameter("scores", None if scores is None else nn.Parameter(scores))
        self.register_buffer("bits", stored)
        for name, told in (("places", places), ("others", others)):
            # accelerate asks every buffer that is in no state dict for its device
            self.register_buffer(name, told, persistent=told is None)
        self.register_parameter("row_scale", None)
        self.rows, self.is_final = None, False

    @property
    def selector(self) -> Selector:
        """Chooses the mask from the scores, as they are now."""
        if self.together is None or self.scores is None:
            return self._selector
        return self.together.settled(self.target, self._selector)

    @selector.setter
    def selector(self, selector: Selector) -> None:
        """Choose masks otherwise from now on."""
        self._selector = selector

    @property
    def settled_by_others(self) -> int | None:
        """How many scores it drops where all masks of its adapter settle that, else None."""
        return None if self.together is None else self.selector.dropped

    def take_row_scale(self, row_scale: Tensor, rows: Rows, *, is_final: bool) -> None:
        """Have a scale for each output."""
        self.row_scale = nn.Parameter(row_scale)
        self.rows, self.is_final = rows, is_final

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Shape of the mask: the weight's, or that of the places that are masked."""
        return self.shape if self.places is None else tuple(self.places.shape)

    @property
    def weights(self) -> int:
        """Number of weights that have a bit."""
        return math.prod(self.mask_shape)

    @property
    def store(self) -> Tensor:
        """The tensor that decides the mask: scores or bits."""
        scores = self.scores
        return cast("Tensor", self.bits if scores is None else scores)

    @property
    def stores(self) -> tuple[Tensor, ...]:
        """All tensors that decide what it does to a weight."""
        return (self.store,) if self.row_scale is None else (self.store, self.row_scale)

    @property
    def lasts(self) -> bool:
        """Whether a weight made with it may serve later: nobody asks its scores for gradients.

        And nothing ordinary writes its scales.
        """
        scores, scale = self.scores, self.row_scale
        if scale is not None and not (self.is_final and not scale.requires_grad):
            return False
        return scores is None or not (scores.requires_grad and torch.is_grad_enabled())

    def mask(self) -> Tensor:
        """Return the bool mask of ``mask_shape``, that of evaluation where training draws others.

        Raises:
            MaskNotLoadedError: If the adapter was prepared for loading and never loaded.
            MaskFormatError: If the stored mask is damaged.
        """
        if self.scores is not None:
            return self.selector.mask(self.scores)
        stored = cast("Tensor", self.bits)
        self._verify(stored)
        return bits.unpack(stored, self.mask_shape)

    @property
    def saved_scale(self) -> Tensor | None:
        """The scales as a file has them beside bits."""
        return self.row_scale

    @property
    def training_selector(self) -> Selector:
        """How a forward chooses the mask: in training it may be drawn."""
        return self.selector.drawing() if self.training else self.selector

    def as_bits(self) -> Tensor:
        """Return the mask packed (see `bits`), uint8, whether it is held as scores or as bits.

        Raises:
            MaskNotLoadedError: If the adapter was prepared for loading and never loaded.
            MaskFormatError: If the stored mask is damaged.
        """
        if self.scores is not None:
            return bits.pack(self.selector.mask(gathered(self.scores.detach())))
        stored = cast("Tensor", self.bits)
        self._verify(stored)
        return stored

    def forward(
        self, weight: Tensor, *, is_scratch: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return ``weight`` with this mask (and scale) applied.

        Args:
            weight: Float tensor of ``shape``: a fill, or what another adapter left of it; or one
                period of a fill that repeats, where torch transforms nothing.
            is_scratch: Whether nobody else reads ``weight``, so that it may be overwritten.
            dtype: Type that the result is rounded to; None for the weight's.

        Returns:
            Tensor of ``shape``. Gradients reach the scores straight through.
        """
        if self.row_scale is None or self.rows is None:
            return self._masked(weight, is_scratch=is_scratch, dtype=dtype or weight.dtype)
        masked_weight = self._masked(weight, is_scratch=is_scratch, dtype=weight.dtype)
        return scaled_rows(masked_weight, self.row_scale, self.rows).to(dtype or weight.dtype)

    def _masked(self, weight: Tensor, *, is_scratch: bool, dtype: torch.dtype) -> Tensor:
        if self.places is None:
            return self._apply_to(weight, self.scores, is_scratch=is_scratch, dtype=dtype)
        # FSDP reads layers' weights between forwards, in every process, when they are sharded.
        there, whole = self.places, spread(gathered(weight), self.shape)
        part = whole.reshape(-1).index_select(0, there)
        scores = None if self.scores is None else gathered(self.scores)
        changed = self._apply_to(part, scores, is_scratch=True, dtype=weight.dtype)
        if self.others is not None:
            whole = whole * bits.unpack(self.others, self.shape)
        return whole.reshape(-1).index_put((there,), changed).view(self.shape).to(dtype)

    def _apply_to(
        self, weight: Tensor, scores: Tensor | None, *, is_scratch: bool, dtype: torch.dtype
    ) -> Tensor:
        """Return a weight of ``mask_shape`` with this mask applied."""
        if scores is None:
            return self._by_bits(weight, is_scratch=is_scratch, dtype=dtype)
        return self._by_scores(weight, scores, dtype)

    def _by_scores(self, weight: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
        return masked_straight_through(
            weight, scores, self.training_selector, scaled=self.scaled, dtype=dtype
        )

    def _by_bits(self, weight: Tensor, *, is_scratch: bool, dtype: torch.dtype) -> Tensor:
        stored = cast("Tensor", self.bits)
        if not goes_by_pieces(weight, stored):
            whole = weight if is_transformed() else spread(weight, self.mask_shape)
            return masked(whole, self.mask(), scaled=self.scaled).to(dtype)
        self._verify(stored)
        return masked_by_bits(
            weight, stored, self.mask_shape, scaled=self.scaled, in_place=is_scratch, dtype=dtype
        )

    def _verify(self, stored: Tensor) -> None:
        """Check bits once, whoever has loaded them: transformers passes PEFT's hooks by."""
        if not can_be_read(stored):
            return
        version = 0 if stored.is_inference() else stored._version
        if self._verified is not None and self._verified == (id(stored), version):
            return
        with untransformed():
            self._verify_now(stored)
        self._verified = (id(stored), version)

    def _verify_now(self, stored: Tensor) -> None:
        if not bits.is_loaded(stored):
            message = (
                f"The mask of {self.target!r} was never loaded: the adapter file that was read "
                "has no such mask. Load the adapter again with PeftModel.from_pretrained."
            )
            raise MaskNotLoadedError(message)
        bits.verify(stored, self.target)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdapterMask":
        """Move and widen as ever, but round nothing: it would choose another mask than trained."""
        return super()._apply(_without_rounding(fn), recurse)

    def set_type(self, dtype: torch.dtype) -> None:
        """Give scores or scales another type, which casts of the model do not."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    def extra_repr(self) -> str:
        """Show the selector and what is held."""
        held = "scores" if self.scores is not None else "bits"
        part = "" if self.places is None else f", {self.weights} of them"
        return f"{self._selector.name}, {held}, shape={tuple(self.shape)}{part}"


def _without_rounding(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a cast's function, but that what it would round is only moved."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        holds_all = torch.promote_types(tensor.dtype, found.dtype) == found.dtype
        return found if holds_all else tensor.to(found.device)

    return moved
