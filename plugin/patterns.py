"""Names of layers as the regular expressions that PEFT's configurations take."""

from __future__ import annotations

import re
from collections.abc import Iterable


def exactly(name: str) -> str:
    r"""A key of ``rank_pattern`` or ``alpha_pattern`` that matches this layer, and none whose name ends like it.

    Example:
        >>> exactly("layers.0.q_proj")
        '^layers\\.0\\.q_proj'
    """
    return "^" + re.escape(name)


def any_of(names: Iterable[str]) -> str:
    r"""One pattern for ``target_modules`` that matches these layers as a whole; a list would match ends of names.

    Example:
        >>> any_of(["layers.0.q_proj", "layers.1.q_proj"])
        'layers\\.0\\.q_proj|layers\\.1\\.q_proj'
    """
    return "|".join(re.escape(name) for name in names)
