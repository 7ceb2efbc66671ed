"""The model card: how to load an adapter of masks, on what base, and what it weighs.

PEFT makes the card itself, has no place in it for a method's own words, and finishes it before the
adapter's file is written; transformers' ``push_to_hub`` then puts a general card over it, and
``Trainer.create_model_card`` one of its own. A tuner is asked nothing on these ways, and users
never make a class of ours. So three methods are wrapped (`doors`), each of which does nothing for
models without masks:

* ``PeftModel.save_pretrained`` and ``PeftModel.create_or_update_model_card`` (the ``Trainer`` calls
  that one last) complete the card after PEFT;
* ``PushToHubMixin._upload_modified_files``, which every push goes through, lets PEFT make its card
  again, and completes it before it is sent.

What is written stands between two marks and is replaced as a whole; all else is left to PEFT and
to whoever edits the card, but for the form that a card begins with ("[More Information Needed]"
behind each of fifty headings): of that only what somebody has filled in stays.
"""

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from peft.config import PeftConfig
from torch import nn

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import CONFIG
from pemn_surgery.adapters.files.atomic import CARD, replace_file, save_whole
from pemn_surgery.adapters.files.contents import MASKS, TENSORS, AdapterFile
from pemn_surgery.adapters.identity import holds_bits, identity_of_file
from pemn_surgery.adapters.layer import PemnLayer
from pemn_surgery.adapters.registry import PEMN
from pemn_surgery.adapters.state import are_scores_kept
from pemn_surgery.errors import AdapterFileError
from pemn_surgery.masks.selector import TAKES_DENSITY

_BEGIN = "<!-- pemn_surgery: written anew at each save; edit around this part, not in it -->"
_END = "<!-- pemn_surgery: end -->"
_PART = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
# What PEFT's task types are built by.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_EARLIER = re.compile(
    r"^(?P<imports>import timm\n|from transformers import \w+\n)from peft import PeftModel\n\n"
    r"(?P<base>base = .*)$",
    re.MULTILINE,
)
_LOADING = """\
## How to load it

Binary masks on frozen weights, for PEFT. They need the package `pemn_surgery`, which makes PEFT
know them; it is on no package index: `pip install .` in a copy of its source.

```python
import pemn_surgery.adapters  # without it PEFT says KeyError: 'PEMN'
{imports}from peft import PeftModel

{base}
model = PeftModel.from_pretrained(base, "the name or folder of this adapter"{subfolder})
```
"""
_UNFILLED = re.compile(r"\[More Information Needed\]|^More information needed$", re.IGNORECASE)
_HEADING = re.compile(r"^(#+) (.*)$")
_TITLE = "Model Card for Model ID"
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FRAMEWORK = "Framework versions"  # PEFT puts it behind whatever section is the last


def complete_card(
    folder: str | Path,
    adapter_names: Iterable[str] = ("default",),
    model: nn.Module | None = None,
) -> None:
    """Write into a folder's card how its adapters are loaded and what they weigh.

    What of the form that PEFT and transformers begin a card with nobody has filled in goes.

    Args:
        folder: What an adapter was saved to.
        adapter_names: The adapters that may be there; PEFT saves all but "default" in folders of
            their names.
        model: The model that was saved, which tells how a timm base is built.

    Raises:
        AdapterFileError: If an adapter's file is truncated or altered.
    """
    root = Path(folder)
    places = {"": root, **{name: root / name for name in adapter_names if name != "default"}}
    saved = {name: place for name, place in places.items() if _holds_masks(place)}
    if not saved:
        return
    path = root / CARD
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    configs = {name: PemnConfig.from_pretrained(str(place)) for name, place in saved.items()}
    parts = (
        _describe(name, config, *_base_code(config, model, card.text))
        for name, config in configs.items()
    )
    title = f"Masks on {_base_named_by(next(iter(configs.values())))}"
    card.text = _with_part(card.text, "\n".join((_BEGIN, *parts, _END)), title)
    replace_file(path, str(card).encode("utf-8"))


