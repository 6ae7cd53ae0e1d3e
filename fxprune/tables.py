"""Tables as plain text: the same on a terminal, in a file and in an issue."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["render_pairs", "render_table"]

_WIDTH = 160


def render_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    limit: int | None = None,
) -> str:
    """Renders rows below a heading, numbers and percentages right-aligned.

    Args:
        columns: the headings.
        rows: the cells; True is shown as "yes", False and None as nothing.
        limit: show at most so many rows and say how many are left out.
    """
    given = list(rows)
    shown = given if limit is None else given[:limit]
    table = Table(box=box.MARKDOWN, show_edge=True, pad_edge=True)
    for index, name in enumerate(columns):
        numeric = bool(shown) and all(_is_number(row[index]) for row in shown)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in shown:
        table.add_row(*(Text(_cell(value)) for value in row))
    lines = [_render(table)]
    if len(shown) < len(given):
        lines.append(f"... and {len(given) - len(shown):,} more")
    return "\n".join(lines)


def render_pairs(pairs: Iterable[tuple[str, object]]) -> str:
    """Renders names and values, one pair a line; later lines of a value are indented."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(_cell(value)))
    return _render(table)


def _render(table: Table) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None, force_terminal=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or (isinstance(value, str) and value.endswith("%"))


def _cell(value: object) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
