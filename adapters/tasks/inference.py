"""Which task is this batch of? Asked of a model that carries many and was not told.

SupSup (Wortsman et al., NeurIPS 2020): run the mixture of all k adapters, each with weight 1 / k,
and follow the gradient of an objective with respect to those weights. The adapter whose share, if
it grew, would lower the objective most is the one that knows the batch. The objective is the
entropy H of the output, or what its spare outputs say, G.

Networks with BatchNorm know more: each task's running statistics, which its batches have
(`statistics`).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pemn_surgery.adapters.tasks.mixing import (
    call,
    heads_of,
    mixed,
    only_looking,
    tensors_of,
    usable,
)
from pemn_surgery.adapters.tasks.statistics import divergences
from pemn_surgery.errors import ConfigError, TaskInferenceError
from pemn_surgery.masks.masked_weight import MaskedWeight
from pemn_surgery.masks.mixture import Mixture
from pemn_surgery.masks.task_tensors import TaskTensors

MethodName = Literal["one_shot", "binary", "statistics"]
ObjectiveName = Literal["entropy", "spare_outputs"]

# How many of so many adapters stay after a round.
_STAYING: dict[str, Callable[[int], int]] = {
    "one_shot": lambda adapters: 1,
    "binary": lambda adapters: math.ceil(adapters / 2),
}
_METHODS = (*_STAYING, "statistics")
_OBJECTIVES = ("entropy", "spare_outputs")


@dataclass(frozen=True)
class TaskGuess:
    """The inferred task and what it was inferred from.

    Attributes:
        name: The adapter to use.
        rounds: For each round the gradient of the objective (dH/dalpha or dG/dalpha) of the
            adapters that were mixed in it, each with weight 1 / their number, in the order of the
            adapters. Empty with "statistics".
        divergences: With "statistics", of every adapter how far the batch's statistics are from its
            running ones, in nats a channel; else empty.
    """

    name: str
    rounds: tuple[Mapping[str, float], ...] = ()
    divergences: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many gradients were taken: 1, ceil(log2(k)) for "binary", 0 for "statistics"."""
        return len(self.rounds)

    @property
    def gradients(self) -> dict[str, float]:
        """The objective's gradient of every adapter, in the last round that it was mixed in."""
        return {name: value for taken in self.rounds for name, value in taken.items()}

    @property
    def margin(self) -> float:
        """How far the winner was ahead of the adapter that came closest to taking its place.

        Of a round that is its gradient's distance to the smallest gradient that was dropped; of
        several rounds the least counts, since the winner had to stay in each. With "statistics" it
        is the distance to the second smallest divergence. Never negative, 0 at a tie, and inf where
        there was no other candidate. It has the unit of what is compared, so compare it
        between batches that were asked about in the same way.
        """
        decided = self.rounds or (self.divergences,)
        stayed = (*decided[1:], (self.name,))
        return min(self._lead(*pair) for pair in zip(decided, stayed, strict=True))

    def _lead(self, values: Mapping[str, float], stayed: Collection[str]) -> float:
        """Return how far the winner was ahead of the first adapter that did not stay."""
        dropped = [value for name, value in values.items() if name not in stayed]
        return min(dropped) - values[self.name] if dropped else math.inf


