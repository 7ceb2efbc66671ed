"""Masks on weights that bitsandbytes and torchao store quantised.

The oracle: the library's own dequantised weight x mask, through ``F.linear``.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel
from peft.utils import quantization_utils
from torch import nn

from pemn_surgery import PemnConfig, from_finetuned, pemnify, plan
from pemn_surgery.adapters import quantised
from pemn_surgery.errors import (
    FingerprintError,
    MaskedWeightError,
    NothingToMaskError,
    UnsupportedModelError,
)
from pemn_surgery.masks.attached import names_owned

pytestmark = [
    # torchao 0.18 registers enums with torch in a way that torch 2.15 warns of.
    pytest.mark.filterwarnings("ignore:.*Enum subclass.*"),
    # bitsandbytes says on a CPU that its 8-bit product rounds its input.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]

KINDS = ["4bit", "8bit", "torchao"]
OPTIONS = {"bank": "own", "selector": "topk", "target_modules": ["a"]}


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.a = make(64, 128)
        self.b = nn.Linear(128, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def base(kind, seed=0):
    """Return a quantised model in eval mode."""
    torch.manual_seed(seed)
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        model = Net(nn.Linear).eval()
        torchao.quantize_(model.a, torchao.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "4bit":
        return Net(lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32)).cpu().eval()
    return Net(lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)).to("cpu").eval()


def dequantised(kind, layer):
    """Return a plain layer's values by the library's own function."""
    if kind == "torchao":
        return layer.weight.dequantize()
    functional = pytest.importorskip("bitsandbytes").functional
    if kind == "4bit":
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def inputs():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(5))


def expected(model, values, x):
    """Return the model's output with a plain weight in place of the masked one."""
    return model.b(F.relu(F.linear(x, values, model.a.bias)))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def masked(kind, **options):
    """Return the PEFT model, the bare model, the dequantised weight and the mask."""
    model = base(kind)
    values = dequantised(kind, model.a)
    whole = pemnify(model, **{**OPTIONS, **options})
    mask = model.a.masked_weight.mask_of("default").mask()
    assert 0 < mask.sum() < mask.numel()
    return whole, model, values, mask


def test_plan_counts_the_values_and_not_what_they_are_packed_into(kind):
    made = plan(base(kind), bank="own", selector="topk")
    assert [(t.name, t.shape, t.fan_in) for t in made.targets] == [
        ("a.weight", (128, 64), 64),
        ("b.weight", (4, 128), 128),
    ]
    assert made.parameters == 128 * 64 + 128 + 4 * 128 + 4
    assert made.coverage == 1.0


def test_output_gradient_and_weight(kind):
    whole, model, values, mask = masked(kind)
    stored = model.a._parameters["weight"]
    assert torch.equal(model.a.weight, values * mask)
    assert model.a.weight.dtype == torch.float32
    x = inputs()
    out = whole(x)
    assert torch.equal(out, expected(model, values * mask, x))
    out.square().sum().backward()
    weight = (values * mask).requires_grad_()
    expected(model, weight, x).square().sum().backward()
    scores = model.a.masked_weight.mask_of("default").scores
    wanted = weight.grad * values * scores.detach().sign()  # topk goes by magnitude
    torch.testing.assert_close(scores.grad, wanted)
    assert model.a._parameters["weight"] is stored
    assert stored.grad is None
    assert model.a.masked_weight._kept.weight is None


def test_state_dict_is_the_base_s(kind):
    before = base(kind).state_dict()
    _, model, _, _ = masked(kind)
    after = {k: v for k, v in model.state_dict().items() if "masked_weight" not in k}
    assert after.keys() == before.keys()
    assert len(before) >= 4
    for name, value in before.items():
        held = after[name]
        same = (value.dequantize(), held.dequantize()) if name == "a.weight" else (value, held)
        assert torch.equal(*(same if kind == "torchao" else (value, held)))


def test_disabled_and_unloaded_are_the_base_bit_for_bit(kind):
    x = inputs()
    with torch.no_grad():
        wanted = base(kind)(x)
        whole, model, _, _ = masked(kind)
        with whole.disable_adapter():
            assert torch.equal(whole(x), wanted)
        found = whole.unload()
        assert found is model
        assert torch.equal(found(x), wanted)
    assert type(model.a) is type(base(kind).a)


def test_merge_is_exact_and_unmerge_too(kind):
    whole, model, values, mask = masked(kind)
    x = inputs()
    out = whole(x)
    whole.merge_adapter(safe_merge=True)
    assert torch.equal(whole(x), out)
    assert torch.equal(model.a.weight, values * mask)
    whole.unmerge_adapter()
    assert torch.equal(whole(x), out)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_merge_and_unload_quantises_again(kind):
    whole, model, values, mask = masked(kind)
    before = type(model.a._parameters["weight"])
    found = whole.merge_and_unload()
    assert found is model
    assert type(model.a) is type(base(kind).a)
    assert type(model.a.weight) is before
    fresh = base(kind)
    backend = quantised.resolve_backend(fresh.a)
    quantised.store(backend, fresh.a, values * mask)
    assert torch.equal(dequantised(kind, model.a), dequantised(kind, fresh.a))
    error = (dequantised(kind, model.a) - values * mask).abs().max() / values.abs().max()
    assert error < {"4bit": 0.2, "8bit": 0.01}[kind]


