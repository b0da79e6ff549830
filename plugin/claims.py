"""What selections decide about, and what two of them cannot both have."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from apportion import eligible

if TYPE_CHECKING:
    from apportion.owner import Owner


def plain(key: str) -> str:
    """A selection as its user knows it.

    Args:
        key: That of its state in a checkpoint, or of a `Selective`.

    Example:
        >>> plain("LISA{'name': None}"), plain("LISA{'name': 'a'}"), plain("LISA@7f3a")
        ('LISA', "LISA(name='a')", 'LISA')
    """
    label, _, settings = key.partition("@")[0].partition("{")
    named = re.search(r"'name': '(.*)'", settings)
    return f"{label}(name={named[1]!r})" if named else label


@dataclass(eq=False)
class Claim:
    """What one selection decides about, and how.

    Attributes:
        covered: Names of the parameters it decides about.
        selected: Those that it selects now; all of them at first.
        state: Fate of the optimizer state of a parameter that stops training: ``drop``, ``keep`` or ``offload``.
        master: ``fp32`` for full-precision copies of selected half-precision parameters, or None.
        narrow: Those of which it selects single entries.
        alone: Those that no other selection may take apart: of which it selects entries or ranks.
    """

    covered: dict[nn.Parameter, str]
    selected: set[nn.Parameter]
    state: str
    master: str | None
    narrow: set[nn.Parameter] = field(default_factory=set)
    alone: set[nn.Parameter] = field(default_factory=set)


_COPIED = (
    "`{entries}` selects entries of {name}, of which {whole} keeps a full-precision copy: entries have one of their "
    "own, so leave `master` out there."
)


def check(
    owner: Owner,
    key: str,
    covered: Mapping[str, nn.Parameter],
    state: str,
    master: str | None,
    split: Collection[str],
    apart: Collection[str],
) -> None:
    """Refuses a claim that the optimizers or the other claims rule out.

    Args:
        owner: The owner, with the claims made so far.
        key: The selection.
        covered: The parameters it decides about, by name.
        state: See `Claim`.
        master: See `Claim`.
        split: Names of parameters of which it selects entries.
        apart: Names of parameters of which it selects entries or ranks.

    Raises:
        ValueError: If no optimizer holds a parameter, or two claims treat one parameter differently.
    """
    missing = [name for name, p in covered.items() if p not in owner.slots]
    if missing:
        raise ValueError(
            f"No optimizer holds {len(missing)} of the {len(covered)} parameters that `{plain(key)}` selects from, "
            f"such as {', '.join(missing[:3])}: they would be unfrozen but never trained. Build the optimizer over all "
            "parameters that may ever train (in `configure_optimizers`, before anything is frozen), or exclude "
            "these from the units."
        )
    eligible.check_state(owner.optimizers, state)
    for other, claim in owner.claims.items():
        if split or claim.narrow:  # what is not split there trains always or never: no state to disagree on
            continue
        shared = [
            name
            for name, p in covered.items()
            if p in claim.covered and name not in apart and covered[name] not in claim.alone
        ]
        if other != key and shared and (claim.state, claim.master) != (state, master):
            raise ValueError(
                f"`{plain(key)}` and `{plain(other)}` both decide about {shared[0]}, one with state={state!r}, "
                f"master={master!r}, the other with state={claim.state!r}, master={claim.master!r}: give both the "
                "same effect."
            )
    _check_copies(owner, key, covered, split, master)
    for name in (name for name in covered if name in apart):
        _check_apart(owner, key, name, covered[name])


def _check_apart(owner: Owner, key: str, name: str, p: nn.Parameter) -> None:
    for other, claim in owner.claims.items():
        if p in claim.alone:
            raise ValueError(
                f"`{plain(key)}` and `{plain(other)}` both select entries or ranks of {name}: give each "
                "parameter to one of them, by `pattern=` or `exclude=`."
            )
    if owner.slots[p].store is not None:
        raise ValueError(_COPIED.format(entries=plain(key), name=name, whole="another selection"))


def _check_copies(
    owner: Owner, key: str, covered: Mapping[str, nn.Parameter], split: Collection[str], master: str | None
) -> None:
    """Refuses full-precision copies of tensors of which entries are selected, whichever came first."""
    for name, p in covered.items():
        if p.dtype not in (torch.bfloat16, torch.float16):
            continue
        for other, claim in owner.claims.items():
            if p in claim.narrow and not split and master == "fp32":
                raise ValueError(_COPIED.format(entries=plain(other), name=name, whole=f"`{plain(key)}`"))
            if name in split and p in claim.covered and not claim.narrow and claim.master == "fp32":
                raise ValueError(_COPIED.format(entries=plain(key), name=name, whole=f"`{plain(other)}`"))
