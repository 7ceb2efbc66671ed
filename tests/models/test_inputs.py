"""Example inputs are what the configuration says, run, and leave nothing behind."""

import subprocess
import sys

import pytest
import timm
import torch
import transformers
from torch import nn

from pemn_surgery.errors import ExampleInputsError
from pemn_surgery.models.inputs.examples import example_inputs
from tests.zoo import transformers_models

B = 2  # batch
TEXT = {"input_ids": (B, 12), "attention_mask": (B, 12)}
TARGET = {"decoder_input_ids": (B, 6)}

# type -> the shape of every tensor that it gets, from its tiny configuration
TRANSFORMERS = {
    "bert": TEXT,
    "gpt2": TEXT,
    "llama": TEXT,
    "mixtral": TEXT,
    "mamba": TEXT,
    "albert": TEXT,
    "layoutlm": {**TEXT, "bbox": (B, 12, 4)},
    "t5": {**TEXT, **TARGET},
    "bart": {**TEXT, **TARGET},
    "encoder-decoder": {**TEXT, **TARGET},
    "vit": {"pixel_values": (B, 3, 224, 224)},
    "convnext": {"pixel_values": (B, 3, 224, 224)},
    "vision-encoder-decoder": {"pixel_values": (B, 3, 224, 224), **TARGET},
    "clip": {**TEXT, "pixel_values": (B, 3, 224, 224)},
    "detr": {"pixel_values": (B, 3, 224, 224)},
    "videomae": {"pixel_values": (B, 16, 3, 224, 224)},
    "wav2vec2": {"input_values": (B, 7680)},
    "whisper": {"input_features": (B, 80, 3000), **TARGET},
    "audio-spectrogram-transformer": {"input_values": (B, 1024, 128)},
    "encodec": {"input_values": (B, 1, 9600)},
    "time_series_transformer": {
        "past_values": (B, 31),
        "past_time_features": (B, 31, 0),
        "past_observed_mask": (B, 31),
        "future_values": (B, 8),
        "future_time_features": (B, 8, 0),
    },
    "decision_transformer": {
        "states": (B, 6, 17),
        "actions": (B, 6, 4),
        "rewards": (B, 6, 1),
        "returns_to_go": (B, 6, 1),
        "timesteps": (B, 6),
        "attention_mask": (B, 6),
    },
    # 24 x 24 patches of 14 pixels: as many placeholder tokens before 12 ordinary ones
    "llava": {
        "input_ids": (B, 588),
        "attention_mask": (B, 588),
        "pixel_values": (B, 3, 336, 336),
    },
    # 8 x 8 patches of 2 x 3 x 14 x 14 numbers an image, merged in fours
    "qwen2_vl": {
        "input_ids": (B, 28),
        "attention_mask": (B, 28),
        "mm_token_type_ids": (B, 28),
        "pixel_values": (B * 64, 1176),
        "image_grid_thw": (B, 3),
    },
    # takes one example only, of as many frames as its learned ones
    "tvp": {"input_ids": (1, 12), "attention_mask": (1, 12), "pixel_values": (1, 2, 3, 224, 224)},
    # 16 x 16 patches of 14 pixels, put before the text by the type's own rule
    "pi0": {
        "state": (B, 32),
        "noise": (B, 50, 32),
        "timestep": (B,),
        "input_ids": (B, 268),
        "attention_mask": (B, 268),
        "pixel_values": (B, 1, 3, 224, 224),
        "pixel_attention_mask": (B, 1),
    },
    # 50 frames of sound (400, halved three times) and 16 squares of patches before 12 tokens
    "dots3_note": {
        "input_ids": (B, 78),
        "attention_mask": (B, 78),
        "pixel_values": (B * 64, 588),
        "image_grid_thw": (B, 3),
        "input_features": (B, 64, 400),
        "chunk_sample_lengths": (B,),
    },
    # 4 x 4 features of the whole image, 4 x (8 + one at the end of a row) of its two tiles
    "granite4_vision": {
        "input_ids": (B, 64),
        "attention_mask": (B, 64),
        "pixel_values": (B, 3, 3, 256, 256),
        "image_sizes": (B, 2),
    },
}

# name, options -> channels, height, width
TIMM = [
    ("test_resnet", {}, (3, 128, 128)),  # any size
    ("test_vit", {}, (3, 160, 160)),  # a fixed size
    ("test_vit", {"img_size": 64}, (3, 64, 64)),
    ("test_convnext", {"in_chans": 1}, (1, 128, 128)),
    ("test_efficientnet", {}, (3, 128, 128)),
    ("test_byobnet", {}, (3, 128, 128)),
    ("test_nfnet", {}, (3, 128, 128)),
    ("test_mambaout", {}, (3, 128, 128)),
]


