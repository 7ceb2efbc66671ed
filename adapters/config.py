"""`PemnConfig`: what an adapter is, as PEFT configures it."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

from peft.config import PeftConfig
from torch import Tensor

from pemn_surgery.adapters.files.adapter_file import (
    CONFIG,
    WEIGHTS,
    decide,
    read_adapter_file,
    read_json,
    refuse_file,
    refuse_option,
)
from pemn_surgery.adapters.files.contents import AdapterFile
from pemn_surgery.adapters.files.disk import is_there
from pemn_surgery.adapters.options import (
    check_names,
    check_pattern,
    check_values,
    idle_options,
    refuse,
    refuse_idle,
    refuse_in_force,
    shown,
)
from pemn_surgery.adapters.presets import PRESETS, Preset, PresetName, Training
from pemn_surgery.adapters.registry import PEMN
from pemn_surgery.coding.header import CodingName
from pemn_surgery.errors import ConfigError
from pemn_surgery.masks.overall import settled_selectors
from pemn_surgery.masks.selector import TAKES_DENSITY, Selector, SelectorName
from pemn_surgery.numbers.bank import BankName, BankSpec, FanMode, InitName, Shape
from pemn_surgery.numbers.support import OthersName, Support, SupportName
from pemn_surgery.planning.densities import ErkName, densities_by_name, erdos_renyi_kernel
from pemn_surgery.planning.request import NewRows, RestName, TiedName

ScoreInitName = Literal["kaiming_uniform", "normal", "magnitude", "magnitude_shuffled"]
ScaleName = Literal["sqrt_density", "row", "matrix"]
FormName = Literal["product", "flip", "binary", "sign_delta"]

# How far above the threshold all scores begin: of "threshold", and of "sample" (chances of .98).
_MARGIN, _SURE = 0.01, 4.0

# Initial scores that are made of the frozen numbers.
FROM_WEIGHTS = ("magnitude", "magnitude_shuffled")


@dataclass(frozen=True)
class Origin:
    """What a configuration was read with; a model's configuration may be given to another model.

    Attributes:
        file: The adapter's file; None where none was read.
        lineage: What the adapter was made from, if not by training: "by" says how, "of" has the
            identities of adapters (docs/bits.md). Filled in by the library.
        fingerprint: Identifies the base that the file names, or that the names in it were turned
            into those of; None of a new adapter.
    """

    file: AdapterFile | None
    fingerprint: dict[str, str] | None


@dataclass
class PemnConfig(PeftConfig):
    """Configuration of an adapter that is binary masks on frozen weights.

    Attributes:
        bank: Where the frozen numbers come from. "mp": one vector of the largest layer's length
            (PEMN, max-layer padding). "rp": a shorter vector, tiled (PEMN, random vector padding).
            "one_layer": one prototype a weight shape (PEMN, one-layer). "own": every weight keeps
            its own numbers (Piggyback, Self-Masking Networks).
        ratio: For "rp": length of the vector as a share of the largest layer's, 0 < ratio <= 1.
            Default .01.
        length: For "rp": length of the vector itself; replaces ``ratio``.
        permute: For "rp": permute the tiled vector once.
        aligned: For "rp": repeat the vector after whole rows of each weight, or a whole number of
            times in a row, rather than wherever it ends; a layer may then read fewer of its numbers
            (docs/methods.md). Rows have products with an input in common then.
        bank_init: How the numbers are made. From ``seed``: "kaiming_normal", "kaiming_uniform",
            "xavier_normal", "signed_constant" or "xavier_constant"; without one
            "unsigned_constant"; "model": the model's own (pretrained) values; or "stored": given
            (``pemnify(bank_values=...)``), and saved in the adapter's file. Default "model" for
            "own", "kaiming_normal" otherwise.
        scale_fan: Divide the variance of drawn numbers by ``density`` (edge-popup).
        fan_mode: What the variance of drawn numbers is 2 divided by: "fan_in", inputs that an
            output sums over, or "fan_out", outputs that an input goes to; of "xavier_normal" and
            "xavier_constant" it is their sum.
        seed: Seed of the bank and of the initial scores.
        selector: "topk" keeps the ``density`` largest magnitudes of every weight's scores,
            "topk_overall" those of all masked weights together, "topk_signed" every weight's
            largest scores, signs counting, "threshold" the scores above ``threshold``; "sample"
            draws masks while it trains, each weight kept with the chance
            sigmoid(score - ``threshold``), and keeps those whose chance is above one half in
            evaluation and in files. Default "threshold" on the weights that a model has
            (``bank="own"``, not drawn), so that training starts from the model as it is, and "topk"
            otherwise, or where a density is given.
        density: Share of ones of every mask for "topk", 0 < density <= 1. Default .5. "erk": shares
            by the weights' shapes, larger ones sparser, that are ``overall_density`` together:
            Erdos-Renyi-Kernel (docs/methods.md).
        overall_density: For "erk": share of ones over all masks. Default .5.
        density_pattern: Shares of ones by regular expressions, for weights that differ from
            ``density``: {"layer4.*conv1": .2}. They match the end of a module's path, as PEFT's
            ``rank_pattern``, or of a weight's name; the first that fits counts.
        threshold: For "threshold" and "sample".
        score_init: Where scores begin. A number; "kaiming_uniform", default of "topk"; "normal",
            from ``score_mean`` and ``score_std``; "magnitude", the sizes of the frozen numbers, or
            "magnitude_shuffled", the same in another order of each weight. Default of "threshold":
            ``threshold`` + .01, so that training starts with all ones; of "sample" likewise
            ``threshold`` + 4, chances of .98, or "kaiming_uniform" for drawn numbers; of
            ``form="sign_delta"`` "normal" around the threshold.
        score_mean: For "normal". Default ``threshold`` for ``form="sign_delta"``, and otherwise
            four ``score_std`` above it.
        score_std: For "normal", default .01; for "magnitude" that of normal noise on top, default
            0.
        scale: None; "sqrt_density": multiply by 1 / sqrt(density of the mask); or "row": by a
            factor for each output, trained from 1 and saved as a float beside the mask. With
            ``form="sign_delta"`` None is a scale for each output, "matrix" one for each matrix.
        form: What a mask M does to the frozen weight W. "product": W x M (and ``scale``). "flip":
            W (2M - 1), so that signs change where M is zero (Self-Masking Networks' released code).
            "binary": g sign(W) M, g the mean of abs(W) over what is kept (Multi-Prize Tickets).
            "sign_delta": W + s (2M - 1), s a float scale for each output; only with ``bank="own"``
            on the model's own values. s is trained from zero, and M with it; those that
            `from_finetuned` makes have the signs of a fine-tuned model's change (BitDelta), and a
            number as ``score_init``.
        support: Share of every weight's numbers that can change, 0 < support < 1: these alone have
            scores and bits, all others keep their frozen value. Default: all can.
        support_by: Which these are. "seed": single weights, drawn from ``seed``. "rows": whole
            outputs, drawn likewise. "largest" and "smallest": by the magnitude of the frozen
            numbers.
        support_others: What all other numbers are. "kept": frozen as they are. "drawn": kept or
            dropped by a mask of ``density`` that the seed draws, as if training had never reached
            them (partially frozen random networks).
        rest: What happens to tensors that are not masked. "train": all are trained and saved with
            the task. "norms": normalisation layers are. "stats": nothing but running statistics
            moves, and they are saved. "freeze": nothing moves; norms stay in eval mode. Default
            "train" for drawn numbers, "stats" on the model's own. With drawn numbers everything
            but frozen embeddings is saved either way, so that seed and file make the model.
        target_modules: Modules to mask, as in PEFT. Default: every maskable weight.
        exclude_modules: Modules to leave alone, as in PEFT.
        layers_to_transform: Layer indices to mask, as in PEFT.
        layers_pattern: Name of the layer list, as in PEFT.
        target_parameters: Further parameters to mask by name, as in PEFT: beside those of
            ``target_modules``, so that they come to every maskable weight by default, and with
            ``target_modules=[]`` they are all.
        functional_weights: Raw parameters that the model's forward multiplies with (experts,
            projections without a layer of their own), by full name; masked like the weights of
            layers. Default: found by following one forward on shapes alone, unless targets are
            given; saved with the adapter.
        rewritten_weights: Weights that the model's forward changes in place, which stay because a
            mask would not last; found and saved likewise.
        carried: Further unmasked tensors, by full name, that the task has its own copy of: those in
            which a fine-tuned model differs from its base, and those that came with no checkpoint.
            Filled in by the library.
        new_rows: Last rows of embeddings and of a head that the checkpoint does not have (tokens
            that were added, ``resize_token_embeddings``): the task's own, trained and saved as
            floats, while masks lie on the rows before them. Number of rows by the tensor's name, or
            one number for the input and output embeddings of transformers' models. Default: what
            these models have more than the configuration of their checkpoint says (docs/heads.md);
            0 or an empty dict: nothing is new.
        base_rows: Number of rows before the new ones, by the tensor's name. Filled in by the
            library.
        tied: What happens to a weight that is tied to an embedding, as most language models' heads
            are. "leave": neither is masked. "untie": the head gets a masked copy. "both": head and
            embedding share one mask.
        modules_to_save: Modules to train and save as a whole, as in PEFT. With
            ``bank_init="model"`` the default is what came with no checkpoint, and timm's classifier
            (docs/heads.md); an empty list masks that too.
        trainable_token_indices: Not supported; present because TRL reads it.
        coding: How a file holds masks. "bits": one bit a weight. "entropy": near the entropy of
            each mask's density, .08 bit a weight at .99 (docs/coding.md). "context": also by the
            neighbours in a convolution's kernel, and with "topk" by what the initial scores, drawn
            again from ``seed``, say of each weight: below one bit a weight at density .5. "base":
            also by the size of the base's own weights, where no seed draws them: up to 11 % below
            the entropy of the density (docs/coding.md), but such a file is read only together with
            its base. Coded files are read by PEFT's loaders, not by
            transformers' own.
        fingerprint: Identifies the base that the masks belong to. Filled in by the library.
        digest: Ties ``adapter_config.json`` to the weights it was saved with. Filled in by the
            library.
    """

    bank: BankName = "mp"
    ratio: float | None = None
    length: int | None = None
    permute: bool = False
    aligned: bool = False
    bank_init: InitName | None = None
    scale_fan: bool = False
    fan_mode: FanMode = "fan_in"
    seed: int = 0
    selector: SelectorName | None = None
    density: float | ErkName | None = None
    overall_density: float | None = None
    density_pattern: dict[str, float] | None = None
    threshold: float = 0.0
    score_init: float | ScoreInitName | None = None
    score_mean: float | None = None
    score_std: float | None = None
    scale: ScaleName | None = None
    form: FormName = "product"
    support: float | None = None
    support_by: SupportName = "seed"
    support_others: OthersName = "kept"
    rest: RestName | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    functional_weights: list[str] | None = None
    rewritten_weights: list[str] | None = None
    carried: list[str] | None = None
    new_rows: dict[str, int] | int | None = None
    base_rows: dict[str, int] | None = None
    tied: TiedName = "leave"
    modules_to_save: list[str] | None = None
    trainable_token_indices: None = None
    coding: CodingName = "bits"
    lineage: dict[str, Any] | None = None
    fingerprint: dict[str, str] | None = field(default=None, repr=False)
    digest: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        check_values(values)
        # Every saved configuration names PEFT's version; one that was saved is taken as it is.
        is_new = self.peft_version is None and self.fingerprint is None
        given = [name for name, value in values.items() if value != _DEFAULTS[name]]
        self._settle_selector()
        refuse_idle(self, idle_options(self, given, is_new=is_new))
        super().__post_init__()
        # Runtime only: whether an adapter of a model was made by these settings, which hold then.
        self.is_in_force = False
        self.peft_type = cast("Any", PEMN)
        # Runtime only, never saved: whether float scores are kept, in files (Trainer checkpoints)
        # and in models that load them for inference.
        self.keep_scores = False
        # Runtime only. The field `fingerprint` is written anew at each save.
        self.origin = Origin(None, self.fingerprint)
        self._fill_in_defaults()
        self._check_form()
        self._check_stored()
        self._check_targets()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change what an adapter was made by: nothing would follow, but a file say so.

        Raises:
            ConfigError: If an adapter of a model has this configuration, and the field is one that
                is read only when an adapter is made.
        """
        if self.__dict__.get("is_in_force"):
            refuse_in_force(self, name, value)
        super().__setattr__(name, value)

    def __copy__(self) -> "PemnConfig":
        """Return the same settings to be changed; those of a model's adapter stay."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, is_in_force=False)
        return made

    def own_copy(self) -> "PemnConfig":
        """Return a copy for one more adapter: PEFT and planning write into its lists and fields.

        The file that it was read with is not copied.
        """
        made = copy.copy(self)
        made.__dict__.update(
            {item.name: copy.deepcopy(getattr(self, item.name)) for item in fields(self)}
        )
        return made

    def save_whole(self, paths: Sequence[str]) -> None:
        """Note modules that are saved whole from now on: new ones in the place of masked ones."""
        if paths:
            self.__dict__["modules_to_save"] = [*(self.modules_to_save or ()), *paths]

    @classmethod
    def preset(cls, name: PresetName, **changes: Any) -> "PemnConfig":
        """Return settings to begin with; `training` has the rates that belong to them.

        Args:
            name: A paper's: "pemn" (Bai et al. 2022), "edge_popup" (Ramanujan et al. 2020),
                "piggyback" (Mallya et al. 2018) or "self_masking" (Warmerdam et al. 2024); or a
                first guess for a pretrained model of "text" or "image".
            **changes: Fields that differ; a setting of the preset that they make meaningless is
                left out.

        Returns:
            The configuration.

        Raises:
            ConfigError: If there is no such preset, or a change is not allowed.
        """
        preset = _preset(name)
        check_values(changes)
        check_names(changes)
        options = {**preset.options, **changes}
        idle = idle_options(SimpleNamespace(**{**_DEFAULTS, **options}), options, is_new=True)
        return cls(**{key: options[key] for key in options if key in changes or key not in idle})

    @classmethod
    def training(cls, name: PresetName) -> Training:
        """Return the optimizer, rates and schedule that belong to a preset.

        Raises:
            ConfigError: If there is no such preset.
        """
        return _preset(name).training

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "PemnConfig":
        """Read a configuration, and check the masks beside it before anything is changed.

        Args:
            pretrained_model_name_or_path: Folder of the adapter, or its name on the hub.
            subfolder: Folder within it.
            **kwargs: As PEFT's.

        Returns:
            The configuration.

        Raises:
            AdapterFileError: If the configuration or a local adapter file is truncated or altered.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if is_there(folder / CONFIG):
            return cls._from_folder(folder, cls._split_kwargs(kwargs)[1])
        try:
            name = pretrained_model_name_or_path
            return cast("PemnConfig", super().from_pretrained(name, subfolder, **kwargs))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            refuse_file(folder / CONFIG, f"is not JSON ({type(error).__name__}: {error})")
        except ConfigError as error:
            refuse_option(folder / CONFIG, error)

    @classmethod
    def _from_folder(cls, folder: Path, given: Mapping[str, Any]) -> "PemnConfig":
        path = folder / WEIGHTS
        written = read_json(folder / CONFIG)
        file = read_adapter_file(path) if is_there(path) else None
        decided = written if file is None else decide(folder / CONFIG, written, file)
        try:
            options = cls.check_kwargs(**{**given, **decided})
            config = cast("PemnConfig", cls.from_peft_type(**options))
        except ConfigError as error:
            refuse_option(folder / CONFIG, error)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if file is None and "peft_type" not in written:
                raise  # other JSON and no weights, so no adapter: PEFT says so itself
            refuse_file(folder / CONFIG, f"is no configuration ({type(error).__name__}: {error})")
        if isinstance(config, PemnConfig):
            config.origin = replace(config.origin, file=file)
            if file is not None and file.is_renamed:
                config._rename(file)
        return config

    def _rename(self, file: AdapterFile) -> None:
        """Call tensors that are named in full as the model does (PEFT's ``key_mapping``).

        Densities by pattern become densities by full name: the patterns are of the old names.
        """
        for name in ("functional_weights", "rewritten_weights", "carried"):
            named = getattr(self, name)
            setattr(self, name, named and [file.wish.renamed(one) for one in named])
        self.settle_rows({file.wish.renamed(one): new for one, new in self.rows_by_name.items()})
        if self.density_pattern:
            names = dict.fromkeys(file.called.values(), ())
            old = densities_by_name(names, self.density_pattern)
            self.density_pattern = {
                f"^{re.escape(name)}": old[stored]
                for name, stored in file.called.items()
                if stored in old
            }

    @property
    def bank_spec(self) -> BankSpec:
        """Everything that decides the frozen numbers, but the model."""
        is_seeded = self.bank_init not in ("model", "stored", "unsigned_constant") or self.permute
        return BankSpec(
            bank=self.bank,
            init=cast("InitName", self.bank_init),
            seed=self.seed if is_seeded else 0,
            ratio=self.ratio,
            length=self.length,
            permute=self.permute,
            aligned=self.aligned,
            scale_fan=self.scale_fan,
            fan_mode=self.fan_mode,
            density=self._overall if self.scale_fan else 0.5,
        )

    @property
    def _overall(self) -> float:
        return cast("float", self.overall_density if self.density == "erk" else self.density)

    @property
    def rows_by_name(self) -> dict[str, NewRows]:
        """Which rows are new, of each tensor that has such rows, once that is settled."""
        counts = self.new_rows if isinstance(self.new_rows, dict) else {}
        first = self.base_rows or {}
        return {name: NewRows(first[name], counts[name]) for name in counts if name in first}

    def settle_rows(self, rows: Mapping[str, NewRows]) -> None:
        """Write down which rows are new."""
        counts = {name: new.more for name, new in rows.items()} or None
        first = {name: new.first for name, new in rows.items()} or None
        self.__dict__.update(new_rows=counts, base_rows=first)  # a model may grow under adapters

    def densities(self, shapes: Mapping[str, Shape]) -> dict[str, float]:
        """Return the densities of some weights' masks, as shares of ones by name.

        "erk" shares the ones out between all masked weights. There are none where the selector
        takes no density.

        Raises:
            ConfigError: If a pattern fits none of the names; an adapter's file that is of another
                model is refused by its masks.
        """
        if self.selector not in TAKES_DENSITY or self.has_fixed_signs:
            return {}
        is_new = self.origin.file is None
        named = densities_by_name(shapes, self.density_pattern or {}, all_fit=is_new)
        others = {name: shape for name, shape in shapes.items() if name not in named}
        if self.density == "erk":
            return {**named, **erdos_renyi_kernel(others, self._overall)}
        return {**named, **dict.fromkeys(others, self._overall)}

    @property
    def has_fixed_signs(self) -> bool:
        """Whether masks are the signs of a fine-tuned model's change, which nobody trains."""
        return self.form == "sign_delta" and not isinstance(self.score_init, str)

    @property
    def support_in_force(self) -> Support | None:
        """Which share of every weight is masked; None: all of it."""
        if self.support is None:
            return None
        return Support(self.support, self.support_by, self.seed)

    def selector_of(self, density: float | None) -> Selector:
        """Return how a mask is chosen from scores, given the weight's density, if any."""
        name = cast("SelectorName", self.selector)
        return Selector(name, 0.5 if density is None else density, self.threshold)

    def selectors(self, scores: Mapping[str, Tensor]) -> dict[str, Selector]:
        """Return how the masks of all scores of an adapter are chosen, by weight."""
        densities = self.densities({name: tuple(one.shape) for name, one in scores.items()})
        chosen = {name: self.selector_of(densities.get(name)) for name in scores}
        return settled_selectors(chosen, scores)

    def _settle_selector(self) -> None:
        """Choose by what is given beside it; what is idle is told by the selector."""
        by_density = self.support_others == "drawn"
        asks_density = by_density or any((self.density, self.overall_density, self.density_pattern))
        if self.selector is None:
            keeps_model = self.bank == "own" and self.bank_init in (None, "model")
            keeps_model = keeps_model and self.form != "binary"
            self.selector = "threshold" if keeps_model and not asks_density else "topk"
        if self.density is None:
            self.density = 0.5

    def _fill_in_defaults(self) -> None:
        if self.bank_init is None:
            self.bank_init = "model" if self.bank == "own" else "kaiming_normal"
        if self.bank == "rp" and self.ratio is None and self.length is None:
            self.ratio = 1e-2
        if self.density == "erk" and self.overall_density is None:
            self.overall_density = 0.5
        self._fill_in_scores()
        if self.rest is None:
            self.rest = "stats" if self.bank_init == "model" else "train"

    def _fill_in_scores(self) -> None:
        learns_signs = self.form == "sign_delta"
        if self.score_init is None:
            self.score_init = "normal" if learns_signs else self._first_scores()
        if self.score_init == "normal":
            self.score_std = 0.01 if self.score_std is None else self.score_std
            if self.score_mean is None:
                self.score_mean = self.threshold + (0.0 if learns_signs else 4 * self.score_std)

    def _first_scores(self) -> float | ScoreInitName:
        draws = self.selector == "sample"
        if self.selector in TAKES_DENSITY or (draws and self.bank_init not in ("model", "stored")):
            return "kaiming_uniform"
        return self.threshold + (_SURE if draws else _MARGIN)

    def _check_form(self) -> None:
        if self.form == "sign_delta" and (self.bank != "own" or self.bank_init != "model"):
            given = f"bank={self.bank!r}, bank_init={self.bank_init!r}"
            refuse("form", self.form, f'bank="own", bank_init="model" beside it, not {given}')

    def _check_stored(self) -> None:
        if self.bank_init == "stored" and self.bank == "own":
            refuse("bank_init", "stored", 'bank="mp", "rp" or "one_layer" beside it, not "own"')

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
            check_pattern(name, value)
        for pattern in self.density_pattern or ():
            check_pattern("density_pattern", pattern)
        for name in ("layers_to_transform", "layers_pattern"):
            given = getattr(self, name)
            if isinstance(self.target_modules, str) and given is not None:
                refuse(name, given, "target_modules as a list, not as a pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            message = (
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified; "
                f"layers_pattern={shown(self.layers_pattern)} was given alone."
            )
            raise ConfigError(message)


def _preset(name: str) -> Preset:
    if not isinstance(name, str) or name not in PRESETS:
        message = f"There is no preset {shown(name)}; choose one of {', '.join(PRESETS)}."
        raise ConfigError(message)
    return PRESETS[name]


_DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(PemnConfig)}
