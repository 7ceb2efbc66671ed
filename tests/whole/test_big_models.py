"""Models built on the meta device: what gets memory, what gets values, what is refused."""

import json
import math
import time

import pytest
import timm
import torch
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from pemn_surgery import keep_weights, pemnify, plan
from pemn_surgery.adapters import PemnConfig
from pemn_surgery.coding import bits
from pemn_surgery.errors import MetaTensorError
from pemn_surgery.kernels import library
from pemn_surgery.masks import product
from pemn_surgery.masks.adapter_mask import AdapterMask
from pemn_surgery.masks.selector import Selector
from tests import oracles
from tests.adapters import models
from tests.bench import big_models
from tests.kernels.ways import WAYS, every_way

BANKS = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.05},
    "permuted": {"bank": "rp", "ratio": 0.05, "permute": True},
    "one_layer": {"bank": "one_layer"},
}
pytestmark = models.ignore_peft_on_transformers


def llama(**changes):
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **changes))


def timm_of(name, **options):
    return timm.create_model(name, num_classes=5, **options)


def vit():
    return timm_of("test_vit")


def convmixer():
    return timm.models.convmixer.ConvMixer(
        dim=8, depth=2, kernel_size=3, patch_size=4, num_classes=5
    )


def bert():
    return models.bert(kind="BertModel")


BUILDERS = {"llama": llama, "vit": vit, "convmixer": convmixer, "bert": bert}


def on_meta(build):
    with torch.device("meta"):
        model = build()
    assert all(tensor.is_meta for _, tensor in tensors_of(model))
    return model


def on_cpu(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def tensors_of(model):
    found = [*model.named_parameters(), *model.named_buffers()]
    assert found
    return found


def run(model, seed=9):
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if hasattr(base, "config"):
        return models.logits(model, torch.randint(40, (2, 7), generator=generator))[0]
    size = 160 if "Vision" in type(base).__name__ else 32
    return models.logits(model, torch.randn(2, 3, size, size, generator=generator))


def storage_bytes(model):
    """Bytes of all parameters and buffers, every storage once."""
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors_of(model)
    }
    assert 0 not in found, "a tensor without memory"
    return sum(found.values())


def disturb(model):
    """Change everything that an adapter's file has to bring: scores, and the task's own tensors."""
    generator = torch.Generator().manual_seed(5)
    changed = 0
    with torch.no_grad():
        for name, tensor in tensors_of(model):
            if "pemn_" in name and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator) + 0.5
                tensor.mul_(noise.to(tensor.dtype))
                changed += 1
    assert changed > 2
    return model


# ---- what has memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_but_bits_bank_and_the_rest_has_memory(name, bank):
    dense = on_cpu(BUILDERS[name])
    made = plan(dense, **BANKS[bank])
    covered = {n for target in made.targets for n in (target.name, *target.tied)}
    others = sum(t.nbytes for n, t in tensors_of(dense) if n not in covered)
    bits_held = sum(32 + math.ceil(target.weights / 8) for target in made.targets)

    model = pemnify(on_meta(BUILDERS[name]), inference_mode=True, **BANKS[bank])

    assert not [n for n, tensor in tensors_of(model) if tensor.is_meta]
    assert storage_bytes(model) == bits_held + 4 * made.bank_floats + others
    layers = models.mask_layers(model).values()
    assert len(layers) == len(made.targets)
    assert all(layer.own_weight() is None for layer in layers)


def test_a_model_to_train_has_scores_and_copies():
    dense = on_cpu(llama)
    made = plan(dense, bank="rp")
    others = {n: t.nbytes for n, t in dense.named_parameters()}
    others = sum(size for n, size in others.items() if n not in {t.name for t in made.targets})
    buffers = sum(tensor.nbytes for _, tensor in dense.named_buffers())
    model = pemnify(on_meta(llama), bank="rp")
    scores = 4 * made.masked_weights
    assert storage_bytes(model) == scores + 4 * made.bank_floats + 2 * others + buffers
    loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > len(made.targets)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_one_tensor_stays_one_after_a_move():
    """A task's embedding is the base's own tensor, also in another type."""
    model = pemnify(on_meta(llama), bank="rp", inference_mode=True)
    embedding = model.get_base_model().model.embed_tokens
    task = embedding.task_tensors.pemn_tensors["default"]
    assert task.weight is embedding._parameters["weight"]
    model.to(torch.float64)
    assert task.weight is embedding._parameters["weight"]
    assert task.weight.dtype == torch.float64


