"""Which tensor a name is, for who reads, writes, exports, saves, moves or copies it.

The table is operation x bank x ``rest`` x kind of tensor; plain torch, on the merged dense model,
says what must come of each operation.
"""

import copy
import importlib

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import MaskedWeightError
from pemn_surgery.masks.attached import names_masked, names_owned
from tests import oracles
from tests.adapters import models

# The module, whose name within torch.nn.parallel is a function's.
replicating = importlib.import_module("torch.nn.parallel.replicate")

BASES = {
    "mp": {"bank": "mp"},
    "rp": {"bank": "rp", "ratio": 0.3},
    "own": {"bank": "own", "selector": "topk"},
    "own_generated": {"bank": "own", "bank_init": "kaiming_normal"},
}
CASES = {
    f"{bank}, {rest}": {**options, "rest": rest}
    for bank, options in BASES.items()
    for rest in ("train", "norms", "stats", "freeze")
}


class Kinds(nn.Module):
    """A tensor of every kind: masked, raw, a norm's, a statistic, a bias, a table, a buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.register_buffer("offset", torch.randn(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.statistics = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        h = self.table(x) + self.position + self.offset
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        h = self.statistics(h.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.fc(h)).mean(1))


KINDS = {
    "masked": "fc.weight",
    "masked in_proj": "attention.in_proj_weight",
    "bias": "fc.bias",
    "raw": "position",
    "buffer": "offset",
    "norm": "norm.weight",
    "statistic": "statistics.running_mean",
    "counter": "statistics.num_batches_tracked",
    "table": "table.weight",
}
TOKENS = torch.arange(20).reshape(4, 5) % 10


def kinds(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Kinds()


def run(model):
    was = model.training
    model.eval()
    with torch.no_grad():
        said = model(TOKENS).clone()
    model.train(was)
    return said


def step(model, rate=0.05):
    """One step of Adam in train mode: masks, norms, biases and statistics move."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def trained(case, **options):
    model = pemnify(kinds(), PemnConfig(**CASES[case]), **options)
    return step(step(model)).eval()


def place(model, name):
    """The module and the attribute of a dotted name."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def plain_part(tensors):
    """What is not an adapter's, under the base's names, as TRL tells them."""
    return {
        name.replace("modules_to_save.default.", ""): value
        for name, value in tensors.items()
        if "pemn_" not in name and "original_module" not in name
    }


def merged_twin(model):
    return copy.deepcopy(model).merge_and_unload()


def is_owned(model, name):
    module, attribute = place(model.get_base_model(), name)
    return attribute in names_owned(module)


def is_masked(model, name):
    module, attribute = place(model.get_base_model(), name)
    return attribute in names_masked(module)


def moved(value):
    """Other values of the same kind."""
    if not value.is_floating_point():
        return value + 3
    return value * 1.5 + torch.linspace(-1, 1, value.numel()).view(value.shape)


# ---- export -------------------------------------------------------------------------------------


def assert_exports(inner, dense):
    """Names, order, values and flags of a merged model are those of the dense one."""
    for part in ("state_dict", "named_parameters"):
        found = plain_part(dict(getattr(inner, part)()))
        expected = dict(getattr(dense, part)())
        assert list(found) == list(expected), part
        models.assert_same_tensors(found, expected)


@pytest.mark.parametrize("case", list(CASES))
def test_a_merged_model_exports_what_it_computes(case):
    model = trained(case)
    said = run(model)
    dense = merged_twin(model)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.merge_adapter()
    assert_exports(model.get_base_model(), dense)
    models.assert_equal(run(model), run(dense))
    fresh = kinds(seed=9).requires_grad_(False)  # else torch multiplies in another order
    fresh.load_state_dict(plain_part(model.get_base_model().state_dict()))
    models.assert_equal(run(fresh), run(dense))
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert {name: id(p) for name, p in after.items()} == {n: i for n, (i, _) in before.items()}
    models.assert_same_tensors(after, {name: value for name, (_, value) in before.items()})
    models.assert_same_tensors(model.state_dict(), state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    models.assert_equal(run(model), said)
    step(model)  # it still learns


def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=4
        )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.head = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        return self.head(self.two(torch.tanh(self.one(x))))[0]


def tied():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied()


NETS = {
    "vit": (vit, lambda: models.images(3, count=3, size=32)),
    "bert": (models.bert, lambda: models.tokens(3)),
    "net": (models.net, lambda: models.images(3)),
    "tied": (tied, lambda: torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))),
}


def answer(model, x):
    said = model(x)
    return said if torch.is_tensor(said) else said["logits"]


@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("bank", list(BASES))
def test_every_architecture_exports_what_it_computes(bank, net):
    build, batch = NETS[net]
    model, x = pemnify(build(), **BASES[bank], rest="train"), batch()
    model.train()
    answer(model, x).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.eval()
    dense = merged_twin(model).eval()
    model.merge_adapter()
    assert_exports(model.get_base_model(), dense)
    with torch.no_grad():
        models.assert_equal(answer(model, x), answer(dense, x))
    model.unmerge_adapter()


def test_lora_has_the_same_contract():
    """The oracle: what a policy's names and values are between merging and unmerging."""
    model = get_peft_model(
        models.net(), LoraConfig(target_modules=["head"], init_lora_weights=False)
    )
    model.merge_adapter()
    state = model.get_base_model().state_dict()
    found = {k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}
    dense = copy.deepcopy(model).merge_and_unload().state_dict()
    models.assert_same_tensors(found, dense)


