"""What goes with each kind of unit: the selection that keeps track of it, and what it does in the window of a step."""

from __future__ import annotations

from typing import Any

from apportion.entry_selection import EntrySelection
from apportion.owner import Owner
from apportion.rank_selection import RankSelection
from apportion.rank_window import RankWindow
from apportion.selection import Selection, Slots
from apportion.windows import Stage, Window

_SELECTIONS: dict[str, type[Selection]] = {"unit": Selection, "entry": EntrySelection, "rank": RankSelection}
_STAGES: dict[str, Any] = {"entry": Window, "rank": RankWindow}


def selection_of(slots: Slots, seed: int, label: str) -> Selection:
    """A selection with these slots that has seen nothing yet."""
    return _SELECTIONS[slots.grain](slots, seed, label)


def stage_of(owner: Owner, key: str, selection: Selection) -> Stage:
    """What ``selection``, bound and open under ``key``, does in the windows of the steps."""
    make = _STAGES.get(selection.slots.grain)
    return Stage() if make is None else make(owner, key, selection, selection.slots.effect)
