"""Does what needs another library once that is imported, while this package stays light.

``import pemn_surgery`` imports nothing heavy, so PEFT would not know masks until a name of the
package is used, and ``PeftModel.from_pretrained`` would say ``KeyError: 'PEMN'``. Where PEFT is
imported already, `pemn_surgery.adapters` costs little more and is imported at once. Otherwise a
finder waits for PEFT (`sys.meta_path`, PEP 302): it finds what the other finders find, lets
`pemn_surgery.adapters` be imported when PEFT has been, and then takes itself away. So it is with
transformers' ``Trainer``, whose checkpoints are to hold scores.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pemn_surgery.errors import PemnWarning

_PEFT = "peft"
_TRAINER = "transformers.trainer"
_ADAPTERS = "pemn_surgery.adapters"


def register_with_peft() -> None:
    """Import `pemn_surgery.adapters` now if PEFT is there, else as soon as it is."""
    _after_import(_PEFT, _import_adapters)
    _after_import(_TRAINER, _wrap_trainer)


def _after_import(name: str, act: Callable[[], None]) -> None:
    """Do something now if a module is there, else as soon as it is."""
    if name in sys.modules:
        act()
    elif not any(getattr(finder, "awaited", None) == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder:
    """Finds a module as the finders behind it do, and has its loader do one thing more."""

    def __init__(self, awaited: str, act: Callable[[], None]) -> None:
        self.awaited, self.act = awaited, act

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the awaited module's spec; None for all others, and where there is none."""
        if name != self.awaited:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Let a loader, which is made anew for each spec, act at its end."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.act()

        loader.exec_module = exec_module


def _import_adapters() -> None:
    """Import `pemn_surgery.adapters`; an import of PEFT never fails because of it."""
    try:
        importlib.import_module(_ADAPTERS)
    except Exception as error:  # whatever is wrong with this package, PEFT itself is whole
        warnings.warn(
            f"pemn_surgery could not make PEFT know masks ({type(error).__name__}: {error}); "
            "import pemn_surgery.adapters shows where.",
            PemnWarning,
            stacklevel=2,
        )


def _wrap_trainer() -> None:
    """Let checkpoints hold scores; an import of the ``Trainer`` never fails because of it."""
    try:
        importlib.import_module(f"{_ADAPTERS}.checkpoints").wrap_trainer()
    except Exception as error:
        warnings.warn(
            "pemn_surgery could not let the checkpoints of this transformers' Trainer hold scores "
            f"({type(error).__name__}: {error}): they will hold masks as bits, from which a run "
            "does not go on exactly. In training, say "
            'model.peft_config["default"].keep_scores = True, and False before the final save.',
            PemnWarning,
            stacklevel=2,
        )
