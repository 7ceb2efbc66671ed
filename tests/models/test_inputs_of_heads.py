"""Heads of every kind run on their example inputs, and the plan sees each use of a weight."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from pemn_surgery import plan
from pemn_surgery.models.inputs.arguments import Asked, half_of_patches
from pemn_surgery.models.inputs.examples import example_inputs
from tests.zoo import transformers_models
from tests.zoo.walk import outputs

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
    ("bert", "BertForNextSentencePrediction"): TEXT,
    ("bert", "BertForMaskedLM"): TEXT,
    ("bert", "BertForTokenClassification"): TEXT,
    ("longformer", "LongformerForQuestionAnswering"): TEXT,
    ("longformer", "LongformerForMultipleChoice"): CHOICES,
    ("t5", "T5ForQuestionAnswering"): {**TEXT, "decoder_input_ids": (B, 6)},
    ("t5", "T5ForTokenClassification"): TEXT,
    # a text is answered by another one
    ("blip", "BlipForQuestionAnswering"): {
        **TEXT,
        "pixel_values": (B, 3, 384, 384),
        "decoder_input_ids": (B, 6),
    },
    ("vit", "ViTForImageClassification"): {"pixel_values": (B, 3, 224, 224)},
    ("segformer", "SegformerForSemanticSegmentation"): {"pixel_values": (B, 3, 224, 224)},
    ("glpn", "GLPNForDepthEstimation"): {"pixel_values": (B, 3, 224, 224)},
    ("vision-encoder-decoder", "VisionEncoderDecoderModel"): {
        "pixel_values": (B, 3, 224, 224),
        "decoder_input_ids": (B, 6),
    },
    ("whisper", "WhisperForAudioClassification"): {"input_features": (B, 80, 3000)},
    ("speecht5", "SpeechT5ForTextToSpeech"): {
        **TEXT,
        "decoder_input_values": (B, 6, 80),
        "speaker_embeddings": (B, 512),
    },
    # neither part makes states of sound or text
    ("speecht5", "SpeechT5Model"): {
        "input_values": (B, L, 64),
        "decoder_input_values": (B, 6, 64),
        "speaker_embeddings": (B, 512),
    },
    ("patchtst", "PatchTSTForClassification"): {"past_values": (B, 32, 1)},
    ("timesfm", "TimesFmModel"): {
        "past_values": (B, 64),
        "past_values_padding": (B, 64),
        "freq": (B,),
    },
    ("pi0", "PI0Model"): {
        "action_embeds": (B, 50, 64),
        "input_ids": (B, 268),
        "attention_mask": (B, 268),
        "pixel_values": (B, 1, 3, 224, 224),
        "pixel_attention_mask": (B, 1),
    },
    ("gemma4_unified_assistant", "Gemma4UnifiedAssistantForCausalLM"): {
        "inputs_embeds": (B, L, 128)
    },
}

# Heads whose plan counts weights that their forward leaves out or that are no layer's own.
SHAPES_ONLY = {
    ("blip-2", "Blip2ForImageTextRetrieval"): {  # 32 queries before the text
        "pixel_values": (B, 3, 224, 224),
        "input_ids": (B, 44),
        "attention_mask": (B, 44),
    },
    ("musicgen", "MusicgenForCausalLM"): {"input_ids": (B * 4, 6)},  # four codebooks
    ("flava", "FlavaForPreTraining"): {
        **TEXT,
        "pixel_values": (B, 3, 224, 224),
        "codebook_pixel_values": (B, 3, 112, 112),
        "bool_masked_pos": (B, 196),
    },
    ("jev", "JevForDecision"): {
        "input_ids": (1, L),
        "marks": (1, 2),
        "num_options": (1, 2),
        "question_type_ids": (1, 2),
    },
    ("xlnet", "XLNetForMultipleChoice"): CHOICES,
    ("wav2vec2", "Wav2Vec2ForCTC"): {"input_values": (B, 7680)},
}
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, Conv1D)


def heads(table):
    return [pytest.param(*key, id=key[1]) for key in table]


def inputs_that_run(model_type, name, shapes):
    """Return a head and its inputs, whose shapes are these, on which it runs."""
    known = transformers_models.heads()
    if (model_type, name) not in known:
        pytest.skip(f"this transformers has no {name}")
    model = build(model_type, name)
    assert type(model).__name__ == name
    inputs = example_inputs(model)
    found = {key: tuple(v.shape) for key, v in inputs.items() if isinstance(v, torch.Tensor)}
    assert found == shapes
    assert outputs(model, inputs)
    return model, inputs


def build(model_type, name=None):
    """Build a head; in older releases a few cannot read their own configurations."""
    try:
        return transformers_models.build(model_type, *([name] if name else []))
    except Exception as error:
        if TRANSFORMERS < (5, 21):
            pytest.skip(f"this transformers cannot build {name or model_type}: {error}")
        raise


def count_by_hand(model, inputs):
    """Return how many weights a forward multiplies with, and how many of them no table has too."""
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
    table = {**HEADS, **SHAPES_ONLY}
    assert len(table) == len(HEADS) + len(SHAPES_ONLY) >= 33
    missing = {name for _, name in set(table) - set(known)}
    assert len(missing) <= 3  # of releases that this Python does not get
    tasks = {task for key in set(table) & set(known) for task in known[key]}
    assert len(tasks) >= 20


@pytest.mark.parametrize(("model_type", "name"), heads(HEADS))
def test_head(model_type, name):
    model, inputs = inputs_that_run(model_type, name, HEADS[model_type, name])
    planned = plan(model)
    assert planned.untraced == ""
    assert "uses not seen" not in str(planned)
    ran, free = count_by_hand(model, inputs)
    assert (planned.maskable_weights, planned.masked_weights) == (ran, free)
    assert planned.coverage == free / ran > 0


@pytest.mark.parametrize(("model_type", "name"), heads(SHAPES_ONLY))
def test_head_by_its_shapes(model_type, name):
    model, _ = inputs_that_run(model_type, name, SHAPES_ONLY[model_type, name])
    planned = plan(model)
    assert planned.untraced == ""
    assert planned.coverage > 0.9


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


def test_pairs_of_texts_have_their_separators():
    model = transformers_models.build("longformer", "LongformerForQuestionAnswering")
    separators = example_inputs(model)["input_ids"] == model.config.sep_token_id
    assert separators.nonzero()[:, 1].tolist() == [3, 4, L - 1] * B


def test_every_second_patch_is_hidden():
    video = SimpleNamespace(config=transformers_models.tiny_config("videomae"))
    hidden = half_of_patches(Asked(video, B, {}))
    assert hidden.shape == (B, 8 * 14 * 14)  # two frames a patch
    assert hidden.sum(1).tolist() == [4 * 14 * 14] * B


def test_series_are_listed_where_no_mask_pads_them():
    listed = example_inputs(transformers_models.build("timesfm"))["past_values"]
    assert [len(series) for series in listed] == [64] * B


def test_keys_and_values_come_for_each_kind_of_layer():
    known = transformers_models.model_types()
    if "gemma4_unified_assistant" not in known:
        pytest.skip("this transformers has no gemma4_unified_assistant")
    model = build("gemma4_unified_assistant")
    shared = example_inputs(model)["shared_kv_states"]
    assert set(shared) == {"full_attention", "sliding_attention"}
    assert {keys.shape[::2] for pair in shared.values() for keys in pair} == {(B, L)}


def test_a_classifier_with_a_padding_token_takes_a_batch():
    model = transformers_models.build("llama", "LlamaForSequenceClassification")
    assert model.config.pad_token_id is None
    assert example_inputs(model, batch=3)["input_ids"].shape == (1, L)
    model.config.pad_token_id = 0
    ids = example_inputs(model, batch=3)["input_ids"]
    assert ids.shape == (3, L)
    assert (ids != 0).all()
