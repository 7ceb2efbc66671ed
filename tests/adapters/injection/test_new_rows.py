"""Tokens that were added: their rows are the task's, whatever a later base has behind the old ones.

Every case is walked as its users walk it: add tokens, train, save, build again from the checkpoint
(resized with other random rows, or not at all), load, compare logits to the last bit.
"""

import copy

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file

from pemn_surgery import PemnConfig, from_finetuned, infer_task, pemnify, plan
from pemn_surgery.errors import (
    AdapterError,
    ArchitectureError,
    ConfigError,
    FingerprintError,
    MaskedWeightError,
    PemnWarning,
    TaskInferenceError,
)
from tests.adapters import models

pytestmark = [
    models.ignore_peft_on_transformers,
    pytest.mark.filterwarnings("ignore::pemn_surgery.errors.LowCoverageWarning"),  # tied heads
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

OLD, NEW, WIDTH = 40, 44, 16
TOKENS = torch.arange(NEW).view(2, NEW // 2)  # every token, the new ones too
HEADER = 17  # of every key: base_model.model.

KINDS = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=OLD, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        ),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=OLD, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig(
            vocab_size=OLD, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32,
        ),
    ),
}  # fmt: skip
OWN = {"bank": "own", "selector": "threshold"}
SETTINGS = {
    "own-threshold": OWN,
    "own-topk": {"bank": "own", "selector": "topk"},
    "own-untie": {"bank": "own", "selector": "topk", "tied": "untie"},
    "own-both": {"bank": "own", "selector": "topk", "tied": "both"},
    "own-drawn": {"bank": "own", "bank_init": "kaiming_normal"},
    "rp": {"bank": "rp", "ratio": 0.1},
    "mp-stats": {"bank": "mp", "rest": "stats"},
    "mp-model": {"bank": "mp", "bank_init": "model"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of pretrained language models."""
    folder = tmp_path_factory.mktemp("language")
    for name, (kind, config) in KINDS.items():
        torch.manual_seed(0)
        kind(copy.deepcopy(config)).save_pretrained(folder / name)
    return folder


def base_of(checkpoints, name, size=NEW, seed=1):
    """A checkpoint's model, resized to a number of tokens; the new rows go by the seed."""
    torch.manual_seed(seed)
    model = KINDS[name][0].from_pretrained(checkpoints / name)
    if size:
        model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def trained(model, steps=2, tokens=TOKENS):
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval()


def made(checkpoints, name, size=NEW, seed=1, **options):
    return trained(pemnify(base_of(checkpoints, name, size, seed), **(options or OWN)))


def floats(folder):
    """Shapes of the float tensors in an adapter's file that a vocabulary has to do with."""
    found = load_file(folder / models.WEIGHTS_FILE).items()
    tables = ("embed", "wte", "lm_head", "cls.predictions.task", "decoder")
    return {
        key[HEADER:]: tuple(value.shape)
        for key, value in found
        if value.is_floating_point() and any(part in key for part in tables)
    }


# -- saved and loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", KINDS)
def test_the_same_model_on_every_base(name, options, checkpoints, tmp_path):
    model = made(checkpoints, name, **options)
    expected = logits(model)
    assert expected.shape[-1] == NEW
    model.save_pretrained(str(tmp_path / "one"))
    written = (tmp_path / "one" / models.WEIGHTS_FILE).read_bytes()
    for size in (None, NEW, NEW + 4):
        again = PeftModel.from_pretrained(
            base_of(checkpoints, name, size, seed=2), str(tmp_path / "one")
        )
        models.assert_equal(logits(again), expected)
        again.save_pretrained(str(tmp_path / "two"))
        assert (tmp_path / "two" / models.WEIGHTS_FILE).read_bytes() == written
        loss = again(input_ids=TOKENS, labels=TOKENS).loss  # goes by the number that config has
        models.assert_equal(loss, model(input_ids=TOKENS, labels=TOKENS).loss)
        merged = again.merge_and_unload()
        models.assert_equal(logits(merged), expected)
        assert type(merged) is KINDS[name][0]
        assert merged.config.vocab_size == NEW
        assert merged.get_input_embeddings().num_embeddings == NEW
        if (name, options.get("tied")) != ("bert", "untie"):  # transformers ties BERT's bias anew
            merged.save_pretrained(str(tmp_path / "merged"))
            models.assert_equal(
                logits(KINDS[name][0].from_pretrained(tmp_path / "merged")), expected
            )


@pytest.mark.parametrize(
    ("name", "held"),
    [
        (
            "llama",
            {
                "model.embed_tokens.task_tensors.pemn_tensors.weight": (4, WIDTH),
                "lm_head.task_tensors.pemn_tensors.weight": (4, WIDTH),
            },
        ),
        ("gpt2", {"transformer.wte.task_tensors.pemn_tensors.weight": (4, WIDTH)}),
        (
            "bert",
            {
                "bert.embeddings.word_embeddings.task_tensors.pemn_tensors.weight": (4, WIDTH),
                "cls.predictions.task_tensors.pemn_tensors.bias": (4,),
            },
        ),
    ],
)
def test_the_file_holds_the_new_rows_and_nothing_of_the_base(name, held, checkpoints, tmp_path):
    planned = plan(base_of(checkpoints, name), **OWN)
    made(checkpoints, name).save_pretrained(str(tmp_path))
    assert floats(tmp_path) == held
    tensors = load_file(tmp_path / models.WEIGHTS_FILE)
    rows = sum(value.nbytes for value in tensors.values() if value.is_floating_point())
    assert rows == planned.other_bytes == sum(4 * torch.Size(s).numel() for s in held.values())
    masks = [value for key, value in tensors.items() if key.endswith(".bits")]
    assert len(masks) + len(held) == len(tensors)
    files = (tmp_path / models.WEIGHTS_FILE, tmp_path / "adapter_config.json")
    assert sum(path.stat().st_size for path in files) == planned.file_bytes
    if name == "llama":
        bits = tensors["base_model.model.lm_head.masked_weight.pemn_masks.bits"]
        assert len(bits) == 32 + OLD * WIDTH // 8


def test_auto_peft_model_with_and_without_a_tokenizer(checkpoints, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = made(checkpoints, "llama", **OWN, task_type="CAUSAL_LM")
    model.save_pretrained(str(tmp_path))
    expected = logits(model)
    models.assert_equal(logits(AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))), expected)
    words = Tokenizer(WordLevel({f"t{place}": place for place in range(NEW)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))  # resizes the base
    models.assert_equal(logits(again), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_own_door(name, checkpoints, tmp_path):
    model = made(checkpoints, name)
    model.save_pretrained(str(tmp_path))
    again = base_of(checkpoints, name, None)
    again.load_adapter(str(tmp_path))
    models.assert_equal(logits(again), logits(model))


def test_training_goes_on_from_a_file(checkpoints, tmp_path):
    """Scores and rows of a Trainer's checkpoint, on a base that nobody resized."""
    model = pemnify(base_of(checkpoints, "llama"), **OWN)
    model.peft_config["default"].keep_scores = True
    trained(model).save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(
        base_of(checkpoints, "llama", None), str(tmp_path), is_trainable=True
    )
    models.assert_equal(logits(trained(again)), logits(trained(model)))


def test_a_resumed_trainer_equals_one_that_never_stopped(checkpoints, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in TOKENS]

    def trainer(folder):
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2,
            learning_rate=0.05, use_cpu=True, report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        model = pemnify(base_of(checkpoints, "llama"), **OWN)
        return transformers.Trainer(model=model, args=arguments, train_dataset=data)

    whole = trainer(tmp_path / "whole")
    whole.train()
    parts = trainer(tmp_path / "parts")
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    models.assert_equal(logits(parts.model), logits(whole.model))


# -- on one model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_disabled_it_is_the_base_and_unloaded_too(name, checkpoints):
    expected = logits(base_of(checkpoints, name))
    model = made(checkpoints, name)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        models.assert_equal(logits(model), expected)
    base = model.unload()
    models.assert_equal(logits(base), expected)
    assert base.config.vocab_size == NEW


def test_a_base_that_was_not_resized_stays_so(checkpoints, tmp_path):
    made(checkpoints, "llama").save_pretrained(str(tmp_path))
    base = base_of(checkpoints, "llama", None)
    before, old = {k: v.clone() for k, v in base.state_dict().items()}, TOKENS.clamp(max=OLD - 1)
    expected = logits(base, old)
    model = PeftModel.from_pretrained(base, str(tmp_path))
    assert base.config.vocab_size == NEW
    with model.disable_adapter():
        assert base.config.vocab_size == OLD
        models.assert_equal(logits(model, old), expected)
    again = model.unload()
    models.assert_same_tensors(again.state_dict(), before)
    assert again.config.vocab_size == OLD


@pytest.mark.parametrize("bank", ["own", "rp"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [None, NEW], ids=["plain", "resized"])
def test_tasks_with_other_numbers_of_new_tokens_share_a_model(
    size, name, bank, checkpoints, tmp_path
):
    options = {"bank": bank, "selector": "threshold", "rest": "stats"}
    wanted = {}
    tokens = TOKENS % (OLD + 2)
    for rows in (4, 2, 7):
        model = pemnify(base_of(checkpoints, name, OLD + rows, seed=rows), **options)
        wanted[rows] = logits(trained(model, tokens=tokens), tokens)
        model.save_pretrained(str(tmp_path / str(rows)))
    model = PeftModel.from_pretrained(
        base_of(checkpoints, name, size, seed=9), str(tmp_path / "4"), adapter_name="4"
    )
    model.load_adapter(str(tmp_path / "2"), "2")
    model.load_adapter(str(tmp_path / "7"), "7")
    for rows in (2, 7, 4, 2):
        model.set_adapter(str(rows))
        models.assert_equal(logits(model, tokens), wanted[rows])
        assert model.get_base_model().config.vocab_size == OLD + rows
        assert model(input_ids=tokens, labels=tokens).loss.isfinite()
    model.delete_adapter("2")
    model.set_adapter("4")
    models.assert_equal(logits(model, tokens), wanted[4])


def test_a_second_task_begins_with_the_bases_rows(checkpoints, tmp_path):
    model = made(checkpoints, "llama")
    model.add_adapter("b", PemnConfig(**OWN))
    model.set_adapter("b")
    head = model.get_base_model().lm_head
    models.assert_equal(head.weight[OLD:], base_of(checkpoints, "llama").lm_head.weight[OLD:])
    expected = logits(trained(model))
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base_of(checkpoints, "llama", None), str(tmp_path / "b"))
    models.assert_equal(logits(again), expected)


def test_a_file_takes_the_place_of_another(checkpoints, tmp_path):
    first, second = made(checkpoints, "llama"), made(checkpoints, "llama", seed=5)
    second.save_pretrained(str(tmp_path))
    assert not torch.equal(logits(first), logits(second))
    with pytest.warns(PemnWarning, match="holds bits, not scores, for 8 masks"):
        first.load_adapter(str(tmp_path), "default")
    models.assert_equal(logits(first), logits(second))


def test_merged_and_unmerged(checkpoints):
    model = made(checkpoints, "llama")
    expected = logits(model)
    model.merge_adapter()
    models.assert_equal(logits(model), expected)
    models.assert_equal(model.get_base_model().state_dict()["lm_head.weight"][OLD:],
                        model.get_base_model().lm_head.weight[OLD:])  # fmt: skip
    model.unmerge_adapter()
    models.assert_equal(logits(model), expected)


def test_copied_with_its_rows(checkpoints):
    model = made(checkpoints, "llama")
    twin = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "pemn_tensors" in name:
                tensor.zero_()
    assert not torch.equal(logits(model), expected), "the kept weight followed the rows"
    models.assert_equal(logits(twin), expected)


# -- on a model that has adapters -----------------------------------------------------------------


@pytest.mark.parametrize("options", [OWN, SETTINGS["rp"], SETTINGS["mp-stats"]], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_with_adapters_gets_more_tokens(name, options, checkpoints, tmp_path):
    model = pemnify(base_of(checkpoints, name, None), **options)
    trained(model, tokens=TOKENS % OLD)
    model.add_adapter("b", PemnConfig(**options))
    before = logits(model, TOKENS % OLD)
    table = model.resize_token_embeddings(NEW)
    assert (
        table.num_embeddings == len(table.weight) == model.get_base_model().config.vocab_size == NEW
    )
    grown = logits(model)
    models.assert_equal(logits(model, TOKENS % OLD)[..., :OLD], before)
    for adapter in ("default", "b"):
        model.set_adapter(adapter)
        trained(model)
    model.save_pretrained(str(tmp_path))
    for adapter, folder in (("default", tmp_path), ("b", tmp_path / "b")):
        model.set_adapter(adapter)
        expected = logits(model)
        assert not torch.equal(expected[..., OLD:], grown[..., OLD:]), "the rows were trained"
        assert (OLD, WIDTH) not in floats(folder).values()
        for size in (None, NEW):
            base = base_of(checkpoints, name, size, seed=2)
            models.assert_equal(logits(PeftModel.from_pretrained(base, str(folder))), expected)
    models.assert_equal(logits(model.merge_and_unload()), expected)


def test_only_what_is_trained_gets_trained_rows(checkpoints, tmp_path):
    pemnify(base_of(checkpoints, "llama", None), **OWN).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(base_of(checkpoints, "llama", None), str(tmp_path))
    model.resize_token_embeddings(NEW - 3, pad_to_multiple_of=4)
    assert model.get_base_model().config.vocab_size == NEW
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fewer_tokens_or_past_peft_are_refused_under_masks(checkpoints):
    model = pemnify(base_of(checkpoints, "llama", None), **OWN)
    before = models.Snapshot(model, lambda net: logits(net, TOKENS % OLD))
    with pytest.raises(MaskedWeightError, match=r"resize_token_embeddings\(30\) would put another"):
        model.resize_token_embeddings(30)
    with pytest.raises(MaskedWeightError, match="call it on PEFT's model"):
        model.get_base_model().resize_token_embeddings(NEW)
    before.assert_unchanged()
    model.resize_token_embeddings(NEW)
    with pytest.raises(MaskedWeightError, match="resize before masks"):  # once
        model.resize_token_embeddings(NEW + 2)


# -- what is asked for, and what cannot be --------------------------------------------------------


def test_who_has_no_checkpoint_says_how_many(checkpoints, tmp_path):
    """A copy has lost transformers' marks, and a model of one's own never had any."""
    twin = copy.deepcopy(base_of(checkpoints, "llama"))
    model = trained(pemnify(twin, **OWN, new_rows=4))
    model.save_pretrained(str(tmp_path / "copy"))
    assert set(floats(tmp_path / "copy").values()) == {(4, WIDTH)}
    again = PeftModel.from_pretrained(base_of(checkpoints, "llama", None), str(tmp_path / "copy"))
    models.assert_equal(logits(again), logits(model))

    def plain(rows):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10))
        old = [p.detach().clone() for p in net.parameters()]
        net = torch.nn.Sequential(torch.nn.Embedding(10 + rows, 8), torch.nn.Linear(8, 10 + rows))
        with torch.no_grad():
            for parameter, values in zip(net.parameters(), old, strict=True):
                parameter[:10] = values
        return net.eval()

    named = {"0.weight": 2, "1.weight": 2, "1.bias": 2}
    model = pemnify(plain(2), **OWN, new_rows=named, modules_to_save=[])
    x = torch.arange(12)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "pemn_tensors" in name:
                tensor.normal_()
        model.save_pretrained(str(tmp_path / "plain"))
        again = PeftModel.from_pretrained(plain(0), str(tmp_path / "plain")).eval()
        models.assert_equal(again(x), model.eval()(x))


@pytest.mark.parametrize("given", [0, {}])
def test_nothing_is_new_who_says_so(given, checkpoints):
    """Then a new head is trained and saved whole, as ever."""
    model = pemnify(base_of(checkpoints, "llama"), **OWN, new_rows=given)
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    assert model.peft_config["default"].base_rows is None


def test_a_table_that_is_saved_whole_has_no_rows_of_its_own(checkpoints, tmp_path):
    model = made(checkpoints, "llama", **OWN, modules_to_save=["lm_head", "embed_tokens"])
    model.save_pretrained(str(tmp_path))
    assert set(floats(tmp_path).values()) == {(NEW, WIDTH)}
    again = PeftModel.from_pretrained(base_of(checkpoints, "llama", seed=2), str(tmp_path))
    models.assert_equal(logits(again), logits(model))


def test_frozen_rest_trains_the_rows_all_the_same(checkpoints):
    model = pemnify(base_of(checkpoints, "gpt2"), **OWN, rest="freeze")
    rows = [
        name for name, p in model.named_parameters() if p.requires_grad and "scores" not in name
    ]
    assert rows == ["base_model.model.transformer.wte.task_tensors.pemn_tensors.default.weight"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (OLD + 4, "has 44 rows, of which some have to be the checkpoint's"),
        ({"lm_head.bias": 4}, "'lm_head.bias' is no weight or bias of an Embedding or Linear"),
        ({"lm_head.weight": 0}, "whole numbers above 0"),
        (-1, "whole number"),
        ("4", "whole number"),
    ],
)
def test_what_cannot_be_new_is_refused(given, says, checkpoints):
    base = base_of(checkpoints, "llama")
    before = models.Snapshot(base, logits)
    with pytest.raises(ConfigError, match=says):
        pemnify(base, **OWN, new_rows=given)
    before.assert_unchanged()


def test_a_base_without_the_old_rows_is_refused(checkpoints, tmp_path):
    made(checkpoints, "gpt2").save_pretrained(str(tmp_path))
    base = base_of(checkpoints, "gpt2", OLD - 2)
    before = models.Snapshot(base, lambda net: logits(net, TOKENS % 38))
    with pytest.raises(ArchitectureError, match=r"4 new rows of 'lm_head.weight'.*40.* 38"):
        PeftModel.from_pretrained(base, str(tmp_path))
    before.assert_unchanged()
    assert base.config.vocab_size == OLD - 2


def test_a_bias_that_no_task_owns_asks_for_a_resized_base(tmp_path):
    """BART adds a buffer to its logits."""
    config = transformers.BartConfig(
        vocab_size=OLD, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=32, pad_token_id=0,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        forced_eos_token_id=None,
    )  # fmt: skip
    kind = transformers.BartForConditionalGeneration
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "bart")

    def bart(size, seed):
        torch.manual_seed(seed)
        model = kind.from_pretrained(tmp_path / "bart")
        model.resize_token_embeddings(size)
        return model.eval()

    model = trained(pemnify(bart(NEW, 1), **OWN))
    model.save_pretrained(str(tmp_path / "task"))
    again = PeftModel.from_pretrained(bart(NEW, 2), str(tmp_path / "task"))
    models.assert_equal(logits(again), logits(model))
    with pytest.raises(ArchitectureError, match=r"rows for 44 tokens.*is for 40.*embeddings\(44\)"):
        PeftModel.from_pretrained(bart(OLD, 2), str(tmp_path / "task"))


