"""Data sets of texts, as padded rows of token ids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pemn_surgery.recipe import sources
from pemn_surgery.recipe.classification import Classification, Split
from pemn_surgery.recipe.options import ImageOptions

# From texts and a number of tokens to ids int64 ``[n, tokens]``, padded at their ends.
Tokenize = Callable[[list[str], int], Tensor]
_TRIAL = {"train": 96, "test": 64}  # texts of each split
_VOCABULARY = 64  # of a trial; 0 pads


@dataclass(frozen=True)
class TextData:
    """A row of a recipe's ``[data]``.

    Attributes:
        source: Hub id, or folder for ``datasets.load_dataset``.
        text: Name of the text column.
        label: Name of the label column.
        tokens: Longer texts are cut to so many.
        test: Name of the split that is tested with.
        validation: Name of one that choices are made by; none: it has none.
        metric: What the test split is measured by.
    """

    source: str
    text: str
    label: str
    tokens: int
    test: str = "test"
    validation: str = ""
    metric: str = "accuracy"

    def load(self, options: ImageOptions, tokenize: Tokenize | None) -> dict[str, Split]:
        """Return its splits: the options' source or the row's own.

        Returns:
            ``{"train": (ids, labels), "test": ...}``: int64 ``[n, tokens]`` and ``[n]``; for
            ``smoke``, or without a tokenizer, random ones of two classes. A RecipeError names what
            is missing.
        """
        if options.smoke or tokenize is None:
            return {name: self._random(n) for name, n in _TRIAL.items()}
        source = sources.place(options.case, options.data, self.source)
        given = sources.read(source, self.splits, (self.text, self.label), options.work)
        return {
            name: (
                tokenize([*columns[self.text]], self.tokens),
                torch.tensor([*columns[self.label]]),
            )
            for name, columns in given.items()
        }

    def _random(self, count: int) -> Split:
        made = torch.Generator().manual_seed(count)
        ids = torch.randint(1, _VOCABULARY, (count, self.tokens), generator=made)
        lengths = torch.randint(1, self.tokens + 1, (count, 1), generator=made)
        return ids * (torch.arange(self.tokens) < lengths), torch.arange(count) % 2

    @property
    def splits(self) -> dict[str, str]:
        """Names of its splits by what they are for."""
        named = {"train": "train", "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split}

    def task(self, splits: Mapping[str, Split]) -> Classification:
        """Return what the runner trains on."""
        return Classification(splits["train"], splits["test"], metric=self.metric)
