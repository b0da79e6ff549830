"""What a selection was made on, which must be there again, and what with, which may have changed if that is said.

names, sizes    must be those of the model            an error (sizes where entries are selected)
slots, seed     may differ from the saved ones        a warning: what is chosen already stays, what comes follows
                                                      the slots given now
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from apportion.types import Bound

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def written(slots: Any, seed: int) -> dict[str, str]:
    """The slots and the seed as text that is the same in every process, by argument.

    Args:
        slots: The `apportion.selection.Slots`.
        seed: The seed.
    """
    return {**{key: _ADDRESS.sub("", repr(value)) for key, value in vars(slots).items()}, "seed": repr(seed)}


def compare(saved: Mapping[str, str] | None, now: Mapping[str, str], label: str) -> None:
    """Warns if a selection goes on with other slots than it was saved with.

    Args:
        saved: What `written` gave when it was saved; None in a file of an earlier version.
        now: What it gives now.
        label: The selection.
    """
    others = [key for key in now if saved is not None and key in saved and saved[key] != now[key]]
    if saved is None or not others:
        return
    told = "; ".join(f"{key} was `{saved[key]}` and is `{now[key]}`" for key in others)
    warnings.warn(
        f"`{label}` goes on from a selection that was saved with other arguments: {told}. What is selected "
        "already stays until the next selection, if there is one; all else goes by the new arguments. To select anew, "
        "load the weights alone.",
        stacklevel=4,
    )


def check(names: Sequence[str] | None, sizes: Sequence[int] | None, bound: Bound, label: str) -> None:
    """Refuses units that are not those that a selection was made on.

    Args:
        names: Their names; None if it has not been made on any.
        sizes: Entries of each, where entries are selected; None if that is not known.
        bound: The units found now.
        label: The selection.

    Raises:
        ValueError: If names or sizes differ.
    """
    if names is None:
        return
    way_out = "resume with the same model and the same `units`, or give this model a callback of its own."
    if list(bound.names) != list(names):
        raise ValueError(
            f"The selection of `{label}` was made on {len(names)} units ({', '.join(names[:3])} ...), this model has "
            f"{len(bound.names)} ({', '.join(bound.names[:3])} ...): {way_out}"
        )
    if sizes is None or list(sizes) == bound.sizes.tolist():
        return
    name, was, now = next((n, a, b) for n, a, b in zip(names, sizes, bound.sizes.tolist(), strict=True) if a != b)
    raise ValueError(
        f"The selection of `{label}` was made on a unit {name} of {was} entries, this model's has {now}: {way_out}"
    )
