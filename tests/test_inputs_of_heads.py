"""Heads of every kind run on their example inputs, and the plan sees each use of a weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pemn_surgery import plan
from pemn_surgery.inputs import example_inputs
from tests.zoo import transformers_models

pytestmark = pytest.mark.filterwarnings("ignore")  # random heads, low coverage of tied ones

B, L = 2, 12
TEXT = {"input_ids": (B, L), "attention_mask": (B, L)}
ONE = {"input_ids": (1, L), "attention_mask": (1, L)}  # without a padding token
CHOICES = {"input_ids": (B, 2, L), "attention_mask": (B, 2, L)}

# type, class -> the shape of every tensor that it gets
HEADS = {
    ("bert", "BertForMultipleChoice"): CHOICES,
    ("albert", "AlbertForMultipleChoice"): CHOICES,
    ("xmod", "XmodForMultipleChoice"): CHOICES,
    ("t5", "T5ForSequenceClassification"): {**TEXT, "decoder_input_ids": (B, L)},
    ("bart", "BartForSequenceClassification"): {**TEXT, "decoder_input_ids": (B, L)},
    ("llama", "LlamaForSequenceClassification"): ONE,
    ("gpt2", "GPT2ForSequenceClassification"): ONE,
    ("openai-gpt", "OpenAIGPTForSequenceClassification"): ONE,
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, Conv1D)


def heads():
    return [pytest.param(*key, id=key[1]) for key in HEADS]


def count_by_hand(model, inputs):
    """Return the numbers of weights that a forward multiplies with: all, and those not embedded."""
    ran = {}

    def note(layer, *_):
        ran[id(layer.weight)] = layer.weight

    for module in model.modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(**inputs)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tied = {id(table.weight) for table in tables}
    free = sum(weight.numel() for key, weight in ran.items() if key not in tied)
    return sum(weight.numel() for weight in ran.values()), free


def test_there_is_something_to_test():
    known = transformers_models.heads()
    assert len(known) > 1200
    assert len(HEADS) >= 8
    assert set(HEADS) <= set(known)


@pytest.mark.parametrize(("model_type", "name"), heads())
def test_head(model_type, name):
    model = transformers_models.build(model_type, name)
    assert type(model).__name__ == name
    inputs = example_inputs(model)
    found = {key: tuple(v.shape) for key, v in inputs.items() if isinstance(v, torch.Tensor)}
    assert found == HEADS[model_type, name]
    planned = plan(model)
    assert planned.untraced == ""
    assert "uses not seen" not in str(planned)
    ran, free = count_by_hand(model, inputs)
    assert (planned.maskable_weights, planned.masked_weights) == (ran, free)
    assert planned.coverage == free / ran > 0


def test_choices_are_different_texts():
    ids = example_inputs(transformers_models.build("bert", "BertForMultipleChoice"), batch=3)
    assert ids["input_ids"].shape == (3, 2, L)
    assert len(ids["input_ids"].flatten(0, 1).unique(dim=0)) == 6


def test_a_subclass_of_a_head_is_that_head():
    head = type(transformers_models.build("bert", "BertForMultipleChoice"))
    own = type("Own", (head,), {})(transformers_models.tiny_config("bert"))
    assert example_inputs(own)["input_ids"].shape == (B, 2, L)


def test_each_text_of_a_two_part_classifier_ends_once():
    model = transformers_models.build("bart", "BartForSequenceClassification")
    ends = example_inputs(model, batch=5)["input_ids"] == model.config.eos_token_id
    assert ends.sum(1).tolist() == [1] * 5
    assert ends[:, -1].all()


def test_a_classifier_with_a_padding_token_takes_a_batch():
    model = transformers_models.build("llama", "LlamaForSequenceClassification")
    assert model.config.pad_token_id is None
    assert example_inputs(model, batch=3)["input_ids"].shape == (1, L)
    model.config.pad_token_id = 0
    ids = example_inputs(model, batch=3)["input_ids"]
    assert ids.shape == (3, L)
    assert (ids != 0).all()
