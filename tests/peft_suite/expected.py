"""The one place that says which of PEFT's tests are expected to fail, and why.

Strict: a test of this table that passes is an error, and so are a row that no test fits and a
failure that no row names.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pemn_surgery.errors import ConfigError, FingerprintError

FILES = ("scores", "bits")
PREFIX = "expected: "


class Expected(NamedTuple):
    """Tests that are expected to fail.

    Attributes:
        suites: Test files, without "test_" and ".py".
        test: Name of the test function; a pattern.
        reason: Why they fail, in one sentence.
        case: Name of the case (the test's parameters); a pattern.
        file: "scores" or "bits" if they fail only with such adapter files, "" if with both.
        error: What they must fail with.
    """

    suites: tuple[str, ...]
    test: str
    reason: str
    case: str = "*"
    file: str = ""
    error: type[BaseException] = AssertionError


_CUSTOM = ("custom_models",)
_HF = (  # suites of whole transformers
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "seq_classifier",
)
_GENERATING = _HF[:2]
_BARE = _HF[:3]
_SELECTING = (*_HF, "target_parameters")
_SELECTED_PICKLING = (*_GENERATING, "seq_classifier", "target_parameters")
_PICKLING = (*_SELECTED_PICKLING, *_CUSTOM)
_SAVING = (*_PICKLING, "feature_extraction_models")
_DTYPES = (*_GENERATING, "seq_classifier")

FLOAT_SCORES = "looks for float scores where the file and the loaded model hold bits"
_NOT_IDENTITY = "a top-k mask drops weights from the start; the test wants a start without effect"
_BANK_REPLACES = "a bank takes the place of the original weights, which the model no longer holds"
_TRAINS_THE_REST = "with drawn numbers all that is not masked is trained too (rest='train')"
_OTHER_BASE = "loads the adapter onto other random weights than it was made for, which is refused"
_ALL_ONES = "the first random mask of this convolution of two weights is all ones, without effect"
_POOLER = "wants a gradient for every mask; its loss does not use the pooler, which is masked too"
_PICKLE = "saves pickle (safe_serialization=False), which is refused"
_OTHER_METHOD = "claims another method than the configuration's class has, which is refused"
_OWN_WORDS = "wants words of PEFT for an unknown task type; wrong options are refused in ours"
_EMPTY_CACHE = "downloads into an empty cache; there is no network here"

TABLE: tuple[Expected, ...] = (
    Expected(_CUSTOM, "test_parameters_after_loading_model", FLOAT_SCORES, file="bits"),
    Expected(_SAVING, "test_save_pretrained", FLOAT_SCORES, file="bits", error=KeyError),
    Expected(_PICKLING, "test_save_pretrained_pickle", _PICKLE, error=ConfigError),
    Expected(
        _SELECTED_PICKLING, "test_save_pretrained_selected_adapters_pickle", _PICKLE,
        error=ConfigError,
    ),
    Expected(_SELECTING, "test_save_pretrained_selected_adapters*", FLOAT_SCORES, file="bits"),
    Expected(
        _DTYPES, "test_add_adapter_no_autocast_adapter_dtype", FLOAT_SCORES, "*own-threshold*",
        file="bits", error=ValueError,
    ),
    Expected(_CUSTOM, "test_disable_adapters", _NOT_IDENTITY, "*-topk"),
    Expected(_CUSTOM, "test_disable_adapters_with_merging", _NOT_IDENTITY, "*-topk"),
    *(
        Expected(_CUSTOM, "test_get_base_model_state_dict", _BANK_REPLACES, f"*-{bank}-*")
        for bank in ("mp", "rp", "one_layer")
    ),
    Expected(_CUSTOM, "test_save_load_roundtrip", _ALL_ONES, "conv1d-own-threshold"),
    Expected(
        _CUSTOM, "test_loading_model_*requires_grad_set_correctly", _OTHER_BASE,
        error=FingerprintError,
    ),
    Expected(_GENERATING, "test_disable_adapter", _BANK_REPLACES, "mp-*"),
    Expected(_GENERATING, "test_get_base_model_state_dict", _BANK_REPLACES, "mp-*"),
    Expected(_BARE, "test_unload_adapter", _BANK_REPLACES, "mp-*"),
    Expected(_HF, "test_prepare_for_training_parametrized", _TRAINS_THE_REST, "mp-*"),
    Expected(_BARE, "test_training_*layer_indexing", _TRAINS_THE_REST, "mp-*"),
    *(
        Expected(("feature_extraction_models",), test, _POOLER, f"*-random-{model}Model")
        for test in ("test_training", "test_training_gradient_checkpointing")
        for model in ("Bert", "Roberta")
    ),
    Expected(("config",), "test_from_pretrained_cache_dir", _EMPTY_CACHE, error=ValueError),
    Expected(("config",), "test_set_attributes", _OTHER_METHOD, error=ConfigError),
    Expected(("config",), "test_invalid_task_type", _OWN_WORDS),
)  # fmt: skip


def find(suite: str, test: str, case: str, file: str) -> Expected | None:
    """Return the first row that a test fits, if there is one."""
    return next((row for row in TABLE if _fits(row, suite, test, case, file)), None)


def unused(suite: str, file: str, outcomes: Iterable[Mapping[str, str]]) -> list[Expected]:
    """Return the rows of a suite that none of its tests is found by."""
    used = {find(suite, outcome["test"], outcome["case"], file) for outcome in outcomes}
    return [row for row in TABLE if _is_of(row, suite, file) and row not in used]


def _fits(row: Expected, suite: str, test: str, case: str, file: str) -> bool:
    given = ((test, row.test), (case, row.case))
    return _is_of(row, suite, file) and all(fnmatch.fnmatchcase(*pair) for pair in given)


def _is_of(row: Expected, suite: str, file: str) -> bool:
    return suite in row.suites and row.file in ("", file)
