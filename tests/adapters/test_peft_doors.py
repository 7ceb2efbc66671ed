"""Every way in that PEFT and transformers already have."""

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import LowCoverageWarning
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(model, seed=9):
    model.eval()
    with torch.no_grad():
        return model(input_ids=models.tokens(seed)).logits


def train(model, task=0):
    optimizer = models.trainer_of(model)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        labels = torch.arange(4).add(task).remainder(3)
        model(input_ids=models.tokens(task), labels=labels).loss.backward()
        optimizer.step()
    return model


def weight_of(model, name):
    module = model.get_submodule(name)
    return module.weight.detach() + 0.0


def test_get_peft_model_is_pemnify():
    for options in models.BANKS.values():
        first = get_peft_model(models.net(), PemnConfig(**options))
        second = pemnify(models.net(), **options)
        assert type(first) is type(second) is PeftModel
        models.assert_same_tensors(
            models.train(first).state_dict(), models.train(second).state_dict()
        )


def test_peft_knows_the_configuration(tmp_path):
    pemnify(models.net(), bank="rp", seed=3).save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert type(config) is PemnConfig
    assert (config.bank, config.seed, config.ratio) == ("rp", 3, 0.01)


def test_model_status():
    model = pemnify(models.net(), bank="rp")
    status = get_model_status(model)
    assert status.peft_types == {"default": "PEMN"}
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.merged_adapters == []
    assert status.num_adapter_layers == 4 + 5  # weights; modules with tensors of the task
    assert status.trainable_params == 216 + 2 * 576 + 32 + 3 * 16 + 8 + 4
    assert status.requires_grad == {"default": True}


def test_every_tuner_layer_says_its_features():
    model = pemnify(models.net(), bank="rp")
    layers = {
        name.removeprefix("base_model.model."): (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    assert layers == {
        "conv1.masked_weight": (27, 8),
        "conv2.masked_weight": (72, 8),
        "conv3.masked_weight": (72, 8),
        "head.masked_weight": (8, 4),
        "conv1.task_tensors": (None, None),
        "bn1.task_tensors": (None, None),
        "bn2.task_tensors": (None, None),
        "bn3.task_tensors": (None, None),
        "head.task_tensors": (None, None),
    }


def test_adapter_state_dict_is_the_file(tmp_path):
    model = models.train(pemnify(models.net(), bank="rp"))
    model.save_pretrained(str(tmp_path))
    models.assert_same_tensors(
        get_peft_model_state_dict(model), load_file(tmp_path / models.WEIGHTS_FILE)
    )


def test_inject_adapter_in_model():
    base = models.net()
    model = inject_adapter_in_model(PemnConfig(bank="rp"), base)
    assert model is base
    models.assert_equal(models.logits(model), models.logits(pemnify(models.net(), bank="rp")))


def test_lora_beside_masks_is_refused():
    """PEFT does not mix methods in one PeftModel: adding LoRA must not break the masks."""
    model = pemnify(models.net(), bank="own", selector="topk")
    expected = models.logits(model)
    with pytest.raises(ValueError, match="LORA"):
        model.add_adapter("other", LoraConfig(target_modules=["conv1"]))
    models.assert_equal(models.logits(model), expected)


@pytest.mark.parametrize("options", [{"bank": "own", "selector": "topk"}, {"bank": "rp"}], ids=str)
def test_transformers_add_save_and_load(options, tmp_path):
    model = models.bert()
    plain = run(model).clone()
    model.add_adapter(PemnConfig(**options), adapter_name="task")
    train(model)
    expected = run(model)
    models.assert_differs(expected, plain)
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / models.WEIGHTS_FILE)
    kinds = {key.rpartition(".")[2]: value.dtype for key, value in stored.items()}
    assert kinds["bits"] == torch.uint8
    assert "scores" not in kinds
    again = models.bert(0 if options["bank"] == "own" else 4)
    if options["bank"] == "rp":  # embeddings stay with the base
        again.bert.embeddings.load_state_dict(models.bert().bert.embeddings.state_dict())
    again.load_adapter(str(tmp_path), adapter_name="task")
    models.assert_same_tensors(models.masks(again, "task"), models.masks(model, "task"))
    models.assert_equal(run(again), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_transformers_switches_and_disables(tmp_path):
    base = models.bert()
    plain, expected = run(base).clone(), {}
    for task in (1, 2):
        model = train(pemnify(models.bert(), bank="own", selector="topk", rest="freeze"), task)
        model.save_pretrained(str(tmp_path / str(task)))
        expected[task] = run(model)
        base.load_adapter(str(tmp_path / str(task)), adapter_name=f"task{task}")
    models.assert_differs(expected[1], expected[2])
    for task in (1, 2, 1):
        base.set_adapter(f"task{task}")
        models.assert_equal(run(base), expected[task], f"task {task}")
    base.disable_adapters()
    models.assert_equal(run(base), plain)
    base.enable_adapters()
    models.assert_equal(run(base), expected[1])


def adapter_with_base(tmp_path, **options):
    """An adapter whose configuration names a local folder as its base."""
    from transformers import AutoModelForSequenceClassification

    models.bert().save_pretrained(str(tmp_path / "base"))
    base = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    model = train(pemnify(base, bank="own", **options))
    model.save_pretrained(str(tmp_path / "adapter"))
    return run(model)


def test_auto_model_with_an_adapter_folder(tmp_path):
    from transformers import AutoModelForSequenceClassification

    expected = adapter_with_base(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter"))
    models.assert_equal(run(model), expected)
    assert len(models.masks(model)) == 14


def test_auto_peft_model(tmp_path):
    expected = adapter_with_base(tmp_path, task_type="SEQ_CLS")
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter"))
    models.assert_equal(run(model), expected)


def test_peft_model_from_pretrained_on_gpt2(tmp_path):
    """HF's Conv1D holds its weight as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
            )

    model = pemnify(gpt2(), bank="rp", task_type="CAUSAL_LM")
    names = {name.partition(".h.")[2][2:] for name in models.mask_layers(model)}
    assert names == {
        f"{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    model.train()
    model(input_ids=models.tokens(), labels=models.tokens()).loss.backward()
    models.trainer_of(model).step()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(gpt2(), str(tmp_path))
    models.assert_equal(run(again), run(model))
    fan = models.mask_layers(model)["transformer.h.0.mlp.c_proj.weight"].fan_in
    assert fan == 64


@models.ignore_peft_on_transformers
def test_two_tasks_on_a_tied_language_model_merge_and_stay_tied():
    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    with pytest.warns(LowCoverageWarning, match="lm_head.weight: tied to transformer.wte.weight"):
        model = pemnify(GPT2LMHeadModel(config).eval(), bank="rp", ratio=0.1)
    model.add_adapter("second", PemnConfig(bank="rp", ratio=0.1))
    model.set_adapter("second")
    task = model.base_model.model.transformer.wte.task_tensors.pemn_tensors["second"]
    with torch.no_grad():
        task.weight.mul_(2.0)
    tokens = models.tokens() % 64
    expected = model(input_ids=tokens).logits
    with model.disable_adapter():
        models.assert_differs(model(input_ids=tokens).logits, expected)
    merged = model.merge_and_unload()
    models.assert_equal(merged(input_ids=tokens).logits, expected)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert type(merged.lm_head) is torch.nn.Linear
