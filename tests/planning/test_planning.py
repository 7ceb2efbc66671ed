"""The plan: every weight, what happens to it and why; the totals; that nothing is touched."""

import copy
import json
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import GPT2Config, GPT2LMHeadModel

from pemn_surgery import PemnConfig, pemnify, plan
from pemn_surgery.errors import (
    AlreadyPemnifiedError,
    ConfigError,
    LowCoverageWarning,
    NothingToMaskError,
    UnsupportedModelError,
)


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.Linear(5, 3))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 5, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.deep(self.norm(self.stem(x))).mean((2, 3)))


class Odd(nn.Module):
    """One of everything that cannot be masked."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 3, 4))
        self.words = nn.Embedding(7, 4)
        self.bag = nn.EmbeddingBag(7, 4)
        self.rnn = nn.LSTM(4, 4)
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.fc = nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)


def gpt2():
    config = GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def reasons(made):
    return {item.name: item.reason for item in made.left}


def names(made):
    return [target.name for target in made.targets]


# ---- targets, left, owned ---------------------------------------------------------------------


def test_mlp():
    made = plan(mlp(), bank="own")
    assert names(made) == ["0.weight", "2.weight", "3.weight"]
    assert [t.shape for t in made.targets] == [(5, 6), (5, 5), (3, 5)]
    assert [t.fan_in for t in made.targets] == [6, 5, 5]
    assert [t.kind for t in made.targets] == ["Linear"] * 3
    assert [t.weights for t in made.targets] == [30, 25, 15]
    assert made.left == ()
    assert made.owned == ()
    assert made.layout is None
    assert made.bank_floats == 0
    assert made.frozen_norms == ()
    assert made.coverage == 1.0


def test_totals_by_hand():
    """70 weights + 8 biases; masks are 32 bytes + one bit a weight; biases travel."""
    made = plan(mlp(), bank="mp")
    assert made.parameters == 78
    assert made.masked_weights == made.maskable_weights == 70
    assert made.mask_bytes == (32 + 4) + (32 + 4) + (32 + 2)
    assert [(o.name, math.prod(o.shape), o.nbytes, o.trained) for o in made.owned] == [
        ("0.bias", 5, 20, True),
        ("3.bias", 3, 12, True),
    ]
    assert made.other_bytes == 32
    assert made.bank_floats == 30
    assert made.frame_bytes > 1000  # the configuration twice, and names; tests/adapters has all
    assert made.ratio(4) == 78 * 4 / (106 + 32 + made.frame_bytes)
    assert made.ratio(2) == 78 * 2 / (106 + 32 + made.frame_bytes)
    totals = made.as_dict()["totals"]
    assert totals == {
        **totals,
        "parameters": 78,
        "masked_weights": 70,
        "maskable_weights": 70,
        "coverage": 1.0,
        "bank_floats": 30,
        "mask_bytes": 106,
        "other_bytes": 32,
        "file_bytes": 106 + 32 + made.frame_bytes,
        "ratio_fp32": made.ratio(4),
        "ratio_fp16": made.ratio(2),
    }


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.data())
def test_totals_of_any_mlp(sizes, data):
    layers = [nn.Linear(a, b, bias=data.draw(st.booleans())) for a, b in sizes]
    made = plan(nn.Sequential(*layers), bank="rp", ratio=0.1)
    counts = [a * b for a, b in sizes]
    assert made.masked_weights == sum(counts)
    assert made.mask_bytes == sum(32 + math.ceil(count / 8) for count in counts)
    assert made.parameters == sum(counts) + sum(
        b for (_, b), layer in zip(sizes, layers, strict=True) if layer.bias is not None
    )
    assert made.bank_floats == min(int(max(counts) * 0.1) + 1, max(counts))
    first_largest = counts.index(max(counts))
    assert made.layout.by_shape[0][1].source == f"{first_largest}.weight"


@pytest.mark.parametrize(
    ("rest", "trained", "carried"),
    [
        ("train", ["norm.weight", "norm.bias", "deep.bias", "head.bias"], ["running"]),
        ("norms", ["norm.weight", "norm.bias"], ["running"]),
        ("stats", [], ["running"]),
        ("freeze", [], []),
    ],
)
def test_conv_net_on_its_own_weights(rest, trained, carried):
    made = plan(ConvNet(), bank="own", rest=rest)
    assert [(t.name, t.shape, t.fan_in) for t in made.targets] == [
        ("stem.weight", (8, 3, 3, 3), 27),
        ("deep.weight", (8, 1, 5, 5), 25),
        ("head.weight", (4, 8), 8),
    ]
    saved = {o.name: o for o in made.owned if getattr(o, "saved", True)}
    assert [name for name, item in saved.items() if item.trained] == trained
    moving = ["norm.running_mean", "norm.running_var"] if carried else []
    assert [name for name, item in saved.items() if not item.trained] == moving
    assert made.frozen_norms == (("norm",) if rest == "freeze" else ())
    assert made.other_bytes == sum(o.nbytes for o in saved.values())


def test_with_drawn_numbers_everything_random_travels():
    """Seed and file make the model: biases and statistics are in the file whatever trains."""
    for rest in ("train", "norms", "stats", "freeze"):
        made = plan(ConvNet(), bank="mp", rest=rest)
        saved = {o.name for o in made.owned if getattr(o, "saved", True)}
        assert saved == {
            *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
            *("deep.bias", "head.bias"),
        }


def test_the_batch_counter_is_saved_where_it_is_read():
    """Without a momentum BatchNorm averages over all batches and needs their number."""
    net = ConvNet()
    net.norm.momentum = None
    made = plan(net, bank="own", rest="stats")
    saved = {o.name for o in made.owned if getattr(o, "saved", True)}
    assert saved == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert made.other_bytes == 8 * 4 * 2 + 8


def test_a_tied_language_model_head_is_left():
    model = gpt2()
    made = plan(model, bank="own")
    inside = [name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2]
    assert len(inside) == 8
    assert names(made) == inside
    assert all(target.kind == "Conv1D" for target in made.targets)
    attention = made.targets[0]
    assert (attention.shape, attention.fan_in) == ((8, 24), 8)
    left = {item.name: item for item in made.left}
    assert set(left) == {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert left["transformer.wte.weight"].reason.startswith("an embedding")
    assert left["lm_head.weight"].reason.startswith("tied to transformer.wte.weight, which ")
    assert "an embedding" in left["lm_head.weight"].reason
    assert left["lm_head.weight"].kind == "Linear"
    head = model.lm_head.weight.numel()  # it is a product's weight, though it is an embedding too
    assert made.maskable_weights == made.masked_weights + head == 1624
    assert made.parameters == sum(p.numel() for p in model.parameters())


def test_tied_embeddings_travel_once():
    made = plan(gpt2(), bank="mp", rest="train")
    tied = {o.name: o.tied_to for o in made.owned if o.tied_to}
    assert tied == {"lm_head.weight": "transformer.wte.weight"}
    assert made.other_bytes == sum(
        4 * p.numel()
        for name, p in gpt2().named_parameters()
        if not (".h." in name and p.dim() == 2)
    )


def test_tied_linear_layers_are_one_target():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    made = plan(net, bank="own")
    assert [(t.name, t.tied) for t in made.targets] == [("0.weight", ("1.weight",))]
    assert made.parameters == 16 + 8


def test_a_tie_to_a_layer_that_is_left_leaves_both():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    made = plan(net, bank="own", exclude_modules=["1"])
    assert names(made) == ["2.weight"]
    assert "exclude_modules" in reasons(made)["1.weight"]
    assert reasons(made)["0.weight"].startswith("tied to 1.weight")
    assert made.maskable_weights == 32


def test_what_cannot_be_masked_is_listed_with_a_reason():
    made = plan(Odd(), bank="own")
    assert names(made) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "up.weight", "fc.weight"]
    assert reasons(made) == {
        "position": "a raw parameter, not the weight of a layer",
        "words.weight": "an embedding, masked only if target_modules names it",
        "bag.weight": "an embedding, masked only if target_modules names it",
    }
    assert {item.kind for item in made.left} == {
        "Odd",
        "Embedding",
        "EmbeddingBag",
    }
    assert {item.weights for item in made.left} == {12, 28}


def test_nothing_of_two_dimensions_is_forgotten():
    for model in (Odd(), ConvNet(), gpt2(), Tower(), mlp()):
        made = plan(model, bank="mp", modules_to_save=[])
        listed = {
            *names(made),
            *reasons(made),
            *(t for target in made.targets for t in target.tied),
        }
        wide = {n for n, p in model.named_parameters(remove_duplicate=False) if p.dim() >= 2}
        assert len(wide) > 2
        assert listed == wide


def test_quantised_weight():
    net = mlp()
    net[0].weight = nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)
    made = plan(net, bank="own")
    assert names(made) == ["2.weight", "3.weight"]
    assert reasons(made) == {"0.weight": "is stored as torch.int8 (quantised)"}
    assert made.coverage == 40 / 70
    said = "30 of 70 maskable weights stay unmasked (43%); the largest is 0.weight: is stored as"
    assert f"WARNING: {said} torch.int8" in str(made).replace("\n", " ")
    assert made.warning.startswith(said)
    with pytest.warns(LowCoverageWarning, match="30 of 70 maskable weights stay unmasked"):
        pemnify(net, bank="own")
    net[0].weight.requires_grad_(requires_grad=False)


def test_weights_that_only_look_like_floats_stay():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    wrapped = TwoTensor(torch.ones(2, 3), torch.zeros(2, 3))
    model[0].weight = nn.Parameter(wrapped, requires_grad=False)
    made = plan(model, bank="own")
    assert names(made) == ["1.weight"]
    assert reasons(made) == {"0.weight": "is stored as TwoTensor (quantised)"}


def test_chosen_targets_are_not_warned_of():
    pemnify(mlp(), bank="own", target_modules=["2"])
    pemnify(mlp(), bank="own", exclude_modules=["0"])


def test_parametrised_weight():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 3))
    made = plan(net, bank="own")
    assert names(made) == ["1.weight"]
    left = reasons(made)
    assert set(left) == {
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }
    assert all(left.values())


def test_old_weight_norm():
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(4, 3))
    made = plan(nn.Sequential(normed, nn.Linear(3, 3)), bank="own")
    assert names(made) == ["1.weight"]
    assert set(reasons(made)) == {"0.weight_g", "0.weight_v"}


def test_lazy_layer():
    made = plan(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), bank="own")
    assert names(made) == ["1.weight"]
    assert reasons(made)["0.weight"] == "has no shape yet (lazy)"
    assert made.parameters == 12


def test_empty_weight():
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 3))
    made = plan(net, bank="own")
    assert names(made) == ["1.weight"]
    assert reasons(made) == {"0.weight": "has no elements"}


def test_the_model_itself_cannot_be_swapped():
    made = plan(nn.Linear(3, 4), bank="own")
    assert made.targets == ()
    assert "torch.nn.Sequential" in reasons(made)["weight"]
    assert made.coverage == 0.0


# ---- choosing ---------------------------------------------------------------------------------


def test_target_modules():
    made = plan(Tower(), bank="own", target_modules=["up"])
    assert names(made) == ["layers.0.up.weight", "layers.1.up.weight", "layers.2.up.weight"]
    assert set(reasons(made).values()) == {"not in target_modules"}
    assert len(made.left) == 4
    assert made.coverage == 96 / (96 + 96 + 8)
    by_pattern = plan(Tower(), bank="own", target_modules=r"layers\.[02]\.down|head")
    assert names(by_pattern) == ["layers.0.down.weight", "layers.2.down.weight", "head.weight"]


def test_exclude_modules():
    made = plan(Tower(), bank="own", exclude_modules=["down", "head"])
    assert names(made) == ["layers.0.up.weight", "layers.1.up.weight", "layers.2.up.weight"]
    assert set(reasons(made).values()) == {"in exclude_modules"}


def test_layers_to_transform():
    made = plan(Tower(), bank="own", layers_to_transform=[1], layers_pattern="layers")
    assert names(made) == ["layers.1.up.weight", "layers.1.down.weight"]
    one = plan(nn.ModuleDict({"body": Tower()}), bank="own", layers_to_transform=2)
    assert names(one) == ["body.layers.2.up.weight", "body.layers.2.down.weight"]
    both = plan(
        nn.ModuleDict({"body": Tower()}),
        bank="own",
        target_modules=["up"],
        layers_to_transform=[0, 2],
    )
    assert names(both) == ["body.layers.0.up.weight", "body.layers.2.up.weight"]


LAYERS = [
    ({"layers_to_transform": [9]}, "indices 0 to 2, not 9."),
    ({"layers_to_transform": [0, 9, 7]}, "indices 0 to 2, not 7, 9."),
    ({"layers_to_transform": 3, "layers_pattern": "layers"}, "indices 0 to 2, not 3."),
    ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "no indices that PEFT's names"),
    ({"layers_to_transform": [-1], "target_modules": ["up"]}, "indices 0 to 2, not -1."),
]


@pytest.mark.parametrize(("options", "said"), LAYERS, ids=str)
def test_layers_that_there_are_not(options, said):
    model = nn.ModuleDict({"body": Tower()})
    for verb in (plan, pemnify):
        with pytest.raises(ConfigError) as error:
            verb(model, bank="own", **options)
        assert said in str(error.value)
        assert f"layers_to_transform={options['layers_to_transform']}" in str(error.value)
    assert type(model["body"].layers[0].up) is nn.Linear


def test_layers_are_looked_for_whatever_is_excluded():
    """A layer that exists and is left out in other words is no mistake."""
    options = {"layers_to_transform": [1, 2], "exclude_modules": [r"layers.1.up", "layers.1.down"]}
    made = plan(nn.ModuleDict({"body": Tower()}), bank="own", **options)
    assert names(made) == ["body.layers.2.up.weight", "body.layers.2.down.weight"]


def test_modules_to_save():
    made = plan(Tower(), bank="mp", modules_to_save=["head"])
    assert names(made) == [f"layers.{i}.{part}.weight" for i in range(3) for part in ("up", "down")]
    assert reasons(made) == {"head.weight": "trained and saved whole (modules_to_save)"}
    assert not any(o.path == "head" for o in made.owned)
    assert made.left[0].maskable is True


def test_target_parameters():
    options = {"bank": "own", "target_parameters": ["position"]}
    alone = plan(Odd(), target_modules=[], **options)
    assert [(t.name, t.path, t.fan_in) for t in alone.targets] == [("position", "", 4)]
    further = {target.name for target in plan(Odd(), **options).targets}
    assert further == {target.name for target in plan(Odd(), bank="own").targets} | {"position"}
    assert len(further) > 1


def timm_model(device="cpu"):
    with torch.device(device):
        return timm.create_model("resnet10t", num_classes=3)


def test_a_timm_head_on_pretrained_weights_is_saved_whole():
    made = plan(timm_model("meta"), bank="own")
    assert reasons(made) == {"fc.weight": "trained and saved whole (modules_to_save): linear"}
    assert reasons(plan(timm_model("meta"), bank="own", modules_to_save=[])) == {}
    assert reasons(plan(timm_model("meta"), bank="mp")) == {}


# ---- a value that touches nothing -------------------------------------------------------------


def snapshot(model):
    """Every module's class and attributes, every tensor's identity, version and values."""
    state = {}
    for path, module in model.named_modules():
        state[path] = (type(module), set(module.__dict__), module.training, list(module._modules))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                values = None if tensor.is_meta else tensor.detach().clone()
                key = f"{path}:{name}"
                state[key] = (id(tensor), tensor._version, tensor.requires_grad, values)
    return state


def assert_untouched(before, after):
    assert set(before) == set(after)
    assert len(before) > 4
    for key, old in before.items():
        new = after[key]
        assert old[:3] == new[:3], key
        if isinstance(old[3], torch.Tensor):
            assert torch.equal(old[3], new[3]), key
        else:
            assert old[3] == new[3], key


MODELS = {"mlp": mlp, "convs": ConvNet, "odd": Odd, "tower": Tower, "gpt2": gpt2}
BANKS = {
    "own": {"bank": "own"},
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.1, "permute": True},
    "one_layer": {"bank": "one_layer"},
    "model": {"bank": "mp", "bank_init": "model"},
}


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", MODELS)
def test_planning_touches_nothing(name, bank):
    model = MODELS[name]()
    before = snapshot(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made = plan(model, **BANKS[bank])
    assert torch.equal(torch.rand(3), expected), "planning drew random numbers"
    assert made.targets
    assert_untouched(before, snapshot(model))


def test_planning_leaves_the_configuration_alone():
    """One configuration for several models: a plan must not write the first one's head into it."""
    config = PemnConfig(bank="own")
    before = copy.deepcopy(config.__dict__)
    plan(timm_model("meta"), config)
    assert config.__dict__ == before


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", MODELS)
def test_meta_device(name, bank):
    if name == "gpt2":
        model = gpt2().to("meta")
        model.tie_weights()
    else:
        with torch.device("meta"):
            model = MODELS[name]()
    made = plan(model, **BANKS[bank])
    assert made.targets
    assert made == plan(MODELS[name](), **BANKS[bank])
    assert all(tensor.is_meta for tensor in model.parameters())


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_a_pemnified_model_has_the_same_plan(name, bank):
    model = MODELS[name]()
    expected = plan(model, **BANKS[bank])
    rewritten = pemnify(model, **BANKS[bank])
    assert plan(rewritten.get_base_model(), **BANKS[bank]) == expected
    masks = [n for n, _ in rewritten.named_parameters() if n.endswith(".scores")]
    assert len(masks) == len(expected.targets) > 0


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", MODELS)
def test_as_dict_is_json(name, bank):
    made = plan(MODELS[name](), **BANKS[bank])
    again = json.loads(json.dumps(made.as_dict()))
    assert [t["path"] for t in again["targets"]] == [t.path for t in made.targets]
    assert [tuple(t["shape"]) for t in again["targets"]] == [t.shape for t in made.targets]
    assert [item["reason"] for item in again["left"]] == [item.reason for item in made.left]
    assert again["spec"]["bank"] == BANKS[bank]["bank"]
    assert again["totals"]["masked_weights"] == sum(math.prod(t["shape"]) for t in again["targets"])


