"""One model's walk: plan, pemnify, train a step, save, unload, load, merge; equal at every turn.

Masks lie on the model's own weights and start as all ones, so that the model has to stay what it
was, bit for bit, until its scores move.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pemn_surgery import pemnify, plan
from pemn_surgery.masks.masked_weight import MaskedWeight

OPTIONS = {
    "bank": "own",
    "selector": "threshold",
    "threshold": 0.0,
    "score_init": 1.0,
    "rest": "train",
    "modules_to_save": [],
}

# Larger values (minus infinity, the smallest number) exclude something; they are no result.
_LARGEST = 1e30

# Types that refuse to compute gradients in eval mode.
TRAINS_IN_TRAIN_MODE = ("reformer",)

TIED = "tied to a weight that stays, mostly an embedding"


@dataclass
class Walk:
    """What came of one model.

    Attributes:
        parameters: Number of elements of all parameters.
        masked: Number of weights under masks.
        maskable: Number of weights that could be masked.
        targets: Number of masked tensors.
        unreached: Targets that the model's own forward never gives a gradient either.
        kinds: Number of targets by class and parameter.
        left: Maskable weights that stay, by reason.
        untraced: Why the uses of the weights could not be followed, or "".
        failed: The step that failed, or "".
        error: Its error, or "".
        seconds: Time that the walk took.
    """

    parameters: int = 0
    masked: int = 0
    maskable: int = 0
    targets: int = 0
    unreached: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    untraced: str = ""
    failed: str = ""
    error: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def walk(model: nn.Module, inputs: dict[str, Any], folder: Path, **options: Any) -> Walk:
    """Walk a model in eval mode through every step; never raises for what the model does."""
    result = Walk()
    start = time.monotonic()
    try:
        for step in _steps(model, inputs, folder, result, {**OPTIONS, **options}):
            result.failed = step
        result.failed = ""
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"[:500]
    result.seconds = round(time.monotonic() - start, 1)
    return result


def _steps(
    model: nn.Module, inputs: dict[str, Any], folder: Path, result: Walk, options: dict[str, Any]
) -> Iterator[str]:
    """Yield each step's name, then take it."""
    yield "forward"
    stir_constants(model)
    # Torch multiplies with a weight that requires gradients in another order than with a frozen one
    # (`should_fold` in its matmul), which moves the last bit even where no gradient is recorded.
    model.requires_grad_(requires_grad=False)
    expected = outputs(model, inputs)
    check(bool(expected), "the model returns no floats")
    before = describe(model)
    yield "plan"
    planned = plan(model, inputs=inputs, **options)
    count(result, planned)
    check(result.targets > 0, "no target")
    yield "pemnify"
    pemnified = pemnify(model, inputs=inputs, **options)
    check_equal(outputs(pemnified, inputs), expected, "all ones")
    yield "train"
    unmoved = train_a_step(pemnified, inputs)
    trained = outputs(pemnified, inputs)
    check(not same(trained, expected), "the trained masks change nothing")
    yield "save"
    pemnified.save_pretrained(folder)
    yield "unload"
    base = pemnified.unload()
    del pemnified
    check_equal(outputs(base, inputs), expected, "unloaded")
    result.unreached = sorted(unmoved)
    reached = [name for name in unmoved if has_gradient(base, inputs, name)]
    check(not reached, f"scores that did not move: {reached[:5]}")
    yield "load"
    loaded = PeftModel.from_pretrained(base, folder).eval()
    check_equal(outputs(loaded, inputs), trained, "loaded")
    yield "merge"
    merged = loaded.merge_and_unload()
    check_equal(outputs(merged, inputs), trained, "merged")
    check(describe(merged) == before, "the merged model is built otherwise than the original")


def stir_constants(model: nn.Module) -> None:
    """Add noise to weights that start as zeros: nothing passes through them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.data.add_(noise * 0.1)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Return every float tensor of the model's output, without gradients, always seeded alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        return floats(model(**inputs))


def floats(value: Any) -> list[Tensor]:
    """Return every floating-point tensor within nested outputs."""
    if isinstance(value, Tensor):
        value = torch.view_as_real(value) if value.is_complex() else value
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in floats(item)]
    return []


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what surgery has to give back: classes, attributes, state-dict keys and shapes."""
    modules = {
        name: (type(module), sorted(vars(module)), sorted(module._modules))
        for name, module in model.named_modules()
    }
    return {
        "modules": modules,
        "state": {key: (value.shape, value.dtype) for key, value in model.state_dict().items()},
        "parameters": [name for name, _ in model.named_parameters()],
    }


def count(result: Walk, planned: Any) -> None:
    result.parameters = planned.parameters
    result.masked, result.maskable = planned.masked_weights, planned.maskable_weights
    result.targets = len(planned.targets)
    result.kinds = dict(Counter(f"{item.kind}.{item.parameter}" for item in planned.targets))
    result.untraced = planned.untraced
    for item in planned.left:
        if item.maskable:
            why = TIED if item.why.startswith("tied to") else item.why
            result.left[why] = result.left.get(why, 0) + item.weights


def train_a_step(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Move every score against the sign of its gradient; return the targets that did not move."""
    with mode_to_train_in(model):
        torch.manual_seed(0)
        loss_of(floats(model(**inputs))).backward()
    unmoved = []
    for module in model.modules():
        if isinstance(module, MaskedWeight):
            scores = module.pemn_masks["default"].scores
            if scores.grad is None or not scores.grad.any():
                unmoved.append(module.target)
            else:
                scores.data.sub_(1.5 * scores.grad.sign())
    for parameter in model.parameters():
        parameter.grad = None
    return unmoved


@contextmanager
def mode_to_train_in(model: nn.Module) -> Iterator[None]:
    """Leave a model in eval mode, which gives the same outputs every time, if it trains in that."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    model.train(kind in TRAINS_IN_TRAIN_MODE)
    yield
    model.eval()


def loss_of(values: list[Tensor]) -> Tensor:
    """Return a random projection of all outputs that have a gradient."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for value in values:
        if value.requires_grad:
            finite = torch.where(value.abs() < _LARGEST, value, 0.0).float()
            weights = torch.randn(finite.shape, generator=generator)
            total = total + (finite * weights).sum() / (finite.detach().norm() + 1e-6)
    return total


def has_gradient(model: nn.Module, inputs: dict[str, Any], name: str) -> bool:
    """Tell whether the unmasked model's own weight gets a gradient."""
    weight = model.get_parameter(name).requires_grad_()
    with mode_to_train_in(model):
        torch.manual_seed(0)
        loss = loss_of(floats(model(**inputs)))
        if not loss.requires_grad:
            return False
        (grad,) = torch.autograd.grad(loss, [weight], allow_unused=True)
    weight.requires_grad_(requires_grad=False)
    return grad is not None and bool((grad * weight).any())


def same(values: list[Tensor], expected: list[Tensor]) -> bool:
    """Tell whether two lists of tensors are equal, bit for bit but for NaN's."""
    return len(values) == len(expected) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(values, expected, strict=True)
    )


def check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def check_equal(values: list[Tensor], expected: list[Tensor], what: str) -> None:
    if same(values, expected):
        return
    check(len(values) == len(expected), f"{what}: {len(values)} outputs, not {len(expected)}")
    gaps = [
        float((a - b).abs().max()) if a.shape == b.shape and a.numel() else float("inf")
        for a, b in zip(values, expected, strict=True)
    ]
    check(False, f"{what}: outputs differ by up to {max(gaps):.3g}")
