"""`PemnModel`: the PEFT tuner that plans, operates, saves and loads.

Every check runs in `_prepare_model`, before the first module changes; whatever else goes wrong is
undone.
"""

# PEFT declares every hook with its base configuration class; each tuner narrows it to its own.
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, onload_layer
from torch import Tensor, nn

from pemn_surgery.adapters.base import masked_layers
from pemn_surgery.adapters.checks import (
    check_in_place,
    check_mode,
    check_model,
    check_name_is_free,
    check_no_other_method,
    check_targets,
    warn_of_low_coverage,
)
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import ignores_sizes
from pemn_surgery.adapters.files.contents import KEY_PREFIX
from pemn_surgery.adapters.files.file_checks import check_loader_decodes
from pemn_surgery.adapters.injection.heads import settle_heads, warn_of_heads
from pemn_surgery.adapters.injection.layer_checks import check_can_be_stored, warn_of_extra_state
from pemn_surgery.adapters.injection.matching import (
    forward_of,
    is_excluded,
    is_saved_whole,
    plan_for,
)
from pemn_surgery.adapters.injection.new_rows import (
    check_new_rows,
    growing,
    models_with_new_rows,
    tell_sizes,
)
from pemn_surgery.adapters.injection.operation import Operation
from pemn_surgery.adapters.injection.pretrained import lost_by, warn_of_lost_weights
from pemn_surgery.adapters.layer import PemnLayer, PemnTunerLayer, choose_together
from pemn_surgery.adapters.names import check_adapter_name, saved_whole, without_name
from pemn_surgery.adapters.quantised import check_can_store
from pemn_surgery.adapters.registry import PREFIX
from pemn_surgery.adapters.state import pack_for_file, prepare_for_model
from pemn_surgery.adapters.tasks.manage import CombinationName, add_combination
from pemn_surgery.adapters.tasks.mixed_batch import mixed_batches
from pemn_surgery.adapters.whole_modules import (
    check_whole_modules,
    choosing_layers,
    new_layers,
    take_sizes,
    told_sizes,
)
from pemn_surgery.masks import in_force
from pemn_surgery.surgery import graphs, layer_groups
from pemn_surgery.surgery.swapped import mark_forward, unmark_forward
from pemn_surgery.surgery.undo import undone_on_error
from pemn_surgery.transforms import gathered

# Who asks without a doubt: transformers' Trainer, for label_smoothing_factor alone.
_NO_CONFIG = (
    "The model has no 'config'. The Trainer reads one for label_smoothing_factor: leave that out "
    "and smooth in the model, for_trainer(model, label_smoothing=...)."
)
_UNLOAD = "unload_and_optionally_merge_module"


