"""What users do with transformers and PEFT, from folders alone: bases, adapters, pipelines."""

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from pemn_surgery import PemnConfig, pemnify
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

BANKS = {
    "own": {"bank": "own", "selector": "topk", "rest": "norms"},
    "rp": {"bank": "rp", "ratio": 0.1, "seed": 2},
}
WORDS = "w1 w2 w3 w4"
TASKS = ["llama", "gpt2", "bert", "vit"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(39)} | {"<end>": 39}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<end>", eos_token="<end>", pad_token="<end>"
    )


def language_model(name):
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            eos_token_id=39, pad_token_id=39, bos_token_id=None,
        ))  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False,
        bos_token_id=39, eos_token_id=39, pad_token_id=39,
    ))  # fmt: skip


def vit():
    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def save_base(name, folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {"bert": models.bert, "vit": vit}.get(name, lambda: language_model(name))()
    made.save_pretrained(str(folder))
    if name == "vit":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(str(folder))
    else:
        tokenizer().save_pretrained(str(folder))


AUTO = {
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
}
TASK_TYPES = {"bert": "SEQ_CLS", "vit": None, "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}


def batch(name, seed=0):
    if name == "vit":
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}
    return {"input_ids": models.tokens(seed)}


def labels(name, seed):
    if AUTO[name] is AutoModelForCausalLM:
        return models.tokens(seed)
    return torch.arange(4).add(seed).remainder(3)


def run(model, name):
    model.eval()
    with torch.no_grad():
        return model(**batch(name, 9)).logits


def train(model, name, seed=0):
    optimizer = models.trainer_of(model)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch(name, seed), labels=labels(name, seed)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=[f"{name}-{bank}" for name in TASKS for bank in BANKS])
def adapter(request, tmp_path_factory):
    """A trained model, the folder of its adapter, and logits of base and task."""
    name, _, bank = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    save_base(name, folder / "base")
    base = AUTO[name].from_pretrained(str(folder / "base"))
    plain = run(base, name).clone()
    model = train(pemnify(base, **BANKS[bank], task_type=TASK_TYPES[name]), name)
    model.save_pretrained(str(folder / "adapter"))
    expected = run(model, name)
    models.assert_differs(expected, plain)
    return name, model, str(folder / "adapter"), expected


def test_auto_model_of_transformers(adapter):
    name, model, folder, expected = adapter
    again = AUTO[name].from_pretrained(folder)
    assert not isinstance(again, PeftModel)
    models.assert_equal(run(again, name), expected)
    models.assert_same_tensors(models.masks(again), models.masks(model))


def test_auto_peft_model(adapter):
    name, model, folder, expected = adapter
    made_by = {
        None: AutoPeftModel,  # which reads the base's class in the configuration
        "SEQ_CLS": AutoPeftModelForSequenceClassification,
        "CAUSAL_LM": AutoPeftModelForCausalLM,
    }[TASK_TYPES[name]]
    again = made_by.from_pretrained(folder)
    assert type(again) is type(model)
    models.assert_equal(run(again, name), expected)


def example(name):
    """A task of `pipeline`, an input, and further options."""
    if name == "vit":
        pixels = np.arange(16 * 16 * 3).reshape(16, 16, 3) * 7 % 256
        return "image-classification", Image.fromarray(pixels.astype(np.uint8)), {"top_k": 3}
    if name == "bert":
        return "text-classification", WORDS, {"top_k": None}
    return "text-generation", WORDS, {"max_new_tokens": 6, "do_sample": False}


def by_hand(name, model, item):
    """What the pipeline must say, from the PEFT model and without a pipeline."""
    if name in ("llama", "gpt2"):
        ids = torch.tensor([[1, 2, 3, 4]])
        for _ in range(6):
            chosen = model(input_ids=ids).logits[:, -1].argmax(-1)
            ids = torch.cat((ids, chosen[:, None]), dim=1)
            if chosen.item() == 39:
                break
        return [f"w{i}" for i in ids[0].tolist() if i != 39]
    if name == "vit":
        inputs = ViTImageProcessor(size={"height": 16, "width": 16})(item, return_tensors="pt")
    else:
        inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    scores = model(**inputs).logits.softmax(-1)[0]
    return {f"LABEL_{i}": score for i, score in enumerate(scores.tolist())}


def said(name, result):
    if name in ("llama", "gpt2"):
        return result[0]["generated_text"].replace("w", " w").split()
    return {entry["label"]: entry["score"] for entry in result}


