"""Every named error and warning of the package.

Each message says what was given, what is needed and what to do. An error is raised before
anything changes: a refused call leaves the model as it was.
"""


class PemnError(Exception):
    """Base of all errors of this package."""


class ConfigError(PemnError, ValueError):
    """An option has a value that it cannot have."""


class UnsupportedModelError(PemnError, ValueError):
    """The given object is not a model that can be rewritten, for example a DDP wrapper."""


class AlreadyPemnifiedError(PemnError, ValueError):
    """The model already carries masks."""


class GraphModeError(PemnError, ValueError):
    """An exported graph holds operators in the other mode (train or eval) than is asked for."""


class NothingToMaskError(PemnError, ValueError):
    """No weight of the model would be masked."""


class VersionsError(PemnError, ImportError):
    """The installed versions of two libraries cannot work together."""


class AdapterError(PemnError, ValueError):
    """An adapter that is asked for is missing, or not in the state that the call needs."""


class AdapterNameError(AdapterError):
    """An adapter cannot have this name: it could not be added, saved or loaded under it."""


class MixedBatchError(PemnError, ValueError):
    """A batch for several adapters cannot be split, or its outputs cannot be put together."""


class BankMismatchError(PemnError, ValueError):
    """An adapter draws from another bank than the one that the model already has."""


class MetaTensorError(PemnError, ValueError):
    """A tensor is on the meta device and nothing gives it values."""


class FingerprintError(PemnError, ValueError):
    """An adapter was trained on another base (bank or own weights) than the given one."""


class ArchitectureError(PemnError, ValueError):
    """The masks of an adapter do not fit the weights of the model."""


class AdapterFileError(PemnError, ValueError):
    """An adapter file is missing, truncated or altered."""


class AdapterWriteError(PemnError, OSError):
    """An adapter cannot be written: the disk is full, the folder is read-only."""


class MaskFormatError(AdapterFileError):
    """A stored mask is damaged, of another version, or not a mask at all."""


class MaskNotLoadedError(PemnError, RuntimeError):
    """A mask is used whose bits have never been loaded."""


class MaskedWeightError(PemnError, RuntimeError):
    """A tool would replace, delete, script or pass by a tensor that adapters make."""


class NonFiniteScoresError(PemnError, ValueError):
    """Scores contain NaN or infinity, so that no mask can be chosen from them."""


class TaskInferenceError(PemnError, ValueError):
    """The task of a batch cannot be inferred: from these adapters, heads or outputs."""


class RecipeError(PemnError, ValueError):
    """A recipe is incomplete or cannot be run as written."""


class ExampleInputsError(PemnError, ValueError):
    """No example inputs can be made for a model from its configuration alone."""


class TraceError(PemnError, RuntimeError):
    """A model's forward cannot be followed on shapes alone."""


class FinetunedMismatchError(PemnError, ValueError):
    """A fine-tuned model has other tensors than its base, or values that cannot be compared."""


class ForeignMaskError(PemnError, ValueError):
    """Masks from elsewhere cannot be read, or fit no weight of the model."""


class MovedWeightsError(ForeignMaskError):
    """A checkpoint is not its base with weights set to zero: others moved."""


class HubError(PemnError, OSError):
    """A name on the model hub gives nothing: there is no such thing, or no way to the hub."""


class ExportError(PemnError, RuntimeError):
    """A model cannot be written as a graph for other runtimes."""


class PemnWarning(UserWarning):
    """Base of all warnings of this package."""


class LowCoverageWarning(PemnWarning):
    """Less than nine tenths of the weights that a model multiplies with were masked."""


class NoGradientWarning(PemnWarning):
    """Masks that are to be trained get no gradient that could move them."""


class VersionsWarning(PemnWarning):
    """A version of PEFT or transformers with which this package was not tested."""


class HeadWarning(PemnWarning):
    """A layer is new, or may be, and the adapter's file will not hold it."""


class PretrainedWarning(PemnWarning):
    """A trained model's own weights are replaced, or dropped at random, before training begins."""


class TrainingWarning(PemnWarning):
    """Masks train with rates or settings by which they learn nothing, or lose everything."""