def test_half_precision():
    """The bank has the weights' type; PEFT widens a task's copies, so those are not shared."""
    model = pemnify(on_meta(lambda: llama().to(torch.bfloat16)), bank="mp", inference_mode=True)
    layer = next(iter(models.mask_layers(model).values()))
    assert layer.bank.values.dtype == torch.bfloat16
    assert run(model).dtype == torch.bfloat16


# ---- what has values ----------------------------------------------------------------------------


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", BUILDERS)
def test_an_adapter_gives_the_logits_of_the_model_built_on_the_cpu(name, bank, tmp_path):
    trained = disturb(pemnify(on_cpu(BUILDERS[name]), **BANKS[bank]))
    trained.save_pretrained(tmp_path)
    expected = run(trained)
    loaded = PeftModel.from_pretrained(on_meta(BUILDERS[name]), tmp_path)
    models.assert_equal(run(loaded), expected)
    models.assert_differs(run(pemnify(on_cpu(BUILDERS[name]), **BANKS[bank])), expected)


def transformers_door(folder):
    base = on_meta(llama)
    base.load_adapter(folder)
    return base


DOORS = {
    "transformers": transformers_door,
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(
        on_meta(llama), folder, low_cpu_mem_usage=True
    ),
    "merged": lambda folder: PeftModel.from_pretrained(on_meta(llama), folder).merge_and_unload(),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_a_model_on_meta(door, tmp_path):
    trained = disturb(pemnify(on_cpu(llama), bank="rp"))
    trained.save_pretrained(tmp_path)
    loaded = DOORS[door](tmp_path)
    models.assert_equal(run(loaded), run(trained))
    assert not [n for n, tensor in tensors_of(loaded) if tensor.is_meta]


def test_a_second_adapter_on_a_model_from_meta(tmp_path):
    first = disturb(pemnify(on_cpu(llama), bank="rp"))
    first.save_pretrained(tmp_path / "first")
    second = disturb(disturb(pemnify(on_cpu(llama, seed=3), bank="rp")))
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(on_meta(llama), tmp_path / "first")
    model.load_adapter(tmp_path / "second", "second")
    model.set_adapter("second")
    models.assert_equal(run(model), run(second))
    model.set_adapter("default")
    models.assert_equal(run(model), run(first))


HUGGING_FACE = ("BertModel", "GPT2Model", "ViTModel", "SwinModel", "T5Model", "MistralModel")


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_values(name):
    """What two seeds agree on is no matter of chance: the model from meta has it too."""
    build = transformers_builder(name)
    first, second = dict(tensors_of(on_cpu(build, 1))), dict(tensors_of(on_cpu(build, 2)))
    base = on_meta(build)
    targets = plan(base, bank="rp").targets
    covered = {n for target in targets for n in (target.name, *target.tied)}
    on_cpu(lambda: pemnify(base, bank="rp", rest="freeze"))
    held = raw_tensors(base)
    fixed = [n for n in first if n not in covered and torch.equal(first[n], second[n])]
    assert len(fixed) > 5
    for n in fixed:
        models.assert_equal(held[n].detach(), first[n].detach(), n)
    drawn = [n for n in first if n not in covered and n not in fixed]
    for n in drawn:
        ratio = float(held[n].detach().std() / first[n].detach().std())
        assert 0.5 < ratio < 2, (n, ratio)


def transformers_builder(name):
    import transformers

    kind = getattr(transformers, name)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    changes = {
        "BertModel": {**small, "num_hidden_layers": 2, "vocab_size": 40},
        "GPT2Model": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40},
        "ViTModel": {**small, "num_hidden_layers": 2, "image_size": 32},
        "SwinModel": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 56},
        "T5Model": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "vocab_size": 40},
        "MistralModel": {
            **small,
            "num_hidden_layers": 2,
            "vocab_size": 40,
            "num_key_value_heads": 2,
        },
    }[name]
    return lambda: kind(kind.config_class(**changes))


def raw_tensors(model):
    """The modules' own tensors, without masks and tasks."""
    return {n: t for n, t in tensors_of(model) if "pemn_" not in n}