def test_another_base_is_refused(checkpoints, tmp_path):
    made(checkpoints, "llama").save_pretrained(str(tmp_path))
    base = base_of(checkpoints, "llama", None)
    with torch.no_grad():
        base.lm_head.weight[3, 3] += 1
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(base, str(tmp_path))
    assert base.config.vocab_size == OLD


def test_masks_on_other_rows_of_one_model_are_refused(checkpoints):
    model = made(checkpoints, "llama")
    with pytest.raises(AdapterError, match=r"mask 40 rows of 'lm_head.weight'.*mask 42 and have 2"):
        model.add_adapter("b", PemnConfig(**OWN, new_rows=2))
    assert list(model.peft_config) == ["default"]


def test_what_would_take_the_rows_away_is_refused(checkpoints):
    model = made(checkpoints, "gpt2")
    expected, net = logits(model), model.get_base_model()
    net.tie_weights()
    net.resize_token_embeddings(NEW)
    with pytest.raises(MaskedWeightError, match="resize before masks"):
        net.resize_token_embeddings(NEW + 2)
    with pytest.raises(MaskedWeightError, match="new ones"):
        net.transformer.wte.weight = torch.nn.Parameter(torch.zeros(NEW, WIDTH))
    models.assert_equal(logits(model), expected)


