"""Random programs on a model that keeps effective weights, and on one that keeps none.

A program is a list of operations from a seed: forward, backward, step, switch, merge, assign, cast,
copy, save, load, averaged teachers, writes of every kind. Both models say something after each
operation - a loss, what they export, the error that they raised - and what they say must be equal
to the last bit. ``python -m tests.programs --out docs/results/programs.json`` runs a thousand.
"""

import argparse
import copy
import json
import pickle
import random
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters.tasks.manage import to_trainable
from pemn_surgery.coding import bits
from pemn_surgery.coding.header import inspect
from pemn_surgery.masks.masked_weight import keep_weights
from tests.adapters import models

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
BANKS = (
    {"bank": "mp"},
    {"bank": "rp", "ratio": 0.2},
    {"bank": "own", "selector": "topk"},
    {"bank": "own", "selector": "topk", "form": "flip", "support": 0.4},
    {"bank": "mp", "support": 0.4, "support_others": "drawn"},
    {"bank": "own", "selector": "topk", "form": "flip", "scale": "row"},
    {"bank": "own", "selector": "topk", "form": "sign_delta"},
    {"bank": "own", "selector": "topk_signed", "form": "sign_delta", "support": 0.4},
)


class Small(nn.Module):
    """Every layer runs once, since sums of gradients over several runs have an order."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.one, self.two = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.to(self.conv.weight.dtype)))).mean(-1)
        return self.two(torch.tanh(self.one(x)))


def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


def seeded(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _part(numbers, seed):
    """All of a tensor, or one of its rows or columns, as a view; of a vector a long stretch."""
    if numbers.dim() < 2:
        return numbers[seed % 7 :] if seed % 2 else numbers
    axis = seed % 3
    return numbers if axis == 2 else numbers.select(axis, seed % numbers.shape[axis])


class Machine:
    """A model, its teacher and its optimizer, in the hands of one program."""

    def __init__(self, options, training, keep):
        self.options, self.keep = options, keep
        self.model = pemnify(small(), PemnConfig(**options)).train(training)
        self.teacher, self.optimizer = None, None
        self.settle()

    def settle(self):
        """Layers that were made meanwhile keep, or keep nothing, like the others."""
        for model in (self.model, self.teacher):
            if model is not None and not self.keep:
                keep_weights(model, False)

    @property
    def inner(self):
        return self.model.get_base_model()

    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def masked(self):
        return list(models.mask_layers(self.model).values())

    def frozen(self):
        """What lies under the masks: own weights, or the bank."""
        layers = self.masked()
        own = [layer.own_weight() for layer in layers if layer.bank is None]
        return own or [layers[0].bank.values]

    # ---- what programs are made of; each takes a random integer ----

    def say(self, seed, model=None):
        with MODES[seed % 3]():
            said = (self.model if model is None else model)(seeded(seed, 4, 2, 5))
            return said.square().mean().detach().clone()

    def say_inside(self, seed):
        return self.say(seed, self.inner)

    def backward(self, seed):
        loss = self.model(seeded(seed, 4, 2, 5)).square().mean()
        if loss.requires_grad:
            loss.backward()
        return loss.detach().clone()

    def backward_later(self, seed):
        """A second forward, and a write without a trace, before the first one's gradient."""
        loss = self.model(seeded(seed, 4, 2, 5)).square().mean()
        said = self.say(seed + 1)
        if loss.requires_grad:
            loss.backward()
        return said + loss.detach()

    def step(self, seed):
        kinds = (torch.optim.SGD, torch.optim.Adam)
        if self.trained():
            kinds[seed % 2](self.trained(), lr=0.1).step()

    def step_through_data(self, _):
        for parameter in self.trained():
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad.data * 0.1)
                parameter.grad = None

    def perturb(self, seed):
        for place, parameter in enumerate(self.trained()):
            noise = seeded(seed + place, *parameter.shape).to(parameter.dtype)
            parameter.data.add_(noise * 0.1)

    def say_perturbed(self, seed):
        """Evolution strategies: two answers, and a write without a trace in between."""
        before = self.say(seed)
        self.perturb(seed)
        return before + self.say(seed)

    def perturb_in_place(self, seed):
        with torch.no_grad():
            for place, parameter in enumerate(self.trained()):
                parameter.add_(seeded(seed + place, *parameter.shape).to(parameter.dtype) * 0.1)

    def train(self, _):
        self.model.train()

    def eval(self, _):
        self.model.eval()

    def teach(self, seed):
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).train(bool(seed % 2))
        return self.ask_teacher(seed)

    def ask_teacher(self, seed):
        return None if self.teacher is None else self.say(seed, self.teacher)

    def average(self, seed):
        if self.teacher is None:
            return None
        before = self.ask_teacher(seed)
        mine, theirs = (dict(m.named_parameters()) for m in (self.teacher, self.model))
        for name in sorted(mine.keys() & theirs.keys()):
            if mine[name].shape == theirs[name].shape and "pemn_" in name:
                mine[name].data.mul_(0.5).add_(theirs[name].data.to(mine[name].dtype) * 0.5)
        return before + self.ask_teacher(seed)

    def add(self, seed):
        name = "abc"[seed % 3]
        self.model.add_adapter(name, PemnConfig(**{**self.options}))
        for layer in self.masked():
            mask = layer.mask_of(name)
            if mask.scores is not None:
                mask.scores.data.add_(seeded(seed, *layer.shape).to(mask.scores.dtype))

    def switch(self, seed):
        names = sorted(self.model.peft_config)
        self.model.set_adapter(names[seed % len(names)])

    def switch_to_all(self, _):
        self.model.base_model.set_adapter(sorted(self.model.peft_config))

    def delete(self, seed):
        names = sorted(set(self.model.peft_config) - set(self.model.active_adapters))
        if names:
            self.model.delete_adapter(names[seed % len(names)])

    def say_disabled(self, seed):
        with self.model.disable_adapter():
            return self.say(seed)

    def merge(self, _):
        self.model.merge_adapter()
        return self.export(0)

    def unmerge(self, _):
        self.model.unmerge_adapter()
        return self.export(0)

    def export(self, _):
        state = {k: v for k, v in self.inner.state_dict().items() if "pemn_" not in k}
        return [value.detach().clone() for _, value in sorted(state.items())]

    def merge_a_copy(self, seed):
        return self.say(seed, copy.deepcopy(self.model).merge_and_unload())

    def assign(self, seed):
        module, name = (("two", "bias"), ("norm", "weight"), ("norm", "running_mean"),
                        ("one", "bias"))[seed % 4]  # fmt: skip
        owner = self.inner.get_submodule(module)
        now = getattr(owner, name)
        value = seeded(seed, *now.shape).to(now.dtype)
        setattr(owner, name, nn.Parameter(value) if isinstance(now, nn.Parameter) else value)

    def assign_masked(self, seed):
        """Own numbers under masks; refused where a bank fills them, or while merged."""
        owner = self.inner.get_submodule(("one", "two", "conv")[seed % 3])
        value = seeded(seed, *owner.weight.shape).to(owner.weight.dtype)
        owner.weight = nn.Parameter(value, requires_grad=False)

    def write_masked(self, seed):
        """Refused, but on a merged weight."""
        weight = self.inner.get_submodule(("one", "two", "conv")[seed % 3]).weight
        weight.data.mul_(0.5)

    def write_base(self, _):
        with torch.no_grad():
            for layer in self.masked():
                if layer.bank is None:
                    layer.own_weight().mul_(1.25)

    def write_base_through_data(self, seed):
        """In whatever mode: what lies under the masks, all of it or an output or an input of it."""
        for numbers in self.frozen():
            _part(numbers.data, seed).mul_(0.75)

    def write_base_through_numpy(self, seed):
        """As numpy and dlpack see memory: they know of no versions."""
        for numbers in self.frozen():
            if numbers.dtype != torch.bfloat16:
                _part(numbers.detach(), seed).numpy()[...] *= 0.5

    def say_rewritten(self, seed):
        """Two answers, and a write to what lies under the masks in between."""
        before = self.say(seed)
        (self.write_base_through_data, self.write_base_through_numpy)[seed % 2](seed)
        return before + self.say(seed)

    def write_bits_through_data(self, seed):
        for place, layer in enumerate(self.masked()):
            for name in layer.names_in_use():
                mask = layer.mask_of(name)
                if mask.scores is None:
                    base = inspect(mask.bits, name).base
                    mask.bits.data.copy_(bits.pack(~mask.mask().roll(seed + place), base))

    def write_bits(self, seed):
        for place, layer in enumerate(self.masked()):
            for name in layer.names_in_use():
                mask = layer.mask_of(name)
                if mask.scores is None:
                    base = inspect(mask.bits, name).base
                    mask.bits.copy_(bits.pack(mask.mask().roll((seed + place) % 5), base))

    def cast(self, seed):
        self.model.to((torch.float64, torch.float32, torch.bfloat16, torch.float32)[seed % 4])

    def copy(self, _):
        self.model = copy.deepcopy(self.model)

    def pickle(self, _):
        self.model = pickle.loads(pickle.dumps(self.model))

    def state(self, _):
        self.model.load_state_dict(copy.deepcopy(self.model).state_dict())

    def save(self, _):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            files = sorted(Path(folder).rglob(models.WEIGHTS_FILE))
            return b"".join(file.read_bytes() for file in files)

    def reload(self, seed):
        """A task in another process: bits on a fresh base."""
        name = self.model.active_adapters[0]
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            path = Path(folder) if name == "default" else Path(folder) / name
            fresh = PeftModel.from_pretrained(small(), path, adapter_name=name)
        self.model = fresh.train(bool(seed % 2))

    def to_trainable(self, _):
        to_trainable(self.model, self.model.active_adapters[0])


