"""The k best of very many scores, exactly, in one pass: nothing here grows with the number of scores, only with k.

Order of importance: score descending, then tensor order, then index, both ascending. Scores that are not finite (NaN
and both infinities) come last, as equals. A cutoff alone would choose too many where scores tie; ties are counted here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from apportion.kth import SAMPLE, kth_largest

CHUNK = 2**20
"""Scores looked at together; temporaries are no larger than this and what is kept."""


def finite(scores: Tensor) -> Tensor:
    """A copy with NaN and both infinities as minus infinity, so that they compare as the last ones and as equals."""
    return scores.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


@torch.no_grad()
def best(scores: Tensor, k: int) -> Tensor:
    """Indices of exactly the ``k`` best scores of one tensor, without sorting it.

    Args:
        scores: fp32, shape (n,).
        k: How many; all of them from n on.

    Returns:
        Sorted indices, int64, shape (min(k, n),).

    Example:
        >>> best(torch.tensor([1.0, float("nan"), 3.0, 1.0, float("inf")]), 2)
        tensor([0, 2])
    """
    if k >= len(scores):
        return torch.arange(len(scores), device=scores.device)
    if k <= 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    keys, index = _beyond(scores, k, None, -math.inf, strict=False)
    return index[_top(keys, k)]


def _top(keys: Tensor, k: int) -> Tensor:
    """Positions, ascending, of the ``k`` largest keys (shape (n,), no NaN); of equal keys the first."""
    return torch.arange(len(keys), device=keys.device) if k >= len(keys) else _true(_cut(keys, k)[0])


def _cut(keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which are the ``k`` largest keys, ``k`` from 1 to n, of equal ones the first; the last of them, and its place."""
    cut = kth_largest(keys, k)
    chosen = keys > cut
    ties = _true(keys == cut)[: k - int(torch.count_nonzero(chosen))]
    chosen[ties] = True
    return chosen, cut, ties[-1]


def _floor(scores: Tensor, k: int, taken: Tensor | None) -> float:
    """A value that very likely at least ``k``, and not many more, scores outside ``taken`` reach; or minus infinity."""
    n = len(scores)
    if n <= 4 * SAMPLE or 2 * k >= n:
        return -math.inf
    step = n // SAMPLE | 1  # odd, so that it walks through the columns of matrices as wide as a power of two
    sample = finite(scores[::step])
    left, free = len(sample), n
    if taken is not None:
        hit = taken[taken % step == 0] // step
        sample[hit] = -math.inf
        left, free = left - len(hit), free - len(taken)
    expected = left * k / max(1, free)
    rank = int(expected + 4.0 * math.sqrt(expected) + 4.0)  # four standard deviations to the safe side
    return float(kth_largest(sample, rank)) if rank <= left else -math.inf


def _scan(scores: Tensor, k: int, taken: Tensor | None, cut: float, strict: bool) -> tuple[Tensor, Tensor]:
    """Keys and sorted indices of at most 2 k scores above ``cut``, or at it unless ``strict``; the k best included."""
    starts = range(0, len(scores), CHUNK)
    bounds = [0] * (len(starts) + 1)
    if taken is not None:
        bounds = torch.searchsorted(taken, torch.tensor([*starts, len(scores)], device=taken.device)).tolist()
    found = [(scores.new_empty(0), torch.empty(0, dtype=torch.int64, device=scores.device))]
    held = 0
    for chunk, start in enumerate(starts):
        key = finite(scores[start : start + CHUNK])
        mask = key > cut if strict else key >= cut
        if taken is not None:
            mask[taken[bounds[chunk] : bounds[chunk + 1]] - start] = False
        at = _true(mask)
        found.append((key[at], at + start))
        held += len(at)
        if held > 2 * k:
            keys, index = _joined(found)
            kept = _top(keys, k)
            found, held = [(keys[kept], index[kept])], k
            cut, strict = float(keys[kept].min()), True  # what comes later has to be better: as good is not enough
    return _joined(found)


def _true(mask: Tensor) -> Tensor:
    """Positions of True in a mask, ascending; where they are few, eight entries are looked at as one number.

    On the CPU `nonzero` takes longer than working out the scores, whatever it finds; this takes a quarter of it.
    """
    whole = len(mask) // 8 * 8
    mask = mask.clone() if mask.storage_offset() % 8 else mask  # a number has to begin where numbers do
    blocks = mask[:whole].view(torch.int64).nonzero().flatten() if mask.device.type == "cpu" else None
    if blocks is None or 16 * len(blocks) > whole:
        return mask.nonzero().flatten()
    block, place = mask[:whole].view(-1, 8)[blocks].nonzero().unbind(1)
    return torch.cat([blocks[block] * 8 + place, mask[whole:].nonzero().flatten() + whole])


def _joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([key for key, _ in found]), torch.cat([at for _, at in found])


def _beyond(scores: Tensor, k: int, taken: Tensor | None, cut: float, strict: bool) -> tuple[Tensor, Tensor]:
    """As `_scan`, with a first guess at a cutoff where there is none."""
    floor = cut if cut > -math.inf or strict else _floor(scores, k, taken)
    keys, index = _scan(scores, k, taken, floor, strict)
    if len(index) < k and floor > cut:  # the sample was misleading
        keys, index = _scan(scores, k, taken, cut, strict)
    return keys, index