# -- from a fine-tuned model ----------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_a_finetuned_model_are_taken_over(name, checkpoints, tmp_path):
    tuned = trained(base_of(checkpoints, name, seed=3))
    model = from_finetuned(base_of(checkpoints, name, seed=4), tuned).eval()
    table = model.get_base_model().get_input_embeddings().weight
    models.assert_equal(table[OLD:], tuned.get_input_embeddings().weight[OLD:])
    head = model.get_base_model().get_output_embeddings().weight
    models.assert_equal(head[OLD:], tuned.get_output_embeddings().weight[OLD:])
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base_of(checkpoints, name, None), str(tmp_path))
    models.assert_equal(logits(again), logits(model))


def test_tasks_with_other_numbers_of_tokens_are_not_mixed(checkpoints, tmp_path):
    """Their logits have other shapes; of equal numbers they are mixed."""
    made(checkpoints, "llama", size=NEW).save_pretrained(tmp_path / "more")
    made(checkpoints, "llama", size=NEW, seed=2).save_pretrained(tmp_path / "same")
    less = pemnify(base_of(checkpoints, "llama", OLD + 1), **OWN)
    trained(less, tokens=TOKENS % OLD).save_pretrained(tmp_path / "less")
    base = base_of(checkpoints, "llama", size=None)
    model = PeftModel.from_pretrained(base, tmp_path / "more", adapter_name="more").eval()
    for name in ("same", "less"):
        model.load_adapter(tmp_path / name, name)
    inputs = {"input_ids": TOKENS % OLD}
    assert infer_task(model, inputs, adapters=["more", "same"]).name in {"more", "same"}
    with pytest.raises(TaskInferenceError, match=r"'less' has 1 new rows.*'more' has 4"):
        infer_task(model, inputs)
