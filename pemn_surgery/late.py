"""Makes PEFT know the method when it is imported, while this package stays light.

``import pemn_surgery`` imports nothing heavy, so PEFT would not know masks until a name of the
package is used, and ``PeftModel.from_pretrained`` would say ``KeyError: 'PEMN'``. Where PEFT is
imported already, `pemn_surgery.adapters` costs little more and is imported at once. Otherwise a
finder waits for PEFT (`sys.meta_path`, PEP 302): it finds what the other finders find, lets
`pemn_surgery.adapters` be imported when PEFT has been, and then takes itself away.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pemn_surgery.errors import PemnWarning

_AWAITED = "peft"
_ADAPTERS = "pemn_surgery.adapters"


def register_with_peft() -> None:
    """Import `pemn_surgery.adapters` now if PEFT is there, else as soon as it is."""
    if _AWAITED in sys.modules:
        _import_adapters()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds PEFT as the finders behind it do, and has its loader do one thing more."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return PEFT's spec; None for all other modules, and where there is no PEFT."""
        if name != _AWAITED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Let a loader, which is made anew for each spec, call `_import_adapters` at its end."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _import_adapters()

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
