"""Rows of data sets: of the hub, or of a folder, by split and column."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pemn_surgery.errors import RecipeError

Columns = dict[str, Iterable[Any]]


def place(case: str, *given: str) -> str:
    """Return the first source that is given, a folder in full; a RecipeError if there is none."""
    source = next(filter(None, given), "")
    if not source:
        message = f"the data of {case!r} has no source of its own; give --data"
        raise RecipeError(message)
    return str(Path(source).resolve()) if Path(source).exists() else source


def read(
    source: str, splits: Mapping[str, str], columns: Sequence[str], work: Path
) -> dict[str, Columns]:
    """Read columns of a hub id or a folder.

    Without ``datasets``, which caches in ``work``, a folder of parquet files is read, whose names
    are their split's or begin with it. If a split or column is missing, a RecipeError names those
    there are.

    Args:
        source: Hub id or folder.
        splits: Names of its splits by what they are for.
        columns: Names of those that are read.
        work: Folder of the cache.

    Returns:
        Values in their order, by what a split is for and by column; a column is read once.
    """
    if importlib.util.find_spec("datasets") is None:
        return {name: _of_parquet(source, split, columns) for name, split in splits.items()}
    import datasets

    given = datasets.load_dataset(source, cache_dir=str(work / "datasets"))
    missing = sorted({*splits.values()} - {*given})
    if missing:
        message = f"{source} has the splits {sorted(given)}; {missing} are needed"
        raise RecipeError(message)
    return {name: _of_rows(source, given[split], columns) for name, split in splits.items()}


def _of_rows(source: str, rows: Any, columns: Sequence[str]) -> Columns:
    _check_columns(source, columns, rows.column_names)
    return {one: _values(rows, one) for one in columns}


def _values(rows: Any, column: str) -> Iterator[Any]:
    """Return one value after the other: pictures are decoded when they are read."""
    return (row[column] for row in rows.select_columns([column]))


def _of_parquet(source: str, split: str, columns: Sequence[str]) -> Columns:
    """Read one split of a folder of parquet files, as the hub writes them, without ``datasets``."""
    folder = Path(source)
    files = sorted({*folder.rglob(f"{split}-*.parquet"), *folder.rglob(f"{split}.parquet")})
    if not files:
        message = f"{source} has no {split}-*.parquet; give a folder that has, or install datasets"
        raise RecipeError(message)
    from pyarrow import concat_tables, parquet

    table = concat_tables([parquet.read_table(file) for file in files])
    _check_columns(source, columns, table.column_names)
    return {one: table[one].to_pylist() for one in columns}


def _check_columns(source: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    missing = {*wanted} - {*there}
    if missing:
        message = f"{source} lacks the columns {sorted(missing)}; it has {list(there)}"
        raise RecipeError(message)
