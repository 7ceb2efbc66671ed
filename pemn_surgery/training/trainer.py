"""Training with transformers' ``Trainer``: a callback, and timm models that it can drive."""

import copyreg
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.errors import TrainingWarning, UnsupportedModelError
from pemn_surgery.training.gradients import GradientWatch
from pemn_surgery.training.movement import EVERY, Masks, MovementWatch, density, flips, packed_masks
from pemn_surgery.training.penalty import beginnings, pull_back_at_rates
from pemn_surgery.training.rates import advice_on_rates


class PemnCallback(TrainerCallback):
    """Logs masks while they train, warns in time, and keeps scores in what is saved meanwhile.

    Each log carries ``pemn_density``, the share of ones, and ``pemn_flips``, the number of mask
    bits that changed since the log before, of all adapters in use, wherever in the trained module
    they are. Checkpoints hold scores, and the final save bits, with this callback or without; with
    it every other save holds scores, too, until training has ended, so that of a run that is
    interrupted nothing is lost.

    What would make a training vain is said as soon as it shows (`TrainingWarning`): rates that
    cannot carry a score over the threshold, or that are no rates for a head; masks that stand
    still, drop every weight or flip every other sign. Masks that get no gradient in the first ten
    steps are named (`NoGradientWarning`).

    Args:
        flip_penalty: Draws scores back to where they began, so that fewer bits change and a coded
            file is smaller (`pull_back`); 0 to 1 with Adam.

    Raises:
        AdapterError: When training begins, if scores with a penalty did not begin at one number.

    Example:
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[PemnCallback()]).train()
    """

    def __init__(self, *, flip_penalty: float = 0.0) -> None:
        self._penalty = flip_penalty
        self._before: Masks = {}
        self._gradients = GradientWatch()
        self._movement: MovementWatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the first masks; keep scores; compare the rates with the way they have to go."""
        model = kwargs["model"]
        if self._penalty:
            beginnings(model)  # or the first step would find that there are none
        _keep_scores(model, keep=True)
        self._before = packed_masks(model)
        self._gradients = GradientWatch()
        self._movement = MovementWatch(model, state.global_step)
        optimizer, scheduler = kwargs.get("optimizer"), kwargs.get("lr_scheduler")
        _warn(advice_on_rates(model, optimizer, scheduler, state.max_steps, args.max_grad_norm))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch in the first steps which masks no gradient reaches."""
        self._gradients.look(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw scores back, where flips have a penalty."""
        if self._penalty:
            pull_back_at_rates(kwargs["model"], kwargs["optimizer"], self._penalty)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look now and then whether masks move, and where to."""
        if self._movement is not None and state.global_step % EVERY == 0:
            _warn(self._movement.look(kwargs["model"], state.global_step))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add density and flips to the logs of a training step."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        now = packed_masks(kwargs["model"])
        figures = {
            "pemn_density": density(now),
            "pemn_flips": flips(self._before, now),
        }
        self._before = now
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on saving writes masks only."""
        model = kwargs["model"]
        self._gradients.warn(model)
        if self._movement is not None:
            _warn(self._movement.look(model, state.global_step, is_last=True))
        _keep_scores(model, keep=False)


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        warnings.warn(sentence, TrainingWarning, stacklevel=3)


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
