"""A sample of the zoo, small and diverse: each model walks from plan to merge."""

import pytest
import torch

from pemn_surgery import plan
from pemn_surgery.models.inputs.examples import example_inputs
from tests.zoo import run
from tests.zoo.walk import OPTIONS, TIED, walk

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, by the dozen

TIMM = [
    "test_byobnet",
    "test_convnext",
    "test_convnext2",
    "test_efficientnet",
    "test_efficientnet_evos",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit2",
    "cspresnet50",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convmixer_768_32",
    "dla34",
    "crossvit_9_240",
    "edgenext_xx_small",
    "efficientformer_l1",
    "eva02_tiny_patch14_224",
    "ghostnet_100",
    "gmlp_ti16_224",
    "levit_128s",
    "mixnet_s",
    "mobilevit_xxs",
    "nf_resnet26",
    "pit_ti_224",
    "repvgg_a0",
    "sequencer2d_s",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_ns_224",
    "tf_efficientnet_cc_b0_4e",
    "xcit_nano_12_p16_224",
]

TRANSFORMERS = [
    "albert",
    "bart",
    "bert",
    "clip",
    "convnextv2",
    "data2vec-audio",
    "deberta-v2",
    "deepseek_v3",
    "dinov2",
    "electra",
    "falcon_mamba",
    "gpt2",
    "gpt_oss",
    "hubert",
    "ibert",
    "lfm2_moe",
    "llama",
    "mamba",
    "mixtral",
    "mobilenet_v1",
    "mobilebert",
    "nemotron_h",
    "rwkv",
    "siglip",
    "swinv2",
    "t5",
    "videomae",
    "whisper",
    "xlnet",
]


ROUTER = "a router, masked only if target_parameters names it"
PARAMETRISED = "is parametrised (weight norm or the like)"

# What of the maskable weights stays; of all models that are not here, nothing.
LEFT = {
    **dict.fromkeys(
        ["albert", "bart", "bert", "deberta-v2", "electra", "falcon_mamba"], frozenset({TIED})
    ),
    **dict.fromkeys(
        ["gpt2", "ibert", "mamba", "mobilebert", "t5", "whisper", "xlnet"], frozenset({TIED})
    ),
    **dict.fromkeys(["deepseek_v3", "gpt_oss", "mixtral", "nemotron_h"], frozenset({ROUTER})),
    "hubert": {PARAMETRISED},
    "lfm2_moe": {TIED, ROUTER},
}


@pytest.mark.parametrize(
    ("library", "name"),
    [*(("timm", name) for name in TIMM), *(("transformers", name) for name in TRANSFORMERS)],
)
def test_walk(library, name, tmp_path):
    assert name in run.names(library)
    model, _ = run.build(library, name)
    inputs = example_inputs(model, batch=1 if library == "timm" else 2)
    result = walk(model, inputs, tmp_path)
    assert (result.failed, result.error, result.untraced) == ("", "", "")
    assert result.targets > 0
    assert set(result.left) == LEFT.get(name, set())


def test_the_plan_sees_the_same_without_values():
    for name in ("beit_base_patch16_224", "swin_tiny_patch4_window7_224"):
        model, _ = run.build("timm", name)
        inputs = example_inputs(model, batch=1)
        assert plan(model, inputs=inputs, **OPTIONS) == plan(
            model.to(torch.device("meta")), inputs=inputs, **OPTIONS
        )
