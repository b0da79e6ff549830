"""Sparse deltas: applied to the base, or a model loaded anew, and taken back, bit for bit.

`difference` and `from_indices` make a `Delta`; `save` and `load` keep it as a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apportion.deltafile import Change, Delta, load, save
from apportion.difference import difference, from_indices
from apportion.named import Digest, bits, fingerprint, first_names, put, some, table, take
from apportion.naming import Renaming, renaming

__all__ = ["Change", "Delta", "apply", "difference", "fingerprint", "from_indices", "load", "revert", "save"]


def apply(
    delta: Delta, model: nn.Module, alpha: float = 1.0, *, prefix: str | None = None, verify: bool = True
) -> None:
    """Writes a delta into the base, in place.

        value = old                        alpha = 0, bit for bit
        value = new                        alpha = 1, bit for bit
        value = old + alpha (new - old)    else, in fp32 (fp64 for fp64), rounded once

    ``old`` is what the model holds. Tensors that the base does not have are written as they are, whatever ``alpha``.
    All checks come before the first write: a model that is refused is untouched.

    Args:
        delta: The delta.
        model: The base, on any device; its names may have a prefix more or less than the delta's.
        alpha: How far to go from the base to the tuned model; any finite number.
        prefix: The prefix that one of the two has; None finds it.
        verify: Whether to read the whole model and compare its fingerprint. Without, a delta lands on another base, or
            with ``alpha`` twice, and nothing says so: only for a base that has just been verified.

    Raises:
        ValueError: If the model is not the delta's base, has the delta already, or differs in names, shapes or dtypes.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> delta = difference(model, {"weight": torch.tensor([[1.0, 3.0, 1.0]])})
        >>> apply(delta, model, alpha=0.5)
        >>> model.weight.data
        tensor([[1., 2., 1.]])
        >>> revert(delta, model, alpha=0.5)
        >>> model.weight.data
        tensor([[1., 1., 1.]])
    """
    _check_alpha("apply", delta, alpha)
    tensors = table(model)
    way = renaming({*delta.names, *delta.changes}, tensors, prefix)
    found = _checked(delta, tensors, way)
    if verify:
        _verify(delta, tensors, way)
    fresh = set(delta.fresh)
    for name, change in delta.changes.items():
        if name in fresh:
            put(found[name], None, change.new)
        elif alpha != 0:
            put(found[name], change.indices, _blend(take(found[name], change.indices), change.new, alpha))


def revert(delta: Delta, model: nn.Module, alpha: float = 1.0, *, prefix: str | None = None) -> None:
    """Puts the base's values back where `apply` has written, bit for bit, in place.

    Tensors that the base does not have stay as they are. Only the delta's entries are looked at, all of them before the
    first write.

    Args:
        delta: The delta that was applied, with old values.
        model: The model that it was applied to.
        alpha: The ``alpha`` that it was applied with.
        prefix: As in `apply`.

    Raises:
        ValueError: If the delta has no old values, or the model does not hold what `apply` has written.
    """
    if not delta.revertible:
        raise ValueError(
            "`revert(...)` needs the base's values, and this delta was made without them: make it with "
            "`old_values=True`, or load the base again."
        )
    _check_alpha("revert", delta, alpha)
    tensors = table(model)
    found = _checked(delta, tensors, renaming({*delta.names, *delta.changes}, tensors, prefix))
    changes = _of_base(delta)
    other = [name for name, change in changes.items() if not _holds(found[name], change, alpha)]
    if other:
        raise ValueError(
            f"`revert(alpha={alpha})`: {some(other)} do not hold the values of this delta: it was not applied, or with "
            "another `alpha`, or the model has been trained since."
        )
    for name, change in changes.items():
        assert change.old is not None
        put(found[name], change.indices, change.old)


def _of_base(delta: Delta) -> dict[str, Change]:
    known = set(delta.names)
    return {name: change for name, change in delta.changes.items() if name in known}


def _blend(old: Tensor | None, new: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        return new
    assert old is not None
    if alpha == 0:
        return old
    wide = torch.float64 if new.dtype == torch.float64 else torch.float32
    start = old.to(wide)
    return (start + alpha * (new.to(old.device, wide) - start)).to(new.dtype)


def _holds(tensor: Tensor, change: Change, alpha: float) -> bool:
    old = None if change.old is None else change.old.to(tensor.device)
    expected = _blend(old, change.new, alpha).to(tensor.device)
    return torch.equal(bits(take(tensor, change.indices)), bits(expected))


def _check_alpha(call: str, delta: Delta, alpha: float) -> None:
    if not math.isfinite(alpha):
        raise ValueError(f"`{call}(alpha={alpha})` must be a finite number: 0 is the base, 1 the tuned model.")
    whole = [name for name, change in _of_base(delta).items() if not change.new.is_floating_point()]
    if whole and alpha not in (0, 1):
        raise ValueError(
            f"`{call}(alpha={alpha})` must be 0 or 1: {some(whole)} hold integers, and have no in-between."
        )


def _checked(delta: Delta, tensors: Mapping[str, Tensor], way: Renaming) -> dict[str, Tensor]:
    """The model's tensors under the delta's names, fit to be written."""
    found = {name: tensors[way(name)] for name in delta.changes}
    for name, change in delta.changes.items():
        if found[name].shape != change.shape:
            raise ValueError(
                f"`{way(name)}` is {tuple(found[name].shape)} in the model and {change.shape} in the delta."
            )
        if found[name].dtype != change.new.dtype:
            raise ValueError(
                f"`{way(name)}` is {found[name].dtype} in the model and {change.new.dtype} in the delta: load the "
                f"model with `dtype={change.new.dtype}`."
            )
        bits(found[name])  # refuses what cannot be written
    first, owner = first_names(tensors), dict[str, str]()
    for name in (*delta.changes, *(n for n in delta.names if n not in delta.changes)):
        other = owner.setdefault(first[way(name)], name)
        if other != name and other in delta.changes:
            raise ValueError(
                f"`{other}` and `{name}` are one tensor in this model and two in the delta: make the delta from models "
                "that are tied in the same way."
            )
    return found


def _verify(delta: Delta, tensors: Mapping[str, Tensor], way: Renaming) -> None:
    digest = Digest()
    for name in sorted(delta.names):
        digest.add(name.removeprefix(delta.prefix), tensors[way(name)])
    if digest.text() != delta.base_hash:
        changes = _of_base(delta)
        if changes and all(_holds(tensors[way(name)], change, 1.0) for name, change in changes.items()):
            raise ValueError(
                "`apply(...)`: the model has this delta already: call `revert` first, or leave it as it is."
            )
        raise ValueError(
            "`apply(...)`: the model is not the base of this delta: its fingerprint differs, in bits, dtypes or "
            "shapes. Load the weights that the training began with, in the same dtype; if another delta is applied, "
            "revert that first."
        )
    first = first_names(tensors)
    covered = {first[way(name)] for name in (*delta.names, *delta.changes)} | {way(name) for name in delta.dropped}
    inside = [n for n, t in tensors.items() if isinstance(t, nn.Parameter) and n.startswith(way.added)]
    extra = [name for name in inside if first[name] not in covered and name not in covered]
    if extra:
        raise ValueError(
            f"`apply(...)`: the model has {some(extra)}, which the base of this delta has not: it is another model. "
            "Apply the delta to the part that is its base, or pass `verify=False`."
        )
