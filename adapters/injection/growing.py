"""More tokens for a model that has adapters already: every adapter gets rows of its own.

transformers' ``resize_token_embeddings`` would put a new head in the place of a masked one, its
weight made of the masked numbers. Here what is stored grows, the masks stay on the rows that they
lie on, and each adapter gets the new rows as if they had been there before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.injection.matching import plan_for
from pemn_surgery.adapters.injection.new_rows import (
    count_rows,
    language_tables,
    models_with_new_rows,
    names_of_tables,
    tell_sizes,
)
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.task_layer import PemnTaskLayer
from pemn_surgery.masks.attached import find_masked, find_task
from pemn_surgery.planning.plan import Owned
from pemn_surgery.planning.request import NewRows
from pemn_surgery.planning.roles import base_modules
from pemn_surgery.surgery import operate, refusals
from pemn_surgery.surgery.swapped import original_class
from pemn_surgery.surgery.undo import undone_on_error

_NOISE = 1e-3  # of the rows' own deviation, so that no two new rows are the same


def growing(
    model: nn.Module, configs: Mapping[str, PemnConfig], theirs: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a ``resize_token_embeddings`` that gives adapters the rows that are new.

    Args:
        model: The model with adapters, without PEFT's own around it.
        configs: The adapters' configurations by name.
        theirs: The model's own method, for all that it can do.
    """

    def resize_token_embeddings(
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        wanted, held = _padded(new_num_tokens, pad_to_multiple_of), _held(model, configs)
        if wanted is None or held is None or wanted <= held:
            return theirs(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        with undone_on_error(model, *configs.values()):
            _grow(model, configs, NewRows(held, wanted - held))
        tell_sizes(models_with_new_rows(model))
        return cast("PreTrainedModel", model).get_input_embeddings()

    return resize_token_embeddings


def _padded(count: int | None, multiple: int | None) -> int | None:
    return count if count is None or not multiple else -(-count // multiple) * multiple


def _held(model: nn.Module, configs: Mapping[str, PemnConfig]) -> int | None:
    """Return how many tokens a model has; None where its own method has to resize it, or refuse."""
    plain = PreTrainedModel.resize_token_embeddings
    kind: Any = original_class(model)
    if not isinstance(model, PreTrainedModel) or kind.resize_token_embeddings is not plain:
        return None
    tables = language_tables(model)
    signed = any(config.form != "product" for config in configs.values())
    stored = [t for table in tables for t in table._parameters.values() if t is not None]
    is_plain = all(type(one.data) is Tensor and not one.is_meta for one in stored)
    whole = model.get_output_embeddings() in (None, *tables)
    if not tables or not whole or signed or not is_plain or refusals.decide_ties(model):
        return None
    return count_rows(tables[0], "weight")


def _grow(model: nn.Module, configs: Mapping[str, PemnConfig], new: NewRows) -> None:
    names = names_of_tables(model, cast("PreTrainedModel", model))
    modules, grown = dict(base_modules(model)), set()
    for name in names:
        path, _, parameter = name.rpartition(".")
        _grow_stored(modules[path], parameter, new.more, grown)
    for table in language_tables(cast("PreTrainedModel", model)):
        sized = "num_embeddings" if isinstance(table, nn.Embedding) else "out_features"
        setattr(table, sized, new.first + new.more)
    for adapter, config in configs.items():
        config.settle_rows(dict.fromkeys(names, new))
        owned = [item for item in plan_for(model, config).owned if item.first_row is not None]
        _attach(model, adapter, modules, owned)


def _grow_stored(module: nn.Module, name: str, more: int, grown: set[int]) -> None:
    """Put rows near the mean of those that are there behind a stored tensor, of a tied one once."""
    masked = find_masked(module, name)
    if masked is not None and masked.bank is not None:
        if id(masked) not in grown:
            masked.take_rows(_drawn(masked.fill(), more))
            grown.add(id(masked))
        return
    parameter = cast("Tensor", module._parameters[name])
    if id(parameter) not in grown:
        parameter.data = torch.cat([parameter.data, _drawn(parameter.data, more)])
        grown.add(id(parameter))


def _drawn(rows: Tensor, more: int) -> Tensor:
    """Return new rows of a table: the mean of those that it has, which favours no token, and noise.

    Args:
        rows: Float tensor of shape (rows, ...).
        more: How many.
    """
    wide = rows.detach().float()
    noise = torch.randn(more, *rows.shape[1:], device=rows.device)
    drawn = wide.mean(dim=0) + _NOISE * wide.std(dim=0, correction=0) * noise
    return drawn.to(rows.dtype)


def _attach(
    model: nn.Module, adapter: str, modules: Mapping[str, nn.Module], owned: Sequence[Owned]
) -> None:
    """Give an adapter its new rows, trained if its masks are."""
    layers = [one for one in model.modules() if isinstance(one, PemnLayer)]
    masks = [layer.mask_of(adapter) for layer in layers if layer.holds(adapter)]
    is_trained = any(p.requires_grad for mask in masks for p in mask.parameters())
    for item in owned:
        module = modules[item.path]
        if item.tied_to:
            path, _, source = item.tied_to.rpartition(".")
            owner = cast("PemnTaskLayer", find_task(modules[path]))
            operate.share_tensor(module, item.tensor, owner, source)
            own = cast("PemnTaskLayer | None", find_task(module))
            if own is not None:  # a copy that no one trains: it was the base's until now
                own.drop_tensor(adapter, item.tensor)
            continue
        layer = cast("PemnTaskLayer", find_task(module) or _new_layer(module, item.path, layers[0]))
        plain = () if find_masked(module, item.tensor) is not None else (item.tensor,)
        operate.own_tensors(layer, plain)
        layer.grow_tensors(adapter, item, is_trained=is_trained)
    parts = masks[0].parts
    if parts is not None:
        tied = {one.name: bool(one.tied_to) for one in owned}
        names = [name for name in dict.fromkeys((*parts.owned, *tied)) if not tied.get(name)]
        for mask in masks:
            mask.parts = replace(parts, owned=tuple(names))


def _new_layer(module: nn.Module, path: str, like: PemnLayer) -> PemnTaskLayer:
    """Return a layer for a module's tensors, with the adapters active that are so elsewhere."""
    made = PemnTaskLayer(module, path)
    made._active_adapter, made._disable_adapters = like._active_adapter, like._disable_adapters
    return made
