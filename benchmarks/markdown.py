"""Markdown tables, padded so that a terminal shows them well too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths = [max(3, width) for width in widths]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [f":{'-' * (w - 1)}" if i < left else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """`markdown` of any values."""
    return markdown(header, [[str(cell) for cell in row] for row in rows])
