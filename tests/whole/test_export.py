"""A merged model is the original's class with other numbers: it exports as the original does."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from pemn_surgery import pemnify
from tests.adapters import models
from tests.zoo.walk import describe

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters' own

OWN = {"bank": "own", "selector": "threshold", "score_init": "kaiming_uniform"}
RP = {"bank": "rp", "ratio": 0.1}


def bert():
    return models.bert(), {"input_ids": torch.arange(10).reshape(2, 5)}


def image_model(name):
    model = timm.create_model(name, num_classes=5)
    size = model.pretrained_cfg["input_size"]
    return model, {"x": torch.randn(2, *size, generator=torch.Generator().manual_seed(0))}


CASES = {
    "bert": bert,
    "test_vit": lambda: image_model("test_vit"),
    "test_resnet": lambda: image_model("test_resnet"),
    "test_nfnet": lambda: image_model("test_nfnet"),
}


def built(name):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    return model.eval().requires_grad_(requires_grad=False), inputs


def first(output):
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)


@pytest.mark.parametrize("bank", [OWN, RP], ids=["own", "rp"])
@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_exports_as_the_original(name, bank):
    original, inputs = built(name)
    merged = pemnify(built(name)[0], **bank, modules_to_save=[]).merge_and_unload()
    assert describe(merged) == describe(original)
    graphs = []
    for model in (original, merged):
        program = torch.export.export(model, (), inputs, strict=False)
        nodes = program.graph.nodes
        graphs.append([(n.op, str(n.target), [str(i) for i in n.all_input_nodes]) for n in nodes])
        exported = first(program.module()(**inputs))
        assert torch.allclose(exported, first(model(**inputs)), atol=1e-6)
    assert len(graphs[0]) > 20
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("name", ["bert", "test_vit", "test_resnet"])
def test_the_merged_model_runs_as_onnx(name, tmp_path):
    model, inputs = built(name)
    merged = pemnify(model, **OWN, modules_to_save=[]).merge_and_unload()
    expected = first(merged(**inputs)).numpy()
    path = str(tmp_path / "merged.onnx")
    torch.onnx.export(merged, (), path, kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    (given, *_) = session.run(None, feed)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)