def infer_task(
    model: nn.Module,
    inputs: Any,
    *,
    adapters: Sequence[str] | None = None,
    method: MethodName = "one_shot",
    objective: ObjectiveName | None = None,
    classes: int | None = None,
) -> TaskGuess:
    """Infer which adapter a batch of one task belongs to; activate it with ``set_adapter``.

    The model runs in eval mode. For "one_shot" and "binary" it runs once (and backward) a round,
    with fill x sum of alpha_i (mask x scale)_i as every weight; what else tasks own is mixed with
    the same weights: norms, running statistics, biases and the tensors of ``modules_to_save``. For
    "statistics" it runs once a candidate, with that adapter alone. The model is left as it was:
    mode, active and merged adapters, gradients, statistics, kept weights. Calls of a `PeftModel`
    that other threads have begun go on as they began; those that they are about to begin wait.

    Args:
        model: Any model that carries adapters of this method, also inside a wrapper. Its forward
            returns logits, a float tensor of shape (..., outputs), or something that has them as
            ``logits``; with "statistics" it may return anything.
        inputs: The batch: a tensor, a mapping of keyword arguments, or a tuple of positional ones.
        adapters: The candidates. None takes all that have masks.
        method: "one_shot" takes one gradient and the adapter with the smallest; "binary" drops the
            half with the larger gradients and takes another, until one is left; "statistics" takes
            the adapter whose running statistics (of BatchNorm) are nearest to the batch's.
        objective: What the gradient is of, for "one_shot" and "binary". "entropy" (None means it)
            is that of the softmax; "spare_outputs" is the logsumexp of the logits with a gradient
            through those outputs alone that no label uses, SupSup's G.
        classes: With "spare_outputs", how many outputs labels use: the first ones. The others are
            spare.

    Returns:
        The guess. Of equal gradients or divergences the earlier adapter's is taken for smaller.

    Raises:
        ConfigError: If there is no such method or objective, or ``objective`` and ``classes`` do
            not go with the others.
        TaskInferenceError: If the model has no such adapters, one adds signs, heads differ in
            shape, the forward returns no logits of at least two outputs or runs without gradients,
            no output is spare, or a gradient is not finite. With "statistics", if a candidate has
            no running statistics that moved while it trained, or a divergence is not finite.
    """
    names = _candidates(model, adapters)
    _check_options(method, objective, classes)
    if method == "statistics":
        with only_looking(model, gradients=False):
            found = divergences(model, usable(inputs), names)
        return TaskGuess(min(names, key=found.__getitem__), divergences=found)
    _check_forms(model, names)
    _check_heads(model, names)
    _check_rows(model, names)
    rounds: list[Mapping[str, float]] = []
    with only_looking(model, gradients=True):
        batch = usable(inputs)
        while not rounds or len(names) > 1:
            rounds.append(_gradients(model, batch, names, classes))
            best = sorted(names, key=rounds[-1].__getitem__)[: _STAYING[method](len(names))]
            names = tuple(name for name in names if name in best)
    return TaskGuess(next(iter(names)), tuple(rounds))


def _candidates(model: nn.Module, adapters: Sequence[str] | None) -> tuple[str, ...]:
    layers = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    held = tuple(dict.fromkeys(name for layer in layers for name in layer.pemn_masks))
    names = held if adapters is None else tuple(adapters)
    unknown = [name for name in names if name not in held]
    if unknown or not names or len(set(names)) < len(names):
        message = (
            f"infer_task got adapters={adapters!r}; it needs one or more, each once, of those that "
            f"have masks in the model: {', '.join(held) or 'there are none'}. Load the tasks with "
            "model.load_adapter first."
        )
        raise TaskInferenceError(message)
    return names


def _check_options(method: str, objective: str | None, classes: int | None) -> None:
    """Refuse what there is not, and what nothing would read."""
    if method not in _METHODS:
        message = f"infer_task got method={method!r}; it needs one of {', '.join(_METHODS)}."
        raise ConfigError(message)
    if objective not in (*_OBJECTIVES, None):
        known = ", ".join(_OBJECTIVES)
        message = f"infer_task got objective={objective!r}; it needs one of {known}."
        raise ConfigError(message)
    given = f"infer_task got method={method!r}, objective={objective!r} and classes={classes!r}; "
    if method == "statistics" and not (objective is None and classes is None):
        message = "'statistics' reads no outputs. Leave objective and classes out."
        raise ConfigError(given + message)
    if objective == "spare_outputs" and (classes is None or classes < 1):
        message = (
            "'spare_outputs' needs to know how many outputs labels use, the first ones, 1 or more: "
            "classes=10. All others are spare."
        )
        raise ConfigError(given + message)
    if objective != "spare_outputs" and classes is not None:
        message = (
            "the entropy weighs all outputs alike. Leave classes out, or give "
            "objective='spare_outputs'."
        )
        raise ConfigError(given + message)


def _check_forms(model: nn.Module, names: Sequence[str]) -> None:
    layers = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    masks = [(name, layer.pemn_masks._modules.get(name)) for layer in layers for name in names]
    adding = list(dict.fromkeys(name for name, mask in masks if getattr(mask, "adds", False)))
    if adding:
        message = (
            f"The adapters {', '.join(adding)} add signs to the weights (form='sign_delta'); only "
            "masks, which multiply them, are mixed. Infer among other adapters (adapters=[...])."
        )
        raise TaskInferenceError(message)