class PemnModel(BaseTuner):
    """Masks as a PEFT method. Use `pemnify` or ``get_peft_model``; PEFT makes this object."""

    prefix = PREFIX
    tuner_layer_cls = PemnTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT declares it so

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_no_other_method(model)
        check_adapter_name(adapter_name)
        check_name_is_free(model, adapter_name)
        if isinstance(peft_config, PemnConfig):  # PeftModel gives a dictionary of its own
            check_loader_decodes(peft_config)
            peft_config = peft_config.own_copy()
        given = [peft_config] if isinstance(peft_config, PemnConfig) else peft_config.values()
        self._added: set[str] = set()  # adapters that were injected and never given their type
        with undone_on_error(model, *given):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PemnConfig, model_config: dict) -> PemnConfig:
        return peft_config

    def _prepare_model(self, peft_config: PemnConfig, model: nn.Module) -> None:
        """Plan and check everything; the model is still as it was when this raises."""
        check_model(model)
        check_no_other_method(model)
        settle_heads(peft_config, model)
        check_new_rows(peft_config, model)
        for name in self.peft_config:
            check_adapter_name(name, saved_whole([peft_config]))
        plan = plan_for(model, peft_config, forward_of(model, peft_config))
        check_whole_modules(model, plan, peft_config, partial(is_saved_whole, peft_config))
        check_targets(plan, peft_config)
        check_can_be_stored(model, plan)
        if not any(isinstance(module, PemnLayer) for module in model.modules()):
            warn_of_low_coverage(plan, peft_config)
            warn_of_lost_weights(lost_by(peft_config, model, plan))
        warn_of_heads(peft_config, model, plan)
        warn_of_extra_state(model, peft_config)
        if plan.frozen_norms:
            check_mode(model, training=False, why='rest="freeze"')
        self._pending = Operation(model, peft_config, plan)
        root = [target.parameter for target in self._pending.by_path.get("", ())]
        if root:
            peft_config.target_parameters = [*(peft_config.target_parameters or ()), *root]

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

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None,
        adapter_name: str,
        combination_type: CombinationName = "majority",
    ) -> None:
        """Add an adapter that is made from others by mask algebra; it holds bits.

        Unmasked tensors of the tasks (norms, statistics) become the weighted mean, but of a
        difference, which keeps the first adapter's.

        Args:
            adapters: The adapters to combine.
            weights: One number above 0 an adapter; None weighs them alike.
            adapter_name: The new adapter.
            combination_type: A weight is kept where all adapters keep it ("intersection"), one does
                ("union"), adapters of more than half of the total weight do ("majority"), the first
                does and no other ("difference"), or an even number of them does not ("xor"): of
                flips, whose signs then change as if all were applied in turn.

        Raises:
            AdapterError: If the adapters cannot be combined so.
            AlreadyPemnifiedError: If the name is taken.
            AdapterNameError: If no adapter can have the name.
        """
        given = [1.0] * len(adapters) if weights is None else weights
        configs = cast("dict[str, PemnConfig]", self.peft_config)
        config = add_combination(
            self.model, configs, adapters, given, adapter_name, combination_type
        )
        config.is_in_force = True
        configs[adapter_name] = config

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let ``adapter_names`` name an adapter for every sample; else keep what is active now."""
        names = kwargs.get("adapter_names")
        if names is not None:
            with mixed_batches(self.model, names):
                yield
        elif torch.compiler.is_compiling() or in_force.current() is not None:
            yield
        else:
            with in_force.running():
                yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, for calls that begin from now on."""
        with self._switching():
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        tell_sizes(models_with_new_rows(self.model))

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out."""
        grown = models_with_new_rows(self.model)
        super().delete_adapter(adapter_name)
        tell_sizes(grown)

    def enable_adapter_layers(self) -> None:
        """Enable the adapters, for calls that begin from now on."""
        with self._switching():
            super().enable_adapter_layers()
        tell_sizes(models_with_new_rows(self.model))

    def disable_adapter_layers(self) -> None:
        """Disable the adapters, for calls that begin from now on."""
        with self._switching():
            super().disable_adapter_layers()
        tell_sizes(models_with_new_rows(self.model))

    def unmerge_adapter(self) -> None:
        """Go back to unmerged adapters, for calls that begin from now on."""
        with self._switching():
            super().unmerge_adapter()

    def _switching(self) -> AbstractContextManager[None]:
        return in_force.switching(choosing_layers(self.model))

    def __getattr__(self, name: str) -> Any:
        """Pass attributes on as PEFT does, but for three kinds.

        Copied by a graph module's way of copying itself, PEFT's own part would be left behind; what
        timm asks about parameters is asked in the names that they have here; and more tokens are
        rows of every adapter.
        """
        if name in {"__deepcopy__", "__copy__"}:
            raise AttributeError(name)
        try:
            found = super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(_NO_CONFIG if name == "config" else str(error)) from error
        if name == "resize_token_embeddings":
            return growing(self.model, cast("dict[str, PemnConfig]", self.peft_config), found)
        asked = name in layer_groups.QUESTIONS and callable(found)
        return layer_groups.answer(self, name, found, _inner_name) if asked else found

    def train(self, mode: bool = True) -> "PemnModel":
        """Set the mode, but of an exported graph, whose mode torch has fixed.

        Torch refuses even the mode that such a graph is in, and PEFT asks for it when it loads.

        Raises:
            GraphModeError: If an exported graph is in the other mode.
        """
        if "train" not in self.model.__dict__:
            return super().train(mode)
        check_mode(self.model, training=mode, why="train()" if mode else "eval()")
        self.training = mode
        return self

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject, and let graphs call what they read until now.

        PEFT never visits the model itself, and asks `_inject_parameters` for what is left only
        where parameters are named; so the root's are named while it injects.
        """
        check_adapter_name(adapter_name)
        config = cast("PemnConfig", self.peft_config[adapter_name])
        asked = config.target_parameters
        with undone_on_error(self, config):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config.target_parameters = asked
            choose_together(masked_layers(model, adapter_name).values(), adapter_name)
            if config.origin.file is not None and not ignores_sizes():
                shapes = {key: shape for key, (shape, _) in config.origin.file.others.items()}
                take_sizes(model, adapter_name, shapes)
            graphs.rewrite_graphs(model)
            self._added.add(adapter_name)
            if config.origin.fingerprint is None:
                config.lineage = None  # that of another adapter, whose settings these are
            config.is_in_force = True
            mark_forward(model)
        tell_sizes(models_with_new_rows(model))

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
        """Keep what trains in float32, or in its layer's dtype if autocast was turned off.

        PEFT asks when an adapter is added, and again when it is loaded. What was loaded keeps the
        type that it was trained in.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if adapter_name not in self._added:
            return
        self._added.discard(adapter_name)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, PemnLayer) and adapter_name in module.pemn_masks:
                    module.mask_of(adapter_name).set_type(module.dtype)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module | None, child: nn.Module
    ) -> None:
        """Put back what PEFT wrapped whole; a masking child has taken itself out already."""
        if new_module is not None:
            setattr(parent, child_name, new_module)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """Nothing for models that tie weights and have no embedding, where PEFT would fail."""
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:
            return []

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """Nothing that PEFT has to warn of: `PemnConfig.tied` says what happens to tied weights."""
        return []

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Fix the effective weights, for calls that begin from now on.

        With ``safe_merge`` all layers are checked before the first one.

        Args:
            adapter_names: Adapters to merge; default the active ones.
            safe_merge: Refuse scores or weights that are not finite.

        Raises:
            NonFiniteScoresError: With ``safe_merge``, if scores or weights are not finite.
        """
        if safe_merge:
            self._check_mergeable(adapter_names)
        with self._switching():
            super().merge_adapter(adapter_names, safe_merge)

    def _check_mergeable(self, adapter_names: Sequence[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, PemnLayer):
                with onload_layer(module):
                    module.check_mergeable(adapter_names)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        check_in_place(self.model, "merge or unload")
        if kwargs.get("merge", args[0] if args else True):
            check_can_store(self.model)
            if kwargs.get("safe_merge"):
                self._check_mergeable(kwargs.get("adapter_names"))
        reads, grown = graphs.graph_reads(self.model), models_with_new_rows(self.model)
        with _not_taken_for_layers(self.model), told_sizes(self.model):
            model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        graphs.restore_graphs(reads)
        unmark_forward(model)
        tell_sizes(grown)
        return model

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
        new = new_layers(model, config, adapter_name, state_dict)
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        packed = pack_for_file(entries, model, config, adapter_name, state_dict)
        packed.update({key: gathered(value) for key, value in new.items()})
        return packed

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Parts of a model may be called like an adapter; PEFT would take them out."""
        return without_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PemnConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check every mask before anything is loaded, and make room for heads of other sizes."""
        loaded = prepare_for_model(state_dict, model, config, adapter_name)
        if not ignores_sizes():
            shapes = {key: tuple(value.shape) for key, value in loaded.items()}
            take_sizes(model, adapter_name, shapes)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, loaded)
        if isinstance(getattr(model, "base_model", None), BaseTuner):
            if next(model.parameters(), None) is None:
                # PEFT takes a model without parameters (all masked by a bank) for one that has no
                # prefix and strips it from these keys.
                return {KEY_PREFIX + key: value for key, value in remapped.items()}
            return remapped
        return {key.removeprefix(KEY_PREFIX): value for key, value in remapped.items()}


def _inner_name(name: str) -> str:
    """Return the base's name of a parameter of the PEFT model, or of the tuner in it."""
    inner = name.removeprefix(KEY_PREFIX)
    return layer_groups.base_name(inner if inner != name else name.removeprefix("model."))


@contextmanager
def _not_taken_for_layers(model: nn.Module) -> Iterator[None]:
    """Let PEFT pass by a model's own modules that have a child named ``base_layer`` (timm's DLA).

    It takes them for layers of its own, but asks for this method first.
    """
    own = [
        module
        for module in model.modules()
        if "base_layer" in module._modules and not isinstance(module, BaseTunerLayer)
    ]
    for module in own:
        module.__dict__[_UNLOAD] = lambda **_: None
    try:
        yield
    finally:
        for module in own:
            module.__dict__.pop(_UNLOAD, None)
