"""Sign deltas of language models: heads over tokens stay out, added tokens, a scale a matrix."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from pemn_surgery import PemnConfig, from_finetuned, measure_errors, plan
from pemn_surgery.errors import ConfigError, FinetunedMismatchError
from pemn_surgery.masks import sign_delta
from pemn_surgery.planning.roles import scale_rows_of
from tests.adapters import models
from tests.adapters.finetuned.test_from_finetuned import (
    LAYERS,
    METHODS,
    delta_oracle,
    finetuned_of,
    make,
    sign_oracle,
)

TOKENS = torch.arange(40).view(4, 10)


def llama(*, tied=False, tokens=40, seed=0):
    config = transformers.LlamaConfig(
        vocab_size=tokens, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def resized(model, tokens):
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


# ------------------------------------------------------------------------- heads over tokens


def test_a_head_of_its_own_is_carried_whole(tmp_path):
    base = llama()
    tuned = finetuned_of(base)
    model = from_finetuned(copy.deepcopy(base), tuned, "sign_delta")
    assert len(models.mask_layers(model)) == 14
    assert "lm_head.weight" not in models.mask_layers(model)
    assert "lm_head.weight" in model.peft_config["default"].carried
    assert measure_errors(model, tuned).others_differing == ()
    models.assert_equal(
        model.get_base_model().lm_head.weight.detach(), tuned.lm_head.weight.detach()
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    models.assert_equal(logits(again), logits(model))


def test_logits_are_nearer_without_a_delta_of_the_head():
    base = llama()
    tuned = finetuned_of(base)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    without = from_finetuned(copy.deepcopy(base), tuned, "sign_delta")
    with_head = from_finetuned(
        copy.deepcopy(base), tuned, "sign_delta", target_modules=[*layers, "lm_head"]
    )
    assert set(models.mask_layers(with_head)) == {*models.mask_layers(without), "lm_head.weight"}
    errors = [float((logits(model) - logits(tuned)).norm()) for model in (without, with_head)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("given", [["q_proj"], r".*\.q_proj"])
def test_other_exclusions_hold_too(given, tmp_path):
    base = llama()
    tuned = finetuned_of(base)
    model = from_finetuned(copy.deepcopy(base), tuned, "sign_delta", exclude_modules=given)
    held = models.mask_layers(model)
    assert len(held) == 12
    assert not [name for name in held if "q_proj" in name or "lm_head" in name]
    assert measure_errors(model, tuned).others_differing == ()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    models.assert_equal(logits(again), logits(model))


def test_what_is_no_head_of_its_own_is_as_it_was():
    tied = llama(tied=True)
    model = from_finetuned(tied, finetuned_of(llama(tied=True)), "sign_delta", tied="untie")
    assert "lm_head.weight" in models.mask_layers(model)
    base = llama()
    model = from_finetuned(base, finetuned_of(llama()), "mask")
    assert "lm_head.weight" in models.mask_layers(model)


# ---------------------------------------------------------------------------- added tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_the_base_has_not_are_refused_with_what_to_do(method, tied):
    base = llama(tied=tied)
    tuned = finetuned_of(resized(base, 44))
    before = models.Snapshot(base, run=logits)
    with pytest.raises(FinetunedMismatchError) as error:
        from_finetuned(base, tuned, method)
    models.says(
        error, "44 rows in 'model.embed_tokens.weight', the base 40", "4 tokens were added",
        "base.resize_token_embeddings(44)", "Nothing was changed",
    )  # fmt: skip
    before.assert_unchanged()


@pytest.mark.filterwarnings("ignore::pemn_surgery.errors.LowCoverageWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_carried(tied, tmp_path):
    base = resized(llama(tied=tied), 44)
    tuned = finetuned_of(base)
    model = from_finetuned(copy.deepcopy(base), tuned, "sign_delta")
    assert measure_errors(model, tuned).others_differing == ()
    inner = model.get_base_model()
    for table, wanted in (
        (inner.get_input_embeddings(), tuned.get_input_embeddings()),
        (inner.get_output_embeddings(), tuned.get_output_embeddings()),
    ):
        models.assert_equal(table.weight.detach(), wanted.weight.detach())
    model.save_pretrained(tmp_path)
    other = llama(tied=tied)  # the same checkpoint; its new rows are other random ones
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        other.resize_token_embeddings(44, mean_resizing=False)
    again = PeftModel.from_pretrained(other, tmp_path)
    models.assert_equal(logits(again), logits(model))


# --------------------------------------------------------------------------- a scale a matrix


def matrices_of(kind, shape):
    """For every weight (row by row) the matrix that it is in."""
    count = shape[0] if kind.startswith("experts") else 1
    each = int(torch.Size(shape).numel()) // count
    return [place // each for place in range(count * each)]


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_values_with_a_scale_a_matrix(kind, piece, monkeypatch):
    monkeypatch.setattr(sign_delta, "_PIECE", piece)
    monkeypatch.setattr(sign_delta, "goes_by_pieces", lambda *_: True)
    layer = LAYERS[kind]()
    shape = tuple(layer.weight.shape)
    rows, of = scale_rows_of(layer, shape, one_a_matrix=True), matrices_of(kind, shape)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    signs = torch.rand(shape, generator=generator) > 0.5
    scales = torch.rand(rows.count, generator=generator)
    assert rows.count == max(of) + 1
    expected = delta_oracle(weight, signs, scales, of)
    models.assert_equal(sign_delta.sign_delta(weight, signs, scales, rows), expected)
    stored = sign_delta.bits.pack(signs)
    found = sign_delta.sign_delta_from_bits(weight, stored, scales, rows, in_place=False)
    models.assert_equal(found, expected)


def test_a_conditional_convolutions_experts_are_a_matrix_each():
    from timm.layers import CondConv2d

    layer = CondConv2d(4, 6, 3, num_experts=2)
    rows = scale_rows_of(layer, tuple(layer.weight.shape), one_a_matrix=True)
    assert (rows.count, rows.inner) == (2, 216)


def test_a_model_with_a_scale_a_matrix(tmp_path):
    base, tuned, model = make("sign_delta", scale="matrix")
    assert set(models.mask_layers(model)) == set(models.NET_TARGETS)
    for name, layer in models.mask_layers(model).items():
        weight, goal = base.state_dict()[name], tuned.state_dict()[name]
        of = [0] * weight.numel()
        signs, scales = sign_oracle(weight, goal, of)
        held = layer.mask_of("default").row_scale.detach()
        torch.testing.assert_close(held.double(), scales, rtol=1e-5, atol=1e-8)
        expected = delta_oracle(weight, signs, held, of)
        models.assert_equal(layer() + 0.0, expected + 0.0, name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / models.WEIGHTS_FILE)
    scales = [value.numel() for key, value in stored.items() if key.endswith(".row_scale")]
    assert scales == [1, 1, 1, 1]
    planned = plan(base, PemnConfig.from_pretrained(str(tmp_path)))
    assert planned.mask_bytes == sum(
        value.nbytes for key, value in stored.items() if ".pemn_masks." in key
    )
    assert "a scale for each matrix" in (tmp_path / "README.md").read_text()
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    models.assert_equal(models.logits(again), models.logits(model))
    again(models.images()).sum().backward()
    grads = [p.grad for name, p in again.named_parameters() if name.endswith("row_scale")]
    assert [grad.numel() for grad in grads] == [1, 1, 1, 1]
    finer = from_finetuned(copy.deepcopy(base), tuned, "sign_delta")
    errors = [measure_errors(one, tuned).total.error for one in (finer, model)]
    assert errors[0] < errors[1]


def test_a_scale_belongs_to_its_form():
    with pytest.raises(ConfigError, match=r"scale='matrix'.*belongs to form=\"sign_delta\""):
        PemnConfig(bank="own", selector="topk", scale="matrix")
    with pytest.raises(ConfigError, match=r"scale='matrix'.*belongs to form=\"sign_delta\""):
        from_finetuned(models.net(), models.net(1), "mask", scale="matrix")
    with pytest.raises(ConfigError, match=r"scale='sqrt_density'.*its own scales"):
        from_finetuned(models.net(), models.net(1), "sign_delta", scale="sqrt_density")