def test_timm_computed_buffers():
    build = lambda: timm_of("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), img_size=56)  # noqa: E731
    expected = {n: t for n, t in on_cpu(build).named_buffers() if "index" in n}
    assert len(expected) == 4
    base = on_meta(build)
    pemnify(base, bank="rp")
    held = raw_tensors(base)
    models.assert_same_tensors({n: held[n] for n in expected}, expected)


def test_masks_do_not_depend_on_the_device():
    trained = models.masks(pemnify(on_cpu(llama), bank="rp"))
    models.assert_same_tensors(models.masks(pemnify(on_meta(llama), bank="rp")), trained)
    fixed = models.masks(pemnify(on_meta(llama), bank="rp", inference_mode=True))
    models.assert_same_tensors(fixed, trained)


def test_given_values_are_kept():
    """Embeddings and one norm come from a state dict; initialisers leave them alone."""
    given = {
        "model.embed_tokens.weight": torch.randn(40, 32),
        "model.norm.weight": torch.randn(32),
    }
    base = on_meta(llama)
    base.load_state_dict({n: t.clone() for n, t in given.items()}, assign=True, strict=False)
    pemnify(base, bank="rp", rest="freeze")
    held = {n: t.detach() for n, t in raw_tensors(base).items()}
    models.assert_same_tensors({n: held[n] for n in given}, given)
    assert torch.equal(held["model.layers.0.input_layernorm.weight"], torch.ones(32))


def tied():
    return llama(tie_word_embeddings=True)


def test_ties_stay(tmp_path):
    base = on_meta(tied)
    model = pemnify(base, bank="rp", inference_mode=True)
    held = base.lm_head._parameters["weight"], base.model.embed_tokens._parameters["weight"]
    assert held[0] is held[1]
    assert base.lm_head.weight is base.model.embed_tokens.weight
    trained = disturb(pemnify(on_cpu(tied), bank="rp"))
    trained.save_pretrained(tmp_path)
    expected = run(trained)
    models.assert_differs(run(model), expected)
    models.assert_equal(run(PeftModel.from_pretrained(on_meta(tied), tmp_path)), expected)


def test_recurrent_layers_that_are_left_alone():
    """torch keeps a second list of an LSTM's parameters."""
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 5))  # noqa: E731
    model = pemnify(on_meta(build), bank="rp", modules_to_save=["1"])
    output, _ = model(torch.randn(3, 2, 4))
    assert output.isfinite().all()
    lstm = model.get_base_model()[1].original_module
    assert len(lstm._flat_weights) == 4
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))


# ---- what is refused ----------------------------------------------------------------------------


