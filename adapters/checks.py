"""What is refused before anything changes, and in which words."""

from collections import defaultdict

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.file import AdapterFile
from pemn_surgery.bank import Bank, BankSpec
from pemn_surgery.errors import (
    AlreadyPemnifiedError,
    ArchitectureError,
    BankMismatchError,
    NothingToMaskError,
    UnsupportedModelError,
)
from pemn_surgery.targets import Plan

_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "ScriptModule",
    "RecursiveScriptModule",
)


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be rewritten.

    Args:
        model: What the user gave.

    Raises:
        UnsupportedModelError: If it is not a module, or a wrapper around one.
    """
    if not isinstance(model, nn.Module):
        message = (
            f"Got {type(model).__name__}; a torch.nn.Module is needed, for example a timm model."
        )
        raise UnsupportedModelError(message)
    for module_class in type(model).__mro__:
        if module_class.__name__ in _WRAPPERS:
            message = (
                f"Got a {module_class.__name__} around the model; masks must be there before it is "
                "wrapped or compiled. Call pemnify on the inner model, then wrap the result."
            )
            raise UnsupportedModelError(message)


def check_fresh(model: nn.Module) -> None:
    """Refuse a model that PEFT has changed already.

    Args:
        model: What the user gave.

    Raises:
        AlreadyPemnifiedError: If it carries adapters.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if layers:
        message = (
            f"The model carries adapters in {len(layers)} places already (first: {layers[0]}). Use "
            "model.add_adapter(name, config) for another task, or model.unload() to begin anew."
        )
        raise AlreadyPemnifiedError(message)


def check_targets(plan: Plan, config: PemnConfig) -> None:
    """Refuse a plan without targets.

    Args:
        plan: What would be masked.
        config: What was asked for.

    Raises:
        NothingToMaskError: If no weight would be masked.
    """
    if plan.targets:
        return
    reasons: dict[str, int] = defaultdict(int)
    for item in plan.left:
        reasons[item.reason] += 1
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    asked = ""
    if config.target_modules is not None:
        asked = f"Target modules {config.target_modules} not found in the base model. "
    elif config.target_parameters is not None:
        asked = f"Target parameters {config.target_parameters} not found in the base model. "
    message = (
        f"{asked}None of the model's {plan.parameters} parameters would be masked: of its "
        f"{len(plan.left)} tensors with two or more dimensions: {listed or 'there is none'}. "
        "Masks go on the weights of Linear and Conv layers; see print(plan(model, ...)). Nothing "
        "was changed."
    )
    raise NothingToMaskError(message)


def check_same_bank(held: BankSpec, wanted: BankSpec) -> None:
    """Refuse a second bank beside the one that a model has.

    Args:
        held: The model's.
        wanted: The new adapter's.

    Raises:
        BankMismatchError: If they differ.
    """
    if held == wanted:
        return
    differing = ", ".join(
        f"{name}={value!r} instead of {getattr(held, name)!r}"
        for name, value in vars(wanted).items()
        if getattr(held, name) != value
    )
    message = (
        f"The model draws its weights from another bank: the adapter wants {differing}. All "
        "adapters of one model share one bank; load this one onto a fresh model. Nothing was "
        "changed."
    )
    raise BankMismatchError(message)


def check_fillable(bank: Bank, plan: Plan) -> None:
    """Refuse weights that the model's bank has no numbers for.

    Args:
        bank: The model's.
        plan: What would be masked.

    Raises:
        BankMismatchError: If a weight is larger than the bank, or of a shape that it lacks.
    """
    for target in plan.targets:
        if bank.layout.find(target.shape) is None:
            message = (
                f"The model's bank has no numbers for {target.name} of shape {target.shape} "
                f"({target.weights} weights): it was made for up to {bank.layout.largest}. Give "
                "the first adapter of a model all weights that a later one masks."
            )
            raise BankMismatchError(message)


def check_file_fits(file: AdapterFile, plan: Plan) -> None:
    """Refuse masks of another architecture before anything changes.

    Args:
        file: The adapter file.
        plan: What would be masked.

    Raises:
        ArchitectureError: If names or sizes differ.
    """
    wanted = {target.name: target.weights for target in plan.targets}
    if dict(file.masks) == wanted:
        return
    names = sorted(set(file.masks) | set(wanted))
    differing = [name for name in names if file.masks.get(name) != wanted.get(name)]
    listed = "; ".join(
        f"{name}: file {_count(file.masks.get(name))}, model {_count(wanted.get(name))}"
        for name in differing[:3]
    )
    message = (
        f"The adapter masks {len(file.masks)} tensors of {sum(file.masks.values())} weights, the "
        f"model has {len(wanted)} of {sum(wanted.values())}; {len(differing)} differ ({listed}"
        f"{'; ...' if len(differing) > 3 else ''}). Build the model that the adapter was trained "
        "for. Nothing was changed."
    )
    raise ArchitectureError(message)


def _count(weights: int | None) -> str:
    return "no mask" if weights is None else f"{weights} weights"