@pytest.mark.parametrize("case", ["mp, train", "own, train", "own, stats"])
def test_casts_copies_and_switches_while_merged(case, tmp_path):
    model = trained(case)
    model.save_pretrained(tmp_path / "before")
    said = run(model)
    model.merge_adapter()
    dense = merged_twin(model)
    twin = copy.deepcopy(model)
    assert_exports(twin.get_base_model(), dense)
    model.save_pretrained(tmp_path / "merged")
    files = [(tmp_path / n / models.WEIGHTS_FILE).read_bytes() for n in ("before", "merged")]
    assert files[0] == files[1]
    model.to(torch.float64).to(torch.float32)
    assert_exports(model.get_base_model(), dense)
    with model.disable_adapter():  # unmerges, as PEFT's layers do
        base = run(model)
    models.assert_equal(run(model), said)
    twin.unmerge_adapter()
    models.assert_equal(run(twin), said)
    with twin.disable_adapter():
        models.assert_equal(run(twin), base)
    models.assert_equal(run(copy.deepcopy(model).unload()), base)


# ---- assignment ---------------------------------------------------------------------------------

WRITERS = {
    "attribute": lambda module, name, value: setattr(module, name, value),
    "register": lambda module, name, value: (
        module.register_parameter(name, value)
        if isinstance(value, nn.Parameter)
        else module.register_buffer(name, value)
    ),
}


@pytest.mark.parametrize("writer", list(WRITERS))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("case", list(CASES))
def test_what_is_assigned_is_what_is_read(case, kind, writer, tmp_path):
    model, name = trained(case), KINDS[kind]
    dense = merged_twin(model)
    module, attribute = place(model.get_base_model(), name)
    now = getattr(module, attribute)
    is_parameter = attribute in dict(place(dense, name)[0].named_parameters())
    value = moved(now.detach().clone())
    trains = value.is_floating_point() and not is_masked(model, name)
    given = nn.Parameter(value, requires_grad=trains) if is_parameter else value
    if is_masked(model, name) and CASES[case]["bank"] != "own":
        snapshot = models.Snapshot(model, run)
        with pytest.raises(MaskedWeightError, match="the bank fills it"):
            WRITERS[writer](module, attribute, given)
        snapshot.assert_unchanged()
        return
    expected = value * (now.detach() != 0) if is_masked(model, name) else value
    base = copy.deepcopy(model)
    WRITERS[writer](module, attribute, given)
    wanted = nn.Parameter(expected, requires_grad=trains) if is_parameter else expected
    WRITERS[writer](*place(dense, name), wanted)
    oracles.assert_same(getattr(module, attribute).detach() + 0, expected + 0)
    models.assert_equal(run(model), run(dense))
    models.assert_equal(run(merged_twin(model)), run(dense))
    if is_owned(model, name):
        with model.disable_adapter(), base.disable_adapter():
            models.assert_equal(run(model), run(base))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(kinds(seed=0), tmp_path)
        saved = getattr(*place(loaded.get_base_model(), name)).detach()
        if kind != "counter":  # which is read only without a momentum, and not saved
            oracles.assert_same(saved, expected)
    if is_parameter and trains:
        model.train()
        model(TOKENS).square().sum().backward()
        if getattr(module, attribute) is given:
            assert given.grad is not None


