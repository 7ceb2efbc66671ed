"""A task's head is trained and saved whole, for every task that PEFT has one for."""

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from pemn_surgery import PemnConfig, pemnify, plan
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 2,
}  # fmt: skip
HEADS = {
    "SEQ_CLS": ("BertForSequenceClassification", "classifier", ["classifier", "score"]),
    "TOKEN_CLS": ("BertForTokenClassification", "classifier", ["classifier", "score"]),
    "QUESTION_ANS": ("BertForQuestionAnswering", "qa_outputs", ["qa_outputs"]),
}


def built(task, seed=0):
    torch.manual_seed(seed)
    return getattr(transformers, HEADS[task][0])(transformers.BertConfig(**SIZES)).eval()


def outputs(model):
    with torch.no_grad():
        found = model.eval()(input_ids=models.tokens())
    return (
        found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits])
    )


@pytest.mark.parametrize("bank", ["own", "rp"])
@pytest.mark.parametrize("task", HEADS)
def test_plan_says_what_is_saved(task, bank, tmp_path):
    _, head, listed = HEADS[task]
    planned = plan(built(task), bank=bank, task_type=task)
    assert [item.name for item in planned.whole] == [f"{head}.weight", f"{head}.bias"]
    model = pemnify(built(task), bank=bank, task_type=task)
    for name, parameter in model.named_parameters():
        if f"{head}.modules_to_save.default" in name:
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / models.WEIGHTS_FILE)
    masks = {key for key in tensors if ".pemn_masks." in key}
    has_pooler = task == "SEQ_CLS"
    assert len(masks) == len(planned.targets) == 6 + has_pooler  # query, key, value, 3 dense
    assert all(key.endswith(".bits") for key in masks)
    heads = {key: value for key, value in tensors.items() if head in key}
    assert set(heads) == {f"base_model.model.{head}.{kind}" for kind in ("weight", "bias")}
    assert all(bool((value == 0.5).all()) for value in heads.values())
    assert PemnConfig.from_pretrained(str(tmp_path)).modules_to_save == listed
    again = PeftModel.from_pretrained(built(task, 0 if bank == "own" else 1), str(tmp_path))
    models.assert_equal(outputs(again), outputs(model))


def test_heads_that_are_named_already_are_named_once():
    options = {
        "bank": "own",
        "selector": "topk",
        "task_type": "TOKEN_CLS",
        "modules_to_save": ["classifier"],
    }
    planned = plan(built("TOKEN_CLS"), **options)
    assert [item.name for item in planned.whole] == ["classifier.weight", "classifier.bias"]
