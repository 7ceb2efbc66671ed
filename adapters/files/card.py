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

What is written (`card_text`) stands between two marks and is replaced as a whole; all else is left
to PEFT and to whoever edits the card, but for the empty form that a card begins with.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from peft.config import PeftConfig
from torch import nn

from pemn_surgery.adapters.checkpoints import are_scores_kept
from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.atomic import CARD, replace_file
from pemn_surgery.adapters.files.card_base import base_code
from pemn_surgery.adapters.files.card_text import base_named_by, describe, without_form
from pemn_surgery.adapters.registry import PEMN
from pemn_surgery.errors import AdapterFileError

_BEGIN = "<!-- pemn_surgery: written anew at each save; edit around this part, not in it -->"
_END = "<!-- pemn_surgery: end -->"
_PART = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)


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
        describe(name, config, base_code(config, model, card.text))
        for name, config in configs.items()
    )
    title = f"Masks on {base_named_by(next(iter(configs.values())))}"
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
    if not (folder / "adapter_config.json").is_file():
        return False
    return PeftConfig._get_peft_type(str(folder)) == PEMN.value
