"""Rows that the base's checkpoint does not have: of tokens that were added to a language model.

``resize_token_embeddings`` puts random rows behind those of the embedding and of the head. No other
process has the same, so they are the task's: trained, and saved as floats (`PemnConfig.new_rows`).
The rows before them stay what they are, under masks or the base's. As a file has its rows and names
how many the base has, it does not matter whether a later base is resized.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.injection.matching import is_saved_whole, plan_for
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.task_layer import PemnTaskLayer
from pemn_surgery.errors import AdapterError, ArchitectureError, ConfigError
from pemn_surgery.masks.attached import find_masked, find_owned, find_task
from pemn_surgery.planning.plan import Owned
from pemn_surgery.planning.request import NewRows
from pemn_surgery.planning.roles import base_modules, full_name
from pemn_surgery.surgery import operate, refusals
from pemn_surgery.surgery.swapped import original_class
from pemn_surgery.surgery.undo import undone_on_error

_FROM_SCRATCH = "_is_hf_initialized"  # transformers' mark of what a checkpoint filled
_NOISE = 1e-3  # of the rows' own deviation, so that no two new rows are the same


def settle_new_rows(config: PemnConfig, model: nn.Module) -> None:
    """Write into a new adapter's configuration which rows are new (`ConfigError` if none can)."""
    if config.origin.fingerprint is not None or config.base_rows is not None:
        return
    if config.new_rows is None:
        found = {} if config.form != "product" else _found(model)
    else:
        found = _asked(config.new_rows, model)
    rows_of = dict(_rows_by_name(model))
    rows = {name: NewRows(rows_of[name] - count, count) for name, count in found.items()}
    short = [name for name, new in rows.items() if new.first <= 0]
    if short:
        _refuse_option(config, f"{short[0]!r} has {rows_of[short[0]]} rows")
    whole = {name for name in rows if is_saved_whole(config, name.rpartition(".")[0])}
    config.settle_rows({name: new for name, new in rows.items() if name not in whole})


def check_new_rows(config: PemnConfig, model: nn.Module) -> None:
    """Refuse a base that lacks rows before an adapter's new ones, or masks other ones.

    Raises:
        ArchitectureError: If the base has fewer rows.
        AdapterError: If masks of the model's other adapters lie on another number of rows.
    """
    rows_of = dict(_rows_by_name(model))
    for name, new in config.rows_by_name.items():
        held = rows_of.get(name, 0)
        if held < new.first:
            message = (
                f"The adapter's {new.more} new rows of {name!r} (added tokens) follow {new.first} "
                f"rows of its base, but the given model has {held}. Load the checkpoint that the "
                "adapter was trained on; it need not be resized. Nothing was changed."
            )
            raise ArchitectureError(message)
    _check_other_rows(config, model)
    _check_beside_head(config, model)


def _check_beside_head(config: PemnConfig, model: nn.Module) -> None:
    """Refuse a base whose head adds numbers, no task's, for another number of tokens (BART)."""
    for one in _language_models(model):
        bias = one._buffers.get("final_logits_bias")
        new = [config.rows_by_name.get(name) for name in names_of_tables(model, one)]
        totals = {rows.first + rows.more for rows in new if rows is not None}
        if bias is not None and totals - {bias.shape[-1]}:
            total = max(totals)
            message = (
                f"The adapter has rows for {total} tokens, but the base's final_logits_bias is for "
                f"{bias.shape[-1]}, and no task has that. Resize the base first: "
                f"model.resize_token_embeddings({total}). Nothing was changed."
            )
            raise ArchitectureError(message)


