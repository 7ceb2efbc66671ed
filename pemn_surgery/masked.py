"""The effective weight of a layer: fill x mask x scale.

A masked layer is the same module with one property in place of its weight (`surgery` installs it).
The property asks a small child module, `MaskedWeight`, for the effective weight: the fill - the
bank's numbers, or the layer's own frozen weight - passed through the `AdapterMask` of each active
adapter. Several active adapters compose as AND.

The effective weight is made once and kept until anything that it depends on changes, so reading
``layer.weight.dtype`` costs nothing and a layer that runs twelve times per step is masked once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery import bits
from pemn_surgery.bank import Bank
from pemn_surgery.errors import MaskNotLoadedError
from pemn_surgery.selector import Selector

# Weights masked at a time where no gradient is needed: a multiple of 8, small beside large layers.
_PIECE = 1 << 20


def masked_child_name(parameter: str) -> str:
    """Return the attribute that holds a parameter's `MaskedWeight` on its layer."""
    return f"masked_{parameter}"


class AdapterMask(nn.Module):
    """One adapter's mask of one weight: float scores while it trains, packed bits otherwise.

    Attributes:
        target: Name of the weight, for errors.
        shape: Shape of the weight.
        selector: Chooses the mask from the scores.
        fingerprint: Identifies the base that the mask belongs to, by dtype.
        scaled: Whether the masked weight is multiplied by 1 / sqrt(density of the mask).
        scores: Float parameter of ``shape``, or None.
        bits: Uint8 buffer, a stored mask (see `bits`), or None; one of the two is set.
    """

    scores: nn.Parameter | None
    bits: Tensor | None

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
    ) -> None:
        super().__init__()
        self.target = target
        self.shape = shape
        self.selector = selector
        self.fingerprint = dict(fingerprint or {})
        self.scaled = scaled
        self._verified: tuple[int, int] | None = None  # which bits were checked: id, version
        self.register_parameter("scores", None if scores is None else nn.Parameter(scores))
        self.register_buffer("bits", stored)

    @property
    def store(self) -> Tensor:
        """The tensor that decides the mask: scores or bits."""
        return cast("Tensor", self.scores if self.scores is not None else self.bits)

    def mask(self) -> Tensor:
        """Return the bool mask of ``shape``.

        Raises:
            MaskNotLoadedError: If the adapter was prepared for loading and never loaded.
            MaskFormatError: If the stored mask is damaged.
        """
        if self.scores is not None:
            return self.selector.mask(self.scores)
        stored = cast("Tensor", self.bits)
        if not torch.compiler.is_compiling():
            self._verify(stored)
        return bits.unpack(stored, self.shape)

    def forward(self, weight: Tensor, *, is_scratch: bool = False) -> Tensor:
        """Return ``weight`` with this mask (and scale) applied.

        Args:
            weight: Float tensor of ``shape``: a fill, or what another adapter left of it.
            is_scratch: Whether nobody else reads ``weight``, so that it may be overwritten.

        Returns:
            Tensor of the same shape and dtype. Gradients reach the scores straight through.
        """
        if self.scores is None:
            return self._apply_bits(weight, is_scratch=is_scratch)
        applied = _StraightThrough.apply(
            weight, self.scores, self.mask(), self.selector.uses_magnitude, self.scaled
        )
        return cast("Tensor", applied)

    def _apply_bits(self, weight: Tensor, *, is_scratch: bool) -> Tensor:
        stored = cast("Tensor", self.bits)
        if not _goes_by_pieces(weight, stored):
            return masked(weight, self.mask(), scaled=self.scaled)
        self._verify(stored)
        return masked_by_pieces(weight, stored, scaled=self.scaled, in_place=is_scratch)

    def _verify(self, stored: Tensor) -> None:
        """Check bits once, whoever has loaded them: transformers passes PEFT's hooks by."""
        version = 0 if stored.is_inference() else stored._version
        if self._verified is not None and self._verified == (id(stored), version):
            return
        if not bits.is_loaded(stored):
            message = (
                f"The mask of {self.target!r} was never loaded: the adapter file that was read "
                "has no such mask. Load the adapter again with PeftModel.from_pretrained."
            )
            raise MaskNotLoadedError(message)
        bits.verify(stored, self.target)
        self._verified = (id(stored), version)

    def extra_repr(self) -> str:
        """Show the selector and what is held."""
        held = "scores" if self.scores is not None else "bits"
        return f"{self.selector.name}, {held}, shape={tuple(self.shape)}"


