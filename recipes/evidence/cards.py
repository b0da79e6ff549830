"""What the runs say, written into the cards of the papers under the line that asks for it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from apportion.recipes.evidence.cells import Records
from apportion.recipes.evidence.methods import BY_KEY
from apportion.recipes.evidence.page import sentence
from apportion.recipes.evidence.tables import LAYOUTS, lines

_ASKS = re.compile(r"^<!-- evidence: (\w+) -->$", re.MULTILINE)
_TABLES = "[the tables](../../results/evidence/README.md)"


def said(records: Records, key: str) -> str:
    """What the runs say of the method ``key``: against chance, as a reference, or nothing."""
    method = BY_KEY.get(key)
    if method is None:
        return "Nothing on real data: its preset and its experiments run in the tests only, small."
    if method.bar is None:
        return f"It is a reference of {_TABLES}, not held to chance."
    found = {(grid, task): lines(records, grid, task) for grid, layout in LAYOUTS.items() for task in layout.tasks}
    told = sentence(method, found)
    if told.endswith(": not run."):
        return f"It was not held to {BY_KEY[method.bar].title} yet; see {_TABLES}."
    return f"At an equal budget, on small models and real text: {told} What ± and the words mean say {_TABLES}."


def fill(card: str, records: Records) -> str:
    """A card with what the runs say below the line that asks for it, in place of what stood there.

    Args:
        card: Markdown whose last part is ``<!-- evidence: METHOD -->`` on a line of its own, and what follows it.
        records: The cells that were run.
    """
    asks = _ASKS.search(card)
    if asks is None:
        return card
    wrapped = textwrap.wrap(said(records, asks[1]), 120, break_long_words=False, break_on_hyphens=False)
    return card[: asks.end()] + "\n\n" + "\n".join(wrapped) + "\n"


def write(records: Records, folder: Path) -> list[Path]:
    """Fills all cards of ``folder``; returns those that ask for evidence."""
    cards = sorted(path for path in folder.glob("*/README.md") if _ASKS.search(path.read_text(encoding="utf-8")))
    for path in cards:
        path.write_text(fill(path.read_text(encoding="utf-8"), records), encoding="utf-8")
    return cards
