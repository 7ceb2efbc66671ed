"""Every function of PEFT, transformers, safetensors and torch that is wrapped, in one table.

A tuner is asked little by these libraries, and users never make a class of ours, so masks come into
some functions by a wrapper around them, which does nothing for models without masks. What a wrapper
does is written where its subject is; here is what it goes around, why, and what breaks without it.
`docs/versions.md` shows the table. A new release of a library is read against it: the tests name
each door whose function has gone, takes other arguments, or acts otherwise.
"""

import functools
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

from pemn_surgery.adapters import adding, checks, guard, names, state
from pemn_surgery.adapters.adding import all_or_nothing
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files import card
from pemn_surgery.adapters.model import PemnModel
from pemn_surgery.adapters.registry import PEMN, PREFIX
from pemn_surgery.adapters.tasks import hotswap
from pemn_surgery.adapters.whole_modules import answering, one_or_list
from pemn_surgery.errors import PemnWarning, VersionsError
from pemn_surgery.masks import recompute


@dataclass(frozen=True)
class Door:
    """A function, property or table's entry of another library that is replaced.

    Attributes:
        owner: The module, class or table that holds it, as `pkgutil.resolve_name` reads it.
        name: Its name there, or the entry's key.
        takes: Its arguments as they were when the wrapper was written; what follows "..." is not
            looked at. Of a property "", of an entry the type of the others.
        wrap: From what the library has (None for an entry) to what takes its place.
        why: What the wrapper does.
        breaks: What happens without it.
        earlier: Its name in older releases.
        is_late: Whether the library imports its owner later, on demand.
        is_needed: Whether masks do not work without it; otherwise that is a warning.
    """

    owner: str
    name: str
    takes: str
    wrap: Callable[[Any], Any]
    why: str
    breaks: str
    earlier: str = ""
    is_late: bool = False
    is_needed: bool = True

    @property
    def label(self) -> str:
        """Its owner's name and its own."""
        name = self.name[:]  # a plain string, if it is an enum's member too
        return f"{self.owner.replace(':', '.').rpartition('.')[2]}.{name}"

    @property
    def library(self) -> str:
        """The library that it is in."""
        return self.owner.partition(".")[0]

    @property
    def since(self) -> str:
        """The first release of the library that it was tested with."""
        return adding.TESTED[self.library][0]

    def said(self) -> str:
        """Return what is lost where this door is not what it was, for errors."""
        version = sys.modules[self.library].__version__
        return (
            f"{self.label} of {self.library} {version} is not what pemn_surgery wraps so that "
            f"{self.why}. Without that, {self.breaks}. Install versions that were tested together: "
            "pip install -c constraints.txt."
        )

    def found(self) -> tuple[Any, str, Any]:
        """Return the owner, the attribute's name there, and what the library has (or None).

        Raises:
            VersionsError: If there is no such owner or function.
        """
        if self in _replaced:
            return _replaced[self]
        try:
            owner = pkgutil.resolve_name(self.owner)
        except (ImportError, AttributeError) as error:
            raise VersionsError(self.said()) from error
        if isinstance(owner, dict):
            return owner, self.name, None
        name = self.name if self.name in vars(owner) else self.earlier
        if name not in vars(owner):
            raise VersionsError(self.said())
        return owner, name, vars(owner)[name]

    def open(self) -> None:
        """Put the replacement in place; `VersionsError` if there is nothing to replace."""
        owner, name, theirs = found = self.found()
        if isinstance(theirs, (classmethod, staticmethod)):
            _put(owner, name, type(theirs)(self.wrap(theirs.__func__)))
        else:
            _put(owner, name, self.wrap(theirs))
        _replaced[self] = found

    def shut(self) -> None:
        """Put back what the library had."""
        _put(*_replaced.pop(self))


# What was replaced: owner, name there, and the library's own.
_replaced: dict[Door, tuple[Any, str, Any]] = {}


def install(*, late: bool = False) -> None:
    """Open every door that is not open yet, or none.

    Args:
        late: Whether to open those whose owners are imported on demand, or the others.

    Raises:
        VersionsError: If a function that masks need is not there.
    """
    adding.warn_of_untested()
    with ExitStack() as undo:
        for door in DOORS:
            if door.is_late == late and door not in _replaced and _opened(door):
                undo.callback(door.shut)
        undo.pop_all()


