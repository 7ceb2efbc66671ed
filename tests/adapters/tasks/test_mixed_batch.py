"""A batch for several adapters equals the batches that each adapter gets alone."""

import copy
import inspect

import pytest
import timm
import torch
from torch import nn
from transformers import LlamaForCausalLM

from pemn_surgery import PemnConfig, errors, pemnify
from pemn_surgery.adapters.tasks import mixed_batch
from tests.adapters import models
from tests.adapters.models import says
from tests.zoo import transformers_models

pytestmark = models.ignore_peft_on_transformers

BASE = "__base__"


def many(model, count, seed=0, **options):
    """A model with ``count`` tasks t0, t1, ... of different masks and different other tensors."""
    changes = {"selector": "topk", "rest": "train", **options}
    model = pemnify(model, adapter_name="t0", **changes)
    for task in range(1, count):
        model.add_adapter(f"t{task}", PemnConfig(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pemn_" in name or "modules_to_save" in name:
                scale = parameter.abs().mean() + 0.01
                parameter += 0.5 * scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def alone(model, name, run):
    """What one adapter gives when nothing else is there."""
    twin = copy.deepcopy(model)
    if name == BASE:
        with twin.disable_adapter():
            return run(twin)
    twin.set_adapter(name)
    return run(twin.eval())


def assert_rows(mixed, model, names, run_row):
    """Every row of a mixed output is what its adapter gives for that row alone."""
    singles = [alone(model, name, lambda m, i=i: run_row(m, i)) for i, name in enumerate(names)]
    assert len(singles) == len(names) > 1
    assert len({tuple(single.flatten().tolist()) for single in singles}) == len(set(names))
    torch.testing.assert_close(mixed, torch.cat(singles))


def llm(kind, **options):
    model = transformers_models.build(kind, seed=0)
    return many(model, 8, tied="untie", **options)


@pytest.mark.parametrize("bank", ["mp", "rp", "one_layer", "own"])
def test_eight_samples_of_eight_tasks(bank):
    model = many(models.net(), 8, bank=bank)
    x, names = models.images(count=8), [f"t{task}" for task in (3, 1, 4, 0, 5, 2, 6, 7)]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        assert_rows(mixed, model, names, lambda m, i: m(x[i : i + 1]))


def test_order_repeats_and_base():
    model = many(models.net(), 3, bank="own", selector="topk")
    x, names = models.images(count=7), ["t2", BASE, "t0", "t2", BASE, "t1", "t2"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for name in set(names):
            rows = [i for i, given in enumerate(names) if given == name]
            expected = alone(model, name, lambda m, rows=rows: m(x[rows]))
            models.assert_equal(mixed[rows], expected, name)


# Weights read without calling their layer, windows, raw parameters, recurrent layers.
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_that_are_read_elsewhere(name):
    small = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 1, 1), "img_size": 56}
    if name.startswith("beit"):
        small = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **small)
    model = many(model, 4, bank="mp")
    x = models.images(count=4, size=small["img_size"])
    names = ["t1", "t3", "t0", "t2"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        assert_rows(mixed, model, names, lambda m, i: m(x[i : i + 1]))


class Sequences(nn.Module):
    """Sequence-first layers: the batch is the second dimension inside."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = x.transpose(0, 1)
        x = x + self.recurrent(x)[0]
        return (x + self.attention(x, x, x)[0]).transpose(0, 1)


def test_layers_whose_batch_is_not_the_first_dimension():
    torch.manual_seed(0)
    model = many(Sequences(), 4)
    x, names = torch.randn(4, 4, 8), ["t2", "t0", "t3", "t1"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        assert_rows(mixed, model, names, lambda m, i: m(x[i : i + 1]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_language_models(kind):
    model = llm(kind)
    ids, names = models.tokens(count=8), [f"t{task}" for task in range(8)]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, adapter_names=names)
        assert_rows(output.logits, model, names, lambda m, i: m(input_ids=ids[i : i + 1]).logits)
        losses = [
            alone(model, n, lambda m, i=i: m(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).loss)
            for i, n in enumerate(names)
        ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_caches_go_back_to_their_groups():
    model = llm("llama")
    ids, names = models.tokens(count=4), ["t1", "t0", "t1", "t2"]
    takes = inspect.signature(LlamaForCausalLM.forward).parameters
    cache = "cache" if "cache" in takes else "past_key_values"  # its name since transformers 5.24
    with torch.no_grad():
        whole = model(input_ids=ids, adapter_names=names).logits
        first = model(input_ids=ids[:, :5], adapter_names=names)
        held = {cache: first[cache]}
        assert isinstance(held[cache], mixed_batch.GroupValues)
        then = model(input_ids=ids[:, 5:], **held, adapter_names=names)
        torch.testing.assert_close(then.logits, whole[:, 5:])
        with pytest.raises(errors.MixedBatchError) as error:
            model(input_ids=ids[:, 5:], **held, adapter_names=names[::-1])
    says(error, "other adapter_names", "Keep the order")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation(kind, beams):
    model = llm(kind)
    ids, names = models.tokens(count=8), [f"t{task}" for task in range(8)]
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if kind == "t5":
        options["decoder_start_token_id"] = 0
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    assert len(mixed) == 8
    for i, name in enumerate(names):
        single = alone(model, name, lambda m, i=i: m.generate(input_ids=ids[i : i + 1], **options))
        padded = nn.functional.pad(single, (0, mixed.shape[1] - single.shape[1]))
        models.assert_equal(mixed[i : i + 1], padded, name)


def test_shorter_sequences_are_padded():
    model = llm("llama")
    ids, names = models.tokens(count=3), ["t0", "t1", "t2"]
    ends = alone(model, "t1", lambda m: m.generate(input_ids=ids[1:2], max_new_tokens=1))[0, -1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": int(ends)}
    mixed = model.generate(input_ids=ids, adapter_names=names, pad_token_id=33, **options)
    assert mixed.shape[1] > 9
    assert mixed[1, 8] == ends
    assert set(mixed[1, 9:].tolist()) == {33}


def test_several_sequences_a_sample():
    model = llm("llama")
    ids, names = models.tokens(count=3), ["t2", "t0", "t2"]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=names, do_sample=False, **options)
    assert len(mixed) == 6
    for i, name in enumerate(names):
        run = lambda m, i=i: m.generate(input_ids=ids[i : i + 1], do_sample=False, **options)  # noqa: E731
        models.assert_equal(mixed[2 * i : 2 * i + 2], alone(model, name, run), name)


def test_heads_that_are_trained_whole():
    model = many(models.bert(), 3, bank="own", selector="threshold", modules_to_save=["classifier"])
    ids, names = models.tokens(count=3), ["t2", "t0", "t1"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        assert_rows(mixed, model, names, lambda m, i: m(input_ids=ids[i : i + 1]).logits)


def test_everything_is_as_before():
    model = many(models.net(), 3, bank="own", selector="topk")
    model.set_adapter("t1")
    before = models.Snapshot(model)
    with torch.no_grad():
        model(models.images(count=2), adapter_names=["t0", "t2"])
    before.assert_unchanged()
    with pytest.raises(RuntimeError):
        model(models.images(count=2)[:, :2], adapter_names=["t0", "t2"])
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("names", "error", "parts"),
    [
        (["t0", "nobody"], errors.AdapterError, ["nobody", "t0", "t1"]),
        (["t0"], errors.MixedBatchError, ["1 names", "[2]", "Length of `adapter_names`"]),
        ([], errors.MixedBatchError, ["list of adapter names"]),
        ("t0", errors.MixedBatchError, ["list of adapter names", "'t0'"]),
        ([0, 1], errors.MixedBatchError, ["list of adapter names"]),
    ],
)
def test_wrong_names(names, error, parts):
    model = many(models.net(), 2, bank="own", selector="topk")
    before = models.Snapshot(model)
    with pytest.raises(error) as raised:
        model(models.images(count=2), adapter_names=names)
    says(raised, *parts)
    before.assert_unchanged()


def test_training_and_merged_models_are_refused():
    model = many(models.net(), 2, bank="own", selector="topk")
    x = models.images(count=2)
    with pytest.raises(errors.MixedBatchError) as error:
        model.train()(x, adapter_names=["t0", "t1"])
    says(error, "in training mode", "model.eval()")
    model.eval().merge_adapter(["t1"])
    with pytest.raises(errors.MixedBatchError) as error:
        model(x, adapter_names=["t0", "t1"])
    says(error, "merged: t1", "`unmerge_adapter` first")
    model.unmerge_adapter()
    with torch.no_grad():
        assert len(model(x, adapter_names=["t0", "t1"])) == 2


class Odd(nn.Module):
    """Gives what the test asks for, by the adapter that is active."""

    def __init__(self, outputs):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.outputs = outputs

    def forward(self, x):
        name = self.linear.masked_weight.active_adapters[0]
        return self.outputs[name](self.linear(x))


@pytest.mark.parametrize(
    ("one", "other", "parts"),
    [
        (lambda y: y[:, :2], lambda y: y, ["different shapes", "t0: (1, 2)", "t1: (2, 4)"]),
        (lambda y: {"a": y}, lambda y: {"b": y}, ["different outputs", "t0: ['a']", "t1: ['b']"]),
        (lambda y: [y], lambda y: [y, y], ["different lengths", "t0: 1", "t1: 2"]),
        (lambda y: y.new_ones(3), lambda y: y.new_zeros(3), ["no first dimension of samples"]),
    ],
)
def test_outputs_that_cannot_be_joined(one, other, parts):
    model = pemnify(Odd({"t0": one, "t1": other}), adapter_name="t0")
    model.add_adapter("t1", PemnConfig())
    with pytest.raises(errors.MixedBatchError) as error:
        model.eval()(torch.randn(3, 4), adapter_names=["t1", "t0", "t1"])
    says(error, *parts, "calls of their own")


def test_outputs_of_every_kind():
    def outputs(y):
        return {
            "mean": y.sum() * 0 + 6.0,
            "rows": (y.repeat_interleave(2, dim=0), None),
            "same": torch.arange(5),
            "number": 7,
            "empty": y[:0],
        }

    model = pemnify(Odd({"t0": outputs, "t1": outputs}), adapter_name="t0")
    model.add_adapter("t1", PemnConfig(selector="threshold"))
    x, names = torch.randn(3, 4), ["t1", "t0", "t1"]
    with torch.no_grad():
        found = model.eval()(x, adapter_names=names)
        rows = [alone(model, n, lambda m, i=i: m(x[i : i + 1])) for i, n in enumerate(names)]
    torch.testing.assert_close(found["rows"][0], torch.cat([row["rows"][0] for row in rows]))
    assert found["rows"][1] is None
    assert (found["number"], found["mean"]) == (7, 6.0)
    models.assert_equal(found["same"], torch.arange(5))
    assert found["empty"].shape == (0, 4)