def _check_heads(model: nn.Module, names: Sequence[str]) -> None:
    for path, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        heads = [tensors_of(head) for head in heads_of(wrapper, names)]
        shapes = [{name: tuple(one.shape) for name, one in head.items()} for head in heads]
        for name, found in _others(names, shapes):
            message = (
                f"{path} of adapter {name!r} has the shapes {found}, that of {names[0]!r} "
                f"{shapes[0]}: their logits cannot be mixed. Infer among adapters with equal "
                "heads (adapters=[...]), or give all tasks one head of the largest size."
            )
            raise TaskInferenceError(message)


def _check_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters with rows for different numbers of added tokens."""
    for module in (one for one in model.modules() if isinstance(one, TaskTensors)):
        for tensor in module.grown_tensors():
            held = [module.new_rows(tensor, (name,)) for name in names]
            counts = [0 if rows is None else len(rows) for rows in held]
            for name, count in _others(names, counts):
                message = (
                    f"Adapter {name!r} has {count} new rows of {tensor!r} in {module.target!r} "
                    f"(added tokens), {names[0]!r} has {counts[0]}: their logits cannot be mixed. "
                    "Infer among adapters with equal numbers of tokens (adapters=[...])."
                )
                raise TaskInferenceError(message)


def _others(names: Sequence[str], found: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Return the adapters for which something else was found than for the first."""
    return ((name, one) for name, one in zip(names, found, strict=True) if one != found[0])


def _gradients(
    model: nn.Module, inputs: Any, names: tuple[str, ...], classes: int | None
) -> dict[str, float]:
    """Return dH/dalpha (dG/dalpha with ``classes``), where all have the weight 1 / their number."""
    alphas = torch.full((len(names),), 1 / len(names), requires_grad=True)
    with mixed(model, Mixture(names, alphas)):
        logits = _logits(call(model, inputs))
        objective = _entropy(logits) if classes is None else _spare_outputs(logits, classes)
        found = _gradient(objective, alphas)
    if not bool(torch.isfinite(found).all()):
        message = (
            f"The objective of the mixture of {len(names)} adapters has a gradient that is not "
            f"finite (objective {objective.item()}). Give inputs and adapters whose logits are "
            "finite."
        )
        raise TaskInferenceError(message)
    return dict(zip(names, found.tolist(), strict=True))


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() == 0 or logits.shape[-1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        message = (
            f"The model returned {found}; infer_task needs logits of shape (..., outputs) with two "
            "outputs or more, as a tensor or as .logits of what is returned."
        )
        raise TaskInferenceError(message)
    return logits


def _entropy(logits: Tensor) -> Tensor:
    """Return H, the softmax's entropy in nats, averaged over everything but the outputs."""
    chances = _wide(logits).log_softmax(-1)
    return -(chances.exp() * chances).sum(-1).mean()


def _spare_outputs(logits: Tensor, classes: int) -> Tensor:
    """Return G, the mean logsumexp of the logits; only spare outputs pass gradients on.

    dG is the sum over spare outputs of softmax x d(logit). Training on a task pushes these outputs
    down, under its own mask and inputs, so the share that would lower them most is its own. The
    outputs that labels use pass nothing on: a wrong mask can be as sure of some class as the right.
    """
    outputs = logits.shape[-1]
    if classes >= outputs:
        message = (
            f"objective='spare_outputs' got classes={classes}, and the logits have {outputs} "
            "outputs: none is spare. Train tasks on a head with more outputs than classes, or use "
            "objective='entropy'."
        )
        raise TaskInferenceError(message)
    used, spare = _wide(logits).split([classes, outputs - classes], -1)
    return torch.cat([used.detach(), spare], -1).logsumexp(-1).mean()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _gradient(objective: Tensor, alphas: Tensor) -> Tensor:
    found = None
    if objective.requires_grad:
        (found,) = torch.autograd.grad(objective, alphas, allow_unused=True)
    if found is None:
        message = (
            "The logits have no gradient with respect to the masks: the forward turns gradients "
            "off (torch.no_grad) or detaches. Give infer_task the model without that."
        )
        raise TaskInferenceError(message)
    return found
