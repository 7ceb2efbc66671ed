"""What a model card says of an adapter of masks, and what of a card nobody has filled in.

PEFT, transformers and the ``Trainer`` begin a card with a form ("[More Information Needed]" behind
each of fifty headings). What is known of an adapter stands in its own part; of the form only what
somebody has filled in stays.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.adapter_file import AdapterFile
from pemn_surgery.masks.selector import TAKES_DENSITY

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


class BaseCode(NamedTuple):
    """How the base is built, in Python.

    Attributes:
        imports: Lines that import what it takes, each with its end.
        base: The line that makes ``base``, or a comment where nobody knows.
    """

    imports: str
    base: str


def describe(name: str, config: PemnConfig, code: BaseCode) -> str:
    """Return the part of a card that is about one adapter.

    Args:
        name: The adapter's name, "" for the one in the folder itself.
        config: Its configuration, read with its file.
        code: How its base is built.
    """
    rows = {
        "base": _base(config),
        "base fingerprint": _fingerprint(config.fingerprint or {}),
        "frozen numbers": _numbers(config),
        "masks chosen by": _selection(config),
        **({"task type": f"{config.task_type}"} if config.task_type else {}),
        **(_measured(config.origin.file) if config.origin.file is not None else {}),
    }
    subfolder = f', subfolder="{name}"' if name else ""
    loading = _LOADING.format(imports=code.imports, base=code.base, subfolder=subfolder)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"\n{loading}\n| {name or 'adapter'} | |\n|---|---|\n{table}\n"


def base_named_by(config: PemnConfig) -> str:
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
    permuted = ", permuted" if spec.permute else ""
    if spec.generated:
        return f"{made}{permuted}, made from seed {spec.seed} in place of the base's"
    return f"{made}{permuted}: the base's own, which must be those of the fingerprint"


def _selection(config: PemnConfig) -> str:
    if config.form != "product":
        return f"form {config.form}: signs of a change, with a scale for each output"
    takes = config.selector in TAKES_DENSITY
    chosen = _density(config) if takes else f"threshold {config.threshold}"
    return f"{config.selector}, {chosen}" + (f", scale {config.scale}" if config.scale else "")


def _density(config: PemnConfig) -> str:
    by_shape = f" (by shape, overall {config.overall_density})" if config.density == "erk" else ""
    named = (f"{name} {share}" for name, share in (config.density_pattern or {}).items())
    return f"density {config.density}{by_shape}" + "".join(f", {item}" for item in named)


def _measured(file: AdapterFile) -> dict[str, str]:
    weights, counts = sum(file.sizes.values()), file.ones
    ones = sum(counts.values())
    counted = len(counts) == len(file.masks)  # not scores, nor masks coded beside the base
    density = {"density": f"{ones / weights:.4f} ({ones:,} ones)"} if counted else {}
    return {
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
    """Return a card's text without the parts of a form that nobody filled in.

    Args:
        text: The text, or a piece of it.
        title: Takes the place of the form's own title.
    """
    form = {one.heading: _said(_filled(one.lines)) for one in _sections(_blank_form())}
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
    return [*head, *section.lines]


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


def _blank_form() -> str:
    return ModelCard.from_template(ModelCardData()).text