class Raw(nn.Module):
    """A parameter that nobody initialises, beside a layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x):
        return self.fc(x) * self.gain


class Hidden(Raw):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        del self.gain
        self.gain = torch.full((6,), 2.0)


class Failing(Raw):
    """An initialiser that needs a value."""

    def reset_parameters(self):
        nn.init.constant_(self.gain, self.fc.weight.sum().item())


class HalfWritten(Raw):
    def reset_parameters(self):
        nn.init.ones_(self.gain[:3])


def snapshot(model):
    state = {}
    for path, module in model.named_modules():
        state[path] = (type(module), sorted(vars(module)), list(module._modules))
        state[path, "tensors"] = {
            n: id(t) for n, t in [*module._parameters.items(), *module._buffers.items()]
        }
    assert len(state) > 2
    return state


def refuses(base, *parts, call=pemnify, **options):
    before = snapshot(base)
    with pytest.raises(MetaTensorError) as error:
        call(base, **options)
    models.says(error, *parts, "Nothing was changed.")
    assert snapshot(base) == before


@pytest.mark.parametrize("kind", [Raw, Hidden, HalfWritten])
def test_a_tensor_without_an_initialiser(kind):
    refuses(on_meta(kind), "1 tensors", "gain", "load_state_dict", bank="rp")


def test_an_initialiser_that_fails():
    refuses(on_meta(Failing), "Failing.reset_parameters", "the model", bank="mp")


def test_giving_the_value_helps():
    base = on_meta(Raw)
    base.load_state_dict({"gain": torch.full((6,), 2.0)}, assign=True, strict=False)
    model = pemnify(base, bank="rp", rest="freeze")
    assert torch.equal(model.get_base_model().gain, torch.full((6,), 2.0))


def test_a_file_may_bring_what_has_no_initialiser(tmp_path):
    trained = disturb(pemnify(Raw(), bank="rp"))
    trained.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    loaded = PeftModel.from_pretrained(on_meta(Raw), tmp_path)
    models.assert_equal(models.logits(loaded, x), models.logits(trained, x))


@pytest.mark.parametrize(
    "options",
    [{"bank": "own", "selector": "topk"}, {"bank": "own", "bank_init": "signed_constant"}]
    + [{"bank": bank, "bank_init": "model"} for bank in ("mp", "rp", "one_layer")],
    ids=str,
)
def test_own_weights_without_values(options):
    targets = len(plan(on_meta(llama), **options).targets)
    refuses(on_meta(llama), f"{targets} of the {targets}", "q_proj", 'bank="mp"', **options)


def test_inside_the_meta_device():
    base = on_meta(llama)
    before = snapshot(base)
    with torch.device("meta"), pytest.raises(MetaTensorError, match="call pemnify outside"):
        pemnify(base, bank="rp")
    assert snapshot(base) == before


def test_frozen_embeddings_are_not_invented_for_an_adapter(tmp_path):
    dense = on_cpu(llama)
    values = {"model.embed_tokens.weight": dense.model.embed_tokens.weight.detach().clone()}
    trained = disturb(pemnify(dense, bank="rp", rest="norms"))
    trained.save_pretrained(tmp_path)
    base = on_meta(llama)
    load = lambda model: PeftModel.from_pretrained(model, tmp_path)  # noqa: E731
    refuses(base, "1 tensors", "model.embed_tokens.weight", "frozen embeddings", call=load)
    base.load_state_dict(values, assign=True, strict=False)
    models.assert_equal(run(load(base)), run(trained))


# ---- memory while a model runs ------------------------------------------------------------------


def kept(model):
    return [layer for layer in models.mask_layers(model).values() if layer._kept.weight is not None]


@pytest.mark.parametrize("bank", BANKS)
def test_keeping_changes_memory_and_not_the_outputs(bank):
    model = pemnify(on_meta(llama), inference_mode=True, **BANKS[bank])
    layers = models.mask_layers(model)
    lean = run(model)
    assert kept(model) == []
    keep_weights(model, True)
    models.assert_equal(run(model), lean)
    assert len(kept(model)) == len(layers)
    keep_weights(model, False)
    assert kept(model) == []
    models.assert_equal(run(model), lean)
    assert kept(model) == []


def test_what_keeps_by_default(tmp_path):
    def keeps(model):
        found = {layer.keeps for layer in models.mask_layers(model).values()}
        assert len(found) == 1
        return found.pop()

    trained = pemnify(on_cpu(llama), bank="rp")
    trained.save_pretrained(tmp_path)
    assert keeps(trained)
    assert keeps(pemnify(on_cpu(llama), bank="rp", inference_mode=True))
    assert keeps(PeftModel.from_pretrained(on_cpu(llama), tmp_path))
    assert keeps(pemnify(on_meta(llama), bank="rp"))
    assert not keeps(pemnify(on_meta(llama), bank="rp", inference_mode=True))
    assert not keeps(PeftModel.from_pretrained(on_meta(llama), tmp_path))


WEIGHTS = 8 * 5 * 11 + 3
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def hard_values(dtype):
    """Weights with signs, zeros, infinity and NaN, and a mask over them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(WEIGHTS, generator=generator)
    weight[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -1.0])
    flags = torch.rand(WEIGHTS, generator=generator) < 0.4
    return weight.to(dtype), flags


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_masking_by_pieces_is_the_same(dtype, scaled, in_place, monkeypatch):
    monkeypatch.setattr(product, "_PIECE", 64)
    weight, flags = hard_values(dtype)
    if scaled:
        weight[2:5] = 1.0
    stored = torch.tensor(list(oracles.stored_mask(flags.tolist())), dtype=torch.uint8)
    given = weight.clone()
    made = product.masked_by_pieces(given, stored, scaled=scaled, in_place=in_place)
    expected = weight * flags.to(dtype)
    if scaled:
        expected = expected * (WEIGHTS / flags.sum().float()) ** 0.5
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(made.view(as_bits), expected.view(as_bits))
    assert (made is given) == in_place
    assert in_place or torch.equal(given.view(as_bits), weight.view(as_bits))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bank", BANKS)
def test_layers_by_pieces(bank, scaled, monkeypatch):
    """Two adapters at once, every kind of fill: the same logits, and the bank stays as it was."""
    scale = "sqrt_density" if scaled else None
    options = {**BANKS[bank], "scale": scale, "inference_mode": True, "selector": "topk"}
    model = pemnify(on_cpu(llama), density=0.5, **options)
    model.add_adapter("second", PemnConfig(density=0.8, seed=0, **options))
    model.base_model.set_adapter(["default", "second"])
    keep_weights(model, False)
    bank_values = next(iter(models.mask_layers(model).values())).bank.values
    before, expected = bank_values.clone(), run(model)
    calls = []
    whole = product.masked_by_pieces
    monkeypatch.setattr(product, "_PIECE", 64)
    monkeypatch.setattr(
        product, "masked_by_pieces", lambda *a, **k: calls.append(1) or whole(*a, **k)
    )
    monkeypatch.setattr(library, "kernels", lambda: None)
    models.assert_equal(run(model), expected)
    assert len(calls) == 2 * len(models.mask_layers(model))
    models.assert_equal(bank_values, before)