def test_merge_and_unload_of_torchao_needs_to_know_how():
    whole, model, values, mask = masked("torchao")
    with pytest.raises(UnsupportedModelError, match=r"does not say how.*Nothing was changed"):
        whole.merge_and_unload()
    assert torch.equal(model.a.weight, values * mask)
    torchao = pytest.importorskip("torchao.quantization")
    model.a.masked_weight.quantization_backend.get_apply_tensor_subclass = (
        torchao.Int8WeightOnlyConfig
    )
    whole.merge_and_unload()
    torch.testing.assert_close(model.a.weight.dequantize(), values * mask, atol=1e-3, rtol=0)


def test_save_and_load(kind, tmp_path):
    whole, *_ = masked(kind)
    x = inputs()
    out = whole(x)
    whole.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(kind), tmp_path)
    assert again.base_model.model.a.masked_weight.mask_of("default").bits is not None
    assert torch.equal(again(x), out)
    with pytest.raises(FingerprintError):
        PeftModel.from_pretrained(base(kind, seed=1), tmp_path)


def test_second_adapter(kind):
    whole, model, values, mask = masked(kind, score_init="kaiming_uniform")
    options = {**OPTIONS, "score_init": "kaiming_uniform", "seed": 7}
    whole.add_adapter("second", PemnConfig(**options))
    whole.set_adapter("second")
    second = model.a.masked_weight.mask_of("second").mask()
    assert not torch.equal(second, mask)
    assert torch.equal(model.a.weight, values * second)


def test_copies_and_pickles(kind):
    whole, _, values, mask = masked(kind)
    x = inputs()
    out = whole(x)
    twins = [copy.deepcopy(whole)]
    if kind != "torchao":  # whose layers cannot be pickled, masked or not
        twins.append(pickle.loads(pickle.dumps(whole)))
    for twin in twins:
        assert torch.equal(twin(x), out)
        assert torch.equal(twin.base_model.model.a.weight, values * mask)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_half_precision_inputs(kind):
    """As bitsandbytes casts: to the 4-bit layer's compute type, else to the input's."""
    _, model, values, mask = masked(kind)
    model.a.bias.data = model.a.bias.data.bfloat16()
    x = inputs().bfloat16()
    compute = torch.float32 if kind == "4bit" else torch.bfloat16
    args = (x.to(compute), (values * mask).to(compute), model.a.bias.to(compute))
    wanted = F.linear(*args).bfloat16()
    assert torch.equal(model.a(x), wanted)


def test_other_banks_are_refused(kind):
    made = plan(base(kind), bank="mp")
    (left,) = [item for item in made.left if item.name == "a.weight"]
    assert left.maskable
    assert left.shape == (128, 64)
    assert left.why.endswith('which only bank="own" with bank_init="model" can mask')
    assert plan(base(kind), bank="own", bank_init="signed_constant").left[0].name == "a.weight"
    with pytest.raises(NothingToMaskError, match='only bank="own"'):
        pemnify(base(kind), bank="mp", target_modules=["a"])


def test_unreadable_kinds_are_refused(monkeypatch):
    backend = quantization_utils.ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr(quantised, "resolve_quantization_backend", lambda layer, **_: backend)
    model = Net(nn.Linear)
    model.a.weight = nn.Parameter(torch.ones(128, 32, dtype=torch.int8), requires_grad=False)
    (left,) = plan(model, bank="own", selector="topk").left
    assert left.why == "is stored as gptq (quantised), which PEFT cannot dequantise"


def test_weights_packed_into_buffers_are_in_the_plan(monkeypatch):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 64, 128
            self.register_buffer("qweight", torch.zeros(8, 128, dtype=torch.int32))

    backend = quantization_utils.ForwardOnlyQuantizationBackend("awq")
    monkeypatch.setattr(
        quantised,
        "resolve_quantization_backend",
        lambda layer, **_: backend if isinstance(layer, Packed) else None,
    )
    made = plan(nn.Sequential(Packed(), nn.Linear(128, 4)), bank="own", selector="topk")
    (left,) = made.left
    assert (left.name, left.shape) == ("0.weight", (128, 64))
    assert left.why == "is stored as awq (quantised), which PEFT cannot dequantise"
    assert made.coverage == 512 / (512 + 128 * 64)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_weights_that_wait_for_their_device_are_refused(kind):
    bnb = pytest.importorskip("bitsandbytes")
    eight = nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    model = eight if kind == "8bit" else nn.Sequential(bnb.nn.Linear4bit(8, 8))
    (left,) = plan(model, bank="own", selector="topk").left
    assert left.why == f"is not yet quantised (bnb {kind}); move the model to its device first"