@pytest.mark.parametrize("kind", ["bias", "raw", "norm", "statistic", "buffer"])
def test_an_assignment_reaches_one_task(kind):
    name = KINDS[kind]
    model = trained("rp, train")
    model.add_adapter("b", PemnConfig(**CASES["rp, train"]))
    model.set_adapter("b")
    module, attribute = place(model.get_base_model(), name)
    before = getattr(module, attribute).detach().clone()
    model.set_adapter("default")
    value = moved(before)
    setattr(module, attribute, nn.Parameter(value) if kind in ("bias", "raw", "norm") else value)
    oracles.assert_same(getattr(module, attribute).detach(), value)
    model.set_adapter("b")
    oracles.assert_same(getattr(module, attribute).detach(), before)
    model.set_adapter("default")
    oracles.assert_same(getattr(module, attribute).detach(), value)


def test_an_assigned_parameter_is_the_one_that_trains():
    """A bias set to log-priors, and an optimizer made from it."""
    model = trained("mp, train")
    head = model.get_base_model().head
    head.bias = bias = nn.Parameter(torch.linspace(-3, 0, 10))
    assert head.bias is bias
    assert any(p is bias for p in model.parameters())
    torch.optim.SGD([bias], lr=1.0)
    model(TOKENS).sum().backward()
    oracles.assert_near(bias.grad, torch.full((10,), 4.0), 1e-6)


@pytest.mark.parametrize("case", ["mp, train", "own, train"])
def test_assigned_while_merged(case):
    model = trained(case)
    model.merge_adapter()
    value = torch.linspace(-3, 0, 10)
    model.get_base_model().head.bias = nn.Parameter(value)
    oracles.assert_same(model.get_base_model().state_dict()["head.bias"], value)
    assert_exports(model.get_base_model(), merged_twin(model))
    with pytest.raises(MaskedWeightError, match=r"merged: unmerge_adapter|the bank fills it"):
        model.get_base_model().fc.weight = nn.Parameter(torch.ones(8, 8))
    model.unmerge_adapter()
    oracles.assert_same(model.get_base_model().head.bias.detach(), value)


@pytest.mark.parametrize("bank", list(BASES))
def test_timm_resizes_its_input(bank, tmp_path):
    """`set_input_size` assigns a position embedding of another shape."""
    model = pemnify(vit(), **BASES[bank], rest="train")
    dense = merged_twin(model)
    for net in (model.get_base_model(), dense):
        net.set_input_size(img_size=48)
    x = models.images(3, count=3, size=48)
    models.assert_equal(models.logits(model, x), models.logits(dense, x))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    said = models.logits(model, x)
    with model.disable_adapter():
        models.assert_differs(models.logits(model, x), said)  # and of the new shape
    model.save_pretrained(tmp_path)
    wide = vit()
    wide.set_input_size(img_size=48)
    loaded = PeftModel.from_pretrained(wide, tmp_path)
    models.assert_equal(models.logits(loaded, x), said)
    models.assert_equal(models.logits(model.merge_and_unload(), x), said)


class Quantised(torch.Tensor):
    """Stands for torchao's tensors: a subclass that is assigned as the weight."""


def test_a_quantised_weight_under_masks_is_refused():
    """torchao's ``quantize_`` assigns to every Linear's weight."""
    for case, match in (("own, stats", "would be a Quantised: quantise or tie a model before"),
                        ("rp, stats", "the bank fills it")):  # fmt: skip
        model = trained(case)
        snapshot = models.Snapshot(model, run)
        packed = torch.ones(8, 8).as_subclass(Quantised)
        with pytest.raises(MaskedWeightError, match=match):
            model.get_base_model().fc.weight = nn.Parameter(packed, requires_grad=False)
        snapshot.assert_unchanged()


def test_a_weight_of_another_shape_under_masks_is_refused():
    model = trained("own, stats")
    snapshot = models.Snapshot(model, run)
    with pytest.raises(MaskedWeightError, match=r"shape \(3, 8\), but its masks \(8, 8\)"):
        model.get_base_model().fc.weight = nn.Parameter(torch.ones(3, 8))
    snapshot.assert_unchanged()


