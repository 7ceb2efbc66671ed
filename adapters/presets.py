"""Settings to begin with: those of papers, and first guesses for pretrained models.

Each is an adapter's options and the training that belongs to them: a rate alone means nothing
without the optimizer, and none without where the scores begin. METHODS in docs/methods.md has the
papers' sections. "text" and "image" are guesses from few trials; recipes/small_adapters measures
such settings beside others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pemn_surgery.adapters.param_groups import param_groups

PresetName = Literal["pemn", "edge_popup", "piggyback", "self_masking", "text", "image"]


@dataclass(frozen=True)
class Training:
    """How masks are trained: rates, schedule and length, for a `torch` loop or ``Trainer``.

    Attributes:
        kind: "adamw", or "sgd" with momentum .9.
        lr: Rate of the scores.
        norms: Rate of the task's other tensors.
        head: Rate of modules that are trained whole.
        schedule: Of all rates, as ``Trainer`` calls it.
        warmup: Share of the steps in which the rates rise.
        epochs: Passes over the data.
        batch: Samples a step.
        weight_decay: Of modules that are trained whole; of all else only with ``decays_scores``.
        decays_scores: Whether scores, scales and norms decay, too.

    Example:
        >>> model = pemnify(bert, PemnConfig.preset("text", task_type="SEQ_CLS"))
        >>> training = PemnConfig.training("text")
        >>> args = TrainingArguments("out", **training.arguments())
        >>> optimizers = (training.optimizer(model), None)
        >>> Trainer(model, args, train_dataset=data, optimizers=optimizers).train()
    """

    kind: Literal["adamw", "sgd"]
    lr: float
    norms: float
    head: float
    schedule: Literal["linear", "cosine"]
    warmup: float
    epochs: int
    batch: int
    weight_decay: float = 0.0
    decays_scores: bool = False

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of a model's trained parameters, in groups with their own rates.

        Raises:
            AdapterError: If the model has no masks that are trained.
        """
        groups = param_groups(
            model, self.lr, norms=self.norms, head=self.head, weight_decay=self.weight_decay
        )
        if self.decays_scores:
            groups = [{**group, "weight_decay": self.weight_decay} for group in groups]
        if self.kind == "sgd":
            return SGD(groups, lr=self.lr, momentum=0.9)
        return AdamW(groups, lr=self.lr)

    def arguments(self) -> dict[str, Any]:
        """Return what to give to transformers' ``TrainingArguments``, beside the optimizer.

        Gradients are not clipped: with SGD the papers' rates are for gradients as they are, and
        Adam's steps do not follow their size.
        """
        return {
            "learning_rate": self.lr,
            "lr_scheduler_type": self.schedule,
            "warmup_steps": self.warmup,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch,
            "weight_decay": self.weight_decay,
            "max_grad_norm": 0.0,
        }


@dataclass(frozen=True)
class Preset:
    """An adapter's options, and the training that belongs to them."""

    options: Mapping[str, Any]
    training: Training


PRESETS: Mapping[str, Preset] = {
    "pemn": Preset(
        {"bank": "mp", "selector": "topk", "density": 0.5, "rest": "train"},
        Training(
            "sgd", 0.1, 0.1, 0.1, "cosine", 0.0, 100, 256, weight_decay=5e-4, decays_scores=True
        ),
    ),
    "edge_popup": Preset(
        {
            "bank": "own",
            "bank_init": "signed_constant",
            "selector": "topk",
            "density": 0.5,
            "rest": "stats",
        },
        Training(
            "sgd", 0.1, 0.1, 0.1, "cosine", 0.0, 100, 128, weight_decay=1e-4, decays_scores=True
        ),
    ),
    "piggyback": Preset(
        {
            "bank": "own",
            "selector": "threshold",
            "threshold": 5e-3,
            "score_init": 1e-2,
            "rest": "freeze",
        },
        # the paper divides by ten after half; the mean of linear rates is about the same
        Training("adamw", 1e-4, 1e-4, 1e-3, "linear", 0.0, 30, 32),
    ),
    "self_masking": Preset(
        {
            "bank": "own",
            "selector": "threshold",
            "threshold": 0.0,
            "score_init": 1.0,
            "scale": "sqrt_density",
            "rest": "stats",
        },
        Training("sgd", 50.0, 0.1, 0.1, "cosine", 40 / 150, 150, 64),
    ),
    "text": Preset(
        {
            "bank": "own",
            "selector": "threshold",
            "threshold": 0.0,
            "score_init": 1e-2,
            "form": "flip",
            "support": 0.02,
            "rest": "stats",
            "coding": "entropy",
        },
        Training("adamw", 3e-3, 1e-3, 1e-3, "linear", 0.06, 3, 32),
    ),
    "image": Preset(
        {
            "bank": "own",
            "selector": "threshold",
            "threshold": 0.0,
            "score_init": 1e-2,
            "rest": "stats",
            "coding": "entropy",
        },
        Training("adamw", 3e-3, 1e-3, 1e-3, "linear", 0.06, 10, 64),
    ),
}
