"""What a plan says a task's files weigh is what they weigh."""

import re

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

from pemn_surgery import pemnify, plan
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers


def resnet(dtype=torch.float32):
    return timm.create_model("test_resnet", num_classes=4).to(dtype)


def half_resnet():
    return resnet(torch.bfloat16)


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 30}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    )


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


CASES = [
    (resnet, {"bank": "own", "selector": "topk"}),
    (resnet, {"bank": "own", "selector": "topk", "rest": "train"}),
    (resnet, {"bank": "mp", "seed": 123_456}),
    (resnet, {"bank": "one_layer", "rest": "freeze"}),
    (resnet, {"bank": "own", "selector": "topk", "rest": "norms", "modules_to_save": ["fc"]}),
    (half_resnet, {"bank": "own", "selector": "topk"}),
    (half_resnet, {"bank": "rp", "ratio": 0.1}),
    (half_resnet, {"bank": "own", "selector": "topk", "rest": "norms", "modules_to_save": ["fc"]}),
    (models.net, {"bank": "own", "bank_init": "signed_constant", "scale": "sqrt_density"}),
    (models.bert, {"bank": "own", "selector": "topk", "task_type": "SEQ_CLS"}),
    (models.bert, {"bank": "rp", "target_modules": ["query", "value"]}),
    (
        models.bert,
        {
            "bank": "own",
            "selector": "topk",
            "target_modules": ".*query",
            "exclude_modules": ["layer.0"],
        },
    ),
    (models.bert, {"bank": "own", "selector": "topk", "target_modules": "all-linear"}),
    (gpt2, {"bank": "rp"}),
    (
        gpt2,
        {"bank": "own", "selector": "topk", "tied": "both", "target_modules": ["c_attn", "wte"]},
    ),
    (gpt2, {"bank": "own", "selector": "topk", "tied": "untie", "task_type": "CAUSAL_LM"}),
    (mixtral, {"bank": "rp"}),
]


@pytest.mark.parametrize(
    ("make", "options"), CASES, ids=[f"{make.__name__} {options}" for make, options in CASES]
)
def test_said_is_saved(make, options, tmp_path):
    planned = plan(make(), **options)
    model = pemnify(make(), **options)
    model.save_pretrained(str(tmp_path))
    files = [tmp_path / models.WEIGHTS_FILE, tmp_path / "adapter_config.json"]
    sizes = [path.stat().st_size for path in files]
    assert planned.file_bytes == sum(sizes)
    assert planned.as_dict()["totals"]["file_bytes"] == sum(sizes)
    assert planned.ratio(4) == 4 * planned.parameters / sum(sizes)
    tensors = load_file(files[0])
    masks = sum(value.nbytes for key, value in tensors.items() if ".pemn_masks." in key)
    assert planned.mask_bytes == masks > 0
    assert planned.other_bytes == sum(value.nbytes for value in tensors.values()) - masks
    shown = re.sub(r"\s+", " ", str(planned))
    assert f"{sum(sizes):,} in its two files" in shown


def test_said_without_weights_is_saved(tmp_path):
    """A plan of a model on the meta device, and a save of the one with weights."""
    with torch.device("meta"):
        planned = plan(resnet(), bank="own", selector="topk")
    pemnify(resnet(), bank="own", selector="topk").save_pretrained(str(tmp_path))
    names = (models.WEIGHTS_FILE, "adapter_config.json")
    assert planned.file_bytes == sum((tmp_path / name).stat().st_size for name in names)
