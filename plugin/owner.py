"""The one owner of the param groups: who trains, and where the optimizer state of the others is.

Every selection on a model claims the parameters it decides about. A parameter trains if every claim over it selects it:

    trains(p) = all(p in claim.selected for claim in claims if p in claim.covered)

What does not train has ``requires_grad=False``, no gradient, no place in ``param_groups`` and no entry in
``optimizer.state``. The group dictionaries, their number and their order stay, so schedulers keep working; and
``optimizer.state_dict()`` always has the positions of the untouched optimizer, so that a run without any selection can
load it, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion import eligible
from apportion.master import Master, full_precision_copy
from apportion.positions import spread_out, take_in


@dataclass(eq=False)
class Claim:
    """What one selection decides about, and how.

    Attributes:
        covered: Names of the parameters it decides about.
        selected: Those that it selects now; all of them at first.
        state: Fate of the optimizer state of a parameter that stops training: ``drop``, ``keep`` or ``offload``.
        master: ``fp32`` for full-precision copies of selected half-precision parameters, or None.
    """

    covered: dict[nn.Parameter, str]
    selected: set[nn.Parameter]
    state: str
    master: str | None


@dataclass(eq=False)
class Slot:
    """A parameter's place: the optimizer that holds it, and what it has while it does not train."""

    optimizer: Optimizer
    trains: bool = True
    parked: dict[str, Any] | None = None
    devices: dict[str, torch.device] = field(default_factory=dict)
    master: Master | None = None


