"""The one owner of the param groups: who trains, and where the optimizer state of the others is.

Every selection on a model claims the parameters it decides about. A parameter trains if every claim over it selects it:

    trains(p) = all(p in claim.selected for claim in claims if p in claim.covered)

What does not train has ``requires_grad=False``, no gradient, no place in ``param_groups`` and no entry in
``optimizer.state``. The group dictionaries, their number and their order stay, so schedulers keep working; and
``optimizer.state_dict()`` always has the positions of the untouched optimizer, so that a run without any selection can
load it, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from apportion import claims, eligible
from apportion.claims import Claim, plain
from apportion.flags import Flags
from apportion.places import Slot, reshape
from apportion.positions import kept_beside, spread_out, take_in
from apportion.stores import Narrow, Picks

_HALF = (torch.bfloat16, torch.float16)
_CLAIMED: MutableMapping[nn.Parameter, ReferenceType[Owner]] = WeakIdKeyDictionary()
"""The owner that each parameter was last claimed by, in this process."""


class Owner:
    """Owns the param groups of the optimizers of one training run.

    Args:
        optimizers: The optimizers, as built by the user over every parameter that may ever train.

    Attributes:
        opened: What effects keep while they are open, by selection.
        averaged: Leaves whose gradients are averaged over ranks in another way at the present step.
        stepped: What selections do with an optimizer that has just stepped, its gradients still there, by selection.
        remembered: Gives what the scores of selections keep beside the optimizer's state, by selection.
        flags: Tells the user's ``requires_grad`` from that of the selections.

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
            p: Slot(p, o) for o, groups in zip(self.optimizers, self.full, strict=True) for g in groups for p in g
        }
        self.averaged: set[nn.Parameter] = set()
        self.opened: dict[str, Any] = {}
        self.stepped: dict[str, Callable[[Optimizer], None]] = {}
        self.remembered: dict[str, Callable[[], Iterable[Tensor]]] = {}
        self.flags = Flags(self.slots, self.claims)
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

    def adopt(self, optimizer: Optimizer) -> None:
        """Takes up param groups that were added to an optimizer since; what nobody selects from trains as before.

        Raises:
            ValueError: If one of their parameters has a place in the groups already, from which it is out at present.
        """
        which = self.optimizers.index(optimizer)
        known = len(self.full[which])
        for group in optimizer.param_groups[known:]:
            twice = [p for p in group["params"] if p in self.slots]
            if twice:
                del optimizer.param_groups[known:]
                raise ValueError(
                    f"`add_param_group(...)` was given {len(twice)} parameters, such as one of shape "
                    f"{tuple(twice[0].shape)}, that have their place in another group: what a selection holds back at "
                    "present comes back by itself. What was added is left out again; add only what is new."
                )
            known += 1
            self.full[which].append(list(group["params"]))
            self.labels[which].append(list(group["param_names"]) if "param_names" in group else None)
            self.slots.update({p: Slot(p, optimizer) for p in group["params"]})

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
        for optimizer in self.optimizers:
            self.adopt(optimizer)
        split = stores or {}
        apart = {*split, *ranks}
        claims.check(self, key, covered, state, master, split, apart)
        self._check_alone(key, covered)
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

    def _check_alone(self, key: str, covered: Mapping[str, nn.Parameter]) -> None:
        """Refuses parameters that a selection around other optimizers holds: one would move what the other froze."""
        for name, p in covered.items():
            known = _CLAIMED.get(p)
            other = None if known is None else known()
            theirs = [] if other is None or other is self else [k for k, c in other.claims.items() if p in c.covered]
            if theirs:
                raise ValueError(
                    f"`{plain(key)}` selects from {name}, which `{plain(theirs[0])}` around another optimizer "
                    "selects from: end that one first (`close()` of a `Selective`), or give both the same optimizers."
                )
        for p in covered.values():
            _CLAIMED[p] = ref(self)

    def move(self, key: str, indices: Mapping[nn.Parameter, Tensor], picks: Mapping[nn.Parameter, Picks]) -> None:
        """Makes ``indices`` the entries that train, of parameters that the selection ``key`` selects entries of.

        Args:
            key: The selection.
            indices: Sorted flat indices by parameter; parameters that are not named keep theirs.
            picks: Gradients of entries that join in the middle of a step, by parameter.
        """
        for p, index in indices.items():
            assert p in self.claims[key].narrow
            self.slots[p].move(index, picks.get(p))

    def vacate(self, key: str) -> None:
        """Forgets which entries the selection ``key`` has, so that none of them leaves when others are loaded."""
        for p in self.claims[key].narrow:
            self.slots[p].vacate()

    def poison(self, key: str) -> None:
        """Makes a gradient scaler skip the coming step, whose gradients have overflown, as it would for any other."""
        narrow = self.claims[key].narrow
        leaves = [self.narrow(p).leaf for p in narrow if self.slots[p].trains]
        if not any(leaf.numel() for leaf in leaves):  # nothing is selected yet: one entry stands in until the next step
            leaves = [nn.Parameter(torch.zeros(1, device=next(iter(narrow)).device))]
            self.optimizers[0].param_groups[0]["params"].append(leaves[0])
        for leaf in leaves:
            leaf.grad = torch.full_like(leaf, torch.inf)

    def resize(
        self, p: nn.Parameter, resized: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Gives a parameter, its copies and its optimizer state another shape; see `apportion.places.Slot.resize`."""
        if p in self.slots:
            self.slots[p].resize(resized, back)
        else:
            reshape(p, resized)

    def narrow(self, p: nn.Parameter) -> Narrow:
        """The store of a parameter of which single entries are selected."""
        return self.slots[p].narrow

    def select(self, key: str, chosen: Iterable[nn.Parameter]) -> None:
        """Makes ``chosen`` what the selection ``key`` selects, and trains what all claims agree on."""
        claim = self.claims[key]
        claim.selected = set(chosen) & set(claim.covered)
        for p in claim.covered:
            slot = self.slots[p]
            trains = self._agreed(p)
            if slot.trains and not trains:
                slot.park(claim.state)
            elif trains and not slot.trains:
                slot.revive()
            if trains and slot.store is None and claim.master == "fp32" and p.dtype in _HALF:
                slot.give_master()
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
        self.remembered.pop(key, None)
        if claim is None:
            return
        if final:
            self._keep_beside()
        for p in claim.covered:
            slot = self.slots[p]
            if p in claim.narrow:
                slot.close_narrow()
            if any(p in c.covered for c in self.claims.values()):
                continue
            if not slot.trains:
                slot.revive(move=not final)
            if slot.master is not None:
                slot.take_master(keep=final)
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
        for optimizer, groups in zip(self.optimizers, self.full, strict=True):
            self.adopt(optimizer)
            for group in groups:
                for p in group:
                    if self.slots[p].trains:
                        yield self.leaf(p)

    def displaced(self, key: str) -> bool:
        """Whether others stand, or may come to stand, in the param groups for what the selection ``key`` covers."""
        claim = self.claims[key]
        if claim.master == "fp32" and any(p.dtype in _HALF for p in claim.covered):
            return True
        return any(self.slots[p].leaf is not p for p in claim.narrow)

    def free(self, module: nn.Module, set_to_none: bool) -> None:
        """Frees the gradients of what steps in place of a module's parameters, or sets them to zero."""
        for p in module.parameters():
            leaf = self.leaf(p) if p in self.slots else p
            if leaf is p or leaf.grad is None:
                continue
            if set_to_none:
                leaf.grad = None
            else:
                leaf.grad.zero_()

    def offloaded(self) -> Iterator[Tensor]:
        """Optimizer state that waits off the device for its parameter's next turn."""
        for p, slot in self.slots.items():
            if slot.parked and any(c.state == "offload" and p in c.covered for c in self.claims.values()):
                yield from (v for v in slot.parked.values() if isinstance(v, Tensor))

    def beside(self) -> Iterator[Tensor]:
        """What stores hold beside the leaf (indices, ages, first values), and scores as large as what they look at."""
        for slot in self.slots.values():
            if slot.store is not None and slot.master is None:
                yield slot.narrow.index
                yield from slot.store.saved().values()
        for remembered in self.remembered.values():
            yield from remembered()

    # One parameter ----------------------------------------------------------------------------------------------------

    def leaf(self, p: nn.Parameter) -> nn.Parameter:
        """What stands in the param group for ``p``: its master if it has one, else itself."""
        return self.slots[p].leaf

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
            self.adopt(optimizer)
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
        self.adopt(optimizer)
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
