"""The one owner of the param groups: who trains, and where the optimizer state of the others is.

Every selection on a model claims the parameters it decides about. A parameter trains if every claim over it selects it:

    trains(p) = all(p in claim.selected for claim in claims if p in claim.covered)

What does not train has ``requires_grad=False``, no gradient, no place in ``param_groups`` and no entry in
``optimizer.state``. The group dictionaries, their number and their order stay, so schedulers keep working; and
``optimizer.state_dict()`` always has the positions of the untouched optimizer, so that a run without any selection can
load it, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion import eligible
from apportion.master import Master, full_precision_copy
from apportion.positions import kept_beside, spread_out, take_in
from apportion.stores import Narrow, Picks, Store


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


@dataclass(eq=False)
class Slot:
    """A parameter's place: the optimizer that holds it, and what it has while it does not train."""

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


class Owner:
    """Owns the param groups of the optimizers of one training run.

    Args:
        optimizers: The optimizers, as built by the user over every parameter that may ever train.

    Attributes:
        opened: What effects keep while they are open, by selection.
        averaged: Leaves whose gradients are averaged over ranks in another way at the present step.
        stepped: What selections do with an optimizer that has just stepped, its gradients still there, by selection.

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
        self.averaged: set[nn.Parameter] = set()
        self.opened: dict[str, Any] = {}
        self.stepped: dict[str, Callable[[Optimizer], None]] = {}
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

    def claim(
        self,
        key: str,
        covered: Mapping[str, nn.Parameter],
        state: str,
        master: str | None,
        stores: Mapping[str, Callable[[nn.Parameter], Narrow]] | None = None,
        ranks: Collection[str] = (),
    ) -> None:
        """Registers the selection ``key`` over ``covered``; until its first `select` all of them train.

        Args:
            key: The selection.
            covered: The parameters it decides about, by name.
            state: See `Claim`.
            master: See `Claim`.
            stores: Of parameters of which single entries are selected, by name: makes the store. None of the entries
                trains until `move`.
            ranks: Names of parameters of which ranks are selected.

        Raises:
            ValueError: If no optimizer holds a parameter, or two claims treat one parameter differently.
        """
        split = stores or {}
        apart = {*split, *ranks}
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
            shared = [name for name in shared if name not in apart and covered[name] not in claim.alone]
            if (
                split or claim.narrow
            ):  # what is not split there trains at every step or at none: no state to disagree on
                continue
            if other != key and shared and (claim.state, claim.master) != (state, master):
                raise ValueError(
                    f"`{key}` and `{other}` both decide about {shared[0]}, one with state={state!r}, "
                    f"master={master!r}, the other with state={claim.state!r}, master={claim.master!r}: give both the "
                    "same effect."
                )
        self._check_copies(key, covered, split, master)
        for name in (name for name in covered if name in apart):
            self._check_apart(key, name, covered[name])
        if not self._handles:
            self._attach()
        narrow = {covered[name] for name in split}
        alone = {covered[name] for name in apart}
        self.claims[key] = Claim(
            {p: n for n, p in covered.items()}, set(covered.values()), state, master, narrow, alone
        )
        with self.thawed():  # autograd takes no hook on a parameter that another selection holds frozen
            for name, make in split.items():
                self.slots[covered[name]].store = make(covered[name])
        for p in narrow:
            slot = self.slots[p]
            if self.leaf(p) is not p:  # state of the whole tensor, from before
                slot.optimizer.state.pop(p, None)
                slot.parked = None
        if narrow:
            self.write_groups()

    def _check_apart(self, key: str, name: str, p: nn.Parameter) -> None:
        for other, claim in self.claims.items():
            if p in claim.alone:
                raise ValueError(
                    f"`{key}` and `{other}` both select entries or ranks of {name}: give each parameter to one of "
                    "them, by `pattern=` or `exclude=`."
                )
        if self.slots[p].store is not None:
            raise ValueError(_COPIED.format(entries=key, name=name, whole="another selection"))

    def _check_copies(
        self, key: str, covered: Mapping[str, nn.Parameter], split: Iterable[str], master: str | None
    ) -> None:
        """Refuses full-precision copies of tensors of which entries are selected, whichever came first."""
        for name, p in covered.items():
            if p.dtype not in (torch.bfloat16, torch.float16):
                continue
            for other, claim in self.claims.items():
                if p in claim.narrow and not split and master == "fp32":
                    raise ValueError(_COPIED.format(entries=other, name=name, whole=f"`{key}`"))
                if name in split and p in claim.covered and not claim.narrow and claim.master == "fp32":
                    raise ValueError(_COPIED.format(entries=key, name=name, whole=f"`{other}`"))

    def move(self, key: str, indices: Mapping[nn.Parameter, Tensor], picks: Mapping[nn.Parameter, Picks]) -> None:
        """Makes ``indices`` the entries that train, of parameters that the selection ``key`` selects entries of.

        Args:
            key: The selection.
            indices: Sorted flat indices by parameter; parameters that are not named keep theirs.
            picks: Gradients of entries that join in the middle of a step, by parameter.
        """
        narrow = self.claims[key].narrow
        for p, index in indices.items():
            assert p in narrow
            slot, store = self.slots[p], self.narrow(p)
            if slot.trains:
                state = slot.optimizer.state.pop(store.leaf, {})
                store.move(p, index.to(p.device), state, picks.get(p))
                if state:
                    slot.optimizer.state[store.leaf] = state
            else:  # another selection holds it frozen
                store.move(p, index.to(p.device), slot.parked or {}, None)

    def vacate(self, key: str) -> None:
        """Forgets which entries the selection ``key`` has, so that none of them leaves when others are loaded."""
        for p in self.claims[key].narrow:
            slot, store = self.slots[p], self.narrow(p)
            slot.optimizer.state.pop(store.leaf, None)
            slot.parked = None
            store.vacate()

    def poison(self, key: str) -> None:
        """Makes a gradient scaler skip the coming step, whose gradients have overflown, as it would for any other."""
        narrow = self.claims[key].narrow
        leaves = [self.narrow(p).leaf for p in narrow if self.slots[p].trains]
        if not any(leaf.numel() for leaf in leaves):  # nothing is selected yet: one entry stands in until the next step
            leaves = [nn.Parameter(torch.zeros(1, device=next(iter(narrow)).device))]
            self.optimizers[0].param_groups[0]["params"].append(leaves[0])
        for leaf in leaves:
            leaf.grad = torch.full_like(leaf, torch.inf)

    @torch.no_grad()
    def resize(
        self, p: nn.Parameter, resized: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Gives a parameter, its copies and its optimizer state another shape.

        Args:
            p: The parameter.
            resized: Makes the new tensor from an old one.
            back: The way back, while checkpoints hold the state in the old shape; None when they do no longer.
        """
        old, data = p.shape, resized(p.data)
        p.grad = None
        # Autograd remembers the shape of a leaf while any graph over it is alive; another dtype makes it forget.
        p.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
        p.data = data
        slot = self.slots.get(p)
        if slot is None:
            return
        leaf = self.leaf(p)
        if leaf is not p:
            leaf.grad, leaf.data = None, resized(leaf.data)
        for state in (slot.optimizer.state.get(leaf), slot.parked):
            for key, value in (state or {}).items():
                if isinstance(value, Tensor) and value.shape == old:
                    state[key] = resized(value)  # type: ignore[index]
        slot.resized = None if back is None else (resized, back)

    def narrow(self, p: nn.Parameter) -> Narrow:
        """The store of a parameter of which single entries are selected."""
        store = self.slots[p].store
        assert store is not None
        return cast(Narrow, store)

    def select(self, key: str, chosen: Iterable[nn.Parameter]) -> None:
        """Makes ``chosen`` what the selection ``key`` selects, and trains what all claims agree on."""
        claim = self.claims[key]
        claim.selected = set(chosen) & set(claim.covered)
        for p in claim.covered:
            slot = self.slots[p]
            trains = self._agreed(p)
            if slot.trains and not trains:
                self._park(p, slot, claim.state)
            elif trains and not slot.trains:
                self._revive(p, slot)
            if trains and slot.store is None and claim.master == "fp32" and p.dtype in (torch.bfloat16, torch.float16):
                self._give_master(p, slot)
        self.write_groups()

    def _agreed(self, p: nn.Parameter) -> bool:
        """Whether all claims want ``p`` to train; what one selection of entries leaves out, another may select from."""
        split = any(p in claim.narrow for claim in self.claims.values())
        return all(p in c.selected or (split and c.narrow) for c in self.claims.values() if p in c.covered)

    def release(self, key: str, final: bool = True) -> None:
        """Drops the claim ``key``; the last one leaves ``requires_grad``, hooks and param groups as they were found.

        Args:
            key: The selection.
            final: Whether the run is over. A checkpoint may still be written after it, so kept state goes back to
                ``optimizer.state`` where it lies; otherwise it is brought back to the device of its parameter.
        """
        claim = self.claims.pop(key, None)
        self.stepped.pop(key, None)
        if claim is None:
            return
        if final:
            self._keep_beside()
        for p in claim.covered:
            slot = self.slots[p]
            if p in claim.narrow:
                self._close_narrow(p, slot)
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

    def beside(self) -> Iterator[Tensor]:
        """What stores hold beside the leaf: indices, ages, first values."""
        for slot in self.slots.values():
            if slot.store is not None and slot.master is None:
                yield cast(Narrow, slot.store).index
                yield from slot.store.saved().values()

    # One parameter ----------------------------------------------------------------------------------------------------

    def leaf(self, p: nn.Parameter) -> nn.Parameter:
        """What stands in the param group for ``p``: its master if it has one, else itself."""
        store = self.slots[p].store
        return p if store is None else store.leaf

    def _park(self, p: nn.Parameter, slot: Slot, policy: str) -> None:
        state = slot.optimizer.state.pop(self.leaf(p), {})
        if slot.master is not None:
            state = {**state, "master": slot.master.leaf.detach()}
            slot.master.close()
            slot.store = None
        self.leaf(p).grad = None
        slot.trains, slot.parked = False, None
        p.requires_grad_(False)
        p.grad = None
        if policy == "drop" and slot.store is not None:
            self.narrow(p).forget()
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
                    slot.store = Master(p, master)
            if state:
                slot.optimizer.state[self.leaf(p)] = state
        slot.parked = None

    def _give_master(self, p: nn.Parameter, slot: Slot) -> None:
        state = slot.optimizer.state.pop(p, None)
        slot.store = Master(p, full_precision_copy(p))
        if state:  # of a run without masters
            slot.optimizer.state[slot.store.leaf] = _cast(state, p.dtype, torch.float32)

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
        slot.store = None

    def _close_narrow(self, p: nn.Parameter, slot: Slot) -> None:
        if slot.store is None:  # the claim has failed before it was made
            return
        if slot.store.leaf is not p:
            slot.optimizer.state.pop(slot.store.leaf, None)  # of entries, which a whole parameter cannot go on with
        slot.store.close()
        slot.store, slot.parked = None, None

    def _keep_beside(self) -> None:
        """A checkpoint may still be written when the run is over: its optimizers go on telling of selected entries."""
        for optimizer in self.optimizers:
            beside = kept_beside(self, optimizer)
            if beside:
                hook = optimizer.register_state_dict_post_hook(partial(_with_entries, beside))
                optimizer._apportion_left = hook  # type: ignore[attr-defined]

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
            left = getattr(optimizer, "_apportion_left", None)
            if left is not None:
                left.remove()
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_state_dict_post_hook(partial(spread_out, self)),
                optimizer.register_load_state_dict_pre_hook(partial(take_in, self)),
                optimizer.register_load_state_dict_post_hook(lambda _: self.write_groups()),
            ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._gradients_are_there(optimizer)
            return None

        def closed() -> Any:  # Lightning's training step and backward pass run in here
            loss = closure()
            self._gradients_are_there(optimizer)
            return loss

        return (args[:1], {**kwargs, "closure": closed})

    def _gradients_are_there(self, optimizer: Optimizer) -> None:
        for p, slot in self.slots.items():
            if slot.store is not None and slot.optimizer is optimizer and slot.trains:
                slot.store.before_step(p)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p, slot in self.slots.items():
            if slot.store is not None and slot.optimizer is optimizer and slot.trains:
                slot.store.write_through(p)
        for look in self.stepped.values():
            look(optimizer)


def _with_entries(beside: dict[int, Any], optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "entries": beside}


_COPIED = (
    "`{entries}` selects entries of {name}, of which {whole} keeps a full-precision copy: entries have one of their "
    "own, so leave `master` out there."
)


def _cast(state: dict[str, Any], old: torch.dtype, new: torch.dtype) -> dict[str, Any]:
    """Optimizer state in another precision; counts of steps, which are fp32 whatever the parameter is, stay."""
    return {k: v.to(new) if isinstance(v, Tensor) and v.dtype == old and k != "step" else v for k, v in state.items()}


def _to_host(value: Any) -> Any:
    """A pinned copy on the CPU of a tensor on an accelerator; anything else as it is."""
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return value
    host = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
    return host.copy_(value)
