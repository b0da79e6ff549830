"""Binds units to a model: chooses the layers and gives every parameter one owner."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from apportion.categories import GROUPS, matches, parameters
from apportion.discovery import Named, beside_language, inside, stacks, walk
from apportion.roles import ROLES, Surroundings
from apportion.types import Bound, Unit

if TYPE_CHECKING:
    from apportion.units import Layers


class Search:
    """Finds out which layers a model has, and which unit or role owns each parameter.

    Claims are made in this order, and the first claim on a tensor counts: embedding, layers, norms, head, the rest.

    Args:
        slot: What to look for.
        model: Where, without wrappers.
    """

    def __init__(self, slot: Layers, model: nn.Module) -> None:
        self.slot, self.model, self.call = slot, model, type(slot).__name__
        found = stacks(model)
        side = beside_language(model, found) if slot.towers == "language" else ()
        self.blocks = [block for stack in found for block in stack.blocks]
        self.side = [block for stack in side for block in stack.blocks]
        self.treatment = {"embedding": slot.embeddings, "norm": slot.norm, "head": slot.head, "other": "train"}
        self.owner: dict[int, tuple[str, str | None]] = {}
        self.shared: list[str] = []

    def bound(self) -> Bound:
        """The units and everything around them."""
        chosen = self._chosen()
        inner = self._kept([unit for i, (name, layer) in enumerate(chosen) for unit in self.slot.split(i, name, layer)])
        around = self._around(chosen)
        outer = {"embedding": self._claim(around["embedding"], "embedding")}
        layers = [_trainable(self._claim(unit)) for unit in inner]
        for role in ("norm", "head", "other"):
            outer[role] = self._claim(around[role], role)
        if not any(unit.params for unit in layers):
            outside = next((key for unit in outer.values() for key in _trainable(unit).params), None)
            beside = f" (what trains, such as {outside}, lies outside them)" if outside else ""
            raise ValueError(
                f"`{self.call}()` found {len(chosen)} layers, such as {chosen[0][0]}, but all their parameters are "
                f"frozen{beside}: set `requires_grad`, or add adapters, before the units are looked for."
            )
        self._check_own(inner, layers)
        for message in self.shared[:1]:
            more = f" (and {len(self.shared) - 1} more)" if len(self.shared) > 1 else ""
            warnings.warn(f"`{self.call}()`: {message}{more}.", stacklevel=4)
        trained = {role: _trainable(unit) for role, unit in outer.items()}
        ends = {role: [unit] if self.treatment[role] == "unit" else [] for role, unit in trained.items()}
        units = [*ends["embedding"], *layers, *ends["norm"], *ends["head"]]
        return Bound(
            tuple(unit for unit in units if unit.params),
            {k: p for role in ROLES if self.treatment[role] == "train" for k, p in trained[role].params.items()},
            {k: p for role in ROLES if self.treatment[role] == "freeze" for k, p in trained[role].params.items()},
            {role: tuple(outer[role].params) for role in ROLES},
        )

    def _check_own(self, offered: list[Unit], kept: list[Unit]) -> None:
        """Refuses units of which one holds all that trains, also what trains in the others."""
        without = [unit for unit, own in zip(offered, kept, strict=True) if not own.params and _trainable(unit).params]
        if without and sum(bool(unit.params) for unit in kept) == 1:
            key = next(iter(_trainable(without[0]).params))
            raise ValueError(
                f"`{self.call}()` found {len(without) + 1} units that hold the same trainable tensors, such as {key}: "
                "none has any of its own that could train without the others. Train them without a selection, or use "
                "adapters with tensors in each layer, such as LoRA's."
            )

    def _chosen(self) -> list[Named]:
        """The layers, before ``exclude``."""
        if self.slot.pattern is not None:
            return self._matching(self.slot.pattern)
        beside = {name for name, _ in self.side}
        if self.blocks:
            return [block for block in self.blocks if block[0] not in beside]
        raise ValueError(
            f"`{self.call}()` found no layers in `{type(self.model).__name__}`: no list of blocks with matrices or "
            f"convolutions. Lists met: {_shown(_lists(self.model))}. "
            f"Modules with parameters: {_shown(_owners(self.model))}. Name the layers yourself, "
            f"`{self.call}(pattern={_example(_owners(self.model))})`."
        )

    def _matching(self, pattern: str) -> list[Named]:
        chosen: list[Named] = []
        for name, module in walk(self.model):
            nested = chosen and inside(name, chosen[-1][0])  # parents come first
            if name and not nested and matches(pattern, name):
                chosen.append((name, module))
        if not chosen:
            names = [name for name, _ in self.blocks] or _owners(self.model)
            raise ValueError(
                f"`{self.call}(pattern={pattern!r})` matches no module of `{type(self.model).__name__}`: it must match "
                "the last parts of a dotted path as a whole, as "
                f"`pattern={_example(names)}` does. Names: {_shown(names)}."
            )
        return chosen

    def _kept(self, units: list[Unit]) -> list[Unit]:
        """The units that ``exclude`` leaves."""
        if self.slot.exclude is None:
            return units
        kept = [unit for unit in units if not _covered(self.slot.exclude, unit.name)]
        if not kept or len(kept) == len(units):
            raise ValueError(
                f"`{self.call}(exclude={self.slot.exclude!r})` matches {'none' if kept else 'all'} of the {len(units)} "
                f"units: it must match some, but not all, of {_shown([unit.name for unit in units])}."
            )
        return kept

    def _around(self, chosen: list[Named]) -> dict[str, Unit]:
        """What stands outside the layers, as one unit for each role; ``other`` is offered everything."""
        found = [b for b in self.blocks if not any(inside(b[0], name) for name, _ in chosen)]
        alone = [c for c in chosen if not any(inside(c[0], name) for name, _ in found)]
        parts = list(Surroundings(self.model, (*found, *alone), tuple(self.side)).parts())
        units = {"other": Unit("", parameters(self.model, ""), self.model, category="other", group="other")}
        for role in ("embedding", "norm", "head"):
            own = [part for part in parts if part.role == role]
            live = [part for part in own if any(p.requires_grad for p in part.params.values())]
            modules = [part.module for part in live if part.module is not None]
            units[role] = Unit(
                live[0].name if live else role,
                {key: p for part in own for key, p in part.params.items()},
                modules[0] if len(modules) == 1 else nn.ModuleList(modules),
                0 if role == "embedding" else len(chosen) - 1,
                role,
                GROUPS.get(role, "other"),
            )
        return units

    def _claim(self, unit: Unit, role: str | None = None) -> Unit:
        """The unit with what nobody claimed before."""
        mine: dict[str, nn.Parameter] = {}
        for key, p in unit.params.items():
            if id(p) not in self.owner:
                self.owner[id(p)] = (unit.name, role)
                mine[key] = p
            elif self.owner[id(p)][0] != unit.name and role != "other" and p.requires_grad:
                self._note(key, *self.owner[id(p)], role)
        return replace(unit, params=mine)

    def _note(self, key: str, owner: str, has: str | None, wants: str | None) -> None:
        """Remembers a shared tensor, if its users are treated differently."""
        if has is None or wants is None:
            self.shared.append(f"{key} is a tensor of {owner} too, and belongs to it alone")
        elif self.treatment[has] != self.treatment[wants]:
            self.shared.append(f"{key} is tied to the {has} {owner}, whose {self.treatment[has]!r} holds for both")


def _trainable(unit: Unit) -> Unit:
    return replace(unit, params={key: p for key, p in unit.params.items() if p.requires_grad})


def _covered(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the path ``name`` or a module that it lies in."""
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[: i + 1])) for i in range(len(parts)))


def _lists(model: nn.Module) -> list[str]:
    lists = ((name, m) for name, m in walk(model) if isinstance(m, nn.ModuleList | nn.Sequential))
    return [f"{name or 'the model itself'} ({len(m)} children)" for name, m in lists]


def _owners(model: nn.Module) -> list[str]:
    """Names of the modules that own parameters."""
    return [name for name, m in walk(model) if name and any(p is not None for p in m._parameters.values())]


def _shown(names: list[str], most: int = 8) -> str:
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
    )


def _example(names: list[str]) -> str:
    """A pattern that names three real modules."""
    return repr("|".join(re.escape(name) for name in names[:3]) or "name")
