"""What tells a tuned model from its base, and the safetensors file that holds it."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apportion import encoding
from apportion.named import Digest, some

VERSION = 1
_KEY = "apportion-delta"


@dataclass(frozen=True, eq=False)
class Change:
    """New values of one tensor, at some of its entries or as a whole.

    Args:
        shape: Shape of the tensor.
        new: Values after training, shape (k,), or ``shape`` for the whole tensor, in the base's dtype.
        old: The base's values, as ``new``; None if they are not kept.
        indices: Flat indices of the k entries, sorted, int32 or int64; None for the whole tensor.

    Raises:
        ValueError: If shapes or dtypes do not fit together, or the indices are no sorted set.

    Example:
        >>> change = Change((2, 3), torch.tensor([0.5, 0.25]), indices=torch.tensor([1, 4]))
        >>> change.count, change.n
        (2, 6)
    """

    shape: tuple[int, ...]
    new: Tensor
    old: Tensor | None = None
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        expected: tuple[int, ...] = tuple(self.shape)
        object.__setattr__(self, "shape", expected)
        if self.indices is not None:
            encoding.check(self.indices, self.n)
            expected = (len(self.indices),)
        for name, values in (("new", self.new), ("old", self.old)):
            if values is not None and (values.shape != expected or values.dtype != self.new.dtype):
                raise ValueError(
                    f"`Change({name}=...)` is {values.dtype} of shape {tuple(values.shape)}; it must be "
                    f"{self.new.dtype} of shape {expected}, one value for each entry."
                )

    @property
    def n(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """Entries that have new values here."""
        return self.new.numel()

    def encoded(self) -> tuple[str, int]:
        """How the indices are written to a file (``whole`` if there are none), and the bytes of all that is written."""
        values = self.count * self.new.element_size() * (1 if self.old is None else 2)
        if self.indices is None:
            return "whole", values
        told = encoding.sizes(self.indices, self.n)
        kind = min(told, key=told.__getitem__)
        return kind, values + told[kind]


@dataclass(frozen=True, eq=False)
class Delta:
    """What tells a tuned model from its base.

    Args:
        changes: Name to what changed, or to a tensor that the base does not have; tied weights once.
        names: Names of the base's tensors, changed or not. A change under another name is fresh: the base does not
            determine it, so it has no old values and is not part of ``base_hash``.
        base_hash: `fingerprint` of the base's tensors under ``names``.
        config: Anything to be kept along, as JSON has it.
        prefix: What ``names`` have in front of the names that were hashed.
        dropped: Names of tensors of the base that the tuned model has no use for, such as another head.

    Raises:
        ValueError: If the hash is none, or a name or the config cannot be.
    """

    changes: Mapping[str, Change]
    names: tuple[str, ...]
    base_hash: str
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.base_hash, str) or re.fullmatch("[0-9a-f]{64}", self.base_hash) is None:
            raise ValueError(f"`Delta(base_hash={self.base_hash!r})` must be what `fingerprint` gives: 64 hex digits.")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError("`Delta(names=...)` must list the base's tensors, at least one, each once.")
        wrong = [name for name in self.names if not name.startswith(self.prefix)]
        wrong += [name for name in self.fresh if self.changes[name].indices is not None]
        if wrong:
            raise ValueError(
                f"`Delta(...)`: {some(wrong)} must begin with `{self.prefix}`, or be whole if it is not of the base."
            )
        try:
            config = json.loads(json.dumps(dict(self.config)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`Delta(config=...)` must be what JSON can hold: {error}.") from None
        object.__setattr__(self, "config", config)

    @property
    def fresh(self) -> tuple[str, ...]:
        """Names of the tensors that the base does not determine."""
        known = set(self.names)
        return tuple(name for name in self.changes if name not in known)

    @property
    def revertible(self) -> bool:
        """Whether old values are held for all that the base had."""
        fresh = set(self.fresh)
        return all(change.old is not None for name, change in self.changes.items() if name not in fresh)


def save(delta: Delta, path: str | Path) -> None:
    """Writes a delta as one safetensors file, under another name first, so that no half file is ever at ``path``.

    Indices take the smallest encoding of each tensor. With bf16 values and no old ones an entry costs 6 bytes with
    int32 indices, 4 with gaps and 2 + 1/(8 s) with a bitmask at density s; old values cost 2 more. One metadata entry
    holds the names, the base's fingerprint, the config and a SHA-256 over all of these and the tensors.

    Raises:
        OSError: If the file cannot be written.
    """
    path, tensors, rows = Path(path), {}, {}
    for name, change in delta.changes.items():
        kind, coded = (None, {}) if change.indices is None else encoding.encode(change.indices, change.n)
        rows[name] = {"shape": list(change.shape), "count": change.count, "encoding": kind}
        parts = {"new": change.new, **({} if change.old is None else {"old": change.old}), **coded}
        tensors.update({f"{part}:{name}": t.detach().cpu().contiguous() for part, t in parts.items()})
    header = {
        "version": VERSION,
        "base_hash": delta.base_hash,
        "prefix": delta.prefix,
        "names": list(delta.names),
        "dropped": list(delta.dropped),
        "config": delta.config,
        "changes": rows,
    }
    text = json.dumps({"sha256": _sha256(header, tensors), **header}, sort_keys=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file(_apart(tensors), fresh, metadata={_KEY: text})
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def load(path: str | Path) -> Delta:
    """Reads what `save` has written, onto the CPU. Nothing is unpickled; nothing in the file is ever run.

    Raises:
        ValueError: If the file is no delta, of an unknown version, incomplete, or not as it was written.
        FileNotFoundError: If there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            keys = list(file.keys()) if text else []
            # Copies: what safetensors gives out is a map of the file, which may change after it has been checked.
            tensors = {key: file.get_tensor(key).clone() for key in keys}
    except SafetensorError as error:
        raise ValueError(
            f"`load({str(path)!r})`: the file is cut short, altered or no safetensors ({error})."
        ) from None
    if text is None:
        raise ValueError(
            f"`load({str(path)!r})`: a safetensors file, but no delta: `save` and `apportion-export` write one."
        )
    try:
        return _read(json.loads(text), tensors)
    except KeyError as error:
        raise ValueError(f"`load({str(path)!r})`: the file lacks {error}.") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"`load({str(path)!r})`: {error}") from error


