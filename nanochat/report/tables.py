"""How values, tables and texts of others look in Markdown, and tables in plain text."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int | None = None) -> str:
    """A table; the cells are Markdown already. Columns after the first `num_text` stand to the right."""
    num_text = len(columns) if num_text is None else num_text
    rules = ["---"] * num_text + ["---:"] * (len(columns) - num_text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows))


def pairs(heading: str, mapping: Mapping[str, Any]) -> str:
    """A mapping as a table of two columns; an item of a mapping inside it is named `outer.inner`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        is_nested = isinstance(value, Mapping) and value
        flat |= {f"{key}.{name}": item for name, item in value.items()} if is_nested else {key: value}
    return table([heading, "Value"], [[escape(key), format_value(value)] for key, value in flat.items()])


def folded(title: str, content: str) -> str:
    """`content` behind a line that opens it. The blank lines make Markdown of it on GitHub too."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def fenced(text: str) -> str:
    """`text` as it is, in a fence longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def format_value(value: Any) -> str:
    """A value as a table cell: thousands separators, at most four decimals, three digits for very small or large."""
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1000:
            return f"{value:.4f}".rstrip("0").rstrip(".") or "0"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return "-" if value is None else escape(value)


def score(value: Any) -> str:
    """A score with four decimals, so that those below each other compare."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else format_value(value)


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def escape(value: Any) -> str:
    """`value` as text on one line that Markdown, also in a table, shows literally."""
    return re.sub(r"([\\|*`<\[\]&~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(value).split()))


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of plain text with aligned columns, of which the first is the heading; a first cell that repeats the one
    above it is left blank."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = [rows[0], ["-" * width for width in widths]]
    shown += [
        [row[0] if i == 0 or row[0] != rows[i][0] else "", *row[1:]] for i, row in enumerate(rows[1:], start=0)
    ]  # fmt: skip
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)
    return "\n".join(line.rstrip() for line in lines)