class Allocations(TorchDispatchMode):
    """Counts the new tensors of at least ``size`` bytes that operators return."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [a for a in [*args, *(kwargs or {}).values()] if isinstance(a, torch.Tensor)]
        before = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            storage = made.untyped_storage()
            if storage.data_ptr() not in before and storage.nbytes() >= self.size:
                self.found.append(str(function))
        return made


@every_way
@pytest.mark.parametrize(("name", "expected"), [("mp", 1), ("rp", 1), ("one_layer", 1)])
def test_an_effective_weight_needs_no_second_tensor_of_its_size(name, expected, way, monkeypatch):
    """Not even one byte a weight beside it."""
    monkeypatch.setattr(product, "_PIECE", 64)
    monkeypatch.setattr(library, "kernels", lambda: WAYS[way])
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
    model = pemnify(base, inference_mode=True, **BANKS[name])
    layer = models.mask_layers(model)["0.weight"]
    layer.keeps = False
    with torch.no_grad():
        layer()  # the stored mask is checked once
        with Allocations(64 * 64) as counted:
            layer()
    assert len(counted.found) == expected, counted.found


def test_bits_with_gradients_stay_on_the_traced_path(monkeypatch):
    """Another adapter's scores need their gradient through the mask."""
    monkeypatch.setattr(product, "_PIECE", 8)
    flags = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    mask = AdapterMask(
        "w", (5, 7), Selector("topk", 0.5, 0.0), scaled=False, stored=bits.pack(flags)
    )
    weight = torch.randn(5, 7, requires_grad=True)
    mask(weight, is_scratch=True).sum().backward()
    assert torch.equal(weight.grad, flags.float())


# ---- planning -----------------------------------------------------------------------------------


def test_seven_billion_are_planned_in_seconds():
    start = time.perf_counter()
    made = plan(big_models.llama("7B"), bank="rp", ratio=1e-2)
    assert time.perf_counter() - start < 20
    block = [4 * 4096 * 4096, 3 * 4096 * 11008]
    weights = 32 * sum(block) + 32000 * 4096
    assert made.masked_weights == weights == 6_607_077_376
    assert made.parameters == weights + 32000 * 4096 + 65 * 4096 == 6_738_415_616
    assert len(made.targets) == 32 * 7 + 1
    assert made.bank_floats == 32000 * 4096 // 100 + 1 == 1_310_721
    assert made.mask_bytes == weights // 8 + 32 * 225 == 825_891_872
    assert made.other_bytes == 4 * (32000 * 4096 + 65 * 4096)
    assert made.coverage == 1.0


# ---- the benchmark ------------------------------------------------------------------------------


def test_benchmark_counts_bytes():
    model = pemnify(on_meta(llama), bank="rp", inference_mode=True)
    made = plan(on_meta(llama), bank="rp")
    held = big_models.held_bytes(model)
    assert held["bits"] == made.mask_bytes
    assert held["bank"] == 4 * made.bank_floats
    assert held["embeddings"] == 4 * 40 * 32
    assert sum(held.values()) == storage_bytes(model)


def test_benchmark_says_how_it_is_used(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["big_models.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        big_models.main()
    assert stopped.value.code == 0
    assert "--json" in capsys.readouterr().out


RESULT = json.loads((models.ROOT / "docs/results/big_models.json").read_text(encoding="utf-8"))
PAGE = (models.ROOT / "docs/big_models.md").read_text(encoding="utf-8")


def gigabytes(count):
    return f"{count / 1e9:.3f}"


@pytest.mark.parametrize("size", [found["size"] for found in RESULT["runs"]])
def test_the_page_has_the_measured_figures(size):
    found = next(item for item in RESULT["runs"] if item["size"] == size)
    assert found["loaded_model_has_the_same_logits"] is True
    peaks, load = found["peak_bytes"], found["load"]["peak_bytes"]
    held = [gigabytes(found["bytes"][kind]) for kind in ("bits", "bank", "embeddings", "others")]
    phases = [peaks["pemnify"], peaks["forward"], load["load"], load["forward"]]
    row = [
        size,
        *held,
        gigabytes(sum(found["bytes"].values())),
        *(gigabytes(phase["median"]) for phase in phases),
        f"{found['peak_over_held']['forward']['median']:.2f}",
    ]
    assert f"| {' | '.join(row)} |" in PAGE


def test_the_largest_figures_are_those_of_the_plan():
    made = plan(big_models.llama("7B"), bank="rp", ratio=1e-2)
    found = next(item for item in RESULT["runs"] if item["size"] == "7B")
    assert found["bytes"]["bits"] == made.mask_bytes
    assert found["bytes"]["bank"] == 4 * made.bank_floats
    assert found["seconds"]["plan"]["max"] < 5
