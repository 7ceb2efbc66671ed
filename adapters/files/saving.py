"""How a model with masks is saved: whole or not at all (`atomic`), and then the card (`card`)."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftModel

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.atomic import save_whole
from pemn_surgery.adapters.files.card import complete_card_of


def saving(save: Callable[..., None]) -> Callable[..., None]:
    """Let ``PeftModel.save_pretrained`` keep `atomic`'s promise and complete the card."""
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