def _with_part(text: str, part: str, title: str) -> str:
    """Return a card's text with the part in its place, or behind the form's title."""
    before, *after = _PART.split(text)
    if after:
        rest = "\n".join(without_form(piece, title) for piece in after)
        return f"{without_form(before, title)}{part}{rest}"
    whole = without_form(text, title)
    head = f"# {title}"
    if whole.lstrip().startswith(head):
        return f"\n{head}\n\n{part}\n{whole.lstrip().removeprefix(head)}"
    return f"\n{part}\n{whole}"


def saving(save: Callable[..., None]) -> Callable[..., None]:
    """Let PEFT save whole or not at all (`atomic`), and complete the card afterwards."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(config, PemnConfig) for config in self.peft_config.values()):
            save(self, *args, **kwargs)
            return
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        folder, writes = given.arguments["save_directory"], given.arguments["is_main_process"]
        save_whole(save, given)
        if writes:
            complete_card_of(self, folder)

    return save_pretrained


def with_card(make_card: Callable[..., None]) -> Callable[..., None]:
    """Complete the card that PEFT makes."""

    @functools.wraps(make_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        make_card(self, output_dir)
        # At the start of a save a damaged file may lie there, which is about to be replaced.
        with contextlib.suppress(AdapterFileError):
            complete_card_of(self, output_dir)

    return create_or_update_model_card


def with_pushed_card(upload: Callable[..., Any]) -> Callable[..., Any]:
    """Complete the card that is about to be sent, after PEFT made its own again."""

    @functools.wraps(upload)
    def _upload_modified_files(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if _names(self) and isinstance(self, PeftModel):
            self.create_or_update_model_card(str(working_dir))
        complete_card_of(self, working_dir)
        return upload(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def complete_card_of(model: Any, folder: str) -> None:
    """Complete the card of a saved model, if it has adapters of masks that are to be shared."""
    names = _names(model)
    if names:
        complete_card(folder, names, model)


def _names(model: Any) -> list[str]:
    """Return a model's adapters of masks that are to be shared: scores of a checkpoint are not."""
    configs = getattr(model, "peft_config", {})
    return [
        name
        for name, config in configs.items()
        if isinstance(config, PemnConfig) and not are_scores_kept(config)
    ]


def _holds_masks(folder: Path) -> bool:
    is_adapter = (folder / CONFIG).is_file()
    return is_adapter and PeftConfig._get_peft_type(str(folder)) == PEMN.value


def _base_code(config: PemnConfig, model: nn.Module | None, earlier: str) -> tuple[str, str]:
    """Return how an adapter's base is built in Python: imports, and the line that makes ``base``.

    A line is written only where it is known to be right: a transformers model has a name and a
    class; a timm model is built once more, without memory, and compared. Where neither is known the
    line of the earlier text stays, or is a comment.
    """
    base = None if model is None else _base_of(model)
    found = _transformers(config, base) or _timm(config, base)
    said = _EARLIER.search(earlier)
    if found is None and base is None and said is not None:
        return said["imports"], said["base"]
    return found or ("", f"# base: {_base_named_by(config)}, built as it was for training")


def _base_of(model: nn.Module) -> Any:
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def _transformers(config: PemnConfig, base: Any) -> tuple[str, str] | None:
    made_of = config.auto_mapping or {}
    library = made_of.get("parent_library", "transformers")
    named = made_of.get("base_model_class") or AUTO_CLASSES.get(config.task_type or "")
    if not config.base_model_name_or_path or not named or not library.startswith("transformers"):
        return None
    arguments = [json.dumps(config.base_model_name_or_path)]
    labels = getattr(getattr(base, "config", None), "num_labels", 2)
    if labels != 2 and "Classification" in named:
        arguments.append(f"num_labels={labels}")
    line = f"base = {named}.from_pretrained({', '.join(arguments)})"
    return f"from transformers import {named}\n", line