def _read(header: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
    version, written = header["version"], header.pop("sha256")
    if version != VERSION:
        raise ValueError(f"the file is of version {version!r} and this code reads version {VERSION}: update apportion.")
    if _sha256(header, tensors) != written:
        raise ValueError("the file is not as it was written: its SHA-256 differs. Get it again.")
    changes, left = {}, set(tensors)
    for name, row in header["changes"].items():
        shape, kind = tuple(row["shape"]), row["encoding"]
        held = {part: tensors[f"{part}:{name}"] for part in _PARTS if f"{part}:{name}" in tensors}
        left -= {f"{part}:{name}" for part in held}
        new, old = held.pop("new"), held.pop("old", None)
        indices = None if kind is None else encoding.decode(kind, held, math.prod(shape), row["count"])
        changes[name] = Change(shape, new, old, indices)
    if left:
        raise ValueError(f"the file holds {some(left)}, which no change asks for.")
    return Delta(
        changes,
        tuple(header["names"]),
        header["base_hash"],
        header["config"],
        header["prefix"],
        tuple(header["dropped"]),
    )


_PARTS = ("new", "old", "indices", "gaps", "bits")


def _sha256(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = Digest()
    digest.add(json.dumps(header, sort_keys=True), torch.empty(0))
    for key in sorted(tensors):
        digest.add(key, tensors[key])
    return digest.text()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own each, as safetensors asks for."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensors[key] = tensor.clone()
        seen.add(storage)
    return tensors
