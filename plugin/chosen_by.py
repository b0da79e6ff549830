"""The weights that the first selection of a fit was made by, which must still be there when training begins.

The first selection comes before the hooks of the LightningModule in which some load weights: it would have been made by
those from before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from apportion.entry_selection import EntryHistory
from apportion.selection import History
from apportion.stores import stamp


def decided(history: History | EntryHistory) -> bool:
    """Whether the last selection left anything out: else any weights would have had the same."""
    if isinstance(history, EntryHistory):
        return not torch.equal(history.counts[-1], history.sizes)
    return not bool(history.masks[-1].all())


class ChosenBy:
    """What was seen of some parameters.

    Args:
        covered: The parameters that a selection decides about, with their names.

    Example:
        >>> p = nn.Parameter(torch.ones(2))
        >>> seen = ChosenBy({p: "w"})
        >>> with torch.no_grad():
        ...     _ = p.mul_(2)
        >>> seen.check("LIFT")
        Traceback (most recent call last):
        ...
        RuntimeError: `LIFT` has chosen by weights that were replaced before training began, such as w: ...
    """

    def __init__(self, covered: Mapping[nn.Parameter, str]) -> None:
        self._seen = [(name, p, stamp(p), _norm(p)) for p, name in covered.items()]

    def check(self, label: str) -> None:
        """Refuses other weights than those that were seen; to put them aside and back, as averages do, is none.

        Args:
            label: The selection.

        Raises:
            RuntimeError: If a parameter has other values.
        """
        for name, p, before, norm in self._seen:
            if stamp(p) != before and _norm(p) != norm:
                raise RuntimeError(
                    f"`{label}` has chosen by weights that were replaced before training began, such as {name}: load "
                    "them in `__init__`, `setup` or `configure_model`, or before `fit`, and not in `on_fit_start` or "
                    "`on_train_start`."
                )


def _norm(p: nn.Parameter) -> float:
    return float(torch.linalg.vector_norm(p.detach(), dtype=torch.promote_types(p.dtype, torch.float32)))