class Owner:
    """Owns the param groups of the optimizers of one training run.

    Args:
        optimizers: The optimizers, as built by the user over every parameter that may ever train.

    Raises:
        ValueError: If an optimizer cannot work on a changing list of parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        eligible.check(optimizers)
        self.optimizers = list(optimizers)
        self.claims: dict[str, Claim] = {}
        self.full: list[list[list[nn.Parameter]]] = [
            [list(g["params"]) for g in o.param_groups] for o in self.optimizers
        ]
        self.labels: list[list[list[str] | None]] = [
            [list(g["param_names"]) if "param_names" in g else None for g in o.param_groups] for o in self.optimizers
        ]
        self.slots: dict[nn.Parameter, Slot] = {
            p: Slot(o) for o, groups in zip(self.optimizers, self.full, strict=True) for g in groups for p in g
        }
        self._handles: list[Any] = []

    @classmethod
    def of(cls, optimizers: Sequence[Optimizer]) -> Owner:
        """The owner of ``optimizers``: a new one, or the one that another selection on the same run has made."""
        known = [owner for o in optimizers if (owner := getattr(o, "_apportion_owner", None)) is not None]
        if known and all(owner is known[0] for owner in known) and known[0].optimizers == list(optimizers):
            found: Owner = known[0]
            return found
        if known:
            raise ValueError(
                "`Owner.of(...)` was given optimizers that other selections share only in part: pass the same list."
            )
        return cls(optimizers)

    # What trains ------------------------------------------------------------------------------------------------------

    def claim(self, key: str, covered: Mapping[str, nn.Parameter], state: str, master: str | None) -> None:
        """Registers the selection ``key`` over ``covered``; until its first `select` all of them train.

        Raises:
            ValueError: If no optimizer holds a parameter, or two claims treat one parameter differently.
        """
        missing = [name for name, p in covered.items() if p not in self.slots]
        if missing:
            raise ValueError(
                f"No optimizer holds {len(missing)} of the {len(covered)} parameters that `{key}` selects from, such "
                f"as {', '.join(missing[:3])}: they would be unfrozen but never trained. Build the optimizer over all "
                "parameters that may ever train (in `configure_optimizers`, before anything is frozen), or exclude "
                "these from the units."
            )
        eligible.check_state(self.optimizers, state)
        for other, claim in self.claims.items():
            shared = [name for name, p in covered.items() if p in claim.covered]
            if other != key and shared and (claim.state, claim.master) != (state, master):
                raise ValueError(
                    f"`{key}` and `{other}` both decide about {shared[0]}, one with state={state!r}, "
                    f"master={master!r}, the other with state={claim.state!r}, master={claim.master!r}: give both the "
                    "same effect."
                )
        if not self._handles:
            self._attach()
        self.claims[key] = Claim({p: n for n, p in covered.items()}, set(covered.values()), state, master)

    def select(self, key: str, chosen: Iterable[nn.Parameter]) -> None:
        """Makes ``chosen`` what the selection ``key`` selects, and trains what all claims agree on."""
        claim = self.claims[key]
        claim.selected = set(chosen) & set(claim.covered)
        for p in claim.covered:
            slot = self.slots[p]
            trains = all(p in c.selected for c in self.claims.values() if p in c.covered)
            if slot.trains and not trains:
                self._park(p, slot, claim.state)
            elif trains and not slot.trains:
                self._revive(p, slot)
            if trains and slot.master is None and claim.master == "fp32" and p.dtype in (torch.bfloat16, torch.float16):
                self._give_master(p, slot)
        self.write_groups()

    def release(self, key: str, final: bool = True) -> None:
        """Drops the claim ``key``; the last one leaves ``requires_grad``, hooks and param groups as they were found.

        Args:
            key: The selection.
            final: Whether the run is over. A checkpoint may still be written after it, so kept state goes back to
                ``optimizer.state`` where it lies; otherwise it is brought back to the device of its parameter.
        """
        claim = self.claims.pop(key, None)
        if claim is None:
            return
        for p in claim.covered:
            slot = self.slots[p]
            if any(p in c.covered for c in self.claims.values()):
                continue
            if not slot.trains:
                self._revive(p, slot, move=not final)
            if slot.master is not None:
                self._take_master(p, slot, keep=final)
        if not self.claims:
            self.write_groups()
            for handle in self._handles:
                handle.remove()
            self._handles = []
            for optimizer in self.optimizers:
                del optimizer._apportion_owner  # type: ignore[attr-defined]
        else:
            for other in list(self.claims):
                self.select(other, self.claims[other].selected)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Shows the model as its user left it, while another selection looks for its units."""
        frozen = [p for p, slot in self.slots.items() if not slot.trains]
        for p in frozen:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def training(self) -> Iterator[nn.Parameter]:
        """The tensors that the optimizers step now (masters where there are any), in the optimizers' order."""
        for groups in self.full:
            for group in groups:
                for p in group:
                    if self.slots[p].trains:
                        yield self.leaf(p)

    def offloaded(self) -> Iterator[Tensor]:
        """Optimizer state that waits off the device for its parameter's next turn."""
        for p, slot in self.slots.items():
            if slot.parked and any(c.state == "offload" and p in c.covered for c in self.claims.values()):
                yield from (v for v in slot.parked.values() if isinstance(v, Tensor))

    # One parameter ----------------------------------------------------------------------------------------------------

    def leaf(self, p: nn.Parameter) -> nn.Parameter:
        """What stands in the param group for ``p``: its master if it has one, else itself."""
        master = self.slots[p].master
        return p if master is None else master.leaf

    def _park(self, p: nn.Parameter, slot: Slot, policy: str) -> None:
        state = slot.optimizer.state.pop(self.leaf(p), {})
        if slot.master is not None:
            state = {**state, "master": slot.master.leaf.detach()}
            slot.master.close()
            slot.master = None
        slot.trains, slot.parked = False, None
        p.requires_grad_(False)
        p.grad = None
        if state and policy != "drop":
            slot.devices = {k: v.device for k, v in state.items() if isinstance(v, Tensor)}
            slot.parked = {k: _to_host(v) if policy == "offload" else v for k, v in state.items()}

    def _revive(self, p: nn.Parameter, slot: Slot, move: bool = True) -> None:
        p.requires_grad_(True)
        slot.trains = True
        if slot.parked:
            state = dict(slot.parked)
            if move:
                state = {
                    k: v.to(slot.devices[k], non_blocking=True) if k in slot.devices else v for k, v in state.items()
                }
                master = state.pop("master", None)
                if master is not None:
                    slot.master = Master(p, master)
            if state:
                slot.optimizer.state[self.leaf(p)] = state
        slot.parked = None

    def _give_master(self, p: nn.Parameter, slot: Slot) -> None:
        state = slot.optimizer.state.pop(p, None)
        slot.master = Master(p, full_precision_copy(p))
        if state:  # of a run without masters
            slot.optimizer.state[slot.master.leaf] = _cast(state, p.dtype, torch.float32)

    def _take_master(self, p: nn.Parameter, slot: Slot, keep: bool) -> None:
        assert slot.master is not None
        state = slot.optimizer.state.pop(slot.master.leaf, {})
        if keep:
            state = {**state, "master": slot.master.leaf.detach()}
        elif state:  # the optimizer may go on without masters
            state = _cast(state, torch.float32, p.dtype)
        if state:
            slot.optimizer.state[p] = state
        slot.master.close()
        slot.master = None

    # The optimizers ---------------------------------------------------------------------------------------------------

    def write_groups(self, everything: bool = False) -> None:
        """Puts what trains, or ``everything``, into the param groups, in the order of the untouched optimizer."""
        for optimizer, groups, names in zip(self.optimizers, self.full, self.labels, strict=True):
            for group, params, labels in zip(optimizer.param_groups, groups, names, strict=True):
                keep = [everything or self.slots[p].trains for p in params]
                group["params"] = [self.leaf(p) for p, k in zip(params, keep, strict=True) if k]
                if labels is not None:
                    group["param_names"] = [n for n, k in zip(labels, keep, strict=True) if k]

    def _attach(self) -> None:
        for optimizer in self.optimizers:
            optimizer._apportion_owner = self  # type: ignore[attr-defined]
            self._handles += [
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_state_dict_post_hook(partial(spread_out, self)),
                optimizer.register_load_state_dict_pre_hook(partial(take_in, self)),
                optimizer.register_load_state_dict_post_hook(lambda _: self.write_groups()),
            ]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p, slot in self.slots.items():
            if slot.master is not None and slot.optimizer is optimizer:
                slot.master.write_through(p)


def _cast(state: dict[str, Any], old: torch.dtype, new: torch.dtype) -> dict[str, Any]:
    """Optimizer state in another precision; counts of steps, which are fp32 whatever the parameter is, stay."""
    return {k: v.to(new) if isinstance(v, Tensor) and v.dtype == old and k != "step" else v for k, v in state.items()}


def _to_host(value: Any) -> Any:
    """A pinned copy on the CPU of a tensor on an accelerator; anything else as it is."""
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return value
    host = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
    return host.copy_(value)
