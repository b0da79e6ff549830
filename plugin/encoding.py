"""Sets of flat indices as few bytes: as they are, as gaps, or as one bit for each entry of the tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

KINDS = ("int32", "int64", "gaps", "bitmask")
_PARTS = {"int32": "indices", "int64": "indices", "gaps": "gaps", "bitmask": "bits"}
_STORED = {"int32": torch.int32, "int64": torch.int64, "gaps": torch.uint16, "bitmask": torch.uint8}
_ESCAPE = 65535  # a step without an entry
_WIDE = 2**31


def index_dtype(n: int) -> torch.dtype:
    """The dtype of indices in [0, n): int32 as long as ``n`` itself fits.

    Example:
        >>> index_dtype(2**31 - 1), index_dtype(2**31)
        (torch.int32, torch.int64)
    """
    return torch.int32 if n < _WIDE else torch.int64


def sizes(indices: Tensor, n: int) -> dict[str, int]:
    """Exact bytes of every encoding of ``indices``.

        absolute = 4 k                          int32; 8 k from n = 2^31 on (int64)
        gaps     = 2 (k + sum_i floor(d_i / 65535)),   d_i = indices_i - indices_{i-1} - 1,   indices_{-1} = -1
        bitmask  = ceil(n / 8)

    For positions at random the bitmask wins above a density of 1/16 (6.25%), gaps from there down to about 1 in 95,000,
    where an entry has one escape (2 bytes) on average, and int32 below. Against int32 alone the bitmask wins above
    1/32 (3.1%).

    Args:
        indices: Sorted, unique, int32 or int64, shape (k,), in [0, n).
        n: Entries of the tensor.

    Raises:
        ValueError: If ``indices`` is not such a set.

    Example:
        >>> sizes(torch.arange(0, 1600, 100), 1600)
        {'int32': 64, 'gaps': 32, 'bitmask': 200}
    """
    check(indices, n)
    escapes = int((_steps(indices) // _ESCAPE).sum())
    absolute = "int32" if index_dtype(n) == torch.int32 else "int64"
    return {
        absolute: _STORED[absolute].itemsize * len(indices),
        "gaps": 2 * (len(indices) + escapes),
        "bitmask": (n + 7) // 8,
    }


def encode(indices: Tensor, n: int) -> tuple[str, dict[str, Tensor]]:
    """The smallest of the encodings, by its exact bytes; of equal ones the first in `KINDS`.

    Gaps are the numbers of entries skipped before each selected one, as uint16. 65535 is an escape: it goes 65535
    entries on and selects none, so that a gap of any length is some escapes and a rest below 65535. Bits are those of
    entries 0, 1, ... from the lowest bit of the first byte on.

    Args:
        indices: Sorted, unique, int32 or int64, shape (k,), in [0, n).
        n: Entries of the tensor.

    Returns:
        The kind, one of `KINDS`, and its tensors by name, on the CPU.

    Raises:
        ValueError: If ``indices`` is not such a set.

    Example:
        >>> encode(torch.tensor([3, 65538, 65540, 200000]), 300_000)
        ('gaps', {'gaps': tensor([    3, 65534,     1, 65535, 65535,  3389], dtype=torch.uint16)})
        >>> encode(torch.tensor([0, 2, 9]), 12)
        ('bitmask', {'bits': tensor([5, 2], dtype=torch.uint8)})
    """
    indices = indices.detach().cpu()
    bytes_of = sizes(indices, n)
    kind = min(bytes_of, key=bytes_of.__getitem__)
    if kind == "gaps":
        steps = _steps(indices)
        escapes = steps // _ESCAPE
        codes = torch.full((len(steps) + int(escapes.sum()),), _ESCAPE, dtype=torch.int32)
        codes[torch.cumsum(escapes + 1, 0) - 1] = (steps % _ESCAPE).to(torch.int32)
        coded = codes.to(torch.uint16)
    elif kind == "bitmask":
        mask = torch.zeros(n, dtype=torch.bool)
        mask[indices.long()] = True
        coded = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    else:
        coded = indices.to(_STORED[kind])
    return kind, {_PARTS[kind]: coded}


def decode(kind: str, tensors: Mapping[str, Tensor], n: int, count: int) -> Tensor:
    """The indices that `encode` was given.

    Args:
        kind: One of `KINDS`.
        tensors: What `encode` returned with it.
        n: Entries of the tensor.
        count: How many indices there must be.

    Returns:
        Sorted, unique indices in [0, n), shape (count,), int32, or int64 from ``n`` = 2^31 on.

    Raises:
        ValueError: If ``tensors`` is not the encoding of ``count`` sorted, unique indices in [0, n).

    Example:
        >>> decode("bitmask", {"bits": torch.tensor([5, 2], dtype=torch.uint8)}, 12, 3)
        tensor([0, 2, 9], dtype=torch.int32)
    """
    if kind not in KINDS:
        raise ValueError(f"`decode({kind!r})` must be one of {', '.join(KINDS)}.")
    if set(tensors) != {_PARTS[kind]}:
        raise ValueError(f"`decode({kind!r})` needs one tensor, {_PARTS[kind]!r}, and got {sorted(tensors)}.")
    coded = tensors[_PARTS[kind]]
    if coded.dtype != _STORED[kind] or coded.ndim != 1:
        raise ValueError(f"`decode({kind!r})` needs {_STORED[kind]} in one dimension, not {_described(coded)}.")
    indices = _INVERSE[kind](coded, n)
    check(indices, n)
    if len(indices) != count:
        raise ValueError(f"`decode({kind!r}, count={count})` found {len(indices)} indices.")
    return indices.to(index_dtype(n))


def check(indices: Tensor, n: int) -> None:
    """Refuses what is not a sorted set of indices in [0, n).

    Raises:
        ValueError: If ``indices`` has another dtype than int32 and int64, another shape than (k,), is not sorted, has
            one twice, or leaves its range.
    """
    if n < 0:
        raise ValueError(f"A tensor of {n} entries has no indices: `n` must be at least 0.")
    if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
        raise ValueError(f"Indices must be int32 or int64 in one dimension, not {_described(indices)}.")
    if not len(indices):
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError("Indices must rise from each to the next: sort them, and name none twice (`torch.unique`).")
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= n:
        raise ValueError(f"Indices from {first} to {last} must lie in [0, {n}), the entries of the tensor.")


def _steps(indices: Tensor) -> Tensor:
    """Entries skipped before each index, int64."""
    return torch.diff(indices.long(), prepend=torch.full((1,), -1, device=indices.device)) - 1


def _from_gaps(coded: Tensor, n: int) -> Tensor:
    codes = coded.to(torch.int64)
    entries = codes != _ESCAPE
    if len(codes) and not bool(entries[-1]):
        raise ValueError("Gaps must not end with an escape: something is missing behind it.")
    return (torch.cumsum(codes + entries, 0) - 1)[entries]


def _from_bits(coded: Tensor, n: int) -> Tensor:
    if len(coded) != (n + 7) // 8:
        raise ValueError(f"A bitmask of {n} entries has {(n + 7) // 8} bytes, not {len(coded)}.")
    bits = torch.from_numpy(np.unpackbits(coded.cpu().numpy(), bitorder="little"))
    if bool(bits[n:].any()):
        raise ValueError(f"A bitmask of {n} entries has bits set behind the last entry.")
    return bits.nonzero().squeeze(1)


def _as_stored(coded: Tensor, n: int) -> Tensor:
    if coded.dtype != index_dtype(n):
        raise ValueError(f"Indices in [0, {n}) are stored as {index_dtype(n)}, not {coded.dtype}.")
    return coded


_INVERSE = {"int32": _as_stored, "int64": _as_stored, "gaps": _from_gaps, "bitmask": _from_bits}


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
