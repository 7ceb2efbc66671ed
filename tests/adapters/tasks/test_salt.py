"""`cache_salt`: equal where the numbers in force are, whatever else differs, and nowhere else."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from pemn_surgery import PemnConfig, cache_salt, pemnify, rename_adapter, to_trainable
from pemn_surgery.errors import AdapterError, MaskNotLoadedError, MetaTensorError
from tests.adapters import models

pytestmark = [
    models.ignore_peft_on_transformers,
    pytest.mark.filterwarnings("ignore::pemn_surgery.errors.LowCoverageWarning"),  # tied heads
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

KINDS = {
    **models.BANKS,
    "norms": {"bank": "own", "selector": "topk", "rest": "norms"},
    "flips": {"bank": "own", "form": "flip", "selector": "threshold", "support": 0.2},
    "drawn others": {"bank": "own", "selector": "topk", "support": 0.2, "support_others": "drawn"},
    "rows": {"bank": "own", "selector": "topk", "scale": "row"},
}


def trained(kind, name="a"):
    return models.train(pemnify(models.net(), adapter_name=name, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_have_the_same_salt(kind, tmp_path):
    model = trained(kind)
    salt = cache_salt(model)
    assert len(salt) == 32
    int(salt, 16)
    assert cache_salt(model) == cache_salt(model, "a") == cache_salt(model.eval(), ["a"]) == salt
    model.peft_config["a"].coding = "entropy"
    model.save_pretrained(tmp_path)
    # The seed and the file make the model: what the base has beside its masks is in no use.
    seed = 1 if kind in models.GENERATED else 0
    loaded = PeftModel.from_pretrained(models.net(seed), tmp_path / "a", "other")
    assert cache_salt(loaded) == salt
    to_trainable(loaded, "other")
    rename_adapter(loaded, "other", "third")
    assert cache_salt(loaded) == salt


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_merged(kind):
    model = trained(kind)
    salt, bare = cache_salt(model), cache_salt(model, "__base__")
    assert bare == cache_salt(model, []) != salt
    with model.disable_adapter():
        assert cache_salt(model) == bare
        assert cache_salt(model, "a") == salt
    assert cache_salt(model) == salt
    model.merge_adapter()
    assert cache_salt(model) == salt
    assert cache_salt(model, "__base__") == bare
    with model.disable_adapter():
        assert cache_salt(model) == bare  # this unmerges
    assert cache_salt(model) == salt
    if kind not in models.GENERATED:
        assert bare == cache_salt(models.net()) == cache_salt(model.unload())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_flips_a_bit_or_moves_a_saved_float_changes_it(kind):
    model = trained(kind)
    salts = [cache_salt(model)]
    layer = models.mask_layers(model)["conv2.weight"]
    scores = layer.mask_of("a").scores
    for _ in range(3):
        before = models.masks(model, "a")
        models.train(model, steps=1)
        assert models.flips(before, models.masks(model, "a")) > 0
        salts.append(cache_salt(model))
    assert len(set(salts)) == 4
    with torch.no_grad():
        scores *= 1 + 1e-6  # no bit of a selection by order or sign changes
    assert cache_salt(model) == salts[-1]
    held = [t for layer in models.task_layers(model).values() for t in layer.pemn_tensors.values()]
    statistics = next(b for one in held for n, b in one.named_buffers() if n == "running_mean")
    statistics.data[0] += 1e-6  # no version counts this
    assert cache_salt(model) != salts[-1]


def test_one_number_of_the_base_changes_it_wherever_it_lies():
    model = pemnify(
        models.net(),
        bank="own",
        selector="topk",
        target_modules=["conv1", "conv2"],
        modules_to_save=[],
    )
    inner, salts = model.base_model.model, [cache_salt(model)]
    stored = {
        "masked": inner.conv1._parameters["weight"],
        "beside a mask": inner.conv1.bias,
        "unmasked": inner.conv3.weight,
        "norm": inner.bn1.weight,
    }
    for name, tensor in stored.items():
        tensor.data.view(-1)[1] += 1e-6
        salts.append(cache_salt(model))
        assert salts[-1] not in salts[:-1], name
    inner.bn1._buffers["running_mean"].data[0] += 1  # the task has its own in force
    assert cache_salt(model) == salts[-1]
    assert cache_salt(model, "__base__") not in salts
    assert cache_salt(model.to(torch.bfloat16)) not in salts


def test_what_is_not_in_force_does_not_count(tmp_path):
    model = trained("own")
    salt = cache_salt(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("b", PemnConfig(bank="own", selector="topk", seed=1))
    assert cache_salt(model) == salt
    model.set_adapter("b")
    models.train(model)
    second = cache_salt(model)
    assert second != salt
    assert (cache_salt(model, "a"), cache_salt(model, "b")) == (salt, second)
    model.base_model.set_adapter(["a", "b"])
    both = cache_salt(model)
    assert both == cache_salt(model, ["a", "b"])
    assert both not in {salt, second}
    model.delete_adapter("b")
    model.set_adapter("a")
    assert cache_salt(model) == salt


def test_masks_have_no_order_and_tensors_have():
    model = pemnify(
        models.net(),
        adapter_name="a",
        bank="own",
        selector="topk",
        rest="freeze",
        modules_to_save=[],
    )
    model.add_adapter(
        "b", PemnConfig(bank="own", selector="topk", rest="freeze", seed=1, modules_to_save=[])
    )
    assert cache_salt(model, ["a", "b"]) == cache_salt(model, ["b", "a"]) != cache_salt(model, "a")
    model = trained("own")
    model.add_adapter("b", PemnConfig(bank="own", selector="topk", seed=1))
    assert cache_salt(model, ["a", "b"]) != cache_salt(model, ["b", "a"])


def test_a_mixed_batch_has_the_salts_of_its_adapters(tmp_path):
    model = trained("own")
    model.add_adapter("b", PemnConfig(bank="own", selector="topk", seed=1))
    x, names = models.images(3, count=3), ["a", "__base__", "b"]
    model.eval()
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    found = {}
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter(), torch.no_grad():
                found[name] = cache_salt(model)
                models.assert_equal(mixed[row : row + 1], model(x[row : row + 1]))
        else:
            model.set_adapter(name)
            found[name] = cache_salt(model)
            models.assert_equal(mixed[row : row + 1], models.logits(model, x[row : row + 1]))
    assert found == {name: cache_salt(model, name) for name in names}
    assert len(set(found.values())) == 3


def test_a_new_head_of_the_base_that_the_task_replaces(tmp_path):
    """transformers makes a new random head each time; the task has its own."""
    model = pemnify(models.bert(), bank="own", selector="topk", modules_to_save=["classifier"])
    salt = cache_salt(model)
    model.save_pretrained(tmp_path)
    base = models.bert()
    with torch.no_grad():
        base.classifier.weight.add_(1)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert cache_salt(loaded) == salt
    with loaded.disable_adapter(), model.disable_adapter():
        assert cache_salt(loaded) == cache_salt(base) != cache_salt(model)
    with torch.no_grad():
        base.classifier.modules_to_save["default"].bias[0] += 1e-6
    assert cache_salt(loaded) != salt


def test_transformers_own_way_to_add_an_adapter():
    model = models.bert()
    bare = cache_salt(model)
    model.add_adapter(PemnConfig(bank="own", selector="topk", modules_to_save=[]), "a")
    made = pemnify(models.bert(), bank="own", selector="topk", modules_to_save=[])
    assert cache_salt(model) == cache_salt(made) != bare
    model.disable_adapters()
    assert cache_salt(model) == bare


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_tied_weights():
    base = Tied()
    model = pemnify(copy.deepcopy(base), bank="own", selector="topk", modules_to_save=[])
    salt = cache_salt(model)
    assert cache_salt(model, "__base__") == cache_salt(pemnify(
        copy.deepcopy(base), bank="own", modules_to_save=[], form="flip", selector="threshold",
    ), "__base__")  # fmt: skip
    with torch.no_grad():
        model.base_model.model.first._parameters["weight"][0, 0] += 1
    assert cache_salt(model) != salt


def test_a_compiled_model_is_the_model():
    model = trained("own")
    assert cache_salt(torch.compile(model)) == cache_salt(model)


def test_an_offloaded_base_is_read_where_it_lies():
    from accelerate import cpu_offload

    model = trained("own").eval()
    salt = cache_salt(model)
    cpu_offload(model, torch.device("cpu"))
    assert cache_salt(model) == salt


def test_rows_of_added_tokens(tmp_path):
    base = models.bert(kind="BertForMaskedLM")
    base.resize_token_embeddings(44)
    model = pemnify(
        base, bank="own", selector="topk", new_rows={"bert.embeddings.word_embeddings.weight": 4}
    )
    salt = cache_salt(model)
    model.save_pretrained(tmp_path)
    again = models.bert(kind="BertForMaskedLM")
    again.resize_token_embeddings(44)
    with torch.no_grad():
        again.bert.embeddings.word_embeddings.weight[40:] = 7.0
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert cache_salt(loaded) == salt
    tensors = models.task_layers(loaded)["bert.embeddings.word_embeddings"].pemn_tensors["default"]
    with torch.no_grad():
        tensors.weight[0, 0] += 1e-6
    assert cache_salt(loaded) != salt


def test_what_has_no_salt_is_refused(tmp_path):
    model = trained("own")
    with pytest.raises(AdapterError, match="no adapter 'x'; the model has a"):
        cache_salt(model, ["a", "x"])
    model.save_pretrained(tmp_path)
    model.add_adapter("empty", PemnConfig.from_pretrained(str(tmp_path / "a")))
    with pytest.raises(MaskNotLoadedError):
        cache_salt(model, "empty")
    with pytest.raises(MetaTensorError, match="meta device"):
        cache_salt(models.net().to("meta"))