class MaskedWeight(nn.Module):
    """Makes the effective weight of one parameter of one layer.

    Attributes:
        target: Name of the weight within the model.
        parameter: Name of the parameter on its layer, for example "weight".
        shape: Its shape.
        fan_in: Inputs that one output sums over.
        bank: The shared bank; None where the layer keeps its own weight.
        shared_with: Further modules (and parameter names) that hold the same, tied weight.
        untied: The parameter that the layer shared before it got a copy, if it did; in a list, so
            that it is not registered here.
        keeps: Whether an effective weight that was made is kept for the next read.
        pemn_masks: The masks by adapter name.
        merged_weight: The merged effective weight while adapters are merged, else None.
    """

    merged_weight: Tensor | None

    def __init__(
        self,
        owner: nn.Module,
        target: str,
        parameter: str,
        shape: tuple[int, ...],
        fan_in: int,
        bank: Bank | None,
    ) -> None:
        super().__init__()
        # In a list, so that the owner is not registered as a child of its own child.
        self._owner = [owner]
        self.shared_with: list[tuple[nn.Module, str]] = []
        self.untied: list[nn.Parameter] = []
        self._kept = _Kept()
        self.keeps = True
        self.target = target
        self.parameter = parameter
        self.shape = shape
        self.fan_in = fan_in
        self.bank = bank
        self.pemn_masks = nn.ModuleDict()
        self.register_buffer("merged_weight", None, persistent=False)

    @property
    def owner(self) -> nn.Module:
        """The layer whose parameter this is."""
        return self._owner[0]

    def names_in_use(self) -> Sequence[str]:
        """Return the adapters that apply, in order. The PEFT layer says which are active."""
        return [name for name in self.active_adapter_names() if name in self.pemn_masks]

    def active_adapter_names(self) -> Sequence[str]:
        """Return the active adapters; without PEFT every adapter is."""
        return list(self.pemn_masks.keys())

    def own_weight(self) -> Tensor | None:
        """Return the layer's own frozen weight, or None where a bank replaced it."""
        owned = self.owner._parameters.get(self.parameter)
        return owned if owned is not None else self.owner.__dict__.get(self.parameter)

    def fill(self) -> Tensor:
        """Return the unmasked weight.

        Raises:
            AttributeError: If the layer has no such weight at the moment, as ``hasattr`` expects.
        """
        if self.bank is not None:
            return self.bank(self.shape)
        weight = self.own_weight()
        if weight is None:
            message = f"{type(self.owner).__name__!r} object has no attribute {self.parameter!r}"
            raise AttributeError(message)
        return weight

    def forward(self) -> Tensor:
        """Return the effective weight, the kept one if nothing that it depends on has changed."""
        if torch.compiler.is_compiling() or self._is_offloaded():
            return self._make()
        sources = self._sources() if self.keeps else None
        if sources is None:
            return self._make()
        if self._kept.serves(sources):
            return cast("Tensor", self._kept.weight)
        weight = self._make()
        self._kept.keep(weight, sources)
        return weight

    def read(self) -> Tensor:
        """Return what a reader of the layer's parameter gets: the effective weight."""
        if not torch.compiler.is_compiling() and self._is_offloaded():
            own = self.own_weight()
            if own is not None and own.is_meta:
                return own  # accelerate has taken the weight out and reads its place, not values
        return cast("Tensor", self())

    def _make(self) -> Tensor:
        if self.merged_weight is not None:
            return self.merged_weight
        weight, is_scratch = self.fill(), self._is_tiled()
        for name in self.names_in_use():
            weight = self.pemn_masks[name](weight, is_scratch=is_scratch)
            is_scratch = True
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskedWeight":
        """Forget first: ``.to()`` and ``.half()`` replace data without a trace in versions."""
        self._kept.clear()
        return super()._apply(fn, recurse)

    def forget(self) -> None:
        """Free the kept effective weight."""
        self._kept.clear()

    def merge_names(self, names: Sequence[str]) -> Tensor:
        """Return fill (or what is merged already) with these adapters applied, detached."""
        with torch.no_grad():
            weight = self.merged_weight if self.merged_weight is not None else self.fill()
            for name in names:
                weight = self.pemn_masks[name](weight)
            return weight.detach() + 0.0  # turns -0.0, which a mask makes of w < 0, into 0.0

    def extra_repr(self) -> str:
        """Show the target."""
        return f"{self.target}, shape={tuple(self.shape)}"

    def _is_tiled(self) -> bool:
        """Whether the fill is a new tensor of its own rather than a view of what is stored."""
        return self.bank is not None and self.bank.tiles(self.shape)

    def _is_offloaded(self) -> bool:
        """Whether accelerate moves this layer's tensors in and out around each call."""
        if "_hf_hook" in self.owner.__dict__:
            return True
        return any("_hf_hook" in mask.__dict__ for mask in self.pemn_masks.values())

    def _sources(self) -> "_Sources | None":
        """Return what the effective weight depends on, or None where it must not be kept.

        Trained scores are read anew without gradients: an optimizer that writes through ``.data``
        changes them without a trace in the version counter.
        """
        names = tuple(self.names_in_use())
        grad = torch.is_grad_enabled()
        stores = [cast("AdapterMask", self.pemn_masks[name]).store for name in names]
        if not grad and any(store.requires_grad for store in stores):
            return None
        base = self.bank.values if self.bank is not None else self.own_weight()
        tensors = [tensor for tensor in (base, self.merged_weight, *stores) if tensor is not None]
        if any(_is_untracked(tensor) for tensor in tensors):
            return None
        return _Sources(names, (grad, torch.is_inference_mode_enabled()), tensors)


