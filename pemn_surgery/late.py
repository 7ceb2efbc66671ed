"""Does what needs another library once that is imported, while this package stays light.

``import pemn_surgery`` imports nothing heavy, so PEFT would not know masks until a name of the
package is used, and ``PeftModel.from_pretrained`` would say ``KeyError: 'PEMN'``. Where PEFT is
imported already, `pemn_surgery.adapters` costs little more and is imported at once. Otherwise a
finder waits for PEFT (`sys.meta_path`, PEP 302): it finds what the other finders find, lets
`pemn_surgery.adapters` be imported when PEFT has been, and then takes itself away. So it is with
transformers' ``Trainer``, which has a door of its own (`pemn_surgery.adapters.doors`).
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pemn_surgery.errors import PemnWarning

_ADAPTERS = "pemn_surgery.adapters"


def register_with_peft() -> None:
    """Import `pemn_surgery.adapters` now if PEFT is there, else as soon as it is."""
    _after_import("peft", _import_adapters)
    _after_import("transformers.trainer", _open_late_doors)


def _after_import(name: str, act: Callable[[], None]) -> None:
    """Do something now if a module is there, else as soon as it is."""
    if name in sys.modules:
        _safely(act, name)
    elif not any(getattr(finder, "awaited", None) == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, act))


def _safely(act: Callable[[], None], name: str) -> None:
    """Do something after an import, which never fails because of it."""
    try:
        act()
    except Exception as error:  # whatever is wrong with this package, the other one is whole
        warnings.warn(
            f"pemn_surgery could not make {name} know masks ({type(error).__name__}: {error}); "
            f"import {_ADAPTERS} shows where.",
            PemnWarning,
            stacklevel=2,
        )


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
            _safely(self.act, self.awaited)

        loader.exec_module = exec_module


def _import_adapters() -> None:
    importlib.import_module(_ADAPTERS)


def _open_late_doors() -> None:
    importlib.import_module(f"{_ADAPTERS}.doors").install(late=True)