def test_accelerate_hook_runs_the_masked_forward():
    model = base("4bit")
    values = dequantised("4bit", model.a)
    add_hook_to_module(model.a, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    whole = pemnify(model, **OPTIONS)
    mask = model.a.masked_weight.mask_of("default").mask()
    assert torch.equal(whole(inputs()), expected(model, values * mask, inputs()))


def test_layout_for_cpu_kernels():
    """bitsandbytes lays 4-bit weights out anew at a forward in eval mode on some CPUs."""
    functional = pytest.importorskip("bitsandbytes").functional
    model = base("4bit")
    values = dequantised("4bit", model.a)
    weight = model.a.weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    assert weight.shape == (128, 32)
    pemnify(model, **OPTIONS)
    fill = model.a.masked_weight.fill()
    torch.testing.assert_close(fill, values, rtol=2**-8, atol=0)  # its scales are bfloat16


def test_task_s_own_bias_beside_an_unmasked_quantised_weight():
    """bitsandbytes' own forward reads the bias: it must get the task's, not the base's."""
    model = base("4bit")
    options = {**OPTIONS, "target_modules": ["b"], "rest": "train"}
    whole = pemnify(model, **options)
    bias = model.a.task_tensors.pemn_tensors["default"].bias
    with torch.no_grad():
        before = whole(inputs())
        bias.add_(1.0)
        assert not torch.allclose(whole(inputs()), before)


def test_finetuned_pair_of_quantised_models_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match="stores 1 weights quantised"):
        from_finetuned(base(kind), base(kind), method="mask", target_modules=["a"])


AFTER = [
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
]


def plain(**options):
    torch.manual_seed(0)
    return pemnify(Net(nn.Linear), **options).eval()


@pytest.mark.parametrize("config", AFTER)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("bank", ["own", "rp", "mp"])
def test_quantising_what_is_masked_is_refused(bank, inference, config):
    """By torchao's own ``quantize_``; merged, the model is quantised as any."""
    torchao = pytest.importorskip("torchao.quantization")
    options = {"ratio": 0.3} if bank == "rp" else {}
    model = plain(bank=bank, inference_mode=inference, modules_to_save=[], **options)
    x = inputs()
    out = model(x)
    match = "quantise or tie a model before it gets masks|the bank fills it"
    with pytest.raises(MaskedWeightError, match=rf"Linear at 'a\.weight'.*({match})"):
        torchao.quantize_(model, getattr(torchao, config)())
    assert torch.equal(model(x), out)
    merged = model.merge_and_unload()
    torchao.quantize_(merged, getattr(torchao, config)())
    assert type(merged.a.weight).__module__.startswith("torchao")
    torch.testing.assert_close(merged(x), out, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("bank", ["own", "rp"])
def test_quantising_what_a_task_owns_is_refused(bank):
    torchao = pytest.importorskip("torchao.quantization")
    options = {"ratio": 0.3} if bank == "rp" else {}
    model = plain(bank=bank, rest="train", target_modules=["b"], **options)
    x = inputs()
    out = model(x)
    with pytest.raises(MaskedWeightError, match="Int8Tensor, which no adapter's file can hold"):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda _, name: "a" in name[-1:])
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("options", [{"bank": "rp", "ratio": 0.3}, {"bank": "mp"}])
def test_a_quantised_weight_that_would_be_the_tasks_is_refused(kind, options):
    model = base(kind)
    out = model(inputs())
    with pytest.raises(
        UnsupportedModelError, match=r"'a\.weight' is stored as .*would be the task"
    ):
        pemnify(model, **options, modules_to_save=[])
    assert torch.equal(model(inputs()), out)


def test_a_quantised_weight_is_the_tasks_only_where_it_could_train():
    """bitsandbytes' are whole numbers, which nobody trains; torchao's look like floats."""
    options = {"bank": "own", "selector": "topk", "target_modules": ["b"]}
    for kind, rest in (("4bit", "train"), ("torchao", "stats")):
        model = base(kind)
        pemnify(model, **options, rest=rest)
        assert "weight" not in names_owned(model.a)
    with pytest.raises(UnsupportedModelError, match=r'rest="stats" or "norms" leaves it'):
        pemnify(base("torchao"), **options, rest="train")


class Packed(torch.Tensor):
    """Stands for a library's tensors."""


def test_what_was_quantised_afterwards_is_not_saved(tmp_path):
    """A head that is saved whole, which is a plain module."""
    model = plain(bank="own", selector="topk", modules_to_save=["b"])
    head = model.base_model.model.b.modules_to_save["default"]
    head.weight = nn.Parameter(head.weight.data.as_subclass(Packed), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"b\.weight' is a .*quantised after"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_import_takes_no_library_along():
    code = (
        "import sys, pemn_surgery; "
        "print([m for m in ('bitsandbytes', 'torchao', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