def _timm(config: PemnConfig, base: Any) -> tuple[str, str] | None:
    described = getattr(base, "pretrained_cfg", None) or {}
    name = described.get("architecture")
    if not name:
        return None
    arguments = _arguments(base, described)
    if _shapes(base) != _shapes_of(name, arguments):
        return None
    if not config.bank_spec.generated and described.get("tag"):
        name = f"{name}.{described['tag']}"
    shown = "".join(f", {key}={value!r}" for key, value in arguments.items())
    needed = "" if config.bank_spec.generated else "  # with the weights of the fingerprint below"
    return "import timm\n", f"base = timm.create_model({json.dumps(name)}{shown}){needed}"


def _arguments(base: Any, described: Any) -> dict[str, Any]:
    """Return what the model was created with, as far as timm remembers it, and its classes."""
    given = dict(getattr(base, "_model_args", None) or {})
    plain = {key: one for key, one in given.items() if isinstance(one, (bool, int, float, str))}
    classes = getattr(base, "num_classes", None)
    if classes is not None and classes != described.get("num_classes"):
        plain["num_classes"] = classes
    return plain


def _shapes(base: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a base's own parameters, masked or replaced ones as they were."""
    shapes = {
        name.replace(".original_module.", "."): parameter.shape
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if not any(f".{part}" in f".{name}" for part in (MASKS, TENSORS, "modules_to_save."))
    }
    masked = [module for module in base.modules() if isinstance(module, PemnLayer)]
    return shapes | {layer.target: torch.Size(layer.shape) for layer in masked}


def _shapes_of(name: str, arguments: dict[str, Any]) -> dict[str, torch.Size] | None:
    import timm

    try:
        with torch.device("meta"):
            built = timm.create_model(name, **arguments)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return {key: value.shape for key, value in built.named_parameters(remove_duplicate=False)}


def _describe(name: str, config: PemnConfig, imports: str, base: str) -> str:
    """Return the part of a card about one adapter, "" for the one in the folder itself."""
    rows = {
        "base": _base(config),
        "base fingerprint": _fingerprint(config.fingerprint or {}),
        "frozen numbers": _numbers(config),
        "masks chosen by": _selection(config),
        **({"made from": _lineage(config.lineage)} if config.lineage else {}),
        **({"task type": f"{config.task_type}"} if config.task_type else {}),
        **(_measured(config, config.origin.file) if config.origin.file is not None else {}),
    }
    subfolder = f', subfolder="{name}"' if name else ""
    loading = _LOADING.format(imports=imports, base=base, subfolder=subfolder)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"\n{loading}\n| {name or 'adapter'} | |\n|---|---|\n{table}\n"


def _base_named_by(config: PemnConfig) -> str:
    """Return what a configuration calls its base, or its class, or "a model"."""
    made_of = config.auto_mapping or {}
    return config.base_model_name_or_path or made_of.get("base_model_class") or "a model"


def _base(config: PemnConfig) -> str:
    made_of = config.auto_mapping or {}
    parts = [config.base_model_name_or_path, made_of.get("base_model_class")]
    return ", ".join(f"`{part}`" for part in parts if part) or "not named"


def _fingerprint(fingerprint: dict[str, str]) -> str:
    if len(set(fingerprint.values())) == 1:
        return f"`{next(iter(fingerprint.values()))}`"
    listed = (f"`{digest}` in {name}" for name, digest in fingerprint.items())
    return ", ".join(listed) or "unknown"


def _numbers(config: PemnConfig) -> str:
    spec = config.bank_spec
    shown = {"bank": spec.bank, "ratio": spec.ratio, "length": spec.length, "bank_init": spec.init}
    made = ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
    orders = {", permuted": spec.permute, ", aligned to rows": spec.aligned}
    order = "".join(said for said, holds in orders.items() if holds)
    if spec.init == "stored":
        return f"{made}: in this adapter's file, in place of the base's"
    if spec.generated:
        return f"{made}{order}, made from seed {spec.seed} in place of the base's"
    return f"{made}{order}: the base's own, which must be those of the fingerprint"


def _selection(config: PemnConfig) -> str:
    each = "matrix" if config.scale == "matrix" else "output"
    signs = f"form {config.form}: signs of a change, with a scale for each {each}"
    if config.has_fixed_signs:
        return signs
    takes = config.selector in TAKES_DENSITY
    chosen = _density(config) if takes else f"threshold {config.threshold}"
    forms = {
        "flip": ", form flip: signs of weights",
        "binary": ", form binary: signs of weights, one size for all",
        "sign_delta": f", {signs}",
    }
    form = forms.get(config.form, "")
    scale = f", scale {config.scale}" if config.scale and config.form != "sign_delta" else ""
    return f"{config.selector}, {chosen}{form}{scale}{_support(config)}"


def _support(config: PemnConfig) -> str:
    if config.support is None:
        return ""
    drawn = f", seed {config.seed}" if config.support_by in ("seed", "rows") else ""
    others = ", others dropped by the seed" if config.support_others == "drawn" else ""
    return f", on {config.support:g} of every weight (by {config.support_by}{drawn}){others}"


def _density(config: PemnConfig) -> str:
    by_shape = f" (by shape, overall {config.overall_density})" if config.density == "erk" else ""
    named = (f"{name} {share}" for name, share in (config.density_pattern or {}).items())
    return f"density {config.density}{by_shape}" + "".join(f", {item}" for item in named)


def _lineage(lineage: dict[str, Any]) -> str:
    return f"{', '.join(f'`{one}`' for one in lineage['of'])} by `{lineage['by']}`"


def _measured(config: PemnConfig, file: AdapterFile) -> dict[str, str]:
    weights, counts = sum(file.sizes.values()), file.ones
    ones = sum(counts.values())
    counted = len(counts) == len(file.masks)  # not scores, nor masks coded beside the base
    density = {"density": f"{ones / weights:.4f} ({ones:,} ones)"} if counted else {}
    identity = {"identity": f"`{identity_of_file(config, file)}`"} if holds_bits(file) else {}
    return {
        **identity,
        "masks": f"{len(file.masks):,} of {weights:,} weights",
        **density,
        "other tensors": f"{len(file.others):,}",
        "file": f"{file.nbytes:,} bytes, {8 * file.nbytes / weights:.3f} bits a masked weight",
    }


# ------------------------------------------------------------------------------------ the form


class _Section(NamedTuple):
    level: int
    heading: str
    lines: list[str]


def without_form(text: str, title: str) -> str:
    """Return a card's text under this title, without what of a form nobody filled in."""
    blank = ModelCard.from_template(ModelCardData()).text
    form = {one.heading: _said(_filled(one.lines)) for one in _sections(blank)}
    kept: list[_Section] = []
    for section in reversed([*_sections(text)]):
        lines = _filled(section.lines)
        is_form = section.heading in form or len(lines) < len(section.lines)
        if section.level and is_form and _said(lines) in ("", form.get(section.heading)):
            lines = [""]
            if section.heading != _TITLE and not _has_more(section, kept):
                continue
        heading = title if section.heading == _TITLE else section.heading
        kept.insert(0, _Section(section.level, heading, lines))
    return "\n".join(line for section in kept for line in _lines_of(section))


def _lines_of(section: _Section) -> list[str]:
    head = [f"{'#' * section.level} {section.heading}"] if section.level else []
    return head + section.lines


def _has_more(section: _Section, kept: list[_Section]) -> bool:
    """Tell whether the next section that stays belongs to this one."""
    nearest = kept[0] if kept else None
    return nearest is not None and nearest.level > section.level and nearest.heading != _FRAMEWORK


def _filled(lines: list[str]) -> list[str]:
    return [line for line in lines if not _UNFILLED.search(line.strip())]


def _said(lines: list[str]) -> str:
    """Return what lines say to a reader: no comments, no blanks."""
    return " ".join(_COMMENT.sub("", "\n".join(lines)).split())


def _sections(text: str) -> Iterator[_Section]:
    section, in_code = _Section(0, "", []), False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        found = None if in_code else _HEADING.match(line)
        if found is None:
            section.lines.append(line)
            continue
        yield section
        section = _Section(len(found[1]), found[2], [])
    yield section
