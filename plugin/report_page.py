"""One HTML page that needs nothing else, from tables, notes and pictures; and the same tables as Markdown.

Whatever text comes in is data: it is escaped here, once, on its way out.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

Cell = tuple[str, float | str | None]
"""What a cell shows, and what it is sorted by: a number, a text, or None for what is not known, which comes last."""


@dataclass(frozen=True)
class Table:
    """A table with one heading per column; the first column names the row.

    Args:
        headings: Of the columns.
        rows: Cells, as many as there are headings.

    Raises:
        ValueError: If a row has another number of cells.

    Example:
        >>> made = Table(("method", "accuracy"), ((("a|b", "a|b"), ("0.9 ± 0.1", 0.9)),))
        >>> print(made.markdown())
        | method | accuracy |
        |---|---|
        | a\\|b | 0.9 ± 0.1 |
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headings):
                raise ValueError(f"`Table` has {len(self.headings)} headings and a row of {len(row)} cells: {row}.")

    def html(self, search: bool = False) -> str:
        """As HTML; a click on a heading sorts it, and with ``search`` it has a field that filters its rows."""
        kinds = [
            ' class="text"' if any(isinstance(row[at][1], str) for row in self.rows) else ""
            for at in range(len(self.headings))
        ]
        head = "".join(
            f'<th scope="col"{kind}><button type="button">{text(name)}</button></th>'
            for name, kind in zip(self.headings, kinds, strict=True)
        )
        body = "\n".join(_row(row) for row in self.rows)
        kind = ' class="search"' if search else ""
        table = f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        return f'<div class="wide">\n{table}\n</div>'

    def markdown(self) -> str:
        """As GitHub's Markdown."""
        lines = [self.headings, ["---"] * len(self.headings), *([shown for shown, _ in row] for row in self.rows)]
        joined = [
            "|".join(["", *(f" {marked(cell)} " if at != 1 else cell for cell in line), ""])
            for at, line in enumerate(lines)
        ]
        return "\n".join(joined)


def _row(row: Sequence[Cell]) -> str:
    first, *others = row
    cells = (f"<td{_sorting(key)}>{text(shown)}</td>" for shown, key in others)
    return f'<tr><th scope="row">{text(first[0])}</th>{"".join(cells)}</tr>'


def _sorting(key: float | str | None) -> str:
    if isinstance(key, str):
        return ' class="text"'
    return f' data-value="{"" if key is None else key}"'


def text(value: str) -> str:
    """Text as HTML, without what it could do there."""
    return html.escape(value)


def marked(value: str) -> str:
    """Text as one line of Markdown, without what it could do there.

    Example:
        >>> marked("<b> *a* [x](y)")
        '&lt;b&gt; \\\\*a\\\\* \\\\[x](y)'
    """
    return re.sub(r"([\\|*`\[])", r"\\\1", html.escape(" ".join(value.split()), quote=False))


def picture(file: str | Path, caption: str) -> str:
    """A PNG file inside the page, with its caption."""
    data = base64.b64encode(Path(file).read_bytes()).decode()
    image = f'<div><img alt="{text(caption)}" src="data:image/png;base64,{data}"></div>'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"


def notes(lines: Iterable[str]) -> str:
    """Paragraphs of plain text."""
    return "\n".join(f"<p>{text(line)}</p>" for line in lines)


def section(title: str, *content: str) -> str:
    """A heading and what is under it; nothing if that is nothing."""
    inner = "\n".join(part for part in content if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{inner}\n</section>" if inner else ""


def folded(summary: str, *content: str) -> str:
    """What is shown on a click; nothing if there is nothing to show."""
    inner = "\n".join(part for part in content if part)
    return f"<details>\n<summary>{text(summary)}</summary>\n{inner}\n</details>" if inner else ""


def link(title: str, address: str) -> str:
    """A link to a web page; only the title if the address is none."""
    if not re.match(r"https?://", address):
        return text(title)
    return f'<a href="{text(address)}" rel="noopener noreferrer">{text(title)}</a>'


def page(title: str, content: Iterable[str], path: str | Path) -> Path:
    """Writes a page.

    Args:
        title: Heading of the page.
        content: HTML, made by the functions of this module.
        path: Where the page goes; folders that are missing are made.

    Returns:
        ``path``.
    """
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    body = "\n".join(part for part in content if part)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.substitute(title=text(title), body=body), encoding="utf-8")
    return path