def _check_other_rows(config: PemnConfig, model: nn.Module) -> None:
    for path, module in base_modules(model):
        for parameter in module._parameters:
            new = config.rows_by_name.get(full_name(path, parameter))
            masked = find_masked(module, parameter)
            if new is not None and masked is not None and masked.shape[0] != new.first:
                message = (
                    f"The model's adapters mask {masked.shape[0]} rows of "
                    f"{full_name(path, parameter)!r}, the new one would mask {new.first} and have "
                    f"{new.more} rows of its own behind them. Give all adapters of one model the "
                    "same base rows (new_rows), or load this one onto a model of its own. Nothing "
                    "was changed."
                )
                raise AdapterError(message)


def models_with_new_rows(model: nn.Module) -> list[PreTrainedModel]:
    """Return transformers' models in which an adapter has rows of tokens that were added."""
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [one for one in inner if any(_has_new_rows(table) for table in language_tables(one))]


def tell_sizes(models: list[PreTrainedModel]) -> None:
    """Let models say how many tokens they have now, by which they shape logits for a loss."""
    for model in models:
        tables = language_tables(model)
        count = _rows_in_force(tables[-1])
        text = cast("PreTrainedConfig", model.config).get_text_config()
        text.vocab_size = count
        if "vocab_size" in model.__dict__:
            cast("Any", model).vocab_size = count
        for table in tables if not any(map(_has_new_rows, tables)) else ():
            sized = "num_embeddings" if isinstance(table, nn.Embedding) else "out_features"
            setattr(table, sized, count)


def _has_new_rows(table: nn.Module) -> bool:
    """Tell whether an adapter has new rows of a table, or of one that it is tied to."""
    masked, owned = find_masked(table, "weight"), find_owned(table, "weight")
    child, name = owned or (None, "weight")
    if masked is not None:
        child, name = find_task(masked.owner), masked.parameter
    return child is not None and bool(child.first_rows(name))


def _rows_in_force(table: nn.Module) -> int:
    """Return how many rows a table has, of masks without reading them: they may not be loaded."""
    masked = find_masked(table, "weight")
    return len(cast("Tensor", table.weight)) if masked is None else masked.count_rows()


def _found(model: nn.Module) -> dict[str, int]:
    """Return the numbers of rows that tables have more than their checkpoint, by name."""
    rows_of, found = dict(_rows_by_name(model)), {}
    for one in _language_models(model):
        names = names_of_tables(model, one)
        table = language_tables(one)[0]._parameters.get("weight")
        known = _rows_of_checkpoint(one) if getattr(table, _FROM_SCRATCH, False) else None
        if known is not None and names and 0 < known < rows_of[names[0]]:
            found |= {name: rows_of[name] - known for name in names if rows_of[name] > known}
    return found


def _asked(asked: dict[str, int] | int, model: nn.Module) -> dict[str, int]:
    """Return the rows that a user asks for by name; one number is of all tables of tokens."""
    if isinstance(asked, int):
        return dict.fromkeys(token_tables(model), asked) if asked else {}
    rows_of = dict(_rows_by_name(model))
    unknown = [name for name in asked if name not in rows_of]
    if unknown:
        message = (
            f"PemnConfig got new_rows={asked!r}, but {unknown[0]!r} is no weight or bias of an "
            "Embedding or Linear layer of the model. Name such a parameter, for example "
            f"{next(iter(rows_of), None)!r}. Nothing was changed."
        )
        raise ConfigError(message)
    tied = _tied(model)
    return {name: count for one, count in asked.items() for name in tied[one]}


def _refuse_option(config: PemnConfig, problem: str) -> NoReturn:
    message = (
        f"PemnConfig got new_rows={config.new_rows!r}, but {problem}, of which some have to be the "
        "checkpoint's. Give the number of tokens that were added. Nothing was changed."
    )
    raise ConfigError(message)


