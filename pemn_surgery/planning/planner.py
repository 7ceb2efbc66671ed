"""Making a plan: every weight of a model, what will happen to it and why. Nothing is touched."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from pemn_surgery.models.forward import Trace
from pemn_surgery.models.graph_modules import uses_in_graphs
from pemn_surgery.numbers import bank as banks
from pemn_surgery.planning.blocks import repeated_blocks
from pemn_surgery.planning.candidates import Candidate, candidates, is_named
from pemn_surgery.planning.owned import frozen_norms, owned_tensors, whole_tensors
from pemn_surgery.planning.plan import Left, Plan, Target
from pemn_surgery.planning.request import Request
from pemn_surgery.planning.roles import (
    TABLES,
    base_modules,
    fan_in_of,
    fan_out_of,
    is_norm,
    is_weight,
    rows_of,
    scale_rows_of,
    scripted_modules,
)

# A candidate that stays, and why.
Staying = tuple[Candidate, str]


def make_plan(model: nn.Module, request: Request) -> Plan:
    """Decide what happens to every tensor of a model; masks that it has already count as none."""
    uses = uses_in_graphs(model)
    found = list(candidates(model, request, uses))
    targets, left = _sort_out(found, request)
    densities = request.densities({target.name: target.shape for target in targets})
    targets = [replace(target, density=densities.get(target.name)) for target in targets]
    masked = {name for target in targets for name in (target.name, *target.tied)}
    layout = None
    if request.spec.bank != "own" and targets:
        weights = [
            (target.name, target.shape, request.spec.fan(target.fan_in, target.fan_out))
            for target in targets
        ]
        layout = banks.lay_out(request.spec, weights)
    return Plan(
        spec=request.spec,
        layout=layout,
        targets=tuple(targets),
        left=tuple(left),
        owned=tuple(owned_tensors(model, request, masked, uses)),
        frozen_norms=tuple(frozen_norms(model, request)),
        whole=tuple(whole_tensors(model, request)),
        parameters=_count_parameters(model, found),
        blocks=tuple(repeated_blocks(model)),
        untraced=request.untraced,
    )


def functional_weights(model: nn.Module, trace: Trace) -> list[str]:
    """Return the raw parameters that a forward multiplies its input with: experts, projections.

    Not among them: weights of layers, which are masked anyway, tables whose rows it looks up, and
    what it chooses by (routers, codebooks).
    """
    modules = dict(base_modules(model))
    found = []
    for name in trace.by_name:
        path, _, parameter = name.rpartition(".")
        module = modules.get(path)
        if module is None or is_weight(module, parameter) or isinstance(module, TABLES):
            continue
        is_table = trace.looks_up(name) or name in trace.chosen_by
        if trace.multiplies(name) and not is_table:
            found.append(name)
    return found


def rewritten_weights(model: nn.Module, trace: Trace) -> list[str]:
    """Return the weights that a forward changes in place: what it writes would miss the mask."""
    modules = dict(base_modules(model))
    names = [name for name in trace.written if name.rpartition(".")[0] in modules]
    return [name for name in names if not is_norm(modules[name.rpartition(".")[0]])]


def _sort_out(found: Sequence[Candidate], request: Request) -> tuple[list[Target], list[Left]]:
    by_identity: dict[int, list[Candidate]] = {}
    for one in found:
        by_identity.setdefault(one.identity, []).append(one)
    targets, left = [], []
    for group in by_identity.values():
        masked, staying = _split(group, request)
        if masked:
            targets.append(_target(group, masked, staying, request))
        left.extend(_left(group, bool(masked), staying, request))
    return targets, left


def _split(group: Sequence[Candidate], request: Request) -> tuple[list[Candidate], list[Staying]]:
    """Return which names of one tensor are masked, and which stay and why."""
    reasons = [(one, _reason(one, request)) for one in group]
    free = [one for one, reason in reasons if not reason]
    staying = [(one, reason) for one, reason in reasons if reason]
    if not staying or not free:
        return free, staying
    embeddings_only = all(one.is_embedding for one, _ in staying)
    if request.tied == "both" and embeddings_only:
        return list(group), []
    if request.tied == "untie":
        return free, staying
    first, why = staying[0]
    offer = '; see tied="both" and tied="untie"' if embeddings_only else ""
    tied = [(one, f"tied to {first.name}, which stays: {why}{offer}") for one in free]
    return [], [*staying, *tied]


def _left(
    group: Sequence[Candidate], is_masked: bool, staying: Sequence[Staying], request: Request
) -> Iterator[Left]:
    """Yield what stays; a tied tensor counts once as maskable, and not if a copy is masked."""
    counted = is_masked
    order = {one.name: index for index, one in enumerate(group)}
    seen, reached = _seen(group, request)
    for one, reason in sorted(staying, key=lambda item: order[item[0].name]):
        maskable = one.maskable and not counted
        counted = counted or maskable
        use = "" if one.is_embedding else seen
        kind = type(one.module).__name__
        yield Left(one.name, kind, one.shape, maskable, reason, use, reached, one.is_open)


def _seen(group: Sequence[Candidate], request: Request) -> tuple[str, bool]:
    """Return what a forward does with a tensor and whether it uses it; "" and True if not seen."""
    if request.trace is None:
        return "", True
    counts: Counter[str] = Counter()
    for use in (use for one in group for use in request.trace.of(one.name)):
        where = f" at {use.where}" if use.where else ""
        counts[f"{use.operator}{where}"] += use.count
    if not counts:
        return "not reached by the forward", False
    return ", ".join(f"{what} x{n}" if n > 1 else what for what, n in counts.items()), True


def _reason(candidate: Candidate, request: Request) -> str:
    if candidate.problem:
        return candidate.problem
    if candidate.name in request.functional and not candidate.path:
        return ""  # no module's name could choose it
    return "" if is_named(candidate.name, request) else request.reason_to_leave(candidate.path)


def _target(
    group: Sequence[Candidate],
    masked: Sequence[Candidate],
    staying: Sequence[Staying],
    request: Request,
) -> Target:
    first = masked[0]  # tied candidates share one tensor, hence one use in a graph
    use, reached = _seen(group, request)
    scaled = scale_rows_of(first.module, first.shape, one_a_matrix=request.one_a_matrix)
    layout = rows_of(first.module, first.shape).view
    fan_in = first.fan_in or fan_in_of(first.module, first.shape)
    return Target(
        path=first.path,
        parameter=first.parameter,
        kind=first.operator or type(first.module).__name__,
        shape=first.shape,
        fan_in=fan_in,
        fan_out=fan_out_of(first.module, first.shape, fan_in),
        tied=tuple(one.name for one in masked[1:]),
        untied_from=staying[0][0].name if staying else "",
        use=use,
        reached=reached,
        row_scales=scaled.count if request.row_scaled else 0,
        supported=None if request.support is None else request.support.count(layout),
    )


def _count_parameters(model: nn.Module, found: Sequence[Candidate]) -> int:
    counted = {one.identity: math.prod(one.shape) for one in found}
    tensors = [tensor for _, m in base_modules(model) for tensor in m._parameters.values()]
    tensors.extend(tensor for _, m in scripted_modules(model) for tensor in m.parameters())
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, nn.parameter.UninitializedParameter):
            counted.setdefault(id(tensor), tensor.numel())  # not what it is packed into
    return sum(counted.values())
