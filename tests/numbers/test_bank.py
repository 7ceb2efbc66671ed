"""The bank: every fill against a loop from METHODS section 1; one storage whatever happens."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import BankMismatchError
from pemn_surgery.masks.attached import find_masked
from pemn_surgery.numbers import bank, rng
from pemn_surgery.numbers.bank import BankSpec, build, draw, lay_out, rp_length
from tests import oracles

CPU = torch.device("cpu")
SIDES = st.integers(1, 6)
SHAPES = st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.just(3), st.just(3)))
MODELS = st.lists(SHAPES, min_size=1, max_size=6)
RATIOS = st.one_of(st.floats(1e-5, 1.0), st.sampled_from([1e-5, 1e-3, 1e-2, 0.1, 0.5, 1.0]))


def spec(name="mp", init="kaiming_normal", **changes):
    return BankSpec(bank=name, init=init, **changes)


def weights_of(shapes):
    """(name, shape, fan_in) of every weight; fan-ins as torch counts them."""
    return [(f"l{i}.weight", shape, math.prod(shape[1:])) for i, shape in enumerate(shapes)]


def make(bank_spec, shapes, dtype=torch.float32, weight_of=None):
    return build(lay_out(bank_spec, weights_of(shapes)), weight_of, dtype, CPU)


def first_largest(shapes):
    sizes = [math.prod(shape) for shape in shapes]
    return shapes[sizes.index(max(sizes))]


def drawn(seed, stream, shape, density=1.0):
    """He et al. 2015: normal numbers of standard deviation sqrt(2 / fan)."""
    fan = math.prod(shape[1:]) * density
    return rng.normal(seed, stream, math.prod(shape), math.sqrt(2 / fan)).tolist()


def as_fill(values, shape):
    return torch.tensor(values, dtype=torch.float32).view(shape)


@given(MODELS, st.integers(0, 99))
def test_mp(shapes, seed):
    """w is the flattened first-largest layer; every layer takes w[:n].view(shape)."""
    made = make(spec("mp", seed=seed), shapes)
    vector = drawn(seed, "bank", first_largest(shapes))
    assert made.values.tolist() == vector
    for shape in shapes:
        oracles.assert_same(made(shape), as_fill(vector[: math.prod(shape)], shape))


@given(MODELS, RATIOS, st.integers(0, 99))
def test_rp(shapes, ratio, seed):
    """d = int(N r) + 1; w[:d] is tiled and cut to N; every layer takes the beginning."""
    made = make(spec("rp", ratio=ratio, seed=seed), shapes)
    largest = math.prod(first_largest(shapes))
    d = min(int(largest * ratio) + 1, largest)
    vector = drawn(seed, "bank", first_largest(shapes))
    assert made.values.tolist() == vector[:d]
    whole = oracles.tiled(vector[:d], largest)
    for shape in shapes:
        fill = made(shape)
        oracles.assert_same(fill, as_fill(whole[: math.prod(shape)], shape))
        assert fill.unique().numel() <= int(largest * ratio) + 1


@given(MODELS, RATIOS, st.integers(0, 99))
def test_rp_permuted(shapes, ratio, seed):
    """The tiled vector is permuted once; every layer takes the beginning of the result."""
    made = make(spec("rp", ratio=ratio, seed=seed, permute=True), shapes)
    largest = math.prod(first_largest(shapes))
    d = min(int(largest * ratio) + 1, largest)
    whole = oracles.tiled(drawn(seed, "bank", first_largest(shapes))[:d], largest)
    if d < largest:
        order = rng.permutation(seed, "permutation", largest).tolist()
        whole = [whole[place] for place in order]
    assert made.values.tolist() == whole
    for shape in shapes:
        oracles.assert_same(made(shape), as_fill(whole[: math.prod(shape)], shape))


def test_permutation_moves_something():
    plain = make(spec("rp", ratio=0.1), [(20, 20)])((20, 20))
    permuted = make(spec("rp", ratio=0.1, permute=True), [(20, 20)])((20, 20))
    assert not torch.equal(plain, permuted)
    assert torch.equal(plain.unique(return_counts=True)[1], permuted.unique(return_counts=True)[1])


@given(MODELS, st.integers(0, 99))
def test_one_layer(shapes, seed):
    """Weights of one shape share the prototype of the first weight of that shape."""
    made = make(spec("one_layer", seed=seed), shapes)
    assert made.values.numel() == sum(math.prod(shape) for shape in set(shapes))
    for shape in shapes:
        stream = "bank/" + "x".join(map(str, shape))
        oracles.assert_same(made(shape), as_fill(drawn(seed, stream, shape), shape))


@given(MODELS, st.data())
def test_one_layer_takes_the_first_of_each_shape(shapes, data):
    """With the model's own values it shows whose they are."""
    own = {name: torch.randn(shape) for name, shape, _ in weights_of(shapes)}
    made = make(spec("one_layer", "model"), shapes, weight_of=own.__getitem__)
    place = data.draw(st.integers(0, len(shapes) - 1))
    first = shapes.index(shapes[place])
    oracles.assert_same(made(shapes[place]), own[f"l{first}.weight"])


