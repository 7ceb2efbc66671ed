"""The effective weight of a layer: fill x mask x scale.

A masked layer is the same module with one property in place of its weight (`surgery` installs it).
The property asks a small child module, `MaskedWeight`, for the effective weight: the fill - the
bank's numbers, or the layer's own frozen weight - passed through the `AdapterMask` of each active
adapter. Several active masks compose as AND; sign deltas add up, after all masks.

The effective weight is made once in a forward, so that a layer that runs twelve times in it is
masked once, and where nobody trains - frozen numbers in eval mode under bits, or under scores that
nobody asks a gradient of - it is kept from then on, while a sample of these numbers stays what it
was (`kept`). It is read-only (`read_only`).
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pemn_surgery.errors import AdapterError, MaskedWeightError
from pemn_surgery.masks import in_force, places
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.in_force import InForce
from pemn_surgery.masks.kept import (
    Kept,
    Lasting,
    Sources,
    in_this_forward,
    is_untracked,
    steps_taken,
)
from pemn_surgery.masks.mixture import Mixture
from pemn_surgery.masks.places import Aside
from pemn_surgery.masks.read_only import read_only
from pemn_surgery.masks.task_tensors import TASK_CHILD, TaskTensors
from pemn_surgery.numbers.bank import Bank
from pemn_surgery.transforms import count_rows, is_transformed


def masked_child_name(parameter: str) -> str:
    """Return the attribute that holds a parameter's `MaskedWeight` on its layer."""
    return f"masked_{parameter}"


_GIVEN = (
    "The numbers under the masks of {!r} are the bank's, but the layer was given a weight of its "
    "own, which nothing would read (torch.func.functional_call gives it every name that it gets). "
    "Leave that name out, or merge first: model.merge_and_unload()."
)


# Layers that do nothing with their weight but multiply, in autocast's type where that is on.
_ONLY_MULTIPLY = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d})


