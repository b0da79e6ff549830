"""A parameter's place: the optimizer that holds it, what stands in for it there, and where its state is meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion.master import Master, full_precision_copy
from apportion.stores import Narrow, Store


@dataclass(eq=False)
class Slot:
    """A parameter's place: the optimizer that holds it, and what it has while it does not train."""

    param: nn.Parameter
    optimizer: Optimizer
    trains: bool = True
    parked: dict[str, Any] | None = None
    devices: dict[str, torch.device] = field(default_factory=dict)
    store: Store | None = None
    resized: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None

    @property
    def master(self) -> Master | None:
        """The store, if it is of the whole parameter."""
        return self.store if isinstance(self.store, Master) else None

    @property
    def leaf(self) -> nn.Parameter:
        """What stands in the param group: the store's tensor if there is one, else the parameter itself."""
        return self.param if self.store is None else self.store.leaf

    @property
    def narrow(self) -> Narrow:
        """The store of a parameter of which single entries are selected."""
        assert self.store is not None
        return cast(Narrow, self.store)

    def park(self, policy: str) -> None:
        """Stops training: takes the optimizer's state away and treats it by ``policy``."""
        p = self.param
        state = self.optimizer.state.pop(self.leaf, {})
        if self.master is not None:
            state = {**state, "master": self.master.leaf.detach()}
            self.master.close()
            self.store = None
        self.leaf.grad = None
        self.trains, self.parked = False, None
        p.requires_grad_(False)
        p.grad = None
        if policy == "drop" and self.store is not None:
            self.narrow.forget()
        if state and policy != "drop":
            self.devices = {k: v.device for k, v in state.items() if isinstance(v, Tensor)}
            self.parked = {k: _to_host(v) if policy == "offload" else v for k, v in state.items()}

    def revive(self, move: bool = True) -> None:
        """Goes on training, with the state that was kept; ``move`` brings it back to its device."""
        self.param.requires_grad_(True)
        self.trains = True
        if self.parked:
            state = dict(self.parked)
            if move:
                state = {
                    k: v.to(self.devices[k], non_blocking=True) if k in self.devices else v for k, v in state.items()
                }
                master = state.pop("master", None)
                if master is not None:
                    self.store = Master(self.param, master)
            if state:
                self.optimizer.state[self.leaf] = state
        self.parked = None

    def give_master(self) -> None:
        """Trains through a full-precision copy from now on."""
        p = self.param
        state = self.optimizer.state.pop(p, None)
        self.store = Master(p, full_precision_copy(p))
        if state:  # of a run without masters
            self.optimizer.state[self.store.leaf] = _cast(state, p.dtype, torch.float32)

    def take_master(self, keep: bool) -> None:
        """Trains without the copy; ``keep`` leaves it in the optimizer's state, for a checkpoint."""
        assert self.master is not None
        state = self.optimizer.state.pop(self.master.leaf, {})
        if keep:
            state = {**state, "master": self.master.leaf.detach()}
        elif state:  # the optimizer may go on without masters
            state = _cast(state, torch.float32, self.param.dtype)
        if state:
            self.optimizer.state[self.param] = state
        self.master.close()
        self.store = None

    def move(self, index: Tensor, picks: Any) -> None:
        """Makes ``index`` the entries that train; see `apportion.stores.Narrow`."""
        store, index = self.narrow, index.to(self.param.device)
        if not self.trains:  # another selection holds it frozen
            store.move(self.param, index, self.parked or {}, None)
            return
        state = self.optimizer.state.pop(store.leaf, {})
        store.move(self.param, index, state, picks)
        if state:
            self.optimizer.state[store.leaf] = state

    def vacate(self) -> None:
        """Forgets which entries are selected, so that none of them leaves when others are loaded."""
        self.optimizer.state.pop(self.leaf, None)
        self.parked = None
        self.narrow.vacate()

    def close_narrow(self) -> None:
        """Trains as a whole again; state of entries is of no use then."""
        if self.store is None:  # the claim has failed before it was made
            return
        if self.store.leaf is not self.param:
            self.optimizer.state.pop(self.store.leaf, None)
        self.store.close()
        self.store, self.parked = None, None

    @torch.no_grad()
    def resize(self, resized: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None) -> None:
        """Gives the parameter, its copies and its optimizer state another shape.

        Args:
            resized: Makes the new tensor from an old one.
            back: The way back, while checkpoints hold the state in the old shape; None when they do no longer.
        """
        old = self.param.shape
        reshape(self.param, resized)
        leaf = self.leaf
        if leaf is not self.param:
            leaf.grad, leaf.data = None, resized(leaf.data)
        for state in (self.optimizer.state.get(leaf), self.parked):
            for key, value in (state or {}).items():
                if isinstance(value, Tensor) and value.shape == old:
                    state[key] = resized(value)  # type: ignore[index]
        self.resized = None if back is None else (resized, back)


def reshape(p: nn.Parameter, resized: Callable[[Tensor], Tensor]) -> None:
    """Gives a parameter another shape, in place."""
    data = resized(p.data)
    p.grad = None
    # Autograd remembers the shape of a leaf while any graph over it is alive; another dtype makes it forget.
    p.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    p.data = data


def _cast(state: dict[str, Any], old: torch.dtype, new: torch.dtype) -> dict[str, Any]:
    """Optimizer state in another precision; counts of steps, which are fp32 whatever the parameter is, stay."""
    return {k: v.to(new) if isinstance(v, Tensor) and v.dtype == old and k != "step" else v for k, v in state.items()}


def _to_host(value: Any) -> Any:
    """A pinned copy on the CPU of a tensor on an accelerator; anything else as it is."""
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return value
    host = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
    return host.copy_(value)
