"""`PemnModel`: the PEFT tuner that plans, operates, saves and loads.

Every check runs in `_prepare_model`, before the first module changes.
"""

# PEFT declares every hook with its base configuration class; each tuner narrows it to its own.
# pyright: reportIncompatibleMethodOverride=false

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import Tensor, nn

from pemn_surgery.adapters.checks import (
    check_in_place,
    check_model,
    check_name_is_free,
    check_targets,
)
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.file import KEY_PREFIX
from pemn_surgery.adapters.layer import PemnLayer, PemnTunerLayer
from pemn_surgery.adapters.matching import (
    follow_forward,
    is_excluded,
    plan_for,
    set_default_head,
)
from pemn_surgery.adapters.operation import Operation
from pemn_surgery.adapters.registry import PREFIX
from pemn_surgery.adapters.state import pack_for_file, prepare_for_model


class PemnModel(BaseTuner):
    """Masks as a PEFT method. Use `pemnify` or ``get_peft_model``; PEFT makes this object."""

    prefix = PREFIX
    tuner_layer_cls = PemnTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT declares it so

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_name_is_free(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PemnConfig, model_config: dict) -> PemnConfig:
        return peft_config

    def _prepare_model(self, peft_config: PemnConfig, model: nn.Module) -> None:
        """Plan and check everything; the model is still as it was when this raises."""
        check_model(model)
        set_default_head(peft_config, model)
        follow_forward(model, peft_config)
        plan = plan_for(model, peft_config)
        check_targets(plan, peft_config)
        self._pending = Operation(model, peft_config, plan)

    def _check_target_module_exists(
        self, peft_config: PemnConfig, key: str
    ) -> bool | _ExcludedModule:
        if key in self._pending.by_path:
            return True
        return _ExcludedModule() if is_excluded(peft_config, key) else False

    def _create_and_replace(
        self,
        peft_config: PemnConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._pending.mask(current_key, adapter_name)

    def _inject_parameters(
        self, peft_config: PemnConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """``target_parameters`` are targets of the plan like all others; mask what is left."""
        remaining = [path for path in self._pending.by_path if path not in self._pending.done]
        for path in remaining:
            self._pending.mask(path, adapter_name)
        wanted = peft_config.target_parameters or []
        names = [target.name for target in self._pending.plan.targets]
        return [name for name in names if any(name.endswith(item) for item in wanted)]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep what trains in float32, or in its layer's dtype if autocast was turned off."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, PemnLayer) and adapter_name in module.pemn_masks:
                    module.mask_of(adapter_name).to(module.dtype)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module | None, child: nn.Module
    ) -> None:
        """Put back what PEFT wrapped whole; a masking child has taken itself out already."""
        if new_module is not None:
            setattr(parent, child_name, new_module)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """Nothing that PEFT has to warn of: `PemnConfig.tied` says what happens to tied weights."""
        return []

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        check_in_place(self.model, "merge or unload")
        return super()._unload_and_optionally_merge(*args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PemnConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Pack scores into bits."""
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return pack_for_file(entries, model, config, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PemnConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check every mask before anything is loaded."""
        loaded = prepare_for_model(state_dict, model, config, adapter_name)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, loaded)
        if isinstance(getattr(model, "base_model", None), BaseTuner):
            if next(model.parameters(), None) is None:
                # PEFT takes a model without parameters (all masked by a bank) for one that has no
                # prefix and strips it from these keys.
                return {KEY_PREFIX + key: value for key, value in remapped.items()}
            return remapped
        return {key.removeprefix(KEY_PREFIX): value for key, value in remapped.items()}