@given(MODELS, st.sampled_from(["mp", "rp"]), RATIOS)
def test_the_models_own_values(shapes, name, ratio):
    own = {key: torch.randn(shape) for key, shape, _ in weights_of(shapes)}
    changes = {"ratio": ratio} if name == "rp" else {}
    made = make(spec(name, "model", **changes), shapes, weight_of=own.__getitem__)
    source = own[f"l{shapes.index(first_largest(shapes))}.weight"].reshape(-1).tolist()
    if name == "rp":
        source = oracles.tiled(
            source[: min(int(len(source) * ratio) + 1, len(source))], len(source)
        )
    for shape in shapes:
        oracles.assert_same(made(shape), as_fill(source[: math.prod(shape)], shape))


def test_the_models_values_are_copied():
    own = torch.ones(3, 4)
    made = make(spec("mp", "model"), [(3, 4)], weight_of=lambda _: own)
    own.zero_()
    assert made((3, 4)).tolist() == [[1.0] * 4] * 3


def test_of_equally_large_layers_the_first_counts():
    """(2, 8) and (8, 2) have as many weights, but other fan-ins."""
    assert (
        lay_out(spec(), weights_of([(1, 3), (2, 8), (8, 2)])).by_shape[0][1].source == "l1.weight"
    )
    assert lay_out(spec(), weights_of([(1, 3), (8, 2), (2, 8)])).by_shape[0][1].fan == 2
    first = make(spec(), [(8, 2), (2, 8)]).values
    assert first.tolist() == drawn(0, "bank", (8, 2))


