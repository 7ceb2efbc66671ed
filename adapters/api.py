"""The two verbs: `pemnify` rewrites a model, `plan` says what it would do."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pemn_surgery.adapters.checks import check_fresh, check_model
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.file_size import frame_bytes
from pemn_surgery.adapters.injection.heads import settle_heads
from pemn_surgery.adapters.injection.matching import follow_forward, followed, plan_for
from pemn_surgery.adapters.injection.pretrained import lost_by
from pemn_surgery.adapters.injection.stored_bank import giving, with_stored_bank
from pemn_surgery.adapters.names import check_adapter_name
from pemn_surgery.adapters.options import check_names, check_values
from pemn_surgery.errors import ConfigError
from pemn_surgery.planning.plan import Plan
from pemn_surgery.surgery.undo import undone_on_error


def pemnify(
    model: nn.Module,
    config: PemnConfig | None = None,
    *,
    adapter_name: str = "default",
    inputs: Mapping[str, Any] | None = None,
    bank_values: Tensor | None = None,
    **options: Any,
) -> PeftModel:
    """Rewrite a model so that every Linear and Conv weight is frozen numbers x a learned mask.

    The model is changed in place and returned inside a PEFT model: train it, ``save_pretrained`` it
    (masks as bits and the task's other tensors), ``load_adapter`` more tasks, ``merge_and_unload``.

    Args:
        model: Any timm, transformers or other torch model.
        config: The configuration; None takes ``options``. The adapter gets a copy of it, so that
            one object may serve several models.
        adapter_name: Name of the first task.
        inputs: Keyword arguments of the model's forward, by which raw parameters that it uses as
            weights are found. None makes them from the model's configuration, if it has one.
        bank_values: Numbers of the bank that no seed draws, a float tensor that is read row by row:
            a trained prototype, a bank of other software. Of "mp" as many as the largest masked
            weight has, of "rp" any number, of "one_layer" those of the first weight of each shape,
            one behind the other. They are saved in the adapter's file (``bank_init="stored"``).
        **options: Fields of `PemnConfig`, for example ``bank="rp", ratio=1e-2, seed=0``.

    Returns:
        The PEFT model; its trainable parameters are the scores and what else the task trains.

    Raises:
        ConfigError: If an option cannot have its value.
        AdapterNameError: If no adapter can have the name.
        UnsupportedModelError: If ``model`` is not a plain module (for example a DDP wrapper).
        AlreadyPemnifiedError: If it carries adapters already.
        NothingToMaskError: If no weight would be masked.
    """
    given = with_stored_bank(config, options, bank_values)
    chosen = make_config(config, given).own_copy()
    check_adapter_name(adapter_name)
    check_model(model)
    check_fresh(model)
    with undone_on_error(model), giving(bank_values):
        if inputs is None:
            return get_peft_model(model, chosen, adapter_name=adapter_name)
        with followed(follow_forward(model, chosen, inputs)):
            return get_peft_model(model, chosen, adapter_name=adapter_name)


def plan(
    model: nn.Module,
    config: PemnConfig | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Say what `pemnify` would do to every weight, and why; nothing is touched.

    Args:
        model: Any torch model, also one on the meta device.
        config: The configuration; None takes ``options``.
        inputs: As in `pemnify`.
        **options: Fields of `PemnConfig`.

    Returns:
        The plan: prints as a table, ``as_dict()`` for JSON.

    Raises:
        ConfigError: If an option cannot have its value.
        UnsupportedModelError: If ``model`` is not a plain module.
    """
    chosen = make_config(config, options).own_copy()
    check_model(model)
    settle_heads(chosen, model)
    result = plan_for(model, chosen, follow_forward(model, chosen, inputs))
    lost = lost_by(chosen, model, result)
    return replace(result, frame_bytes=frame_bytes(result, model, chosen), lost=lost)


def make_config(config: PemnConfig | None, options: Mapping[str, Any]) -> PemnConfig:
    """Return the given configuration, or one of the given options.

    Raises:
        ConfigError: If both are given, or an option is unknown or cannot have its value.
    """
    if config is not None:
        if options:
            message = f"Got a configuration and options beside it ({', '.join(options)}): give one."
            raise ConfigError(message)
        if not isinstance(config, PemnConfig):
            message = (
                f"Got {type(config).__name__} as the configuration; a PemnConfig is needed, or its "
                'fields as options, for example pemnify(model, bank="rp").'
            )
            raise ConfigError(message)
        return config
    check_values(options)
    check_names(options)
    return PemnConfig(**options)
