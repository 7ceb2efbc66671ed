"""The PEFT tuner layer of tensors that are not masked."""

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from pemn_surgery.adapters.layer import PemnTunerLayer
from pemn_surgery.masks.attached import find_masked, held_masks
from pemn_surgery.masks.task_tensors import TaskTensors, TensorSet
from pemn_surgery.planning.plan import Owned
from pemn_surgery.surgery import operate


class PemnTaskLayer(PemnTunerLayer, TaskTensors):
    """A task's copies of one module's unmasked tensors, by adapter.

    Attributes:
        in_features: None, PEFT's word for a layer that does not multiply.
        out_features: None likewise.
    """

    adapter_layer_names = ("pemn_tensors",)
    other_param_names = ()
    in_features: None = None
    out_features: None = None

    def __init__(self, owner: nn.Module, target: str) -> None:
        TaskTensors.__init__(self, owner, target)
        PemnTunerLayer.__init__(self)

    def active_adapter_names(self) -> Sequence[str]:
        """Return the adapters whose tensors are in force; merged ones stay in force."""
        return [] if self._disable_adapters else (self.merged_adapters or self.chosen())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; one that freezes its norms puts the module into eval mode."""
        super().set_adapter(adapter_names, inference_mode)
        if self.keeps_eval():
            self.owner.eval()

    def add_tensors(
        self, adapter_name: str, owned: Sequence[Owned], *, keeps_eval: bool, shared: bool = False
    ) -> None:
        """Give an adapter its copies, starting from the module's own values.

        With ``shared`` it takes the module's own tensors instead, but for the types that PEFT
        widens to float32. With ``keeps_eval`` the module stays in eval mode while it trains.
        """
        copies = TensorSet(keeps_eval=keeps_eval)
        for item in owned:
            base = self._start_of(item)
            if base is not None:
                one = shared and base.dtype not in (torch.float16, torch.bfloat16)
                copies.add(
                    item.tensor, base, trained=item.trained, saved=item.saved,
                    shared=one and item.first_row is None, first_row=item.first_row,
                )  # fmt: skip
        self.pemn_tensors[adapter_name] = copies

    def grow_tensors(self, adapter_name: str, item: Owned, *, is_trained: bool) -> None:
        """Give an adapter new rows, which the module's own tensor has by now.

        Of a tensor that the adapter has whole its rows stay.
        """
        if adapter_name not in self.pemn_tensors:
            self.pemn_tensors[adapter_name] = TensorSet(keeps_eval=False)
        held = cast("TensorSet", self.pemn_tensors[adapter_name])
        start, before = cast("Tensor", self._start_of(item)), held(item.tensor)
        trained = item.trained
        if before is not None:
            trained, dtype = isinstance(before, nn.Parameter), before.dtype
            start = torch.cat([before.detach(), start.detach()[len(before) :].to(dtype)])
            (held._parameters if trained else held._buffers).pop(item.tensor)
        held.add(item.tensor, start, trained=trained, saved=item.saved, first_row=item.first_row)
        if trained:
            held._parameters[item.tensor].requires_grad_(is_trained)  # pyright: ignore

    def drop_tensor(self, adapter_name: str, name: str) -> None:
        """Take a copy away that another module's serves in place of."""
        held = self.pemn_tensors._modules.get(adapter_name)
        for table in () if held is None else (held._parameters, held._buffers):
            table.pop(name, None)

    def _start_of(self, item: Owned) -> Tensor | None:
        """Return the values that a copy starts from; of rows that the module lacks zeros."""
        masked = find_masked(self.owner, item.tensor)
        base = self.base(item.tensor) if masked is None else masked.bare()
        if base is None or item.first_row is None:
            return base
        device = torch.get_default_device() if base.is_meta else base.device
        rows = torch.zeros(item.shape, dtype=base.dtype, device=device)
        own = base.detach()[item.first_row :][: len(rows)]
        if not own.is_meta:
            rows[: len(own)] = own
        return nn.Parameter(rows) if isinstance(base, nn.Parameter) else rows

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep these adapters' tensors in force, and store them in the module."""
        wanted = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters.extend(name for name in wanted if name in self.pemn_tensors)
        if self.merged_adapters:
            self.show()

    def unmerge(self) -> None:
        """Store the module's own tensors again."""
        super().unmerge()
        self.aside.put_back()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> None:
        """Leave a plain module behind."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            for name, masked in held_masks(self.owner).items():
                masked.take_rows(self.new_rows(name, self.active_adapter_names()))
        self.aside.put_back()
        operate.restore_tensors(self, keep_active=merge)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if adapter_name not in self.pemn_tensors:
            return
        entry = self.pemn_tensors[adapter_name]
        for name in [*entry._parameters, *entry._buffers]:
            base, held = self.base(name), entry(name)
            if base is None or held is None:
                continue
            if not base.is_meta and not held.is_meta:
                entry.to(device if device is not None else base.device)

    def _get_available_adapters(self) -> set[str]:
        return set(self.pemn_tensors.keys())