@given(MODELS, RATIOS, st.integers(0, 99))
def test_rp_aligned(shapes, ratio, seed):
    """Each weight repeats the beginning of the vector: whole rows, or whole times in a row."""
    made = make(spec("rp", ratio=ratio, seed=seed, aligned=True), shapes)
    largest = math.prod(first_largest(shapes))
    d = min(int(largest * ratio) + 1, largest)
    vector = drawn(seed, "bank", first_largest(shapes))[:d]
    assert made.values.tolist() == vector
    for shape in shapes:
        weights, row = math.prod(shape), math.prod(shape[1:])
        if d >= weights:
            period = weights
        elif d >= row:
            period = max(rows * row for rows in range(1, d // row + 1))
        else:
            period = max(one for one in range(1, d + 1) if row % one == 0)
        assert made.layout.period(shape) == period == len(made.period(shape))
        oracles.assert_same(made(shape), as_fill(oracles.tiled(vector[:period], weights), shape))
        begins = {(place * row) % period for place in range(weights // row)}
        assert len(begins) == max(period // row, 1)  # so many rows share what they begin with


# Edge-popup's configurations: standard deviation, and whether all numbers are of one size.
FANS = [
    ("kaiming_normal", "fan_in", 2 / 48, False),
    ("kaiming_uniform", "fan_out", 2 / 80, False),
    ("signed_constant", "fan_out", 2 / 80, True),
    ("unsigned_constant", "fan_in", 2 / 48, True),
    ("unsigned_constant", "fan_out", 2 / 80, True),
    ("xavier_normal", "fan_in", 2 / (48 + 80), False),
    ("xavier_constant", "fan_in", 2 / (48 + 80), True),
]


@pytest.mark.parametrize(("init", "fan_mode", "variance", "is_constant"), FANS)
def test_the_variance_of_each_init(init, fan_mode, variance, is_constant):
    one = spec("own", init, fan_mode=fan_mode)
    values = draw(one, "weight/a", one.fan(48, 80), 20_000)
    assert values.dtype == np.float32
    assert math.isclose(float((values.astype(float) ** 2).mean()), variance, rel_tol=0.03)
    sizes = np.unique(np.abs(values))
    assert (len(sizes) == 1) == is_constant
    if is_constant:
        assert sizes[0] == np.float32(math.sqrt(variance))
    assert (values.min() > 0) == (init == "unsigned_constant")
    assert abs(float((values > 0).mean()) - (1 if values.min() > 0 else 0.5)) < 0.02


def test_what_came_later_is_in_no_fingerprint_of_what_was_before():
    fields = {"bank", "init", "seed", "ratio", "length", "permute", "scale_fan", "density"}
    assert spec().as_dict().keys() == fields
    layout = lay_out(spec(), weights_of([(2, 8)])).as_dict()
    assert layout["spec"].keys() == fields
    ((shape, prototype),) = layout["by_shape"]
    assert (shape, prototype["fan_in"], "fan" in prototype) == ((), 8, False)
    assert spec(fan_mode="fan_out").as_dict().keys() == fields | {"fan_mode"}
    assert spec("rp", aligned=True).as_dict().keys() == fields | {"aligned"}


@given(MODELS, RATIOS, st.integers(0, 99))
def test_rp_is_the_beginning_of_mp(shapes, ratio, seed):
    longer = make(spec("mp", seed=seed), shapes).values
    shorter = make(spec("rp", ratio=ratio, seed=seed), shapes).values
    assert 1 <= shorter.numel() <= longer.numel()
    oracles.assert_same(shorter, longer[: shorter.numel()])


@pytest.mark.parametrize(
    ("changes", "largest", "expected"),
    [
        ({"ratio": 1e-5}, 100, 1),
        ({"ratio": 0.01}, 100, 2),
        ({"ratio": 0.01}, 99, 1),
        ({"ratio": 0.1}, 1000, 101),
        ({"ratio": 1.0}, 7, 7),
        ({"length": 5}, 100, 5),
        ({"length": 500}, 100, 100),
        ({"length": 3, "ratio": 0.5}, 100, 3),
    ],
)
def test_rp_length(changes, largest, expected):
    assert rp_length(spec("rp", **changes), largest) == expected


def test_convmixer_of_the_paper_at_1e_5_is_one_number():
    """RP 1e-5 of ConvMixer h256: the largest layer has 256 x 256 weights."""
    assert rp_length(spec("rp", ratio=1e-5), 256 * 256) == 1
    fill = make(spec("rp", ratio=1e-5), [(256, 256, 1, 1), (256, 1, 5, 5)])((256, 1, 5, 5))
    assert fill.unique().numel() == 1


@pytest.mark.parametrize("scale_fan", [False, True])
@pytest.mark.parametrize(("fan_in", "density"), [(27, 0.5), (576, 0.3), (1, 0.9)])
def test_standard_deviations(scale_fan, fan_in, density):
    """sqrt(2 / fan_in), the fan times the density with scale_fan (edge-popup)."""
    std = math.sqrt(2 / (fan_in * density if scale_fan else fan_in))
    count = 40_000
    for init in ("kaiming_normal", "kaiming_uniform", "signed_constant"):
        values = draw(spec("mp", init, scale_fan=scale_fan, density=density), "s", fan_in, count)
        assert values.shape == (count,)
        assert values.dtype == np.float32
        assert abs(values.astype(np.float64).std() / std - 1) < 0.02
    assert set(values.tolist()) == {float(np.float32(std)), -float(np.float32(std))}
    uniform = draw(
        spec("mp", "kaiming_uniform", scale_fan=scale_fan, density=density), "s", fan_in, 99
    )
    assert uniform.tolist() == rng.uniform(0, "s", 99, math.sqrt(3) * std).tolist()
    signs = draw(
        spec("mp", "signed_constant", scale_fan=scale_fan, density=density), "s", fan_in, 99
    )
    assert signs.tolist() == rng.signs(0, "s", 99, std).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["mp", "rp", "one_layer"])
def test_dtype_rounds_once(name, dtype):
    shapes = [(5, 7), (3, 3), (3, 3)]
    changes = {"ratio": 0.2} if name == "rp" else {}
    wide = make(spec(name, **changes), shapes)
    oracles.assert_same(make(spec(name, **changes), shapes, dtype).values, wide.values.to(dtype))


def test_a_bank_without_a_prototype_says_so():
    made = make(spec("one_layer"), [(3, 4)])
    with pytest.raises(LookupError, match=r"\(4, 3\)"):
        made((4, 3))
    assert make(spec("mp"), [(3, 4)]).layout.find((4, 4)) is None
    assert make(spec("rp", ratio=0.5, permute=True), [(3, 4)]).layout.find((4, 4)) is None
    assert make(spec("rp", ratio=0.5), [(3, 4)])((4, 4)).shape == (4, 4)


def test_fills_are_views_of_the_bank():
    """mp, one_layer and permuted rp cost no memory per layer."""
    for changes in (
        {"name": "mp"},
        {"name": "one_layer"},
        {"name": "rp", "ratio": 0.1, "permute": True},
    ):
        made = make(spec(**changes), [(6, 5), (2, 3)])
        for shape in [(6, 5), (2, 3)]:
            assert (
                made(shape).untyped_storage().data_ptr() == made.values.untyped_storage().data_ptr()
            )


def test_the_buffer_is_not_saved():
    made = make(spec("mp"), [(3, 4)])
    assert [name for name, _ in made.named_buffers()] == ["values"]
    assert dict(made.state_dict()) == {}
    assert "mp, kaiming_normal, seed=0, floats=12" in repr(made)


# ---- through the public verb ------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions of two shapes, one shape twice, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.first = nn.Conv2d(4, 4, 3, bias=False)
        self.second = nn.Conv2d(4, 4, 3, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        for conv in (self.stem, self.first, self.second):
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


NAMES = ("stem", "first", "second", "head")
SHAPE_OF = {"stem": (4, 3, 3, 3), "first": (4, 4, 3, 3), "second": (4, 4, 3, 3), "head": (5, 4)}
BANKS = [{"bank": "mp"}, {"bank": "rp", "ratio": 0.05}, {"bank": "one_layer"}]


def fills(model):
    inner = model.base_model.model
    return {name: find_masked(inner.get_submodule(name), "weight").fill() for name in NAMES}


def banks_of(model):
    found = [m for m in model.modules() if isinstance(m, bank.Bank)]
    children = [find_masked(model.base_model.model.get_submodule(n), "weight") for n in NAMES]
    assert len(children) == 4
    return {id(b) for b in found} | {id(child.bank) for child in children}


@pytest.mark.parametrize("options", BANKS)
def test_pemnify_fills(options):
    made = fills(pemnify(Net(), seed=7, **options))
    if options["bank"] == "one_layer":
        for name in NAMES:
            shape = SHAPE_OF[name]
            vector = drawn(7, "bank/" + "x".join(map(str, shape)), shape)
            oracles.assert_same(made[name], as_fill(vector, shape))
        return
    vector = drawn(7, "bank", (4, 4, 3, 3))
    d = int(144 * 0.05) + 1 if options["bank"] == "rp" else 144
    for name in NAMES:
        count = math.prod(SHAPE_OF[name])
        expected = as_fill(oracles.tiled(vector[:d], 144)[:count], SHAPE_OF[name])
        oracles.assert_same(made[name], expected)


@pytest.mark.parametrize("options", BANKS)
def test_pemnify_takes_the_models_values(options):
    net = Net()
    own = {name: net.get_submodule(name).weight.detach().clone() for name in NAMES}
    made = fills(pemnify(net, bank_init="model", modules_to_save=[], **options))
    if options["bank"] == "one_layer":
        expected = {**own, "second": own["first"]}
    else:
        vector = own["first"].reshape(-1).tolist()
        d = 8 if options["bank"] == "rp" else 144
        values = oracles.tiled(vector[:d], 144)
        expected = {n: as_fill(values[: math.prod(s)], s) for n, s in SHAPE_OF.items()}
    for name in NAMES:
        oracles.assert_same(made[name], expected[name])


MOVES = {
    "to": lambda model: model.to("cpu"),
    "half": lambda model: model.half(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "double": lambda model: model.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "deepcopy of a half": lambda model: copy.deepcopy(model.half()),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("options", BANKS)
def test_one_storage(options, move):
    model = pemnify(Net(), **options)
    before = find_masked(model.base_model.model.stem, "weight").bank
    moved = MOVES[move](model)
    assert len(banks_of(moved)) == 1
    held = find_masked(moved.base_model.model.stem, "weight").bank
    assert (held is before) == ("deepcopy" not in move)
    floats = held.layout.floats
    same_size = [b for b in moved.buffers() if b.numel() == floats]
    assert len({b.untyped_storage().data_ptr() for b in same_size}) == 1
    for name in NAMES:
        layer = moved.base_model.model.get_submodule(name)
        assert layer._parameters["weight"] is None
        if options["bank"] != "rp":
            storage = find_masked(layer, "weight").fill().untyped_storage()
            assert storage.data_ptr() == held.values.untyped_storage().data_ptr()


@pytest.mark.parametrize("options", BANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_has_the_wide_ones_bank_rounded(options, dtype):
    wide, narrow = fills(pemnify(Net(), **options)), fills(pemnify(Net().to(dtype), **options))
    assert set(wide) == set(NAMES)
    for name in NAMES:
        oracles.assert_same(narrow[name], wide[name].to(dtype))


@pytest.mark.parametrize("options", BANKS)
def test_the_seed_decides_and_the_model_does_not(options):
    torch.manual_seed(1)
    one = fills(pemnify(Net(), seed=3, **options))
    torch.manual_seed(2)
    two = fills(pemnify(Net(), seed=3, **options))
    other = fills(pemnify(Net(), seed=4, **options))
    for name in NAMES:
        oracles.assert_same(one[name], two[name])
        assert not torch.equal(one[name], other[name])


def test_own_draws_each_layer_from_its_own_stream():
    """PEMN's baseline row 'Mask', edge-popup: every layer keeps its own random weights."""
    made = fills(pemnify(Net(), bank="own", bank_init="kaiming_normal", seed=5))
    for name in NAMES:
        expected = as_fill(drawn(5, f"weight/{name}.weight", SHAPE_OF[name]), SHAPE_OF[name])
        oracles.assert_same(made[name].detach(), expected)
    assert not torch.equal(made["first"], made["second"])


def test_another_bank_is_refused():
    model = pemnify(Net(), bank="rp", ratio=0.05, seed=0)
    keys = set(model.state_dict())
    with pytest.raises(BankMismatchError, match="seed=1 instead of 0"):
        model.add_adapter("two", PemnConfig(bank="rp", ratio=0.05, seed=1))
    with pytest.raises(BankMismatchError, match=r"ratio=0\.1 instead of 0\.05"):
        model.add_adapter("three", PemnConfig(bank="rp", ratio=0.1))
    assert set(model.state_dict()) == keys
    assert len(banks_of(model)) == 1


def test_a_second_adapter_with_other_targets_is_refused():
    model = pemnify(Net(), bank="mp", target_modules=["head"])
    with pytest.raises(BankMismatchError) as caught:
        model.add_adapter("two", PemnConfig(bank="mp"))
    message = str(caught.value)
    assert "fills 1 weights" in message
    assert "would mask 4" in message
    assert "first.weight" in message


@settings(max_examples=8)
@given(st.floats(0.1, 0.97))
def test_scale_fan_of_the_config(density):
    config = PemnConfig(bank="mp", scale_fan=True, density=density)
    made = fills(pemnify(Net(), config))
    expected = as_fill(drawn(0, "bank", (4, 4, 3, 3), density), (4, 4, 3, 3))
    oracles.assert_same(made["first"], expected)
