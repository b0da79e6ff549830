"""Optimizer state in checkpoints: every parameter at the position it has in the untouched optimizer.

An optimizer numbers the parameters of its state by their place in the param groups. Ours hold only what trains, so a
state dict is spread out over the full groups when it is saved, and taken in again when it is loaded. Hence a run
without any selection loads it, and the other way round; state kept for unselected parameters, and masters, travel with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apportion.stores import digest

if TYPE_CHECKING:
    from apportion.owner import Owner
    from apportion.stores import Narrow


def _numbered(owner: Owner, optimizer: Optimizer) -> Iterator[tuple[int, nn.Parameter]]:
    owner.adopt(optimizer)
    groups = owner.full[owner.optimizers.index(optimizer)]
    yield from enumerate(p for group in groups for p in group)


def spread_out(owner: Owner, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every parameter at its full position, with kept state and masters.

    Args:
        owner: Knows who trains and what is parked.
        optimizer: One of its optimizers.
        state_dict: What the optimizer gives, numbered by what trains now.
    """
    packed = {k: i for i, k in enumerate(k for g in optimizer.param_groups for k in g["params"])}
    state: dict[Any, Any] = {k: v for k, v in state_dict["state"].items() if not isinstance(k, int)}
    beside = kept_beside(owner, optimizer)
    for i, p in _numbered(owner, optimizer):
        slot = owner.slots[p]
        if i in beside and owner.leaf(p) is not p:
            continue
        found = state_dict["state"].get(packed.get(owner.leaf(p), -1)) if slot.trains else slot.parked
        master = {"master": slot.master.leaf.detach()} if slot.master is not None else {}
        if found or master:
            state[i] = _reshaped({**(found or {}), **master}, slot.resized and slot.resized[1], p.shape, same=True)
    groups, start = [], 0
    which = owner.optimizers.index(optimizer)
    for group, full, labels in zip(state_dict["param_groups"], owner.full[which], owner.labels[which], strict=True):
        extra = {"param_names": list(labels)} if labels is not None else {}
        groups.append({**group, "params": list(range(start, start + len(full))), **extra})
        start += len(full)
    return {**state_dict, "state": state, "param_groups": groups} | ({"entries": beside} if beside else {})


def kept_beside(owner: Owner, optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """State of parameters of which single entries are selected, by full position.

    It stands beside the state of whole parameters, where an optimizer without the selection passes it over. ``index``
    is a digest of the entries that it is of.
    """
    beside: dict[int, dict[str, Any]] = {}
    for i, p in _numbered(owner, optimizer):
        slot = owner.slots[p]
        if slot.store is not None and slot.master is None:
            beside[i] = slot.store.saved()
            if slot.store.leaf is not p:
                state = optimizer.state.get(slot.store.leaf) or slot.parked or {}
                beside[i] = {"index": digest(slot.narrow.index), **state, **beside[i]}
    return beside


def take_in(owner: Owner, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What is left for the optimizer to load, once state of parameters that do not train and masters are taken out.

    The param groups are full afterwards, as loading goes by position; they must be written anew when it has ended.

    Args:
        owner: Takes what the optimizer itself cannot.
        optimizer: One of its optimizers.
        state_dict: A state dict with full positions.

    Raises:
        ValueError: If its groups are of other sizes.
    """
    owner.adopt(optimizer)
    full = [len(group) for group in owner.full[owner.optimizers.index(optimizer)]]
    saved = [len(group["params"]) for group in state_dict["param_groups"]]
    if saved != full:
        raise ValueError(
            f"The checkpoint's optimizer has groups of {saved} parameters, this one of {full}: resume with the "
            "`configure_optimizers` of the interrupted run, or load the weights alone."
        )
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    state = dict(state_dict["state"])
    beside = state_dict.get("entries", {})
    for i, p in _numbered(owner, optimizer):
        slot, found = owner.slots[p], state.pop(ids[i], None)
        slot.parked = None
        if slot.store is not None and slot.master is None:
            found = _entries(slot.narrow, p, found, beside.get(i, {}))
        if found:
            found = _reshaped(found, slot.resized and slot.resized[0], p.shape, same=False)
        if found and slot.trains:
            master = found.get("master")
            if master is not None and slot.master is not None:
                slot.master.restore(p, {"master": master})
            rest = {k: v for k, v in found.items() if k != "master"}
            if rest:
                state[ids[i]] = rest
        elif found:
            _park(owner, p, found)
    owner.write_groups(everything=True)
    return {k: v for k, v in state_dict.items() if k != "entries"} | {"state": state}


def _entries(
    store: Narrow, p: nn.Parameter, whole: dict[str, Any] | None, beside: dict[str, Any]
) -> dict[str, Any] | None:
    """The optimizer's state for the store of single entries, which takes up what else was saved with it.

    Raises:
        ValueError: If it was saved of other entries. Files from before 0.1.0 do not tell, but for their number.
    """
    beside = dict(beside)
    entries = beside.pop("index", None)
    if beside and store.leaf is not p and entries is not None and entries != digest(store.index):
        raise ValueError(
            f"`load_state_dict(...)` was given the optimizer's state for other entries of a tensor of shape "
            f"{tuple(p.shape)} than the {len(store.index)} that are selected: load the selection that was saved with "
            "it (resume with the same callback, under the same `name`), or the weights alone."
        )
    extra = {k: v for k, v in beside.items() if k in ("master", "age", "origin", "sum")}
    store.restore(p, extra)
    if store.leaf is p:
        return whole
    state = {k: v for k, v in beside.items() if k not in extra}
    wrong = [k for k, v in state.items() if isinstance(v, Tensor) and v.ndim == 1 and v.shape != store.leaf.shape]
    if wrong:
        raise ValueError(
            f"The checkpoint's optimizer holds {len(state[wrong[0]])} entries ({wrong[0]}) of a tensor of shape "
            f"{tuple(p.shape)} of which {store.leaf.numel()} are selected: load the selection that was saved with it."
        )
    return state


def _reshaped(
    state: dict[str, Any], change: Callable[[Tensor], Tensor] | None, shape: torch.Size, same: bool
) -> dict[str, Any]:
    """State of a parameter whose shape has changed: its tensors of the present ``shape``, or the others, follow."""
    if change is None:
        return state
    whole = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim == len(shape)}
    fits = {k for k, v in whole.items() if (v.shape == shape) == same}
    return {k: change(v) if k in fits else v for k, v in state.items()}


def _park(owner: Owner, p: nn.Parameter, found: dict[str, Any]) -> None:
    slot = owner.slots[p]
    # Selections of its entries never freeze it: another one has.
    claims = [claim for claim in owner.claims.values() if p in claim.covered and p not in claim.narrow]
    policy = claims[0].state if claims else "keep"
    if policy == "drop":
        return
    place = torch.device("cpu") if policy == "offload" else p.device
    slot.devices = {k: v.device if k == "step" else p.device for k, v in found.items() if isinstance(v, Tensor)}
    slot.parked = {k: v.to(place, copy=True) if isinstance(v, Tensor) else v for k, v in found.items()}