def _is_untracked(tensor: Tensor) -> bool:
    """Whether changes of a tensor cannot be seen: no versions, no values, or a subclass."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return not plain or tensor.is_meta or tensor.is_inference()


def masked(weight: Tensor, mask: Tensor, *, scaled: bool) -> Tensor:
    """Return W * M, or W * M / sqrt(mean(M)) (Self-Masking Networks, section 3).

    Args:
        weight: Float tensor W.
        mask: Bool tensor M of the same shape.
        scaled: Whether to divide by the square root of the mask's density.

    Returns:
        Tensor like ``weight``.
    """
    kept = weight * mask.to(weight.dtype)
    return kept * _scale(mask.sum(), mask.numel()) if scaled else kept


def masked_by_pieces(weight: Tensor, stored: Tensor, *, scaled: bool, in_place: bool) -> Tensor:
    """Return what `masked` returns for a stored mask, bit for bit, with little memory beside it.

    The mask is unpacked a piece at a time, so that nothing of the weight's size is made but the
    result. There are no gradients.

    Args:
        weight: Contiguous float tensor W.
        stored: The mask as `bits` stores it.
        scaled: As in `masked`.
        in_place: Whether to write into ``weight``.

    Returns:
        Tensor like ``weight``.
    """
    with torch.no_grad():
        kept = weight if in_place else torch.empty_like(weight)
        ones = torch.zeros((), dtype=torch.int64, device=weight.device)
        before, after, weights = weight.view(-1), kept.view(-1), weight.numel()
        for start in range(0, weights, _PIECE):
            stop = min(start + _PIECE, weights)
            mask = bits.unpack_piece(stored, start, stop)
            torch.mul(before[start:stop], mask.to(weight.dtype), out=after[start:stop])
            ones += mask.sum()
        return kept.mul_(_scale(ones, weights)) if scaled else kept


def keep_weights(model: nn.Module, keep: bool) -> None:
    """Choose between speed and memory: whether masked layers keep the weights that they make.

    Kept, a weight is made once and stays in memory beside its bits: after one forward the model is
    as large as a dense one. Not kept, it is made at every read and freed after use: memory stays
    at the bits, the bank, the other tensors and the layer at work. Outputs are the same. A model
    pemnified for inference from the meta device starts without keeping, any other one with it.

    Args:
        model: A model with masks.
        keep: Whether to keep.
    """
    for module in model.modules():
        if isinstance(module, MaskedWeight):
            module.keeps = keep
            module.forget()


def _goes_by_pieces(weight: Tensor, stored: Tensor) -> bool:
    """Tell whether a large plain tensor is masked without gradients and outside of tracing."""
    if torch.compiler.is_compiling() or weight.numel() <= _PIECE or not weight.is_contiguous():
        return False
    tracked = weight.requires_grad and torch.is_grad_enabled()
    return not tracked and type(weight) in (Tensor, nn.Parameter) and type(stored) is Tensor


def _scale(ones: Tensor, weights: int) -> Tensor:
    """Return 1 / sqrt(density) as a float32 scalar; 1 for a mask without ones."""
    return (weights / ones.clamp(min=1).to(torch.float32)).sqrt()


class _StraightThrough(torch.autograd.Function):
    """W * M * c with dL/dS = dL/dM (times sign(S) where the mask is chosen from |S|).

    The tensors hang on the context as attributes rather than as saved tensors: they are leaves that
    outlive the graph, so one effective weight may serve several backward passes.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, by_magnitude: bool, scaled: bool
    ) -> Tensor:
        ctx.weight, ctx.scores, ctx.mask = weight.detach(), scores, mask
        ctx.by_magnitude, ctx.scaled = by_magnitude, scaled
        return masked(weight, mask, scaled=scaled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        need_weight, need_scores = ctx.needs_input_grad[:2]
        grad_weight = masked(grad, ctx.mask, scaled=ctx.scaled) if need_weight else None
        return grad_weight, (_score_grad(ctx, grad) if need_scores else None), None, None, None


def _score_grad(ctx: Any, grad: Tensor) -> Tensor:
    """Return dL/dS. With c = mean(M)^-1/2 not detached, dc/dM = -c^3 / (2n)."""
    through = (grad * ctx.weight).to(ctx.scores.dtype)
    if ctx.scaled:
        scale = _scale(ctx.mask.sum(), ctx.mask.numel())
        pull = (through * ctx.mask.to(through.dtype)).sum()
        through = through * scale - pull * scale**3 / (2 * ctx.mask.numel())
    return through * ctx.scores.sign() if ctx.by_magnitude else through


class _Sources:
    """What one effective weight was made from. It holds the tensors, so that no id is reused."""

    def __init__(
        self, names: tuple[str, ...], mode: tuple[bool, bool], tensors: list[Tensor]
    ) -> None:
        # The aliases keep replaced data from being freed and its address from being used again.
        self.tensors = [(tensor, tensor.detach()) for tensor in tensors]
        versions = [(id(t), t._version, t.data_ptr(), t.dtype, t.requires_grad) for t in tensors]
        self.state = (names, mode, versions)


class _Kept:
    """The kept effective weight; never copied or pickled with its layer.

    It goes when a gradient passes through it: whatever then changes the scores, it is made anew.
    """

    def __init__(self) -> None:
        self.clear()

    def serves(self, sources: _Sources) -> bool:
        """Tell whether the kept weight was made from exactly these sources."""
        return self.sources is not None and self.sources.state == sources.state

    def keep(self, weight: Tensor, sources: _Sources) -> None:
        """Keep a weight until its sources change or its gradient is computed."""
        self.weight, self.sources = weight, sources
        if weight.requires_grad and not weight.is_leaf:
            weight.register_hook(self._gradient_passed)

    def clear(self) -> None:
        """Forget the kept weight."""
        self.sources: _Sources | None = None
        self.weight: Tensor | None = None

    def _gradient_passed(self, _grad: Tensor) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type["_Kept"], tuple[()]]:
        return _Kept, ()
