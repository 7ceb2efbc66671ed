"""`pemn merge --format onnx`: the graph gives the torch model's numbers, whatever the sizes."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers

from pemn_surgery import pemnify
from pemn_surgery.commands import cli
from pemn_surgery.commands.onnx_export import write_onnx
from pemn_surgery.errors import ConfigError, ExportError
from pemn_surgery.models.inputs.examples import example_inputs
from tests.adapters import models

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the exporter's own
    models.ignore_peft_on_transformers,
]

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def ran(path, feed):
    """The outputs of a graph by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {item.name for item in session.get_inputs()} == set(feed)
    names = [item.name for item in session.get_outputs()]
    given = session.run(names, {name: value.numpy() for name, value in feed.items()})
    return dict(zip(names, given, strict=True))


def assert_near(given, expected):
    assert float(expected.abs().max()) > 0
    np.testing.assert_allclose(given, expected.detach().numpy(), rtol=1e-3, atol=1e-4)


def texts(batch, length, *, padded):
    """Random texts; of the odd ones the last two words are padding."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(4, 40, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1::2, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


LANGUAGE = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, num_labels=3)
    ),
    "bert_qa": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)),
    "bare_bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            vocab_size=40,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}
NAMES = {
    "bert_qa": ["start_logits", "end_logits"],
    "bare_bert": ["last_hidden_state", "pooler_output"],
}


@pytest.mark.parametrize("which", LANGUAGE)
def test_texts_of_any_batch_and_length(which, tmp_path):
    torch.manual_seed(0)
    model = LANGUAGE[which]().eval()
    said = write_onnx(model, tmp_path / "model.onnx")
    assert [*said["outputs"]] == NAMES.get(which, ["logits"])
    assert set(said["inputs"]) == {"input_ids", "attention_mask"}
    sizes = said["inputs"]["input_ids"]
    assert all(isinstance(size, str) for size in sizes), sizes
    for batch, length in ((1, 3), (2, 12), (5, 31)):
        for padded in (False, True):
            feed = texts(batch, length, padded=padded)
            with torch.no_grad():
                expected = model(**feed)
            given = ran(tmp_path / "model.onnx", feed)
            assert [*given] == [*said["outputs"]]
            for name, value in given.items():
                assert_near(value, expected[name])


@pytest.mark.parametrize(
    ("name", "options", "output"),
    [("test_resnet", {}, "logits"), ("test_vit", {"num_classes": 0}, "features"),
     ("test_vit", {"img_size": 64}, "logits")], ids=str,
)  # fmt: skip
def test_images_of_the_models_own_size(name, options, output, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    own = options.get("img_size", model.pretrained_cfg["input_size"][-1])
    said = write_onnx(model, tmp_path / "model.onnx")
    assert said["inputs"]["x"][1:] == [3, own, own]
    assert isinstance(said["inputs"]["x"][0], str)
    assert [*said["outputs"]] == [output]
    for batch in (1, 3):
        x = models.images(batch, count=batch, size=own)
        assert_near(ran(tmp_path / "model.onnx", {"x": x})[output], model(x))


def test_images_of_the_size_that_is_asked_for(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    said = write_onnx(model, tmp_path / "model.onnx", (64, 96))
    assert said["inputs"]["x"][1:] == [3, 64, 96]
    x = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert_near(ran(tmp_path / "model.onnx", {"x": x})["logits"], model(x))


def test_a_224_network_gets_224():
    """The size of the small inputs that a plan follows a forward with is not the export's."""
    from pemn_surgery.commands.onnx_export import _sized

    model = timm.create_model("resnet18")
    assert example_inputs(model)["x"].shape[-1] == 128
    assert _sized(model, example_inputs(model), None)["x"].shape[-2:] == (224, 224)


def test_outputs_in_a_list_are_numbered(tmp_path):
    model = timm.create_model("test_resnet", features_only=True).eval()
    said = write_onnx(model, tmp_path / "model.onnx", (64, 64))
    x = models.images(0, count=2, size=64)
    given = ran(tmp_path / "model.onnx", {"x": x})
    expected = model(x)
    assert len(expected) == 5
    assert [*given] == [*said["outputs"]] == [f"features_{place}" for place in range(5)]
    for value, wanted in zip(given.values(), expected, strict=True):
        assert_near(value, wanted)


def test_a_size_that_the_model_does_not_take(tmp_path):
    model = timm.create_model("test_vit")
    with pytest.raises(ExportError) as caught:
        write_onnx(model, tmp_path / "model.onnx", (100, 100))
    models.says(str(caught.value), "(2, 3, 100, 100)", "--input-size", "Nothing was written")
    assert not (tmp_path / "model.onnx").exists()


def test_a_size_of_images_for_a_model_of_texts(tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_onnx(models.bert(), tmp_path / "model.onnx", (64, 64))
    models.says(str(caught.value), "64x64", "input_ids", "Leave it out")


@pytest.fixture
def refusing(monkeypatch):
    """torch's exporter, as where it does not know an operator; what it was asked for."""
    asked = []

    def refuse(*_, dynamic_shapes, **__):
        asked.append(dynamic_shapes)
        raise RuntimeError("\nno such operator\nand a long report")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    return asked


def test_what_torch_cannot_export_is_one_sentence(refusing, tmp_path):
    with pytest.raises(ExportError) as caught:
        write_onnx(models.bert(), tmp_path / "model.onnx")
    text = str(caught.value)
    models.says(text, "cannot export BertForSequenceClassification", "no such operator")
    assert "\n" not in text
    assert [set(shapes["input_ids"]) for shapes in refusing] == [{0, 1}, {0}]


def test_the_command(tmp_path, capsys):
    """From an adapter to a graph, and what is said of it."""
    torch.manual_seed(0)
    model = models.train(
        pemnify(timm.create_model("test_resnet", num_classes=4), bank="rp", seed=7)
    )
    model.save_pretrained(str(tmp_path / "task"))
    out = tmp_path / "deep" / "out"
    words = ["merge", tmp_path / "task", "test_resnet", "--model-arg", "num_classes=4"]
    words += ["--out", out, "--format", "onnx", "--input-size", "64", "--json"]
    assert cli.main([str(word) for word in words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["inputs"]["x"][1:] == [3, 64, 64]
    assert said["outputs"]["logits"][1:] == [4]
    x = models.images(3, count=7, size=64)
    assert_near(ran(out / "model.onnx", {"x": x})["logits"], models.logits(model, x))


def test_without_onnx_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    words = ["merge", "task", "test_resnet", "--out", str(tmp_path / "out"), "--format", "onnx"]
    assert cli.main(words) == 2
    models.says(capsys.readouterr().err, "ImportError", "pip install onnx")
    assert not (tmp_path / "out").exists()