def tensors(inputs):
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def check(model, shapes):
    mode = model.training
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    inputs, again = example_inputs(model), example_inputs(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is mode
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    found = tensors(inputs)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    dtypes = {torch.float32, torch.int64, torch.bool}
    assert {tensor.dtype for tensor in found.values()} <= dtypes
    assert all(torch.equal(found[name], again[name]) for name in found)
    with torch.no_grad():
        model(**inputs)
    return inputs


def test_there_is_something_to_test():
    assert len(TRANSFORMERS) >= 24
    known = set(transformers_models.model_types())
    assert len(known) > 600
    assert len(set(TRANSFORMERS) - known) <= 1  # of a release that this Python does not get


@pytest.mark.filterwarnings("default")  # old types warn about themselves when they are built
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_transformers(model_type):
    if model_type not in transformers_models.model_types():
        pytest.skip(f"this transformers has no {model_type}")
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if model_type == "granite4_vision" and release < (5, 20):
        pytest.skip("this transformers composes it of a text model that it cannot run")
    model = transformers_models.build(model_type)
    inputs = check(model, TRANSFORMERS[model_type])
    assert inputs.get("use_cache", False) is False


@pytest.mark.parametrize(("name", "options", "shape"), TIMM)
def test_timm(name, options, shape):
    check(timm.create_model(name, **options).eval(), {"x": (B, *shape)})


def test_batch():
    model = transformers_models.build("llava")
    inputs = example_inputs(model, batch=3)
    assert {len(tensor) for tensor in tensors(inputs).values()} == {3}


def test_placeholders_stand_before_ordinary_tokens():
    model = transformers_models.build("llava")
    ids = example_inputs(model)["input_ids"]
    places = ids == model.config.image_token_id
    assert places[:, :576].all()
    assert not places[:, 576:].any()


def test_a_mask_that_older_releases_index_with_is_bool():
    mask = example_inputs(transformers_models.build("pi0"))["pixel_attention_mask"]
    assert torch.equal(mask, torch.ones(B, 1, dtype=torch.bool))


def test_training_mode_and_dropout_change_nothing():
    model = transformers_models.build("llava").train()
    model.model.language_model.eval()
    modes = [module.training for module in model.modules()]
    expected = example_inputs(transformers_models.build("llava"))["input_ids"]
    assert torch.equal(example_inputs(model)["input_ids"], expected)
    assert [module.training for module in model.modules()] == modes


def test_ordinary_tokens_only():
    model = transformers_models.build("bert")
    model.config.eos_token_id = [5, 6, 7]
    ids = example_inputs(model, batch=64)["input_ids"]
    assert not torch.isin(ids, torch.tensor([0, 5, 6, 7])).any()  # 0 pads


def test_built_models_are_tiny_and_equal():
    one, two = (transformers_models.build("gpt2", seed=3) for _ in range(2))
    other = transformers_models.build("gpt2", seed=4)
    name, weight = next(iter(one.named_parameters()))
    assert torch.equal(weight, dict(two.named_parameters())[name])
    assert not torch.equal(weight, dict(other.named_parameters())[name])
    assert sum(tensor.numel() for tensor in one.parameters()) < 1_000_000
    assert not one.training


def test_module_without_configuration_is_refused():
    class Plain(nn.Module):
        def forward(self, left, right):
            return left + right

    with pytest.raises(ExampleInputsError, match=r"Plain .*left, right.*give `inputs=` yourself"):
        example_inputs(Plain())


def test_unknown_argument_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"model_type": "odd"})()

        def forward(self, input_ids, gizmo):
            return input_ids

    with pytest.raises(ExampleInputsError, match=r"Odd needs gizmo.*give `inputs=` yourself"):
        example_inputs(Odd())


def test_wrapped_model_is_asked_for_its_base():
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def get_base_model(self):
            return self.base

        def forward(self, *args, **kwargs):
            return self.base(*args, **kwargs)

    base = timm.create_model("test_resnet").eval()
    assert torch.equal(example_inputs(Wrapper(base))["x"], example_inputs(base)["x"])


def test_import_needs_neither_transformers_nor_timm():
    code = (
        "import sys, pemn_surgery.models.inputs.examples;"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
