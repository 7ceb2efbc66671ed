"""An arm: a model under training, how far it has come, and its checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from pemn_surgery.errors import RecipeError
from pemn_surgery.numbers.bank import Bank
from pemn_surgery.recipe import pruning
from pemn_surgery.recipe.rules import Rule

CODINGS = ("bits", "entropy", "context")
PROGRESS = ("epoch", "step", "loss", "seconds", "history")


class Arm:
    """One way of training a case: the model, its optimizers, and how far it has come.

    ``history`` has a row an epoch: ``epoch`` (from 1), ``train_loss``, ``test_accuracy`` (in
    percent), ``seconds`` and ``test_seconds``. ``step``, ``loss`` (a sum over the rows seen)
    and ``seconds`` belong to the epoch under way; of a step that k arms took together an arm counts
    a kth of the seconds.
    """

    def __init__(
        self, name: str, model: nn.Module, rule: Rule, file: Path, settings: dict[str, Any]
    ) -> None:
        """Start at epoch 0; ``file`` takes checkpoints of a run with these ``settings``."""
        self.name, self.model, self.file, self.settings = name, model, file, settings
        self.call: Callable[[Tensor], Tensor] = model  # or what torch.compile made of it
        made = rule.optimizers(model)
        self.optimizers = {key: optimizer for key, (optimizer, _) in made.items()}
        self.rules = {key: of_it for key, (_, of_it) in made.items()}
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.loss: float | Tensor = 0.0  # float64 on the model's device, so that no step waits
        self.history: list[dict[str, float]] = []

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name: trainable parameters and buffers."""
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return trained | dict(self.model.named_buffers())

    def save(self) -> None:
        """Write the checkpoint under another name, then rename it over the old one."""
        self.loss = float(self.loss)
        progress = {key: getattr(self, key) for key in PROGRESS}
        state = {"settings": self.settings, "progress": progress, "tensors": self.tensors()}
        state |= {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()}
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)

    def restore(self) -> None:
        """Continue from the checkpoint; a RecipeError if its run has other settings."""
        state = torch.load(self.file, weights_only=True)
        was = state["settings"]
        both = {key: (was.get(key), self.settings.get(key)) for key in {**was, **self.settings}}
        other = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
        if other:
            message = f"{self.file} has other settings (its, given): {other}; give another work"
            raise RecipeError(message)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(state["tensors"][name])
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[key])
        vars(self).update(state["progress"])

    @property
    def network(self) -> nn.Module:
        """The case's network, masked or not."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def set_rates(self, step: int, steps: int) -> None:
        """Take the rates of this step of so many."""
        for key, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rules[key].rate(step, steps)

    def close_epoch(self, rows: int, accuracy: float, test_seconds: float) -> dict[str, float]:
        """Add the finished epoch's row to the history, reset the counters, checkpoint."""
        row: dict[str, float] = {"epoch": self.epoch + 1, "train_loss": float(self.loss) / rows}
        row |= {"test_accuracy": accuracy, "seconds": self.seconds, "test_seconds": test_seconds}
        self.history.append(row)
        self.epoch, self.step, self.loss, self.seconds = self.epoch + 1, 0, 0.0, 0.0
        self.save()
        return row

    @property
    def folder(self) -> Path:
        """Where what a user would keep lies, beside the checkpoint."""
        return self.file.with_suffix("")

    def stored(self) -> dict[str, int]:
        """Write what a user would keep; bytes by file name."""
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(self.folder))
            return sizes(self.folder)
        self.folder.mkdir(exist_ok=True)
        file = str(self.folder / "model.safetensors")
        if pruning.is_pruned(self.model):
            save_file(pruning.kept(self.model), file)
        else:
            save_model(self.model, file)
        return sizes(self.folder)

    def ways(self) -> dict[str, int]:
        """Bytes of what a user would keep, in each way there is.

        Masks: beside the numbers of their bank as float32, or with these drawn again from the
        seed, as bits and coded; others as `stored` has them.
        """
        if not isinstance(self.model, PeftModel):
            return {"stored": sum(self.stored().values())}
        found = {f"from the seed, {coding}": self._coded(coding) for coding in CODINGS}
        beside = found[f"from the seed, {CODINGS[0]}"] + 4 * self.unique
        return {"with the prototype": beside} | found

    def _coded(self, coding: str) -> int:
        model: Any = self.model
        config = model.peft_config["default"]
        before, config.coding = config.coding, coding
        try:
            with TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                return sum(sizes(Path(folder)).values())
        finally:
            config.coding = before

    @property
    def unique(self) -> int:
        """How many frozen numbers masks choose from; without masks, how many weights there are."""
        banks = [one for one in self.model.modules() if isinstance(one, Bank)]
        named = list(self.model.named_parameters())
        scores = sum(p.numel() for name, p in named if name.endswith(".scores"))
        matrices = sum(p.numel() for _, p in named if p.dim() > 1)
        return banks[0].layout.floats if banks else scores or matrices


def learn(arms: Sequence[Arm], losses: Sequence[Tensor], step: int, steps: int) -> None:
    """Take each arm a step down its loss, at its rates of this step of so many."""
    optimizers = [optimizer for arm in arms for optimizer in arm.optimizers.values()]
    for arm in arms:
        arm.set_rates(step, steps)
    for optimizer in optimizers:
        optimizer.zero_grad()
    torch.autograd.backward(losses)
    for optimizer in optimizers:
        optimizer.step()


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of a folder's tensors and configurations by file name."""
    kept = (file for file in folder.rglob("*.*") if file.suffix in (".safetensors", ".json"))
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in kept}
