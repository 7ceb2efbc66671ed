"""Following a forward on shapes: every use of every weight, as torch.export sees it."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertModel, MixtralConfig, MixtralForCausalLM

from pemn_surgery import pemnify, plan
from pemn_surgery.errors import LowCoverageWarning, TraceError
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.models import forward
from pemn_surgery.models.forward import trace
from pemn_surgery.models.watcher import Use
from pemn_surgery.planning.blocks import Block, repeated_blocks
from tests.adapters import models


class Reader(nn.Module):
    """Reads its layer's weight instead of calling it, twice."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return F.linear(x, self.qkv.weight) + F.linear(x, self.qkv.weight.t().t())


class Everything(nn.Module):
    """Uses parameters in every way that matters here."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.reader = Reader()
        self.never = nn.Linear(4, 4)
        self.projection = nn.Parameter(torch.randn(6, 3))
        self.gain = nn.Parameter(torch.ones(6, 1))
        self.position = nn.Parameter(torch.randn(1, 4))
        self.query = nn.Parameter(torch.randn(2, 3))
        self.clamped = nn.Linear(3, 3)

    def forward(self, x):
        x = self.called(self.called(x + self.position))
        x = self.reader(x) @ (self.projection * self.gain)
        self.clamped.weight.data.clamp_(-1, 1)
        return self.clamped(x) @ self.query.T


class Decides(nn.Module):
    """Asks for values that a forward on shapes does not have."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, mask):
        if mask.all():
            raise ValueError("the mask has values, and they are not all true")
        chosen = F.one_hot(self.gate(x).argmax(-1), 3)
        out = torch.zeros_like(x)
        for expert in chosen.sum(0).nonzero()[:, 0].tolist():
            rows = chosen[:, expert].nonzero()[:, 0]
            out[rows] = self.experts[expert](x[rows])
        if out.abs().max().item() > 1e9:
            out = out / 2
        return out


