"""Whatever goes wrong while adapters are added, the model is what it was, and the next try works.

The fault is put everywhere: one try for each line of ours (or of PEFT's surgery) that calls a
function, which raises instead of being called.
"""

import inspect
import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import pemn_surgery
from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.errors import NonFiniteScoresError
from tests.adapters import models

OURS = str(Path(pemn_surgery.__file__).parent) + "/"
THEIRS = str(Path(peft.__file__).parent) + "/"

# Where nothing of the model is touched: plans, numbers, files. A fault there is one like another.
PURE = (
    "planning/", "models/", "numbers/rng.py", "coding/", "kernels/", "masks/selector.py",
    "surgery/undo.py", "errors.py", "adapters/injection/matching.py",
    "adapters/adding.py", "adapters/config.py", "adapters/files/adapter_file.py",
)  # fmt: skip
STEPS_OF_PEFT = ("tuners_utils.py", "peft_model.py", "other.py", "save_and_load.py")


AT_EVERY_STEP = ("mp", "second, mp")
SOME = 7  # every seventh step of all others, for time; with 1 here they pass, in twenty minutes
OF_EACH = 2  # the first calls from one line: nothing done yet, and one done before


class Fault(Exception):
    """What is raised in the middle."""


class Calls:
    """Counts the calls that change things, and raises at one of them."""

    def __init__(self, fail_at=None):
        self.fail_at, self.count = fail_at, 0
        self.made = Counter()

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _called(self, frame, event, _):
        if event == "call" and is_step(frame.f_code):
            site = frame.f_code, frame.f_back.f_code, frame.f_back.f_lineno
            self.made[site] += 1
            self.count += self.made[site] <= OF_EACH
            if self.made[site] <= OF_EACH and self.count - 1 == self.fail_at:
                raise Fault
        return


def is_step(code):
    """A call of a function; a generator's is also its end, where python swallows what is raised."""
    if code.co_flags & inspect.CO_GENERATOR:
        return False
    file, name = code.co_filename, Path(code.co_filename).name
    ours = file.startswith(OURS) and not file.removeprefix(OURS).startswith(PURE)
    return ours or (file.startswith(THEIRS) and name in STEPS_OF_PEFT)


def identities(value):
    """An attribute: what it is, and for a container what is in it."""
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [id(item) for item in value]
    return id(value)


class Picture:
    """Everything that can be seen of a model."""

    def __init__(self, model, run):
        self.model, self.run = model, run
        self.seen = self.look()

    def look(self):
        modules = dict(self.model.named_modules())
        tensors = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        graphs = [module for module in modules.values() if isinstance(module, GraphModule)]
        return {
            "modules": {name: (id(module), type(module)) for name, module in modules.items()},
            "attributes": {
                name: {key: identities(value) for key, value in vars(module).items()}
                for name, module in modules.items()
            },
            "training": {name: module.training for name, module in modules.items()},
            "tensors": {
                name: (id(tensor), tensor.requires_grad, tensor.dtype, tensor.device)
                for name, tensor in tensors.items()
            },
            "graphs": [
                [(n.op, n.target, n.args, sorted(map(str, n.meta))) for n in graph.graph.nodes]
                for graph in graphs
            ],
            "values": {
                name: value.detach().clone()
                for name, value in self.model.state_dict().items()
                if not value.is_meta
            },
            "output": self.output(),
        }

    def output(self):
        tables = [module._buffers for module in self.model.modules()]
        held = [dict(table) for table in tables]
        kept = [{k: v.clone() for k, v in t.items() if v is not None} for t in tables]
        try:
            with torch.no_grad():
                return self.run(self.model)
        finally:  # running statistics move
            for before, values in zip(held, kept, strict=True):
                for key, value in values.items():
                    before[key].copy_(value)

    def assert_unchanged(self, where):
        now = self.look()
        for part, before in self.seen.items():
            if part in ("values", "output"):
                continue
            assert now[part] == before, f"{part} changed at step {where}"
        assert now["values"].keys() == self.seen["values"].keys()
        for name, value in self.seen["values"].items():
            assert torch.equal(now["values"][name], value), f"{name} changed at step {where}"
        if self.seen["output"] is not None:
            assert torch.equal(now["output"], self.seen["output"])