_NOT_OPERATIONS = ("settle", "inner", "trained", "masked", "frozen")
OPERATIONS = [n for n in vars(Machine) if n not in _NOT_OPERATIONS and not n.startswith("_")]
_WEIGHTS = {"say": 6, "backward": 6, "step": 4, "perturb": 3, "say_perturbed": 3, "average": 4,
            "say_rewritten": 3}  # fmt: skip
_KINDS = [name for name in OPERATIONS for _ in range(_WEIGHTS.get(name, 1))]


def program(seed, length=20):
    """A model's options and first mode, and the operations on it: a pure function of the seed."""
    chosen = random.Random(seed)
    options = {**chosen.choice(BANKS), "rest": chosen.choice(["train", "norms", "stats"])}
    is_whole = not options.keys() & {"form", "support"}
    if chosen.random() < 0.4 and "support_others" not in options:
        options |= {"selector": "threshold", "threshold": 0.0}
    if chosen.random() < 0.3 and is_whole:
        options["scale"] = "sqrt_density"
    if chosen.random() < 0.3:
        options["inference_mode"] = True  # bits from the start
    training = chosen.random() < 0.5
    return (
        options,
        training,
        [(chosen.choice(_KINDS), chosen.randrange(1000)) for _ in range(length)],
    )


def says(machine, operation, argument):
    """What one operation returns, or the name and words of what it raises."""
    try:
        said = getattr(machine, operation)(argument)
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0] if str(error) else ""
    finally:
        machine.settle()
    return said