class Stream:
    """The ``k`` best units of many tensors, which come in any order: the same ones as if all were sorted together.

    At most 2 k candidates are held. Whenever there would be more, the k best stay, and the last of them is the bar that
    later units have to pass, so that most tensors cost one comparison with it.

    Args:
        k: How many; all of them where there are fewer.
        taken: Sorted indices (int64), by tensor, of units that cannot be chosen.

    Attributes:
        held: Candidates held now.
        peak: The most that were held at once.

    Example:
        >>> stream = Stream(2)
        >>> stream.push(1, torch.tensor([3.0, 5.0]))
        >>> stream.push(0, torch.tensor([1.0, 3.0]))
        >>> stream.chosen()[0]
        {0: tensor([1]), 1: tensor([1])}
    """

    def __init__(self, k: int, taken: Mapping[int, Tensor] | None = None) -> None:
        self.k = k
        self.held = 0
        self.peak = 0
        self._taken = dict(taken or {})
        self._seen: set[int] = set()
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: dict[int, Tensor] = {}
        # The last of the k best: its key, and its tensor, before which an equal key still wins.
        self._cut = -math.inf
        self._last = math.inf

    @torch.no_grad()
    def push(self, i: int, scores: Tensor, payload: Tensor | None = None) -> None:
        """Looks at the units of tensor ``i``; see `Chooser`.

        Raises:
            ValueError: If the tensor was pushed before.
        """
        if i in self._seen:
            raise ValueError(
                f"`push({i}, ...)` came twice in one pass, so its units would count twice: push a tensor when its "
                "scores are final, and open a new chooser for the next pass."
            )
        self._seen.add(i)
        taken = self._taken.get(i)
        if taken is not None:
            taken = taken.to(scores.device, torch.int64) if len(taken) else None
        if self.k == 0:
            return
        keys, index = _beyond(scores, self.k, taken, self._cut, strict=i > self._last)
        if self.held + len(index) > 2 * self.k:
            self.settle()
            kept = (keys > self._cut if i > self._last else keys >= self._cut).nonzero().flatten()
            kept = kept[_top(keys[kept], self.k)]
            keys, index = keys[kept], index[kept]
        if len(index) == 0:
            return
        if payload is not None:
            self._rows[i] = payload[index]
        # Half the bytes of int64, for what there is most of.
        self._found[i] = (keys, index.to(torch.int32) if len(scores) < 2**31 else index)
        self.held += len(index)
        self.peak = max(self.peak, self.held)

    @torch.no_grad()
    def settle(self) -> None:
        """Drops all but the k best of what came so far."""
        if self.held <= self.k:
            return
        order = sorted(self._found)
        device = self._found[order[0]][0].device  # models can lie on several
        chosen, cut, last = _cut(torch.cat([self._found[i][0].to(device) for i in order]), self.k)
        sizes = [len(self._found[i][0]) for i in order]
        self._cut = float(cut)
        self._last = order[bisect_right([0, *accumulate(sizes)], int(last)) - 1]
        for i, mask in zip(order, chosen.split(sizes), strict=True):
            key, index = self._found.pop(i)
            rows = self._rows.pop(i, None)
            part = _true(mask.to(key.device))
            if len(part):
                self._found[i] = (key[part], index[part])
            if len(part) and rows is not None:
                self._rows[i] = rows[part]
        self.held = self.k

    def chosen(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Sorted indices (int64) of the chosen units by tensor, and their payloads in the same order."""
        self.settle()
        return {i: self._found[i][1].long() for i in sorted(self._found)}, dict(sorted(self._rows.items()))


class Split:
    """A `Stream` for each part of the model, each with a count of its own.

    Args:
        parts: Part that each tensor belongs to.
        counts: Units to choose in each part.
        taken: Sorted indices (int64), by tensor, of units that cannot be chosen.

    Example:
        >>> split = Split(parts=(0, 1), counts=(1, 1))
        >>> split.push(1, torch.tensor([3.0, 5.0]))
        >>> split.push(0, torch.tensor([1.0, 0.0]))
        >>> split.chosen()[0]
        {0: tensor([0]), 1: tensor([1])}
    """

    def __init__(self, parts: Sequence[int], counts: Sequence[int], taken: Mapping[int, Tensor] | None = None) -> None:
        self.parts = tuple(parts)
        self.streams = tuple(Stream(k, taken) for k in counts)
        self._left = [self.parts.count(part) for part in range(len(counts))]

    def push(self, i: int, scores: Tensor, payload: Tensor | None = None) -> None:
        """Looks at the units of tensor ``i``; see `Chooser`."""
        part = self.parts[i]
        self.streams[part].push(i, scores, payload)
        self._left[part] -= 1
        if self._left[part] == 0:  # nothing more comes for this part: hold k, not 2 k
            self.streams[part].settle()

    def chosen(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Sorted indices (int64) of the chosen units by tensor, and their payloads in the same order."""
        pairs = [stream.chosen() for stream in self.streams]
        chosen = {i: index for pair in pairs for i, index in pair[0].items()}
        rows = {i: row for pair in pairs for i, row in pair[1].items()}
        return dict(sorted(chosen.items())), dict(sorted(rows.items()))