def _rows_by_name(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the parameters that may have new rows, and how many rows the base has of them."""
    for path, module in base_modules(model):
        is_table = isinstance(module, (nn.Embedding, nn.Linear))
        for name, tensor in module._parameters.items():
            rows = count_rows(module, name) if is_table or name.endswith("bias") else 0
            if rows and (is_table or (tensor is not None and tensor.dim() == 1)):
                yield full_name(path, name), rows


def count_rows(module: nn.Module, name: str) -> int:
    """Return how many rows the base has of a parameter, with those that no mask lies on."""
    masked = find_masked(module, name)
    tensor = module._parameters[name]
    if masked is not None:
        own = masked.own_rows()
        return sum(masked.shape[:1]) + (0 if own is None else len(own))
    if tensor is None or isinstance(tensor, nn.parameter.UninitializedParameter):
        return 0
    return sum(tensor.shape[:1])


def _language_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the outermost models of transformers that have a table of tokens."""
    outer: list[str] = []
    for path, module in base_modules(model):
        inside = any(not at or f"{path}.".startswith(f"{at}.") for at in outer)
        if isinstance(module, PreTrainedModel) and not inside and language_tables(module):
            outer.append(path)
            yield module


def language_tables(model: PreTrainedModel) -> list[nn.Module]:
    """Return a model's embedding of tokens and, if it has one, the head over them."""
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return []
    plain: list[nn.Module] = []
    plain += (one for one in found if isinstance(one, (nn.Embedding, nn.Linear)))
    return plain if plain and plain[0] is found[0] else []


def token_tables(model: nn.Module) -> list[str]:
    """Return the names of all tables and biases of tokens in a model, tied ones too."""
    return [name for one in _language_models(model) for name in names_of_tables(model, one)]


def untied_heads(model: nn.Module) -> list[str]:
    """Return the paths of the heads over tokens that are not the embedding itself."""
    paths = {id(module): path for path, module in base_modules(model)}
    pairs = [tables for one in _language_models(model) if len(tables := language_tables(one)) == 2]
    return [paths[id(head)] for table, head in pairs if head.weight is not table.weight]


def names_of_tables(model: nn.Module, one: PreTrainedModel) -> list[str]:
    """Return the names of a language model's tables and biases of tokens, tied ones too."""
    tables = {id(table) for table in language_tables(one)}
    tied = _tied(model)
    own = [
        full_name(path, name)
        for path, module in base_modules(model)
        if id(module) in tables
        for name in module._parameters
        if full_name(path, name) in tied
    ]
    return list(dict.fromkeys(name for first in own for name in tied[first]))


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of the tensor that each name stands for."""
    names: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        for name, tensor in module._parameters.items():
            made = find_masked(module, name)
            if tensor is not None or made is not None:
                names.setdefault(id(made if tensor is None else tensor), []).append(
                    full_name(path, name)
                )
    return {name: group for group in names.values() for name in group}


def _rows_of_checkpoint(model: PreTrainedModel) -> int | None:
    """Return how many tokens the checkpoint of a model has; None where that is not at hand."""
    config = cast("PreTrainedConfig", model.config)
    try:
        known = type(config).from_pretrained(model.name_or_path or "", local_files_only=True)
        return getattr(known.get_text_config(), "vocab_size", None)
    except (OSError, ValueError):
        return None


def growing(
    model: nn.Module, configs: Mapping[str, PemnConfig], theirs: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a ``resize_token_embeddings`` that gives adapters the rows that are new.

    transformers' own would put a new head in the place of a masked one, its weight made of the
    masked numbers. Here what is stored grows, the masks stay on the rows that they lie on, and each
    adapter gets the new rows as if they had been there before it.
    """

    def resize_token_embeddings(
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        wanted, held = new_num_tokens, _held(model, configs)
        if wanted is not None and pad_to_multiple_of:
            wanted += -wanted % pad_to_multiple_of
        if wanted is None or held is None or wanted <= held:
            return theirs(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        with undone_on_error(model, *configs.values()):
            _grow(model, configs, NewRows(held, wanted - held))
        tell_sizes(models_with_new_rows(model))
        return cast("PreTrainedModel", model).get_input_embeddings()

    return resize_token_embeddings


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
    """Return new rows of a table: the mean of its own, which favours no token, and noise."""
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
