"""The model card: how to load an adapter of masks, on what base, and what it weighs.

PEFT makes the card itself, has no place in it for a method's own words, and finishes it before the
adapter's file is written; transformers' ``push_to_hub`` then puts a general card over it, and
``Trainer.create_model_card`` one of its own. A tuner is asked nothing on these ways, and users
never make a class of ours. So three methods get a wrapper around them (`wrap_cards`), each of which
does nothing for models without masks:

* ``PeftModel.save_pretrained`` and ``PeftModel.create_or_update_model_card`` (the ``Trainer`` calls
  that one last) complete the card after PEFT;
* ``PushToHubMixin._upload_modified_files``, which every push goes through, lets PEFT make its card
  again, and completes it before it is sent.

What is written stands between two marks and is replaced as a whole; all else is left to PEFT and to
whoever edits the card.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from peft.config import PeftConfig
from transformers.utils.hub import PushToHubMixin

from pemn_surgery.adapters.atomic import CARD, replace_file
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.file import AdapterFile
from pemn_surgery.adapters.registry import PEMN
from pemn_surgery.errors import AdapterFileError

_BEGIN = "<!-- pemn_surgery: written anew at each save; edit around this part, not in it -->"
_END = "<!-- pemn_surgery: end -->"
_PART = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)

_LOADING = """\
## How to load it

Masks need the package that makes PEFT know them (`pip install pemn-surgery`):

```python
import pemn_surgery.adapters  # without it PEFT says KeyError: 'PEMN'
from peft import PeftModel

model = PeftModel.from_pretrained(base, "the name or folder of this adapter"{subfolder})
```
"""


def complete_card(folder: str | Path, adapter_names: Iterable[str] = ("default",)) -> None:
    """Write into a folder's card how its adapters are loaded and what they weigh.

    Args:
        folder: What an adapter was saved to.
        adapter_names: The adapters that may be there; PEFT saves all but "default" in folders of
            their names.

    Raises:
        AdapterFileError: If an adapter's file is truncated or altered.
    """
    root = Path(folder)
    places = {"": root, **{name: root / name for name in adapter_names if name != "default"}}
    saved = {name: place for name, place in places.items() if _holds_masks(place)}
    if not saved:
        return
    part = "\n".join((_BEGIN, *(_describe(name, place) for name, place in saved.items()), _END))
    path = root / CARD
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    replaced, count = _PART.subn(lambda _: part, card.text)
    card.text = replaced if count else f"\n{part}\n{card.text}"
    replace_file(path, str(card).encode("utf-8"))


def wrap_cards() -> None:
    """Let every save and push of a model with masks complete the card."""
    peft_model, pusher = cast("Any", PeftModel), cast("Any", PushToHubMixin)
    peft_model.create_or_update_model_card = _with_card(peft_model.create_or_update_model_card)
    peft_model.save_pretrained = _with_saved_card(peft_model.save_pretrained)
    pusher._upload_modified_files = _with_pushed_card(pusher._upload_modified_files)


def _with_card(make_card: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        make_card(self, output_dir)
        # At the start of a save a damaged file may lie there, which is about to be replaced.
        with contextlib.suppress(AdapterFileError):
            _complete_card_of(self, output_dir)

    return create_or_update_model_card


def _with_saved_card(save: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("is_main_process", True):
            _complete_card_of(self, given["save_directory"])

    return save_pretrained


def _with_pushed_card(upload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upload)
    def _upload_modified_files(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if _names(self) and isinstance(self, PeftModel):
            self.create_or_update_model_card(str(working_dir))
        _complete_card_of(self, working_dir)
        return upload(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def _complete_card_of(model: Any, folder: str) -> None:
    names = _names(model)
    if names:
        complete_card(folder, names)


def _names(model: Any) -> list[str]:
    """Return a model's adapters of masks that are to be shared: scores of a checkpoint are not."""
    configs = getattr(model, "peft_config", {})
    return [
        name
        for name, config in configs.items()
        if isinstance(config, PemnConfig) and not config.keep_scores
    ]


def _holds_masks(folder: Path) -> bool:
    if not (folder / "adapter_config.json").is_file():
        return False
    return PeftConfig._get_peft_type(str(folder)) == PEMN.value


def _describe(name: str, folder: Path) -> str:
    config = PemnConfig.from_pretrained(str(folder))
    rows = {
        "base": _base(config),
        "base fingerprint": _fingerprint(config.fingerprint or {}),
        "frozen numbers": _numbers(config),
        **(_measured(config.file) if config.file is not None else {}),
    }
    loading = _LOADING.format(subfolder=f', subfolder="{name}"' if name else "")
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"\n{loading}\n| {name or 'adapter'} | |\n|---|---|\n{table}\n"


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


def _measured(file: AdapterFile) -> dict[str, str]:
    weights = sum(file.masks.values())
    ones = sum(file.ones.values())
    counted = len(file.ones) == len(file.masks)  # not scores, nor masks coded beside the base
    density = {"density": f"{ones / weights:.4f} ({ones:,} ones)"} if counted else {}
    return {
        "masks": f"{len(file.masks):,} of {weights:,} weights",
        **density,
        "file": f"{file.nbytes:,} bytes, {file.nbytes / weights:.4f} a masked weight",
    }
