"""Values out of the columns of a row, or what is wrong with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral, Real
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
        raise BadRow(f"holds {short(found)} in column {column!r}, not text")
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
        raise BadRow(f"holds {short(found)} in column {column!r}, not a finite number")
    return made


def label(row: Row, column: str, labels: Sequence[str] | None = None, classes: int | None = None) -> int:
    """The class in a column, counted from 0.

    Args:
        row: The row.
        column: Name of the column.
        labels: Names of the classes; a name, or an integer in range where no name is an integer, is one of them. A
            number stands for the name that it is written like, whatever the format of the file. None for integers.
        classes: Number of classes; None for that of the names, or for any.

    Raises:
        BadRow: If it is neither an integer nor a name, or out of range.
        ValueError: If two classes have one name.

    Example:
        >>> label(Row("line 1", {"label": "entailment"}), "label", ["entailment", "not_entailment"])
        0
        >>> label(Row("line 1", {"label": 2}), "label", ["1", "2"])
        1
        >>> label(Row("line 2", {"label": "2"}), "label", classes=2)
        Traceback (most recent call last):
        ...
        apportion.recipes.tasks.columns.BadRow: holds the label 2 in column 'label', which must lie in [0, 1]
    """
    found = value(row, column)
    places, counted = _places(tuple(labels or ()))
    for spelled in _spelled(found):
        if spelled in places:
            return places[spelled]
    # Where names are integers, one that is no name must not pass for a place among them.
    index = None if counted else _integer(found)
    if index is None:
        known = f"one of {', '.join(labels)}" if labels else "an integer; give the names as `data.labels=[...]`"
        raise BadRow(f"holds {short(found)} in column {column!r}, not {known}")
    top = classes or (len(labels) if labels else None)
    if index < 0 or (top is not None and index >= top):
        limits = f"[0, {top - 1}]" if top else "at least 0"
        raise BadRow(f"holds the label {index} in column {column!r}, which must {'lie in ' if top else 'be '}{limits}")
    return index


def distinct(labels: Sequence[str]) -> None:
    """Refuses names of classes of which two are the same: the second would have no rows.

    Raises:
        ValueError: If two are.

    Example:
        >>> distinct(["no", "yes", "no"])
        Traceback (most recent call last):
        ...
        ValueError: `data.labels=['no', 'yes', 'no']` names 'no' twice: give each class a name of its own.
    """
    if len(set(labels)) < len(labels):
        twice = next(name for name in labels if list(labels).count(name) > 1)
        raise ValueError(f"`data.labels={list(labels)}` names {twice!r} twice: give each class a name of its own.")


@lru_cache(maxsize=8)  # asked for each row
def _places(labels: tuple[str, ...]) -> tuple[dict[str, int], bool]:
    """The place of each name, and whether any of them is an integer."""
    distinct(labels)
    return {name: i for i, name in enumerate(labels)}, any(_integer(name) is not None for name in labels)


def _spelled(found: Any) -> list[str]:
    """How the name of a class may be written that a value stands for; JSON writes truth in small letters."""
    if isinstance(found, bool):
        return [str(found), str(found).lower()]
    if isinstance(found, Real) and not isinstance(found, Integral) and float(found).is_integer():
        return [str(found), str(int(float(found)))]
    return [str(found)] if isinstance(found, str | Real) else []


def _integer(found: Any) -> int | None:
    try:
        if isinstance(found, str):
            return int(found)
        return None if isinstance(found, bool) else operator.index(found)  # `int` would cut a fraction off
    except (TypeError, ValueError):
        return None


def short(found: Any) -> str:
    """A value and its type as messages show them, cut where it is long."""
    shown = repr(found)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} ({type(found).__name__})"