def test_table_groups_repeated_blocks():
    rows = {row["tensor"]: row for row in plan(Tower(), bank="own").groups()}
    assert set(rows) == {"layers.*.up.weight", "layers.*.down.weight", "head.weight"}
    up = rows["layers.*.up.weight"]
    assert (up["count"], up["weights"], up["action"], up["shape"]) == (3, 96, "mask", "8x4")
    text = str(plan(Tower(), bank="own"))
    assert "200 of 200 maskable weights masked (100.0%), bank own" in text
    assert "WARNING" not in text


@pytest.mark.parametrize("bank", BANKS)
def test_what_was_planned_is_what_is_saved(bank, tmp_path):
    """Bytes of masks and other tensors, against the file."""
    from safetensors.torch import load_file

    model = ConvNet()
    made = plan(model, **BANKS[bank])
    pemnify(model, **BANKS[bank]).save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    masks = {k: v for k, v in file.items() if k.endswith(".bits")}
    others = {k: v for k, v in file.items() if k not in masks}
    assert len(masks) == len(made.targets) == 3
    assert sum(v.numel() for v in masks.values()) == made.mask_bytes
    assert sum(v.numel() * v.element_size() for v in others.values()) == made.other_bytes


# ---- refusals ---------------------------------------------------------------------------------


