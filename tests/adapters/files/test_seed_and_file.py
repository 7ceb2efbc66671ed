"""With a drawn bank seed, architecture and file make the model: whatever its tensors are."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from pemn_surgery import pemnify, plan
from pemn_surgery.errors import PemnWarning, UnsupportedModelError
from tests.adapters import models


class Kinds(nn.Module):
    """Tensors of all types, all drawn at random."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("order", torch.randperm(16))
        self.register_buffer("chosen", torch.rand(16) > 0.5)
        self.register_buffer("mixed", torch.randperm(16), persistent=False)
        self.shift = nn.Parameter(torch.randint(-3, 3, (1, 16)), requires_grad=False)
        self.filter = nn.Parameter(torch.randn(9, dtype=torch.cfloat))

    def forward(self, x):
        x = self.first(x)[:, self.order] * self.chosen + self.shift
        x = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=16)
        return self.last(x)


def fresh(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Kinds()


BANKS = {
    "rp": {"bank": "rp", "ratio": 0.5},
    "mp": {"bank": "mp"},
    "one_layer": {"bank": "one_layer"},
    "own, drawn": {"bank": "own", "bank_init": "kaiming_normal"},
}
every_bank = pytest.mark.parametrize("bank", BANKS)
x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


@every_bank
@pytest.mark.parametrize("rest", ["train", "norms", "stats", "freeze"])
def test_tensors_of_any_type_travel(bank, rest, tmp_path):
    model = pemnify(fresh(0), rest=rest, **BANKS[bank])
    before = model.get_base_model().filter.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.get_base_model().filter, before) == (rest != "train")
    expected = model.eval()(x)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(fresh(1), str(tmp_path)).eval()
    models.assert_equal(again(x), expected)
    dense = again.merge_and_unload()
    models.assert_equal(dense(x), expected)
    assert dense.filter.dtype == torch.complex64
    assert dense.order.dtype == torch.int64


def test_the_plan_lists_them():
    owned = {item.name: item for item in plan(fresh(0), bank="rp").owned}
    names = {"order", "chosen", "shift", "filter", "first.bias", "last.bias"}
    assert owned.keys() == names
    assert {name for name, item in owned.items() if item.trained} == {
        "filter",
        "first.bias",
        "last.bias",
    }
    assert owned["order"].nbytes == 128
    assert plan(fresh(0), bank="own", selector="topk", rest="norms").owned == ()


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"count": 3}

    def set_extra_state(self, state):
        pass


def test_state_beside_tensors_is_said():
    with pytest.warns(PemnWarning, match=r"1 modules keep state beside.*first: '1'"):
        pemnify(nn.Sequential(nn.Linear(3, 3), Stateful(3, 3)), bank="rp")
    pemnify(
        nn.Sequential(nn.Linear(3, 3), Stateful(3, 3)),
        bank="own",
        selector="topk",
        modules_to_save=[],
    )


def test_types_that_a_file_cannot_hold_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_buffer("wide", torch.ones(2, dtype=torch.complex128))
    before = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="'wide' is complex128"):
        pemnify(model, bank="rp")
    assert before == ([type(module) for module in model.modules()], list(model.state_dict()))