@pytest.mark.parametrize("case", list(CASES))
def test_base_values_are_loaded_into_the_base(case):
    """`load_state_dict` with and without ``assign``: base names are the base's tensors."""
    for assign in (False, True):
        model = trained(case)
        said, inner = run(model), model.get_base_model()
        state = {name: moved(value) for name, value in plain_part(inner.state_dict()).items()}
        inner.load_state_dict(state, strict=False, assign=assign)
        models.assert_same_tensors(plain_part(inner.state_dict()), state)
        if CASES[case] == CASES["mp, train"]:
            models.assert_differs(run(model), said) if "table.weight" not in state else None


# ---- what torch's tools write, exchange and convert ----------------------------------------------


def exchange(name):
    def act(net):
        module, attribute = place(net, name)
        now = getattr(module, attribute)
        other = nn.Parameter(moved(now.detach().clone()), requires_grad=now.requires_grad)
        torch.utils.swap_tensors(now, other)

    return act


def all_values(net):
    values = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(values.detach().clone(), net.parameters())


def empty_and_load(net):
    """FSDP's and accelerate's way from the meta device: memory first, values from a checkpoint."""
    state = copy.deepcopy(net.state_dict())
    net.to_empty(device="cpu")
    net.load_state_dict(state)


def under(flag, act):
    """Do something under one of torch's flags for how modules convert their parameters."""

    def acting(net):
        switch = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
        switch(True)
        try:
            act(net)
        finally:
            switch(False)

    return acting


def new_layer(net):
    torch.manual_seed(1)
    net.set_submodule("fc", nn.Linear(8, 8).requires_grad_(False))


LIKE_DENSE = {
    "swap_tensors, bias": exchange("fc.bias"),
    "swap_tensors, norm": exchange("norm.weight"),
    "swap_tensors, raw": exchange("position"),
    "init, bias": lambda net: nn.init.constant_(net.fc.bias, 0.3),
    "init, raw": lambda net: nn.init.constant_(net.position, 0.3),
    "data =": lambda net: setattr(net.fc.bias, "data", torch.full((8,), 0.3)),
    "reset_parameters, norm": lambda net: net.norm.reset_parameters(),
    "reset_running_stats": lambda net: net.statistics.reset_running_stats(),
    "no bias": lambda net: setattr(net.fc, "bias", None),
    "tie, biases": lambda net: setattr(net.fc, "bias", net.norm.bias),
    "vector_to_parameters": all_values,
    "to_empty": empty_and_load,
    "set_submodule": new_layer,
    "requires_grad_": lambda net: net.requires_grad_(False),
    "share_memory": lambda net: net.share_memory(),
    "half and back": lambda net: net.half().float(),
    "overwrite on conversion": under("overwrite", lambda net: net.double().float()),
    "swap on conversion": under("swap", lambda net: net.double().float()),
    "swap on load": under("swap", lambda net: net.load_state_dict(copy.deepcopy(net).state_dict())),
}
REFUSED = {
    "swap_tensors, masked": (exchange("fc.weight"), r"swap_tensors\(\) would not last"),
    "init, masked": (lambda net: nn.init.ones_(net.fc.weight), "would not last"),
    "reset_parameters, masked": (lambda net: net.fc.reset_parameters(), "would not last"),
    "tie, masked": (
        lambda net: setattr(net.fc, "weight", net.attention.out_proj.weight),
        "quantise or tie a model before it gets masks|the bank fills it",
    ),
    "fuse_linear_bn": (
        lambda net: nn.utils.fuse_linear_bn_eval(net.fc.eval(), net.statistics.eval()),
        "fusion would replace",
    ),
}
FEW_CASES = ["own, train", "own, stats", "rp, train", "mp, stats"]


@pytest.mark.parametrize("operation", list(LIKE_DENSE))
@pytest.mark.parametrize("case", FEW_CASES)
def test_an_operation_does_what_it_does_to_the_merged_model(case, operation, tmp_path):
    model = trained(case)
    dense = merged_twin(model)
    for net in (dense, model.get_base_model()):
        LIKE_DENSE[operation](net)
    models.assert_equal(run(model), run(dense))
    models.assert_equal(run(merged_twin(model)), run(dense))
    models.assert_equal(run(copy.deepcopy(model)), run(dense))


@pytest.mark.parametrize("operation", list(REFUSED))
@pytest.mark.parametrize("case", FEW_CASES)
def test_an_operation_on_what_is_computed_is_refused(case, operation):
    act, match = REFUSED[operation]
    model = trained(case)
    snapshot = models.Snapshot(model, run)
    with pytest.raises(MaskedWeightError, match=match):
        act(model.get_base_model())
    snapshot.assert_unchanged()


