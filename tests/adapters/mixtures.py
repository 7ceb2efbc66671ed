"""Networks with several adapters, dense mixtures of them, and what a question must leave alone."""

import pytest
import torch
from torch import nn

from pemn_surgery import PemnConfig, pemnify
from tests.adapters import models

NAMES = ("a", "b", "c", "d", "f")  # PEFT warns of letters of its prefix "pemn_"
MP = {"bank": "mp"}


def tasks(options, names=NAMES, steps=3):
    """A network with several adapters, each trained a little on a batch of its own."""
    model = models.net().eval()
    model = pemnify(model, PemnConfig(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, PemnConfig(**options))
    for task, name in enumerate(names):
        model.set_adapter(name)
        models.train(model, task, steps)
    return model.eval()


def scaled_mask(layer, name):
    """M x c of one adapter; ones where it leaves the weight unmasked."""
    if name not in layer.pemn_masks:
        return torch.ones(layer.shape)
    mask = models.mask_of_layer(layer, name).float()
    return mask / mask.double().mean().sqrt() if layer.mask_of(name).scaled else mask


def mixed_state(model, names, alphas):
    """Every tensor of the plain network: weights and owned tensors summed, nothing shared."""
    state = {}
    for target, layer in models.mask_layers(model).items():
        pairs = zip(alphas, names, strict=True)
        state[target] = layer.fill().detach() * sum(a * scaled_mask(layer, n) for a, n in pairs)
    for path, layer in models.task_layers(model).items():
        owner = layer.owner
        for name, base in [*owner._parameters.items(), *owner._buffers.items()]:
            if base is None:
                continue
            held = [layer.pemn_tensors[n](name) for n in names]
            full = f"{path}.{name}"
            if full in state or all(tensor is None for tensor in held):
                continue
            total = sum(
                alpha * (base if tensor is None else tensor).detach()
                for alpha, tensor in zip(alphas, held, strict=True)
            )
            state[full] = total.detach() if name in owner._buffers else total
    return state


def assert_close(found, expected):
    assert list(found) == list(expected)
    assert len(expected) > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-7), name


def state_of(model):
    """What `Snapshot` does not see."""
    layers = models.mask_layers(model).values()
    return {
        "active": model.active_adapters,
        "kept": [(layer._kept.weight, layer._kept.sources) for layer in layers],
        "merged": [layer.merged_weight for layer in layers],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "mixtures": [m.mixture for m in model.modules() if hasattr(m, "mixture")],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "attributes": [set(vars(m)) for m in model.modules()],
    }


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return found is expected or torch.equal(found, expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def in_training(model):
    model.train()
    model.base_model.model.bn2.eval()  # modes differ from module to module
    models.step(model, models.trainer_of(model), 0)


def merged(model):
    model.merge_adapter(["c"])


def disabled(model):
    model.base_model.disable_adapter_layers()


PREPARE = [lambda model: None, in_training, merged, disabled]


class Breaks(nn.Module):
    def forward(self, x):
        message = "broken on purpose"
        raise RuntimeError(message)


class Counts(models.Net):
    """Writes to its statistics at every call, in place and by assignment."""

    def forward(self, x):
        self.bn1.running_mean = self.bn1.running_mean + 1
        self.bn2.running_var.mul_(2)
        self.bn2.num_batches_tracked.add_(1)
        return super().forward(x)