def _opened(door: Door) -> bool:
    """Open a door; one that masks can do without is missed in a warning."""
    try:
        door.open()
    except VersionsError as error:
        if door.is_needed:
            raise
        warnings.warn(str(error), PemnWarning, stacklevel=3)
        return False
    return True


def _put(owner: Any, name: str, value: Any) -> None:
    if not isinstance(owner, dict):
        setattr(owner, name, value)
    elif value is None:
        del owner[name]
    else:
        owner[name] = value


def _entry(value: Any) -> Callable[[Any], Any]:
    return lambda theirs: value


_peft = functools.partial(Door, "peft.peft_model:PeftModel")
_hotswap = functools.partial(Door, "peft.utils.hotswap")
_files = functools.partial(Door, "peft.utils.save_and_load")
_choices = functools.partial(Door, "peft.utils.other:AuxiliaryTrainingWrapper")
_mixin = functools.partial(Door, "transformers.integrations.peft:PeftAdapterMixin")


def _tables() -> Iterator[Door]:
    """The method's entries: PEFT registers none from outside."""
    for table, kind, value in (
        ("CONFIG", "type", PemnConfig),
        ("TUNER", "type", PemnModel),
        ("PREFIX", "str", PREFIX),
    ):
        yield Door(
            f"peft.mapping:PEFT_TYPE_TO_{table}_MAPPING",
            PEMN,
            kind,
            _entry(value),
            "PEFT knows the method",
            "using, loading and swapping masks is KeyError: 'PEMN'",
        )


def _adding() -> Iterator[Door]:
    """Each of PEFT's models begins, and may add, an adapter in a method of its own."""
    for kind in dict.fromkeys((PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values())):
        for name in ("__init__", "add_adapter"):
            if name in vars(kind):
                yield Door(
                    f"{kind.__module__}:{kind.__name__}",
                    name,
                    "self, ...",
                    all_or_nothing,
                    "a failure leaves the model as it was, and a configuration stays the caller's",
                    "a refused adapter leaves its name, wrapped modules and casts behind",
                )


