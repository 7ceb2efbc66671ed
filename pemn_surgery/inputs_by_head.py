"""What heads take differently from the model below them.

What a head is for is told by the name that transformers gives its class, or a class that this is
derived from: ``BertForMultipleChoice`` is for multiple choice.
"""

from typing import Any

from torch import Tensor, nn

from pemn_surgery.inputs_transformers import TEXT_LENGTH, Asked, Maker, listed, text

CHOICES = 2  # that an example of multiple choice has


def is_for(model: nn.Module, task: str) -> bool:
    """Tell whether a model's head is for a task, written as in names of classes."""
    return any(f"For{task}" in kind.__name__ for kind in type(model).__mro__)


def takes_one(model: Any) -> bool:
    """Tell whether a head takes one text at a time: it looks for the last token before the pads."""
    config = model.config
    about_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    no_pads = getattr(about_text, "pad_token_id", None) is None
    return no_pads and is_for(model, "SequenceClassification")


def rules_of_head(asked: Asked) -> dict[str, Maker]:
    """Return the makers that replace the general ones."""
    if not getattr(asked.config, "is_encoder_decoder", False):
        return {}
    if is_for(asked.model, "SequenceClassification"):  # it reads the decoder where the text ends
        return {
            "input_ids": _text_with_an_end,
            "decoder_input_ids": lambda asked: text(asked, TEXT_LENGTH),
        }
    return {}


def _text_with_an_end(asked: Asked) -> Tensor:
    """Return texts that end with the token for that (batch, length)."""
    found = text(asked)
    ends = listed(asked.config.eos_token_id)
    if ends != [None]:
        found[:, -1] = ends[0]
    return found