@pytest.mark.parametrize("case", FEW_CASES)
def test_functional_call_takes_names_as_state_dicts_have_them(case):
    """The base's names are the base's tensors, an adapter's are the adapter's."""
    model = trained(case)
    state = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
    assert len(state) > 10
    before = {name: value.clone() for name, value in state.items()}
    for names in ([name] for name in state):
        given = {name: moved(state[name]) for name in names}
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(given, strict=False)
        with torch.no_grad():
            found = torch.func.functional_call(model, given, (TOKENS,))
        models.assert_equal(found, run(loaded))
    models.assert_same_tensors({n: model.state_dict()[n] for n in before}, before)


# ---- replicas -----------------------------------------------------------------------------------


@pytest.fixture
def replicate(monkeypatch):
    """torch's own `replicate`, with copies in place of what it broadcasts to several GPUs."""

    def copies(tensors, devices, detach=False):
        """Buffers are the model's own on the first device, so that running statistics last."""
        if not detach:
            return [[t * 1 for t in tensors] for _ in devices]
        return [[t.detach() if d == 0 else t.detach() * 1 for t in tensors] for d in devices]

    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, _: device)
    return lambda model: replicating.replicate(model, [0, 1])


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("rest", ["train", "stats"])
@pytest.mark.parametrize("bank", list(BASES))
def test_replicas_compute_and_train_what_the_model_does(replicate, bank, rest, net):
    """`nn.DataParallel`: every replica's answers, and the sum of their gradients."""
    build, batch = NETS[net]
    model, x = pemnify(build(), **BASES[bank], rest=rest), batch()
    answer(model.train(), x).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.zero_grad()
    model.eval()
    expected = answer(model, x)
    expected.square().sum().backward()
    wanted = gradients(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = replicate(model)
    for replica in (first, second):
        models.assert_equal(answer(replica, x).detach(), expected.detach())
    assert gradients(model) == {}
    halves = [answer(replica, x).square().sum() / 2 for replica in (first, second)]
    sum(halves).backward()
    found = gradients(model)
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        if net == "tied":  # whose gradients of several uses are added in another order
            oracles.assert_near(found[name], grad, 1e-5)
        else:
            oracles.assert_same(found[name], grad)
    models.assert_same_tensors(model.state_dict(), state)


@pytest.mark.parametrize("rest", ["train", "stats", "freeze"])
@pytest.mark.parametrize("bank", list(BASES))
def test_replicas_in_train_mode(replicate, bank, rest):
    """Each normalises its part of a batch; the first one's running statistics are the model's."""
    model, x = pemnify(models.net(), **BASES[bank], rest=rest).train(), models.images(3, count=8)
    alone = [copy.deepcopy(model), copy.deepcopy(model)]
    halves = list(zip(alone, x.split(4), strict=True))
    expected = [one(part) for one, part in halves]
    sum(said.square().sum() for said in expected).backward()
    wanted = [gradients(one) for one in alone]
    said = [replica(part) for replica, part in zip(replicate(model), x.split(4), strict=True)]
    for mine, other in zip(said, expected, strict=True):
        models.assert_equal(mine.detach(), other.detach())
    sum(one.square().sum() for one in said).backward()
    found = gradients(model)
    assert found.keys() == wanted[0].keys()
    assert len(found) >= 4
    for name, grad in found.items():
        oracles.assert_same(grad, wanted[0][name] + wanted[1][name])
    models.assert_same_tensors(model.state_dict(), alone[0].state_dict())


def test_lora_on_replicas_is_the_oracle(replicate):
    model = get_peft_model(models.bert(), LoraConfig(target_modules=["query"], r=2)).eval()
    first, _ = replicate(model)
    x = models.tokens(3)
    models.assert_equal(answer(first, x).detach(), answer(model, x).detach())


@pytest.mark.parametrize("case", ["mp, train", "own, stats"])
def test_replicas_of_a_merged_and_of_a_disabled_model(replicate, case):
    model = trained(case)
    said = run(model)
    model.merge_adapter()
    models.assert_equal(run(replicate(model)[1]), run(model))
    model.unmerge_adapter()
    with model.disable_adapter():
        models.assert_equal(run(replicate(model)[1]), run(model))
        models.assert_differs(run(model), said)
    models.assert_equal(run(model), said)
