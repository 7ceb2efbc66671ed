"""What is finished: a file a cell at once, and those of earlier sittings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pemn_surgery.errors import RecipeError

KEY = ("arm", "stage", "rate", "seed")
Cell = dict[str, Any]


class Store:
    """The finished cells of one case, by arm, stage, rate and seed.

    A cell's ``sitting`` is what its seconds depend on: date, machine, versions, device.
    """

    def __init__(
        self, folder: Path, earlier: Path | None, settings: dict[str, Any], *, resume: bool
    ) -> None:
        """Read the cells of a folder and of an earlier result.

        Raises:
            RecipeError: If there are some and no ``resume``, or they have other settings.
        """
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.cells: dict[tuple[Any, ...], Cell] = {}
        for origin, found, cells in self._read(earlier):
            if not resume:
                message = f"{origin} has finished cells; --resume goes on with them, or give "
                message += "another --work and other --results"
                raise RecipeError(message)
            self._check(origin, found)
            self.settings["arms"] = found["arms"] | self.settings["arms"]
            self.cells |= {_key(cell): cell for cell in cells}

    def _read(self, earlier: Path | None) -> Iterator[tuple[Path, dict[str, Any], list[Cell]]]:
        if earlier is not None and earlier.exists():
            result = json.loads(earlier.read_text(encoding="utf-8"))
            sittings = result["sittings"]
            cells = [cell | {"sitting": sittings[cell["sitting"]]} for cell in result["cells"]]
            yield earlier, result["settings"], cells
        for file in sorted(self.folder.glob("*.json")):
            kept = json.loads(file.read_text(encoding="utf-8"))
            yield file, kept["settings"], [kept["cell"]]

    def _check(self, origin: Path, was: dict[str, Any]) -> None:
        """Refuse cells with other settings; of the arms those that both know count."""
        now = self.settings
        rows = {
            name: (was["arms"][name], now["arms"][name])
            for name in was["arms"]
            if name in now["arms"]
        }
        pairs = {key: (was.get(key), now.get(key)) for key in {*was, *now} - {"arms"}} | rows
        other = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if other:
            message = f"{origin} has other settings (its, given): {other}; give another --work and "
            message += "other --results"
            raise RecipeError(message)

    def get(self, *key: Any) -> Cell | None:
        """Return a cell that is finished."""
        return self.cells.get(key)

    def add(self, cell: Cell) -> None:
        """Keep a cell, on disk before anything else happens."""
        self.cells[_key(cell)] = cell
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{'-'.join(map(str, _key(cell)))}.json"
        partial = file.with_suffix(".partial")
        text = json.dumps({"settings": self.settings, "cell": cell})
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(file)

    def body(self) -> dict[str, Any]:
        """Return what the case's result holds; each sitting is told once."""
        sittings: list[Any] = []
        for cell in self.cells.values():
            if cell["sitting"] not in sittings:
                sittings.append(cell["sitting"])
        cells = [c | {"sitting": sittings.index(c["sitting"])} for c in self._ordered()]
        return {"settings": self.settings, "sittings": sittings, "cells": cells}

    def _ordered(self) -> list[Cell]:
        """By arm, the search before the rest: the same order whatever was finished first."""
        arms = list(self.settings["arms"])
        return sorted(
            self.cells.values(),
            key=lambda c: (arms.index(c["arm"]), c["stage"] == "final", c["seed"], c["rate"] or 0),
        )


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[key] for key in KEY)
