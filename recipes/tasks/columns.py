"""Values out of the columns of a row, or what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from apportion.recipes.tasks.formats import Row, undecodable


class BadRow(ValueError):
    """A row that cannot be used; the message says why, and completes "line 3 ..."."""


def value(row: Row, column: str) -> Any:
    """What stands in a column.

    Raises:
        BadRow: If the row could not be read or has no such column.
    """
    if row.problem:
        raise BadRow(row.problem)
    if column not in row.values:
        raise BadRow(f"has no column {column!r}; it has {sorted(map(str, row.values))}")
    return row.values[column]


def text(row: Row, column: str, empty: bool = False) -> str:
    """The text in a column; several paragraphs become one text.

    Args:
        row: The row.
        column: Name of the column.
        empty: Whether the column may be missing, null or blank.

    Raises:
        BadRow: If it is not text in UTF-8, or blank.

    Example:
        >>> text(Row("line 1", {"text": ["one", "two"]}), "text")
        'one\\ntwo'
        >>> text(Row("line 1", {"text": 3}), "text")
        Traceback (most recent call last):
        ...
        apportion.recipes.tasks.columns.BadRow: holds 3 (int) in column 'text', not text
    """
    found = row.values.get(column) if empty and not row.problem else value(row, column)
    if found is None and empty:
        return ""
    if isinstance(found, list) and all(isinstance(part, str) for part in found):
        found = "\n".join(found)
    if not isinstance(found, str):
        raise BadRow(f"holds {_short(found)} in column {column!r}, not text")
    if undecodable(found):
        raise BadRow(f"holds bytes that are not UTF-8 in column {column!r}")
    if not found.strip() and not empty:
        raise BadRow(f"is empty in column {column!r}")
    return found


def number(row: Row, column: str) -> float:
    """The finite number in a column, also as text.

    Raises:
        BadRow: If it is none.
    """
    found = value(row, column)
    try:
        made = math.nan if isinstance(found, bool) else float(found)
    except (TypeError, ValueError):
        made = math.nan
    if not math.isfinite(made):
        raise BadRow(f"holds {_short(found)} in column {column!r}, not a finite number")
    return made


def label(row: Row, column: str, labels: Sequence[str] | None = None, classes: int | None = None) -> int:
    """The class in a column, counted from 0.

    Args:
        row: The row.
        column: Name of the column.
        labels: Names of the classes; a name or an integer in range is one of them. None for integers.
        classes: Number of classes; None for that of the names, or for any.

    Raises:
        BadRow: If it is neither an integer nor a name, or out of range.

    Example:
        >>> label(Row("line 1", {"label": "entailment"}), "label", ["entailment", "not_entailment"])
        0
        >>> label(Row("line 2", {"label": "2"}), "label", classes=2)
        Traceback (most recent call last):
        ...
        apportion.recipes.tasks.columns.BadRow: holds the label 2 in column 'label', which must lie in [0, 1]
    """
    found = value(row, column)
    if labels and found in labels:
        return list(labels).index(found)
    try:
        index = None if isinstance(found, bool | float) else int(found)
    except (TypeError, ValueError):
        index = None
    if index is None:
        known = f"one of {', '.join(labels)}" if labels else "an integer; give the names as `data.labels=[...]`"
        raise BadRow(f"holds {_short(found)} in column {column!r}, not {known}")
    top = classes or (len(labels) if labels else None)
    if index < 0 or (top is not None and index >= top):
        limits = f"[0, {top - 1}]" if top else "at least 0"
        raise BadRow(f"holds the label {index} in column {column!r}, which must {'lie in ' if top else 'be '}{limits}")
    return index


def _short(found: Any) -> str:
    shown = repr(found)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} ({type(found).__name__})"
