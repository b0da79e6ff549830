"""Makes a delta: from a base and what it was tuned to, or from the entries that a training knows it has changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apportion.deltafile import Change, Delta
from apportion.encoding import check, index_dtype, sizes
from apportion.named import Digest, Source, bits, first_names, some, table, take
from apportion.naming import Pairs, pair


def difference(
    base: Source,
    tuned: Source,
    *,
    old_values: bool = True,
    fresh: str | None = None,
    prefix: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Delta:
    """The delta between a base and a model tuned from it: every entry whose bits differ.

    Values are kept as they are, never as differences: in bf16 ``w + (v - w)`` is often not ``v``. A tuned model of
    another floating-point dtype is rounded to the base's first, with a warning. A tensor that takes fewer bytes as a
    whole is kept whole.

    Args:
        base: The base model, or its tensors by name; a mapping that is no ``dict`` is asked for one tensor at a time.
        tuned: The tuned model, or its tensors; their names may all have one prefix more than the base's.
        old_values: Whether to keep the base's values, which `revert` needs and which double the bytes of the values.
        fresh: Regular expression on the last parts of names that the base does not determine, although it may hold
            them (a head drawn at random): they are kept whole and do not count in the base's fingerprint.
        prefix: The prefix of the part of ``tuned`` that counts; None finds it.
        config: Anything to be kept along, as JSON has it.

    Raises:
        ValueError: If names, shapes or dtypes do not go together, or rounding makes a value infinite.

    Example:
        >>> base = {"w": torch.zeros(2, 30)}
        >>> tuned = {"model.w": torch.zeros(2, 30).index_fill(1, torch.tensor(4), 0.5)}
        >>> delta = difference(base, tuned)
        >>> delta.changes["w"].indices, delta.changes["w"].new, delta.changes["w"].old
        (tensor([ 4, 34], dtype=torch.int32), tensor([0.5000, 0.5000]), tensor([0., 0.]))
    """
    return _between(table(base), table(tuned), None, old_values, fresh, prefix, config)


def from_indices(
    base: Source | str,
    tuned: Source,
    indices: Mapping[str, Tensor | None],
    *,
    old: Mapping[str, Tensor] | None = None,
    old_values: bool = True,
    fresh: str | None = None,
    prefix: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Delta:
    """The delta of a training that knows which entries it has trained; they are kept whether or not they moved.

    Args:
        base: The base, as in `difference`; or, where it is gone, its `fingerprint`, taken before training with
            ``without=fresh``. Only with the base itself can it be seen that nothing else has changed.
        tuned: The tuned model, or its tensors.
        indices: Name in the tuned model to flat indices, sorted; None for the whole tensor.
        old: Only with a fingerprint: name to the base's values at the indices, for all names or for none.
        old_values: Only with a base: whether to keep its values.
        fresh: As in `difference`; these tensors need no indices.
        prefix: As in `difference`; not with a fingerprint.
        config: As in `difference`.

    Raises:
        ValueError: If a name is unknown, indices are no sorted set, or, with a base, another entry has changed too.

    Example:
        >>> before = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
        >>> after = {"w": torch.zeros(2, 3), "b": torch.ones(2)}
        >>> from_indices(before, after, {"b": None}).changes["b"].new
        tensor([1., 1.])
    """
    now = table(tuned)
    first = first_names(now)
    unknown = [name for name in (*indices, *(old or {})) if name not in first]
    if unknown:
        raise ValueError(f"`from_indices(...)`: {some(unknown)} are not in the tuned model, which has {some(first)}.")
    chosen = {first[n]: torch.arange(now[n].numel()) if idx is None else idx.cpu() for n, idx in indices.items()}
    if not isinstance(base, str):
        if old is not None:
            raise ValueError("`from_indices(old=...)` is for a base that is gone: leave it out, `base` has the values.")
        return _between(table(base), now, chosen, old_values, fresh, prefix, config)
    if prefix is not None:
        raise ValueError("`from_indices(prefix=...)` needs the base's names: give the base, not its fingerprint.")
    own = {name: now[name] for name in dict.fromkeys(first.values())}
    pairs = pair(own, own, "", fresh)
    was = {first[name]: values.detach().cpu().reshape(-1) for name, values in (old or {}).items()}
    lacking = [name for name in chosen if name in pairs.shared and len(chosen[name]) and name not in was]
    if old is not None and lacking:
        raise ValueError(f"`from_indices(old=...)` lacks the values of {some(lacking)}: give those of all, or of none.")
    changes = {}
    for name, idx in chosen.items():
        if name in pairs.shared and len(idx):
            check(idx, own[name].numel())
            changes[name] = _change(own[name].shape, take(own[name], idx).cpu(), was.get(name), idx)
    return Delta({**changes, **_fresh(pairs, own)}, tuple(sorted(pairs.shared)), base, config or {})


def _between(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor] | None,
    old_values: bool,
    fresh: str | None,
    prefix: str | None,
    config: Mapping[str, Any] | None,
) -> Delta:
    pairs, digest, first = pair(base, tuned, prefix, fresh), Digest(), first_names(tuned)
    changes: dict[str, Change] = {}
    rounded: set[str] = set()
    for name, (of_base, of_tuned) in sorted(pairs.shared.items()):
        was, now = base[of_base].detach().cpu(), tuned[of_tuned].detach().cpu()
        digest.add(of_base, was)
        if now.dtype != was.dtype:
            rounded.add(f"{now.dtype} to {was.dtype}")
        now = _like(name, now, was)
        moved = (bits(was) != bits(now)).reshape(-1)
        if chosen is None:
            idx = moved.nonzero().squeeze(1)
        else:
            idx = chosen.get(first[of_tuned], torch.empty(0, dtype=torch.int64)).long()
            check(idx, now.numel())
            moved[idx] = False
            if bool(moved.any()):
                raise ValueError(
                    f"`from_indices(...)`: {int(moved.sum())} entries of `{name}` have changed outside its indices and "
                    "would be lost: use `difference`, or find out what moved them."
                )
        if len(idx):
            at = None if _cheaper_whole(idx, now, old_values) else idx
            changes[name] = _change(now.shape, take(now, at), take(was, at) if old_values else None, at)
    if rounded:
        warnings.warn(f"The tuned values were rounded to the base's dtype: {', '.join(sorted(rounded))}.", stacklevel=3)
    names = tuple(sorted(pairs.shared))
    return Delta({**changes, **_fresh(pairs, tuned)}, names, digest.text(), config or {}, pairs.prefix, pairs.dropped)


def _like(name: str, now: Tensor, was: Tensor) -> Tensor:
    """Tuned values in the base's dtype."""
    if now.shape != was.shape:
        raise ValueError(
            f"`{name}` is {tuple(was.shape)} in the base and {tuple(now.shape)} in the tuned model: if training began "
            "with a tensor of its own there, name it in `fresh=`, so that it is kept whole."
        )
    if now.dtype == was.dtype:
        return now
    if not (now.is_floating_point() and was.is_floating_point()):
        raise ValueError(
            f"`{name}` is {was.dtype} in the base and {now.dtype} in the tuned model: neither is the other."
        )
    same = now.to(was.dtype)
    if bool((now.isfinite() & ~same.isfinite()).any()):
        raise ValueError(f"`{name}` has values that {was.dtype} cannot hold: load the base as {now.dtype}.")
    return same


def _cheaper_whole(indices: Tensor, now: Tensor, old_values: bool) -> bool:
    n, width = now.numel(), now.element_size() * (2 if old_values else 1)
    return n * width <= len(indices) * width + min(sizes(indices, n).values())


def _change(shape: torch.Size, new: Tensor, old: Tensor | None, indices: Tensor | None) -> Change:
    if indices is None or len(indices) == shape.numel():
        return Change(tuple(shape), new.reshape(shape), None if old is None else old.reshape(shape))
    return Change(tuple(shape), new, old, indices.to(index_dtype(shape.numel())))


def _fresh(pairs: Pairs, tuned: Mapping[str, Tensor]) -> dict[str, Change]:
    """What the base does not determine, whole."""
    whole = {name: take(tuned[of_tuned], None).cpu() for name, of_tuned in pairs.fresh.items()}
    return {name: Change(tuple(values.shape), values) for name, values in whole.items()}
