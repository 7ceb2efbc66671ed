"""Modules that PEFT trains and saves whole, read as a call reads masked layers.

``modules_to_save`` puts a wrapper of PEFT's around a module, which chooses by attributes of its own
whose copy runs. Where a model with masks runs in a `Call`
(`pemn_surgery.masks.in_force`), the wrapper answers for that call; everywhere else, and for every
other method, it answers as PEFT wrote it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.errors import AdapterError
from pemn_surgery.masks import in_force
from pemn_surgery.masks.in_force import InForce, Layer
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.task_tensors import TaskTensors
from pemn_surgery.planning.plan import Plan


@dataclass(frozen=True)
class WholeModule:
    """A wrapper of PEFT's, as a layer that a `Call` can be asked about.

    Attributes:
        wrapper: The wrapper.
    """

    wrapper: AuxiliaryTrainingWrapper

    def now(self) -> InForce:
        """Return what its attributes say."""
        active = self.wrapper._active_adapter
        names = (active,) if isinstance(active, str) else tuple(active)
        return InForce(() if self.wrapper._disable_adapters else names)

    def holds(self, name: str) -> bool:
        """Tell that any name may be chosen: PEFT runs the original where it has no copy."""
        return True

    def parts_of(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield the parameters of adapters' copies."""
        for name, parameter in self.wrapper.named_parameters():
            if any(f".{adapter}." in name for adapter in names):
                yield parameter


def choosing_layers(model: nn.Module) -> Iterator[Layer]:
    """Yield everything in a model that chooses between adapters.

    Args:
        model: The model.
    """
    for module in model.modules():
        if isinstance(module, (MaskedWeight, TaskTensors)):
            yield module
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield WholeModule(module)


def check_whole_modules(
    model: nn.Module, plan: Plan, config: PemnConfig, saves_whole: Callable[[str], bool]
) -> None:
    """Refuse an adapter that masks what another one of the model saves whole, or the reverse.

    PEFT keeps a whole copy of the module for each adapter that saves it, so the masks of one would
    be part of the other's copy, and neither file could be written or read.

    Args:
        model: The model, before the adapter is added.
        plan: What the adapter would mask and own.
        config: Its configuration.
        saves_whole: Tells of a path whether the adapter saves that module whole.

    Raises:
        AdapterError: If there is such a module.
    """
    parts = [item.path for item in (*plan.targets, *plan.owned)]
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            held = [part for part in parts if f"{part}.".startswith(f"{path}.")]
            if held:
                others = ", ".join(map(repr, sorted(module._adapters)))
                _refuse_shared(config, path, f"masked or trained by the new one, whole by {others}")
        elif isinstance(module, (MaskedWeight, TaskTensors)) and saves_whole(path):
            _refuse_shared(
                config, path.rpartition(".")[0], "whole by the new one, masked by others"
            )


def _refuse_shared(config: PemnConfig, path: str, how: str) -> NoReturn:
    message = (
        f"All adapters of one model must agree on the modules that are trained and saved whole: "
        f"{path!r} would be {how} (the new adapter has modules_to_save={config.modules_to_save}). "
        "Give them the same modules_to_save, leave the module out with exclude_modules, or load "
        "the adapter onto a model of its own. Nothing was changed."
    )
    raise AdapterError(message)


def answering(answer: Callable[[tuple[str, ...]], Any]) -> Callable[[property], property]:
    """Let a property of PEFT's wrappers answer for the call that runs.

    Args:
        answer: From the names of the adapters in force to the property's value.
    """
    return lambda theirs: _answering(theirs, answer)


def one_or_list(names: tuple[str, ...]) -> str | list[str]:
    """Return adapters' names as PEFT's ``active_adapter`` does."""
    return names[0] if len(names) == 1 else list(names)


def _answering(theirs: property, answer: Callable[[tuple[str, ...]], Any]) -> property:
    plain = cast("Callable[[Any], Any]", theirs.fget)

    def get(self: AuxiliaryTrainingWrapper) -> Any:
        if torch.compiler.is_compiling() and not in_force.follows_compiled():
            return plain(self)
        if in_force.current() is None:
            return plain(self)
        return answer(in_force.read(WholeModule(self)).names)

    return property(get, doc=theirs.__doc__)
