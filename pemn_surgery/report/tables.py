"""Tables, for a terminal and for a page."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_TEXT_WIDTH = 140


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table for people; columns of numbers are aligned to the right."""
    cells = [list(row) for row in rows]
    result = Table(title=title, title_justify="left", caption_justify="left")
    for place, heading in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[place]) for row in cells)
        result.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        result.add_row(*row)
    return result


def as_text(renderable: Table) -> str:
    """Return a table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=_TEXT_WIDTH, color_system=None, force_terminal=False).print(
        renderable
    )
    return buffer.getvalue()


def as_markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, or "None." where it has no rows."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    if not cells:
        return "None.\n"
    lines = [list(heads), ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _is_number(text: str) -> bool:
    return (
        bool(text)
        and text.replace(",", "").replace(".", "").replace("%", "").strip(" x+-").isdigit()
    )