class Stuck(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        raise KeyError("no such thing")


def by_name(found):
    return {name: [(u.operator, u.count) for u in uses] for name, uses in found.by_name.items()}


def test_every_kind_of_use():
    model = Everything()
    found = trace(model, {"x": torch.randn(5, 4)})
    assert by_name(found) == {
        "position": [("add", 1)],
        "called.weight": [("linear", 2)],
        "reader.qkv.weight": [("linear", 2)],
        "projection": [("matmul", 1)],
        "gain": [("mul", 1)],
        "clamped.weight": [("linear", 1)],
        "query": [("matmul", 1)],
    }
    read = found.of("reader.qkv.weight")[0]
    assert read == Use(
        name="reader.qkv.weight",
        operator="linear",
        role="product",
        module="reader",
        is_own=False,
        where=read.where,
        count=2,
    )
    assert read.where.startswith("test_forward.py:")
    assert found.of("position")[0].role == "other"
    assert list(found.written) == ["clamped.weight"]
    assert found.written["clamped.weight"].startswith("test_forward.py:")


def test_nothing_of_the_model_is_touched():
    model = Everything()
    model.called.weight.data[0, 0] = 7.0
    model.clamped.weight.data.fill_(5.0)  # the forward would clamp them
    model.register_buffer("count", torch.zeros(1))
    model.register_forward_hook(lambda module, *_: module.count.add_(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, training = torch.get_rng_state(), model.training
    trace(model, {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))})
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training


def test_a_model_without_values_has_the_same_trace():
    inputs = {"x": torch.randn(5, 4)}
    with torch.device("meta"):
        bare = Everything()
    assert trace(bare, inputs) == trace(Everything(), inputs)


def test_values_that_a_forward_asks_for_are_made_up():
    mask = torch.tensor([True, False, True, True, False])
    found = trace(Decides(), {"x": torch.randn(5, 4), "mask": mask})
    weights = ["gate.weight", *(f"experts.{i}.weight" for i in range(3))]
    assert by_name(found) == {name: [("linear", 1)] for name in weights}


def test_values_that_are_known_are_used():
    with pytest.raises(TraceError, match="not all true"):
        trace(Decides(), {"x": torch.randn(5, 4), "mask": torch.ones(5, dtype=torch.bool)})


class Routes(nn.Module):
    """Splits its input by counts that only real weights give."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        chosen = self.router(x).argmax(dim=1)
        counts = torch.stack([(chosen == i).sum() for i in range(3)])
        parts = x.split(counts.tolist())
        return torch.cat([part @ expert for part, expert in zip(parts, self.experts, strict=True)])


def test_a_small_model_really_runs_where_shapes_do_not_do(monkeypatch):
    model, inputs = Routes(), {"x": torch.randn(5, 4)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = by_name(trace(model, inputs))
    assert found == {"router.weight": [("linear", 1)], "experts": [("matmul", 3)]}
    models.assert_same_tensors(model.state_dict(), before)
    monkeypatch.setattr(forward, "_SMALL", 4 * (12 + 3 + 48))  # the bytes that it takes
    with pytest.raises(TraceError, match="Routes could not be followed: RuntimeError: split"):
        trace(model, inputs)
    with torch.device("meta"):
        bare = Routes()
    with pytest.raises(TraceError, match="Routes could not be followed"):
        trace(bare, inputs)


def test_a_forward_that_fails_says_so():
    with pytest.raises(TraceError, match="Stuck could not be followed: KeyError: 'no such thing'"):
        trace(Stuck(), {"x": torch.randn(5, 4)})
    made = plan(Stuck(), bank="own", selector="topk", inputs={"x": torch.randn(5, 4)})
    assert "no such thing" in made.untraced
    assert "uses not seen" in str(made)
    assert [target.name for target in made.targets] == ["layer.weight"]


def test_raw_parameters_that_multiply_are_masked_and_kept_in_the_configuration(tmp_path):
    model, inputs = Everything(), {"x": torch.randn(5, 4)}
    expected = model(**inputs)
    made = plan(model, bank="own", selector="topk", inputs=inputs)
    names = ["projection", "query", "called.weight", "reader.qkv.weight", "never.weight"]
    assert [target.name for target in made.targets] == names
    uses = {target.name: target.use for target in made.targets}
    assert uses["called.weight"] == "linear x2"
    assert uses["never.weight"] == "not reached by the forward"
    reasons = {item.name: item.reason for item in made.left}
    assert reasons["position"] == "a raw parameter, not the weight of a layer: add"
    assert reasons["clamped.weight"].startswith("the forward changes it in place")
    assert made.unreached_weights == 16
    assert made.coverage == pytest.approx((18 + 6 + 16 + 24) / (18 + 6 + 16 + 24 + 9))
    assert "16 of the maskable weights are not reached by the forward" in str(made)

    with pytest.warns(LowCoverageWarning, match="clamped.weight: the forward changes it in place"):
        masked = pemnify(model, bank="own", selector="threshold", inputs=inputs)
    config = masked.peft_config["default"]
    assert config.functional_weights == ["projection", "query"]
    assert config.rewritten_weights == ["clamped.weight"]
    assert torch.equal(masked(**inputs), expected)
    held = [module.target for module in masked.modules() if isinstance(module, MaskedWeight)]
    assert sorted(held) == sorted(names)
    masked.save_pretrained(tmp_path)
    read = type(config).from_pretrained(str(tmp_path))
    assert read.functional_weights == ["projection", "query"]
    assert read.rewritten_weights == ["clamped.weight"]


def test_named_targets_stay_the_only_ones():
    made = plan(
        Everything(),
        bank="own",
        selector="topk",
        target_modules=["called"],
        inputs={"x": torch.randn(5, 4)},
    )
    assert [target.name for target in made.targets] == ["called.weight"]


TIMM = ["test_vit", "test_resnet", "test_convnext", "test_nfnet", "test_mambaout", "beit_tiny"]


def small_timm(name):
    if name == "beit_tiny":
        options = {"depth": 2, "embed_dim": 24, "num_heads": 3}
        return timm.create_model("beit_base_patch16_224", **options).eval()
    return timm.create_model(name).eval()


def bert():
    torch.manual_seed(0)
    return BertModel(models.bert_config()).eval()


@pytest.mark.parametrize("name", [*TIMM, "bert"])
def test_it_finds_what_export_finds(name):
    """torch.export's graph of ATen operators is the independent witness."""
    if name == "bert":
        model, inputs = bert(), {"input_ids": torch.randint(0, 40, (2, 5))}
    else:
        model = small_timm(name)
        size = model.pretrained_cfg["input_size"]
        inputs = {"x": torch.randn(2, *size)}
    program = torch.export.export(model, (), inputs, strict=False)
    expected = multiplied_in(program)
    assert len(expected) > 5
    found = {name for name, uses in trace(model, inputs).by_name.items() if multiplied(uses)}
    assert found == expected


def multiplied(uses):
    return any(use.role == "product" for use in uses)


def multiplied_in(program):
    """Return the parameters that reach a product through views and arithmetic of their own."""
    signature = program.graph_signature
    parameters = dict(zip(signature.inputs_to_parameters, signature.parameters, strict=True))
    origin = {}
    found = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = signature.inputs_to_parameters.get(node.name)
            if name and program.state_dict[name].dim() >= 2:
                origin[node] = name
            continue
        if node.op != "call_function":
            continue
        kind = str(node.target).split(".")[1] if "aten" in str(node.target) else ""
        if kind in ("linear", "conv1d", "conv2d", "conv3d", "convolution", "matmul", "addmm"):
            found |= {origin[arg] for arg in node.args[1:2] if arg in origin}
        else:
            sources = [
                arg for arg in node.all_input_nodes if arg.op != "placeholder" or arg in origin
            ]
            largest = max(node.all_input_nodes, key=size_of, default=None)
            if (
                sources
                and largest in origin
                and len(derived(node, origin)) == len(node.all_input_nodes)
            ):
                origin[node] = origin[largest]
    assert parameters
    return found


def derived(node, origin):
    constant = ("p_", "b_", "c_")
    return [
        arg
        for arg in node.all_input_nodes
        if arg in origin or (arg.op == "placeholder" and arg.name.startswith(constant))
    ]


def size_of(node):
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def test_experts_are_found_and_routers_stay():
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    made = plan(model, bank="own", selector="topk")
    assert made.untraced == ""
    kinds = {(target.kind, target.parameter) for target in made.targets}
    assert {("MixtralExperts", "gate_up_proj"), ("MixtralExperts", "down_proj")} <= kinds
    experts = [target for target in made.targets if target.kind == "MixtralExperts"]
    assert {(target.shape, target.fan_in) for target in experts} == {
        ((3, 48, 16), 16),
        ((3, 16, 24), 24),
    }
    routers = [item for item in made.left if "router" in item.reason]
    assert [item.kind for item in routers] == ["MixtralTopKRouter"] * 2
    assert made.coverage > 0.9


def test_repeated_blocks():
    assert repeated_blocks(bert()) == [Block("encoder.layer.*", "BertLayer", 2)]
    vit = timm.create_model("test_vit")
    assert repeated_blocks(vit) == [Block("blocks.*", "Block", len(vit.blocks))]
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))) == []
    assert repeated_blocks(nn.Sequential(nn.ReLU(), nn.ReLU())) == []
    mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 3))
    assert repeated_blocks(mixed) == [Block("*", "Linear", 2)]
    assert "repeated blocks: encoder.layer.* = 2 x BertLayer" in str(plan(bert()))


class Places(nn.Module):
    """Puts features where the ids say, and counts them first, as multimodal models do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.project = nn.Linear(3, 4)

    def forward(self, ids, features):
        hidden = self.table(ids)
        features = self.project(features)
        places = (ids == 8).unsqueeze(-1).expand_as(hidden).to(hidden.device)
        if hidden[places].numel() != features.numel():
            raise ValueError("features and their places do not match")
        return hidden.masked_scatter(places, features)


def test_masks_keep_their_values_beside_shapes():
    ids = torch.tensor([[1, 8, 8], [8, 2, 3]])
    found = trace(Places(), {"ids": ids, "features": torch.randn(3, 3)})
    assert by_name(found) == {"table.weight": [("embedding", 1)], "project.weight": [("linear", 1)]}
    with pytest.raises(TraceError, match="do not match"):
        trace(Places(), {"ids": ids, "features": torch.randn(2, 3)})
