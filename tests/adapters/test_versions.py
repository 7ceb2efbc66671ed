"""A pair of transformers and PEFT that transformers refuses, said in our words."""

import re

import peft
import pytest
import torch
import transformers
import transformers.integrations.peft as integration
from peft import PeftModel, get_peft_model

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import VersionsError
from tests.adapters import models


@pytest.fixture
def refused(monkeypatch):
    """A transformers that asks for a PEFT which is not out yet."""
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0.0")


def said(method):
    return re.escape(
        f"model.{method} of transformers {transformers.__version__} needs peft >= 99.0.0, and "
        f"peft {peft.__version__} is installed. pemnify(model, ...), "
    )


def test_add_adapter_says_which_versions_met_and_what_works(refused):
    base = models.bert()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(VersionsError, match=said("add_adapter")):
        base.add_adapter(PemnConfig(bank="own", selector="threshold"))
    models.assert_same_tensors(base.state_dict(), before)
    assert not hasattr(base, "peft_config")


def test_load_adapter_says_so_too(refused, tmp_path):
    pemnify(models.bert(), bank="own", selector="threshold").save_pretrained(tmp_path)
    base = models.bert()
    with pytest.raises(VersionsError, match=said("load_adapter")):
        base.load_adapter(str(tmp_path))
    assert not hasattr(base, "peft_config")


def test_what_the_sentence_offers_works_with_the_refused_pair(refused, tmp_path):
    adapted = get_peft_model(models.bert(), PemnConfig(bank="own", density=0.5)).eval()
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.bert(), tmp_path).eval()
    with torch.no_grad():
        actual, bare = loaded(models.tokens()).logits, models.bert()(models.tokens()).logits
        models.assert_equal(actual, adapted(models.tokens()).logits)
        models.assert_differs(actual, bare)


def test_other_methods_meet_transformers_own_check(refused):
    with pytest.raises(ValueError, match="The version of PEFT you are using is not compatible"):
        models.bert().add_adapter(peft.LoraConfig())
