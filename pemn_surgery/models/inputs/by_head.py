"""What heads take differently from the model below them.

What a head is for is told by the name that transformers gives its class, or a class that this is
derived from: ``BertForMultipleChoice`` is for multiple choice.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pemn_surgery.models.inputs.arguments import MAKERS, TEXT_LENGTH, Asked, Maker, listed, text

CHOICES = 2  # that an example of multiple choice has


def is_for(model: nn.Module, task: str) -> bool:
    """Tell whether a model's head is for a task, written as in names of classes."""
    return any(f"For{task}" in kind.__name__ for kind in type(model).__mro__)


def takes_one(model: Any) -> bool:
    """Tell whether a head takes one text at a time: it looks for the last token before the pads."""
    if not is_for(model, "SequenceClassification"):
        return False
    config = model.config
    about_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(about_text, "pad_token_id", None) is None


def rules_of_head(asked: Asked) -> dict[str, Maker]:
    """Return what a head is given beside or instead of what its arguments' names say."""
    if is_for(asked.model, "QuestionAnswering") or is_for(asked.model, "MultipleChoice"):
        return {"input_ids": _pair_of_texts, "decoder_input_ids": MAKERS["decoder_input_ids"]}
    if is_for(asked.model, "ImageTextRetrieval") and asked.number("num_query_tokens"):
        return {
            "input_ids": _queries_and_text,
            "attention_mask": lambda asked: torch.ones_like(_queries_and_text(asked)),
        }
    two_parts = getattr(asked.config, "is_encoder_decoder", False)
    if two_parts and is_for(asked.model, "SequenceClassification"):
        # It reads the decoder's states where the encoder's text ends.
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


def _queries_and_text(asked: Asked) -> Tensor:
    """Return texts after the tokens of what an image is asked (batch, queries + length)."""
    queries = torch.full(
        (asked.batch, asked.number("num_query_tokens")), asked.placeholder("image") or 0
    )
    return torch.cat([queries, text(asked)], dim=1)


def _pair_of_texts(asked: Asked) -> Tensor:
    """Return pairs of texts, with two separators between and one at the end (batch, length)."""
    found = text(asked)
    separator = getattr(asked.config, "sep_token_id", None)
    if separator is not None:
        found[:, [3, 4, -1]] = separator
    return found
