"""Lifetimes of storages: when one is born, what it turns out to be, when it dies."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apportion.ledger import OFFLOADED, Held, Ledger

_FOLD = 100_000  # births and deaths held in the log at most


class Storages:
    """The storages that are alive on one type of device; births and deaths go to a ledger.

    Args:
        ledger: Where they are summed up.
        device: Device type to follow, or None as long as it is not known.
    """

    def __init__(self, ledger: Ledger, device: str | None = None) -> None:
        self.ledger, self.device = ledger, device
        self._live: dict[int, Held] = {}
        self._fresh: dict[int, Held] = {}  # born outside backward, and not met by it yet

    def see(self, tensor: Tensor, in_backward: bool) -> None:
        """Takes note of what an operator has returned."""
        storage = storage_of(tensor)
        if storage is None or tensor.device.type != self.device:
            return
        held = self._live.get(storage._cdata)
        if held is None:
            held = self._open(storage, None)
            if not in_backward:
                self._fresh[storage._cdata] = held
        elif held.bytes != storage.nbytes():
            self._reopen(storage, held, held.part)

    def cross(self) -> None:
        """Backward has come: what is alive of the forward pass, or of a recomputation, is kept for it."""
        for held in self._fresh.values():
            held.crossed = True
        self._fresh.clear()

    def _open(self, storage: torch.UntypedStorage, part: int | None) -> Held:
        key, held = storage._cdata, Held(storage.nbytes(), part)
        held.ref = weakref.ref(storage, lambda _: self._close(key, held))
        self._live[key] = held
        self.ledger.log.append((held, True))
        if len(self.ledger.log) > _FOLD:
            self.ledger.fold()
        return held

    def _close(self, key: int, held: Held) -> None:
        if held.dead:
            return
        held.dead = True
        self.ledger.log.append((held, False))
        if self._live.get(key) is held:
            del self._live[key]
            self._fresh.pop(key, None)

    def _reopen(self, storage: torch.UntypedStorage, held: Held, part: int | None) -> None:
        self._close(storage._cdata, held)
        self._open(storage, part)

    def claim(self, tensor: Tensor, part: int) -> None:
        """Says what a storage is. The first claim stays, but state moves off the device and back."""
        storage = storage_of(tensor)
        if storage is None or (part != OFFLOADED and tensor.device.type != self.device):
            return
        held = self._live.get(storage._cdata)
        if held is None:
            self._open(storage, part)
        elif held.part is None:
            held.part = part
        elif held.part != part and OFFLOADED in (held.part, part):
            self._reopen(storage, held, part)


_ALLOCATES: dict[Any, bool] = {}


def allocates(func: Any) -> bool:
    """Whether an operator can return memory that is not its arguments': views and in-place operators cannot."""
    known = _ALLOCATES.get(func)
    if known is None:
        returns = func._schema.returns
        known = _ALLOCATES[func] = any(r.alias_info is None or "out" in func._overloadname for r in returns)
    return known


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage behind a tensor, or None for one that has none of its own (sparse tensors, wrappers)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