def test_nothing_to_mask():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4))
    before = snapshot(nn.Sequential(model, nn.Identity(), nn.Identity()))
    with pytest.raises(NothingToMaskError) as caught:
        pemnify(model)
    message = str(caught.value)
    assert "36 parameters" in message
    assert "1 x an embedding" in message
    assert "Nothing was changed" in message
    assert_untouched(before, snapshot(nn.Sequential(model, nn.Identity(), nn.Identity())))


@pytest.mark.parametrize("verb", [pemnify, plan])
def test_what_is_no_plain_module(verb):
    with pytest.raises(UnsupportedModelError, match=r"Got str; a torch\.nn\.Module is needed"):
        verb("resnet18")
    with pytest.raises(UnsupportedModelError, match="DataParallel around the model"):
        verb(nn.DataParallel(mlp()))
    with pytest.raises(UnsupportedModelError, match="OptimizedModule around the model"):
        verb(torch.compile(mlp()))


def test_twice():
    model = mlp()
    rewritten = pemnify(model, bank="own")
    before = snapshot(rewritten)
    for again in (model, rewritten):
        with pytest.raises(AlreadyPemnifiedError, match=r"in 3 places already \(first: "):
            pemnify(again, bank="own")
    assert_untouched(before, snapshot(rewritten))


@pytest.mark.parametrize("verb", [pemnify, plan])
def test_options(verb):
    with pytest.raises(
        ConfigError,
        match=r"Unknown option desity\. Did you mean density\? PemnConfig has: .*density",
    ):
        verb(mlp(), desity=0.5)
    with pytest.raises(ConfigError, match=r"options beside it \(seed\)"):
        verb(mlp(), PemnConfig(), seed=3)
    with pytest.raises(ConfigError, match=r"density=50.*0 < value <= 1"):
        verb(mlp(), density=50)