@pytest.mark.parametrize("given", ["folder", "model", "auto"])
def test_pipeline(adapter, given):
    name, model, folder, _ = adapter
    task, item, options = example(name)
    used = {
        "folder": lambda: folder,
        "model": lambda: model,
        "auto": lambda: AUTO[name].from_pretrained(folder),
    }[given]()
    more = {}
    if given != "folder":
        more = {"image_processor": ViTImageProcessor(size={"height": 16, "width": 16})}
        more = more if name == "vit" else {"tokenizer": tokenizer()}
    made = pipeline(task, model=used, device="cpu", **more)
    with torch.no_grad():
        expected = by_hand(name, model.eval(), item)
    result = said(name, made(item, **options))
    if isinstance(expected, dict):
        assert result == pytest.approx(expected, abs=1e-6)
        assert max(result.values()) - min(result.values()) > 1e-3
    else:
        assert result == expected
        assert len(result) > 4


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted:UserWarning")
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("bank", BANKS)
def test_add_save_load_switch_disable_delete(name, bank, tmp_path):
    """All that transformers' own interface has, on one model with two tasks."""
    save_base(name, tmp_path / "base")
    model = AUTO[name].from_pretrained(str(tmp_path / "base"))
    plain, expected = run(model, name).clone(), {}
    for task in ("one", "two"):
        model.add_adapter(PemnConfig(**BANKS[bank]), adapter_name=task)
        assert model.active_adapters() == [task]
        train(model, name, seed=len(expected))
        expected[task] = run(model, name).clone()
        model.save_pretrained(str(tmp_path / task))
    models.assert_differs(expected["one"], expected["two"])

    def assert_task(task):
        model.set_adapter(task)
        models.assert_equal(run(model, name), expected[task], task)

    def assert_plain():
        if bank == "own":
            models.assert_equal(run(model, name), plain)
        else:  # the bank's numbers have taken the base's place; without masks they are no task
            models.assert_differs(run(model, name), expected["one"])
            models.assert_differs(run(model, name), expected["two"])

    assert_task("one")
    model.disable_adapters()
    assert_plain()
    model.enable_adapters()
    models.assert_equal(run(model, name), expected["one"])
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    models.assert_equal(run(model, name), expected["one"])
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for task in ("two", "one"):
        assert_task(task)
    model.delete_adapter(["one", "two"])
    assert_plain()
    model.load_adapter(str(tmp_path / "one"))
    assert model.active_adapters() == ["default"]
    models.assert_equal(run(model, name), expected["one"])


def test_what_transformers_saves_peft_loads(tmp_path):
    save_base("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    model.add_adapter(PemnConfig(bank="rp", ratio=0.1, task_type="CAUSAL_LM"))
    train(model, "llama")
    model.save_pretrained(str(tmp_path / "adapter"))
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    models.assert_equal(run(again, "llama"), run(model, "llama"))
    again.save_pretrained(str(tmp_path / "again"))
    models.assert_same_tensors(
        load_file(tmp_path / "again" / models.WEIGHTS_FILE),
        load_file(tmp_path / "adapter" / models.WEIGHTS_FILE),
    )


def test_a_base_model_without_a_head(tmp_path):
    models.bert(kind="BertModel").save_pretrained(str(tmp_path / "base"))
    model = pemnify(AutoModel.from_pretrained(str(tmp_path / "base")), bank="rp", ratio=0.1,
                    task_type="FEATURE_EXTRACTION")  # fmt: skip
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model.eval()(input_ids=models.tokens()).last_hidden_state
    for made_by in (AutoModel, AutoPeftModelForFeatureExtraction):
        again = made_by.from_pretrained(str(tmp_path / "adapter")).eval()
        with torch.no_grad():
            found = again(input_ids=models.tokens()).last_hidden_state
        models.assert_equal(found, expected)


def test_a_head_that_is_saved_whole(tmp_path):
    save_base("bert", tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    config = PemnConfig(
        bank="own", selector="topk", modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = train(pemnify(base, config), "bert")
    model.save_pretrained(str(tmp_path / "adapter"))
    stored = load_file(tmp_path / "adapter" / models.WEIGHTS_FILE)
    assert stored["base_model.model.classifier.weight"].shape == (3, 16)
    for made_by in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
        again = made_by.from_pretrained(str(tmp_path / "adapter"))
        models.assert_equal(run(again, "bert"), run(model, "bert"))
