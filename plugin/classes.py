"""Classes told by name: what they are from may be in two packages, or not be installed."""

from __future__ import annotations

from typing import Any


def kinds(thing: Any) -> set[str]:
    """Names of the class of ``thing`` and of all that it inherits from.

    Example:
        >>> sorted(kinds(True))
        ['bool', 'int', 'object']
    """
    return {kind.__name__ for kind in type(thing).__mro__}