def equal(one, two):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        return same and torch.equal(one.nan_to_num(nan=1e30), two.nan_to_num(nan=1e30))
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


def run(seed):
    """Run one program on both models; return what was done, and where they first differ."""
    options, training, operations = program(seed)
    done, wrong = Counter(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keeping, making = (Machine(options, training, keep) for keep in (True, False))
        for place, (operation, argument) in enumerate(operations):
            one, two = (says(machine, operation, argument) for machine in (keeping, making))
            raised = isinstance(two, tuple)
            done[f"{operation}: {two[0]}" if raised else operation] += 1
            if not equal(one, two):
                wrong = {"seed": seed, "place": place, "operation": operation,
                         "options": options, "before": operations[:place]}  # fmt: skip
                break
    return done, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    started, done, wrong = time.time(), Counter(), []
    seeds = range(given.first, given.first + given.count)
    with ProcessPoolExecutor(given.jobs) as pool:
        for counted, difference in pool.map(run, seeds, chunksize=10):
            done += counted
            wrong += [difference] if difference else []
    result = {
        "programs": given.count,
        "first_seed": given.first,
        "operations": sum(done.values()),
        "programs_that_differ": len(wrong),
        "differences": wrong[:10],
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
        "counts": dict(sorted(done.items())),
    }
    text = json.dumps(result, indent=1)
    print(text)  # noqa: T201
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