class Attention(nn.Module):
    """MultiheadAttention, a tied pair, an embedding and norms."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.attention(self.norm(x), x, x)[0]
        return self.head(self.second(self.first(x).relu()))


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def attention():
    torch.manual_seed(0)
    return Attention()


def recurrent():
    torch.manual_seed(0)
    return nn.ModuleList([nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)])


def on_meta():
    with torch.device("meta"):
        return small()


def run_small(model):
    return model(models.images(0, 2, 4))


def run_recurrent(model):
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    return inner[1](inner[0](torch.linspace(-1, 1, 24).view(2, 3, 4))[0])


def run_attention(model):
    return model(torch.arange(6).view(2, 3))


def run_nothing(model):
    return None


def fresh(**options):
    return lambda model: pemnify(model, **options)


def through_peft(**options):
    return lambda model: get_peft_model(model, PemnConfig(**options))


def second(**options):
    return lambda model: model.add_adapter("b", PemnConfig(**options))


def with_one(make, **options):
    return lambda: pemnify(make(), **options)


TRIES = {
    "mp": (small, run_small, fresh(bank="mp")),
    "own": (small, run_small, fresh(bank="own", selector="topk", rest="freeze")),
    "own, drawn": (small, run_small, through_peft(bank="own", bank_init="kaiming_normal")),
    "rp, bits": (small, run_small, through_peft(bank="rp", ratio=0.1, inference_mode=True)),
    "attention, mp": (attention, run_attention, fresh(bank="mp")),
    "attention, untied": (
        attention, run_attention, fresh(bank="one_layer", tied="untie", rest="train"),
    ),
    "recurrent": (recurrent, run_recurrent, fresh(bank="mp", rest="train")),
    "graph": (lambda: symbolic_trace(small()), run_small, fresh(bank="mp", rest="train")),
    "meta": (on_meta, run_nothing, fresh(bank="mp", rest="train")),
    "modules_to_save": (
        small, run_small, through_peft(bank="mp", modules_to_save=["4"]),
    ),
    "second, mp": (with_one(small, bank="mp"), run_small, second(bank="mp")),
    "second, own": (
        with_one(attention, bank="own", selector="topk"), run_attention,
        second(bank="own", selector="topk", rest="train"),
    ),
    "second, graph": (
        with_one(lambda: symbolic_trace(small()), bank="mp"), run_small, second(bank="mp"),
    ),
}  # fmt: skip


def check_every_step(picture, attempt, stride):
    """Fail at step 0, 1, 2, ... until nothing fails; the model is as it was after each."""
    step = 0
    while True:
        with Calls(fail_at=step) as calls:
            try:
                result = attempt(picture.model)
            except Fault:
                result = None
        if calls.count <= step:
            return result, step
        picture.assert_unchanged(step)
        step += stride


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRIES)
def test_a_fault_at_any_step_changes_nothing(name):
    make, run, attempt = TRIES[name]
    model = make()
    picture = Picture(model, run)
    result, steps = check_every_step(picture, attempt, 1 if name in AT_EVERY_STEP else SOME)
    assert steps > 30
    used = result if result is not None else model
    twin = make()
    expected = attempt(twin)
    expected = expected if expected is not None else twin
    names = list(used.state_dict())
    assert names == list(expected.state_dict())
    assert any("pemn_masks" in name for name in names)
    if run is not run_nothing:
        models.assert_equal(run(used), run(expected))


# ---- PEFT's and transformers' doors -----------------------------------------------------------


def saved(folder, make, **options):
    """A trained adapter's folder."""
    model = pemnify(make(), **options)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(".scores"):
                tensor.copy_(torch.linspace(-1, 1, tensor.numel()).view(tensor.shape).sin())
    model.save_pretrained(folder)
    return folder


def plain_bert():
    return models.bert()


def run_bert(model):
    return model(models.tokens()).logits.clone()


def bert_with_one():
    model = models.bert()
    model.add_adapter(PemnConfig(bank="mp"), "first")
    return model


OWN = {"bank": "own", "selector": "topk", "rest": "train"}
DOORS = {
    "from_pretrained": (
        small, run_small, OWN, lambda m, folder: PeftModel.from_pretrained(m, folder)
    ),
    "load_adapter": (
        with_one(small, **OWN), run_small, OWN, lambda m, folder: m.load_adapter(folder, "b")
    ),
    "load_adapter, a name in use": (
        with_one(small, **OWN), run_small, OWN, lambda m, folder: m.load_adapter(folder, "default")
    ),
    "load_adapter, to train": (
        with_one(small, **OWN), run_small, OWN,
        lambda m, folder: m.load_adapter(folder, "b", is_trainable=True),
    ),
    "task_type": (
        plain_bert, run_bert, None,
        lambda m, _: get_peft_model(m, PemnConfig(bank="mp", task_type="SEQ_CLS")),
    ),
    "transformers add_adapter": (
        plain_bert, run_bert, None, lambda m, _: m.add_adapter(PemnConfig(bank="mp"))
    ),
    "transformers add_adapter, a second": (
        bert_with_one, run_bert, None, lambda m, _: m.add_adapter(PemnConfig(bank="mp"), "second")
    ),
    "transformers load_adapter": (
        plain_bert, run_bert, {"bank": "own"}, lambda m, folder: m.load_adapter(folder)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DOORS)
def test_a_fault_at_any_step_of_a_door_changes_nothing(name, tmp_path):
    make, run, options, attempt = DOORS[name]
    if options is not None:
        base = small if run is run_small else plain_bert
        saved(tmp_path, base, **options)
    picture = Picture(make().eval(), run)
    stride = 31 if run is run_bert else SOME
    result, steps = check_every_step(picture, lambda m: attempt(m, str(tmp_path)), stride)
    assert steps > 30
    used = result if isinstance(result, nn.Module) else picture.model
    twin = make().eval()
    expected = attempt(twin, str(tmp_path))
    expected = expected if isinstance(expected, nn.Module) else twin
    assert list(used.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        models.assert_equal(used.state_dict()[name], value, name)
    models.assert_equal(run(used.eval()), run(expected.eval()))


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_a_refused_merge_has_merged_nothing(how):
    """The broken layer is the last one."""
    model = pemnify(small(), bank="mp").eval()
    layers = list(models.mask_layers(model).values())
    assert len(layers) == 2
    with torch.no_grad():
        layers[-1].pemn_masks["default"].scores[0, 0] = float("nan")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(NonFiniteScoresError):
        getattr(model, how)(safe_merge=True)
    assert [type(module) for module in model.modules()] == classes
    assert not any(layer.merged_adapters for layer in layers)
    assert all(layer.merged_weight is None for layer in layers)