class MaskedWeight(nn.Module):
    """Makes the effective weight of one parameter of one layer.

    Attributes:
        target: Name of the weight within the model.
        parameter: Name of the parameter on its layer, for example "weight".
        shape: Its shape.
        fan_in: Inputs that one output sums over.
        bank: The shared bank; None where the layer keeps its own weight.
        drawn_dtype: With a bank, the replaced weight's type, which casts change as they would have
            changed the weight; else None.
        shared_with: Further modules (and parameter names) that hold the same, tied weight.
        untied: The parameter that the layer shared before it got a copy, if it did; in a list, so
            that it is not registered here.
        marks: What others noted on the weight that a bank replaced, as transformers does on what a
            checkpoint filled; a weight that comes back has it again.
        keeps: Whether an effective weight that was made is kept for the next read.
        keeps_until_step: Whether it is so from one forward to the next, too, while it is trained.
        pemn_masks: The masks by adapter name.
        mixture: While set, it is read in place of the active adapters or what they were merged to;
            never kept, never saved.
    """

    _unshown: Tensor | None
    _tail: Tensor | None  # rows behind those that a bank fills, or that an adapter left

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
        self.marks: dict[str, Any] = {}
        self._kept = Lasting()
        self.keeps = True
        self.keeps_until_step = False
        self.mixture: Mixture | None = None
        self.target = target
        self.parameter = parameter
        self.shape = shape
        self.fan_in = fan_in
        self._modules["bank"] = bank
        self._lists_bank = bank is not None and bank.take_place_in_list()
        self.pemn_masks = nn.ModuleDict()
        self.aside = Aside()
        self.register_buffer("_unshown", None, persistent=False)
        self.register_buffer("_tail", None, persistent=False)
        self.drawn_dtype = self._start_drawing()

    @property
    def bank(self) -> Bank | None:
        """The shared bank, found past torch's slow search for a module's attributes."""
        return cast("Bank | None", self._modules["bank"])

    @property
    def owner(self) -> nn.Module:
        """The layer whose parameter this is."""
        return self._owner[0]

    def belong_to(self, owner: nn.Module) -> None:
        """Serve another layer: torch's replicas get replicas of their children."""
        self._owner = [owner]

    @property
    def merged_weight(self) -> Tensor | None:
        """The merged effective weight while adapters are merged, else None."""
        if self.aside:
            return places.stored(self.owner, self.parameter)
        return self._buffers["_unshown"]

    def hold_merged(self, weight: Tensor, *, shown: bool = True) -> None:
        """Fix the effective weight, and store it in the layer, where whoever exports finds it.

        Not so (``shown``) in a quantised layer, whose place is for packed numbers.
        """
        self._kept.clear()
        if not shown:
            self._unshown = weight
            return
        fixed = nn.Parameter(weight, requires_grad=False)
        self.aside.show([(self.owner, self.parameter), *self.shared_with], fixed)

    def drop_merged(self) -> None:
        """Make the effective weight of masks again, and store what was stored before."""
        self.aside.put_back()
        self._unshown = None

    def now(self) -> InForce:
        """Return what is in force by the layer's attributes, in the order in which it applies."""
        masks = self._masks()
        names = self.in_order([n for n in self.active_adapter_names() if n in masks])
        return InForce(tuple(names), self.merged_weight, self.mixture)

    def _masks(self) -> dict[str, Any]:
        """Return the masks by adapter name, past torch's slow search for a module's attributes."""
        containers: Any = self._modules
        return containers["pemn_masks"]._modules

    def holds(self, name: str) -> bool:
        """Tell whether an adapter has a mask of this weight."""
        return name in self._masks()

    def parts_of(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield the parameters of adapters' masks: scores, and the scales of signs."""
        for name in names:
            yield from self._mask_of(name).parameters()

    def names_in_use(self) -> Sequence[str]:
        """Return the adapters that apply, in order. The PEFT layer says which are active."""
        return in_force.read(self).names

    def in_order(self, names: Sequence[str]) -> list[str]:
        """Return adapters as they apply: masks multiply the fill, then deltas add to that."""
        masks = self._masks()
        return sorted(names, key=lambda name: masks[name].adds) if len(names) > 1 else list(names)

    def active_adapter_names(self) -> Sequence[str]:
        """Return the active adapters; without PEFT every adapter is."""
        return list(self.pemn_masks.keys())

    def is_bare(self) -> bool:
        """Tell whether nothing applies at the moment: the effective weight is the fill."""
        state = in_force.read(self)
        return not state.names and state.merged_weight is None and state.mixture is None

    def own_weight(self) -> Tensor | None:
        """Return the layer's own frozen weight, or None where a bank replaced it."""
        return self.aside.original(self.owner, self.parameter)

    def fill(self) -> Tensor:
        """Return the unmasked weight, of ``shape``.

        Raises:
            AttributeError: If the layer has no such weight at the moment, as ``hasattr`` expects.
            MaskedWeightError: If somebody gave the layer a weight while a bank fills it.
        """
        if self.bank is not None:
            self._refuse_given()
            return self.bank(self.shape, self.drawn_dtype)
        weight = self.own_weight()
        if weight is None:
            message = f"{type(self.owner).__name__!r} object has no attribute {self.parameter!r}"
            raise AttributeError(message)
        return weight[: self.shape[0]] if self._is_longer(weight) else weight

    def bare(self) -> Tensor:
        """Return the weight without adapters: the fill, and rows that no mask lies on."""
        weight = None if self.bank is not None else self.own_weight()
        if weight is not None and self._is_longer(weight):
            return weight
        return self._with_rows(self.fill(), ())

    def own_rows(self) -> Tensor | None:
        """Return the layer's own rows behind those that masks lie on; None where there are none."""
        if self.bank is not None or self._tail is not None:
            return self._tail
        weight = self.own_weight()
        longer = weight is not None and self._is_longer(weight)
        return cast("Tensor", weight)[self.shape[0] :] if longer else None

    def take_rows(self, rows: Tensor | None) -> None:
        """Hold an adapter's rows as the layer's own: what has them is about to be taken away."""
        self._tail = self._tail if rows is None else rows.detach().clone()

    def count_rows(self) -> int:
        """Return how many rows the effective weight has, without making it."""
        state = self.now()
        if state.merged_weight is not None:
            return len(state.merged_weight)
        rows = self._rows(state.names)
        return self.shape[0] + (0 if rows is None else len(rows))

    def _is_longer(self, weight: Tensor) -> bool:
        """Tell whether a weight has rows that no mask lies on (added tokens)."""
        return bool(self.shape) and weight.dim() > 0 and count_rows(weight) > self.shape[0]

    def _rows(self, names: Sequence[str]) -> Tensor | None:
        """Return the rows behind the masked ones: the first adapter's that has some, or the own."""
        rows = self._new_rows(names)
        return self.own_rows() if rows is None else rows

    def _new_rows(self, names: Sequence[str]) -> Tensor | None:
        task = self.owner._modules.get(TASK_CHILD)
        return task.new_rows(self.parameter, names) if isinstance(task, TaskTensors) else None

    def _with_rows(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        rows = self._rows(names)
        return weight if rows is None else torch.cat([weight, rows.to(weight.device, weight.dtype)])

    def forward(self) -> Tensor:
        """Return the effective weight, the kept one if nothing that it depends on has changed."""
        state = in_force.read(self)
        is_fixed = state.merged_weight is not None and state.mixture is None
        if is_fixed or is_transformed() or self._is_offloaded():
            return self._make(state)
        masks = [self._mask_of(name) for name in state.names]
        own = None if self.bank is not None else self.own_weight()
        rows = self._new_rows(state.names)
        kept = self._keeper(state, own, rows, masks)
        sources = None if kept is None else self._sources(state, own, rows, masks)
        if kept is None or sources is None:
            return self._guarded(self._make(state))
        held = kept.serve(sources)
        if held is None:
            held = self._guarded(self._make(state))
            kept.keep(held, sources)
        return held

    def _keeper(
        self,
        state: InForce,
        own: Tensor | None,
        rows: Tensor | None,
        masks: Sequence[AdapterMask],
    ) -> Kept | None:
        """Return who keeps the weight: the layer, the forward that runs, or nobody."""
        if not self._may_be_kept() or state.mixture is not None:
            return None
        outlasts = self.keeps_until_step or self._lasts(own, rows, masks)
        return self._kept if outlasts else in_this_forward(self)

    def _may_be_kept(self) -> bool:
        return self.keeps

    def _lasts(self, own: Tensor | None, rows: Tensor | None, masks: Sequence[AdapterMask]) -> bool:
        """Tell whether nobody trains what the weight is made of just now, as far as one can see."""
        trained = any(one is not None and one.requires_grad for one in (own, rows))
        if self.owner.training or trained:
            return False
        return all(mask.lasts for mask in masks)

    def _guarded(self, weight: Tensor) -> Tensor:
        """Return a weight that refuses to be written to.

        The layer's own, unmasked, stays as it is, and so does one that is a subclass (sharded).
        """
        is_made = type(weight) is Tensor and weight is not self.own_weight()
        return read_only(weight, self.target) if is_made else weight

    def read(self) -> Tensor:
        """Return what a reader of the layer's parameter gets: the effective weight."""
        if not torch.compiler.is_compiling() and self._is_offloaded():
            own = self.own_weight()
            if own is not None and own.is_meta:
                return own  # accelerate has taken the weight out and reads its place, not values
        return cast("Tensor", self())

    def _make(self, state: InForce) -> Tensor:
        if state.mixture is not None:
            return self._mix(state.mixture)
        if state.merged_weight is not None:
            return state.merged_weight
        return self._apply_masks(state.names, for_autocast=True)

    def _apply_masks(self, names: Sequence[str], *, for_autocast: bool) -> Tensor:
        """Return the weight with adapters applied in this order, if asked as autocast rounds it."""
        masks = [self._mask_of(name) for name in names]
        if not masks:
            return self.bare()
        weight = self.fill() if masks[0].adds else self._period()
        is_scratch = masks[0].scores is None and self._is_fill_new()
        for mask in masks[:-1]:
            weight, is_scratch = mask(weight, is_scratch=is_scratch), True
        rounded = self._autocast_dtype(weight.dtype, weight.device.type) if for_autocast else None
        weight = masks[-1](weight, is_scratch=is_scratch, dtype=rounded)
        return self._with_rows(weight, names)

    def _period(self) -> Tensor:
        """Return the fill for a mask, which takes numbers that repeat but once.

        Torch transforms, and its tracers record, whole tensors.
        """
        if self.bank is None or is_transformed():
            return self.fill()
        self._refuse_given()
        return self.bank.period(self.shape, self.drawn_dtype)

    def _refuse_given(self) -> None:
        if self.own_weight() is not None:
            raise MaskedWeightError(_GIVEN.format(self.target))

    def _autocast_dtype(self, dtype: torch.dtype, device: str) -> torch.dtype | None:
        """Return the type that autocast would round a weight of this type to, or None.

        None where the layer may do more with it than what autocast does in that type.
        """
        if dtype != torch.float32 or not torch.is_autocast_enabled(device) or is_transformed():
            return None
        kind = getattr(type(self.owner), "_pemn_original", type(self.owner))
        if kind not in _ONLY_MULTIPLY or self.shared_with:
            return None
        return torch.get_autocast_dtype(device)

    def _mask_of(self, name: str) -> AdapterMask:
        """Return an adapter's mask, which a call may have found that somebody has since deleted."""
        mask = self._masks().get(name)
        if mask is not None:
            return mask
        message = in_force.DELETED.format(f"mask of {self.target!r}", name)
        raise AdapterError(message)

    def _mix(self, mixture: Mixture) -> Tensor:
        """Return the mixed effective weight; an adapter without a mask of it adds all of it."""
        masks = [self._masks().get(name) for name in mixture.names]
        weight = mixture.of_masks(self.fill(), masks)
        rows = [self._rows((name,)) for name in mixture.names]
        held = [one for one in rows if one is not None]
        return torch.cat([weight, mixture.of_tensors(held).to(weight.dtype)]) if held else weight

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskedWeight":
        """Forget first: ``.to()`` and ``.half()`` replace data without a trace in versions."""
        self._kept.clear()
        self.aside.cast(fn)
        super()._apply(fn, recurse)
        before = self.drawn_dtype
        if self.bank is not None and before is not None:
            self.drawn_dtype = fn(torch.empty(0, dtype=before)).dtype
            if self.drawn_dtype != before:
                self.bank.recast_layer(before, self.drawn_dtype)
        return self

    def train(self, mode: bool = True) -> "MaskedWeight":
        """Forget what was kept in eval mode: who trains writes, and may leave no trace."""
        if mode and not self.keeps_until_step:  # loops call it before each batch
            self._kept.clear()
        super().train(mode)
        return self

    def _start_drawing(self) -> torch.dtype | None:
        """Return the type of the weight that the bank replaces."""
        if self.bank is None:
            return None
        own, values = self.own_weight(), self.bank.values
        dtype = values.dtype if own is None else own.dtype
        if own is not None and self._is_longer(own):
            rows = own.detach()[self.shape[0] :]
            self._tail = (
                torch.zeros_like(rows, device=values.device) if own.is_meta else rows.clone()
            )
        self.bank.add_layer(dtype)
        return dtype

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """Walk as ever, but meet the shared bank once even where duplicates are asked for.

        torch.func.functional_call does so, puts a tensor in by each name, and takes it out again in
        the same order: a module with two names keeps what was put in.
        """
        found = super().named_modules(memo, prefix, remove_duplicate)
        for name, module in found:
            if remove_duplicate or self._lists_bank or module is not self.bank:
                yield name, module

    def forget(self) -> None:
        """Free the kept effective weight."""
        self._kept.clear()

    def merge_names(self, names: Sequence[str]) -> Tensor:
        """Return the fill with these adapters applied, detached."""
        with torch.no_grad():
            weight = self._apply_masks(self.in_order(names), for_autocast=False).detach()
        if names and not any(self._mask_of(name).drops for name in names):
            return weight
        return weight + 0.0  # turns -0.0, which a mask makes of w < 0, into 0.0

    def extra_repr(self) -> str:
        """Show the target."""
        return f"{self.target}, shape={tuple(self.shape)}"

    def _is_fill_new(self) -> bool:
        """Whether the fill is a new tensor of its own rather than a view of what is stored."""
        return self.bank is not None and self.bank.makes(self.shape, self.drawn_dtype)

    def _is_offloaded(self) -> bool:
        """Whether accelerate moves this layer's tensors in and out around each call."""
        if "_hf_hook" in self.owner.__dict__:
            return True
        return any("_hf_hook" in mask.__dict__ for mask in self._masks().values())

    def _sources(
        self,
        state: InForce,
        own: Tensor | None,
        rows: Tensor | None,
        masks: Sequence[AdapterMask],
    ) -> Sources | None:
        """Return what the effective weight depends on, or None where that cannot be tracked."""
        stores = [store for mask in masks for store in mask.stores]
        base = own if self.bank is None else self.bank.values
        tensors = [tensor for tensor in (base, *stores, rows) if tensor is not None]
        if any(is_untracked(tensor) for tensor in tensors):
            return None
        dtype = self.drawn_dtype or tensors[0].dtype
        rounded = self._autocast_dtype(dtype, tensors[0].device.type)
        steps = steps_taken() if any(mask.scores is not None for mask in masks) else None
        settled = tuple(mask.settled_by_others for mask in masks)
        grads = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        mode = (*grads, rounded, steps, *settled)
        return Sources(state.names, mode, tensors)


def keep_weights(model: nn.Module, keep: bool, *, until_step: bool = False) -> None:
    """Choose between speed and memory: whether masked layers keep the weights that they make.

    Kept, a weight is made once and stays in memory beside its bits: after one forward the model is
    as large as a dense one. Not kept, it is made at every read and freed after use: memory stays
    at the bits, the bank, the other tensors and the layer at work. Outputs are the same. A model
    pemnified for inference from the meta device starts without keeping, any other one with it.

    While masks train, a weight is made for each forward. The micro-batches of one step (gradient
    accumulation) make it once with ``until_step``: it is kept from forward to forward, its graph
    too, until an optimizer steps or what it is made of changes. That is one tensor of every masked
    weight's size beside the gradients.

    Args:
        model: A model with masks.
        keep: Whether to keep.
        until_step: Whether to keep what is trained from one forward to the next, too.
    """
    for module in model.modules():
        if isinstance(module, MaskedWeight):
            module.keeps, module.keeps_until_step = keep, keep and until_step
            module.forget()