DOORS: tuple[Door, ...] = (
    *_tables(),
    *_adding(),
    _peft(
        "from_pretrained",
        "cls, model, model_id, adapter_name='default', is_trainable=False, config=None, "
        "autocast_adapter_dtype=True, ephemeral_gpu_offload=False, low_cpu_mem_usage=False, "
        "key_mapping=None, **kwargs",
        guard.with_config,
        "an adapter's files are read once and checked first",
        "damaged or mixed files load, pickle is read, and a failed load leaves a changed model",
    ),
    _peft(
        "load_adapter",
        "self, model_id, adapter_name, is_trainable=False, torch_device=None, "
        "autocast_adapter_dtype=True, ephemeral_gpu_offload=False, low_cpu_mem_usage=False, "
        "key_mapping=None, **kwargs",
        guard.checked_first,
        "an adapter's files are read once and checked first, also against an adapter of that name",
        "masks of another base or configuration load under the name of one that is there",
    ),
    _peft(
        "save_pretrained",
        "self, save_directory, safe_serialization=True, selected_adapters=None, "
        "save_embedding_layers='auto', is_main_process=True, "
        "path_initial_model_for_weight_conversion=None, **kwargs",
        card.saving,
        "a save is whole or not at all, sealed, and its card complete",
        "a killed save leaves half an adapter, and files have no seal",
    ),
    _peft(
        "create_or_update_model_card",
        "self, output_dir",
        card.with_card,
        "the card that PEFT makes says how masks are loaded",
        "the Trainer's card says nothing of masks",
    ),
    Door(
        "peft.tuners.tuners_utils:BaseTuner",
        "__init__",
        "self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None",
        checks.refusing_masks,
        "other methods refuse a model with masks",
        "LoRA lies on masked weights, merges into what is computed, and saves what nothing loads",
    ),
    _files(
        "safe_load_file",
        "filename, device='cpu', ...",
        guard.or_held,
        "PEFT gets the tensors that were checked",
        "a file that is saved anew meanwhile loads unchecked",
    ),
    _files(
        "_filter_state_dict_for_adapter_name",
        "state_dict, unwanted_adapter_names",
        names.by_containers,
        "an adapter may be called like a part of the model",
        "a second adapter's file loses tensors without a word",
    ),
    Door(
        "peft.utils.hotswap:CONFIG_KEYS_TO_CHECK",
        PEMN,
        "list",
        _entry(guard.MUST_AGREE),
        "hot-swapping compares what masks mean",
        "hotswap_adapter refuses masks",
    ),
    _hotswap(
        "load_peft_weights",
        "model_id, device=None, key_mapping=None, **hf_hub_download_kwargs",
        hotswap.or_checked,
        "tensors that are to be swapped are checked as loaded ones are",
        "damaged files, and those of another save than their configuration, are swapped",
    ),
    _hotswap(
        "_insert_adapter_name_into_state_dict",
        "state_dict, adapter_name, parameter_prefix",
        hotswap.or_as_saved,
        "keys of masks stay as their file has them, and the tensors know which save they are of",
        "what is saved anew while it is swapped goes unseen",
    ),
    _hotswap(
        "hotswap_adapter_from_state_dict",
        "model, state_dict, adapter_name, config, parameter_prefix='lora_'",
        hotswap.or_masks,
        "masks are swapped",
        "hotswap_adapter looks for LoRA's tensors",
    ),
    _hotswap(
        "_convert_scalings_to_tensor",
        "model",
        hotswap.or_nothing_to_do,
        "a compiled model with masks can be prepared for swapping",
        "prepare_model_for_compiled_hotswap refuses masks",
    ),
    *(
        _choices(
            name,
            "",
            answering(answer),
            "a module that is saved whole answers for the call that runs",
            "mixed batches and threads run another task's copy of it",
        )
        for name, answer in (
            ("disable_adapters", lambda names: not names),
            ("active_adapters", list),
            ("active_adapter", one_or_list),
        )
    ),
    _mixin(
        "add_adapter",
        "self, adapter_config, adapter_name=None",
        adding.checked,
        "a failure leaves the model as it was, and a refused pair of versions is named",
        "a refused adapter leaves its name and configuration in the model",
    ),
    _mixin(
        "load_adapter",
        "self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, "
        "low_cpu_mem_usage=False, is_trainable=False, hotswap='auto', local_files_only=False, "
        "adapter_kwargs=None, load_config=None, **kwargs",
        guard.with_contents,
        "an adapter's files are read once and checked first",
        "damaged files load, and masks as bits do not",
    ),
    Door(
        "transformers.utils.hub:PushToHubMixin",
        "_upload_modified_files",
        "self, working_dir, repo_id, files_timestamps, commit_message=None, token=None, "
        "create_pr=False, revision=None, commit_description=None",
        card.with_pushed_card,
        "a pushed card says how masks are loaded",
        "transformers' general card takes its place on the hub",
    ),
    Door(
        "transformers.trainer:Trainer",
        "_save_checkpoint",
        "self, model, trial",
        state.with_scores,
        "checkpoints hold scores",
        "they hold masks as bits, from which a run does not go on exactly: say "
        'model.peft_config["default"].keep_scores = True in training, and False before the final '
        "save",
        is_late=True,
    ),
    Door(
        "torch.utils.checkpoint",
        "_checkpoint_without_reentrant_generator_impl",
        "fn, ...",
        recompute.recording,
        "the second run of a checkpointed forward reads what the first one read",
        "switch no adapter between a forward under activation checkpointing and its backward pass",
        earlier="_checkpoint_without_reentrant_generator",
        is_needed=False,
    ),
    Door(
        "torch.utils.checkpoint:CheckpointFunction",
        "forward",
        "ctx, run_function, preserve_rng_state, *args",
        recompute.recording_reentrant,
        "the second run of a checkpointed forward reads what the first one read",
        "switch no adapter between a forward under activation checkpointing and its backward pass",
        is_needed=False,
    ),
)
