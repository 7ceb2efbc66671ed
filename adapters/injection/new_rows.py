"""Rows that the base's checkpoint does not have: of tokens that were added to a language model.

``resize_token_embeddings`` puts random rows behind those of the embedding and of the head. No other
process has the same, so they are the task's: trained, and saved as floats (`PemnConfig.new_rows`).
The rows before them stay what they are, under masks or the base's. As a file has its rows and names
how many the base has, it does not matter whether a later base is resized.
"""

from collections.abc import Iterator
from typing import Any, NoReturn, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.injection.matching import is_saved_whole
from pemn_surgery.errors import AdapterError, ArchitectureError, ConfigError
from pemn_surgery.masks.attached import find_masked, find_owned, find_task
from pemn_surgery.planning.request import NewRows
from pemn_surgery.planning.roles import base_modules, full_name

_FROM_SCRATCH = "_is_hf_initialized"  # transformers' mark of what a checkpoint filled


def settle_new_rows(config: PemnConfig, model: nn.Module) -> None:
    """Write into a configuration which rows are new, by the names of their tensors.

    Args:
        config: Changed in place (``new_rows``, ``base_rows``), unless it was read with an adapter.
        model: The model.

    Raises:
        ConfigError: If a tensor has no such rows.
    """
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
    of_parts = {n: new for n, new in rows.items() if not is_saved_whole(config, _path(n))}
    config.settle_rows(of_parts)


def check_new_rows(config: PemnConfig, model: nn.Module) -> None:
    """Refuse a base that lacks rows before an adapter's new ones, or masks other ones.

    Args:
        config: The adapter's configuration, settled.
        model: The model.

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
    """Return transformers' models in which an adapter has rows of tokens that were added.

    Args:
        model: A model with adapters.
    """
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [one for one in inner if any(_has_new_rows(table) for table in language_tables(one))]


def tell_sizes(models: list[PreTrainedModel]) -> None:
    """Let models say how many tokens they have now, by which they shape logits for a loss.

    Args:
        models: What `models_with_new_rows` returned, whichever adapters are in force now.
    """
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
        names = [name for one in _language_models(model) for name in names_of_tables(model, one)]
        return dict.fromkeys(names, asked) if asked else {}
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
        for name in module._parameters if isinstance(module, (nn.Embedding, nn.Linear)) else ():
            rows = count_rows(module, name)
            if rows:
                yield full_name(path, name), rows
        for name, tensor in module._parameters.items():
            is_bias = name.endswith("bias") and not isinstance(module, (nn.Embedding, nn.Linear))
            rows = count_rows(module, name) if is_bias else 0
            if rows and tensor is not None and tensor.dim() == 1:
                yield full_name(path, name), rows


def count_rows(module: nn.Module, name: str) -> int:
    """Return how many rows the base has of a parameter, with those that no mask lies on.

    Args:
        module: The module.
        name: The parameter's name on it.
    """
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
    """Return a model's embedding of tokens and, if it has one, the head over them.

    Args:
        model: The model.
    """
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return []
    plain: list[nn.Module] = []
    plain += (one for one in found if isinstance(one, (nn.Embedding, nn.Linear)))
    return plain if plain and plain[0] is found[0] else []


def names_of_tables(model: nn.Module, one: PreTrainedModel) -> list[str]:
    """Return the names of a language model's tables and biases of tokens, tied ones too.

    Args:
        model: The model that names are of.
        one: The language model in it, or itself.
    """
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


def _path(name: str) -> str:
    return name.rpartition(".")[0]
