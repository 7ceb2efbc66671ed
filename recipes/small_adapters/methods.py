"""Methods: what becomes of a row of ``[arms]``, and what of a network it would keep on disk.

A row says by one key which kind it is: ``peft`` (any method of PEFT's, ours among them),
``parameters`` (those by a pattern are trained as they are) or ``neighbours`` (nothing is trained).
Floats are kept as float16, masks coded. Each kind reads back what it wrote.
"""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load
from pemn_surgery.recipe.arms import sizes
from pemn_surgery.training.penalty import pull_back_at_rates

NETWORKS: Any = load(Path(__file__).resolve().parent).module("networks")
FILE = "model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A method of PEFT's on all linear layers and convolutions of the body.

    Attributes:
        peft: Its configuration.
        seeded: Field of this that takes the run's seed, if it has one.
        flip_penalty: Draws scores back to where they began after each step (`pull_back`).
    """

    peft: dict[str, Any]
    seeded: str = ""
    flip_penalty: float = 0.0

    def on(self, network: nn.Module, seed: int) -> nn.Module:
        """Return the network with a fresh adapter; what has no seed is drawn by torch's."""
        places = {"target_modules": NETWORKS.layers(network), "modules_to_save": ["head"]}
        own = {self.seeded: seed} if self.seeded else {}
        config = PeftConfig.from_peft_type(**self.peft, **places, **own)
        return get_peft_model(network, config)  # pyright: ignore[reportArgumentType]

    def after_step(self, model: nn.Module, optimizer: Any) -> None:
        """Draw scores back, where flips have a penalty."""
        if self.flip_penalty:
            pull_back_at_rates(model, optimizer, self.flip_penalty)

    def write(self, model: Any, folder: Path) -> None:
        """Save by PEFT, with what was trained in float16.

        Scores stay as they are: a file has the bits that they choose, and rounded ones might choose
        others.
        """
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        trained = {name for name in trained if not name.endswith(".scores")}
        state = {n: t.half() if n in trained else t for n, t in model.state_dict().items()}
        model.save_pretrained(str(folder), state_dict=state)

    def read(self, network: nn.Module, folder: Path) -> nn.Module:
        """Load by PEFT onto a fresh network."""
        return PeftModel.from_pretrained(network, str(folder))  # pyright: ignore[reportArgumentType]

    def config(self, model: Any) -> dict[str, Any] | None:
        """Return the configuration in force, as JSON has it."""
        return _plain(model.peft_config["default"].to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, set | list | tuple):
        return [_plain(one) for one in (sorted(value) if isinstance(value, set) else value)]
    return value.value if isinstance(value, enum.Enum) else value


@dataclass(frozen=True)
class Parameters:
    """A network's own parameters, trained as they are: all, biases, or none but the head.

    Attributes:
        parameters: Pattern that is found in the names of those that are.
    """

    parameters: str

    def on(self, network: nn.Module, seed: int) -> nn.Module:
        """Freeze all others of the body."""
        del seed  # nothing is drawn
        for name, parameter in network.named_parameters():
            is_head = name.startswith("head.")
            parameter.requires_grad_(is_head or re.search(self.parameters, name) is not None)
        return network

    def after_step(self, model: nn.Module, optimizer: Any) -> None:
        """Do nothing."""

    def write(self, model: nn.Module, folder: Path) -> None:
        """Save what was trained, and the statistics that moved, in float16."""
        kept = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.weight.requires_grad:
                kept |= {f"{name}.{key}": value for key, value in module.named_buffers()}
        halved = {name: t.half() if t.is_floating_point() else t for name, t in kept.items()}
        save_file({name: t.contiguous() for name, t in halved.items()}, folder / FILE)

    def read(self, network: nn.Module, folder: Path) -> nn.Module:
        """Put what was saved into a fresh network."""
        strange = network.load_state_dict(load_file(folder / FILE), strict=False).unexpected_keys
        if strange:
            message = f"{folder / FILE} has tensors that the network lacks: {strange}"
            raise RecipeError(message)
        return network

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        """None: it is none of PEFT's."""
        del model
        return None


class Voting(nn.Module):
    """Classes by the training inputs whose features are nearest (Wu et al., 2018).

    Each of the nearest ones votes for its class with exp(cosine similarity / temperature).
    """

    features: Tensor
    labels: Tensor

    def __init__(self, network: Any, kept: dict[str, Tensor], row: "Neighbours") -> None:
        """Take what `Neighbours.remember` returned."""
        super().__init__()
        self.body, self.classes = network.body, network.head.out_features
        self.count, self.temperature = row.neighbours, row.temperature
        self.register_buffer("features", kept["features"].float())
        self.register_buffer("labels", kept["labels"].long())

    def forward(self, inputs: Tensor) -> Tensor:
        """``[n, ...] -> [n, classes]``, the sums of votes."""
        found = nn.functional.normalize(self.body(inputs).float())
        with torch.autocast(inputs.device.type, enabled=False):  # votes are counted in float32
            near = found @ self.features.T
        near, which = near.topk(min(self.count, near.shape[1]), dim=1)
        votes = torch.zeros(len(near), self.classes, device=near.device)
        return votes.scatter_add_(1, self.labels[which], (near / self.temperature).exp())


@dataclass(frozen=True)
class Neighbours:
    """The training inputs' features are kept, nothing is trained.

    Attributes:
        neighbours: How many vote.
        temperature: Of their votes.
    """

    neighbours: int
    temperature: float

    def remember(self, forward: Callable[[Tensor], Tensor], train: tuple[Tensor, Tensor]) -> Any:
        """Return what is kept; ``forward`` maps inputs to features."""
        classes = int(train[1].max()) + 1
        kind = torch.uint8 if classes <= 256 else torch.int32
        found = NETWORKS.features(forward, train[0]).half()
        return {"features": found, "labels": train[1].cpu().to(kind)}

    def write(self, model: dict[str, Tensor], folder: Path) -> None:
        """Save it."""
        save_file(model, folder / FILE)

    def read(self, network: nn.Module, folder: Path) -> nn.Module:
        """Let what was saved vote on the features of a fresh network."""
        return Voting(network, load_file(folder / FILE), self)


Method = Adapter | Parameters | Neighbours
_KINDS = {"peft": Adapter, "parameters": Parameters, "neighbours": Neighbours}


def method(name: str, row: dict[str, Any]) -> Method:
    """Return the method of a row; a RecipeError if it cannot be read."""
    kinds = [kind for key, kind in _KINDS.items() if key in row]
    try:
        (kind,) = kinds
        return kind(**{key: value for key, value in row.items() if key not in ("rates", "rule")})
    except (TypeError, ValueError) as error:
        known = {key: [one.name for one in fields(kind)] for key, kind in _KINDS.items()}
        message = f"the arm {name!r} cannot be read: {error}; a row has one of {known}, "
        message += "and rates, rule"
        raise RecipeError(message) from error


def written(made: Method, model: Any, folder: Path) -> dict[str, int]:
    """Write what a method would keep into an empty folder; bytes by file name."""
    made.write(model, folder)
    return sizes(folder)
