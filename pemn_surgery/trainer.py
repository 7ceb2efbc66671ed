"""Training with transformers' ``Trainer``: a callback, and timm models that it can drive."""

import copyreg
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import HEADER_BYTES
from pemn_surgery.errors import UnsupportedModelError
from pemn_surgery.gradients import GradientWatch


class PemnCallback(TrainerCallback):
    """Logs masks while they train, and keeps scores in what is saved by hand meanwhile.

    Each log carries ``pemn_density``, the share of ones, and ``pemn_flips``, the number of mask
    bits that changed since the log before, of all adapters in use, wherever in the trained module
    they are. Checkpoints hold scores, and the final save bits, with this callback or without; with
    it every other save holds scores, too, until training has ended, so that of a run that is
    interrupted nothing is lost. Masks that get no gradient in the first ten steps are named
    (`NoGradientWarning`).

    Example:
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[PemnCallback()]).train()
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._watch = GradientWatch()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the first masks; keep scores."""
        _keep_scores(kwargs["model"], keep=True)
        self._before = _packed_masks(kwargs["model"])
        self._watch = GradientWatch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch in the first steps which masks no gradient reaches."""
        self._watch.look(kwargs["model"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add density and flips to the logs of a training step."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        now = _packed_masks(kwargs["model"])
        figures = {
            "pemn_density": _density(kwargs["model"]),
            "pemn_flips": _flips(self._before, now),
        }
        self._before = now
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on saving writes masks only."""
        self._watch.warn(kwargs["model"])
        _keep_scores(kwargs["model"], keep=False)


def for_trainer(model: nn.Module, *, label_smoothing: float = 0.0) -> nn.Module:
    """Let ``Trainer`` drive a timm (or any other) image classifier; call it before `pemnify`.

    The model's class is changed in place, so every state-dict key stays the bare model's. Its
    forward then takes ``pixel_values`` and ``labels`` and returns ``{"loss": ..., "logits": ...}``
    (cross entropy); without labels the loss is left out.

    Args:
        model: A module whose forward takes a batch of images and returns logits.
        label_smoothing: Share of each label that goes evenly to all classes: what the Trainer's
            ``label_smoothing_factor`` does for models that have a configuration.

    Returns:
        The same module.

    Raises:
        UnsupportedModelError: If the model carries masks, or another adapter, already.
    """
    if any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in model.modules()):
        message = (
            f"Got a {type(model).__name__} that carries adapters already: for_trainer changes the "
            "model's own forward, which they wrap. Call it first: pemnify(for_trainer(model), ...)."
        )
        raise UnsupportedModelError(message)
    kind = type(model)
    original = kind.original if isinstance(kind, _TrainableClass) else kind
    model.__class__ = _trainable_class(original, label_smoothing)
    return model


class _TrainableClass(type):
    """Marks the classes that `for_trainer` makes, and lets pickle find them again."""

    original: type[nn.Module]
    label_smoothing: float


@functools.cache
def _trainable_class(original: type[nn.Module], label_smoothing: float) -> type[nn.Module]:
    def forward(
        self: nn.Module, pixel_values: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = original.forward(self, pixel_values)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return {"loss": loss, "logits": logits}

    namespace = {
        "forward": forward,
        "main_input_name": "pixel_values",
        "original": original,
        "label_smoothing": label_smoothing,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return _TrainableClass(original.__name__, (original,), namespace)


def _reduce_class(made: _TrainableClass) -> Any:
    return _trainable_class, (made.original, made.label_smoothing)


copyreg.pickle(_TrainableClass, _reduce_class)


def _keep_scores(model: nn.Module, *, keep: bool) -> None:
    """Say for every adapter of masks, in whichever part of the model, whether scores are saved."""
    for module in model.modules():
        configs: dict[str, Any] = module.__dict__.get("peft_config", {})
        for config in configs.values():
            if isinstance(config, PemnConfig):
                config.keep_scores = keep


def _active_masks(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for module in model.modules():
        if isinstance(module, PemnLayer):
            for name in module.names_in_use():
                held = module.mask_of(name)
                with torch.no_grad(), _gathered(held.store):
                    yield f"{module.target}/{name}", held.mask()


def _gathered(store: Tensor) -> AbstractContextManager[Any]:
    """Bring the parts of a tensor together that DeepSpeed's ZeRO-3 has spread over processes."""
    if not hasattr(store, "ds_id"):
        return nullcontext()
    from deepspeed import zero  # type: ignore[import-not-found]

    return zero.GatheredParameters([store])


def _packed_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits.pack(mask) for name, mask in _active_masks(model)}


def _density(model: nn.Module) -> float:
    counts = [(int(mask.sum()), mask.numel()) for _, mask in _active_masks(model)]
    return sum(ones for ones, _ in counts) / max(sum(weights for _, weights in counts), 1)


def _flips(before: dict[str, Tensor], now: dict[str, Tensor]) -> int:
    pairs = ((_unpacked(before[name]), _unpacked(now[name])) for name in now if name in before)
    return sum(int((first != second).sum()) for first, second in pairs)


def _unpacked(mask: Tensor) -> Tensor:
    return bits.unpack(mask, (8 * (mask.numel() - HEADER_BYTES),))
